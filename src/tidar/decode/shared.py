"""One paged engine for all calls on a model: made when first needed, kept with its graphs and measured costs.

Calls come one after the other, or overlap as streams that are read in turns. All of them drive the same
engine; whoever reads next moves everybody's texts on, and each gets its own events. A schedule is chosen
for all running sequences together, so a call that asks for another plan first lets the texts under way run
to their end; they go on from what was kept for them. So what a call decodes does not depend on the others'
plans.
"""

import gc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from tidar.decode.engine import FixedPlan, Plan
from tidar.decode.paged_costs import plan_for
from tidar.decode.paged_engine import EngineLimits, PagedEngine
from tidar.decode.request import Request, StepEvent
from tidar.errors import TidarError
from tidar.gpu_memory import release_unused
from tidar.layout import AUTOREGRESSIVE, Schedule
from tidar.model import ModelConfig, Transformer
from tidar.paged_cache import SLACK_BYTES, page_bytes

T = TypeVar("T")

GPU_SHARE = 0.5
"""Of the GPU memory that is free when the engine is made, at most so much becomes its KV cache."""

CPU_CACHE_BYTES = 2 << 30
"""The most that its KV cache takes elsewhere."""


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """Which plan paces a call: `schedule` at every step, or, where it is None, a measured one over `draft_lens`."""

    schedule: Schedule | None
    draft_lens: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        return max(self.draft_lens) if self.schedule is None else self.schedule.draft_len


@dataclass(frozen=True, slots=True)
class Job(Generic[T]):
    """A request, and what becomes of each of its events, at the moment it comes."""

    request: Request
    convert: Callable[[StepEvent], T]
    beta: float = 1.0


