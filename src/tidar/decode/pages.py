"""The allocator of KV-cache pages: who holds which page, and which prefixes can be used again. No tensors.

Invariant: every page but page 0 is in exactly one state:

- held: in the tables of one request or more;
- idle: in no table, but registered: its content is known and can be reused;
- empty: in no table and not registered.

Idle and empty pages are free: they can be handed out, idle ones last and least recently used first.

**Reuse.** A page is registered when it is full of committed tokens, under a key that names those tokens
and all before them, so equal keys mean equal content. Only registered pages are ever shared, and a
registered page is never written again: a step writes at positions >= the committed length, and what is
registered lies below it. So reading is all that sharing allows, and nothing needs a copy.

**Pages change hands at once**, while a step that was launched for the old owner may still be running.
This is safe where steps run in launch order on one stream and each reads the table it was launched with:

- A new owner's rows are written by a later step, hence after whatever the old step still writes, and a
  position is visible to its owner only after the owner's own row has been written there.
- A registered page stays intact. The host may be a step behind the device, so the committed length on
  the device is at least the one known here; a launched step writes at or beyond it, and thus above all
  that is registered. This holds as well for a request that the host finds finished, aborts or preempts.

With two streams, or a table that the host changes under a launched step, neither would hold, and pages
would have to wait for the steps launched before they were given back.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from tidar.errors import TidarError

SPARE_PAGE = 0
"""The page that is never handed out: the place for writes that belong to nobody."""

_ROOT = b""


def _chain_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Names a page by its tokens and the key of the page before.

    A digest, not a number given out per page: it stays valid when the parent is taken back and filled
    again. 128 bits of BLAKE2b: nobody finds two prefixes with one key, not even on purpose.
    """
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


@dataclass(slots=True)
class _Holding:
    """Mutable: what one request holds. key: of its last full page. rest: committed tokens after that page."""

    table: list[int] = field(default_factory=list)
    committed: int = 0
    key: bytes = _ROOT
    rest: list[int] = field(default_factory=list)


