"""The measured plan: which schedule pays, given what a step costs here and how drafts have fared.

Two facts decide. What rows cost on this machine: a profile of real steps, taken once (`StepCosts`). How
likely a draft token is to be accepted, by its depth, the number of positions between its span's anchor and
itself (`Acceptance`). From both, the long-run tokens per second of a schedule follow exactly, by the step
rule of the design (a Markov chain over how far the current draft is shifted); the best schedule is used,
plain AR among them. While AR is used, a probe now and then (two steps in a hundred at most) lets
drafting come back.

The plan sees accept counts and never a token that is still to be verified, so sampling stays exact.
"""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from tidar.cache import KVCache
from tidar.decode.request import StepEvent
from tidar.layout import AUTOREGRESSIVE, Schedule, dense_schedule, nearest_anchor, spans_for
from tidar.methods import Draft, Method, Pending
from tidar.model import Transformer
from tidar.sampling import SamplingParams, seeded_draw

Floats = NDArray[np.float64]

PROBE_PERIOD = 100
"""AR steps from one probe to the next; a probe drafts once and verifies once: 2% of steps."""


def candidate_schedules(draft_lens: Sequence[int]) -> tuple[Schedule, ...]:
    """AR, and for each K a ladder of span sets from one span to all of them."""
    found = {AUTOREGRESSIVE: None}
    for draft_len in draft_lens:
        sets = [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), (1, 2, 4, 8), (1, draft_len)]
        sets += [(1, 2, 3, 5, 8, 16), (1, 4, 8, 12, 16), (1, 2, draft_len)]
        for anchors in sets:
            kept = tuple(sorted({n for n in anchors if n <= draft_len}))
            found[Schedule(draft_len, kept)] = None
        found[dense_schedule(draft_len)] = None
    return tuple(found)


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of a decode step against its rows: measured points, straight lines between them."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, rows: Iterable[int]) -> Floats:
        """Seconds for each row count; past the last point the last slope goes on."""
        wanted = np.asarray(list(rows), dtype=np.float64)
        values = np.interp(wanted, self.rows, self.seconds)
        if len(self.rows) > 1:
            slope = (self.seconds[-1] - self.seconds[-2]) / (self.rows[-1] - self.rows[-2])
            values = values + np.maximum(wanted - self.rows[-1], 0) * max(slope, 0.0)
        return values


def _rows(schedule: Schedule, drafts: int) -> int:
    """Rows of a step with `drafts` draft rows."""
    if not schedule.drafts:
        return drafts
    return drafts + len(spans_for(schedule.span_set, drafts)) * schedule.draft_len


@dataclass(frozen=True)
class Chain:
    """A schedule's step rule as a Markov chain; its states are the shifts 0..K-1 of the current draft."""

    schedule: Schedule

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.schedule.draft_len - shift for shift in range(self.schedule.draft_len))

    @cached_property
    def rows(self) -> tuple[int, ...]:
        return tuple(_rows(self.schedule, length) for length in self.lengths)

    @cached_property
    def targets(self) -> Floats:
        """`[K, K, K]`: 1 where shift s and n accepted tokens (index n - 1) lead to shift t."""
        size = self.schedule.draft_len
        table = np.zeros((size, size, size))
        for shift, length in enumerate(self.lengths):
            for accepted in range(1, length + 1):
                table[shift, accepted - 1, next_shift(self.schedule, length, accepted)] = 1.0
        return table

    def rate(self, survival: Floats, costs: StepCosts) -> float:
        """Tokens per second in the long run.

        survival: at index r, how likely the draft token of span row r is accepted when its turn comes;
        length at least K, index 0 unused.
        """
        size = self.schedule.draft_len
        counts = np.zeros(
            (size, size)
        )  # counts[s, n - 1]: probability of n accepted tokens at shift s
        for shift, length in enumerate(self.lengths):
            reached = np.concatenate([[1.0], np.cumprod(survival[shift + 1 : shift + length])])
            counts[shift, : length - 1] = reached[:-1] - reached[1:]
            counts[shift, length - 1] = reached[-1]
        moves = np.einsum("sn,snt->st", counts, self.targets)
        state = np.full(size, 1.0 / size)
        for _ in range(6):  # squaring six times is 64 steps of the chain: settled for K up to 32
            moves = moves @ moves
        state = state @ moves
        tokens = counts @ np.arange(1, size + 1)
        return float((state @ tokens) / (state @ costs(self.rows)))


