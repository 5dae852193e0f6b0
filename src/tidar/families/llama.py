"""Llama, Mistral, Qwen2 and Qwen3: config.json <-> `ModelConfig`, as `transformers` reads it.

Reads what transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`) write, with their defaults. What
this network does not compute is refused by name.
"""

from collections.abc import Mapping
from typing import Final, cast

from tidar.errors import TidarError
from tidar.families.fields import (
    Json,
    RawConfig,
    flag,
    is_number,
    number,
    optional_number,
    optional_whole_number,
    refuse_quantized,
    whole_number,
)
from tidar.model import ROPE_KINDS, ModelConfig, ModelType, RopeConfig, RopeKind

ARCHITECTURES: Final[Mapping[str, str]] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What `transformers` assumes where config.json is silent, and the families differ.
_DEFAULT_POSITIONS: Final = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_DEFAULT_KV_HEADS: Final = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_DEFAULT_WINDOW: Final = 4096
_ROPE_KEYS: Final = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_positions",
    "attention_factor": "attention_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
}
_ROPE_OPTIONAL: Final = ("attention_factor", "mscale", "mscale_all_dim")
_ROPE_REQUIRED: Final = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def read(raw: RawConfig, mask_token_id: int | None) -> ModelConfig:
    """See `Family.read`.

    Raises:
        TidarError: anything that this network does not compute: quantised weights, other activations, dynamic RoPE,
            a sliding window shorter than the context.
    """
    model_type = raw["model_type"]
    refuse_quantized(raw)
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise TidarError(f"hidden_act {activation!r} is not supported; allowed: silu")
    heads, hidden = whole_number(raw, "num_attention_heads"), whole_number(raw, "hidden_size")
    max_positions = whole_number(raw, "max_position_embeddings", _DEFAULT_POSITIONS[model_type])
    layers = whole_number(raw, "num_hidden_layers")
    _refuse_sliding_window(raw, model_type, max_positions, layers)
    head_dim = raw.get("head_dim", 128 if model_type == "qwen3" else None)
    bias = model_type == "qwen2" or (model_type != "mistral" and flag(raw, "attention_bias"))
    return ModelConfig(
        model_type=cast(ModelType, model_type),
        vocab_size=whole_number(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=whole_number(raw, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_kv_heads(raw, model_type, heads),
        head_dim=hidden // max(heads, 1) if head_dim is None else head_dim,
        rms_norm_eps=number(raw, "rms_norm_eps", 1e-6),
        max_positions=max_positions,
        tie_embeddings=flag(raw, "tie_word_embeddings"),
        attention_bias=bias,
        output_bias=bias and model_type != "qwen2",
        mlp_bias=model_type == "llama" and flag(raw, "mlp_bias"),
        qk_norm=model_type == "qwen3",
        rope=_rope_from_hf(raw, max_positions),
        mask_token_id=mask_token_id,
    )


def write(config: ModelConfig) -> Json:
    """See `Family.write`; valid for transformers 5."""
    family = config.model_type
    expected = {
        "llama": (config.attention_bias, config.attention_bias, config.mlp_bias, False),
        "mistral": (False, False, False, False),
        "qwen2": (True, False, False, False),
        "qwen3": (config.attention_bias, config.attention_bias, False, True),
    }[family]
    given = (config.attention_bias, config.output_bias, config.mlp_bias, config.qk_norm)
    if given != expected:
        names = ("attention_bias", "output_bias", "mlp_bias", "qk_norm")
        wrong = [f"{n}={e}" for n, g, e in zip(names, given, expected, strict=True) if g != e]
        raise TidarError(f"a {family} checkpoint needs {', '.join(wrong)}")
    raw: Json = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": _rope_to_hf(config.rope),
    }
    if family in ("llama", "qwen3"):
        raw["attention_bias"] = config.attention_bias
    if family == "llama":
        raw["mlp_bias"] = config.mlp_bias
    if family == "mistral":
        raw["sliding_window"] = None  # absent means 4096 in this family
    # transformers would otherwise assume Llama's ids 1 and 2 for start and end of text.
    raw.update(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return raw


def _kv_heads(raw: RawConfig, model_type: str, heads: int) -> int:
    """Key/value heads: an explicit null means as many as heads, absence the family's default."""
    default = None if "num_key_value_heads" in raw else _DEFAULT_KV_HEADS.get(model_type)
    given = optional_whole_number(raw, "num_key_value_heads")
    return next((value for value in (given, default) if value is not None), heads)


def _rope_from_hf(raw: RawConfig, max_positions: int) -> RopeConfig:
    """RoPE of either configuration style; what a kind does not use is dropped, as upstream."""
    entry = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(entry, dict):
        raise TidarError(f"config.json: rope parameters must be an object, got {entry!r}")
    if any(isinstance(value, dict) for value in entry.values()):
        raise TidarError("RoPE parameters that differ by layer type are not supported")
    kind = entry.get("rope_type", entry.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise TidarError(f"RoPE type {kind!r} is not supported; allowed: {', '.join(ROPE_KINDS)}")
    partial = entry.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise TidarError(f"partial_rotary_factor {partial} is not supported; allowed: 1.0")
    if entry.get("mrope_section"):
        raise TidarError("multimodal RoPE (mrope_section) is not supported")
    bases = (optional_number(each, "rope_theta") for each in (entry, raw))
    theta = float(next((base for base in bases if base is not None), 10000.0))
    values: Json = {"theta": theta, "kind": kind}
    if kind != "default":
        for key in _ROPE_REQUIRED[kind]:
            if not is_number(entry.get(key)):
                raise TidarError(f"RoPE type {kind!r} needs a number {key}, got {entry.get(key)!r}")
        values.update(
            {
                name: flag(entry, key) if key == "truncate" else optional_number(entry, key)
                for key, name in _ROPE_KEYS.items()
                if entry.get(key) is not None
            }
        )
    if kind in ("yarn", "llama3"):
        # A top-level entry wins, and the context stands in for an absent one: as in transformers.
        original = optional_whole_number(raw, "original_max_position_embeddings")
        values["original_max_positions"] = (
            original or values.get("original_max_positions") or max_positions
        )
    return RopeConfig(**values)


def _rope_to_hf(rope: RopeConfig) -> Json:
    """`rope_parameters` in the style of transformers 5, only the keys that the kind has."""
    keys: dict[RopeKind, tuple[str, ...]] = {
        "default": (),
        "linear": ("factor",),
        "yarn": (
            "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
            "beta_slow", "mscale", "mscale_all_dim", "truncate",
        ),
        "llama3": (
            "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
        ),
    }  # fmt: skip
    entry: Json = {"rope_type": rope.kind, "rope_theta": rope.theta}
    for key in keys[rope.kind]:
        value = getattr(rope, _ROPE_KEYS[key])
        if value is not None or key not in _ROPE_OPTIONAL:
            entry[key] = value
    return entry


def _window(raw: RawConfig) -> int | None:
    """Tokens that a layer with a window sees; None where null stands for it."""
    if "sliding_window" not in raw:
        return _DEFAULT_WINDOW
    return optional_whole_number(raw, "sliding_window")


def _refuse_sliding_window(
    raw: RawConfig, model_type: str, max_positions: int, layers: int
) -> None:
    """Raise TidarError where some layer would see less than the whole context in `transformers`."""
    kinds = raw.get("layer_types")
    if model_type == "llama":
        return  # LlamaForCausalLM has no windows and ignores both entries
    if model_type == "mistral":
        window = _window(raw)
        active = window is not None
    else:
        window = _window(raw) if flag(raw, "use_sliding_window") else None
        if kinds is None:
            active = window is not None and layers > whole_number(raw, "max_window_layers", 28)
        else:
            if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
                raise TidarError(f"config.json: layer_types must be a list of texts, got {kinds!r}")
            if other := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
                raise TidarError(f"layer_types {', '.join(other)} are not supported")
            active = "sliding_attention" in kinds
            if active and window is None:
                raise TidarError(
                    "layer_types has sliding_attention, but no sliding_window is in use"
                )
    if active and window is not None and window < max_positions:
        raise TidarError(
            f"sliding_window {window} is shorter than the context of {max_positions} positions "
            "(max_position_embeddings); sliding window attention is not supported. Lower "
            "max_position_embeddings to the window to use the checkpoint within it"
        )
