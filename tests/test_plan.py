"""The habits of the measured plan on simulated texts."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from drafting import DEAR, FREE, Floats, accept, carry_on, fading, simulate

from tidar.decode.costs import StepCosts, step_rows
from tidar.decode.plan import EARLY_STEPS, MeasuredPlan
from tidar.decode.request import StepEvent
from tidar.layout import AUTOREGRESSIVE, Schedule


class Simulated:
    """A text without a model: drafts are accepted by chance, with a given probability by depth."""

    def __init__(
        self, plan: MeasuredPlan, seed: int = 0, lag: int = 0, rejoined: float = 1.0
    ) -> None:
        self.plan, self.rng, self.lag = plan, random.Random(seed), lag
        self.rejoined = rejoined
        self.late: list[StepEvent] = []
        schedule = plan.choose([0])
        plan.observe(StepEvent(0, (1,), True, 0, 9, 9, schedule, 0.01, None))
        self.shift, self.length = 0, schedule.draft_len
        self.last = schedule.after(None)

    def run(self, survival: Floats, steps: int) -> tuple[list[Schedule], list[int]]:
        """The schedule and the accept count of each step."""
        schedules, counts = [], []
        for _ in range(steps):
            self.last = schedule = self.plan.choose([0]).after(self.last)
            drafted = min(self.length, schedule.draft_rows)
            accepted = accept(self.rng, survival, self.shift, drafted, self.rejoined)
            rows = step_rows(schedule, drafted)
            ids = tuple(range(accepted))
            self.late.append(
                StepEvent(0, ids, False, drafted, accepted, rows, schedule, 0.01, None)
            )
            if len(self.late) > self.lag:
                self.plan.observe(self.late.pop(0))
            self.shift, self.length = carry_on(schedule, drafted, accepted)
            schedules.append(schedule)
            counts.append(accepted)
        return schedules, counts


def drafting(schedules: Iterable[Schedule]) -> float:
    """Share of the steps that are not plain AR."""
    return float(np.mean([schedule.drafts for schedule in schedules]))


def test_drafts_where_rows_are_free() -> None:
    schedules, counts = Simulated(MeasuredPlan(FREE)).run(fading(0.9, 0.8), 600)
    assert drafting(schedules[100:]) == 1.0
    assert np.mean(counts[100:]) > 4.5
    assert {schedule.draft_len for schedule in schedules[300:]} == {16}


def test_settles_on_ar_where_rows_are_dear() -> None:
    schedules, _ = Simulated(MeasuredPlan(DEAR)).run(fading(0.9, 0.8), 2200)
    assert drafting(schedules[200:]) <= 0.02


def test_one_slow_turn_does_not_make_drafting_look_free() -> None:
    """Where the device runs on its own, a turn's seconds hold the host's stalls as well."""
    plan = MeasuredPlan(DEAR, lag=1)
    schedule = plan.choose([0])
    plan.observe(StepEvent(0, (1,), True, 0, 9, 9, schedule, 1.0, None))
    plan.observe(StepEvent(0, (1,), False, 1, 1, 1, AUTOREGRESSIVE, 1.0, None))
    assert plan.turn_seconds < 0.012
    text = Simulated(plan, lag=1)
    schedules, _ = text.run(fading(0.35, 0.35), 1000)
    assert drafting(schedules[200:]) <= 0.03
    # A host that is really slow is believed, and no longer than it stays so.
    for _ in range(100):
        plan.observe(StepEvent(0, (1,), False, 1, 1, 1, AUTOREGRESSIVE, 0.1, None))
    assert plan.turn_seconds == pytest.approx(0.1, rel=0.05)
    for _ in range(100):
        plan.observe(StepEvent(0, (1, 2), False, 2, 2, 20, Schedule(8, (1,)), 0.02, None))
    assert plan.turn_seconds == pytest.approx(0.02, rel=0.05)


def test_learns_that_shifted_drafts_begin_badly() -> None:
    """One span looks nearly as good as several, until its drafts turn out to fail at their first token."""
    costs, survival = StepCosts((1, 300), (0.010, 0.016), fixed_shape=True), fading(0.85, 0.85)
    for rejoined in (1.0, 0.3):
        plan = MeasuredPlan(costs, draft_lens=(8,))
        schedules, _ = Simulated(plan, rejoined=rejoined).run(survival, 1500)
        rates = {
            s: simulate(s, survival, costs, rejoined, 4000) for s in plan.candidates if not s.half
        }
        used = [rates[schedule] for schedule in schedules[500:] if schedule in rates]
        assert np.mean(used) > 0.93 * max(rates.values())
    assert rates[Schedule(8, (1,))] < 0.8 * max(rates.values())


def test_decisions_take_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a host must keep ahead of its device, a slow decision puts off the next, new texts or not."""
    looks = iter(
        range(10**6)
    )  # a clock that goes on by a second with each look: two looks a decision
    monkeypatch.setattr("tidar.decode.plan.time.perf_counter", lambda: float(next(looks)))
    plan = MeasuredPlan(FREE, lag=1)
    plan.experience.steps = EARLY_STEPS + 1
    first = plan.choose([0])
    decided = next(looks)
    for text in range(1, 20):
        assert plan.choose([text]) == first
    assert next(looks) == decided + 1
    assert plan.choose([30, 31]).drafts  # so many at a time are another matter
    assert next(looks) == decided + 4
    for _ in range(4000):  # a second is 100 AR steps, and 100 / 0.03 is 3,333
        plan.choose([30, 31])
    assert next(looks) == decided + 7


