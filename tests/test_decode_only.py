"""Replays that settle, and decoding alone: what is reused, what is timed, what a sweep leaves behind."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import ARCH, Ran, refused
from models import ROOT, Excuses, ar_text, random_model, random_prompt

import tidar.bench.shapes as shapes
from tidar.bench.acceptance import Acceptance
from tidar.bench.decode_only import SETTLING, _timed, most_tokens, run_decode_only
from tidar.bench.measure import (
    MOST_REPLAYS,
    NEVER,
    Settings,
    draws_of,
    make_request,
    replays_of,
    run_bench,
)
from tidar.bench.memory import MemoryMeter
from tidar.bench.prompts import Prompt
from tidar.bench.record import read_record
from tidar.bench.shapes import Cell, expected_rate, measure_cell
from tidar.decode.paged_costs import measure_table, plan_from
from tidar.decode.paged_engine import EngineLimits, PagedEngine
from tidar.decode.prefill import Prefill
from tidar.decode.spec import parse_method, parse_methods
from tidar.layout import dense_schedule
from tidar.sampling import SamplingParams

MODEL = random_model("llama", limit=512)
SMALL = random_model("llama", limit=512, width=16, layers=1)


def prompts(length: int, count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", random_prompt(MODEL, length, i)) for i in range(count)]


def settings(methods: str, **changes: Any) -> Settings:
    given = {"max_new_tokens": 20, "runs": 2, "engine": "paged", "decode_only": True, **changes}
    return Settings(methods=parse_methods(methods), **given)


# --- replays ---


def test_every_replay_has_seeds_of_its_own() -> None:
    chosen = settings("ar,tidar:4:dense", replay=Acceptance.of_mean(2.0, 4), replays=3)
    ar, drafting = chosen.methods
    assert [list(draws_of(drafting, chosen, run, 2)) for run in (0, 1)] == [[1, 2, 3], [4, 5, 6]]
    assert [list(draws_of(ar, chosen, run, 2)) for run in (0, 1)] == [[1], [2]]
    seeds = [
        make_request(prompt, index, chosen, frozenset(), draw).params.seed
        for draw in range(7)  # 0 is the warm-up's
        for index, prompt in enumerate(prompts(5, 2))
    ]
    assert len(set(seeds)) == 14
    # Without a replay texts are compared, so all runs have the seeds that they always had.
    plain = settings("ar,tidar:4:dense")
    assert all(list(draws_of(drafting, plain, run, 2)) == [0] for run in (0, 1))
    assert make_request(prompts(5, 2)[1], 1, plain, frozenset()).params.seed == 1


def test_replays_are_as_many_as_it_takes() -> None:
    """By hand: 1 or 2 tokens, each as likely; variance 1/4, mean 3/2."""
    half = Acceptance((1.0, 0.5), "by hand")
    assert half.steps_for(0.01) == pytest.approx(0.25 / 1.5**2 / 0.01**2)
    spec = parse_method("tidar:2:dense")
    chosen = settings("tidar:2:dense", replay=half, max_new_tokens=150)  # 100 steps a text
    assert replays_of(spec, chosen, 1) == 6  # 1111 steps in 2 runs
    assert replays_of(spec, chosen, 4) == 2
    assert replays_of(parse_method("ar"), chosen, 1) == 1
    assert (
        replays_of(spec, settings("tidar:2:dense", replay=half, max_new_tokens=1), 1)
        == MOST_REPLAYS
    )
    certain = Acceptance((1.0, 1.0), "all pass")
    assert replays_of(spec, settings("tidar:2:dense", replay=certain), 1) == 1


def test_tokens_of_a_step_by_hand() -> None:
    acceptance = Acceptance((1.0, 0.5, 0.25, 0.8), "by hand")
    assert acceptance.of_step(0, 1) == 1.0
    assert acceptance.of_step(0, 3) == 1 + 0.5 + 0.5 * 0.25
    assert acceptance.of_step(1, 3) == 1 + 0.25 + 0.25 * 0.8
    assert acceptance.of_step(3, 3) == pytest.approx(1 + 0.8 + 0.8 * 0.8)  # as replays do
    assert acceptance.of_step(0, 4) == pytest.approx(acceptance.mean)


@pytest.mark.parametrize("decode_only", [False, True])
def test_replayed_rates_settle_at_the_expected_one(decode_only: bool) -> None:
    """Both expectations, of the schedule and of the drafts, agree with what was measured, within 3%."""
    chosen = settings(
        "tidar:4:1,2", replay=Acceptance.of_mean(2.5, 4), batch=8, runs=3, max_new_tokens=80,
        decode_only=decode_only, seed=11,
    )  # fmt: skip
    (spec,) = chosen.methods
    run = run_decode_only if decode_only else run_bench
    more: Any = () if decode_only else (frozenset(),)
    passes = run(SMALL, prompts(30, 8), chosen, *more, meter=MemoryMeter(SMALL))[spec.name]
    texts = [text for one in passes for each in one for text in each.texts]
    measured = sum(t.decoded for t in texts) / sum(t.steps for t in texts)
    assert chosen.replay is not None
    assert measured == pytest.approx(expected_rate(spec, chosen.replay, passes), rel=0.03)
    by_draft = expected_rate(parse_method("tidar:plan"), chosen.replay, passes)
    assert measured == pytest.approx(by_draft, rel=0.03)
    assert len({tuple(text.accepts.items()) for text in texts}) > 1


# --- decoding alone ---


@pytest.mark.parametrize(("length", "left"), [(65, 1), (128, 64), (100, 36)])
def test_prompts_are_run_once(length: int, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the last page's tokens come from the cache, for every method, pass and run."""
    rows: list[int] = []
    prefill = Prefill.__call__

    def counted(self: Prefill, tokens: Any, *rest: Any, **named: Any) -> Any:
        rows.append(len(tokens))
        return prefill(self, tokens, *rest, **named)

    monkeypatch.setattr(Prefill, "__call__", counted)
    chosen = settings("ar,tidar:4:dense", replay=Acceptance.of_mean(3.0, 4), replays=2, batch=3)
    passes = run_decode_only(MODEL, prompts(length, 3), chosen, meter=MemoryMeter(MODEL))
    assert sum(rows) == 3 * length + 3 * left * (2 + 2 * (1 + 2))  # warm-ups, then runs
    for name, count in (("ar", 1), ("tidar:4:dense", 2)):
        assert [len(run) for run in passes[name]] == [count] * 2
        for done in (each for run in passes[name] for each in run):
            steps = done.timing.steps
            assert {step.sequences for step in steps} == {3}
            assert [step.alone for step in steps] == [False] * SETTLING + [True] * (
                len(steps) - SETTLING
            )
            # It ends with the turn that reaches 20 tokens each.
            assert 60 <= sum(step.tokens for step in steps) < 60 + steps[-1].tokens + 1
            assert sum(step.tokens for step in steps[:-1]) < 60
            assert sum(text.decoded for text in done.texts) == sum(step.tokens for step in steps)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_reused_prompts_give_the_same_texts(temperature: float, excuses: Excuses) -> None:
    """Real acceptance: what AR and TiDAR write behind shared pages is plain AR's text."""
    given = prompts(70, 2)
    chosen = settings("ar,tidar:4:1,2,tidar:plan", temperature=temperature, batch=2, runs=1)
    passes = run_decode_only(MODEL, given, chosen, meter=MemoryMeter(MODEL))
    for name in ("ar", "tidar:4:1,2", "tidar:plan"):
        for index, text in enumerate(passes[name][0][0].texts):
            params = SamplingParams(temperature=temperature, seed=index)
            expected = ar_text(MODEL, given[index].ids, len(text.ids), params)
            excuses.check(text.ids, expected)
            assert len(text.ids) >= 18


