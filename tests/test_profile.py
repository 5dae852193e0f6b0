"""Step times by rows: finite, in order, of an engine that is left as it was; and what follows from them."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import ARCH, refused, tidar
from models import random_model, random_prompt
from rich.console import Console

from tidar.bench.acceptance import Acceptance
from tidar.bench.free_rows import (
    draw_steps,
    free_rows,
    rate_schedules,
    step_figures,
    summarise_steps,
)
from tidar.bench.record import read_record
from tidar.bench.shares import KINDS, kernel_times
from tidar.cli.profile import show_profile
from tidar.decode.engine import FixedPlan
from tidar.decode.paged_engine import EngineLimits, PagedEngine
from tidar.decode.request import Request
from tidar.decode.step_times import StepTime, limits_for, measure_steps
from tidar.errors import TidarError
from tidar.layout import AUTOREGRESSIVE, Schedule, dense_schedule, two_forward
from tidar.weights import init_model

SCHEDULES = (AUTOREGRESSIVE, Schedule(4, (1,)), Schedule(8, (1, 4)), dense_schedule(8))
NAMES = dict(zip(SCHEDULES, ("ar", "tidar:4:1", "tidar:8:1,4", "tidar:8:dense"), strict=True))


def test_steps_are_measured_and_the_engine_is_left_as_it_was() -> None:
    model = random_model("qwen3")
    limits = EngineLimits(max_running=3, page_size=8, max_draft_len=8)
    engine = PagedEngine(model, FixedPlan(dense_schedule(8)), limits)
    request = Request(prompt=random_prompt(model, 30, 0), max_new_tokens=20)
    before = [event.ids for event in engine.run([request])]
    labels: list[str] = []
    times = measure_steps(engine, SCHEDULES, (1, 40), 2, repeats=3, on_step=labels.append)
    assert [(t.schedule, t.context) for t in times] == [(s, c) for c in (1, 40) for s in SCHEDULES]
    assert [t.rows for t in times[:4]] == [1, 8, 24, 72]
    assert len(labels) == 3 * len(times)
    for each in times:
        assert each.batch == 2
        assert each.count >= 3
        assert 0 < each.fastest <= each.seconds <= each.slowest < 60
    labels.clear()
    (once,) = measure_steps(engine, SCHEDULES[:1], (1,), repeats=8, rounds=7, on_step=labels.append)
    assert (once.count, len(labels)) == (14, 7)
    assert kernel_times(engine, SCHEDULES[1], 40) is None  # a GPU's kernels only
    engine.pages.check()
    assert engine.pages.free == engine.pages.usable
    assert not engine.slots.page_table.any()
    assert [event.ids for event in engine.run([request])] == before


def test_every_timed_step_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefix, draft lengths and what is left stand where they should whenever a step begins."""
    model = random_model("llama")
    engine = PagedEngine(
        model, FixedPlan(AUTOREGRESSIVE), limits_for(model.config, SCHEDULES, (33,), 2)
    )
    run, seen = engine.runner.__call__, []

    class Watching(type(engine.runner)):  # type: ignore[misc]
        def __call__(self, schedule: Schedule, slots: range, *, filtered: bool) -> torch.Tensor:
            state, own = engine.slots, list(slots)
            seen.append(
                (schedule.draft_len, *state.prefix[own].tolist(), *state.lens[own].tolist())
            )
            assert int(state.left[own].min()) > 2**30
            assert not state.shift[own].any()
            tables = state.page_table[own]
            assert len(set(tables[tables > 0].tolist())) == int((tables > 0).sum())
            result: torch.Tensor = run(schedule, slots, filtered=filtered)
            assert result[:, 0].tolist() == [schedule.draft_len] * 2  # the drafts were full
            return result

    engine.runner.__class__ = Watching
    measure_steps(engine, SCHEDULES[:3], (33,), 2, repeats=3)
    assert set(seen) == {(k, 33, 33, k, k) for k in (1, 4, 8)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replayed_graphs_are_timed_on_cuda() -> None:
    config = replace(
        random_model("qwen3").config, hidden_size=256, intermediate_size=512, head_dim=64
    )
    model = init_model(config, 0, device="cuda", dtype=torch.bfloat16).eval()
    engine = PagedEngine(model, FixedPlan(AUTOREGRESSIVE), limits_for(config, SCHEDULES, (40,), 2))
    for each in measure_steps(engine, SCHEDULES, (1, 40), 2):
        assert 1e-6 < each.fastest <= each.seconds < 0.1
    split = kernel_times(engine, SCHEDULES[-1], 40, 2)
    assert split is not None
    assert min(split[kind] for kind in ("attention", "attention projections", "MLP")) > 0
    # Milliseconds of kernels in a step, against what a step takes without a profiler.
    assert 0 < sum(split.values()) < 1e3 * 10 * each.slowest
    assert engine.pages.free == engine.pages.usable


def test_what_cannot_be_measured() -> None:
    model = random_model("llama", limit=64)
    engine = PagedEngine(
        model, FixedPlan(AUTOREGRESSIVE), EngineLimits(max_draft_len=4, cache_tokens=64)
    )
    steps = SCHEDULES[:2]
    for schedules, contexts, batch, message in (
        (steps, (0,), 1, "1 token or more"),
        (steps, (), 1, "1 token or more"),
        (steps, (60,), 1, "64"),
        (steps, (8,), 9, "max_running"),
        (SCHEDULES, (8,), 1, "max_draft_len"),
        (steps, (40,), 2, "no room for 2 sequences"),
    ):
        with pytest.raises(TidarError, match=message):
            measure_steps(engine, schedules, contexts, batch)
    engine.pages.check()
    assert engine.pages.free == engine.pages.usable
    with pytest.raises(TidarError, match="does not fit"):
        limits_for(model.config, steps, (60,), 1)


def made_up(*seconds: float, context: int = 64, batch: int = 2) -> list[StepTime]:
    return [
        StepTime(schedule, context, batch, each, each, each, 9)
        for schedule, each in zip(SCHEDULES, seconds, strict=True)
    ]


def test_free_rows_and_ratings_by_hand() -> None:
    times = [*made_up(1.0, 1.05, 1.2, 2.0), *made_up(0.5, 0.5, 0.6, 1.0, context=1)]
    steps = step_figures(times, NAMES)
    assert [step["x_ar"] for step in steps[:4]] == [1.0, 1.05, 1.2, 2.0]
    assert [step["prefix_milliseconds"] for step in steps[:4]] == [500.0, 550.0, 600.0, 1000.0]
    assert free_rows(steps[:4], 1.1) == 8
    assert free_rows(steps[:4], 1.25) == 24
    sure = Acceptance.of_mean(8.0, 8)
    rated = rate_schedules(times[:4], sure, NAMES)
    assert rated[0]["method"] == "tidar:8:1,4"  # shifts of 4 leave 4 of 8, and 1.2 s
    by_name = {r["method"]: r for r in rated}
    assert by_name["ar"]["x_ar"] == 1.0
    assert by_name["ar"]["tokens_per_second"] == 2.0
    assert by_name["tidar:8:dense"]["tokens_per_forward"] == pytest.approx(8.0)
    assert by_name["tidar:8:dense"]["x_ar"] == pytest.approx(4.0)
    verify, draft = two_forward(8).steps
    halves = [
        StepTime(schedule, 64, 2, each, each, each, 9)
        for schedule, each in ((verify, 1.0), (draft, 1.5))
    ]
    named = {AUTOREGRESSIVE: "ar", verify: "verify", draft: "draft"}
    both, _ = rate_schedules([times[0], *halves], sure, named)
    assert both["tokens_per_forward"] == pytest.approx(4.5)  # 8 tokens and 1
    assert both["x_ar"] == pytest.approx(9 / 2.5)
    lines = summarise_steps(times, Acceptance.of_mean(1.0, 8), NAMES)
    assert [(line["context"], line["recommended"]) for line in lines] == [(64, "ar"), (1, "ar")]
    assert lines[0]["free_rows"] == {"1.1": 8, "1.25": 24}


def synthetic(batch: int, context: int, rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A line of "steps", and one of "kernels" with times that tell all of them apart."""
    place = {"method": f"rows {rows}", "batch": batch, "context": context, "rows": rows}
    kinds = dict.fromkeys(KINDS, 0.5) | {"attention": batch * context * rows, "MLP": 1e-3 * rows}
    return (
        {**place, "x_ar": float(rows), "milliseconds": 1.0, "prefix_milliseconds": None},
        {**place, "gpu_milliseconds": sum(kinds.values()), "kinds": kinds},
    )


def test_kinds_are_drawn_and_shown(shape: Path) -> None:
    """A panel below each batch: attention and MLP against rows, in the colours of the contexts above."""
    pairs = [synthetic(b, c, rows) for b in (1, 4) for c in (1, 64) for rows in (80, 1, 16)]
    steps, kernels = ([pair[at] for pair in pairs] for at in (0, 1))
    to_rgb = pytest.importorskip("matplotlib.colors").to_rgb
    panels = draw_steps(steps, "title", kernels).axes
    assert len(panels) == 4
    for column, batch in enumerate((1, 4)):
        above, below = panels[column], panels[2 + column]
        drawn = [line for line in below.lines if len(line.get_xdata())]
        assert len(drawn) == 4
        for number, context in enumerate((1, 64)):
            attention, mlp = drawn[2 * number : 2 * number + 2]
            for line, slope in ((attention, batch * context), (mlp, 1e-3)):
                assert line.get_xydata().tolist() == [[rows, slope * rows] for rows in (1, 16, 80)]
            colours = {to_rgb(each.get_color()) for each in (attention, mlp, above.lines[number])}
            assert len(colours) == 1
    assert [text.get_text() for text in panels[2].get_legend().get_texts()] == ["attention", "MLP"]
    unseen = [{**line, "gpu_milliseconds": None, "kinds": None} for line in kernels]
    assert len(draw_steps(steps, "title", unseen).axes) == len(draw_steps(steps, "title").axes) == 2

    record = tidar("profile", "--shape", shape, "--random-weights", "--methods", "ar", "--context", 64,
                   "--repeats", 1, "--device", "cpu", "--kernels", "--json", "-").json  # fmt: skip
    assert record["kernels"] is None  # type: ignore[call-overload]
    shown = Console(file=io.StringIO(), width=400)
    show_profile({**record, "kernels": kernels[:6]}, shown)  # type: ignore[dict-item]
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "rows 16, batch 1, context 64: attention 1.02e+03 ms (100%), " in text
    assert text.count("MLP") == 3  # of the longest context only


# --- the command ---


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({**ARCH, "max_position_embeddings": 700}))
    return path


def test_profile(shape: Path, tmp_path: Path) -> None:
    out, png = tmp_path / "steps.json", tmp_path / "steps.png"
    ran = tidar("profile", "--shape", shape, "--random-weights", "--batch", "1,2", "--repeats", 3,
                "--device", "cpu", "--json", out, "--png", png)  # fmt: skip
    record = read_record(out)
    assert record["settings"]["context"] == [1, 512]  # those that fit, and one for no prefix
    assert record["model"]["random_weights"] is True
    for batch in (1, 2):
        for context in (1, 512):
            steps = [s for s in record["steps"] if (s["batch"], s["context"]) == (batch, context)]
            rows = [step["rows"] for step in steps]
            assert rows == sorted(rows)
            assert rows[0] == 1
            assert rows[-1] == 272
            assert steps[0]["x_ar"] == 1.0
            for step in steps:
                assert math.isfinite(step["milliseconds"])
                assert step["milliseconds"] > 0
    assert len(record["summary"]) == 4
    line = record["summary"][-1]
    assert line["free_rows"]["1.1"] <= line["free_rows"]["1.25"] <= 272
    assert line["recommended"] == line["schedules"][0]["method"]
    assert png.stat().st_size > 10_000
    assert " 7 bursts" in record["settings"]["warm_up"]
    assert {step["steps_timed"] for step in record["steps"]} == {7}
    flat = " ".join(ran.out.split())
    for part in ("random weights", "free token slots", "context 512", "best", "tokens a step"):
        assert part in flat
    printed = tidar("profile", "--shape", shape, "--methods", "tidar:2:1,tidar:4:two-forward", "--context", "9",
                    "--repeats", 3, "--device", "cpu", "--json", "-").json  # fmt: skip
    halves = ["tidar:4:two-forward, verify", "tidar:4:two-forward, draft"]
    assert [s["method"] for s in printed["steps"]] == ["ar", "tidar:2:1", *halves] * 2  # type: ignore[attr-defined]
    assert [s["rows"] for s in printed["steps"]] == [1, 4, 4, 5] * 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--shape", "nope"), "known names"),
        (("--context", "695"), "does not fit"),
        (("--context", "none"), "--context 'none'"),
        (("--batch", "1,"), "--batch '1,'"),
        (("--methods", "tidar:plan"), "no schedule of its own"),
        (("--methods", "tidar:8:1"), None),
        (("--methods", "ar", "--replay-acceptance", "1"), None),
        (("--methods", "tidar:4:1", "--replay-acceptance", "5"), "from 1 to 4"),
        (("--dtype", "int8"), "not supported"),
        (("--png", "/nowhere/steps.png"), "cannot write the picture"),
        (("--json", "/proc/nowhere/steps.json"), "cannot write the record"),
    ],
)
def test_mistakes(changes: tuple[str, ...], message: str | None, shape: Path) -> None:
    quick = ("--device", "cpu", "--context", 8, "--repeats", 1, "--methods", "tidar:4:1")
    command = ("profile", "--shape", shape, *quick, "--replay-acceptance", 2, *changes)
    if message is None:
        tidar(*command)
    else:
        assert message in " ".join(refused(*command).split())
    assert "MODEL cannot be used" in refused("profile", "x", "--shape", shape)
