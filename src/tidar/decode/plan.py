"""The measured plan: which schedule pays, given what a step costs here and how drafts have fared.

Two facts decide. What rows cost on this machine: a profile of real steps, taken once (`StepCosts`). How
likely a draft token is to be accepted, by its depth, the number of positions between its span's anchor and
itself (`Acceptance`). From both, the long-run tokens per second of a schedule follow exactly, by the step
rule of the design (a Markov chain over how far the current draft is shifted); the best schedule is used,
plain AR among them. While AR is used, a try now and then (2% of all steps at most) lets drafting come
back.

The plan sees accept counts and never a token that is still to be verified, so sampling stays exact.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tidar.decode.costs import CostSource, Floats, StepCosts, measure_costs
from tidar.decode.experience import TRY_STEPS, Acceptance, Experience
from tidar.decode.rates import Chain, Family, families_of, learned_span_set, next_shift
from tidar.decode.request import StepEvent
from tidar.layout import AUTOREGRESSIVE, Schedule
from tidar.methods import Method
from tidar.model import Transformer

MAX_DRAFT_LEN = 64
"""The longest K that is planned: a candidate's table grows with its cube."""

TRY_PERIOD = 100
"""AR steps from one try to the next."""

DECISION_SHARE = 0.03
"""Share of the time of AR steps that decisions may take, where the host must keep ahead of a device, ..."""

EARLY_STEPS = 64
"""... but for the first steps of an experience, which may be planned as slowly as it takes: each says much."""

STAKE = 4.0
"""AR steps of time that drafting may cost a text at most, over what it has brought in, ..."""

STAKE_PER_TOKEN = 0.02
"""... and as much again for each of its tokens. Estimates may err; this bounds what errors cost."""


@dataclass(slots=True)
class _Track:
    """What the plan knows of one request.

    lost: time that its drafting steps took, less what plain AR would have taken for their tokens, in AR
    steps. tokens: committed in decode steps.
    """

    acceptance: Acceptance
    shift: int = 0
    lost: float = 0.0
    tokens: int = 0


