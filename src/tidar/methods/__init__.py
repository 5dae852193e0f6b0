"""The protocol of a decoding method: what rows go into a step, and what its logits mean.

The engine owns the loop, the cache and the requests; a method is a value that turns pending work into a
`Step` and the step's hidden rows into `Verdict`s. Autoregressive decoding is TiDAR with K = 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tidar.layout import Schedule, Tail
from tidar.sampling import Draw, SamplingParams

Project = Callable[[Tensor], Tensor]
"""Vocabulary projection: hidden rows `[N, hidden_size]` to logits `[N, vocab_size]`."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens awaiting verification. The first `certain` ones need none: the causal model chose them.

    probs: float64 `[len(tokens) - certain, vocab_size]`, the distribution each uncertain token was really
    drawn from (rejection sampling only); None where each was an arg-max of what the drafter saw.
    """

    tokens: tuple[int, ...]
    certain: int = 1
    probs: Tensor | None = None

    def cut(self, length: int) -> "Draft":
        """The first `length` tokens."""
        probs = None if self.probs is None else self.probs[: max(length - self.certain, 0)]
        return Draft(self.tokens[:length], self.certain, probs)


@dataclass(frozen=True, slots=True)
class Pending:
    """What one sequence brings to a step.

    prefix_len: committed tokens. limit: positions the model has. forced: when given, the token the causal
    model is made to choose at each absolute position (teacher forcing, for measurement only).
    """

    prefix_len: int
    draft: Draft
    limit: int
    params: SamplingParams
    draw: Draw
    forced: Sequence[int] | None = None

    @property
    def length(self) -> int:
        return len(self.draft.tokens)


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of one forward pass over B sequences: ids and positions int64 `[B, W]`, and the tail's mask.

    visible: bool `[W, W]`, or `[B, W, W]` where sequences near the end of the context differ.
    anchors: for each sequence, the anchor offsets it uses among those of `tail`.
    """

    pending: tuple[Pending, ...]
    tail: Tail
    ids: Tensor
    positions: Tensor
    visible: Tensor
    anchors: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a step ended for one sequence: `accepted` of its draft tokens commit, `draft` comes next."""

    accepted: int
    draft: Draft


class Method(Protocol):
    """One way to decode. Implementations are immutable; all state is in `Pending`."""

    def step(self, pending: Sequence[Pending], schedule: Schedule) -> Step:
        """The rows of the next forward pass; each draft has at most `schedule.draft_rows` tokens."""
        ...

    def resolve(self, step: Step, hidden: Tensor, project: Project) -> list[Verdict]:
        """Verdicts from the final hidden states `[B, W, hidden_size]` of a step."""
        ...
