"""The scheduler against a fake engine: every text goes on exactly, in order, and every page comes back."""

import random
from collections import deque
from dataclasses import dataclass, field, replace

import pytest

from tidar.decode.pages import Pages
from tidar.decode.scheduler import Chunk, Limits, Scheduler, Work
from tidar.errors import TidarError

JUNK = -7
"""What a draft row that is not accepted, or a mask row, leaves in the cache."""


@dataclass
class Text:
    """One request: what the model says is settled beforehand, so every token can be checked at once."""

    truth: list[int]
    prompt_len: int
    max_new_tokens: int
    stop: int
    emitted: list[int] = field(default_factory=list)
    length: int = 0  # committed on the device, which may be a step ahead of the host


@dataclass(frozen=True)
class Report:
    """What the host learns of a step: for chunks `end`, for decodes the tokens it committed."""

    request_id: int
    end: int
    tokens: tuple[int, ...]
    next_token: int | None


@dataclass
class FakeEngine:
    """A device that keeps token ids for keys and values, and a host that reads its results `lag` steps late.

    One stream in launch order means that a step's writes can be done at its launch.
    """

    scheduler: Scheduler
    rng: random.Random
    draft_len: int
    lag: int
    texts: dict[int, Text] = field(default_factory=dict)  # alive, in order of arrival
    cache: dict[tuple[int, int], int] = field(default_factory=dict)
    flight: deque[list[Report]] = field(default_factory=deque)
    admitted: set[int] = field(default_factory=set)
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, name: str, amount: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + amount

    def add(self, request_id: int, text: Text) -> None:
        self.scheduler.add(request_id, text.truth[: text.prompt_len], text.max_new_tokens)
        self.texts[request_id] = text

    def end(self, request_id: int) -> None:
        del self.texts[request_id]
        self.admitted.discard(request_id)

    def abort(self, request_id: int) -> None:
        assert self.scheduler.abort(request_id)
        assert not self.scheduler.abort(request_id)
        self.end(request_id)
        self.count("aborted")

    def step(self) -> Work:
        work = self.scheduler.next()
        self.check_work(work)
        if self.texts and self.rng.random() < 0.01:
            self.abort(self.rng.choice(list(self.texts)))
            self.count("not launched")
        chunks = [chunk for chunk in work.chunks if chunk.request_id in self.texts]
        decodes = [request_id for request_id in work.decodes if request_id in self.texts]
        reports = [self.run_chunk(chunk) for chunk in chunks]
        reports += [self.run_decode(request_id) for request_id in decodes]
        self.flight.append(reports)
        while len(self.flight) > self.lag:
            for report in self.flight.popleft():
                self.take(report)
        self.scheduler.pages.check()
        return work

    def check_work(self, work: Work) -> None:
        limits = self.scheduler.limits
        for request_id in work.preempted:
            self.admitted.remove(request_id)
            self.count("preempted")
        chunks = [chunk.request_id for chunk in work.chunks]
        began = [chunk for chunk in work.chunks if chunk.request_id not in self.admitted]
        self.count("reused", sum(chunk.start > 0 for chunk in began))
        self.admitted.update(chunks)
        ids = [*chunks, *work.decodes, *work.preempted]
        assert len(set(ids)) == len(ids)
        assert len(self.admitted) <= limits.max_running
        assert len(self.scheduler._admitted) == len(self.admitted)
        assert len(self.scheduler._waiting) == len(self.texts) - len(self.admitted)
        assert sum(chunk.end - chunk.start for chunk in work.chunks) <= limits.chunk_tokens
        # First come, first served: those that run are the oldest ones, and nobody is left out.
        order = list(self.texts)
        assert self.admitted == set(order[: len(self.admitted)])
        for part in (chunks, list(work.decodes)):
            assert part == sorted(part, key=order.index)
        if work.preempted:
            assert list(work.preempted) == sorted(work.preempted, key=order.index, reverse=True)
        assert work or not self.texts or self.flight

    def places(self, request_id: int) -> list[tuple[int, int]]:
        """Where each reserved position of a request lives."""
        pages = self.scheduler.pages
        table = pages.table(request_id)
        assert 0 not in table
        return [(page, slot) for page in table for slot in range(pages.page_size)]

    def check_prefix(self, request_id: int, length: int) -> list[tuple[int, int]]:
        """What a step reads: the committed tokens, whoever wrote them."""
        places = self.places(request_id)
        truth = self.texts[request_id].truth[:length]
        assert [self.cache.get(place) for place in places[:length]] == truth
        return places

    def run_chunk(self, chunk: Chunk) -> Report:
        text = self.texts[chunk.request_id]
        limits = self.scheduler.limits
        places = self.check_prefix(chunk.request_id, chunk.start)
        tokens = self.scheduler.tokens(chunk)
        assert list(tokens) == text.truth[chunk.start : chunk.end]
        for position, token in enumerate(tokens, start=chunk.start):
            self.cache[places[position]] = token
        self.count("prefill tokens", len(tokens))
        if not chunk.last:
            return Report(chunk.request_id, chunk.end, (), None)
        span = range(chunk.end, min(chunk.end + self.draft_len, limits.max_positions))
        for position in span:
            self.cache[places[position]] = JUNK
        text.length = chunk.end
        return Report(chunk.request_id, chunk.end, (), text.truth[chunk.end])

    def run_decode(self, request_id: int) -> Report:
        text, limits = self.texts[request_id], self.scheduler.limits
        places = self.check_prefix(request_id, text.length)
        known = self.scheduler.pages.committed(request_id)
        assert len(places) >= min(known + limits.lookahead, limits.max_positions)
        rows = range(text.length, min(text.length + self.draft_len, limits.max_positions))
        accepted = min(self.rng.randint(1, self.draft_len), len(rows))
        for row, position in enumerate(rows):
            self.cache[places[position]] = text.truth[position] if row < accepted else JUNK
        start, text.length = text.length, text.length + accepted
        tokens = tuple(text.truth[start : text.length])
        return Report(request_id, 0, tokens, text.truth[text.length])

    def take(self, report: Report) -> None:
        """The host's part: emits, and ends a text at the right token."""
        request_id, scheduler = report.request_id, self.scheduler
        text = self.texts.get(request_id)
        if text is None:
            assert not self.send(report)
            self.count("dropped")
            return
        if report.next_token is not None:
            new = [*report.tokens[1:], report.next_token][: text.stop - len(text.emitted)]
            start = text.prompt_len + len(text.emitted)
            assert new == text.truth[start : start + len(new)]
            text.emitted += new
        # An engine may end a text without reporting its last step: both must work.
        ended = len(text.emitted) >= text.stop
        if not ended or self.rng.random() < 0.5:
            assert self.send(report)
        computed = text.prompt_len + len(text.emitted) - 1
        if ended or (text.emitted and computed >= scheduler.limits.max_positions):
            assert text.emitted == text.truth[text.prompt_len :][: len(text.emitted)]
            assert scheduler.abort(request_id)
            assert not scheduler.abort(request_id)
            self.count("ended while waiting", request_id not in self.admitted)
            self.end(request_id)
            self.count("context" if not ended else "finished")

    def send(self, report: Report) -> bool:
        if report.tokens:
            assert report.next_token is not None
            return self.scheduler.advanced(report.request_id, report.tokens, report.next_token)
        return self.scheduler.prefilled(report.request_id, report.end, report.next_token)


