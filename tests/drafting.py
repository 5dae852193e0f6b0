"""Drafting without a model: acceptance by chance, and the rule by which drafts carry on."""

import random

import numpy as np
from numpy.typing import NDArray

from tidar.decode.costs import StepCosts, step_rows
from tidar.layout import Schedule

Floats = NDArray[np.float64]

FREE = StepCosts((1, 400), (0.010, 0.011))
"""Rows cost almost nothing."""

DEAR = StepCosts((1, 101), (0.010, 1.010))
"""Every row costs as much as an AR step."""


def fading(first: float, last: float, depth: int = 64) -> Floats:
    """Acceptance by depth, from `first` at depth 1 down to `last`."""
    return np.concatenate([[1.0], np.linspace(first, last, depth)])


def accept(
    rng: random.Random, survival: Floats, shift: int, drafted: int, rejoined: float = 1.0
) -> int:
    """How many of `drafted` tokens commit; the one at index i is that of span row shift + i.

    rejoined: what the first one of a shifted draft passes by, over what its row says.
    """
    accepted, factor = 1, rejoined if shift else 1.0
    while accepted < drafted and rng.random() < factor * survival[shift + accepted]:
        accepted, factor = accepted + 1, 1.0
    return accepted


def carry_on(schedule: Schedule, drafted: int, accepted: int) -> tuple[int, int]:
    """Shift and length of the next draft, by the rule of the design, section 4, step 3."""
    if schedule.draft_len == 1:
        return 0, 1
    if schedule.half == "verify":
        return schedule.draft_len - 1, 1
    anchors = [n for n in schedule.span_set if n <= drafted] or [1]
    earlier = [n for n in anchors if n <= accepted]
    if not earlier:
        return schedule.draft_len - 1, 1
    shift = accepted - max(earlier)
    return shift, schedule.draft_len - shift


def simulate(
    schedule: Schedule, survival: Floats, costs: StepCosts, rejoined: float, steps: int = 40_000
) -> float:
    """Tokens per second of steps that have the rows of a full draft, whatever it holds."""
    rng, tokens, shift, drafted = random.Random(0), 0, 0, schedule.draft_len
    for _ in range(steps):
        accepted = accept(rng, survival, shift, drafted, rejoined)
        tokens += accepted
        shift, drafted = carry_on(schedule, drafted, accepted)
    return tokens / (steps * costs.of(step_rows(schedule, schedule.draft_len)))