def next_shift(schedule: Schedule, drafted: int, accepted: int) -> int:
    """How far the next draft is shifted after `accepted` of `drafted` tokens; K - 1 leaves d[0] alone."""
    last = schedule.draft_len - 1
    if not schedule.drafts:
        return last
    anchor = nearest_anchor(spans_for(schedule.span_set, drafted), accepted)
    return min(accepted - anchor, last) if anchor else last


@dataclass(slots=True)
class Acceptance:
    """Mutable: how often draft tokens of each depth were accepted, recent steps weighing more."""

    depth: int
    memory: float = 0.95
    accepted: Floats = field(init=False)
    tried: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.accepted = np.zeros(self.depth + 1)
        self.tried = np.zeros(self.depth + 1)

    def observe(self, shift: int, drafted: int, accepted: int) -> None:
        """Takes in one step: the tokens of rows shift + 1 .. shift + drafted - 1 were up for verification."""
        end = min(shift + accepted, self.depth + 1)
        tried = min(shift + min(accepted + 1, drafted), self.depth + 1)
        self.accepted[shift + 1 : tried] *= self.memory
        self.tried[shift + 1 : tried] *= self.memory
        self.accepted[shift + 1 : end] += 1
        self.tried[shift + 1 : tried] += 1

    def estimate(self, others: Floats, weight: float) -> Floats:
        """Acceptance by depth of one request, given what all requests did (`others`).

        A text is predictable or not at all depths alike, so depths that it has not tried are judged by
        how its failures compare with the expected ones; `weight` is the trials that judgement counts as.
        """
        expected = float(self.tried @ (1.0 - others))
        failed = float((self.tried - self.accepted).sum())
        prior = 1.0 - np.clip((failed + 1.0) / (expected + 1.0) * (1.0 - others), 0.002, 0.98)
        return (self.accepted + weight * prior) / (self.tried + weight)

    def smoothed(self, start: float, weight: float) -> Floats:
        """Acceptance by depth where each depth takes the one before it as its prior."""
        values = np.empty(self.depth + 1)
        values[0] = start
        for depth in range(1, self.depth + 1):
            gained, tried = self.accepted[depth], self.tried[depth]
            values[depth] = (gained + weight * values[depth - 1]) / (tried + weight)
        return values

    def forget(self, keep: float) -> None:
        """Shrinks what is remembered to `keep` trials per depth at most."""
        scale = np.minimum(1.0, keep / np.maximum(self.tried, 1e-9))
        self.accepted *= scale
        self.tried *= scale


@dataclass(slots=True)
class _Track:
    """What the plan knows of one request."""

    acceptance: Acceptance
    shift: int = 0