@dataclass(frozen=True)
class Setting:
    num_pages: int
    page_size: int
    draft_len: int
    limits: Limits
    reuse: bool = True


def setting(num_pages: int, page_size: int, draft_len: int, **limits: int) -> Setting:
    return Setting(num_pages, page_size, draft_len, Limits(lookahead=draft_len, **limits))


SETTINGS = {
    "roomy": setting(200, 4, 4, max_running=6, chunk_tokens=32, max_positions=44),
    "tight": setting(18, 4, 4, max_running=6, chunk_tokens=16, max_positions=44),
    "tight, watermark": setting(
        18, 4, 4, max_running=5, chunk_tokens=8, max_positions=44, watermark=2
    ),
    "tiny pages": setting(60, 1, 3, max_running=4, chunk_tokens=5, max_positions=40),
    "one token a step": setting(24, 3, 1, max_running=8, chunk_tokens=1, max_positions=40),
    "long drafts": setting(40, 2, 9, max_running=4, chunk_tokens=64, max_positions=40),
    "no reuse": replace(
        setting(18, 4, 4, max_running=6, chunk_tokens=16, max_positions=44), reuse=False
    ),
}


def random_text(rng: random.Random, limits: Limits) -> Text:
    """A prompt that may share a stem with others, and a text that may run into the last position."""
    stem = [rng.choice([1, 2])] * rng.choice([0, 6, 12, 20])
    own = [rng.randint(3, 5) for _ in range(rng.randint(1, 20))]
    prompt = (stem + own)[: limits.max_positions - 1]
    most = rng.randint(1, 24)
    said = [rng.randint(10, 999) for _ in range(limits.max_positions + 200)]
    return Text([*prompt, *said], len(prompt), most, rng.randint(1, most))


