"""The engine for many sequences: paged cache, continuous batching, steps that never wait for the host.

Each turn the scheduler names the work: prefill chunks of some requests, a decode step of all others. Both
are launched; what a decode step did is read one turn later where the device runs on its own (a GPU), so
that it is never idle while the host does its books. Texts are those of plain AR decoding, as everywhere.

A batch may mix ways to verify: greedy, shared noise, rejection sampling, a beta below 1, teacher forcing. Only
turns in which some sequence does more than compare choices take the slower step (`tidar.decode.weighed`).
"""

import functools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.decode.backend import PlainBackend, fused_stepper
from tidar.decode.engine import Plan, check_request
from tidar.decode.graphs import Runner, on_device
from tidar.decode.pages import Pages
from tidar.decode.prefill import Entry, Prefill
from tidar.decode.rejection import BY_HASH, Draws
from tidar.decode.request import FinishReason, Request, Sequence, StepEvent
from tidar.decode.rules import COMPARING, Rule, SlotRules, rule_of
from tidar.decode.scheduler import Chunk, Limits, Scheduler, Work
from tidar.decode.slots import NOBODY, Backend, Replay, Slots, Stepper, StepShape
from tidar.errors import TidarError
from tidar.families import need_causal
from tidar.layout import AUTOREGRESSIVE, Schedule
from tidar.model import Transformer
from tidar.paged_cache import PagedCache


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What an engine may hold.

    max_running: sequences at a time. cache_tokens: positions of the KV cache, all sequences together; 0
    is room for `max_running` full contexts. page_size: positions of a page. chunk_tokens: prefill tokens
    per turn. max_draft_len: the largest K that a plan may ask for. behind: turns between a step and
    reading it, 0 or 1; None is 1 on a GPU and 0 elsewhere. Raises TidarError for other values.
    """

    max_running: int = 8
    cache_tokens: int = 0
    page_size: int = 64
    chunk_tokens: int = 512
    max_draft_len: int = 16
    behind: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_running", "page_size", "chunk_tokens", "max_draft_len"):
            if getattr(self, name) < 1:
                raise TidarError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.page_size & (self.page_size - 1):
            raise TidarError(f"page_size is {self.page_size}; it must be a power of two.")
        if self.cache_tokens < 0:
            raise TidarError(f"cache_tokens is {self.cache_tokens}; it must be 0 or more.")
        if self.behind not in (None, 0, 1):
            raise TidarError(f"behind is {self.behind}; it must be 0 or 1.")


@dataclass(slots=True)
class _Launched:
    """Results under way. decodes: request ids, in the order of `results` rows `[B, 2 + K]`.

    chunks: each with its first token `[1]` where it is the last one.
    """

    schedule: Schedule
    decodes: tuple[int, ...]
    results: Tensor | None
    chunks: list[tuple[Chunk, Tensor | None]]
    ready: torch.cuda.Event | None
    at: float


class PagedEngine:
    """Mutable: runs requests to their end. Not for use by several threads at once.

    backend, replay, draws: other than the usual ones, for tests and measurements. Raises TidarError for
    requests that cannot be run, and when the cache does not fit the device.
    """

    def __init__(
        self,
        model: Transformer,
        plan: Plan,
        limits: EngineLimits | None = None,
        *,
        backend: Backend | None = None,
        replay: Replay | None = None,
        draws: Draws | None = None,
    ) -> None:
        need_causal(model.config, "The paged engine")
        limits = limits or EngineLimits()
        weight = next(model.parameters())
        self.model, self.plan, self.device = model, plan, weight.device
        self.limit = model.config.max_positions
        cuda = self.device.type == "cuda"
        self.behind = int(cuda) if limits.behind is None else limits.behind
        self.max_draft_len = limits.max_draft_len
        tokens = limits.cache_tokens or limits.max_running * self.limit
        num_pages = -(-tokens // limits.page_size) + 1
        self.cache = PagedCache(
            model.config, num_pages, limits.page_size, device=self.device, dtype=weight.dtype
        )
        self.pages = Pages(num_pages, limits.page_size)
        self.scheduler = Scheduler(
            self.pages,
            Limits(
                max_running=limits.max_running,
                chunk_tokens=limits.chunk_tokens,
                lookahead=limits.max_draft_len * (1 + self.behind),
                max_positions=self.limit,
                watermark=min(limits.max_running, num_pages // 16),
            ),
        )
        widest = -(-self.limit // limits.page_size)
        self.slots = Slots(limits.max_running, limits.max_draft_len, widest, self.device)
        stepper = Stepper(
            self.slots,
            backend or PlainBackend(model, self.cache),
            StepShape(AUTOREGRESSIVE, self.device),
            model.config.mask_token_id or 0,
            self.limit,
            replay=replay,
            draws=draws or BY_HASH,
        )
        if cuda and backend is None:
            stepper = fused_stepper(stepper, model, self.cache)
        self.runner = Runner(stepper, limits.max_running, graphs=cuda)
        self.prefill = Prefill(stepper, graphs=cuda, most=limits.chunk_tokens)
        self.sequences: dict[int, Sequence] = {}
        self._betas: dict[int, float] = {}
        self.slot_of: dict[int, int] = {}
        self._uploaded: dict[int, int] = {}  # by request: pages of its table on the device
        self._free_slots = list(range(limits.max_running, NOBODY, -1))
        self._launched: deque[_Launched] = deque()
        self._last: Schedule | None = None  # of the last turn
        self._mark = self._prefill_seconds = self._away = 0.0
        self._left: float | None = None  # when the last turn ended
        self._next_id = 0

    def submit(self, request: Request, *, beta: float = 1.0) -> int:
        """Queues a request and returns its id. Raises TidarError for one that can never run.

        beta: the paper's trust in the causal logits; below 1 the text is lossy.
        """
        self.check(request, beta=beta)
        rule = rule_of(request, beta)
        if rule != COMPARING:
            self._make_rules(rule)
        request_id = self._next_id
        sequence = Sequence(request_id, request)  # runs the caller's code, which may raise
        self.scheduler.add(request_id, request.prompt, request.max_new_tokens)
        self._next_id += 1
        self.sequences[request_id] = sequence
        self._betas[request_id] = beta
        return request_id

    def check(self, request: Request, *, beta: float = 1.0) -> None:
        """Raises TidarError for a request that can never run here."""
        check_request(request, self.model.config)
        if not 0.0 <= beta <= 1.0:
            raise TidarError(f"beta is {beta}; it must be from 0 to 1, and only 1 is exact.")
        self.scheduler.check(request.prompt, request.max_new_tokens)

    def abort(self, request_id: int) -> bool:
        """Ends a request that is no longer wanted; False when it had ended before."""
        if self.sequences.pop(request_id, None) is None:
            return False
        del self._betas[request_id]
        self.scheduler.abort(request_id)
        self._leave(request_id)
        if not self.sequences:
            self._launched.clear()  # nobody waits for what is still under way
        return True

    def run(self, requests: Iterable[Request] = ()) -> Iterator[StepEvent]:
        """Submits `requests` and yields events until nothing is waiting or running.

        Ids are handed out in order of submission. Leaving the iterator early aborts what is unfinished.
        """
        for request in requests:
            self.submit(request)
        self._left = None
        self._mark = self._now()
        try:
            while self.sequences:
                yield from self.turn()
        finally:
            for request_id in list(self.sequences):
                self.abort(request_id)

    def turn(self) -> list[StepEvent]:
        """Launches the next work and reads what is due."""
        if self._left is not None:
            self._away += time.perf_counter() - self._left
        try:
            with on_device(self.device):
                return self._turn()
        finally:
            self._left = time.perf_counter()

    def _turn(self) -> list[StepEvent]:
        work = self.scheduler.next()
        for request_id in work.preempted:
            self._leave(request_id)
        if work:
            self._launched.append(self._launch(work))
        events: list[StepEvent] = []
        while len(self._launched) > (self.behind if work else 0):
            events += self._read(self._launched.popleft())
        return events

    def _now(self) -> float:
        """A clock that stands still between turns and while graphs are captured: no step took that time."""
        spent = self._away + self.runner.capturing + self.prefill.capturing
        return time.perf_counter() - spent

    # --- launching ---

    @torch.inference_mode()
    def _launch(self, work: Work) -> _Launched:
        began = self._now()
        joining = [c.request_id for c in work.chunks if c.last]
        schedule = self.plan.choose([*work.decodes, *joining]) if work.decodes or joining else None
        schedule = self._within_context(schedule or AUTOREGRESSIVE, (*work.decodes, *joining))
        self._last = schedule = schedule.after(self._last if work.decodes else None)
        for chunk in work.chunks:
            if chunk.request_id not in self.slot_of:
                self._enter(chunk.request_id)
        self._upload_tables([*work.decodes, *(c.request_id for c in work.chunks)])
        results = None
        if work.decodes:
            slots = [self.slot_of[request_id] for request_id in work.decodes]
            filtered = any(self._filters(request_id) for request_id in work.decodes)
            rule = self._rule(work.decodes)
            results = self.runner(schedule, slots, filtered=filtered, rule=rule)
        chunks = [(chunk, self._prefill(chunk, schedule)) for chunk in work.chunks]
        ready = None
        if self.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()
        return _Launched(schedule, work.decodes, results, chunks, ready, began)

    def _within_context(self, schedule: Schedule, request_ids: tuple[int, ...]) -> Schedule:
        """Plain AR where a span could pass the model's last position; the text is the same.

        Raises TidarError for a K that the slots have no room for.
        """
        if schedule.draft_len > self.max_draft_len:
            raise TidarError(
                f"The plan asks for K = {schedule.draft_len}, and the engine's max_draft_len is "
                f"{self.max_draft_len}; raise it."
            )
        reach = 2 * schedule.draft_len + self.behind * self.max_draft_len
        for request_id in request_ids:
            sequence = self.sequences[request_id]
            if len(sequence.request.prompt) + len(sequence.emitted) + reach > self.limit:
                return AUTOREGRESSIVE
        return schedule

    def _filters(self, request_id: int) -> bool:
        params = self.sequences[request_id].request.params
        return not params.greedy and (params.top_k > 0 or params.top_p < 1.0)

    def _rule(self, request_ids: Iterable[int]) -> Rule:
        """What these requests need together."""
        if self.slots.rules is None:
            return COMPARING  # nobody has ever asked for more
        each = (rule_of(self.sequences[i].request, self._betas[i]) for i in request_ids)
        return functools.reduce(Rule.__or__, each)

    def _make_rules(self, rule: Rule) -> None:
        """Room on the device for requests that need this rule, beside those that run already."""
        if self.runner.stepper.replay is not None:
            raise TidarError(
                "An acceptance that is made up can only be replayed by comparing choices."
            )
        state, like = self.slots, self.model.embed.weight
        if state.rules is None:
            count = self.runner.max_batch
            state.rules = SlotRules(self.model.config, count, self.max_draft_len, like)
        state.rules.make_room(rule)

    def _enter(self, request_id: int) -> None:
        slot = self._free_slots.pop()
        self.slot_of[request_id] = slot
        request = self.sequences[request_id].request
        params, state = request.params, self.slots
        if state.rules is not None:
            state.rules.enter(slot, request, self._betas[request_id])
        state.page_table[slot] = 0
        state.seeds[slot] = params.seed
        state.temperatures[slot] = params.temperature
        state.top_k[slot] = params.top_k
        state.top_p[slot] = params.top_p

    def _leave(self, request_id: int) -> None:
        slot = self.slot_of.pop(request_id, None)
        self._uploaded.pop(request_id, None)
        if slot is not None:
            self._free_slots.append(slot)

    def _upload_tables(self, request_ids: list[int]) -> None:
        """Copies what is new of the page tables to the device."""
        places: list[tuple[int, int]] = []
        pages: list[int] = []
        for request_id in request_ids:
            known = self._uploaded.get(request_id, 0)
            new = self.pages.table(request_id, known)
            if new:
                slot = self.slot_of[request_id]
                places += [(slot, known + i) for i in range(len(new))]
                pages += new
                self._uploaded[request_id] = known + len(new)
        if pages:
            packed = torch.tensor([*zip(*places, strict=True), tuple(pages)])
            if self.device.type == "cuda":
                packed = packed.pin_memory().to(self.device, non_blocking=True)
            self.slots.page_table[packed[0], packed[1]] = packed[2].int()

    def _prefill(self, chunk: Chunk, schedule: Schedule) -> Tensor | None:
        """Runs a chunk; the last one leaves the first draft in the slot and returns the first token `[1]`."""
        left, schedule = self.sequences[chunk.request_id].left - 1, schedule.after(None)
        entry = Entry(self.slot_of[chunk.request_id], chunk.start, chunk.end, left)
        first = self.prefill(
            self.scheduler.tokens(chunk),
            entry,
            schedule if chunk.last else None,
            filtered=chunk.last and self._filters(chunk.request_id),
            rule=self._rule((chunk.request_id,)) if chunk.last else COMPARING,
        )
        return None if first is None else self.runner.to_host(first)

    # --- reading ---

    def _read(self, launched: _Launched) -> list[StepEvent]:
        if launched.ready is not None:
            launched.ready.synchronize()
        now = self._now()
        seconds, self._mark = now - max(self._mark, launched.at), now
        events = []
        if not launched.decodes:  # a turn's time belongs to its decode step where it has one
            self._prefill_seconds += seconds
        if launched.results is not None:
            for request_id, row in zip(launched.decodes, launched.results.tolist(), strict=False):
                if (sequence := self.sequences.get(request_id)) is not None:
                    events.append(self._advance(sequence, row, launched.schedule, seconds))
        for chunk, first in launched.chunks:
            sequence = self.sequences.get(chunk.request_id)
            if sequence is None:
                continue
            token = None if first is None else int(first)
            self.scheduler.prefilled(chunk.request_id, chunk.end, token)
            if token is not None:
                spent, self._prefill_seconds = self._prefill_seconds, 0.0
                events.append(self._begin(sequence, chunk, token, launched.schedule, spent))
        for event in events:
            self.plan.observe(event)
            if event.finish is not None:
                self.abort(event.request_id)
        return events

    def _advance(
        self, sequence: Sequence, row: list[int], schedule: Schedule, seconds: float
    ) -> StepEvent:
        """Takes in a decode step's result `[L, n, tokens...]`."""
        drafted, accepted, *tokens = row
        new = tuple(tokens[:accepted])
        certain = sequence.emitted[-1]
        self.scheduler.advanced(sequence.request_id, (certain, *new[:-1]), new[-1])
        kept = sequence.emit(new)
        committed = len(sequence.request.prompt) + len(sequence.emitted) - 1  # all but d[0]
        if sequence.finish is None and committed >= self.limit:
            sequence.finish = "context"
        rows = self.runner.rows(schedule)
        return self._event(sequence, kept, False, drafted, accepted, rows, schedule, seconds)

    def _begin(
        self, sequence: Sequence, chunk: Chunk, token: int, schedule: Schedule, seconds: float
    ) -> StepEvent:
        kept = sequence.emit((token,))
        if sequence.finish is None and chunk.end >= self.limit:
            sequence.finish = "context"
        schedule, count = schedule.after(None), chunk.end - chunk.start
        rows = count + (schedule.draft_len if schedule.drafts else 0)
        return self._event(sequence, kept, True, 0, count, rows, schedule, seconds)

    def _event(
        self,
        sequence: Sequence,
        ids: tuple[int, ...],
        prefill: bool,
        drafted: int,
        accepted: int,
        rows: int,
        schedule: Schedule,
        seconds: float,
    ) -> StepEvent:
        finish: FinishReason | None = sequence.finish
        return StepEvent(
            sequence.request_id,
            ids,
            prefill,
            drafted,
            accepted,
            rows,
            schedule,
            seconds,
            finish,
        )