class Pages:
    """Mutable. Requests are known by an id of the caller's choice; positions and tokens count from 0.

    num_pages: pages of the cache, page 0 included, which is never handed out. page_size: positions in a
    page. reuse: keep full pages for later requests with the same prefix. Raises TidarError for sizes
    that leave no page to hand out; misuse by the caller is an AssertionError.
    """

    def __init__(self, num_pages: int, page_size: int, *, reuse: bool = True) -> None:
        if num_pages < 2:
            raise TidarError(
                f"num_pages is {num_pages}; it must be at least 2, as page 0 is never handed out."
            )
        if page_size < 1:
            raise TidarError(f"page_size is {page_size}; it must be at least 1.")
        self.num_pages, self.page_size, self.reuse = num_pages, page_size, reuse
        self._empty = list(range(num_pages - 1, SPARE_PAGE, -1))  # the last one goes first
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._num_holders = [0] * num_pages
        self._holdings: dict[int, _Holding] = {}
        self._page_of: dict[bytes, int] = {}  # registered pages by key, and back
        self._key_of: dict[int, bytes] = {}

    @property
    def usable(self) -> int:
        """Pages that can be handed out in all."""
        return self.num_pages - 1

    @property
    def free(self) -> int:
        """Pages that can be handed out now; what is kept for reuse alone counts."""
        return len(self._empty) + len(self._idle)

    @property
    def cached(self) -> int:
        """Free pages whose content can still be reused."""
        return len(self._idle)

    def count(self, positions: int) -> int:
        """Pages that cover so many positions."""
        return -(-positions // self.page_size)

    def fits(self, positions: int) -> bool:
        """Whether a request of so many positions can ever fit, with all pages to itself."""
        return self.count(positions) <= self.usable

    def needed(self, tokens: Sequence[int], positions: int) -> int:
        """How many of the `free` pages `open` would take, and `reserve` for at least these tokens' positions.

        A reused page that another request holds costs nothing; an idle one stops being free.
        """
        reused, _ = self._reusable(tokens)
        return self.count(positions) - sum(self._num_holders[page] > 0 for page in reused)

    def open(self, request_id: int, tokens: Sequence[int]) -> int:
        """Starts a request with the pages that hold a prefix of `tokens`; returns how many it need not run.

        The tokens reused count as committed: whole pages, at most all tokens but the last, which must be
        run for its logits.
        """
        assert request_id not in self._holdings, f"request {request_id} is open already"
        reused, key = self._reusable(tokens)
        for page in reused:
            if self._num_holders[page] == 0:
                del self._idle[page]
            self._num_holders[page] += 1
        committed = len(reused) * self.page_size
        self._holdings[request_id] = _Holding(reused, committed, key)
        return committed

    def reserve(self, request_id: int, positions: int) -> bool:
        """Makes the table cover `positions` positions; False, with nothing changed, if it does not fit."""
        table = self._holding(request_id).table
        missing = self.count(positions) - len(table)
        if missing > self.free:
            return False
        table.extend(self._take() for _ in range(missing))
        return True

    def commit(self, request_id: int, tokens: Sequence[int]) -> None:
        """Appends tokens whose keys and values are, or by launched steps will be, in the request's pages.

        A page that they fill is registered, unless another one has the same content already.
        """
        holding = self._holding(request_id)
        size = self.page_size
        assert holding.committed + len(tokens) <= len(holding.table) * size, "not reserved"
        first = holding.committed // size
        rest = [*holding.rest, *tokens]
        full = len(rest) // size
        for index in range(full):
            page = holding.table[first + index]
            assert self._private(page), f"page {page} was written although others may read it"
            if self.reuse:
                holding.key = _chain_key(holding.key, rest[index * size : (index + 1) * size])
                if holding.key not in self._page_of:
                    self._page_of[holding.key] = page
                    self._key_of[page] = holding.key
        holding.rest = rest[full * size :]
        holding.committed += len(tokens)

    def close(self, request_id: int) -> None:
        """Ends a request: its pages are free, but for those that others hold; full ones can be reused."""
        self._release(self._holding(request_id).table)
        del self._holdings[request_id]

    def table(self, request_id: int, first: int = 0) -> tuple[int, ...]:
        """The request's pages in order of position, from the page number `first` of its table on.

        Between `open` and `close` it only grows, at its end.
        """
        return tuple(self._holding(request_id).table[first:])

    def committed(self, request_id: int) -> int:
        """Tokens committed by the request, those reused included."""
        return self._holding(request_id).committed

    def check(self) -> None:
        """Raises AssertionError when an invariant is broken. Walks over everything: for tests."""
        holders: Counter[int] = Counter()
        for request_id, holding in self._holdings.items():
            table = holding.table
            assert len(set(table)) == len(table), f"request {request_id} holds a page twice"
            assert holding.committed <= len(table) * self.page_size
            assert len(holding.rest) == holding.committed % self.page_size
            holders.update(table)
        for page, count in enumerate(self._num_holders):
            assert count == holders[page], f"page {page}: {count} holders noted, {holders[page]} do"
        for holding in self._holdings.values():
            written = holding.committed // self.page_size
            assert all(self._private(page) for page in holding.table[written:]), "a write is shared"
        pages = [*self._empty, *self._idle, *holders]
        assert sorted(pages) == list(range(1, self.num_pages)), "a page is lost or in two states"
        assert all(page in self._key_of for page in self._idle), "idle, but its content is unknown"
        assert not any(page in self._key_of for page in self._empty), "empty, but registered"
        assert {page: key for key, page in self._page_of.items()} == self._key_of

    def _holding(self, request_id: int) -> _Holding:
        assert request_id in self._holdings, f"request {request_id} is not open"
        return self._holdings[request_id]

    def _reusable(self, tokens: Sequence[int]) -> tuple[list[int], bytes]:
        """The registered pages that spell a prefix of `tokens`, and the key of the last of them."""
        pages: list[int] = []
        last = _ROOT
        if not self.reuse:
            return pages, last
        for end in range(self.page_size, len(tokens), self.page_size):
            key = _chain_key(last, tokens[end - self.page_size : end])
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
            last = key
        return pages, last

    def _private(self, page: int) -> bool:
        """Whether one request alone can see the page, so that it may write to it."""
        return self._num_holders[page] == 1 and page not in self._key_of

    def _take(self) -> int:
        if self._empty:
            page = self._empty.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        self._num_holders[page] = 1
        return page

    def _release(self, pages: Sequence[int]) -> None:
        # From the end on: a page is of use only together with all before it, so the last goes first.
        for page in reversed(pages):
            self._num_holders[page] -= 1
            if self._num_holders[page] > 0:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._empty.append(page)
