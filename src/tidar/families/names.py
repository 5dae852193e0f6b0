"""What the tensors of a checkpoint are called on disk: one value for each way of naming them."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Names without `.weight` or `.bias`. layers: what comes before a layer's number; its parts follow the number.

    gate, up, down: the feed-forward is `down(silu(gate(x)) * up(x))`. Norms of queries and keys exist in Qwen3 alone.
    """

    embed: str
    layers: str
    norm: str
    head: str
    attn_norm: str
    q: str
    k: str
    v: str
    o: str
    mlp_norm: str
    gate: str
    up: str
    down: str
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"


TRANSFORMERS: Final = TensorNames(
    embed="model.embed_tokens",
    layers="model.layers.",
    norm="model.norm",
    head="lm_head",
    attn_norm="input_layernorm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)
"""Of `transformers`, and of Dream, whose modelling file follows Qwen2's."""

LLADA: Final = TensorNames(
    embed="model.transformer.wte",
    layers="model.transformer.blocks.",
    norm="model.transformer.ln_f",
    head="model.transformer.ff_out",
    attn_norm="attn_norm",
    q="q_proj",
    k="k_proj",
    v="v_proj",
    o="attn_out",
    mlp_norm="ff_norm",
    gate="ff_proj",
    up="up_proj",
    down="ff_out",
)
"""Of LLaDA, which names them as OLMo does. Source: `LLaDALlamaBlock` and `LLaDAModel` in modeling_llada.py of
GSAI-ML/LLaDA-8B-Base (the same file is in NVlabs/Fast-dLLM, llada/model); `ff_proj` goes through the activation,
`up_proj` does not. llama.cpp's converter maps the same names."""
