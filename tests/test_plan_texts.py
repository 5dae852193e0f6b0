"""Law 3 while a plan changes its mind, and under any sequence of schedules at all."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from models import Excuses, ar_text, random_model, random_prompt, run_engine
from numpy.typing import NDArray
from scripted import scripted, varied

from tidar.decode.costs import StepCosts
from tidar.decode.engine import Engine, FixedPlan
from tidar.decode.plan import MeasuredPlan
from tidar.decode.request import Request
from tidar.layout import AUTOREGRESSIVE, Schedule, two_forward
from tidar.methods.tidar import Tidar
from tidar.sampling import SamplingParams

Floats = NDArray[np.float64]


class Restless(StepCosts):
    """Costs that are new at each question, so that another schedule looks best all the time."""

    def of(self, rows: int) -> float:
        return _RNG.uniform(0.5, 8.0)

    def ratio(self, rows: int) -> float:
        return 1.0  # never so dear that drafting stops


_RNG = random.Random(0)


class Logged(MeasuredPlan):
    """Remembers what it chose."""

    def choose(self, request_ids: Sequence[int]) -> Schedule:
        chosen = super().choose(request_ids)
        self.chosen = [*getattr(self, "chosen", []), chosen]
        return chosen


@pytest.mark.parametrize("force", [True, False], ids=["forced", "natural"])
@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}], ids=str
)
@pytest.mark.parametrize("max_batch", [1, 3])
def test_output_is_ar_while_the_plan_changes_its_mind(
    params: dict[str, Any], max_batch: int, force: bool, excuses: Excuses
) -> None:
    model = random_model("qwen3")
    texts, requests = {}, []
    for tag, length in enumerate((3, 7, 1, 5)):
        prompt = random_prompt(model, length, tag)
        own = SamplingParams(seed=tag, **params)
        texts[tag] = ar_text(model, prompt, 80, own)
        requests.append(Request(prompt=prompt, max_new_tokens=40 + 9 * tag, params=own))
    mask = model.config.mask_token_id
    assert mask is not None
    known = {tag: text.all for tag, text in texts.items()}
    method = scripted(model, known, varied(8)) if force else Tidar(mask)
    plan = Logged(Restless((1,), (1.0,)), draft_lens=(2, 5, 8), margin=0.0, replan=2)
    runs = run_engine(Engine(model, method, plan, max_batch=max_batch), requests)
    for request, run in zip(requests, runs, strict=True):
        text = texts[request.params.seed]
        excuses.check(run.ids, text, text.ids[: request.max_new_tokens])
    switches = sum(a != b for a, b in pairwise(plan.chosen))
    assert switches > len(plan.chosen) / 10
    assert len(set(plan.chosen)) > 6
    if force:
        assert max(max(run.accepts) for run in runs) > 3


def make_rule(seed: int) -> Callable[[], Schedule]:
    rng = random.Random(seed)

    def pick() -> Schedule:
        draft_len = rng.choice([1, 2, 3, 6, 9])
        if rng.random() < 0.3:
            return two_forward(draft_len)
        size = rng.randint(0, draft_len)
        return Schedule(draft_len, tuple(sorted(rng.sample(range(1, draft_len + 1), size))))

    return pick


class Anything(FixedPlan):
    """Any schedule at any step."""

    def __init__(self, seed: int) -> None:
        super().__init__(AUTOREGRESSIVE)
        self.pick = make_rule(seed)

    def choose(self, request_ids: Sequence[int]) -> Schedule:
        return self.pick()


@pytest.mark.parametrize("seed", range(4))
def test_output_is_ar_under_any_sequence_of_schedules(seed: int, excuses: Excuses) -> None:
    model = random_model("llama")
    texts, requests = {}, []
    for tag, params in enumerate(({}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 8})):
        prompt = random_prompt(model, 2 + tag, seed)
        own = SamplingParams(seed=tag, **params)  # type: ignore[arg-type]
        texts[tag] = ar_text(model, prompt, 80, own)
        requests.append(Request(prompt=prompt, max_new_tokens=60, params=own))
    method = scripted(model, {tag: text.all for tag, text in texts.items()}, varied(9, seed))
    for max_batch in (1, 3):
        runs = run_engine(Engine(model, method, Anything(seed), max_batch=max_batch), requests)
        for request, run in zip(requests, runs, strict=True):
            excuses.check(run.ids, texts[request.params.seed], texts[request.params.seed].ids[:60])