class MeasuredPlan:
    """Mutable. A `Plan` that uses the schedule with the most tokens per second, AR among them.

    One plan paces one engine; `fresh` makes another for the same model and machine. costs: from
    `measure_costs`. draft_lens: values of K to choose from, those trained. margin: how much better than
    AR, or than the schedule in use, another one must look before it is taken. replan: steps between two
    decisions. lag: steps whose outcome is not known yet when a step is planned. learn: steps until a
    first look for a span set that suits what was seen, with ever fewer later; 0 keeps to the candidates,
    which are many then.
    """

    def __init__(
        self,
        costs: CostSource,
        *,
        draft_lens: Sequence[int] = (4, 8, 16),
        margin: float = 0.06,
        replan: int = 8,
        experience: Experience | None = None,
        lag: int = 0,
        learn: int = 0,
    ) -> None:
        self.costs = costs
        self.lag, self.learn = lag, learn
        self.learned: Family | None = None
        self.learn_at = learn
        self.turn_seconds = 0.0  # an AR turn as of late, host included; kept where steps run ahead
        self.pause = 0  # steps until the next decision costs no more than its share of the time
        self.decided_for = 0  # sequences that ran at the last decision
        self.present = costs.at(())  # what steps cost as of late
        self.draft_lens = tuple(draft_lens)
        self.margin, self.replan = margin, replan
        self.families = families_of(self.draft_lens, bool(learn))
        self.depth = max(draft_lens) - 1
        self.experience = experience or Experience(self.depth)
        self.tracks: dict[int, _Track] = {}
        self.active: frozenset[int] = frozenset()
        self.schedule = AUTOREGRESSIVE
        self.tried = Schedule(min(draft_lens), (1,))
        self.age = 0  # steps since the schedule was last taken up
        self.trying = 0  # steps left of a try
        self.judging = 0  # steps until the outcome of a try is known
        self.hopeful = False  # whether the last verified draft had an accepted token

    @classmethod
    def measure(
        cls,
        model: Transformer,
        method: Method[Any],
        *,
        batch: int = 1,
        draft_lens: Sequence[int] = (4, 8, 16),
    ) -> "MeasuredPlan":
        """A plan for this model on this machine; takes a second or two."""
        return cls(measure_costs(model, method, batch, max(draft_lens)), draft_lens=draft_lens)

    def fresh(self, *, experienced: bool = True) -> "MeasuredPlan":
        """A plan for another engine, with the same costs and (`experienced`) the same experience."""
        plan = MeasuredPlan(
            self.costs,
            draft_lens=self.draft_lens,
            margin=self.margin,
            replan=self.replan,
            experience=self.experience if experienced else None,
            lag=self.lag,
            learn=self.learn,
        )
        plan.turn_seconds = self.turn_seconds
        return plan

    @property
    def candidates(self) -> tuple[Schedule, ...]:
        """The schedules it may use, but for sets that it learns."""
        return tuple(chain.schedule for family in self.families for chain in family.chains)

    def choose(self, request_ids: Sequence[int]) -> Schedule:
        """See `Plan`."""
        active = frozenset(request_ids)
        joined = active - self.active
        self.active = active
        for request_id in joined:
            self.tracks[request_id] = _Track(Acceptance(self.depth))
        if joined:
            self.tracks = {i: track for i, track in self.tracks.items() if i in active}
            if self._in_time or len(active) != self.decided_for:
                self._take(self._best())
            if not self.schedule.drafts and self.experience.may_try:
                self.trying = TRY_STEPS  # a new text gets its chance, whatever the others were like
        self.experience.steps += 1
        self.pause -= 1
        if joined or self.experience.steps % self.replan == 0:
            self.present = self._costs()
        self.age += 1
        if joined and self.learn and self.experience.steps >= self.learn_at:
            self._learn()
            self.learn_at *= 8  # takes a while, and a new set may have to be captured
        if self.judging:
            self.judging -= 1
            if not self.judging and self.hopeful:
                self._take(self._best())
        elif self.schedule.drafts and not self.affordable:
            self._take(AUTOREGRESSIVE)
        elif self.schedule.drafts:
            # Sooner at first, when every step says much about a text that is new.
            due = self.age % self.replan == 0 or (self.age <= 16 and self.age % 4 == 2)
            if due and self._in_time:
                self._take(self._best())
        elif not self.trying and self.age % TRY_PERIOD == 0 and self.experience.may_try:
            self.trying = TRY_STEPS
        if self.schedule.drafts or not self.trying:
            self.trying = 0
            return self.schedule
        self.experience.tries += 1
        self.trying -= 1
        if not self.trying:
            self.judging = 1 + self.lag
        return self.tried

    def observe(self, event: StepEvent) -> None:
        """See `Plan`."""
        track = self.tracks.get(event.request_id)
        if track is None:
            return  # preempted meanwhile
        if event.prefill:
            track.shift = 0
        else:
            track.tokens += event.accepted
            self._pace(event)
            if event.schedule.drafts:
                track.lost += self.present.ratio(event.rows) - event.accepted
            if event.drafted > 1:
                self.hopeful = event.accepted > 1
                for memory in (track.acceptance, self.experience):
                    memory.observe(track.shift, event.drafted, event.accepted)
            track.shift = next_shift(event.schedule, event.drafted, event.accepted)
        if event.finish is not None:
            del self.tracks[event.request_id]
            self.active -= {event.request_id}

    def _pace(self, event: StepEvent) -> None:
        """The host may be slower than the device, which is all that the measured costs know."""
        known = self.turn_seconds or self.present.of(1)
        if self.lag and (not event.schedule.drafts or event.seconds < known):
            # One slow turn says little; and no turn can take less than the host alone.
            self.turn_seconds = 0.9 * known + 0.1 * min(event.seconds, 2 * known)

    def survival(self) -> Floats:
        """Acceptance by depth that decisions rest on: the running requests', given all requests'."""
        others = self.experience.acceptance.smoothed()
        tracks = [self.tracks[i].acceptance.estimate(others, weight=3.0) for i in self.active]
        return np.mean(tracks, axis=0) if tracks else others

    @property
    def affordable(self) -> bool:
        """Whether drafting has not cost the running requests more than their stake."""
        tracks = [self.tracks[i] for i in self.active]
        return sum(t.lost - STAKE - STAKE_PER_TOKEN * t.tokens for t in tracks) <= 0.0

    @property
    def _in_time(self) -> bool:
        """Whether another decision stays within its share of the time."""
        return self.pause <= 0 or self.experience.steps <= EARLY_STEPS

    def _best(self) -> Schedule:
        if not self.affordable:
            return AUTOREGRESSIVE
        began = time.perf_counter()
        survival, costs = self.survival(), self._costs()
        first = self.experience.rejoined.first(survival)
        self.present = costs
        families = (*self.families, self.learned) if self.learned else self.families
        rates = {
            chain.schedule: rate
            for family in families
            for chain, rate in zip(
                family.chains, family.rates(survival, costs, first).tolist(), strict=True
            )
        }
        if self.lag:
            step = costs.of(1)
            self.pause = int((time.perf_counter() - began) / (DECISION_SHARE * step))
        self.decided_for = len(self.active)
        best = max(rates, key=lambda schedule: rates[schedule])
        bar = rates[AUTOREGRESSIVE] * (1 + self.margin)
        if rates[best] < bar:
            return AUTOREGRESSIVE
        kept = rates.get(self.schedule, 0.0)  # a learned set may be out of use by now
        return self.schedule if kept >= bar and rates[best] < kept * (1 + self.margin) else best

    def _costs(self) -> StepCosts:
        costs = self.costs.at(self.active)
        return costs.at_least(self.turn_seconds) if self.turn_seconds else costs

    def _learn(self) -> None:
        """Looks for the span set of the longest drafts that suits what all texts have shown."""
        survival = self.experience.acceptance.smoothed()
        first = self.experience.rejoined.first(survival)
        draft_len = max(self.draft_lens)
        anchors = learned_span_set(survival, draft_len, self.costs.at(self.active), first)
        self.learned = Family((Chain(Schedule(draft_len, anchors)),)).ready()

    def _take(self, schedule: Schedule) -> None:
        """Goes over to a schedule, or stays with it."""
        if schedule.drafts != self.schedule.drafts:
            self.age = 0
            if not schedule.drafts:
                for track in self.tracks.values():
                    track.acceptance.forget(keep=2.0)  # so that tries can change the estimate
        self.schedule = schedule
