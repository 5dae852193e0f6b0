"""`config.json` of a Hugging Face folder <-> `ModelConfig`, and the `"tidar"` entry in it.

Reads what transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`,
`dtype`) write, with their defaults. What this network does not compute is refused by name: a
checkpoint that opens here gives the logits it gives in `transformers`.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast, get_args

from tidar.errors import TidarError
from tidar.model import MODEL_TYPES, ROPE_KINDS, ModelConfig, ModelType, RopeConfig, RopeKind

Json = dict[str, Any]
Masking = Literal["full", "random"]
Attention = Literal["causal", "bidirectional"]
SpanAttention = Literal["causal", "full"]
Trained = Literal["tidar", "block-diffusion", "masked-diffusion"]

FORMAT_VERSION: Final = 1
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


_HUB_FILES: Final = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
]
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class TidarMeta:
    """The `"tidar"` entry of `config.json`: how the mask rows were trained.

    Attributes:
        draft_lens: values of K (mask rows per span) in training, ascending; none where there were no spans,
            which is so with bidirectional attention.
        mask_token_id: the token id that fills mask rows.
        alpha: weight of the causal loss, `(alpha * causal + mask) / (1 + alpha)`.
        masking: every row of a span masked, or some of them real tokens.
        objective: what was learned. attention: what all rows see. label_shift: with bidirectional
            attention, the row before a position predicts it. span_attention: what clean rows see.
        format_version: of this entry.
    """

    draft_lens: tuple[int, ...]
    mask_token_id: int
    alpha: float = 1.0
    masking: Masking = "full"
    objective: Trained = "tidar"
    attention: Attention = "causal"
    label_shift: bool = False
    span_attention: SpanAttention = "causal"
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Refuse values that no training run can have had."""
        if self.format_version != FORMAT_VERSION:
            raise TidarError(
                f'"tidar" entry has format_version {self.format_version!r}; '
                f"this version of tidar reads {FORMAT_VERSION}"
            )
        lens = self.draft_lens
        if (
            (not lens and self.attention == "causal")
            or any(not _is_int(k) or k < 1 for k in lens)
            or list(lens) != sorted(set(lens))
        ):
            raise TidarError(
                '"tidar" entry: draft_lens must be whole numbers above 0, ascending, '
                f"each once; got {list(lens)}"
            )
        if not _is_int(self.mask_token_id) or self.mask_token_id < 0:
            raise TidarError(
                f'"tidar" entry: mask_token_id must be a token id, got {self.mask_token_id!r}'
            )
        if not _is_number(self.alpha) or not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise TidarError(f'"tidar" entry: alpha must be 0 or more, got {self.alpha!r}')
        choices = {"masking": Masking, "objective": Trained}
        choices |= {"attention": Attention, "span_attention": SpanAttention}
        for name, kind in choices.items():
            if (value := getattr(self, name)) not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise TidarError(f'"tidar" entry: {name} {value!r} is unknown; allowed: {allowed}')
        if not isinstance(self.label_shift, bool):
            raise TidarError('"tidar" entry: label_shift must be true or false')

    def to_json(self) -> Json:
        """The entry as JSON values; earlier versions read that of a TiDAR checkpoint."""
        plain = ("format_version", "draft_lens", "mask_token_id", "alpha", "masking")
        usual = (self.objective, self.attention) == ("tidar", "causal")
        names = plain if usual else self.__dataclass_fields__
        return {n: getattr(self, n) for n in names} | {"draft_lens": list(self.draft_lens)}

    @classmethod
    def from_json(cls, entry: object) -> "TidarMeta":
        """Read an entry. Raises TidarError for unknown versions and keys, and for bad values."""
        if not isinstance(entry, dict):
            raise TidarError(f'"tidar" entry must be an object, got {type(entry).__name__}')
        # Version first: a newer entry may have any keys, and its version is the real complaint.
        version = entry.get("format_version")
        if version != FORMAT_VERSION:
            raise TidarError(
                f'"tidar" entry has format_version {version!r}; '
                f"this version of tidar reads {FORMAT_VERSION}"
            )
        known = set(cls.__dataclass_fields__)
        if unknown := sorted(set(entry) - known):
            raise TidarError(
                f'"tidar" entry has unknown keys: {", ".join(unknown)}; '
                f"allowed: {', '.join(sorted(known))}"
            )
        if missing := sorted({"draft_lens", "mask_token_id"} - set(entry)):
            raise TidarError(f'"tidar" entry lacks {", ".join(missing)}')
        if not isinstance(entry["draft_lens"], list):
            raise TidarError('"tidar" entry: draft_lens must be a list of whole numbers')
        return cls(**{**entry, "draft_lens": tuple(entry["draft_lens"])})