def test_finds_its_schedule_within_the_first_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a decision takes: without experience every step says much."""
    looks = iter(range(10**6))
    monkeypatch.setattr("tidar.decode.plan.time.perf_counter", lambda: float(next(looks)))
    costs = StepCosts((1, 40, 112), (1.0e-4, 1.4e-4, 1.7e-4), fixed_shape=True)
    survival = fading(0.995, 0.995)
    text = Simulated(MeasuredPlan(costs, lag=1, learn=1000), lag=1)
    schedules, _ = text.run(survival, 40)
    rates = {s: simulate(s, survival, costs, 1.0, 4000) for s in text.plan.candidates if not s.half}
    assert rates[schedules[-1]] > 0.95 * max(rates.values())
    assert rates[Schedule(16, (1,))] < 0.85 * max(rates.values())


@pytest.mark.parametrize("seed", range(3))
def test_falls_back_probes_little_and_comes_back(seed: int) -> None:
    costs = StepCosts((1, 20, 100), (0.010, 0.013, 0.020))
    text = Simulated(MeasuredPlan(costs), seed)
    schedules, _ = text.run(fading(0.95, 0.9), 400)
    assert drafting(schedules[200:]) == 1.0
    text.run(fading(0.0, 0.0), 600)
    schedules, _ = text.run(fading(0.0, 0.0), 2000)  # has fallen back by now
    assert 0 < drafting(schedules) <= 0.02  # and looks, now and then
    schedules, counts = text.run(fading(0.95, 0.9), 1500)
    assert drafting(schedules[1000:]) > 0.9
    assert np.mean(counts[1000:]) > 3


def test_a_lucky_token_now_and_then_does_not_keep_it_drafting() -> None:
    costs = StepCosts((1, 20, 100), (0.010, 0.013, 0.020))
    shares = []
    for seed in range(6):
        text = Simulated(MeasuredPlan(costs), seed)
        text.run(fading(0.02, 0.02), 300)
        shares.append(drafting(text.run(fading(0.02, 0.02), 2000)[0]))
    assert np.mean(shares) <= 0.05


@pytest.mark.parametrize("survival", [fading(0.3, 0.1), fading(0.2, 0.2), fading(0.4, 0.05)])
def test_a_text_that_does_not_suit_drafting_loses_little(survival: Floats) -> None:
    """Even where all other texts did well: what drafting costs one text is bounded by its stake."""
    costs = StepCosts((1, 8, 20, 100), (0.010, 0.016, 0.020, 0.060))
    for seed in range(10):
        plan = MeasuredPlan(costs)
        Simulated(plan, seed).run(fading(0.95, 0.9), 600)
        plan = plan.fresh()
        schedules, counts = Simulated(plan, seed).run(survival, 260)
        rows = [step_rows(s, s.draft_len) for s in schedules]
        spent = float((costs(rows) / 0.010).sum())
        dearest = float(max(costs(rows)) / 0.010)
        assert spent <= sum(counts) * 1.02 + 4 + 2 * dearest


def test_schedule_follows_the_text() -> None:
    """Where rows cost something, a predictable text gets more spans and longer drafts than a hard one."""
    costs = StepCosts((1, 80, 272), (0.010, 0.013, 0.030))
    easy, _ = Simulated(MeasuredPlan(costs)).run(fading(0.99, 0.98), 600)
    hard, _ = Simulated(MeasuredPlan(costs)).run(fading(0.55, 0.3), 600)
    rows = [
        np.mean([step_rows(s, s.draft_len) for s in schedules[300:]]) for schedules in (easy, hard)
    ]
    assert rows[0] > 1.5 * rows[1]


def test_takes_two_forward_where_it_pays() -> None:
    """Where every row costs a tenth of a step, two short steps beat one with spans, and plain AR."""
    costs = StepCosts((1, 101), (0.010, 0.110))
    survival = fading(0.97, 0.97)
    schedules, counts = Simulated(MeasuredPlan(costs)).run(survival, 800)
    halves = [schedule.half for schedule in schedules[300:]]
    assert halves.count("verify") == pytest.approx(halves.count("draft"), abs=2)
    assert halves.count("draft") > 0.45 * len(halves)
    spent = sum(float(costs((step_rows(s, s.draft_len),))[0]) for s in schedules[300:])
    assert sum(counts[300:]) / spent > 1.1 / 0.010


def test_many_requests_come_and_go() -> None:
    """Requests that join, end, and reuse an id leave the plan with what it needs and no more."""
    plan, rng = MeasuredPlan(FREE), random.Random(0)
    running: dict[int, tuple[int, int]] = {}
    for turn in range(400):
        if len(running) < 4 and rng.random() < 0.4:
            new = rng.choice([i for i in range(8) if i not in running])
            schedule = plan.choose([new])
            plan.observe(StepEvent(new, (1,), True, 0, 5, 5, schedule, 0.01, None))
            running[new] = (0, schedule.draft_len)
        if not running:
            continue
        schedule = plan.choose(list(running))
        for each, (shift, length) in list(running.items()):
            drafted = min(length, schedule.draft_len)
            accepted = accept(rng, fading(0.9, 0.8), shift, drafted)
            finish: Any = "length" if rng.random() < 0.1 else None
            plan.observe(StepEvent(each, (1,), False, drafted, accepted, 9, schedule, 0.01, finish))
            running[each] = carry_on(schedule, drafted, accepted)
            if finish:
                del running[each]
        assert len(plan.tracks) <= 9, turn
    assert schedule.drafts


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_tries_stay_within_their_share_of_all_steps(batch: int) -> None:
    """Texts come and go, drafting never pays: at most 2% of the steps draft, after the four free ones."""
    plan, rng = MeasuredPlan(DEAR), random.Random(batch)
    left: dict[int, int] = {}
    drafts = {}
    steps = drafted = next_id = 0
    while steps < 3000:
        if len(left) < batch:
            left[next_id] = rng.randrange(20, 300)
            drafts[next_id] = 1
            schedule = plan.choose(list(left))
            event = StepEvent(next_id, (1,), True, 0, 9, 9, schedule, 0.01, None)
            plan.observe(event)
            next_id += 1
        schedule = plan.choose(list(left))
        drafted += schedule.drafts
        steps += 1
        for request_id in list(left):
            length = min(drafts[request_id], schedule.draft_len)
            left[request_id] -= 1
            finish = "length" if left[request_id] <= 0 else None
            event = StepEvent(request_id, (1,), False, length, 1, 1, schedule, 0.01, finish)
            plan.observe(event)
            drafts[request_id] = schedule.draft_len if schedule.drafts else 1
            if finish:
                del left[request_id]
    assert drafted <= 4 + 0.021 * (steps + next_id)
    assert not plan.active - set(left)


@pytest.mark.parametrize("lag", [0, 1])
def test_tries_are_judged_when_their_outcome_is_known(lag: int) -> None:
    """A text that has become easy is drafted for again, also when events come a step late."""
    costs = StepCosts((1, 20, 100), (0.010, 0.013, 0.020))
    plan = MeasuredPlan(costs, lag=lag)
    text = Simulated(plan, lag, lag=lag)
    text.run(fading(0.0, 0.0), 1500)
    schedules, _ = text.run(fading(0.95, 0.9), 1500)
    assert drafting(schedules[1000:]) > 0.9


@pytest.mark.parametrize("draft_lens", [(1,), (1, 8), (2,)])
def test_any_trained_lengths_can_be_planned(draft_lens: tuple[int, ...]) -> None:
    for learn in (0, 8):
        plan = MeasuredPlan(FREE, draft_lens=draft_lens, learn=learn)
        schedules, _ = Simulated(plan).run(fading(0.9, 0.9), 60)
        assert {schedule.draft_len for schedule in schedules} <= {1, *draft_lens}
        assert drafting(schedules) == (1.0 if max(draft_lens) > 1 else 0.0)
