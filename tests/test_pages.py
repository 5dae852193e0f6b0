"""The page allocator: nothing is lost, shared pages stay as they are, and reuse finds what is there."""

import random
from collections import OrderedDict
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import pytest

from tidar.decode.pages import Pages
from tidar.errors import TidarError

Tokens = tuple[int, ...]


def match(pages: Pages, tokens: Sequence[int]) -> int:
    """How many of these tokens `open` would reuse now."""
    return deepcopy(pages).open(-1, tokens)


@dataclass
class World:
    """Pages with their contents, and an oracle of reuse that knows prefixes by all of their tokens.

    The oracle reads page numbers off the real tables; what is registered, and in which order idle pages
    are taken back, it works out by itself.
    """

    pages: Pages
    contents: dict[int, list[int]] = field(default_factory=dict)
    committed: dict[int, list[int]] = field(default_factory=dict)
    known: dict[Tokens, int] = field(default_factory=dict)
    idle: OrderedDict[int, None] = field(default_factory=OrderedDict)
    reused: int = 0
    reclaimed: int = 0

    def table(self, request_id: int) -> tuple[int, ...]:
        return self.pages.table(request_id)

    def held(self) -> set[int]:
        return {page for request_id in self.committed for page in self.table(request_id)}

    def write(self, request_id: int, position: int, token: int) -> None:
        size = self.pages.page_size
        page = self.table(request_id)[position // size]
        self.contents.setdefault(page, [-1] * size)[position % size] = token

    def scribble(self, request_id: int) -> None:
        """What rejected drafts do: writes everywhere behind the committed prefix."""
        end = len(self.table(request_id)) * self.pages.page_size
        for position in range(len(self.committed[request_id]), end):
            self.write(request_id, position, -2 - request_id)

    def expected_match(self, tokens: Sequence[int]) -> int:
        size, count = self.pages.page_size, 0
        while count + size < len(tokens) and tuple(tokens[: count + size]) in self.known:
            count += size
        return count if self.pages.reuse else 0

    def open(self, request_id: int, tokens: Sequence[int]) -> None:
        expected = self.expected_match(tokens)
        assert self.pages.open(request_id, tokens) == expected
        self.committed[request_id] = list(tokens[:expected])
        self.reused += expected
        for page in self.table(request_id):
            self.idle.pop(page, None)
        assert len(self.table(request_id)) * self.pages.page_size == expected

    def reserve(self, request_id: int, positions: int) -> bool:
        before, free = self.table(request_id), self.pages.free
        missing = max(0, -(-positions // self.pages.page_size) - len(before))
        empty = self.pages.usable - len(self.held()) - len(self.idle)
        done = self.pages.reserve(request_id, positions)
        assert done == (missing <= free)
        assert self.table(request_id)[: len(before)] == before
        assert len(self.table(request_id)) == len(before) + (missing if done else 0)
        for _ in range(missing - empty if done else 0):
            gone, _ = self.idle.popitem(last=False)
            assert gone in self.table(request_id)
            self.known = {prefix: page for prefix, page in self.known.items() if page != gone}
            self.reclaimed += 1
        self.scribble(request_id)
        return done

    def commit(self, request_id: int, tokens: Sequence[int]) -> None:
        text, size = self.committed[request_id], self.pages.page_size
        for token in tokens:
            self.write(request_id, len(text), token)
            text.append(token)
            if self.pages.reuse and len(text) % size == 0:
                page = self.table(request_id)[len(text) // size - 1]
                self.known.setdefault(tuple(text), page)
        self.pages.commit(request_id, tokens)

    def leave(self, dropped: Sequence[int]) -> None:
        registered, held = set(self.known.values()), self.held()
        for page in reversed(dropped):
            if page in registered and page not in held:
                self.idle[page] = None

    def close(self, request_id: int) -> None:
        dropped = self.table(request_id)
        self.pages.close(request_id)
        del self.committed[request_id]
        self.leave(dropped)

    def check(self) -> None:
        self.pages.check()
        assert self.pages.cached == len(self.idle)
        assert self.pages.free == self.pages.usable - len(self.held())
        size = self.pages.page_size
        for request_id, text in self.committed.items():
            table = self.table(request_id)
            assert 0 not in table
            assert self.pages.committed(request_id) == len(text)
            spelled = [self.contents[table[i // size]][i % size] for i in range(len(text))]
            assert spelled == text


def random_tokens(rng: random.Random, most: int) -> list[int]:
    """Few stems and a small vocabulary, so that prefixes meet often."""
    stem = [rng.choice([7, 8])] * rng.randint(0, most)
    tail = [rng.randint(0, 1) for _ in range(rng.randint(1, most))]
    return (stem + tail)[:most] if rng.random() < 0.7 else tail


def random_operation(world: World, rng: random.Random, fresh: int) -> None:
    pages, size = world.pages, world.pages.page_size
    tokens = random_tokens(rng, 6 * size)
    assert match(pages, tokens) == world.expected_match(tokens)
    if not world.committed or (len(world.committed) < 6 and rng.random() < 0.15):
        needed, free = pages.needed(tokens, len(tokens)), pages.free
        world.open(fresh, tokens)
        assert world.reserve(fresh, len(tokens)) == (needed <= free)
        assert pages.free == free - needed or needed > free
        if needed > free:
            world.close(fresh)
        elif rng.random() < 0.8:
            world.commit(fresh, tokens[pages.committed(fresh) :])
        return
    request_id = rng.choice(list(world.committed))
    length = len(world.committed[request_id])
    room = len(world.table(request_id)) * size - length
    kind = rng.random()
    if kind < 0.35:
        world.reserve(request_id, length + rng.randint(0, 3 * size))
    elif kind < 0.75:
        world.commit(request_id, random_tokens(rng, 2 * size)[: rng.randint(0, room)])
    else:
        world.close(request_id)


@pytest.mark.parametrize(
    ("num_pages", "page_size", "reuse"),
    [(24, 4, True), (9, 2, True), (40, 1, True), (14, 3, True), (16, 3, False)],
)
def test_random_operations_keep_contents_and_find_exactly_what_is_there(
    num_pages: int, page_size: int, reuse: bool
) -> None:
    rng = random.Random(f"{num_pages}/{page_size}/{reuse}")
    world = World(Pages(num_pages, page_size, reuse=reuse))
    for step in range(10_000):
        random_operation(world, rng, fresh=step)
        world.check()
    assert (world.reused > 2500) == reuse
    assert (world.reclaimed > 250) == reuse
    for request_id in list(world.committed):
        world.close(request_id)
    world.check()
    assert world.pages.free == world.pages.usable == num_pages - 1


def filled(pages: Pages, request_id: int, tokens: Sequence[int]) -> int:
    """Runs a prompt; returns how much of it was reused."""
    reused = pages.open(request_id, tokens)
    assert pages.reserve(request_id, len(tokens))
    pages.commit(request_id, tokens[reused:])
    pages.check()
    return reused


def test_at_most_all_tokens_but_the_last_are_reused() -> None:
    pages = Pages(10, 4)
    tokens = list(range(8))
    filled(pages, 1, tokens)
    assert match(pages, tokens) == 4
    assert match(pages, [*tokens, 99]) == 8
    assert match(pages, tokens[:5]) == 4
    assert match(pages, tokens[:4]) == 0
    assert match(pages, []) == 0


def test_a_page_is_known_by_all_tokens_before_it() -> None:
    pages = Pages(10, 2)
    filled(pages, 1, [1, 2, 3, 4])
    assert match(pages, [3, 4, 5]) == 0
    assert match(pages, [9, 9, 3, 4, 5]) == 0
    assert match(pages, [1, 2, 9]) == 2


def test_only_full_committed_pages_are_reused() -> None:
    pages = Pages(10, 4)
    pages.open(1, [1, 2, 3, 4, 5])
    assert pages.reserve(1, 8)
    pages.commit(1, [1, 2, 3])
    assert match(pages, [1, 2, 3, 4, 5]) == 0
    pages.commit(1, [4])
    assert match(pages, [1, 2, 3, 4, 5]) == 4


def test_sharing_takes_no_page_and_outlives_the_first_holder() -> None:
    pages = Pages(4, 2)
    filled(pages, 1, [1, 2, 3])
    assert pages.needed([1, 2, 9], 3) == 1
    assert filled(pages, 2, [1, 2, 9]) == 2
    assert pages.free == 0
    assert pages.table(1)[0] == pages.table(2)[0]
    pages.close(1)
    pages.check()
    assert (pages.free, pages.cached) == (1, 0)
    assert filled(pages, 3, [1, 2, 5]) == 2


def test_idle_pages_are_taken_back_last_least_recently_used_first_from_the_end_of_a_chain() -> None:
    pages = Pages(6, 2)
    filled(pages, 1, [1, 1, 2, 2])
    filled(pages, 2, [5, 5, 6, 6])
    pages.close(1)
    pages.close(2)
    assert (pages.free, pages.cached) == (5, 4)
    pages.open(3, [0])
    assert pages.reserve(3, 2)  # the empty page first
    assert match(pages, [1, 1, 2, 2, 0]) == match(pages, [5, 5, 6, 6, 0]) == 4
    assert pages.reserve(3, 4)
    assert match(pages, [1, 1, 2, 2, 0]) == 2
    pages.open(4, [1, 1, 0])  # used again, and so no longer the oldest
    pages.close(4)
    assert pages.reserve(3, 6)
    assert match(pages, [5, 5, 6, 6, 0]) == 2
    assert match(pages, [1, 1, 2, 2, 0]) == 2
    pages.check()


def test_a_chain_whose_middle_was_filled_twice_is_found_again() -> None:
    """The second of two equal pages is not registered, but the one behind it is, under the same chain."""
    pages = Pages(10, 2)
    pages.open(1, [1, 2])
    pages.open(2, [1, 2])
    for request_id in (1, 2):
        assert pages.reserve(request_id, 4)
        pages.commit(request_id, [1, 2])
    pages.commit(2, [3, 4])
    pages.check()
    assert match(pages, [1, 2, 3, 4, 5]) == 4
    pages.open(3, [1, 2, 3, 4, 5])
    assert pages.table(3) == (pages.table(1)[0], pages.table(2)[1])
    for request_id in (2, 1, 3):
        pages.close(request_id)
        pages.check()
    assert (pages.free, pages.cached) == (9, 2)


def test_reserve_is_all_or_nothing_and_fits_tells_what_can_ever_be() -> None:
    pages = Pages(4, 4)
    assert pages.fits(12)
    assert not pages.fits(13)
    pages.open(1, [1])
    pages.open(2, [1])
    assert pages.reserve(1, 8)
    assert not pages.reserve(2, 5)
    assert pages.table(2) == ()
    assert pages.reserve(2, 4)
    pages.close(1)
    assert pages.reserve(2, 5)
    assert pages.table(2, first=1) == pages.table(2)[1:]
    pages.check()


def test_without_reuse_nothing_is_kept() -> None:
    pages = Pages(10, 2, reuse=False)
    filled(pages, 1, [1, 2, 3, 4])
    assert match(pages, [1, 2, 3]) == 0
    pages.close(1)
    assert (pages.free, pages.cached) == (9, 0)


def test_sizes_that_leave_no_page_are_refused() -> None:
    with pytest.raises(TidarError, match="num_pages is 1"):
        Pages(1, 16)
    with pytest.raises(TidarError, match="page_size is 0"):
        Pages(8, 0)


def test_misuse_is_an_assertion() -> None:
    pages = Pages(4, 2)
    filled(pages, 1, [1, 2, 3])
    with pytest.raises(AssertionError, match="open already"):
        pages.open(1, [1])
    with pytest.raises(AssertionError, match="not reserved"):
        pages.commit(1, [4, 5])
    with pytest.raises(AssertionError, match="not open"):
        pages.close(2)
    pages.check()


def test_check_finds_a_page_that_two_requests_would_write() -> None:
    pages = Pages(6, 2)
    filled(pages, 1, [1, 2, 3])
    filled(pages, 2, [5, 6, 7])
    pages._holdings[2].table[1] = pages._holdings[1].table[1]
    with pytest.raises(AssertionError, match="holders"):
        pages.check()
