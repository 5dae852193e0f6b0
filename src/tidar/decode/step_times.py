"""What a decode step costs by its rows: the real step of the paged engine, timed over and over.

The steps run on slots that are set up by hand behind a prefix of a given length, with no prefill: what is
in the prefix does not change what it costs to read. The state of the slots is put back before every step,
outside of what is timed, so all steps of a kind are the same. On a GPU the captured graph is replayed and
timed by the GPU's own clock; elsewhere it is the wall clock.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.decode.graphs import on_device
from tidar.decode.paged_engine import EngineLimits, PagedEngine
from tidar.decode.slots import StepShape
from tidar.errors import TidarError
from tidar.layout import Schedule
from tidar.model import ModelConfig

ENDLESS = 1 << 40
"""Tokens left to a text that must never be cut short."""

WARM_UP = 5
"""Steps at the head of each burst that are not counted; they also let the host run ahead of the GPU."""

SPIN_UP = 0.3
"""Seconds of work before anything is counted on a GPU, whose clocks rise only under load."""

ROUNDS = 3
"""Bursts of each kind of step where nobody asks for more: a plan that starts must not take long."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a decode step: the median of `count`, the fastest and the slowest.

    context: prefix tokens of each of `batch` sequences. rows: of one sequence, its draft full.
    """

    schedule: Schedule
    context: int
    batch: int
    seconds: float
    fastest: float
    slowest: float
    count: int

    @property
    def rows(self) -> int:
        return len(StepShape(self.schedule, torch.device("cpu")).tail)


def room_needed(context: int, schedules: Sequence[Schedule]) -> int:
    """Positions that a sequence takes in steps behind a prefix of `context` tokens."""
    return context + 2 * max(schedule.draft_len for schedule in schedules)


def limits_for(
    config: ModelConfig, schedules: Sequence[Schedule], contexts: Sequence[int], batch: int
) -> EngineLimits:
    """Limits of an engine that `measure_steps` can use for these. Raises TidarError for too long contexts."""
    longest, needed = max(contexts), room_needed(max(contexts), schedules)
    if needed > config.max_positions:
        raise TidarError(
            f"a context of {longest} tokens does not fit: its steps need {needed} positions, and the model "
            f"has {config.max_positions}. Give a shorter --context."
        )
    size = EngineLimits().page_size
    return EngineLimits(
        max_running=batch,
        cache_tokens=batch * -(-needed // size) * size,
        max_draft_len=max(schedule.draft_len for schedule in schedules),
    )


@torch.inference_mode()
def measure_steps(
    engine: PagedEngine,
    schedules: Sequence[Schedule],
    contexts: Sequence[int],
    batch: int = 1,
    *,
    repeats: int = 30,
    rounds: int = ROUNDS,
    on_step: Callable[[str], None] = lambda label: None,
) -> list[StepTime]:
    """Times a step of every schedule behind prefixes of every length, for `batch` sequences at a time.

    engine: idle; it is as before afterwards, but for graphs it has captured. repeats: steps that count,
    at least, for each median. rounds: bursts that they are spread over; all kinds of steps take turns, so that
    a disturbance hits all alike. Results are in the order of contexts, then schedules. on_step is called
    `rounds` times for each. Raises TidarError where the engine has not enough slots, positions or pages.
    """
    check_measurable(engine, schedules, contexts, batch)
    burst = -(-repeats // rounds)
    seconds: dict[tuple[int, Schedule], list[float]] = {}
    with (
        on_device(engine.device),
        seated(engine, batch, room_needed(max(contexts), schedules)) as seat,
    ):
        for schedule in schedules:  # compiles and captures, so that the rounds only run
            seat.time_burst(schedule, contexts[0], 1)
        began = time.perf_counter()
        while engine.runner.graphs and time.perf_counter() - began < SPIN_UP:
            seat.time_burst(schedules[-1], contexts[-1], WARM_UP)
        for _ in range(rounds):
            for context in contexts:
                for schedule in reversed(schedules):
                    found = seat.time_burst(schedule, context, WARM_UP + burst)
                    seconds.setdefault((context, schedule), []).extend(found[WARM_UP:])
                    on_step(f"context {context}, K = {schedule.draft_len}, batch {batch}")
    return [
        _step_time(schedule, context, batch, seconds[context, schedule])
        for context in contexts
        for schedule in schedules
    ]


def _step_time(schedule: Schedule, context: int, batch: int, seconds: Sequence[float]) -> StepTime:
    middle = statistics.median(seconds)
    return StepTime(schedule, context, batch, middle, min(seconds), max(seconds), len(seconds))


def check_measurable(
    engine: PagedEngine, schedules: Sequence[Schedule], contexts: Sequence[int], batch: int
) -> None:
    """Raises TidarError where the engine has not enough slots or positions for these steps."""
    assert not engine.sequences, "steps are measured on an idle engine"
    assert schedules, "no schedule to measure"
    if not contexts or min(contexts) < 1:
        raise TidarError(f"contexts {list(contexts)} cannot be measured: give 1 token or more.")
    if not 1 <= batch <= engine.runner.max_batch:
        raise TidarError(
            f"a batch of {batch} cannot be measured: the engine runs 1 to {engine.runner.max_batch} "
            "sequences (max_running)."
        )
    longest = max(schedule.draft_len for schedule in schedules)
    if longest > engine.max_draft_len:
        raise TidarError(
            f"K = {longest} is above the engine's max_draft_len, {engine.max_draft_len}."
        )
    needed = room_needed(max(contexts), schedules)
    if needed > engine.limit:
        raise TidarError(
            f"a context of {max(contexts)} tokens does not fit: its steps need {needed} positions, and the "
            f"model has {engine.limit}."
        )


@dataclass(frozen=True, slots=True)
class Seat:
    """Sequences that stand in slots 1 .. batch of an engine, with nobody's text."""

    engine: PagedEngine
    batch: int
    drafts: Tensor

    def reset(self, schedule: Schedule, context: int) -> None:
        """Full drafts behind prefixes of `context` tokens, by copies on the device alone."""
        state, own = self.engine.slots, slice(1, self.batch + 1)
        state.prefix[own].fill_(context)
        state.drafts[own].copy_(self.drafts)
        state.lens[own].fill_(schedule.draft_len)
        state.left[own].fill_(ENDLESS)
        state.shift[own].fill_(0)

    def time_burst(self, schedule: Schedule, context: int, count: int) -> list[float]:
        """Seconds of `count` steps in a row."""
        if self.engine.runner.graphs:
            return self._time_replays(schedule, context, count)
        slots, seconds = range(1, self.batch + 1), []
        for _ in range(count):
            self.reset(schedule, context)
            began = time.perf_counter()
            self.engine.runner(schedule, slots, filtered=False)
            seconds.append(time.perf_counter() - began)
        return seconds

    def _time_replays(self, schedule: Schedule, context: int, count: int) -> list[float]:
        """By events around each replay; the host waits only once, so the GPU always has work queued."""
        replay = self.replay(schedule)
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        torch.cuda.synchronize(self.engine.device)
        for start, end in marks:
            self.reset(schedule, context)
            start.record()
            replay()
            end.record()
        torch.cuda.synchronize(self.engine.device)
        return [start.elapsed_time(end) / 1e3 for start, end in marks]

    def replay(self, schedule: Schedule) -> Callable[[], None]:
        """One launch of the captured step over these sequences."""
        captured = self.engine.runner.captured(schedule, self.batch)
        self.engine.runner.seat(captured, range(1, self.batch + 1))
        return captured.graph.replay


