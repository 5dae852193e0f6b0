"""Acceptance that is made up, to measure speed on weights that have none.

Which draft tokens pass is drawn, at a given probability for each depth (`tidar.decode.slots.Replay`);
everything else is a real run: rows, verification, shifts, truncation, cache. Speeds measured this way
are those of a model that happens to have this acceptance, and say nothing about any model's quality.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tidar.decode.costs import StepCosts
from tidar.decode.rates import Chain
from tidar.decode.slots import Replay
from tidar.errors import TidarError
from tidar.layout import Schedule

LABEL = "replayed acceptance, random weights"


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Probability that a draft token passes, given that those before it did, by its depth.

    survival: at index r, of the token of span row r; index 0 is unused (row 0 predicts d[0] once more).
    source: what was asked for, a mean or a file.
    """

    survival: tuple[float, ...]
    source: str

    @classmethod
    def parse(cls, text: str, draft_len: int) -> "Acceptance":
        """A number is a mean accept count of the dense schedule of `draft_len`, other text a file.

        Raises TidarError for anything that cannot be replayed at that K.
        """
        try:
            mean = float(text)
        except ValueError:
            return cls.read(Path(text), draft_len)
        return cls.of_mean(mean, draft_len)

    @classmethod
    def of_mean(cls, mean: float, draft_len: int) -> "Acceptance":
        """The same probability at every depth, such that a dense step accepts `mean` tokens on average.

        Raises TidarError for a mean outside 1 .. draft_len.
        """
        if not 1.0 <= mean <= draft_len:
            raise TidarError(
                f"a mean accept count of {mean:g} cannot be replayed: the largest K of these methods is "
                f"{draft_len}, so it must be from 1 to {draft_len}."
            )
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            if _dense_mean(middle, draft_len) < mean:
                low = middle
            else:
                high = middle
        return cls((1.0, *[high] * (draft_len - 1)), f"mean {mean:g}")

    @classmethod
    def read(cls, path: Path, draft_len: int) -> "Acceptance":
        """From a JSON list of probabilities for depth 1, 2, ...; raises TidarError for anything else."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TidarError(
                f"replayed acceptance {str(path)!r} is neither a number nor a readable JSON file: {error}"
            ) from error
        if not isinstance(values, list) or not all(map(_is_probability, values)):
            raise TidarError(
                f"{path} must hold a JSON list of numbers from 0 to 1: the probability that the draft token "
                "of depth 1, 2, ... passes."
            )
        if len(values) < draft_len - 1:
            raise TidarError(
                f"{path} has {len(values)} depths, and K = {draft_len} needs {draft_len - 1}."
            )
        return cls((1.0, *map(float, values[: draft_len - 1])), path.name)

    @property
    def draft_len(self) -> int:
        """The K that it was made for."""
        return len(self.survival)

    @property
    def histogram(self) -> tuple[float, ...]:
        """Probability of 1 .. K accepted tokens in a step of the dense schedule."""
        reached = np.cumprod((1.0, *self.survival[1:], 0.0))
        return tuple((reached[:-1] - reached[1:]).tolist())

    @property
    def mean(self) -> float:
        """Accepted tokens of such a step on average."""
        return sum(n * share for n, share in enumerate(self.histogram, start=1))

    def expected(self, schedule: Schedule) -> float:
        """Tokens per forward of a schedule in the long run, by the step rule: shifted drafts are shorter."""
        survival = np.asarray(self.survival)
        return Chain(schedule).rate(survival, StepCosts((1,), (1.0,)))

    def of_step(self, shift: int, drafted: int) -> float:
        """Tokens that a step commits on average, given its draft: of which rows of its span, and how long."""
        inner = self.survival[shift + 1 : shift + drafted]
        # Past the deepest probability that is known it stays as it is: so do replays.
        beyond = (self.survival[-1],) * (drafted - 1 - len(inner))
        return 1.0 + float(np.cumprod((*inner, *beyond)).sum())

    def steps_for(self, error: float) -> float:
        """Steps over which the mean accept count errs by `error`, a share of it, as a standard error.

        Of the dense schedule, whose steps do not hang together; those of others hardly do.
        """
        square = sum(n * n * share for n, share in enumerate(self.histogram, start=1))
        return (square / self.mean**2 - 1.0) / error**2

    def replay(self, device: torch.device, seed: int) -> Replay:
        """What a `PagedEngine` on `device` takes."""
        return Replay(torch.tensor(self.survival, dtype=torch.float32, device=device), seed)

    def to_json(self) -> dict[str, Any]:
        """For a record."""
        return {
            "source": self.source,
            "draft_len": self.draft_len,
            "survival": list(self.survival[1:]),
            "mean": self.mean,
            "histogram": {str(n): share for n, share in enumerate(self.histogram, start=1)},
        }


def _dense_mean(survival: float, draft_len: int) -> float:
    """1 + a + a^2 + ... + a^(K-1): accepted tokens where each draft token passes with probability a."""
    return sum(survival**power for power in range(draft_len))


def _is_probability(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value <= 1.0
