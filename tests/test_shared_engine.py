"""One paged engine for all calls: the public face with engine="paged", on a CPU."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from command import refused, tidar
from models import BUNDLED, random_model
from test_paged_engine import assert_returned

import tidar as package
from tidar.decode.paged_engine import PagedEngine
from tidar.decode.plan import MeasuredPlan
from tidar.decode.request import Request
from tidar.decode.shared import Job, PlanSpec, SharedEngine, cache_tokens_for
from tidar.errors import TidarError
from tidar.layout import AUTOREGRESSIVE, Schedule

PROMPTS = ("Compute 78417 + 5691.\n", "def fib(n):", "class Stack:\n")
FIXED: dict[str, Any] = {"draft_len": 16, "span_set": "1,2,4,8", "max_new_tokens": 40}


@pytest.fixture(scope="module")
def bundled() -> package.LanguageModel:
    return package.load(device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def nothing_is_left(bundled: package.LanguageModel) -> Iterator[None]:
    """After every test all pages and slots are back, and nobody waits."""
    yield
    if (engine := bundled.shared.engine) is not None:
        assert_returned(engine)
        assert not engine._launched
        assert bundled.shared._session is not None
        assert not bundled.shared._session.deliver


def engine_of(model: package.LanguageModel) -> PagedEngine:
    assert model.shared.engine is not None
    return model.shared.engine


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0, "seed": 4}, {"temperature": 0.8, "top_p": 0.9, "stop": ["\n\n"]}],
    ids=str,
)
def test_texts_are_those_of_the_plain_engine(
    bundled: package.LanguageModel, options: dict[str, Any]
) -> None:
    plain = [bundled.generate(p, engine="plain", **FIXED, **options) for p in PROMPTS]
    paged = [bundled.generate(p, engine="paged", **FIXED, **options) for p in PROMPTS]
    batch = bundled.generate_batch(PROMPTS, engine="paged", max_batch=2, **FIXED, **options)
    for one, other, third in zip(plain, paged, batch, strict=True):
        assert (one.text, one.ids, one.finish) == (other.text, other.ids, other.finish)
        assert (one.text, one.ids, one.finish) == (third.text, third.ids, third.finish)
        assert one.accepts == other.accepts
        assert other.seconds > 0


def test_rejection_and_beta(bundled: package.LanguageModel) -> None:
    """Repeatable on the paged engine, alone or in a batch; another text than the plain engine's is allowed."""
    rejects: dict[str, Any] = {"temperature": 1.0, "sampling": "rejection", "seed": 2}
    for options in (rejects, {"beta": 0.5}, {**rejects, "beta": 0.5, "top_k": 50}):
        options = {"draft_len": 8, "max_new_tokens": 16, "engine": "paged", **options}
        first = [bundled.generate(p, **options).ids for p in PROMPTS[:2]]
        assert bundled.generate(PROMPTS[0], **options).ids == first[0]
        assert [o.ids for o in bundled.generate_batch(PROMPTS[:2], **options)] == first
    lossy = bundled.generate(PROMPTS[1], beta=0.5, engine="paged", **FIXED)
    assert lossy.ids == bundled.generate(PROMPTS[1], beta=0.5, engine="plain", **FIXED).ids


def test_the_engine_is_kept_and_grows(bundled: package.LanguageModel) -> None:
    bundled.shared.close()
    assert bundled.shared.engine is None
    bundled.generate(PROMPTS[0], engine="paged", **FIXED)
    first = engine_of(bundled)
    assert first.runner.max_batch == 1
    bundled.generate(PROMPTS[1], engine="paged", method="ar", max_new_tokens=3)
    bundled.generate(PROMPTS[1], engine="paged", draft_len=4, span_set="dense", max_new_tokens=3)
    assert engine_of(bundled) is first
    bundled.generate_batch(PROMPTS, engine="paged", **FIXED)
    second = engine_of(bundled)
    assert second.runner.max_batch == 4
    bundled.generate_batch(PROMPTS[:2], engine="paged", **FIXED)
    bundled.generate(PROMPTS[1], engine="paged", **FIXED)
    assert engine_of(bundled) is second


def test_other_weights_are_not_mixed_with_what_is_cached() -> None:
    model = package.load(device="cpu", dtype="float32")
    model.generate(PROMPTS[0], engine="paged", **FIXED)
    before = engine_of(model)
    with torch.no_grad():
        for layer in model.network.layers:
            next(layer.parameters()).mul_(0.9)
    after = model.generate(PROMPTS[0], engine="paged", **FIXED).ids
    assert engine_of(model) is not before
    assert after == model.generate(PROMPTS[0], engine="plain", **FIXED).ids


