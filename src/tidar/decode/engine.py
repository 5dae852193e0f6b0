"""The cached decoder: one loop for every method, over one sequence or a ragged batch.

Each iteration admits waiting requests (one prefill each), then runs one decode step over all running
sequences. A sequence finishes in the step that emits its last token. Requests are known by id; the slot of
a sequence in the cache may change while it runs.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any, Protocol

import torch

from tidar.cache import KVCache
from tidar.decode.request import Request, Sequence, StepEvent
from tidar.errors import TidarError
from tidar.layout import Schedule
from tidar.methods import Draft, Method, Pending, Step, Verdict
from tidar.model import ModelConfig, Transformer
from tidar.tokens import check_prompt


class Plan(Protocol):
    """Picks the schedule of each step; see `tidar.decode.plan` for the measured one."""

    def choose(self, request_ids: SequenceOf[int]) -> Schedule:
        """The schedule of the next pass while these requests run; one that has just joined is prefilled.

        Engines run `schedule.after(last)`: two-forward is chosen like any other, its halves alternate.
        """
        ...

    def observe(self, event: StepEvent) -> None:
        """Told how each step went for each request."""
        ...


class FixedPlan:
    """The same schedule at every step."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def choose(self, request_ids: SequenceOf[int]) -> Schedule:
        return self.schedule

    def observe(self, event: StepEvent) -> None:
        pass


def check_request(request: Request, config: ModelConfig) -> None:
    """Raises TidarError for a request that this model cannot run."""
    size, limit = len(request.prompt), config.max_positions
    check_prompt(request.prompt, vocab_size=config.vocab_size, mask_token_id=config.mask_token_id)
    if size >= limit:
        raise TidarError(
            f"The prompt has {size} tokens and the model {limit} positions: there is no room to "
            "generate. Shorten the prompt."
        )
    if request.max_new_tokens < 1:
        raise TidarError(f"max_new_tokens is {request.max_new_tokens}; it must be at least 1.")