def test_a_text_that_ends_ends_the_pass() -> None:
    chosen = settings("tidar:4:dense", replay=Acceptance((1.0, 1.0, 1.0, 1.0), "all"), replays=1)
    (done,) = run_decode_only(SMALL, prompts(65, 1), chosen, meter=MemoryMeter(SMALL))[
        "tidar:4:dense"
    ][0]
    assert done.timing.forwards == 5  # of 4 tokens each
    assert most_tokens(chosen) == 2 * 20 + 4 * 4


def test_every_run_of_a_plan_begins_as_its_warm_up_ended() -> None:
    limits = EngineLimits(max_running=1, cache_tokens=512, max_draft_len=4)
    engine = parse_method("ar").engine(SMALL, limits=limits)
    assert isinstance(engine, PagedEngine)
    table = measure_table(engine, batches=(1,), among=(65,), repeats=3)
    assert {batch: list(contexts) for batch, contexts in table.items()} == {1: [65]}
    plan = plan_from(engine, table, (4,))
    plan.experience.acceptance.observe(0, 4, 2)
    first, second = _timed(plan), _timed(plan)
    first.experience.acceptance.observe(0, 4, 4)  # type: ignore[attr-defined]
    assert second.experience.acceptance.tried[1] == 1  # type: ignore[attr-defined]
    assert second.learn_at == NEVER  # type: ignore[attr-defined]


