"""Laws 3 and 6: TiDAR's text is that of AR decoding, and at K = 1 so is every step."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from models import (
    CHECKPOINTS,
    FAMILIES,
    Excuses,
    Run,
    any_model,
    ar_text,
    make_engine,
    random_model,
    random_prompt,
    run_engine,
)
from scripted import ALL_MODELS, SAMPLED, always, make_schedule, method, scripted, varied

from tidar.decode.request import Request, Stopper
from tidar.layout import AUTOREGRESSIVE, Schedule, dense_schedule, two_forward
from tidar.sampling import SamplingParams


def make_stop(count: int) -> Callable[[], Stopper]:
    """A stop string that the token number `count` completes."""

    def make() -> Stopper:
        seen = 0

        def stop(token: int) -> bool:
            nonlocal seen
            seen += 1
            return seen == count

        return stop

    return make


def check_batch(
    name: str,
    draft_len: int,
    kind: str,
    excuses: Excuses,
    *,
    seed: int,
    force: bool,
    preempt: bool,
    max_batch: int,
) -> list[Run]:
    """A ragged batch in random order equals AR for each of its requests."""
    model = any_model(name)
    rng = random.Random(f"{name}/{draft_len}/{kind}/{seed}")
    requests, texts = [], {}
    for number in range(rng.randint(3, 4)):
        prompt = random_prompt(model, rng.choice([1, 2, 3, 5, 8, 13]), rng.randrange(4))
        tag = rng.choice([0, 10, 20]) + number  # the seed, which also names the request
        params = SamplingParams(seed=tag, **rng.choice(SAMPLED))
        texts[tag] = ar_text(model, prompt, 26, params)
        requests.append(Request(prompt=prompt, max_new_tokens=rng.randint(12, 24), params=params))
    rng.shuffle(requests)
    known = {tag: text.all for tag, text in texts.items()}
    chosen = scripted(model, known, varied(draft_len)) if force else method(model)
    engine = make_engine(model, chosen, make_schedule(kind, draft_len, rng), max_batch=max_batch)

    events = 0

    def interrupt() -> None:
        nonlocal events
        events += 1
        if engine.running and (events == 2 or rng.random() < 0.2):
            engine.preempt(rng.choice(engine.running).request_id)

    runs = run_engine(engine, requests, interrupt if preempt else None)
    for request, run in zip(requests, runs, strict=True):
        text = texts[request.params.seed]
        excuses.check(run.ids, text, text.ids[: request.max_new_tokens])
        assert run.finish == "length"
    if preempt:
        assert sum(run.prefills for run in runs) > len(runs)
    return runs


@pytest.mark.parametrize("draft_len", range(1, 17))
@pytest.mark.parametrize("name", FAMILIES)
def test_output_is_ar(name: str, draft_len: int, excuses: Excuses) -> None:
    """Every K, span set, batch size and order; drafts natural and forced; some runs preempted."""
    kinds = ["dense", "single", "random", "two-forward", "empty", "last"]
    shift = draft_len + FAMILIES.index(name)
    for turn in range(3):
        check_batch(
            name,
            draft_len,
            kinds[(shift + turn) % 6],
            excuses,
            seed=turn,
            force=turn > 0,
            preempt=(shift + turn) % 2 == 0,
            max_batch=1 + (shift + turn) % 4,
        )


@pytest.mark.parametrize("draft_len", [2, 4, 7, 16])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_output_of_trained_checkpoints_is_ar(name: str, draft_len: int, excuses: Excuses) -> None:
    any_model(name)
    for turn, kind in enumerate(("dense", "random", "empty", "two-forward")):
        check_batch(
            name,
            draft_len,
            kind,
            excuses,
            seed=turn,
            force=turn > 0,
            preempt=turn == 1,
            max_batch=3,
        )


@pytest.mark.parametrize("params", SAMPLED)
@pytest.mark.parametrize("draft_len", [2, 3, 5, 8])
def test_every_accept_count(draft_len: int, params: dict[str, Any], excuses: Excuses) -> None:
    """Drafts that are right for exactly n tokens commit exactly n, at every n in 1..K."""
    model = random_model("llama")
    prompt = random_prompt(model, 4, 1)
    text = ar_text(model, prompt, 40, SamplingParams(seed=3, **params))
    for count in range(1, draft_len + 1):
        engine = make_engine(
            model, scripted(model, {3: text.all}, always(count)), dense_schedule(draft_len)
        )
        request = Request(prompt=prompt, max_new_tokens=25, params=SamplingParams(seed=3, **params))
        (run,) = run_engine(engine, [request])
        excuses.check(run.ids, text, text.ids[:25])
        expected = [min(count, drafted) for drafted in run.drafted]
        assert run.accepts == expected
        assert set(expected[:-1]) == {count}
        assert run.drafted[0] == draft_len


@pytest.mark.parametrize("spans", [(1,), (1, 3), (2,), (3,), (4, 6), (), (1, 2, 4)])
def test_shifted_drafts(spans: tuple[int, ...], excuses: Excuses) -> None:
    """Where an accept count has no span the draft is shorter by the distance, never lost."""
    model, draft_len = random_model("qwen3"), 6
    prompt = random_prompt(model, 3, 2)
    text = ar_text(model, prompt, 40, SamplingParams())
    for count in range(1, draft_len + 1):
        engine = make_engine(
            model, scripted(model, {0: text.all}, always(count)), Schedule(draft_len, spans)
        )
        (run,) = run_engine(engine, [Request(prompt=prompt, max_new_tokens=30)])
        excuses.check(run.ids, text, text.ids[:30])
        left = 29
        expected = draft_len
        for drafted, accepted in zip(run.drafted, run.accepts, strict=True):
            assert drafted == min(expected, left)
            assert accepted == min(count, drafted)
            left -= accepted
            anchors = [n for n in spans if n <= drafted] or [1]
            nearest = max((n for n in anchors if n <= accepted), default=None)
            # Where all anchors lie past the accept count only d[0] is known.
            expected = 1 if nearest is None else max(1, draft_len - (accepted - nearest))


@pytest.mark.parametrize("draft_len", [2, 5])
def test_two_forward_alternates(draft_len: int, excuses: Excuses) -> None:
    """Forced to n: n tokens from a step without spans, then one from a step with a span; prompts of all kinds."""
    model = random_model("qwen2")
    for length in (1, 4):
        prompt = random_prompt(model, length, 6)
        text = ar_text(model, prompt, 40, SamplingParams())
        for count in range(1, draft_len + 1):
            engine = make_engine(
                model, scripted(model, {0: text.all}, always(count)), two_forward(draft_len)
            )
            request = Request(prompt=prompt, max_new_tokens=26)
            for _ in range(
                2
            ):  # a second text starts in the right phase, wherever the first one ended
                steps = [event for event in engine.run([request]) if not event.prefill]
                pairs = list(zip(steps[::2], steps[1::2], strict=False))
                assert len(pairs) >= 4
                for verify, draft in pairs[:-1]:  # the last may have fewer tokens left
                    assert (verify.accepted, draft.accepted) == (count, 1)
                    assert (verify.drafted, draft.drafted) == (draft_len, 1)
                    assert (verify.rows, draft.rows) == (draft_len, 1 + draft_len)
                assert sum(len(event.ids) for event in steps) == 25
            (run,) = run_engine(engine, [request])
            excuses.check(run.ids, text, text.ids[:26])


@pytest.mark.parametrize("kind", ["dense", "two-forward"])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_ends_inside_a_run(count: int, params: dict[str, Any], kind: str, excuses: Excuses) -> None:
    """End-of-text, stop and max_new_tokens at every offset: the text is cut at the right token."""
    model, draft_len = random_model("mistral"), 4
    sampling = SamplingParams(seed=5, **params)
    prompt = random_prompt(model, 5, 3)
    text = ar_text(model, prompt, 30, sampling)
    engine = make_engine(
        model,
        scripted(model, {5: text.all}, always(count)),
        make_schedule(kind, draft_len, random.Random(0)),
    )
    ends = []
    for end in range(1, 14):
        token = text.ids[end - 1]
        cases = [
            ("length", Request(prompt=prompt, max_new_tokens=end, params=sampling)),
            (
                "stop",
                Request(
                    prompt=prompt, max_new_tokens=30, params=sampling, make_stopper=make_stop(end)
                ),
            ),
        ]
        if token not in text.ids[: end - 1]:
            eos = frozenset({token})
            cases.append(
                (
                    "end-of-text",
                    Request(prompt=prompt, max_new_tokens=30, params=sampling, eos_ids=eos),
                )
            )
            ends.append(end)
        if token not in prompt:  # an end-of-text token in the prompt ends nothing
            cases.append(
                (
                    "length",
                    Request(
                        prompt=prompt,
                        max_new_tokens=end,
                        params=sampling,
                        eos_ids=frozenset(prompt) - set(text.ids),
                    ),
                )
            )
        for finish, request in cases:
            (run,) = run_engine(engine, [request])
            excuses.check(run.ids, text, text.ids[:end])
            assert run.finish == finish
            assert sum(run.kept) == end - 1  # the first token is the prefill's
            assert all(kept >= 1 for kept in run.kept)
    assert len(ends) >= 6


def test_no_more_is_drafted_than_is_left(excuses: Excuses) -> None:
    model, draft_len = random_model("llama"), 8
    prompt = random_prompt(model, 5, 3)
    text = ar_text(model, prompt, 30, SamplingParams())
    engine = make_engine(
        model, scripted(model, {0: text.all}, always(8)), dense_schedule(draft_len)
    )
    for count in range(1, 12):
        (run,) = run_engine(engine, [Request(prompt=prompt, max_new_tokens=count)])
        excuses.check(run.ids, text, text.ids[:count])
        left = count - 1
        for drafted in run.drafted:
            assert drafted <= left
            left -= drafted
        assert left == 0


@pytest.mark.parametrize("draft_len", [1, 2, 4, 7])
@pytest.mark.parametrize("kind", ["dense", "empty", "random", "two-forward"])
def test_context_end(draft_len: int, kind: str, excuses: Excuses) -> None:
    """Up to the model's last position and no further, alone and in a batch of unequal sequences."""
    model = random_model("qwen2", limit=24)
    schedule = make_schedule(kind, draft_len, random.Random(draft_len))
    requests, texts = [], {}
    for tag, length in enumerate([23, 22, 20, 15, 9]):
        prompt = random_prompt(model, length, tag)
        params = SamplingParams(seed=tag, temperature=float(tag % 2))
        texts[tag] = ar_text(model, prompt, 100, params)
        assert len(texts[tag].all) == 25  # the last position still predicts one token
        requests.append(Request(prompt=prompt, max_new_tokens=100, params=params))
    known = {tag: text.all for tag, text in texts.items()}
    for chosen in (method(model), scripted(model, known, varied(draft_len))):
        for group in ([request] for request in requests), [requests]:
            for batch in group:
                runs = run_engine(make_engine(model, chosen, schedule), batch)
                for request, run in zip(batch, runs, strict=True):
                    excuses.check(run.ids, texts[request.params.seed])
                    assert run.finish == "context"