def cache_tokens_for(
    config: ModelConfig, max_running: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Positions of the KV cache: full contexts for all, as far as they fit into a share of the free memory."""
    room = CPU_CACHE_BYTES
    if device.type == "cuda":
        free, _ = release_unused(device)
        room = int(GPU_SHARE * max(0, free - SLACK_BYTES))
    wanted = max_running * -(-config.max_positions // page_size)
    pages = min(wanted, room // page_bytes(config, page_size, dtype))
    return max(1, pages) * page_size


@dataclass(slots=True)
class _Session:
    """Mutable: an engine and who waits for its events. engine: None once it is given up.

    weights: which ones it was made for (`_stamp`); cached prefixes and graphs are of those.
    """

    engine: PagedEngine | None
    weights: tuple[int, ...]
    spec: PlanSpec | None = None
    plans: dict[PlanSpec, Plan] = field(default_factory=dict)
    deliver: dict[int, Callable[[StepEvent], None]] = field(default_factory=dict)

    def turn(self) -> None:
        """Moves all texts on, and hands their events to those who wait for them."""
        if self.engine is None:
            raise TidarError(
                "An error in another text has stopped the engine; start this one anew."
            )
        try:
            for event in self.engine.turn():
                if (deliver := self.deliver.get(event.request_id)) is not None:
                    deliver(event)
        except BaseException:
            self.engine = None  # half a turn cannot be taken back
            self.plans.clear()  # a measured plan knows its engine
            raise

    def drain(self) -> None:
        while self.engine is not None and self.engine.sequences:
            self.turn()

    def use(self, spec: PlanSpec) -> None:
        """Makes `spec` the engine's plan; with another one, once the texts under way have ended."""
        assert self.engine is not None
        if spec == self.spec:
            return
        self.drain()
        if spec not in self.plans:
            measured = spec.schedule is None
            fixed = FixedPlan(spec.schedule or AUTOREGRESSIVE)
            self.plans[spec] = plan_for(self.engine, spec.draft_lens) if measured else fixed
        self.engine.plan, self.spec = self.plans[spec], spec

    def leave(self, request_id: int) -> None:
        """Ends a request that nobody waits for any more."""
        self.deliver.pop(request_id, None)
        if self.engine is not None:
            self.engine.abort(request_id)


class SharedEngine:
    """Mutable; see above. Not for use by several threads at once.

    It holds room for as many sequences as the largest batch asked for so far (rounded up to a power of two)
    and drafts as long as the longest; a call that asks for more, or comes after a change of the weights, has
    it made anew.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._session: _Session | None = None

    @property
    def engine(self) -> PagedEngine | None:
        """The engine as it is now; None before the first call."""
        return self._session.engine if self._session else None

    def run(
        self, jobs: Sequence[Job[T]], spec: PlanSpec, *, max_running: int = 1
    ) -> Iterator[tuple[int, T]]:
        """Runs the jobs to their end, `max_running` at a time; yields (which job, its converted event).

        Raises TidarError at once for what can never run. Work begins when the iterator is first read;
        closing it early ends what is unfinished and gives everything back.
        """
        if max_running < 1:
            raise TidarError(f"max_batch is {max_running}; it must be at least 1.")
        engine = self._ready(spec, max_running).engine
        assert engine is not None
        for job in jobs:
            engine.check(job.request, beta=job.beta)
        return self._events(jobs, spec, max_running)

    def close(self) -> None:
        """Gives back the engine and its memory; the next call makes another. Texts under way run to their end."""
        if self._session is not None:
            self._session.drain()
            self._session.engine = None
            self._session.plans.clear()
            self._session = None
            gc.collect()  # a measured plan and its engine know each other
            if self.model.embed.weight.device.type == "cuda":
                torch.cuda.empty_cache()

    def _ready(self, spec: PlanSpec, max_running: int) -> _Session:
        """An engine that is large enough for these."""
        running, longest = 1 << (max_running - 1).bit_length(), spec.longest
        if self.engine is not None:
            running = max(running, self.engine.runner.max_batch)
            longest = max(longest, self.engine.max_draft_len)
            known = (self.engine.runner.max_batch, self.engine.max_draft_len)
            same = self._session is not None and self._session.weights == _stamp(self.model)
            if (running, longest) == known and self._session is not None and same:
                return self._session
        self.close()
        size, weight = EngineLimits().page_size, self.model.embed.weight
        room = cache_tokens_for(self.model.config, running, size, weight.dtype, weight.device)
        limits = EngineLimits(max_running=running, cache_tokens=room, max_draft_len=longest)
        engine = PagedEngine(self.model, FixedPlan(AUTOREGRESSIVE), limits)
        self._session = _Session(engine, _stamp(self.model))
        return self._session

    def _events(
        self, jobs: Sequence[Job[T]], spec: PlanSpec, max_running: int
    ) -> Iterator[tuple[int, T]]:
        waiting, inbox = deque(enumerate(jobs)), deque[tuple[int, T, bool]]()
        mine: dict[int, tuple[_Session, int]] = {}  # by job: where it runs, under which id
        try:
            while waiting or mine:
                while waiting and len(mine) < max_running:
                    session = self._ready(spec, max_running)
                    session.use(spec)
                    assert session.engine is not None
                    order, job = waiting.popleft()
                    request_id = session.engine.submit(job.request, beta=job.beta)
                    mine[order] = (session, request_id)
                    session.deliver[request_id] = _collector(inbox, order, job.convert)
                while not inbox:
                    session.turn()
                order, converted, last = inbox.popleft()
                if last:
                    owner, request_id = mine.pop(order)
                    owner.leave(request_id)
                yield order, converted
        finally:
            for owner, request_id in mine.values():
                owner.leave(request_id)


def _stamp(model: Transformer) -> tuple[int, ...]:
    """Changes with the weights, whether they are written to or replaced."""
    return tuple(
        number
        for weight in model.parameters()
        for number in (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
    )


def _collector(
    inbox: deque[tuple[int, T, bool]], order: int, convert: Callable[[StepEvent], T]
) -> Callable[[StepEvent], None]:
    def take(event: StepEvent) -> None:
        inbox.append((order, convert(event), event.finish is not None))

    return take