# --- the command ---


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({**ARCH, "vocab_size": 64, "max_position_embeddings": 1024}))
    return path


def sweep(shape: Path, *changes: object) -> tuple[object, ...]:
    return (
        "bench", "--shape", shape, "--random-weights", "--replay-acceptance", 3, "--runs", 2,
        "--methods", "ar,tidar:8:1,2,4,8", "--max-new-tokens", 24, "--replays", 2, "--decode-only",
        *changes,
    )  # fmt: skip


def test_sweep_of_decoding(shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, figure = tmp_path / "record.json", tmp_path / "sweep.png"
    places = ("--context", "64,100", "--batch", "1,2", "--out", out, "--figure", figure)
    ran = Ran(sweep(shape, *places))
    assert ran.code == 0, ran.err
    record = read_record(out)
    assert record["interrupted"] is False
    assert len(record["cells"]) == 4
    assert record["settings"]["decode_only"] is True
    for told in ("timed", "pass", "plan", "engine_shared", "draws", "prompts", "warm_up"):
        assert len(record["settings"][told]) > 20
    for cell in record["cells"]:
        for figures in cell["methods"].values():
            assert figures["x_ar"]["end_to_end"] is None
            assert figures["x_ar"]["decode"]["median"] > 0
            step = figures["step_milliseconds"]
            assert step["sequences"] == cell["batch"]
        drafting, ar = (cell["methods"][name] for name in ("tidar:8:1,2,4,8", "ar"))
        assert drafting["expectation"].startswith("of the schedule")
        one, other = (each["runs"][0]["mean_step"]["milliseconds"] for each in (ar, drafting))
        gain = drafting["x_ar"]["decode_at_expected"]
        first = drafting["expected_tokens_per_forward"] * one / other
        assert first == pytest.approx(gain["min"]) or first == pytest.approx(gain["max"])
    flat = " ".join(ran.out.split())
    for told in ("decoding alone: replayed acceptance, random weights", "T/NFE", "Timed: decode:"):
        assert told in flat
    assert figure.read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again.png"
    monkeypatch.setattr(sys, "argv", ["plot_sweep.py", str(out), str(again)])
    runpy.run_path(str(ROOT / "benchmarks" / "plot_sweep.py"), run_name="__main__")
    assert again.read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_keeps_the_cells_that_are_finished(
    shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "record.json"
    seen: list[int] = []
    measure = measure_cell

    def stopped(model: Any, cell: Cell, *rest: Any) -> Any:
        seen.append(len(read_record(out)["cells"]) if out.exists() else 0)
        if cell.batch == 3:
            raise KeyboardInterrupt
        if cell.batch == 2:
            raise torch.OutOfMemoryError("no room")
        return measure(model, cell, *rest)

    monkeypatch.setattr(shapes, "measure_cell", stopped)
    ran = Ran(sweep(shape, "--context", "64", "--batch", "1,2,3,4", "--out", out))
    assert ran.code == 130
    assert "interrupted" in ran.err
    assert seen == [0, 1, 2]  # written after every cell
    record = read_record(out)
    assert record["interrupted"] is True
    assert [bool(cell["methods"]) for cell in record["cells"]] == [True, False]
    assert "batch 2: not measured: no room" in " ".join(ran.out.split())
    refused(*sweep(shape, "--context", "64", "--batch", "3"), code=130)


def test_a_picture_needs_something_to_draw(shape: Path, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    command = sweep(shape, "--methods", "tidar:8:1", "--figure", tmp_path / "a.png", "--out", out)
    assert "name ar and another" in refused(*command)
    assert not out.exists()  # it says so before measuring


def test_dense_expectation_is_the_mean() -> None:
    acceptance = Acceptance.of_mean(3.0, 8)
    spec = parse_method("tidar:8:dense")
    assert spec.schedule == dense_schedule(8)
    assert expected_rate(spec, acceptance, []) == pytest.approx(3.0)
    assert expected_rate(parse_method("tidar:plan"), acceptance, []) is None
