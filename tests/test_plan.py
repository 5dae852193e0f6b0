"""The measured plan: its arithmetic against simulation, and its habits on simulated texts."""

import random
from collections.abc import Iterable
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from models import ar_text, random_model, random_prompt, run_engine
from numpy.typing import NDArray
from scripted import scripted, varied

from tidar.decode.costs import StepCosts, measure_costs, step_rows
from tidar.decode.engine import Engine, FixedPlan
from tidar.decode.experience import Acceptance, Rejoined
from tidar.decode.plan import MeasuredPlan
from tidar.decode.rates import Chain, candidate_schedules, learned_span_set, next_shift
from tidar.decode.request import Request, StepEvent
from tidar.layout import AUTOREGRESSIVE, Schedule, dense_schedule, two_forward
from tidar.methods.tidar import Tidar
from tidar.sampling import SamplingParams

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


# --- arithmetic ---


@pytest.mark.parametrize(
    ("schedule", "survival"),
    [
        (Schedule(2, (1, 2)), fading(0.5, 0.5)),
        (Schedule(4, (1,)), fading(0.9, 0.6)),
        (Schedule(4, (2, 4)), fading(0.8, 0.8)),
        (Schedule(8, (1, 2, 4, 8)), fading(0.7, 0.2)),
        (Schedule(8, ()), fading(0.9, 0.9)),
        (Schedule(16, (1, 2, 3, 5, 8, 16)), fading(0.97, 0.9)),
        (dense_schedule(16), fading(0.98, 0.95)),
        (Schedule(16, (16,)), fading(0.97, 0.97)),
        (two_forward(2), fading(0.7, 0.7)),
        (two_forward(8), fading(0.9, 0.5)),
        (AUTOREGRESSIVE, fading(0.9, 0.9)),
    ],
    ids=lambda value: str(value) if isinstance(value, Schedule) else "",
)
def test_rate_is_what_a_simulation_of_the_step_rule_gives(
    schedule: Schedule, survival: Floats
) -> None:
    costs = StepCosts((1, 100, 200), (0.01, 0.03, 0.08))
    rng = random.Random(0)
    shift, drafted, step = 0, schedule.draft_len, schedule
    tokens, seconds = 0, 0.0
    for _ in range(60_000):
        drafted = 1 if step.half == "draft" else drafted
        spans = 0 if step.half == "verify" else len([n for n in step.span_set if n <= drafted]) or 1
        rows = drafted + (spans * schedule.draft_len if schedule.draft_len > 1 else 0)
        accepted = accept(rng, survival, shift, drafted)
        tokens += accepted
        seconds += float(np.interp(rows, (1, 100, 200, 300), (0.01, 0.03, 0.08, 0.13)))
        shift, drafted = carry_on(step, drafted, accepted)
        step = step.after(step)
    rate = Chain(schedule).rate(survival, costs)
    assert rate == pytest.approx(tokens / seconds, rel=0.02)


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


@pytest.mark.parametrize("anchors", [(1,), (1, 2, 4, 8)])
def test_rate_where_shifted_drafts_begin_badly(anchors: tuple[int, ...]) -> None:
    costs, survival = StepCosts((1, 300), (0.010, 0.020), fixed_shape=True), fading(0.9, 0.7)
    chain, seen = Chain(Schedule(8, anchors)), Rejoined(7)
    for shift in range(1, 7):
        for index in range(4000):
            expected = survival[shift + 1]
            seen.observe(shift, (index * 7919) % 4000 < 0.4 * expected * 4000, expected)
    first = seen.first(survival[:8])
    assert first[1:7] == pytest.approx(0.4 * survival[2:8], rel=0.25)  # it remembers 100 trials
    rate = chain.rate(survival, costs, np.append(survival[1:2], 0.4 * survival[2:9]))
    assert rate == pytest.approx(simulate(chain.schedule, survival, costs, 0.4), rel=0.02)
    assert rate < 0.95 * chain.rate(survival, costs)


def test_costs_between_and_beyond_the_points() -> None:
    costs = StepCosts((1, 11, 21), (1.0, 2.0, 5.0))
    assert costs([1, 6, 11, 16, 31]).tolist() == [1.0, 1.5, 2.0, 3.5, 8.0]


def test_candidates() -> None:
    found = candidate_schedules((4, 16))
    assert len(set(found)) == len(found)
    assert AUTOREGRESSIVE in found
    for draft_len in (4, 16):
        assert Schedule(draft_len, (1,)) in found
        assert dense_schedule(draft_len) in found
        assert two_forward(draft_len) in found
    assert {schedule.draft_len for schedule in found} == {1, 4, 16}