def run_trace(chosen: Setting, *, lag: int, steps: int, seed: int) -> FakeEngine:
    """Arrivals, aborts and steps at random, then everything to its end."""
    rng = random.Random(seed)
    limits = replace(chosen.limits, lookahead=chosen.draft_len * (1 + lag))
    pages = Pages(chosen.num_pages, chosen.page_size, reuse=chosen.reuse)
    engine = FakeEngine(Scheduler(pages, limits), rng, chosen.draft_len, lag)
    next_id = 0
    for _ in range(steps):
        while len(engine.texts) < 12 and rng.random() < 0.4:
            try:
                engine.add(next_id, random_text(rng, limits))
            except TidarError as error:
                engine.count("refused" if "num_pages" in str(error) else "refused, unexplained")
            next_id += 1
        if engine.texts and rng.random() < 0.03:
            engine.abort(rng.choice(list(engine.texts)))
        engine.step()
    for _ in range(2000):
        if not engine.texts and not any(engine.flight):
            break
        engine.step()
    assert not engine.texts, "a request did not end"
    assert pages.free == pages.usable
    return engine


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("name", SETTINGS)
def test_random_traces(name: str, lag: int) -> None:
    """Arrivals, aborts, preemptions and ends in any order; see `FakeEngine` for all that is held."""
    counts = run_trace(SETTINGS[name], lag=lag, steps=2000, seed=lag).counts
    assert min(counts[what] for what in ("finished", "context", "aborted", "not launched")) > 5
    assert (counts["reused"] > 5) == SETTINGS[name].reuse
    assert "refused, unexplained" not in counts
    if name not in ("roomy", "one token a step"):
        assert counts["preempted"] > 5
        assert counts["ended while waiting"] > 0 or not lag or name == "tight, watermark"
    if lag:
        assert counts["dropped"] > 5


def small(num_pages: int = 12, page_size: int = 2, **changes: int) -> Scheduler:
    limits = Limits(max_running=4, chunk_tokens=100, lookahead=2, max_positions=64)
    return Scheduler(Pages(num_pages, page_size), replace(limits, **changes))


def prefill(scheduler: Scheduler, next_token: int = 50) -> Work:
    """One step whose chunks are all the last ones of their requests."""
    work = scheduler.next()
    for chunk in work.chunks:
        assert scheduler.prefilled(chunk.request_id, chunk.end, next_token if chunk.last else None)
    return work


def test_prefill_is_cut_into_chunks_and_runs_beside_decodes() -> None:
    scheduler = small(num_pages=40, chunk_tokens=4)
    scheduler.add(1, [1, 2], 5)
    assert prefill(scheduler) == Work((Chunk(1, 0, 2, True),), (), ())
    scheduler.add(2, [3] * 6, 5)
    scheduler.add(3, [4] * 9, 5)
    assert prefill(scheduler) == Work((Chunk(2, 0, 4, False),), (1,), ())
    assert scheduler.advanced(1, (50,), 51)
    assert prefill(scheduler) == Work((Chunk(2, 4, 6, True), Chunk(3, 0, 2, False)), (1,), ())
    assert prefill(scheduler).chunks == (Chunk(3, 2, 6, False),)
    assert prefill(scheduler) == Work((Chunk(3, 6, 9, True),), (1, 2), ())


def test_a_head_that_does_not_fit_is_not_overtaken() -> None:
    scheduler = small(num_pages=9)
    scheduler.add(1, [1] * 6, 1)
    scheduler.add(2, [2] * 8, 1)  # 5 pages, and 4 are free
    scheduler.add(3, [3], 1)
    assert [chunk.request_id for chunk in prefill(scheduler).chunks] == [1]
    assert scheduler.next().chunks == ()
    assert scheduler.abort(1)
    assert [chunk.request_id for chunk in prefill(scheduler).chunks] == [2, 3]


def test_the_watermark_holds_back_all_but_a_request_that_has_the_cache_to_itself() -> None:
    scheduler = small(num_pages=9, watermark=5)
    scheduler.add(1, [1] * 6, 1)  # 4 pages of 8
    scheduler.add(2, [2], 1)
    assert [chunk.request_id for chunk in prefill(scheduler).chunks] == [1]
    assert scheduler.next().chunks == ()
    scheduler.abort(1)
    assert [chunk.request_id for chunk in prefill(scheduler).chunks] == [2]


