"""Requests to the paged engine that cannot be run, and what their events say of time."""

import time

import pytest
import torch
from models import (
    Excuses,
    ar_text,
    random_model,
)
from test_paged_engine import assert_returned, collect

from tidar.decode.engine import FixedPlan
from tidar.decode.paged_engine import EngineLimits, PagedEngine
from tidar.decode.request import Request, Stopper
from tidar.decode.slots import Replay
from tidar.errors import TidarError
from tidar.layout import AUTOREGRESSIVE, dense_schedule
from tidar.sampling import SamplingParams


def test_what_can_never_run_is_refused_at_once() -> None:
    model = random_model("llama")
    limits = EngineLimits(max_running=2, cache_tokens=32, page_size=8, max_draft_len=4)
    engine = PagedEngine(model, FixedPlan(AUTOREGRESSIVE), limits)
    with pytest.raises(TidarError, match="pages"):
        engine.submit(Request(prompt=(1, 2, 3), max_new_tokens=60))
    with pytest.raises(TidarError, match=r"beta is 1\.5"):
        engine.submit(Request(prompt=(1, 2, 3), max_new_tokens=4), beta=1.5)
    replay = Replay(torch.ones(4))
    replaying = PagedEngine(model, FixedPlan(AUTOREGRESSIVE), limits, replay=replay)
    params = SamplingParams(temperature=1.0, sampling="rejection")
    with pytest.raises(TidarError, match="made up"):
        replaying.submit(Request(prompt=(1, 2, 3), max_new_tokens=4, params=params))
    assert not engine.sequences
    assert not replaying.sequences
    with pytest.raises(TidarError, match="power of two"):
        EngineLimits(page_size=48)
    with pytest.raises(TidarError, match="cache_tokens is -5"):
        EngineLimits(cache_tokens=-5)


def test_a_schedule_longer_than_the_slots_is_refused() -> None:
    model = random_model("llama")
    limits = EngineLimits(max_running=2, cache_tokens=64, page_size=8, max_draft_len=4)
    engine = PagedEngine(model, FixedPlan(dense_schedule(8)), limits)
    with pytest.raises(TidarError, match="max_draft_len is 4"):
        list(engine.run([Request(prompt=(1, 2, 3), max_new_tokens=9)]))
    assert_returned(engine)


def test_a_stopper_that_cannot_be_made_leaves_nothing_behind(excuses: Excuses) -> None:
    model = random_model("llama")
    engine = PagedEngine(model, FixedPlan(AUTOREGRESSIVE), EngineLimits(max_running=2, page_size=8))

    def broken() -> Stopper:
        raise RuntimeError("no stopper")

    with pytest.raises(RuntimeError, match="no stopper"):
        engine.submit(Request(prompt=(1, 2, 3), make_stopper=broken))
    (run,) = collect(engine, [Request(prompt=(1, 2, 3), max_new_tokens=9)])
    excuses.check(run.ids, ar_text(model, (1, 2, 3), 9, SamplingParams()))
    assert_returned(engine)


@pytest.mark.parametrize("behind", [0, 1])
def test_the_readers_own_time_is_no_steps(behind: int) -> None:
    limits = EngineLimits(max_running=1, page_size=8, behind=behind)
    engine = PagedEngine(random_model("llama"), FixedPlan(AUTOREGRESSIVE), limits)
    seconds = []
    for event in engine.run([Request(prompt=(1, 2, 3), max_new_tokens=6)]):
        seconds.append(event.seconds)
        time.sleep(0.2)
    assert max(seconds) < 0.2