def test_batch_order_changes_nothing(excuses: Excuses) -> None:
    """The same requests in any order and batch size: the same tokens and the same accept counts."""
    model, draft_len = random_model("llama"), 6
    texts, requests = {}, []
    for tag, length in enumerate([4, 9, 1, 6, 2]):
        prompt = random_prompt(model, length, tag)
        params = SamplingParams(seed=tag, **SAMPLED[tag % 4])
        texts[tag] = ar_text(model, prompt, 30, params)
        requests.append(Request(prompt=prompt, max_new_tokens=8 + 3 * tag, params=params))
    chosen = scripted(model, {tag: text.all for tag, text in texts.items()}, varied(draft_len))
    schedule = Schedule(draft_len, (1, 2, 4))
    alone = {
        request.params.seed: run_engine(make_engine(model, chosen, schedule), [request])[0]
        for request in requests
    }
    rng = random.Random(0)
    for max_batch in (1, 2, 3, 5):
        rng.shuffle(requests)
        runs = run_engine(make_engine(model, chosen, schedule, max_batch=max_batch), requests)
        for request, run in zip(requests, runs, strict=True):
            tag = request.params.seed
            excuses.check(run.ids, texts[tag], texts[tag].ids[: request.max_new_tokens])
            assert run == alone[tag]


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("schedule", [AUTOREGRESSIVE, Schedule(1, (1,))])
@pytest.mark.parametrize("name", ALL_MODELS)
def test_one_draft_row_is_ar(name: str, schedule: Schedule, beta: float, excuses: Excuses) -> None:
    """K = 1: no spans, one token a step, exactly; so there is no mask row for beta to mix in."""
    model = any_model(name)
    requests, texts = [], []
    for tag, (length, params) in enumerate(zip((1, 7, 4, 12), SAMPLED, strict=True)):
        prompt = random_prompt(model, length, tag)
        sampling = SamplingParams(seed=tag, **params)
        texts.append(ar_text(model, prompt, 10, sampling))
        requests.append(Request(prompt=prompt, max_new_tokens=10, params=sampling))
    engine = make_engine(model, method(model, beta), schedule, max_batch=3)
    rows = [event.rows for event in engine.run(requests) if not event.prefill]
    assert set(rows) == {1}
    runs = run_engine(engine, requests)
    for run, text in zip(runs, texts, strict=True):
        excuses.check(run.ids, text)
        assert sum(run.kept) / len(run.kept) == 1.0
        assert set(run.accepts) == set(run.drafted) == {1}
        assert len(run.kept) == 9
