"""What a plan remembers of drafts: how they fared by depth, and behind a rejected row of their span."""

from dataclasses import dataclass, field

import numpy as np

from tidar.decode.costs import Floats

TRY_STEPS = 2
"""Steps of a try while AR is in use: one drafts, the next verifies."""

MAX_TRIES = 0.02
"""Share of all steps that tries may take."""

START, START_WEIGHT = 0.7, 2.0
"""What is taken for acceptance where nothing was seen yet, and the trials that this counts as."""


@dataclass(slots=True)
class Acceptance:
    """Mutable: how often draft tokens of each depth were accepted, recent steps weighing more.

    accepted, tried: by depth. Lists, as every step of every text changes a few of their numbers.
    """

    depth: int
    memory: float = 0.92
    accepted: list[float] = field(init=False)
    tried: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.accepted = [0.0] * (self.depth + 1)
        self.tried = [0.0] * (self.depth + 1)

    def observe(self, shift: int, drafted: int, accepted: int) -> None:
        """Takes in one step: the tokens of rows shift + 1 .. shift + drafted - 1 were up for verification.

        The first one of a shifted draft is another matter, see `Rejoined`.
        """
        for depth in range(shift + 1 + (shift > 0), min(shift + drafted, self.depth + 1)):
            # Those that were not reached fade as well: what they once were like says less and less.
            passed, reached = depth < shift + accepted, depth <= shift + accepted
            self.accepted[depth] = self.memory * self.accepted[depth] + passed
            self.tried[depth] = self.memory * self.tried[depth] + reached

    def rate(self, depth: int) -> float:
        """Acceptance of one depth."""
        return (self.accepted[depth] + START_WEIGHT * START) / (self.tried[depth] + START_WEIGHT)

    def estimate(self, others: Floats, weight: float) -> Floats:
        """Acceptance by depth of one request, given what all requests did (`others`).

        A text is predictable or not at all depths alike, so depths that it has not tried are judged by
        how its failures compare with the expected ones; `weight` is the trials that judgement counts as.
        """
        accepted, tried = np.array(self.accepted), np.array(self.tried)
        expected = float(tried @ (1.0 - others))
        failed = float((tried - accepted).sum())
        prior = 1.0 - np.clip((failed + 1.0) / (expected + 1.0) * (1.0 - others), 0.002, 0.98)
        return (accepted + weight * prior) / (tried + weight)

    def smoothed(self) -> Floats:
        """Acceptance by depth where each depth takes the one before it as its prior."""
        values = [START]
        for gained, tried in zip(self.accepted[1:], self.tried[1:], strict=True):
            values.append((gained + START_WEIGHT * values[-1]) / (tried + START_WEIGHT))
        return np.array(values)

    def forget(self, keep: float) -> None:
        """Shrinks what is remembered to `keep` trials per depth at most."""
        for depth, tried in enumerate(self.tried):
            if tried > keep:
                self.accepted[depth] *= keep / tried
                self.tried[depth] = keep


@dataclass(slots=True)
class Rejoined:
    """Mutable: how often the first token of a shifted draft passes, by shift, over what its depth says.

    Where an earlier span stands in for a missing one, a row of it was rejected, and the draft goes on
    behind that row. What follows a wrong guess fits less well, the less the farther the span is away.
    """

    depth: int
    memory: float = 0.99
    accepted: list[float] = field(init=False)
    expected: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.accepted = [0.0] * (self.depth + 1)
        self.expected = [0.0] * (self.depth + 1)

    def observe(self, shift: int, passed: bool, expected: float) -> None:
        """Takes in the first token of a draft shifted by `shift`; expected: the acceptance of its depth."""
        self.accepted[shift] = self.memory * self.accepted[shift] + passed
        self.expected[shift] = self.memory * self.expected[shift] + expected

    def first(self, survival: Floats, weight: float = 4.0) -> Floats:
        """`[depth + 1]`: at index s, how likely the first token of a draft shifted by s passes.

        survival: acceptance by depth. A shift that was not seen is taken for the one before it.
        """
        ratio, values = 1.0, np.append(survival[1:], survival[-1])
        for shift in range(1, self.depth + 1):
            ratio = (self.accepted[shift] + weight * ratio) / (self.expected[shift] + weight)
            values[shift] *= ratio
        return np.clip(values, 0.0, 0.98)


@dataclass(slots=True)
class Experience:
    """Mutable: what all texts of a model have taught so far; plans of several engines may share it.

    depth: of the deepest draft token. steps: decode steps planned. tries: those of them that drafted
    although AR looked best.
    """

    depth: int
    acceptance: Acceptance = field(init=False)
    rejoined: Rejoined = field(init=False)
    steps: int = 0
    tries: int = 0

    def __post_init__(self) -> None:
        self.acceptance, self.rejoined = Acceptance(self.depth, memory=0.99), Rejoined(self.depth)

    def observe(self, shift: int, drafted: int, accepted: int) -> None:
        """Takes in one step; see `Acceptance`."""
        self.acceptance.observe(shift, drafted, accepted)
        if shift:
            self.rejoined.observe(shift, accepted > 1, self.acceptance.rate(shift + 1))

    @property
    def may_try(self) -> bool:
        """Whether a try, two steps, stays within 2% of all steps (the first four are free)."""
        return self.tries + TRY_STEPS <= 4 + MAX_TRIES * self.steps
