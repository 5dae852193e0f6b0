"""Decides what each step of the engine runs: which prefill chunks, which decodes, who must make room.

No tensors and no model. Requests are known by id, never by their place in a list.

**Order.** First come, first served. The admitted requests are the oldest ones and the waiting ones the
youngest, always: admission takes the head of the queue, and a head that does not fit holds up all behind
it, so a short request never overtakes a long one; preemption takes the youngest admitted request and
puts it back at the head. The oldest request is therefore never preempted, and every request ends.

**A step behind.** The engine may call `next` for step t+1 before it has reported the results of step t,
which are then still on the device; it must report them before it calls `next` for step t+2. A chunk
that `next` has handed out counts as run, and the steps that follow build on it. A report for a request
that has ended meanwhile is dropped; for one that was preempted meanwhile it is kept, as its tokens are
good: they are part of what is computed again.

**Pages change hands at once**, without waiting for launched steps: `tidar.decode.pages` says why that is
safe. It asks that works are launched in the order in which `next` returned them, on one stream, each
with the page tables as they were when it returned. A request that ends between `next` and the launch
has no table any more: the engine leaves it out.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from tidar.decode.pages import Pages
from tidar.errors import TidarError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a step may hold. Raises TidarError for values that would let nothing run.

    max_running: sequences admitted at a time, those in prefill included. chunk_tokens: prefill tokens in
    a step, all sequences together. lookahead: positions behind the committed prefix, as far as it is
    known here, that a step may write: one step's rows, two where results are read a step behind.
    max_positions: positions of the model; rows at or beyond that are not the scheduler's to place.
    watermark: pages left free at admission, for the growth of those that run; it does not hold back a
    request that has the cache to itself.
    """

    max_running: int
    chunk_tokens: int
    lookahead: int
    max_positions: int
    watermark: int = 0

    def __post_init__(self) -> None:
        least = {"max_running": 1, "chunk_tokens": 1, "lookahead": 1, "max_positions": 2}
        for name, low in {**least, "watermark": 0}.items():
            value = getattr(self, name)
            if value < low:
                raise TidarError(f"{name} is {value}; it must be at least {low}.")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prefill rows for the tokens `start .. end - 1` of a request; `last` when they complete its prefill.

    Rows that the method adds to the last chunk, a span, stand within the lookahead.
    """

    request_id: int
    start: int
    end: int
    last: bool


@dataclass(frozen=True, slots=True)
class Work:
    """One step: chunks and decodes by request id, oldest first. No request is in both.

    A step behind, a decode may belong to a text that has ended on the device, by its tokens or at the
    model's last position: its report is dropped, and its rows beyond that position belong to nobody.

    preempted: requests that lost their pages, youngest first; they are in neither, and come back with
    chunks. A work without chunks and decodes is not a step: nothing can run before more is reported.
    """

    chunks: tuple[Chunk, ...]
    decodes: tuple[int, ...]
    preempted: tuple[int, ...]

    def __bool__(self) -> bool:
        return bool(self.chunks or self.decodes)


@dataclass(slots=True)
class _Entry:
    """Mutable: one request. Token counts are positions, from the start of the prompt.

    text: the prompt and all emitted tokens; while decoding, its last one is d[0] of the draft, emitted
    and not yet committed. target: tokens of its prefill, fixed at admission. issued: those that were
    handed out in chunks or reused. The two survive preemption, for the reports that are still to come.
    """

    request_id: int
    text: list[int]
    target: int = 0
    issued: int = 0

    @property
    def prefilled(self) -> bool:
        return 0 < self.issued == self.target


class Scheduler:
    """Mutable. `next` says what to run; `prefilled` and `advanced` report what came of it.

    It owns the use of `pages`, which serves no other caller. Ids are never used again. An unknown id in
    a report means that the request has ended; other misuse is an AssertionError.
    """

    def __init__(self, pages: Pages, limits: Limits) -> None:
        self.pages, self.limits = pages, limits
        # Each in order of arrival, and all admitted before all waiting.
        self._admitted: OrderedDict[int, _Entry] = OrderedDict()
        self._waiting: OrderedDict[int, _Entry] = OrderedDict()

    def add(self, request_id: int, tokens: Sequence[int], max_new_tokens: int) -> None:
        """Queues a request. `tokens`: its prompt. Raises TidarError as `check` does."""
        assert self._find(request_id) is None, f"request {request_id} is here already"
        self.check(tokens, max_new_tokens)
        self._waiting[request_id] = _Entry(request_id, list(tokens))

    def check(self, tokens: Sequence[int], max_new_tokens: int) -> None:
        """Raises TidarError for a request that could not run to its end even with all pages to itself."""
        size, lookahead, limit = len(tokens), self.limits.lookahead, self.limits.max_positions
        if size < 1:
            raise TidarError("The prompt has no tokens; it must have at least one.")
        if max_new_tokens < 1:
            raise TidarError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        if size >= limit:
            raise TidarError(
                f"The prompt has {size} tokens and the model {limit} positions (max_positions): "
                "there is no room to generate. Shorten the prompt."
            )
        # The most that is ever reserved: all tokens but the last one emitted, computed again.
        peak = min(size + max_new_tokens - 1 + lookahead, limit)
        if not self.pages.fits(peak):
            needed = self.pages.count(peak)
            raise TidarError(
                f"The request may need {needed} pages, for {peak} positions (a prompt of {size} tokens, "
                f"max_new_tokens {max_new_tokens}, lookahead {lookahead}), and the KV cache has "
                f"{self.pages.usable} pages of {self.pages.page_size} positions. Raise cache_tokens to "
                f"{needed * self.pages.page_size}, lower max_new_tokens, or shorten the prompt."
            )

    def next(self) -> Work:
        """What to run next: every sequence that is through its prefill, and as much prefill as fits.

        Whatever the work writes is reserved: its chunks, and `lookahead` positions behind them and
        behind the committed prefix of its decodes (up to `max_positions`).
        """
        preempted: list[int] = []
        decodes = self._decodes(preempted)
        # Whoever has just made room must not take it back at once.
        chunks = self._chunks(admit=not preempted)
        return Work(tuple(chunks), tuple(decodes), tuple(preempted))

    def tokens(self, chunk: Chunk) -> tuple[int, ...]:
        """The token ids of a chunk of the latest work: of the prompt, or of the emitted text computed again."""
        return tuple(self._admitted[chunk.request_id].text[chunk.start : chunk.end])

    def prefilled(self, request_id: int, end: int, next_token: int | None = None) -> bool:
        """Reports a chunk that ran up to `end`; the last one with the token it emitted, the first d[0].

        False when the request has ended meanwhile, and the result is to be dropped.
        """
        entry = self._find(request_id)
        if entry is None:
            return False
        assert end <= entry.issued, f"request {request_id} was not given a chunk up to {end}"
        assert (next_token is not None) == (end == entry.target), "the last chunk emits a token"
        if request_id in self._admitted:
            self.pages.commit(request_id, entry.text[self.pages.committed(request_id) : end])
        if next_token is not None:
            assert len(entry.text) == entry.target, "reported twice"
            entry.text.append(next_token)
        return True

    def advanced(self, request_id: int, tokens: Sequence[int], next_token: int) -> bool:
        """Reports a decode step: the draft tokens it committed, d[0] first, and the next d[0].

        False when the request has ended meanwhile, and the result is to be dropped.
        """
        entry = self._find(request_id)
        if entry is None:
            return False
        assert entry.prefilled, f"request {request_id} has not decoded"
        assert tokens, "a step commits d[0] at least"
        assert tokens[0] == entry.text[-1], "d[0] is the token emitted last"
        entry.text += [*tokens[1:], next_token]
        if request_id in self._admitted:
            self.pages.commit(request_id, tokens)
            assert self.pages.committed(request_id) == len(entry.text) - 1
        return True

    def abort(self, request_id: int) -> bool:
        """Ends a request in whatever state it is, finished or not; False when it had ended before.

        All its pages are free at once. To have its last tokens reused, report them first.
        """
        if self._admitted.pop(request_id, None) is not None:
            self.pages.close(request_id)
            return True
        return self._waiting.pop(request_id, None) is not None

    def _find(self, request_id: int) -> _Entry | None:
        return self._admitted.get(request_id) or self._waiting.get(request_id)

    def _decodes(self, preempted: list[int]) -> list[int]:
        """Reserves what each decoding sequence may write, oldest first, at the cost of the youngest."""
        decodes: list[int] = []
        for request_id, entry in list(self._admitted.items()):
            if request_id not in self._admitted:
                break  # preempted, and so are all younger ones
            if not entry.prefilled:
                continue
            # Where the prefill has yet to be reported, admission has reserved for the step behind it.
            start = self.pages.committed(request_id)
            if start >= self.limits.max_positions:
                continue  # at the model's last position: the report that ends it is on its way
            while not self.pages.reserve(request_id, self._reach(start)):
                preempted.append(self._preempt())
                if preempted[-1] == request_id:
                    break
            else:
                decodes.append(request_id)
        return decodes

    def _chunks(self, *, admit: bool) -> list[Chunk]:
        """Prefill in order of arrival: of those that have begun, then of those that can be admitted."""
        chunks: list[Chunk] = []
        left = self.limits.chunk_tokens
        for entry in self._admitted.values():
            if left > 0 and not entry.prefilled:
                chunks.append(self._cut(entry, left))
                left -= chunks[-1].end - chunks[-1].start
        while admit and left > 0 and (head := self._admit()) is not None:
            chunks.append(self._cut(head, left))
            left -= chunks[-1].end - chunks[-1].start
        return chunks

    def _cut(self, entry: _Entry, most: int) -> Chunk:
        start = entry.issued
        entry.issued = min(start + most, entry.target)
        return Chunk(entry.request_id, start, entry.issued, entry.prefilled)

    def _admit(self) -> _Entry | None:
        """Gives the head of the queue its pages; None when there is none, or it does not fit now."""
        if not self._waiting or len(self._admitted) >= self.limits.max_running:
            return None
        request_id, entry = next(iter(self._waiting.items()))
        reach = self._reach(len(entry.text))
        kept = self.limits.watermark if self._admitted else 0
        if self.pages.needed(entry.text, reach) > self.pages.free - kept:
            return None
        entry.issued = self.pages.open(request_id, entry.text)
        entry.target = len(entry.text)
        reserved = self.pages.reserve(request_id, reach)
        assert reserved, "needed() said that it fits"
        self._admitted[request_id] = self._waiting.pop(request_id)
        return entry

    def _preempt(self) -> int:
        """Takes the pages of the youngest admitted request and puts it at the head of the queue.

        Its full pages stay for reuse until somebody takes them, so coming back may cost little.
        """
        assert len(self._admitted) > 1, "a request outgrew the max_new_tokens it was added with"
        request_id, entry = self._admitted.popitem()
        self.pages.close(request_id)
        self._waiting[request_id] = entry
        self._waiting.move_to_end(request_id, last=False)
        return request_id

    def _reach(self, start: int) -> int:
        """Positions to reserve for a sequence whose next step starts at `start`."""
        return min(start + self.limits.lookahead, self.limits.max_positions)