@contextmanager
def seated(engine: PagedEngine, batch: int, positions: int) -> Iterator[Seat]:
    """Sequences with `positions` positions each, given back at the end. Ids below 0 are no request's."""
    opened: list[int] = []
    state, own = engine.slots, slice(1, batch + 1)
    generator = torch.Generator(engine.device).manual_seed(0)
    try:
        for slot in range(1, batch + 1):
            engine.pages.open(-slot, ())
            opened.append(-slot)
            if not engine.pages.reserve(-slot, positions):
                raise TidarError(
                    f"the KV cache of {engine.pages.usable} pages of {engine.pages.page_size} positions has no "
                    f"room for {batch} sequences of {positions} positions."
                )
            table = torch.tensor(engine.pages.table(-slot), device=engine.device)
            state.page_table[slot, : len(table)] = table.int()
            for stored in (*engine.cache.keys, *engine.cache.values):
                shape = (len(table), *stored.shape[1:])
                noise = torch.randn(shape, generator=generator, device=engine.device)
                stored[table] = noise.to(stored.dtype)
        state.temperatures[own] = 0.0
        size = (batch, state.drafts.shape[1])
        vocab = engine.model.config.vocab_size
        yield Seat(
            engine,
            batch,
            torch.randint(0, vocab - 1, size, generator=generator, device=engine.device),
        )
    finally:
        for request_id in opened:
            engine.pages.close(request_id)
        state.page_table[own] = 0
        state.prefix[own] = 0
        state.lens[own] = 1
        state.left[own] = 1
