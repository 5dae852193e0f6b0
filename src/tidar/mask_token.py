"""Which token stands for `[MASK]`, and its row in a model that was not made with one."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from tidar.hf_config import token_ids
from tidar.model import Transformer
from tidar.tokens import Tokenizer

# Tokens that families keep for later use, as their tokenizers spell them.
_RESERVED: Final = re.compile(
    r"<\|?(?:reserved_special_token|reserved_token|reserved|extra|unused)_?(\d+)\|?>"
    r"|\[(?:control|unused)_?(\d+)\]"
)


def choose_mask_token(raw_config: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[int, bool]:
    """Pick the token id for `[MASK]`, changing the model as little as possible.

    In this order: the one that the checkpoint already names; the tokenizer's own mask token, if the
    model has a row for it; the first row past every tokenizer id (Qwen pads its vocabulary); the last
    of the tokens that the family keeps in reserve (Llama 3, Mistral), as the first ones are those that
    others use; a new row.

    Args:
        raw_config: config.json of the checkpoint.
        tokenizer: its tokenizer.

    Returns:
        The token id, and whether the model needs a new row for it (`add_mask_row`).
    """
    entry = raw_config.get("tidar")
    if isinstance(entry, dict) and isinstance(entry.get("mask_token_id"), int):
        return entry["mask_token_id"], False
    rows = int(raw_config["vocab_size"])
    if tokenizer.mask_id is not None and tokenizer.mask_id < rows:
        return tokenizer.mask_id, False
    if tokenizer.max_id + 1 < rows:
        return tokenizer.max_id + 1, False
    used = set(tokenizer.special_ids)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        used.update(token_ids(raw_config.get(key)))
    reserved = [
        (int(match[1] or match[2]), token_id)
        for token, token_id in tokenizer.vocab.items()
        if (match := _RESERVED.fullmatch(token)) and token_id not in used and token_id < rows
    ]
    return (max(reserved)[1], False) if reserved else (rows, True)


@torch.no_grad()
def add_mask_row(model: Transformer) -> int:
    """Give embedding and head one more row, the mean of the others, and make it the mask token.

    The mean is the neutral choice: its logit is near the average one, and the row lies in the
    middle of what the first layer has seen. Optimizers made before hold the old parameters.

    Returns:
        The id of the new row.
    """
    mask_token_id = model.config.vocab_size
    model.embed.weight = _with_mean_row(model.embed.weight)
    model.embed.num_embeddings += 1
    if model.head is not None:
        model.head.weight = _with_mean_row(model.head.weight)
        model.head.out_features += 1
    model.config = replace(model.config, vocab_size=mask_token_id + 1, mask_token_id=mask_token_id)
    return mask_token_id


def _with_mean_row(weight: Tensor) -> nn.Parameter:
    """`[V, D]` -> `[V + 1, D]`, the mean taken in float32."""
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    return nn.Parameter(torch.cat((weight, mean)), requires_grad=weight.requires_grad)


@torch.no_grad()
def init_mask_row(model: Transformer, mask_token_id: int) -> None:
    """Make an existing row the mask token, its embedding the mean of the other rows.

    Unused rows of real checkpoints hold leftovers of their initialisation, some of them zeros,
    which RMSNorm cannot tell from anything.
    """
    model.set_mask_token(mask_token_id)
    weight = model.embed.weight
    total = weight.float().sum(dim=0) - weight[mask_token_id].float()
    weight[mask_token_id] = (total / max(weight.shape[0] - 1, 1)).to(weight.dtype)


def prepare_mask_token(
    model: Transformer, raw_config: Mapping[str, Any], tokenizer: Tokenizer
) -> int:
    """Choose the mask token of a base checkpoint and give `model` its row; the id.

    A checkpoint that already names one keeps its row as trained.
    """
    mask_token_id, needs_new_row = choose_mask_token(raw_config, tokenizer)
    if needs_new_row:
        return add_mask_row(model)
    if "tidar" in raw_config:
        model.set_mask_token(mask_token_id)
    else:
        init_mask_row(model, mask_token_id)
    return mask_token_id
