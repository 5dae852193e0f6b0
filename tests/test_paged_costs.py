"""Costs and plan of the paged engine on a CPU, and chunks that are filled up as on a GPU."""

from pathlib import Path

import pytest
import torch
from models import Excuses, assert_equal, random_model, random_prompt
from test_paged_engine import assert_returned, check_all, collect, some_requests

from tidar.decode.costs import StepCosts
from tidar.decode.engine import FixedPlan
from tidar.decode.paged_costs import (
    PagedCosts,
    _read,
    _write,
    measure_table,
    plan_for,
    profiled_schedules,
)
from tidar.decode.paged_engine import EngineLimits, PagedEngine
from tidar.decode.prefill import ChunkShape, Entry, Prefill
from tidar.layout import AUTOREGRESSIVE, Schedule, dense_schedule

LIMITS = EngineLimits(max_running=3, page_size=8, chunk_tokens=16, max_draft_len=8, behind=1)


def engine_of(limits: EngineLimits = LIMITS) -> PagedEngine:
    model = random_model("qwen3", layers=1, limit=512)
    return PagedEngine(model, FixedPlan(AUTOREGRESSIVE), limits)


def test_table_covers_batches_and_contexts_that_fit() -> None:
    engine = engine_of()
    table = measure_table(engine, repeats=3)
    assert sorted(table) == [1, 2]
    for by_context in table.values():
        assert all(context + 16 <= 512 for context in by_context)
        for costs in by_context.values():
            assert costs.fixed_shape
            assert costs.rows[0] == 1
            assert list(costs.rows) == sorted(set(costs.rows))
            assert min(costs.seconds) > 0
    assert_returned(engine)


def test_costs_are_those_of_the_nearest_batch_and_context() -> None:
    def costs(mark: float) -> StepCosts:
        return StepCosts((1,), (mark,), fixed_shape=True)

    table = {1: {512: costs(1), 4096: costs(2)}, 4: {512: costs(3), 4096: costs(4)}}
    for batch, context, mark in (
        (1, 10, 1), (1, 1400, 1), (1, 1500, 2), (2, 600, 3), (4, 9999, 4), (9, 100, 3),
    ):  # fmt: skip
        found = PagedCosts(table, lambda _, pair=(batch, context): pair).at(())
        assert found.seconds == (mark,), (batch, context)


def test_profiled_schedules_reach_what_the_plan_may_ask_for() -> None:
    assert profiled_schedules(1) == (AUTOREGRESSIVE,)
    assert profiled_schedules(2) == (AUTOREGRESSIVE, Schedule(2, (1,)))
    assert dense_schedule(16) in profiled_schedules(16)
    assert max(s.draft_len for s in profiled_schedules(8)) == 8


@pytest.mark.parametrize("behind", [0, 1])
def test_text_under_the_measured_plan_is_ar(behind: int, excuses: Excuses) -> None:
    model = random_model("llama")
    limits = EngineLimits(
        max_running=3,
        cache_tokens=200,
        page_size=8,
        chunk_tokens=16,
        max_draft_len=8,
        behind=behind,
    )
    engine = PagedEngine(model, FixedPlan(AUTOREGRESSIVE), limits)
    engine.plan = plan_for(engine, (4, 8))
    requests, texts = some_requests(model, {"temperature": 1.0})
    check_all(collect(engine, requests), requests, texts, excuses)


def test_measurements_are_kept_and_read_back(tmp_path: Path) -> None:
    place = tmp_path / "profiles" / "one.json"
    assert _read(place) is None
    table = {1: {512: StepCosts((1, 8), (0.5, 0.75), fixed_shape=True)}}
    _write(place, table)
    assert _read(place) == table
    assert [path.name for path in place.parent.iterdir()] == ["one.json"]
    for broken in ("", "[]", '{"1": 3}', '{"1": {"512": [[1]]}}'):
        place.write_text(broken)
        assert _read(place) is None


@pytest.mark.parametrize("schedule", [AUTOREGRESSIVE, dense_schedule(4), None], ids=str)
@pytest.mark.parametrize("size", [1, 5, 16])
def test_a_chunk_filled_up_does_what_it_does_alone(size: int, schedule: Schedule | None) -> None:
    """First token, draft, state and stored prefix, behind 7 tokens that are there already."""
    model = random_model("qwen2")
    states = []
    for filled in (size, 16):
        engine = PagedEngine(model, FixedPlan(AUTOREGRESSIVE), LIMITS)
        engine.slots.page_table[1, :6] = torch.tensor([5, 2, 7, 3, 1, 4], dtype=torch.int32)
        prefill = Prefill(engine.runner.stepper, graphs=False, most=16)
        prompt = random_prompt(model, 7 + size, size)
        prefill(prompt[:7], Entry(1, 0, 7, 9), None, filtered=False)
        masks = schedule.draft_len if schedule is not None and schedule.drafts else 0
        shape = ChunkShape(filled, masks, 0 if schedule is None else max(1, masks))
        buffer = prefill._pack(shape, prompt[7:], Entry(1, 7, 7 + size, 9))
        first = prefill._run(shape, buffer, False)
        table = (5, 2, 7, 3, 1, 4)
        slots = engine.slots
        states.append(
            (
                engine.cache.entries(table, 7 + size),
                None if first is None else first.tolist(),
                slots.drafts[1].tolist(),
                int(slots.prefix[1]),
                int(slots.lens[1]),
                int(slots.left[1]),
            )
        )
    (alone, *state), (together, *other) = states
    assert state == other
    for one, two in zip(alone, together, strict=True):
        assert_equal(two, one)


def test_measuring_between_two_texts_leaves_the_graphs_slots_known() -> None:
    """Who names other slots does it through the runner, which else would not name its own again."""
    from types import SimpleNamespace
    from typing import Any, cast

    runner = engine_of().runner
    captured = cast("Any", SimpleNamespace(chosen=torch.zeros(4, dtype=torch.int64)))
    for slots in ((3,), (1, 2, 3), (3,), (3,), (2, 1)):
        runner.seat(captured, slots)
        assert captured.chosen.tolist() == [*slots, *[0] * (4 - len(slots))]