class MeasuredPlan:
    """Mutable. A `Plan` that uses the schedule with the most tokens per second, AR among them.

    costs: from `measure_costs`. draft_lens: values of K to choose from, those trained. margin: how much
    better than AR, or than the schedule in use, another one must look before it is taken. replan: steps
    between two decisions.
    """

    def __init__(
        self,
        costs: StepCosts,
        *,
        draft_lens: Sequence[int] = (4, 8, 16),
        margin: float = 0.04,
        replan: int = 8,
    ) -> None:
        self.costs = costs
        self.margin, self.replan = margin, replan
        self.chains = tuple(Chain(schedule) for schedule in candidate_schedules(draft_lens))
        self.depth = max(draft_lens) - 1
        self.all = Acceptance(self.depth, memory=0.99)
        self.tracks: dict[int, _Track] = {}
        self.schedule = AUTOREGRESSIVE
        self.probe = Schedule(min(draft_lens), (1,))
        self.steps = 0
        self.ar_steps = 0
        self.probing = 0
        self.active: frozenset[int] = frozenset()

    @classmethod
    def measure(
        cls,
        model: Transformer,
        method: Method,
        *,
        batch: int = 1,
        draft_lens: Sequence[int] = (4, 8, 16),
    ) -> "MeasuredPlan":
        """A plan for this model on this machine; takes about a second."""
        return cls(measure_costs(model, method, batch, max(draft_lens)), draft_lens=draft_lens)

    def choose(self, request_ids: Sequence[int]) -> Schedule:
        """See `Plan`."""
        active = frozenset(request_ids)
        if active != self.active:
            self.active = active
            for request_id in active:
                self.tracks.setdefault(request_id, _Track(Acceptance(self.depth)))
            self.steps = self.ar_steps = self.probing = 0
            self.schedule = self._best()
            if (
                not self.schedule.drafts
            ):  # a new text gets its chance, whatever the others were like
                self.schedule = self.probe
        elif self.schedule.drafts:
            self.steps += 1
            # Sooner at first, when every step says much about a text that is new.
            if self.steps % self.replan == 0 or (self.steps <= 16 and self.steps % 4 == 2):
                self._decide()
        return self._probe() if not self.schedule.drafts else self.schedule

    def observe(self, event: StepEvent) -> None:
        """See `Plan`."""
        if (
            event.prefill
        ):  # ids are an engine's own: a prefill begins a text, whatever had the id before
            self.tracks[event.request_id] = _Track(Acceptance(self.depth))
            self.active = frozenset()
            return
        track = self.tracks[event.request_id]
        if event.drafted > 1:
            for acceptance in (track.acceptance, self.all):
                acceptance.observe(track.shift, event.drafted, event.accepted)
        track.shift = next_shift(event.schedule, event.drafted, event.accepted)
        if event.finish is not None:
            del self.tracks[event.request_id]

    def survival(self) -> Floats:
        """Acceptance by depth that decisions rest on: the running requests', all requests' as their prior."""
        prior = self.all.smoothed(start=0.7, weight=2.0)
        tracks = [self.tracks[i].acceptance.estimate(prior, weight=3.0) for i in self.active]
        return np.mean(tracks, axis=0) if tracks else prior

    def _best(self) -> Schedule:
        survival = self.survival()
        rates = {c.schedule: c.rate(survival, self.costs) for c in self.chains}
        best = max(rates, key=lambda schedule: rates[schedule])
        bar = rates[AUTOREGRESSIVE] * (1 + self.margin)
        if rates[best] < bar:
            return AUTOREGRESSIVE
        kept = rates[self.schedule]
        return self.schedule if kept >= bar and rates[best] < kept * (1 + self.margin) else best

    def _decide(self) -> None:
        self.schedule = self._best()
        if not self.schedule.drafts:
            self.ar_steps = self.probing = 0
            for track in self.tracks.values():
                track.acceptance.forget(keep=2.0)  # so that probes can change the estimate

    def _probe(self) -> Schedule:
        """The schedule of a step while AR is in use: AR, or in the two steps of a probe, the probe's."""
        self.ar_steps += 1
        if self.probing:
            self.probing -= 1
            if self.probing == 0:  # the verifying step has been observed
                self._decide()
                return self.schedule
            return self.probe
        if self.ar_steps % PROBE_PERIOD == PROBE_PERIOD - 1:
            self.probing = 2
            return self.probe
        return AUTOREGRESSIVE


def measure_costs(
    model: Transformer,
    method: Method,
    batch: int = 1,
    max_draft_len: int = 16,
    *,
    context: int = 256,
    repeats: int = 7,
) -> StepCosts:
    """Times real decode steps of growing size behind a prefix of `context` tokens; medians.

    Sizes are interleaved over the repeats, so that a disturbance hits all of them alike.
    """
    context = max(1, min(context, model.config.max_positions - 3 * max_draft_len))
    points = _profile_schedules(max_draft_len)
    weight = next(model.parameters())
    cache = KVCache(model.config, batch, device=weight.device, dtype=weight.dtype)
    cache.reserve(context + max(_rows(s, s.draft_len) for s in points))
    cache.lengths = [context] * batch
    times: dict[int, list[float]] = {}
    for repeat in range(repeats + 1):
        for schedule in points:
            rows, seconds = _time_step(model, method, schedule, cache, context)
            if repeat:  # the first round warms up
                times.setdefault(rows, []).append(seconds)
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
    model: Transformer, method: Method, schedule: Schedule, cache: KVCache, context: int
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
    return len(step.tail), time.perf_counter() - began
