"""Law 5: after any history of accepts the cache equals one computed from scratch."""

import random

import pytest
from models import (
    Excuses,
    any_model,
    ar_text,
    assert_equal,
    make_engine,
    plain_cache,
    random_model,
    random_prompt,
    run_engine,
)
from scripted import ALL_MODELS, make_schedule, method, scripted, varied

from tidar.decode.engine import Engine
from tidar.decode.request import Request
from tidar.layout import dense_schedule
from tidar.sampling import SamplingParams


def check_cache(engine: Engine) -> int:
    """Every running slot holds what a forward from scratch over its committed tokens gives."""
    for slot, sequence in enumerate(engine.running):
        committed = [*sequence.request.prompt, *sequence.emitted][:-1]
        assert engine.cache.lengths[slot] == len(committed)
        keys, values = engine.cache.entries(slot)
        plain_keys, plain_values = plain_cache(engine.model, committed)
        assert_equal(keys, plain_keys)
        assert_equal(values, plain_values)
    for slot in range(len(engine.running), engine.max_batch):
        assert engine.cache.lengths[slot] == 0
    return len(engine.running)


@pytest.mark.parametrize("name", ALL_MODELS)
@pytest.mark.parametrize("force", [True, False])
def test_cache_equals_one_from_scratch(name: str, force: bool) -> None:
    """After every event, with sequences that finish, move to other slots and come back."""
    model = any_model(name)
    rng = random.Random(f"{name}/{force}")
    draft_len = 5
    for kind, preempt in (("dense", False), ("random", True), ("two-forward", True)):
        texts, requests = {}, []
        for tag in range(5):
            prompt = random_prompt(model, rng.randint(1, 12), tag)
            params = SamplingParams(seed=tag, temperature=float(tag % 2))
            texts[tag] = ar_text(model, prompt, 24, params).all
            requests.append(
                Request(prompt=prompt, max_new_tokens=rng.randint(2, 16), params=params)
            )
        chosen = scripted(model, texts, varied(draft_len)) if force else method(model)
        schedule = make_schedule(kind, draft_len, rng)
        engine = make_engine(model, chosen, schedule, max_batch=3)
        checked = 0

        def after(engine: Engine = engine, preempt: bool = preempt) -> None:
            nonlocal checked
            checked += check_cache(engine)
            if preempt and engine.running and rng.random() < 0.15:
                engine.preempt(rng.choice(engine.running).request_id)
                check_cache(engine)

        runs = run_engine(engine, requests, after)
        assert checked > 10
        assert not force or max(n for run in runs for n in run.accepts) >= 4


def test_leaving_a_run_early_leaves_nothing_behind(excuses: Excuses) -> None:
    """An engine whose iterator was dropped goes on as if it were new."""
    model = random_model("llama")
    engine = make_engine(model, method(model), dense_schedule(4), max_batch=2)
    requests = [
        Request(prompt=random_prompt(model, length, length), max_new_tokens=12)
        for length in (9, 3, 5)
    ]
    events = engine.run(requests)
    for _ in range(5):
        next(events)
    events.close()
    assert not engine.running
    assert not engine.waiting
    assert set(engine.cache.lengths) == {0}
    runs = run_engine(engine, requests, lambda: check_cache(engine) and None)
    for request, run in zip(requests, runs, strict=True):
        excuses.check(run.ids, ar_text(model, request.prompt, 12, SamplingParams()))
