"""Runs decode steps for any batch and schedule: directly, or as captured CUDA graphs.

A graph is captured for each batch size (a power of two; empty places are nobody's slot), schedule, sampling
filter and rule of verification when it is first asked for. Replaying it is one launch, and nothing in it asks the host.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from tidar.decode.rules import COMPARING, Rule
from tidar.decode.slots import NOBODY, Stepper, StepShape
from tidar.decode.weighed import weighed
from tidar.gpu_memory import OutOfMemory
from tidar.layout import Schedule

Key = tuple[int, Schedule, bool, Rule]
T = TypeVar("T")

LOWER = (
    "Lower max_running (--batch), max_draft_len (K) or the number of spans; or lower cache_tokens (--context), "
    "which leaves more beside the cache."
)
"""What takes memory beside weights and cache, or leaves less of it."""


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    chosen: Tensor
    results: Tensor
    copies: tuple[Tensor, Tensor, Tensor]


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Makes a GPU the current one, on which streams, events and Triton's launches are.

    Raises TidarError where its memory runs out.
    """
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with OutOfMemory("running a turn of the engine", device, LOWER), current:
        yield


def capture(run: Callable[[], T], pool: Any, what: str) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of what `run` launches on the current device, and what it then returns.

    It runs twice before, which compiles kernels. pool: the handle of a graph memory pool, None for a new one.
    what: the run in words, for the TidarError that is raised where memory runs out.
    """
    device = torch.cuda.current_device()
    with OutOfMemory(f"capturing {what}", torch.device("cuda", device), LOWER):
        stream = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = run()
    return graph, result


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace, 32 MiB on an H200, for every stream it ever ran on."""
    return torch.cuda.Stream(device)


class Runner:
    """Mutable: the steps that were made so far. stepper: of any schedule; its shape is replaced.

    capturing: seconds that captures have taken.
    """

    def __init__(self, stepper: Stepper, max_batch: int, *, graphs: bool) -> None:
        self.stepper, self.max_batch, self.graphs = stepper, max_batch, graphs
        self._steps: dict[tuple[Schedule, bool, Rule], Stepper] = {}
        self._captured: dict[Key, _Captured] = {}
        self._chosen: dict[int, tuple[int, ...]] = {}  # by graph: the slots it was last run for
        self._turn = 0
        self.capturing = 0.0
        self._pool: Any = None  # the handle of a graph memory pool

    def __call__(
        self,
        schedule: Schedule,
        slots: Sequence[int],
        *,
        filtered: bool,
        rule: Rule = COMPARING,
    ) -> Tensor:
        """Runs a step; its results `[B, 2 + K]` (see `Stepper`) are on the host once the stream is done.

        rule: what its sequences need together.
        """
        step = self._step(schedule, filtered, rule)
        device = self.stepper.slots.prefix.device
        if not self.graphs:
            return step(torch.tensor(slots, device=device)).cpu()
        captured = self.captured(schedule, len(slots), filtered=filtered, rule=rule)
        self.seat(captured, slots)
        captured.graph.replay()
        # The host is one step behind at most: of three copies none is written while it is read.
        self._turn += 1
        return captured.copies[self._turn % 3].copy_(captured.results, non_blocking=True)

    def seat(self, captured: _Captured, slots: Sequence[int]) -> None:
        """Names the slots that the graph's next replays step; empty places are nobody's."""
        padded = (*slots, *[NOBODY] * (len(captured.chosen) - len(slots)))
        if self._chosen.get(id(captured)) != padded:
            chosen = torch.tensor(padded)
            if captured.chosen.device.type == "cuda":
                chosen = chosen.pin_memory()
            captured.chosen.copy_(chosen, non_blocking=True)
            self._chosen[id(captured)] = padded

    def rows(self, schedule: Schedule) -> int:
        """Rows of each sequence in a step: those of a full draft, however short its own is."""
        return len(self._step(schedule, False, COMPARING).shape.tail)

    def to_host(self, values: Tensor) -> Tensor:
        """A copy on the host, complete once the stream is done."""
        if values.device.type != "cuda":
            return values
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return host.copy_(values, non_blocking=True)

    def captured(
        self, schedule: Schedule, batch: int, *, filtered: bool = False, rule: Rule = COMPARING
    ) -> _Captured:
        """The graph that serves this batch, captured now if it is new."""
        size = min(1 << (batch - 1).bit_length(), max(self.max_batch, batch))
        key = (size, schedule, filtered, rule)
        if key not in self._captured:
            began = time.perf_counter()
            with on_device(self.stepper.slots.prefix.device):
                self._captured[key] = self._capture(self._step(schedule, filtered, rule), size)
            self.capturing += time.perf_counter() - began
        return self._captured[key]

    def _step(self, schedule: Schedule, filtered: bool, rule: Rule) -> Stepper:
        key = (schedule, filtered, rule)
        if key not in self._steps:
            shape = StepShape(schedule, self.stepper.slots.prefix.device)
            step = replace(self.stepper, shape=shape, filtered=filtered)
            self._steps[key] = step if rule == COMPARING else weighed(step, rule)
        return self._steps[key]

    @torch.inference_mode()
    def _capture(self, step: Stepper, size: int) -> _Captured:
        """Nobody's slot serves for the runs that compile kernels: what they write is never read."""
        chosen = torch.full((size,), NOBODY, dtype=torch.int64, device=step.slots.prefix.device)
        shape = step.shape
        what = (
            f"a step of {size} sequences of {len(shape.tail)} rows (K = {shape.schedule.draft_len}, "
            f"spans at {list(shape.anchors)})"
        )
        graph, results = capture(lambda: step(chosen), self._pool, what)
        self._pool = graph.pool()
        first, second, third = (
            torch.empty(results.shape, dtype=results.dtype, pin_memory=True) for _ in range(3)
        )
        return _Captured(graph, chosen, results, (first, second, third))
