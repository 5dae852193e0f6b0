"""The paged engine on a CPU: laws 3, 5 and 6 with chunks, reuse, preemption, aborts, a step behind."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from models import (
    Excuses,
    Run,
    any_model,
    ar_text,
    assert_equal,
    plain_cache,
    random_model,
    random_prompt,
    run_engine,
)
from torch import Tensor

from tidar.decode.backend import PlainBackend
from tidar.decode.engine import FixedPlan
from tidar.decode.paged_engine import EngineLimits, PagedEngine
from tidar.decode.request import Request
from tidar.decode.slots import Backend, Replay
from tidar.layout import AUTOREGRESSIVE, Schedule, dense_schedule, two_forward
from tidar.model import Transformer
from tidar.paged_cache import PagedCache, PagedRows
from tidar.sampling import RowParams, SamplingParams

SAMPLED: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 7, "top_p": 0.9},
]


class Scripted:
    """The drafter is made to know the text (by seed) and to err now and then; verdicts are the model's own.

    Hidden states carry a mark on rows of spans, so that `choose` can tell drafting from verifying.
    """

    def __init__(
        self, model: Transformer, cache: PagedCache, texts: dict[int, tuple[int, ...]], every: int
    ) -> None:
        self.inner, self.texts, self.every = PlainBackend(model, cache), texts, every

    def forward(self, ids: Tensor, positions: Tensor, rows: PagedRows) -> Tensor:
        hidden = self.inner.forward(ids, positions, rows)
        mark = (torch.arange(ids.shape[1]) >= rows.kept).expand(ids.shape).unsqueeze(-1)
        return torch.cat((hidden, mark.to(hidden.dtype)), dim=-1)

    def choose(self, hidden: Tensor, params: RowParams, positions: Tensor) -> Tensor:
        chosen = self.inner.choose(hidden[:, :-1], params, positions)
        for row in hidden[:, -1].nonzero().flatten().tolist():
            text, place = self.texts[int(params.seeds[row])], int(positions[row])
            if place < len(text):
                wrong = self.every and hash((place, self.every)) % self.every == 0
                chosen[row] = (text[place] + 1) % 30 if wrong else text[place]
        return chosen


class Irregular(FixedPlan):
    """Another schedule at every turn."""

    def __init__(self, seed: int, longest: int = 9) -> None:
        super().__init__(AUTOREGRESSIVE)
        self.rng, self.longest = random.Random(seed), longest

    def choose(self, request_ids: Sequence[int]) -> Schedule:
        size = self.rng.randint(1, self.longest)
        if self.rng.random() < 0.3:
            return two_forward(size)
        count = self.rng.randint(0, size)
        return Schedule(size, tuple(sorted(self.rng.sample(range(1, size + 1), count))))


def collect(engine: PagedEngine, requests: Sequence[Request]) -> list[Run]:
    """Runs all requests to their end; nothing is held afterwards."""
    runs = run_engine(engine, requests)
    assert_returned(engine)
    return runs


def assert_returned(engine: PagedEngine) -> None:
    """Nothing is held any more."""
    engine.pages.check()
    assert engine.pages.free == engine.pages.usable
    assert not engine.sequences
    assert not engine.slot_of
    assert len(engine._free_slots) == len(engine.slots.prefix) - 1


def some_requests(
    model: Transformer, params: dict[str, Any], lengths: Sequence[int] = (3, 17, 1, 30, 9)
) -> tuple[list[Request], dict[int, Any]]:
    requests, texts = [], {}
    for tag, length in enumerate(lengths):
        prompt = random_prompt(model, length, tag)
        own = SamplingParams(seed=tag, **params)
        texts[tag] = ar_text(model, prompt, 60, own)
        requests.append(Request(prompt=prompt, max_new_tokens=20 + 7 * tag, params=own))
    return requests, texts


def check_all(
    runs: Sequence[Run], requests: Sequence[Request], texts: Any, excuses: Excuses
) -> None:
    assert len(runs) == len(requests)
    for request, run in zip(requests, runs, strict=True):
        text = texts[request.params.seed]
        excuses.check(run.ids, text, text.ids[: request.max_new_tokens])


@pytest.mark.parametrize(
    ("name", "params", "behind"),
    [
        ("llama", SAMPLED[0], 0),
        ("llama", SAMPLED[1], 1),
        ("mistral", SAMPLED[1], 0),
        ("qwen2", SAMPLED[2], 0),
        ("qwen3", SAMPLED[0], 1),
        ("qwen3", SAMPLED[2], 1),
    ],
    ids=str,
)
def test_text_is_ar(name: str, params: dict[str, Any], behind: int, excuses: Excuses) -> None:
    """Chunked prompts, more requests than slots, and too few pages for all of them."""
    model = random_model(name)
    requests, texts = some_requests(model, params)
    for schedule in (
        AUTOREGRESSIVE, dense_schedule(4), Schedule(8, (1, 3)), Schedule(6, (4,)), two_forward(5)
    ):  # fmt: skip
        limits = EngineLimits(
            max_running=3,
            cache_tokens=160,
            page_size=8,
            chunk_tokens=7,
            max_draft_len=8,
            behind=behind,
        )
        runs = collect(PagedEngine(model, FixedPlan(schedule), limits), requests)
        check_all(runs, requests, texts, excuses)


@pytest.mark.parametrize("params", SAMPLED[:2], ids=str)
def test_text_of_a_trained_checkpoint_is_ar(params: dict[str, Any], excuses: Excuses) -> None:
    model = any_model("bundled")
    requests, texts = some_requests(model, params, lengths=(12, 30))
    limits = EngineLimits(max_running=2, cache_tokens=256, page_size=16, chunk_tokens=16, behind=1)
    runs = collect(PagedEngine(model, FixedPlan(Schedule(16, (1, 4))), limits), requests)
    check_all(runs, requests, texts, excuses)


@pytest.mark.parametrize(
    ("behind", "params", "all_rows"),
    [
        (0, SAMPLED[0], True),
        (1, SAMPLED[0], False),
        (0, SAMPLED[1], False),
        (1, SAMPLED[1], True),
        (0, SAMPLED[2], True),
        (1, SAMPLED[2], False),
    ],
    ids=str,
)
def test_text_is_ar_when_much_is_accepted(
    behind: int, params: dict[str, Any], all_rows: bool, excuses: Excuses
) -> None:
    model = random_model("qwen3")
    requests, texts = some_requests(model, params)
    known = {tag: text.all for tag, text in texts.items()}
    seen: set[tuple[int, int]] = set()
    for every in (0, 2, 3, 7):
        for plan in (
            FixedPlan(dense_schedule(5)),
            FixedPlan(Schedule(8, (1, 2, 5))),
            FixedPlan(two_forward(7)),
            Irregular(every),
        ):
            limits = EngineLimits(
                max_running=3, cache_tokens=200, page_size=8, chunk_tokens=16, max_draft_len=9,
                behind=behind,
            )  # fmt: skip
            engine = PagedEngine(model, plan, limits)
            use(engine, Scripted(model, engine.cache, known, every), all_rows)
            runs = collect(engine, requests)
            check_all(runs, requests, texts, excuses)
            seen |= {pair for run in runs for pair in zip(run.drafted, run.accepts, strict=True)}
    assert {(5, n) for n in range(1, 6)} <= seen
    assert max(accepted for _, accepted in seen) >= 8


def use(engine: PagedEngine, backend: Backend, all_rows: bool = True) -> None:
    from dataclasses import replace

    engine.runner.stepper = replace(engine.runner.stepper, backend=backend, all_rows=all_rows)
    engine.prefill.stepper = engine.runner.stepper


@pytest.mark.parametrize("schedule", [dense_schedule(6), two_forward(6)], ids=str)
@pytest.mark.parametrize("behind", [0, 1])
def test_endings_inside_a_run(behind: int, schedule: Schedule, excuses: Excuses) -> None:
    """End-of-text, a stop and max_new_tokens at every offset of a run of accepted tokens."""
    model = random_model("llama")
    prompt, params = random_prompt(model, 5, 3), SamplingParams(seed=3)
    text = ar_text(model, prompt, 40, params)
    for length in range(1, 14):
        end = text.ids[length - 1]
        first = text.ids.index(end) + 1
        for kind in ("length", "end-of-text", "stop"):
            count = length if kind == "length" else 40
            request = Request(
                prompt=prompt,
                max_new_tokens=count,
                params=params,
                eos_ids=frozenset([end]) if kind == "end-of-text" else frozenset(),
                make_stopper=(lambda end=end: lambda token: token == end)
                if kind == "stop"
                else None,
            )
            limits = EngineLimits(max_running=2, page_size=8, max_draft_len=6, behind=behind)
            engine = PagedEngine(model, FixedPlan(schedule), limits)
            use(engine, Scripted(model, engine.cache, {3: text.all}, 0))
            (run,) = collect(engine, [request])
            assert run.finish == kind
            excuses.check(run.ids, text, text.ids[: length if kind == "length" else first])


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("make", [dense_schedule, two_forward])
@pytest.mark.parametrize("draft_len", [1, 4, 9])
def test_context_end(
    draft_len: int, make: Callable[[int], Schedule], behind: int, excuses: Excuses
) -> None:
    model = random_model("qwen2", limit=64)
    params = SamplingParams(seed=1)
    for length in (1, 40, 62, 63):
        prompt = random_prompt(model, length, 1)
        text = ar_text(model, prompt, 200, params)
        limits = EngineLimits(max_running=2, page_size=8, max_draft_len=9, behind=behind)
        engine = PagedEngine(model, FixedPlan(make(draft_len)), limits)
        use(engine, Scripted(model, engine.cache, {1: text.all}, 0))
        (run,) = collect(engine, [Request(prompt=prompt, max_new_tokens=200, params=params)])
        assert run.finish == "context"
        excuses.check(run.ids, text)


def test_prefixes_are_reused(excuses: Excuses) -> None:
    model = random_model("mistral")
    prompt = random_prompt(model, 40, 2)
    requests = [
        Request(prompt=prompt[:n] + extra, max_new_tokens=12, params=SamplingParams())
        for n, extra in ((40, ()), (40, (1, 2)), (33, (4,)), (16, ()))
    ]
    limits = EngineLimits(max_running=1, page_size=8, max_draft_len=4)
    engine = PagedEngine(model, FixedPlan(dense_schedule(4)), limits)
    rows = []
    for request in requests:
        (first, *rest) = engine.run([request])
        rows.append(first.accepted)
        ids = [token for event in (first, *rest) for token in event.ids]
        excuses.check(ids, ar_text(model, request.prompt, 12, request.params))
    assert rows == [40, 2, 2, 8]  # the rest of each prompt was in the cache


@pytest.mark.parametrize("behind", [0, 1])
def test_cache_equals_one_from_scratch(behind: int) -> None:
    """Law 5, at every moment at which the host knows what is committed."""
    model = random_model("qwen3")
    requests, texts = some_requests(model, {"temperature": 1.0})
    known = {tag: text.all for tag, text in texts.items()}
    limits = EngineLimits(
        max_running=3,
        cache_tokens=160,
        page_size=8,
        chunk_tokens=16,
        max_draft_len=6,
        behind=behind,
    )
    engine = PagedEngine(model, Irregular(4, 6), limits)
    use(engine, Scripted(model, engine.cache, known, 3))
    checked = 0
    for turn, _ in enumerate(engine.run(requests)):
        if turn % 5 == 0:
            checked += check_caches(engine, model)
    assert checked > 10


def check_caches(engine: PagedEngine, model: Transformer) -> int:
    """Law 5 for every sequence of which something is decoded; how many there were."""
    checked = 0
    for request_id, sequence in engine.sequences.items():
        if request_id not in engine.slot_of or not sequence.emitted:
            continue
        tokens = [*sequence.request.prompt, *sequence.emitted][:-1]
        if engine.pages.committed(request_id) != len(tokens):
            continue
        found = engine.cache.entries(engine.pages.table(request_id), len(tokens))
        for actual, expected in zip(found, plain_cache(model, tokens), strict=True):
            assert_equal(actual, expected)
        checked += 1
    return checked


def trace(
    engine: PagedEngine, model: Transformer, texts: dict[int, Any], rng: random.Random, turns: int
) -> Iterator[tuple[int, int, list[int], bool]]:
    """Random arrivals and aborts; yields (tag, max_new_tokens, ids, ended) of each request at its end."""
    live: dict[int, tuple[int, int, list[int]]] = {}
    for _ in range(turns):
        if len(live) < 9 and rng.random() < 0.35:
            tag, count = rng.randrange(len(texts)), rng.randint(1, 30)
            params = SamplingParams(seed=tag, temperature=1.0)
            request = Request(prompt=texts[tag].prompt, max_new_tokens=count, params=params)
            live[engine.submit(request)] = (tag, count, [])
        if live and rng.random() < 0.02:
            gone = rng.choice(list(live))
            assert engine.abort(gone)
            assert not engine.abort(gone)
            yield (*live.pop(gone), False)
        for event in engine.turn():
            live[event.request_id][2].extend(event.ids)
            if event.finish is not None:
                yield (*live.pop(event.request_id), True)
    while engine.sequences:
        for event in engine.turn():
            live[event.request_id][2].extend(event.ids)
            if event.finish is not None:
                yield (*live.pop(event.request_id), True)
    assert not live


@pytest.mark.slow
@pytest.mark.parametrize(("behind", "turns"), [(0, 3000), (1, 7000)])
def test_traces_of_arrivals_aborts_and_preemptions(
    behind: int, turns: int, excuses: Excuses
) -> None:
    """10,000 turns in all: every text that ends is AR's (K = 1 among the schedules), every cache that of its text,
    and every page comes back.
    """
    model = random_model("llama", width=16, layers=1)
    texts = {}
    for tag in range(6):
        prompt = random_prompt(model, 2 + 5 * tag, tag)
        texts[tag] = ar_text(model, prompt, 30, SamplingParams(seed=tag, temperature=1.0))
    limits = EngineLimits(
        max_running=4, cache_tokens=120, page_size=4, chunk_tokens=9, max_draft_len=5, behind=behind
    )
    engine = PagedEngine(model, Irregular(behind, 5), limits)
    known = {tag: text.all for tag, text in texts.items()}
    use(engine, Scripted(model, engine.cache, known, 4), all_rows=bool(behind))
    preempted = ended = aborted = looked = checked = 0
    inner = engine.scheduler.next

    def counted() -> Any:
        nonlocal preempted, looked, checked
        looked += 1
        if looked % 25 == 0:
            with torch.inference_mode():
                checked += check_caches(engine, model)
        work = inner()
        preempted += len(work.preempted)
        return work

    engine.scheduler.next = counted  # type: ignore[method-assign]
    for tag, count, ids, whole in trace(engine, model, texts, random.Random(behind), turns):
        if whole:
            excuses.check(ids, texts[tag], texts[tag].ids[:count])
        ended, aborted = ended + whole, aborted + (not whole)
    engine._launched.clear()
    assert_returned(engine)
    assert ended > turns / 10
    assert aborted > 20
    assert preempted > 20
    assert checked > turns / 50


@pytest.mark.parametrize("all_rows", [True, False])
@pytest.mark.parametrize("behind", [0, 1])
def test_two_forward_alternates(behind: int, all_rows: bool) -> None:
    """Perfect drafts, texts that join at different times: one phase for all, K tokens and one in turn."""
    model, draft_len = random_model("llama"), 5
    requests, texts = some_requests(model, {}, lengths=(3, 21, 9))
    known = {tag: text.all for tag, text in texts.items()}
    limits = EngineLimits(
        max_running=3, page_size=8, chunk_tokens=8, max_draft_len=5, behind=behind
    )
    engine = PagedEngine(model, FixedPlan(two_forward(draft_len)), limits)
    use(engine, Scripted(model, engine.cache, known, 0), all_rows)
    for run in (*collect(engine, requests), *collect(engine, requests[:1])):
        # Who joins between a draft step and its verify step has its first draft cut.
        first = run.accepts.index(draft_len)
        assert first <= 1
        steps = run.accepts[first:-2]
        assert steps == [draft_len, 1] * (len(steps) // 2) + [draft_len] * (len(steps) % 2)
        assert len(steps) >= 2


def test_replayed_two_forward_follows_the_step_rule() -> None:
    """Drafts pass by given chances, at their usual depths; T/NFE is what the chain of the plan says."""
    model = random_model("llama", width=16, layers=1, limit=4000)
    survival = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    limits = EngineLimits(max_running=1, page_size=64, max_draft_len=8)
    engine = PagedEngine(model, FixedPlan(two_forward(8)), limits, replay=Replay(survival, seed=5))
    events = [
        event
        for event in engine.run([Request(prompt=(1, 2), max_new_tokens=3500)])
        if not event.prefill
    ]
    assert {event.rows for event in events} == {8, 9}
    tokens = float(survival[1:].cumprod(0).sum()) + 2
    mean = sum(event.accepted for event in events) / len(events)
    assert mean == pytest.approx(tokens / 2, rel=0.05)


def test_replayed_acceptance_follows_the_step_rule() -> None:
    """Drafts pass by given chances; shift and truncation are charged as in a simulation by hand."""
    model = random_model("llama", width=16, layers=1, limit=4000)
    survival = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    schedule = Schedule(8, (1, 3))
    limits = EngineLimits(max_running=1, page_size=64, max_draft_len=8)
    engine = PagedEngine(model, FixedPlan(schedule), limits, replay=Replay(survival, seed=5))
    counts = [
        e.accepted
        for e in engine.run([Request(prompt=(1, 2), max_new_tokens=2500)])
        if not e.prefill
    ]
    rng, shift, drafted, expected = random.Random(0), 0, 8, []
    for _ in range(20_000):
        accepted = 1
        while accepted < drafted and rng.random() < survival[shift + accepted]:
            accepted += 1
        expected.append(accepted)
        anchors = [a for a in (1, 3) if a <= drafted]
        shift = accepted - max(a for a in anchors if a <= accepted)
        drafted = 8 - shift
    mean = sum(expected) / len(expected)
    assert sum(counts) / len(counts) == pytest.approx(mean, rel=0.05)