def read_meta(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> TidarMeta | None:
    """The `"tidar"` entry of a config.json, checked against the rest of the folder.

    Args:
        raw: config.json.
        generation: generation_config.json, or an empty mapping.

    Returns:
        None where there is no entry: the checkpoint is plain autoregressive.

    Raises:
        TidarError: the entry is malformed, or its mask token is outside the vocabulary or is a
            token that the model has to emit (end of text).
    """
    if "tidar" not in raw:
        return None
    meta = TidarMeta.from_json(raw["tidar"])
    vocab_size = _number(raw, "vocab_size")
    if meta.mask_token_id >= vocab_size:
        raise TidarError(
            f'"tidar" entry: mask_token_id {meta.mask_token_id} is outside the vocabulary '
            f"of {vocab_size} rows"
        )
    for where, config in (("config.json", raw), ("generation_config.json", generation)):
        for key in ("bos_token_id", "eos_token_id"):
            if meta.mask_token_id in token_ids(config.get(key)):
                raise TidarError(
                    f'"tidar" entry: mask_token_id {meta.mask_token_id} is also the {key} '
                    f"of {where}; the mask token is never emitted and cannot serve as another"
                )
    return meta


def token_ids(value: object) -> tuple[int, ...]:
    """A token id entry of a config as a tuple: it may be absent, one id or a list of ids."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool))


def find_folder(source: str) -> Path:
    """The local folder of a path or hub id, with a config.json in it."""
    folder = Path(source).expanduser()
    if folder.is_file():
        raise TidarError(f"{source} is a file; give the folder that holds config.json")
    if not folder.is_dir():
        if source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source):
            raise TidarError(f"no such folder: {source}; give a checkpoint folder, or a hub id")
        folder = _download(source)
    if not (folder / "config.json").is_file():
        raise TidarError(f"{source} is no Hugging Face checkpoint: it has no config.json")
    return folder


def _download(hub_id: str) -> Path:
    """Fetch what a checkpoint needs, and no code or pickles, into the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except (OSError, HFValidationError) as error:  # every hub and network error is an OSError
        reason = str(error).strip().split("\n")[0]
        raise TidarError(
            f"{hub_id!r} is no local folder, and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason}). Check the path, or the id and the connection."
        ) from error


def read_json(path: Path) -> Json:
    """A JSON file that holds an object. Raises TidarError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TidarError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise TidarError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def config_from_hf(raw: Mapping[str, Any], *, mask_token_id: int | None = None) -> ModelConfig:
    """Read config.json of one of the four families.

    Args:
        raw: config.json as a mapping.
        mask_token_id: goes into the result as it is.

    Raises:
        TidarError: another family, or anything that this network does not compute: quantised
            weights, other activations, dynamic RoPE, a sliding window shorter than the context.
    """
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        remote = " (its remote code, auto_map, is never run)" if raw.get("auto_map") else ""
        raise TidarError(
            f"model_type {model_type!r} is not supported{remote}; allowed: {', '.join(MODEL_TYPES)}"
        )
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            method = raw[key].get("quant_method") if isinstance(raw[key], dict) else raw[key]
            raise TidarError(
                f"the checkpoint is quantized ({key}: {method or 'unknown method'}); "
                "only float32, bfloat16 and float16 weights are supported"
            )
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise TidarError(f"hidden_act {activation!r} is not supported; allowed: silu")
    heads, hidden = _number(raw, "num_attention_heads"), _number(raw, "hidden_size")
    max_positions = _number(raw, "max_position_embeddings", _DEFAULT_POSITIONS[model_type])
    layers = _number(raw, "num_hidden_layers")
    _refuse_sliding_window(raw, model_type, max_positions, layers)
    head_dim = raw.get("head_dim", 128 if model_type == "qwen3" else None)
    bias = model_type == "qwen2" or (model_type != "mistral" and _flag(raw, "attention_bias"))
    return ModelConfig(
        model_type=cast(ModelType, model_type),
        vocab_size=_number(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_number(raw, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_kv_heads(raw, model_type, heads),
        head_dim=hidden // max(heads, 1) if head_dim is None else head_dim,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        max_positions=max_positions,
        tie_embeddings=_flag(raw, "tie_word_embeddings"),
        attention_bias=bias,
        output_bias=bias and model_type != "qwen2",
        mlp_bias=model_type == "llama" and _flag(raw, "mlp_bias"),
        qk_norm=model_type == "qwen3",
        rope=_rope_from_hf(raw, max_positions),
        mask_token_id=mask_token_id,
    )


def config_to_hf(config: ModelConfig) -> Json:
    """config.json for a model made from scratch, valid for transformers 5 and without a dtype.

    Raises:
        TidarError: the family's class in `transformers` cannot express these biases or norms.
    """
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


def _kv_heads(raw: Mapping[str, Any], model_type: str, heads: int) -> int:
    """Key/value heads: an explicit null means as many as heads, absence the family's default."""
    value = raw.get("num_key_value_heads", _DEFAULT_KV_HEADS.get(model_type))
    return heads if value is None else int(value)


def _rope_from_hf(raw: Mapping[str, Any], max_positions: int) -> RopeConfig:
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
    theta = entry.get("rope_theta", raw.get("rope_theta"))
    values: Json = {"theta": 10000.0 if theta is None else float(theta), "kind": kind}
    if kind != "default":
        for key in _ROPE_REQUIRED[kind]:
            if not _is_number(entry.get(key)):
                raise TidarError(f"RoPE type {kind!r} needs a number {key}, got {entry.get(key)!r}")
        values.update(
            {name: entry[key] for key, name in _ROPE_KEYS.items() if entry.get(key) is not None}
        )
    if kind in ("yarn", "llama3"):
        # A top-level entry wins, and the context stands in for an absent one: as in transformers.
        original = raw.get("original_max_position_embeddings")
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


def _refuse_sliding_window(
    raw: Mapping[str, Any], model_type: str, max_positions: int, layers: int
) -> None:
    """Raise TidarError where some layer would see less than the whole context in `transformers`."""
    kinds = raw.get("layer_types")
    if model_type == "llama":
        return  # LlamaForCausalLM has no windows and ignores both entries
    if model_type == "mistral":
        window = raw.get("sliding_window", _DEFAULT_WINDOW)
        active = window is not None
    else:
        window = (
            raw.get("sliding_window", _DEFAULT_WINDOW) if _flag(raw, "use_sliding_window") else None
        )
        if kinds is None:
            active = window is not None and layers > int(raw.get("max_window_layers", 28))
        else:
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


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key, default)
    if value is None:
        raise TidarError(f"config.json lacks {key}")
    if not _is_int(value):
        raise TidarError(f"config.json: {key} must be a whole number, got {value!r}")
    return cast(int, value)


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key, False)
    if value is not None and not isinstance(value, bool):
        raise TidarError(f"config.json: {key} must be true or false, got {value!r}")
    return bool(value)
