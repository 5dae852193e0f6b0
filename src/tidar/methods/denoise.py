"""What methods share that write a span over several passes: tokens for open rows, and how sure they are.

A row of such a span is open (a mask) or settled (a token). Each pass proposes a token for every open row
and settles some of them; the others are masks again in the next one (MaskGIT, arXiv 2202.04200).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tidar.errors import TidarError
from tidar.sampling import SamplingParams, choose, mix


def check_unverified(name: str, params: SamplingParams, *, forced: bool) -> None:
    """Raises TidarError for what only makes sense where a draft is verified."""
    if params.rejects:
        raise TidarError(
            f"{name} has no drafts to verify, so no rejection sampling (sampling 'rejection'); it draws with "
            "the noise of the seed: use 'shared-noise'."
        )
    if forced:
        raise TidarError(f"{name} verifies nothing, so its text cannot be forced.")


def noise_of_pass(params: SamplingParams, passes: int) -> SamplingParams:
    """The same parameters with a seed for this pass over a span, the number `passes`.

    A token that stayed open is drawn anew, as the methods define it; with the noise of its position alone
    it would come back as it was. No pass depends on batch or preemption.
    """
    mixed = int(mix(mix(torch.tensor(params.seed)) + passes + 1))
    return replace(params, seed=mixed & (2**63 - 1))


def propose(
    logits: Tensor, params: SamplingParams, positions: Sequence[int], passes: int
) -> Tensor:
    """A token for each open row, int64 `[M]`, from logits `[M, V]`; arg-max, or drawn at temperature > 0."""
    places = torch.tensor(positions, device=logits.device)
    return choose(logits, noise_of_pass(params, passes), places)


def probability_of(tokens: Tensor, logits: Tensor) -> Tensor:
    """Probability `[M]` of `tokens` `[M]` under `logits` `[M, V]`, float32."""
    return logits.float().softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
