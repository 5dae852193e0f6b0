"""What a decode step costs on this machine, by its number of rows: measured once, read by the plan."""

import statistics
import time
from bisect import bisect_left
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tidar.cache import KVCache
from tidar.layout import Schedule
from tidar.methods import Draft, Method, Pending
from tidar.model import Transformer
from tidar.sampling import SamplingParams, seeded_draw

Floats = NDArray[np.float64]

BURST = 6
"""Steps of one size in a row while costs are measured; the first third is not counted."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of a decode step against its rows: measured points, straight lines between them.

    fixed_shape: a step has the rows of a full draft, however short its draft is (captured graphs).
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    fixed_shape: bool = False

    def at(self, request_ids: Collection[int]) -> "StepCosts":
        """These costs, whatever runs; see `CostSource`."""
        return self

    def at_least(self, floor: float) -> "StepCosts":
        """The same, but no step below `floor` seconds: what the host needs for a turn, say."""
        return replace(self, seconds=tuple(max(floor, seconds) for seconds in self.seconds))

    def ratio(self, rows: int) -> float:
        """Seconds of a step with so many rows, in AR steps."""
        return self.of(rows) / self.of(1)

    def of(self, rows: int) -> float:
        """Seconds of a step with so many rows; past the last point the last slope goes on."""
        after = bisect_left(self.rows, rows)
        if after == 0:
            return self.seconds[0]
        if after < len(self.rows):
            return self.seconds[after - 1] + (rows - self.rows[after - 1]) * self._slope(after)
        slope = max(self._slope(after - 1), 0.0) if after > 1 else 0.0
        return self.seconds[-1] + (rows - self.rows[-1]) * slope

    def _slope(self, after: int) -> float:
        """Seconds a row between the point `after` and the one before."""
        rise = self.seconds[after] - self.seconds[after - 1]
        return rise / (self.rows[after] - self.rows[after - 1])

    def __call__(self, rows: Iterable[int]) -> Floats:
        """Seconds for each row count."""
        return np.array([self.of(count) for count in rows])


class CostSource(Protocol):
    """Where a plan gets its costs from: they may depend on who runs, and how long the texts are by now."""

    def at(self, request_ids: Collection[int]) -> StepCosts:
        """What steps cost while these requests run; rows are those of one sequence."""
        ...


def step_rows(schedule: Schedule, drafts: int) -> int:
    """Rows of a step over a draft of `drafts` tokens."""
    drafts = min(drafts, schedule.draft_rows)
    return drafts + len(schedule.anchors(drafts)) * schedule.draft_len


def measure_costs(
    model: Transformer,
    method: Method[Any],
    batch: int = 1,
    max_draft_len: int = 16,
    *,
    context: int = 256,
    repeats: int = 6,
    budget: float = 3.0,
) -> StepCosts:
    """Times real decode steps of growing size behind a prefix of `context` tokens; medians.

    Sizes are interleaved over the repeats, so that a disturbance hits all of them alike. Each is run in a
    burst, and large ones come before small ones: right after a step of 272 rows a plain AR step takes a
    quarter longer than in a text (measured on a CPU). Sizes that cost far more than `max_draft_len` AR
    steps cannot pay and are left out; after `budget` seconds no further repeat begins.
    """
    context = max(1, min(context, model.config.max_positions - 3 * max_draft_len))
    points = list(_profile_schedules(max_draft_len))
    weight = next(model.parameters())
    cache = KVCache(model.config, batch, device=weight.device, dtype=weight.dtype)
    cache.reserve(context + max(step_rows(s, s.draft_len) for s in points))
    cache.lengths = [context] * batch
    began = time.perf_counter()
    times: dict[int, list[float]] = {}
    first = float("inf")
    for schedule in tuple(points):  # warms up, and leaves out what cannot pay
        seconds = min(_time_step(model, method, schedule, cache, context)[1] for _ in range(2))
        if seconds > 2 * max_draft_len * first:
            points = points[: points.index(schedule)]
            break
        first = min(first, seconds)
    for repeat in range(repeats):
        if repeat and time.perf_counter() - began > budget:
            break
        for schedule in reversed(points):
            burst = [_time_step(model, method, schedule, cache, context) for _ in range(BURST)]
            times.setdefault(burst[0][0], []).extend(seconds for _, seconds in burst[BURST // 3 :])
    sizes = sorted(times)
    medians = [statistics.median(times[size]) for size in sizes]
    return StepCosts(tuple(sizes), tuple(np.maximum.accumulate(medians).tolist()))


def _profile_schedules(max_draft_len: int) -> tuple[Schedule, ...]:
    """Schedules whose row counts cover the range of the candidates."""
    wanted = [(1, ()), (2, (1,)), (3, (1,)), (4, (1,)), (4, (1, 2)), (8, (1,)), (8, (1, 2))]
    wanted += [(16, (1,)), (16, (1, 2)), (16, (1, 2, 4)), (16, (1, 2, 3, 5, 8, 16))]
    wanted += [(32, (1, 2, 4)), (16, tuple(range(1, 17)))]
    return tuple(Schedule(k, anchors) for k, anchors in wanted if k <= max_draft_len)


@torch.inference_mode()
def _time_step(
    model: Transformer, method: Method[Any], schedule: Schedule, cache: KVCache, context: int
) -> tuple[int, float]:
    """Rows and seconds of one step with a full draft; the cache is as before afterwards."""
    batch = len(cache.lengths)
    draft = Draft(tuple(range(min(schedule.draft_len, model.config.vocab_size))))
    limit = context + len(draft.tokens) + 2 * schedule.draft_len + 1
    pending = [
        Pending(context, draft, limit, SamplingParams(), seeded_draw(0)) for _ in range(batch)
    ]
    weight = next(model.parameters())
    began = time.perf_counter()
    step = method.step(pending, schedule)
    attend = cache.attend(0, batch, step.visible)
    hidden = model(step.ids.to(weight.device), step.positions.to(weight.device), attend)
    method.resolve(step, hidden, model.logits)
    return step.ids.shape[1], time.perf_counter() - began
