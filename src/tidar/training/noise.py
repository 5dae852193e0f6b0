"""Which tokens of a training pass are hidden behind the mask, and how much each hidden one weighs.

A group of rows (a span, a document) draws a share t of (0, 1] and hides each of its tokens with
probability t. A hidden row weighs 1 / t, so every token counts 1 in expectation. Draws are a hash
of (seed, epoch, sequence index, place), never of a generator's state.
"""

import torch
from torch import Tensor

from tidar.sampling import uniform

SMALLEST_SHARE = 1e-3
"""Lower bound of a share, so that no row weighs above 1000: LLaDA's `eps`.

`forward_process` in https://github.com/ML-GSAI/LLaDA/blob/main/GUIDELINES.md.
"""


def draw_shares(seed: int, batch: dict[str, Tensor], group: Tensor) -> Tensor:
    """A number of (0, 1] for each row of `group` `[B, L]`, equal within a group, float32."""
    epoch, index = batch["epoch"].unsqueeze(1), batch["index"].unsqueeze(1)
    return 1.0 - uniform(seed, 3, epoch, index, group)


def linear_shares(seed: int, batch: dict[str, Tensor], group: Tensor) -> Tensor:
    """Shares `[B, L]` as LLaDA, BD3-LM and SDAR draw them: uniform from `SMALLEST_SHARE` to 1."""
    return SMALLEST_SHARE + (1.0 - SMALLEST_SHARE) * draw_shares(seed, batch, group)


def hide(
    seed: int,
    batch: dict[str, Tensor],
    share: Tensor,
    mask_id: int,
    may_hide: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The token ids of a batch `[B, L]` with a `share` `[B, L]` of them hidden, and each row's weight.

    The weight is 1 / share for a hidden row and 0 for one that kept its token. may_hide: bool
    `[B, L]`, rows that may be hidden at all.
    """
    ids = batch["input_ids"]
    epoch, index = batch["epoch"].unsqueeze(1), batch["index"].unsqueeze(1)
    place = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    hidden = uniform(seed, 4, epoch, index, place) < share
    if may_hide is not None:
        hidden &= may_hide
    return torch.where(hidden, mask_id, ids), hidden / share
