"""What is asked of the decoder, what it reports, and the state of a sequence in between."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from tidar.layout import Schedule
from tidar.methods import Draft
from tidar.sampling import Draw, SamplingParams, seeded_draw

FinishReason = Literal["end-of-text", "stop", "length", "context"]
"""Why a sequence ended: an end-of-text token, a stop string, `max_new_tokens`, the model's last position."""

Stopper = Callable[[int], bool]
"""Told each emitted token in turn; True when that token completes a stop string."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One text to decode.

    make_stopper: makes the `Stopper` of a run, for stop strings. forced: teacher forcing, the token the
    causal model is made to choose at each absolute position (prompt included); for measurement only.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int = 128
    params: SamplingParams = field(default_factory=SamplingParams)
    eos_ids: frozenset[int] = frozenset()
    make_stopper: Callable[[], Stopper] | None = None
    forced: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class StepEvent:
    """What one forward pass did for one request.

    ids: tokens emitted and kept, in order. drafted: draft tokens it verified (0 for a prefill, whose
    tokens are all certain). accepted: tokens it committed. Where a span is written over several steps
    these are the positions that were open, and those it settled. rows: rows of the pass that belong to
    the request. schedule: how the step was built. finish: set on the request's last event. seconds: wall
    clock of the forward pass and its verdict, drafting by another network included; draft_forwards:
    passes of that one.
    """

    request_id: int
    ids: tuple[int, ...]
    prefill: bool
    drafted: int
    accepted: int
    rows: int
    schedule: Schedule
    seconds: float
    finish: FinishReason | None
    draft_forwards: int = 0


def tokens_per_forward(decoded: int, steps: int) -> float | None:
    """T/NFE: tokens that decode steps emitted and the text kept / decode steps; None without a step.

    Prefill is in neither.
    """
    return decoded / steps if steps else None


@dataclass(slots=True)
class Sequence:
    """Mutable: a request being decoded.

    Invariant while running: the committed tokens and the certain ones of `draft` are the prompt and all
    emitted tokens (with TiDAR the last of them is d[0]). So `draft` can always be rebuilt, and preemption
    loses no token.
    """

    request_id: int
    request: Request
    emitted: list[int] = field(default_factory=list)
    draft: Draft = field(default_factory=lambda: Draft(()))
    finish: FinishReason | None = None
    draw: Draw = field(init=False)
    stopper: Stopper | None = field(init=False)

    def __post_init__(self) -> None:
        self.draw = seeded_draw(self.request.params.seed)
        make = self.request.make_stopper
        self.stopper = make() if make else None

    @property
    def left(self) -> int:
        """Tokens that may still be emitted."""
        return self.request.max_new_tokens - len(self.emitted)

    def emit(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Takes new tokens in order up to the first that ends the text; returns those kept."""
        for count, token in enumerate(tokens, start=1):
            self.emitted.append(token)
            if token in self.request.eos_ids:
                self.finish = "end-of-text"
            elif self.stopper is not None and self.stopper(token):
                self.finish = "stop"
            elif self.left == 0:
                self.finish = "length"
            if self.finish is not None:
                return tokens[:count]
        return tokens
