"""The protocol of a decoding method: what rows go into a step, and what its logits mean.

The engine owns the loop, the cache and the requests; a method is a value that turns pending work into a
`Step` and the step's hidden rows into `Verdict`s. Autoregressive decoding is TiDAR with K = 1.

What any method may do with a text. Its first `prefix_len` tokens have their keys and values in the cache.
Behind them come the certain tokens of its draft: chosen, told to the user, still to be run. Behind those
the method may guess (the draft's other tokens), or work on a span over several steps (`Draft.working`).
A step emits what it made certain; so a text can always be taken up again from its emitted tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from tidar.layout import Schedule
from tidar.sampling import Draw, SamplingParams

Project = Callable[[Tensor], Tensor]
"""Vocabulary projection: hidden rows `[N, hidden_size]` to logits `[N, vocab_size]`."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that follow the prefix. The first `certain` ones are chosen, the others await verification.

    probs: float64 `[len(tokens) - certain, vocab_size]`, the distribution each uncertain token was really
    drawn from (rejection sampling only); None where each was an arg-max of what the drafter saw.
    working: what the method has made of the positions behind; no one else reads it, and it may be lost.
    """

    tokens: tuple[int, ...]
    certain: int = 1
    probs: Tensor | None = None
    working: object = None

    def cut(self, length: int) -> "Draft":
        """The first `length` tokens."""
        probs = None if self.probs is None else self.probs[: max(length - self.certain, 0)]
        return Draft(self.tokens[:length], self.certain, probs, self.working)


@dataclass(frozen=True, slots=True)
class Pending:
    """What one sequence brings to a step.

    prefix_len: committed tokens. limit: positions the model has. forced: when given, the token the causal
    model is made to choose at each absolute position (teacher forcing, for measurement only). request_id:
    names the sequence until `Method.release`. left: tokens that may still be emitted. fresh: it has just
    joined, and its draft is all of its text.
    """

    prefix_len: int
    draft: Draft
    limit: int
    params: SamplingParams
    draw: Draw
    forced: Sequence[int] | None = None
    request_id: int = 0
    left: int = 1 << 62
    fresh: bool = False

    @property
    def length(self) -> int:
        return len(self.draft.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The rows of one forward pass over B sequences: ids and positions int64 `[B, W]`, and who sees whom.

    pending: what came in, or what the method has made of it; rows that may commit come first, in order.
    visible: bool `[W, W]`, or `[B, W, W]` where sequences differ; every row also sees its whole prefix.
    rows: of each sequence, those that are its own (others fill up `W`). prefill: the pass only takes a
    text in, so it is no decode step. draft_forwards: passes of another, smaller network that went before.
    taps: layers whose outputs `resolve` needs as well; they stand behind the final hidden states.
    """

    pending: tuple[Pending, ...]
    ids: Tensor
    positions: Tensor
    visible: Tensor
    rows: tuple[int, ...]
    prefill: bool = False
    draft_forwards: int = 0
    taps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a step ended for one sequence: `accepted` of its draft tokens commit, `draft` comes next.

    rows: which ones, rising; None: the first `accepted`.
    tried, settled: positions that were up for a decision and those decided, for the statistics, where
    these are not the draft tokens and `accepted`. ended: there is no position left to write to.
    """

    accepted: int
    draft: Draft
    tried: int | None = None
    settled: int | None = None
    ended: bool = False
    rows: tuple[int, ...] | None = None

    @property
    def kept(self) -> Sequence[int]:
        """The rows of the step, and so the tokens of its draft, that commit."""
        return range(self.accepted) if self.rows is None else self.rows


S = TypeVar("S", bound=Step)


class Method(Protocol[S]):
    """One way to decode. All state is in `Pending`, but for what is kept by request id until `release`."""

    def check(self, params: SamplingParams, *, forced: bool) -> None:
        """Raises TidarError for a way to sample that this method does not have."""
        ...

    def step(self, pending: Sequence[Pending], schedule: Schedule) -> S:
        """The rows of the next forward pass; no draft has more uncertain rows than `schedule` says."""
        ...

    def resolve(self, step: S, hidden: Tensor, project: Project) -> list[Verdict]:
        """Verdicts from the final hidden states of a step, `[B, W, (1 + taps) * hidden_size]`."""
        ...

    def release(self, request_id: int) -> None:
        """The sequence has left, for good or to be taken up again: forget it."""
        ...
