"""The arithmetic of the measured plan: rates, costs, candidates and estimates, against simulation."""

import random
from itertools import combinations, pairwise

import numpy as np
import pytest
from drafting import DEAR, Floats, accept, carry_on, fading, simulate
from models import ar_text, random_model, random_prompt, run_engine
from scripted import scripted, varied

from tidar.decode.costs import StepCosts, measure_costs
from tidar.decode.engine import Engine, FixedPlan
from tidar.decode.experience import Acceptance, Rejoined
from tidar.decode.rates import Chain, candidate_schedules, learned_span_set, next_shift
from tidar.decode.request import Request
from tidar.layout import AUTOREGRESSIVE, Schedule, dense_schedule, two_forward
from tidar.methods.tidar import Tidar
from tidar.sampling import SamplingParams


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


@pytest.mark.parametrize("draft_len", [1, 2, 5, 8, 16])
def test_tables_hold_the_step_rule(draft_len: int) -> None:
    """Every shift and accept count, of the candidates and of all sets of up to three anchors (K = 16: some)."""
    anchors = range(1, draft_len + 1, 3 if draft_len == 16 else 1)
    sets = [each for count in (1, 2, 3) for each in combinations(anchors, count)]
    schedules = {*candidate_schedules((draft_len,)), *(Schedule(draft_len, each) for each in sets)}
    for schedule in schedules if draft_len > 1 else {AUTOREGRESSIVE}:
        size = schedule.draft_len
        table, expected = Chain(schedule).targets, np.zeros((size, size, size))
        for shift in range(size):
            for accepted in range(1, size - shift + 1):
                first, *more = schedule.steps
                target = next_shift(first, size - shift, accepted)
                for step in more:
                    target = next_shift(step, 1, 1)
                expected[shift, accepted - 1, target] = 1.0
        assert np.array_equal(table, expected), schedule


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
