"""LLaDA (Nie et al., arXiv 2502.09992): a Llama whose rows all see one another, under OLMo's keys and names.

Sources: configuration_llada.py (keys, and what each means where it is absent) and modeling_llada.py of
GSAI-ML/LLaDA-8B-Base; NVlabs/Fast-dLLM has both under llada/model. RoPE swaps halves, as in `transformers`: the
converter of llama.cpp permutes these weights exactly as Llama's. There is no label shift: a row predicts its own
position (the same converter: diffusion_shift_logits false).
"""

from typing import Any, Final

from tidar.errors import TidarError
from tidar.families.fields import (
    Json,
    RawConfig,
    flag,
    number,
    refuse_other_classes,
    refuse_quantized,
    whole_number,
)
from tidar.model import ModelConfig, RopeConfig

ARCHITECTURE: Final = "LLaDAModelLM"

# Key -> what the published code takes where config.json is silent, and what this network computes.
_REQUIRED: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "block_type": ("sequential", ("llama",)),
    "block_group_size": (1, (1,)),
    "activation_type": ("swiglu", ("silu",)),
    "rope": (False, (True,)),
    "alibi": (False, (False,)),
    "include_bias": (False, (False,)),
    "layer_norm_type": ("default", ("rms",)),
    "layer_norm_with_affine": (True, (True,)),
    "bias_for_layer_norm": (None, (None, False)),
    "attention_layer_norm": (False, (False,)),
    "multi_query_attention": (None, (None,)),
    "input_emb_norm": (False, (False,)),
    "scale_logits": (False, (False,)),
}


def read(raw: RawConfig, mask_token_id: int | None) -> ModelConfig:
    """See `Family.read`. The embedding's rows count, not `vocab_size`, which may leave padding out.

    Raises:
        TidarError: LLaDA-MoE, quantised weights, or an entry that this network does not compute: it names the key,
            the value and what is allowed.
    """
    refuse_other_classes(raw, ARCHITECTURE)
    refuse_quantized(raw)
    for key, (absent, allowed) in _REQUIRED.items():
        value = raw.get(key, absent)
        if value not in allowed:
            said = "" if key in raw else ", as it is where absent"
            raise TidarError(
                f"config.json: {key} is {value!r}{said}; of model_type 'llada' only "
                f"{' and '.join(map(repr, allowed))} is supported"
            )
    hidden, heads = whole_number(raw, "d_model"), whole_number(raw, "n_heads")
    if heads < 1 or hidden % heads:
        raise TidarError(f"config.json: d_model ({hidden}) must be a multiple of n_heads ({heads})")
    vocab = whole_number(raw, "vocab_size")
    rows = vocab if raw.get("embedding_size") is None else whole_number(raw, "embedding_size")
    if rows < vocab:
        raise TidarError(f"config.json: embedding_size {rows} is below vocab_size {vocab}")
    if raw.get("mlp_hidden_size") is None:
        wide = whole_number(raw, "mlp_ratio", 4) * hidden
    else:
        wide = whole_number(raw, "mlp_hidden_size")
    return ModelConfig(
        model_type="llada",
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=wide,
        num_layers=whole_number(raw, "n_layers"),
        num_heads=heads,
        num_kv_heads=heads if raw.get("n_kv_heads") is None else whole_number(raw, "n_kv_heads"),
        head_dim=hidden // heads,
        rms_norm_eps=number(raw, "rms_norm_eps", 1e-5),
        max_positions=whole_number(raw, "max_sequence_length", 1024),
        tie_embeddings=flag(raw, "weight_tying", True),
        attention_bias=flag(raw, "include_qkv_bias"),
        rope=RopeConfig(theta=number(raw, "rope_theta", 10000.0)),
        mask_token_id=whole_number(raw, "mask_token_id"),
        attention="bidirectional",
    )


def write(config: ModelConfig) -> Json:
    """See `Family.write`: every key that the published code has no fitting default for."""
    wrong = [
        name
        for name, fits in (
            ("head_dim", config.head_dim * config.num_heads == config.hidden_size),
            ("output_bias", not config.output_bias),
            ("mlp_bias", not config.mlp_bias),
            ("qk_norm", not config.qk_norm),
            ("rope", config.rope == RopeConfig(theta=config.rope.theta)),
            ("mask_token_id", config.mask_token_id is not None),
            ("attention", config.attention == "bidirectional" and not config.label_shift),
        )
        if not fits
    ]
    if wrong:
        raise TidarError(f"a llada checkpoint cannot express this network's {', '.join(wrong)}")
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llada",
        **{key: allowed[0] for key, (_, allowed) in _REQUIRED.items()},
        "d_model": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "mlp_hidden_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "max_sequence_length": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "include_qkv_bias": config.attention_bias,
        "weight_tying": config.tie_embeddings,
        "mask_token_id": config.mask_token_id,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