def test_a_preempted_request_goes_on_from_what_it_has_emitted() -> None:
    """Its text is computed again with the d[0] that was emitted but had not run, and with the last report."""
    scheduler = small(num_pages=10, lookahead=4)
    scheduler.add(1, [1, 1, 1], 12)
    scheduler.add(2, [2, 2, 2], 12)
    prefill(scheduler)
    assert scheduler.advanced(1, (50, 51), 52)
    assert scheduler.next() == Work((), (1, 2), ())
    assert scheduler.advanced(1, (52, 53), 54)
    work = scheduler.next()  # before request 2 has reported the step before
    assert (work.decodes, work.preempted) == ((1,), (2,))
    assert scheduler.advanced(2, (50, 60), 61)
    assert scheduler.next().preempted == ()
    assert (len(scheduler._admitted), len(scheduler._waiting)) == (1, 1)
    scheduler.abort(1)
    (chunk,) = scheduler.next().chunks
    assert (chunk.request_id, chunk.end, chunk.last) == (2, 6, True)
    assert chunk.start == 2  # its first page had not been taken
    assert scheduler.tokens(chunk) == (2, 50, 60, 61)


def test_a_shared_prefix_is_run_once() -> None:
    scheduler = small(num_pages=40)
    scheduler.add(1, [1, 2, 3, 4, 5], 5)
    prefill(scheduler)
    scheduler.add(2, [1, 2, 3, 4, 5], 5)
    assert scheduler.next().chunks == (Chunk(2, 4, 5, True),)


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_request_can_be_aborted_in_every_state(steps: int) -> None:
    """Waiting, in prefill, through its prefill but not reported, decoding."""
    scheduler = small(chunk_tokens=3)
    scheduler.add(1, [1] * 5, 4)
    reports = [lambda: scheduler.prefilled(1, 3), lambda: scheduler.prefilled(1, 5, 9)]
    for report in [*reports, lambda: scheduler.advanced(1, (9,), 10)][:steps]:
        scheduler.next()
        assert report()
    scheduler.next()
    assert scheduler.abort(1)
    assert not scheduler.abort(1)
    assert not scheduler.advanced(1, (9,), 10)
    assert not scheduler.prefilled(1, 3)
    assert scheduler.pages.free == scheduler.pages.usable
    assert not scheduler.next()
    scheduler.pages.check()


def test_a_request_that_never_fits_is_refused_with_the_setting_to_raise() -> None:
    scheduler = small(num_pages=9, page_size=2)  # 16 positions
    scheduler.add(1, [1] * 5, 10)  # 5 + 9 + lookahead 2
    with pytest.raises(TidarError, match=r"9 pages, for 17 .* 8 pages of 2 .* cache_tokens to 18"):
        scheduler.add(2, [1] * 5, 11)
    with pytest.raises(TidarError, match=r"64 tokens and the model 64 positions \(max_positions\)"):
        scheduler.add(2, [1] * 64, 1)
    with pytest.raises(TidarError, match="no tokens"):
        scheduler.add(2, [], 1)
    with pytest.raises(TidarError, match="max_new_tokens is 0"):
        scheduler.add(2, [1], 0)
    assert len(scheduler._waiting) == 1


def test_the_model_s_last_position_bounds_what_is_reserved() -> None:
    scheduler = small(num_pages=9, max_positions=16)
    scheduler.add(1, [1] * 14, 100)
    prefill(scheduler)
    assert scheduler.next().decodes == (1,)
    assert scheduler.advanced(1, (50, 51), 52)
    assert not scheduler.next()
    assert len(scheduler.pages.table(1)) == 8
    assert scheduler.abort(1)


def test_a_request_that_outgrows_what_it_was_added_with_is_an_assertion() -> None:
    scheduler = small(num_pages=5)
    scheduler.add(1, [1] * 5, 2)
    prefill(scheduler)
    assert scheduler.advanced(1, (50, 51), 52)
    with pytest.raises(AssertionError, match="outgrew"):
        scheduler.next()


@pytest.mark.parametrize("name", ["max_running", "chunk_tokens", "lookahead", "max_positions"])
def test_limits_that_let_nothing_run_are_refused(name: str) -> None:
    with pytest.raises(TidarError, match=f"{name} is 0"):
        small(**{name: 0})


def test_reports_that_cannot_be_are_assertions() -> None:
    scheduler = small(chunk_tokens=3)
    scheduler.add(1, [1] * 5, 4)
    with pytest.raises(AssertionError, match="here already"):
        scheduler.add(1, [1], 1)
    scheduler.next()
    with pytest.raises(AssertionError, match="not given a chunk"):
        scheduler.prefilled(1, 5, 9)
    with pytest.raises(AssertionError, match="has not decoded"):
        scheduler.advanced(1, (9,), 10)
    assert scheduler.prefilled(1, 3)
    scheduler.next()
    with pytest.raises(AssertionError, match="emits a token"):
        scheduler.prefilled(1, 5)
    assert scheduler.prefilled(1, 5, 9)
    with pytest.raises(AssertionError, match=r"d\[0\]"):
        scheduler.advanced(1, (8,), 10)
