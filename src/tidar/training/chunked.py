"""The loss of many rows with few logits in memory: a chunk of rows at a time, logits recomputed.

Chunks are recomputed in the backward pass, so at most one chunk of logits exists.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar.layout import IGNORE

CHUNK_ELEMENTS = 1 << 29
"""Logits held at once by default, in elements (2 GiB as float32)."""

ChunkLoss = Callable[..., Tensor]


def chunk_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    teacher: Tensor | None,
    teacher_head: Tensor,
    mask_id: int | None,
    soft: float,
) -> Tensor:
    """Summed loss of some rows, float32: hidden `[R, D]`, labels and weights `[R]`.

    teacher: hidden `[R, D]` of the causal rows whose distribution, by `teacher_head`, is the soft
    label, or None.
    """
    logits = F.linear(hidden, head).float()
    if mask_id is not None:
        logits[:, mask_id] = -torch.inf
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    if teacher is not None:
        target = F.linear(teacher, teacher_head).float()
        log_probs = logits.log_softmax(dim=-1)
        if mask_id is not None:
            target[:, mask_id] = -torch.inf
            log_probs = log_probs.index_fill(
                1, torch.tensor([mask_id], device=logits.device), 0.0
            )  # 0 * -inf is not a number
        spread = -(target.softmax(dim=-1).detach() * log_probs).sum(dim=-1)
        loss = (1.0 - soft) * loss + soft * torch.where(labels == IGNORE, 0.0, spread)
    if weights is not None:
        loss = loss * weights
    return loss.sum()


def even_chunk(rows: int, vocab_size: int) -> int:
    """Rows of a chunk of at most about `CHUNK_ELEMENTS` logits, if possible a divisor of `rows`.

    Equal chunks have one shape, so that the compiled loss has one graph.
    """
    fewest = -(-rows * vocab_size // CHUNK_ELEMENTS)
    for chunks in range(fewest, 2 * fewest + 1):
        if rows % chunks == 0:
            return rows // chunks
    return -(-rows // fewest)