@pytest.mark.parametrize("spans", [(1,), (1, 3), (2,), (4, 6), (), (1, 2, 4), (1, 2, 3, 4, 5, 6)])
def test_next_shift_is_what_the_engine_does(spans: tuple[int, ...]) -> None:
    """Over forced accept counts of all sizes, the engine's next draft is as long as the plan thinks."""
    model, schedule = random_model("llama"), Schedule(6, spans)
    prompt = random_prompt(model, 4, 5)
    params = SamplingParams(seed=5)
    text = ar_text(model, prompt, 90, params)
    method = scripted(model, {5: text.all}, varied(6))
    (run,) = run_engine(
        Engine(model, method, FixedPlan(schedule), max_batch=1),
        [Request(prompt=prompt, max_new_tokens=80, params=params)],
    )
    left, compared = 79, set()
    steps = list(zip(run.drafted, run.accepts, strict=True))
    for (drafted, accepted), (following, _) in pairwise(steps):
        left -= accepted
        if left >= 6:
            shift = next_shift(schedule, drafted, accepted)
            assert shift == carry_on(schedule, drafted, accepted)[0]
            assert following == 6 - shift
            compared.add((drafted, accepted))
    assert len(compared) > 5
    assert next_shift(AUTOREGRESSIVE, 1, 1) == 0


def test_learned_span_set_is_as_good_as_the_best_of_its_size() -> None:
    costs = StepCosts((1, 100), (0.010, 0.012))
    survival = fading(0.9, 0.9)
    rates = {}
    for size in (1, 2, 3):
        learned = learned_span_set(survival, 8, costs, most=size)
        assert len(learned) == size
        assert learned[0] == 1
        every = [Schedule(8, (1, *more)) for more in combinations(range(2, 9), size - 1)]
        best = max(Chain(schedule).rate(survival, costs) for schedule in every)
        rates[size] = Chain(Schedule(8, learned)).rate(survival, costs)
        assert rates[size] >= 0.99 * best
    assert rates[1] < rates[2] < rates[3]
    assert learned_span_set(survival, 8, DEAR) == (1,)  # no span pays


@pytest.mark.parametrize("lag", [0, 1])
def test_tries_are_judged_when_their_outcome_is_known(lag: int) -> None:
    """A text that has become easy is drafted for again, also when events come a step late."""
    costs = StepCosts((1, 20, 100), (0.010, 0.013, 0.020))
    plan = MeasuredPlan(costs, lag=lag)
    text = Simulated(plan, lag, lag=lag)
    text.run(fading(0.0, 0.0), 1500)
    schedules, _ = text.run(fading(0.95, 0.9), 1500)
    assert drafting(schedules[1000:]) > 0.9


def test_acceptance_estimates_converge() -> None:
    truth, rng = fading(0.95, 0.4, 15), random.Random(1)
    acceptance = Acceptance(15, memory=0.999)
    schedule = Schedule(16, (1, 2, 4, 8))
    shift, drafted = 0, 16
    for _ in range(20_000):
        accepted = accept(rng, truth, shift, drafted)
        acceptance.observe(shift, drafted, accepted)
        shift, drafted = carry_on(schedule, drafted, accepted)
    tried = np.array(acceptance.tried[1:]) > 300
    assert tried.sum() > 5
    for found in (acceptance.estimate(truth, 1.0), acceptance.smoothed()):
        assert np.abs(found - truth)[1:][tried].max() < 0.06
    # And what it is told last weighs most.
    for _ in range(3000):
        acceptance.observe(0, 2, 1)
    assert acceptance.smoothed()[1] < 0.1
    acceptance.forget(2.0)
    assert max(acceptance.tried) <= 2.0 + 1e-9


def test_measured_costs_rise_with_the_rows() -> None:
    model = random_model("qwen3")
    mask = model.config.mask_token_id
    assert mask is not None
    costs = measure_costs(model, Tidar(mask), max_draft_len=16, repeats=2)
    assert list(costs.rows) == sorted(set(costs.rows))
    assert costs.rows[0] == 1
    assert costs.rows[-1] == 16 + 16 * 16
    assert all(a <= b for a, b in pairwise(costs.seconds))
    assert costs.seconds[0] > 0


# --- habits ---


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
