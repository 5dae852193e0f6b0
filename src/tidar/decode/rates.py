"""How many tokens per second a schedule gives in the long run, from step costs and acceptance by depth.

By the step rule of the design a schedule is a Markov chain over how far the current draft is shifted; its
stationary state says how many tokens a step commits, and how many rows it has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from tidar.decode.costs import Floats, StepCosts, step_rows
from tidar.layout import AUTOREGRESSIVE, Schedule, nearest_anchor, two_forward

SHORT_LADDER = ((1,), (1, 2, 4, 8), (1, 2, 3, 5, 8, 16))
"""Span sets where each schedule has to be captured as a graph; a learned one joins them."""


def candidate_schedules(draft_lens: Sequence[int], *, short: bool = False) -> tuple[Schedule, ...]:
    """AR, and for each K two-forward and a ladder of span sets, from one to all of them; short: only a few."""
    found = {AUTOREGRESSIVE: None}
    for draft_len in draft_lens:
        sets: list[tuple[int, ...]] = list(SHORT_LADDER)
        if not short:
            sets = [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), (1, 2, 4, 8), (1, draft_len)]
            sets += [(1, 2, 3, 5, 8, 16), (1, 4, 8, 12, 16), (1, 2, draft_len)]
            sets += [tuple(range(1, draft_len + 1))]
        for anchors in sets:
            kept = tuple(sorted({n for n in anchors if n <= draft_len}))
            found[Schedule(draft_len, kept)] = None
        found[two_forward(draft_len)] = None
    return tuple(found)


@dataclass(frozen=True)
class Chain:
    """A schedule's step rule as a Markov chain; its states are the shifts 0..K-1 of the current draft.

    Two-forward is the chain of its verify steps, each with the draft step behind it.
    """

    schedule: Schedule

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.schedule.draft_len - shift for shift in range(self.schedule.draft_len))

    @cached_property
    def rows(self) -> tuple[int, ...]:
        return tuple(step_rows(self.schedule, length) for length in self.lengths)

    @cached_property
    def full_rows(self) -> int:
        """Rows of a step over a full draft: `rows[0]`, without the others."""
        return step_rows(self.schedule, self.schedule.draft_len)

    @cached_property
    def more(self) -> tuple[Schedule, ...]:
        """Schedules of the steps that follow before the next one of the chain; each commits one token."""
        return self.schedule.steps[1:]

    @cached_property
    def targets(self) -> Floats:
        """`[K, K, K]`: 1 where shift s and n accepted tokens (index n - 1) lead to shift t."""
        size = self.schedule.draft_len
        table = np.zeros((size, size, size))
        # Unless a draft is too short for all of the spans, where it leads is a matter of n alone.
        shifts, counts = _drafts(size)
        table[shifts, counts, self._after(size)[counts]] = 1.0
        for length in range(1, min(self.schedule.anchors(size), default=0)):
            short = table[size - length]
            short[:] = 0.0
            short[np.arange(length), self._after(length)] = 1.0
        return table

    def _after(self, drafted: int) -> NDArray[np.int64]:
        """The shift behind 1, 2, ... accepted tokens of `drafted`."""
        if self.more:  # each accepts one token, so the last of them alone says where that leads
            return np.full(drafted, next_shift(self.more[-1], 1, 1))
        accepted, last = np.arange(1, drafted + 1), self.schedule.draft_len - 1
        anchors = np.array((0, *self.schedule.anchors(drafted)))
        nearest = anchors[np.searchsorted(anchors, accepted, side="right") - 1]
        return np.where(nearest > 0, np.minimum(accepted - nearest, last), last)

    def rate(self, survival: Floats, costs: StepCosts, first: Floats | None = None) -> float:
        """Tokens per second in the long run; see `Family.rates`."""
        return float(Family((self,)).rates(survival, costs, first)[0])


@dataclass(frozen=True)
class Family:
    """The chains of one K, evaluated together: a plan decides between tokens, so it must be quick."""

    chains: tuple[Chain, ...]

    @cached_property
    def targets(self) -> Floats:
        return np.stack([chain.targets for chain in self.chains])

    @cached_property
    def rows(self) -> tuple[int, ...]:
        return tuple(rows for chain in self.chains for rows in chain.rows)

    def ready(self) -> "Family":
        """Itself, when its tables are made."""
        self.rates(np.zeros(self.chains[0].schedule.draft_len), StepCosts((1,), (1.0,)))
        return self

    def rates(self, survival: Floats, costs: StepCosts, first: Floats | None = None) -> Floats:
        """Tokens per second of each chain in the long run, `[len(chains)]`.

        survival: at index r, how likely the draft token of span row r is accepted when its turn comes;
        length at least K, index 0 unused. first: the same of the first token of a draft shifted by s, at
        index s from 1 on; None: as its row says.
        """
        if not self.chains[0].schedule.drafts:
            return np.full(len(self.chains), 1.0 / costs.of(1))
        counts, committed = self._outcomes(survival, first)
        moves = (counts[:, None, :] @ self.targets)[:, :, 0]
        for _ in range(10):  # squaring ten times is 1024 steps of the chain: settled
            moves = moves @ moves
        state = moves.mean(axis=1)
        if costs.fixed_shape:
            seconds = costs(chain.full_rows for chain in self.chains)
        else:
            seconds = (state * costs(self.rows).reshape(state.shape)).sum(axis=1)
        tokens: Floats = state @ committed
        for index, chain in enumerate(self.chains):
            for step in chain.more:
                tokens[index] += 1.0
                seconds[index] += costs.of(step_rows(step, 1))
        return tokens / seconds

    def _outcomes(self, survival: Floats, first: Floats | None) -> tuple[Floats, Floats]:
        """`[K, K]`: at [s, n - 1] the probability of n accepted tokens at shift s; and the mean of n, `[K]`."""
        index, inside = self._ahead
        passing = survival[index] * inside
        if first is not None:
            passing[1:-1, :1] = first[1 : len(passing) - 1, None]
        # reached[s, n]: at least n + 1 tokens commit.
        reached = np.zeros((len(passing), len(passing) + 1))
        reached[:, 0] = 1.0
        np.cumprod(passing, axis=1, out=reached[:, 1:-1])
        return reached[:, :-1] - reached[:, 1:], reached.sum(axis=1)

    @cached_property
    def _ahead(self) -> tuple[NDArray[np.int64], Floats]:
        """`[K, K - 1]`: the span row of each token of a draft but its first, by shift; and 1 where there is one."""
        size = self.chains[0].schedule.draft_len
        rows = np.arange(size)[:, None] + np.arange(1, size)
        return np.minimum(rows, size - 1), (rows < size).astype(np.float64)


def learned_span_set(
    survival: Floats,
    draft_len: int,
    costs: StepCosts,
    first: Floats | None = None,
    *,
    most: int = 6,
) -> tuple[int, ...]:
    """The span set of at most `most` anchors with the most tokens per second, found greedily from {1}.

    survival, first: acceptance, as for `Family.rates`.
    """
    kept: tuple[int, ...] = (1,)
    best = Chain(Schedule(draft_len, (1,))).rate(survival, costs, first)
    while len(kept) < min(most, draft_len):
        wider = [
            tuple(sorted((*kept, anchor)))
            for anchor in range(2, draft_len + 1)
            if anchor not in kept
        ]
        family = Family(tuple(chain_of(Schedule(draft_len, anchors)) for anchors in wider))
        rates = family.rates(survival, costs, first)
        if rates.max() <= best:
            break
        kept, best = wider[int(rates.argmax())], float(rates.max())
    return kept


@lru_cache(maxsize=1024)
def chain_of(schedule: Schedule) -> Chain:
    """The chain of a schedule, one for all who ask: its table takes longer to make than to use."""
    return Chain(schedule)


@lru_cache(maxsize=16)
def families_of(draft_lens: tuple[int, ...], short: bool = False) -> tuple[Family, ...]:
    """The chains of all candidates, by K, with their tables: no decision of a plan has to wait for those."""
    by_len: dict[int, list[Chain]] = {}
    for schedule in candidate_schedules(draft_lens, short=short):
        by_len.setdefault(schedule.draft_len, []).append(Chain(schedule))
    return tuple(Family(tuple(chains)).ready() for chains in by_len.values())


def next_shift(schedule: Schedule, drafted: int, accepted: int) -> int:
    """How far the next draft is shifted after `accepted` of `drafted` tokens; K - 1 leaves d[0] alone."""
    anchor, last = nearest_anchor(schedule.anchors(drafted), accepted), schedule.draft_len - 1
    return min(accepted - anchor, last) if anchor else last


@lru_cache(maxsize=64)
def _drafts(size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The index of `Chain.targets` in its first two dimensions: every shift s, with every n - 1 below K - s."""
    shifts, counts = np.nonzero(np.add.outer(np.arange(size), np.arange(size)) < size)
    return shifts, counts