def test_the_measured_plan_is_kept(
    bundled: package.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tidar.decode.shared as shared

    measured = 0
    inner = shared.plan_for

    def counted(*values: Any) -> MeasuredPlan:
        nonlocal measured
        measured += 1
        return inner(*values)

    monkeypatch.setattr(shared, "plan_for", counted)
    bundled.shared.close()
    expected = bundled.generate(PROMPTS[0], method="ar", max_new_tokens=30).ids
    for _ in range(2):
        out = bundled.generate(PROMPTS[0], engine="paged", max_new_tokens=30)
        assert out.ids == expected
        bundled.generate(PROMPTS[1], engine="paged", method="ar", max_new_tokens=2)
    assert measured == 1


def test_a_stream_that_is_closed_early_gives_all_back(bundled: package.LanguageModel) -> None:
    for reads in (0, 1, 3):
        stream = bundled.stream(PROMPTS[1], engine="paged", **FIXED)
        for _ in range(reads):
            next(stream)
        held = engine_of(bundled)
        assert bool(held.sequences) == (reads > 0)
        stream.close()  # type: ignore[attr-defined]
        assert_returned(held)
    abandoned = bundled.stream(PROMPTS[1], engine="paged", **FIXED)
    next(abandoned)
    del abandoned
    assert_returned(engine_of(bundled))


def test_interleaved_streams(bundled: package.LanguageModel) -> None:
    """Of one plan and of others, one of them abandoned, while the engine grows under them."""
    ways: list[dict[str, Any]] = [FIXED, {"method": "ar", "max_new_tokens": 30}, FIXED]
    expected = [bundled.generate(p, **w) for p, w in zip(PROMPTS, ways, strict=True)]
    bundled.shared.close()
    streams = [bundled.stream(p, engine="paged", **w) for p, w in zip(PROMPTS, ways, strict=True)]
    seen: list[list[package.StreamEvent]] = [[], [], []]
    for turn in range(60):
        for index in (0, 1) if turn else (2, 0, 1):
            if (event := next(streams[index], None)) is not None:
                seen[index].append(event)
        if turn == 1:
            bundled.generate_batch(PROMPTS[:2], engine="paged", **FIXED)
    for events, out in zip(seen[:2], expected, strict=False):
        assert [token for event in events for token in event.ids] == out.ids
        assert "".join(event.text for event in events) == out.text
        for event in events:  # the text of an event is that of its tokens, also when it came early
            assert bool(event.ids) or not event.text
    assert [e.accepted for e in seen[1] if not e.prefill] == [1] * 29
    streams[2].close()  # type: ignore[attr-defined]


def test_mistakes_are_told_by_the_call_itself(bundled: package.LanguageModel) -> None:
    for options in ({"engine": "graphs"}, {"temperature": -1.0}, {"beta": 2.0}, {"draft_len": 0},
                    {"max_new_tokens": 0}, {"span_set": "99"}):  # fmt: skip
        with pytest.raises(TidarError):
            bundled.stream("x", **{"engine": "paged", **options})  # type: ignore[arg-type]
    with pytest.raises(TidarError, match="max_batch is 0"):
        bundled.generate_batch(PROMPTS, engine="paged", max_batch=0)


def test_an_error_in_a_text_stops_the_engine_for_all() -> None:
    model = random_model("llama")
    shared, spec = SharedEngine(model), PlanSpec(Schedule(4, (1, 2)))
    request = Request(prompt=(1, 2, 3), max_new_tokens=9)

    def fails(event: object) -> None:
        raise ValueError("no text")

    good = shared.run([Job(request, lambda event: event.ids)], spec, max_running=2)
    next(good)
    with pytest.raises(ValueError, match="no text"):
        list(shared.run([Job(request, fails)], spec, max_running=2))
    with pytest.raises(TidarError, match="stopped the engine"):
        list(good)
    ids = [i for _, each in shared.run([Job(request, lambda e: e.ids)], spec) for i in each]
    assert len(ids) == 9


def test_the_cache_takes_full_contexts_or_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import tidar.decode.shared as shared

    config, device = random_model("llama").config, torch.device("cpu")
    assert cache_tokens_for(config, 4, 64, torch.float32, device) == 4 * 128
    per_page = 2 * 2 * 2 * 8 * 64 * 4  # keys and values, layers, heads, dim, positions, bytes
    monkeypatch.setattr(shared, "CPU_CACHE_BYTES", 3 * per_page + 1)
    assert cache_tokens_for(config, 4, 64, torch.float32, device) == 3 * 64
    request = Request(prompt=(1,) * 30, max_new_tokens=60)
    monkeypatch.setattr(shared, "CPU_CACHE_BYTES", per_page)
    with pytest.raises(TidarError, match="KV cache"):
        SharedEngine(random_model("llama")).run([Job(request, str)], PlanSpec(AUTOREGRESSIVE))


def test_auto_is_plain_on_a_cpu(bundled: package.LanguageModel) -> None:
    assert bundled.pick_engine() == "plain"
    assert bundled.pick_engine("paged") == "paged"
    with pytest.raises(TidarError, match="'auto', 'plain' or 'paged'"):
        bundled.pick_engine("fast")


def test_command_line() -> None:
    options = ("-K", 8, "--span-set", "single", "-n", 8, "--json", "--device", "cpu")
    texts = [
        tidar("generate", "def f(", "--model", BUNDLED, "--engine", engine, *options).out
        for engine in ("plain", "paged")
    ]
    one, other = (json.loads(text)["ids"] for text in texts)
    assert one == other
    assert "--engine" in tidar("generate", "--help").out
    assert "'auto', 'plain' or 'paged'" in refused("generate", "x", "--engine", "fast")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_everything_is_paged(bundled: package.LanguageModel) -> None:
    model = package.load(device="cuda", dtype="float32")
    assert model.pick_engine() == "paged"
    expected = [bundled.generate(p, **FIXED).ids for p in PROMPTS]
    assert [model.generate(p, **FIXED).ids for p in PROMPTS] == expected
    assert [out.ids for out in model.generate_batch(PROMPTS, **FIXED)] == expected
    assert model.generate(PROMPTS[0], max_new_tokens=40).ids == expected[0]  # by a measured plan
    held = engine_of(model)
    rejects: dict[str, Any] = {**FIXED, "temperature": 1.0, "sampling": "rejection"}
    assert model.generate(PROMPTS[1], **rejects).ids == model.generate(PROMPTS[1], **rejects).ids
    stream = model.stream(PROMPTS[1], **FIXED, beta=0.5)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert engine_of(model) is held
    assert_returned(held)
