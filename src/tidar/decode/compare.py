"""Are two decoded texts the same? Exactness with its one excuse: a near-tie of the top two choices.

Arithmetic of another shape rounds differently, so two exact decoders may part where the best two
tokens are closer together than rounding. Such a difference is excused and counted, any other is a
fault.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tidar.attention import dense_attend
from tidar.model import Transformer
from tidar.sampling import SamplingParams, gumbel_noise, process

NEAR_TIE: Final = 1e-4
"""Top-two margin under which a difference in float32 is excused."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two texts part. margin: of the causal model's top two choices there."""

    index: int
    expected: int | None
    got: int | None
    margin: float
    excused: bool


def causal_logits(model: Transformer, ids: Sequence[int]) -> Tensor:
    """Logits `[N, V]` of a plain causal pass: no cache, no mask rows, no engine."""
    device = model.embed.weight.device
    tokens = torch.tensor([list(ids)], device=device)
    positions = torch.arange(len(ids), device=device).unsqueeze(0)
    with torch.inference_mode():
        hidden = model(tokens, positions, dense_attend(is_causal=True))
        return model.logits(hidden[0])


def rounding_noise(model: Transformer, ids: Sequence[int]) -> float:
    """How far causal logits move when only the shape of the arithmetic changes.

    The floor under every comparison: the last rows of a full pass against passes over fewer tokens.
    """
    full = causal_logits(model, ids).float()
    worst = 0.0
    for length in {len(ids), max(1, len(ids) // 2), max(1, len(ids) - 1)} - {len(ids)}:
        part = causal_logits(model, ids[:length]).float()
        worst = max(worst, largest_difference(part, full[:length]))
    return worst


def largest_difference(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; entries that are -inf in both count as equal."""
    got, expected = got.float(), expected.float()
    return float(torch.where(got == expected, 0.0, (got - expected).abs()).max())


def near_tie_margin(model: Transformer, ids: Sequence[int]) -> float:
    """Margin under which a difference is excused: 1e-4 in float32.

    In a narrower type: four times the rounding measured here, and at least two steps of that type
    at the size of the largest logit.
    """
    dtype = model.embed.weight.dtype
    if dtype == torch.float32:
        return NEAR_TIE
    steps = 2 * torch.finfo(dtype).eps * logit_scale(model, ids)
    return max(NEAR_TIE, 4 * rounding_noise(model, ids), steps)


def logit_scale(model: Transformer, ids: Sequence[int]) -> float:
    """The largest finite logit of a causal pass, in size; at least 1."""
    logits = causal_logits(model, ids)
    return max(1.0, float(logits[logits.isfinite()].abs().max()))


def choice_margin(model: Transformer, ids: Sequence[int], params: SamplingParams) -> float:
    """Top-two margin of the choice of the token after `ids`, noise included where there is any."""
    logits = causal_logits(model, ids)[-1:].float()
    if not params.greedy:
        position = torch.tensor([len(ids)], device=logits.device)
        noise = gumbel_noise(params.seed, position, logits.shape[-1])
        logits = process(logits, params) + noise
    best = logits.topk(2, dim=-1).values[0]
    return float(best[0] - best[1])


def first_difference(
    model: Transformer,
    prompt: Sequence[int],
    expected: Sequence[int],
    got: Sequence[int],
    params: SamplingParams,
    near_tie: float,
) -> Difference | None:
    """The first token at which `got` is not `expected`; None where they are equal.

    What comes after is not compared: another token makes another text.
    """
    if list(expected) == list(got):
        return None
    shared = min(len(expected), len(got))
    index = next((i for i in range(shared) if expected[i] != got[i]), shared)
    if index == shared:  # one stopped early: no tie can explain that
        margin = float("inf")
    else:
        margin = choice_margin(model, [*prompt, *expected[:index]], params)
    return Difference(
        index,
        expected[index] if index < len(expected) else None,
        got[index] if index < len(got) else None,
        margin,
        margin < near_tie,
    )