class Engine:
    """Mutable: runs requests to their end. Not for use by several threads at once.

    max_batch: how many sequences run at a time. Raises TidarError for requests that cannot be run.
    """

    def __init__(
        self, model: Transformer, method: Method[Any], plan: Plan, *, max_batch: int = 8
    ) -> None:
        if max_batch < 1:
            raise TidarError(f"max_batch is {max_batch}; it must be at least 1.")
        weight = next(model.parameters())
        self.model, self.method, self.plan = model, method, plan
        self.device = weight.device
        self.limit = model.config.max_positions
        self.cache = KVCache(model.config, max_batch, device=weight.device, dtype=weight.dtype)
        self.max_batch = max_batch
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._last: Schedule | None = None  # of the last step that left the drafts which now wait
        self._next_id = 0

    def submit(self, request: Request) -> int:
        """Queues a request and returns its id."""
        check_request(request, self.model.config)
        self.method.check(request.params, forced=request.forced is not None)
        sequence = Sequence(self._next_id, request)
        self._next_id += 1
        self.waiting.append(sequence)
        return sequence.request_id

    def run(self, requests: Iterable[Request] = ()) -> Iterator[StepEvent]:
        """Submits `requests` and yields events until nothing is waiting or running.

        Ids are handed out in order of submission. Leaving the iterator early drops what is unfinished.
        """
        for request in requests:
            self.submit(request)
        try:
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.max_batch:
                    yield self._prefill(self.waiting.popleft())
                if self.running:
                    yield from self._decode()
        finally:
            self.waiting.clear()
            for slot, sequence in enumerate(self.running):
                self.cache.release(slot)
                self.method.release(sequence.request_id)
            self.running.clear()

    @torch.inference_mode()  # leaving a slot may move another one's entries
    def preempt(self, request_id: int) -> None:
        """Takes a running sequence off the cache; it goes on later, from its emitted tokens."""
        slot = next(i for i, s in enumerate(self.running) if s.request_id == request_id)
        self.waiting.appendleft(self._leave(slot))

    def _prefill(self, sequence: Sequence) -> StepEvent:
        """Runs prompt and emitted tokens in one pass, and whatever the method starts with behind them."""
        tokens = (*sequence.request.prompt, *sequence.emitted)
        sequence.draft = Draft(tokens, certain=len(tokens))
        slot = len(self.running)
        self.running.append(sequence)
        event = self._run(slot, [sequence], None)[0]
        if slot == 0:
            self._last = event.schedule
        return event

    def _decode(self) -> list[StepEvent]:
        events = self._run(0, list(self.running), self._last)
        self._last = events[0].schedule
        return events

    @torch.inference_mode()
    def _run(self, first: int, sequences: list[Sequence], last: Schedule | None) -> list[StepEvent]:
        """One forward pass over neighbouring slots, its verdicts, and what they mean for each sequence.

        last: the schedule of the step before; None for a prefill.
        """
        began = time.perf_counter()  # the plan's own time counts as the step's
        schedule = self.plan.choose([sequence.request_id for sequence in self.running]).after(last)
        pending = [
            self._pending(first + i, s, schedule, fresh=last is None)
            for i, s in enumerate(sequences)
        ]
        step = self.method.step(pending, schedule)
        attend = self.cache.attend(first, len(sequences), step.visible)
        ids, positions = step.ids.to(self.device), step.positions.to(self.device)
        hidden, tapped = self.model.forward_with_taps(ids, positions, attend, step.taps)
        if tapped:
            hidden = torch.cat((hidden, *tapped), dim=-1)
        verdicts = self.method.resolve(step, hidden, self.model.logits)
        seconds = time.perf_counter() - began
        events = [
            self._commit(first + i, sequence, step, i, verdicts[i], schedule, seconds)
            for i, sequence in enumerate(sequences)
        ]
        for slot in range(first + len(sequences) - 1, first - 1, -1):
            if self.running[slot].finish is not None:
                self._leave(slot)
        for event in events:
            self.plan.observe(event)
        return events

    def _pending(
        self, slot: int, sequence: Sequence, schedule: Schedule, *, fresh: bool
    ) -> Pending:
        draft, prefix_len = sequence.draft, self.cache.lengths[slot]
        if not fresh:
            room = self.limit - prefix_len
            most = min(schedule.draft_rows, room, sequence.left)
            draft = draft.cut(max(draft.certain, most))
        request = sequence.request
        return Pending(
            prefix_len,
            draft,
            self.limit,
            request.params,
            sequence.draw,
            request.forced,
            sequence.request_id,
            sequence.left,
            fresh,
        )

    def _commit(
        self,
        slot: int,
        sequence: Sequence,
        step: Step,
        index: int,
        verdict: Verdict,
        schedule: Schedule,
        seconds: float,
    ) -> StepEvent:
        pending = step.pending[index]
        self.cache.commit_rows(slot, verdict.kept)
        sequence.draft = after = verdict.draft
        committed = (pending.draft.tokens[row] for row in verdict.kept)
        made = (*committed, *after.tokens[: after.certain])
        known = len(sequence.request.prompt) + len(sequence.emitted) - pending.prefix_len
        kept = sequence.emit(made[known:])
        ended = verdict.ended or self.cache.lengths[slot] >= self.limit
        if sequence.finish is None and ended:
            sequence.finish = "context"
        tried = pending.length if verdict.tried is None else verdict.tried
        return StepEvent(
            sequence.request_id,
            kept,
            step.prefill,
            0 if step.prefill else tried,
            verdict.accepted if verdict.settled is None else verdict.settled,
            step.rows[index],
            schedule,
            seconds,
            sequence.finish,
            step.draft_forwards,
        )

    def _leave(self, slot: int) -> Sequence:
        """Takes a sequence out of the batch; the last one takes its slot."""
        sequence = self.running[slot]
        self.method.release(sequence.request_id)
        last = self.running.pop()
        if last is not sequence:
            self.running[slot] = last
            self.cache.move(len(self.running), slot)
        else:
            self.cache.release(slot)
        return sequence
