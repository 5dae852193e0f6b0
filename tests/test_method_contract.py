"""What every decoding method keeps, whichever way it makes its tokens: one suite for all of them.

The exact ones write AR's text. All of them end a text at the right token, write the same alone and in a
batch, with and without being interrupted, and the same again for the same seed.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
from contenders import ALL, EXACT, OTHERS, decode, target
from models import Excuses, ar_text, random_prompt

from tidar.decode.engine import Engine
from tidar.decode.request import Request, Stopper
from tidar.errors import TidarError
from tidar.methods.eagle import Eagle
from tidar.methods.speculative import Speculative
from tidar.sampling import SamplingParams

PARAMS: tuple[dict[str, Any], ...] = ({}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 9})


def request(length: int = 5, count: int = 20, seed: int = 0, **changes: Any) -> Request:
    """A request of its own prompt; the seed is also the prompt's."""
    sampling = {
        name: changes.pop(name) for name in list(changes) if name in ("temperature", "top_k")
    }
    return Request(
        prompt=random_prompt(target(), length, seed),
        max_new_tokens=count,
        params=SamplingParams(seed=seed, **sampling),
        **changes,
    )


def several() -> list[Request]:
    """Unequal ones, more than run at a time."""
    sizes = ((1, 14), (9, 9), (4, 22), (6, 1), (13, 17))
    return [
        request(length, count, seed, **PARAMS[seed % 3])
        for seed, (length, count) in enumerate(sizes)
    ]


def alone(name: str, each: Request) -> list[int]:
    (told,) = decode(ALL[name](target(), 1), [each])
    return told.ids


def check_empty(engine: Engine) -> None:
    """Nothing is kept of any request."""
    if isinstance(engine.method, Speculative | Eagle):
        draft = engine.method.draft
        assert draft.places == {}
        assert sorted(draft.free) == list(range(engine.max_batch))
        assert set(draft.cache.lengths) == {0}


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_exact_text_is_ar(name: str, params: dict[str, Any], excuses: Excuses) -> None:
    model = target()
    for seed, length in enumerate((1, 2, 7, 12)):
        each = request(length, 40, seed, **params)
        text = ar_text(model, each.prompt, 40, each.params)
        engine = EXACT[name](model, 1)
        (told,) = decode(engine, [each])
        excuses.check(told.ids, text)
        assert told.finish == "length"
        assert sum(step.accepted for step in told.steps) == 39
        check_empty(engine)


@pytest.mark.parametrize("params", PARAMS[:2], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_ends_at_the_right_token(name: str, params: dict[str, Any]) -> None:
    """max_new_tokens, end-of-text and stop strings at every place of a text."""
    engine, whole = ALL[name](target(), 1), request(5, 24, 3, **params)
    (told,) = decode(engine, [whole])
    ids = told.ids
    assert len(ids) == 24
    met: set[str] = set()
    for end in range(1, 15):
        token = ids[end - 1]
        if token not in ids[: end - 1]:
            (told,) = decode(engine, [request(5, 24, 3, eos_ids=frozenset({token}), **params)])
            assert (told.ids, told.finish) == (ids[:end], "end-of-text")
            met.add("end-of-text")
        (told,) = decode(engine, [request(5, 24, 3, make_stopper=stop_after(end), **params)])
        assert (told.ids, told.finish) == (ids[:end], "stop")
        (told,) = decode(engine, [request(5, end, 3, **params)])
        assert (len(told.ids), told.finish) == (end, "length")
        if not name.startswith("masked-diffusion"):  # which sees how many are still to come
            assert told.ids == ids[:end]
    assert met


def stop_after(count: int) -> Callable[[], Stopper]:
    """A stop string that the token number `count` completes."""

    def make() -> Stopper:
        left = iter(range(count, 0, -1))
        return lambda token: next(left) == 1

    return make


@pytest.mark.parametrize("name", ALL)
def test_batch_is_alone(name: str) -> None:
    requests = several()
    expected = {each.params.seed: alone(name, each) for each in requests}
    rng = random.Random(0)
    for max_batch in (1, 2, 3, 5):
        rng.shuffle(requests)
        engine = ALL[name](target(), max_batch)
        for each, told in zip(requests, decode(engine, requests), strict=True):
            assert told.ids == expected[each.params.seed]
        check_empty(engine)


@pytest.mark.parametrize("name", ALL)
def test_preemption_changes_nothing(name: str) -> None:
    """At every moment of a text, of any of those that run; the text goes on from what was told."""
    requests = several()
    expected = [alone(name, each) for each in requests]
    rng = random.Random(1)
    for often in (0.25, 0.5):
        engine, taken = ALL[name](target(), 3), 0

        def interrupt(engine: Engine = engine, often: float = often) -> None:
            nonlocal taken
            if engine.running and rng.random() < often:
                engine.preempt(rng.choice(engine.running).request_id)
                taken += 1

        assert [told.ids for told in decode(engine, requests, interrupt)] == expected
        assert taken >= 2
        check_empty(engine)


@pytest.mark.parametrize("name", ALL)
def test_the_seed_decides(name: str) -> None:
    hot = [request(5, 20, 7, temperature=1.0), request(5, 20, 7, temperature=1.0)]
    other = Request(
        prompt=hot[0].prompt, max_new_tokens=20, params=SamplingParams(temperature=1.0, seed=8)
    )
    engine = ALL[name](target(), 1)
    first, again, changed = (told.ids for told in decode(engine, [*hot, other]))
    assert first == again
    assert first != changed


@pytest.mark.parametrize("max_batch", [1, 3])
@pytest.mark.parametrize("name", ALL)
def test_context_end(name: str, max_batch: int, excuses: Excuses) -> None:
    """Up to the model's last position and no further."""
    model = target(24)
    requests = [request(length, 100, seed) for seed, length in enumerate((23, 22, 19, 9))]
    for each, told in zip(requests, decode(ALL[name](model, max_batch), requests), strict=True):
        assert told.finish == "context"
        if name in EXACT:  # the last position still predicts a token
            excuses.check(told.ids, ar_text(model, each.prompt, 100, each.params))
        else:  # a token stands where a mask row stood
            assert len(told.ids) == 24 - len(each.prompt)
    (told,) = decode(ALL[name](model, 1), [request(20, 3, 1)])
    assert (len(told.ids), told.finish) == (3, "length")


@pytest.mark.parametrize("name", ALL)
def test_leaving_early_leaves_nothing_behind(name: str) -> None:
    engine, requests = ALL[name](target(), 2), several()
    events = engine.run(requests)
    for _ in range(4):
        next(events)
    events.close()
    check_empty(engine)
    expected = [alone(name, each) for each in requests]
    assert [told.ids for told in decode(engine, requests)] == expected


@pytest.mark.parametrize("name", OTHERS)
def test_lossy_methods_take_nothing_that_verifies(name: str) -> None:
    """Rejection sampling and teacher forcing are ways to verify a draft."""
    engine = OTHERS[name](target(), 1)
    params = SamplingParams(temperature=1.0, sampling="rejection")
    with pytest.raises(TidarError, match="rejection"):
        engine.submit(Request(prompt=(1, 2), params=params))
    with pytest.raises(TidarError, match="forced"):
        engine.submit(Request(prompt=(1, 2), forced=(1, 2, 3)))
    assert not engine.waiting
