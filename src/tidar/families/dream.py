"""Dream (Ye et al., arXiv 2508.15487): Qwen2's network and names, all rows seeing one another, labels shifted.

Sources: configuration_dream.py, modeling_dream.py (biases on q, k and v alone, `is_causal = False`) and
generation_utils.py (the logits move one row on: the row before a position predicts it) of
Dream-org/Dream-v0-Base-7B; `DreamModel` of llama.cpp's converter. Dream-Coder and DiffuCoder are of the same class.
"""

from dataclasses import replace
from typing import Final

from tidar.errors import TidarError
from tidar.families import llama
from tidar.families.fields import Json, RawConfig, flag, refuse_other_classes, whole_number
from tidar.model import ModelConfig, RopeConfig

ARCHITECTURE: Final = "DreamModel"


def read(raw: RawConfig, mask_token_id: int | None) -> ModelConfig:
    """See `Family.read`.

    Raises:
        TidarError: another class of this model_type, multimodal RoPE, biases that Dream does not have, or what
            `llama.read` refuses of a Qwen2 checkpoint.
    """
    refuse_other_classes(raw, ARCHITECTURE)
    for key in ("use_mrope", "mlp_bias"):
        if flag(raw, key):
            raise TidarError(f"config.json: {key} is true; of model_type 'Dream' only false is supported")  # fmt: skip
    mask = whole_number(raw, "mask_token_id")
    config = llama.read({**raw, "model_type": "qwen2"}, mask)
    if config.head_dim * config.num_heads != config.hidden_size:
        raise TidarError(
            f"config.json: head_dim is {config.head_dim}; of model_type 'Dream' only hidden_size / "
            f"num_attention_heads = {config.hidden_size / config.num_heads:g} is supported"
        )
    return replace(config, model_type="Dream", attention="bidirectional", label_shift=True)


def write(config: ModelConfig) -> Json:
    """See `Family.write`. RoPE under the keys of transformers 4, which is what the published code reads."""
    if config.rope != RopeConfig(theta=config.rope.theta) or config.mask_token_id is None:
        raise TidarError("a Dream checkpoint needs a mask token and plain RoPE")
    if config.attention != "bidirectional" or not config.label_shift:
        raise TidarError("a Dream checkpoint needs bidirectional attention and shifted labels")
    plain = replace(config, model_type="qwen2", attention="causal", label_shift=False)
    raw = llama.write(plain)
    del raw["rope_parameters"]
    return {
        **raw,
        "architectures": [ARCHITECTURE],
        "model_type": "Dream",
        "mask_token_id": config.mask_token_id,
        "rope_theta": config.rope.theta,
        "rope_scaling": None,
    }
