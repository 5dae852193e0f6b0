"""Drafts that know the text, so that every accept count comes up. Not a test itself."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from models import CHECKPOINTS, FAMILIES
from torch import Tensor

from tidar.layout import Schedule, two_forward
from tidar.methods import Draft, Project
from tidar.methods.choices import Cell
from tidar.methods.tidar import Tidar, TidarStep
from tidar.model import Transformer

ALL_MODELS = (*FAMILIES, *CHECKPOINTS)


SAMPLED: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 8},
    {"temperature": 1.3, "top_p": 0.9},
)
"""Greedy and shared noise; rejection sampling has its own law (4)."""


def method(model: Transformer, beta: float = 1.0) -> Tidar:
    assert model.config.mask_token_id is not None
    return Tidar(model.config.mask_token_id, beta)


def make_schedule(kind: str, draft_len: int, rng: random.Random) -> Schedule:
    counts = range(1, draft_len + 1)
    if kind == "two-forward":
        return two_forward(draft_len)
    if kind == "random":
        return Schedule(draft_len, tuple(sorted(rng.sample(counts, rng.randint(1, draft_len)))))
    sets = {"dense": tuple(counts), "single": (1,), "empty": (), "last": (draft_len,)}
    return Schedule(draft_len, sets[kind])


Wanted = Callable[[int, int], int]
"""The accept count to force at (seed, position of d[0])."""


def scripted_draft(
    text: Sequence[int], positions: Sequence[int], wanted: int, mask: int, vocab: int
) -> tuple[int, ...]:
    """Draft tokens for `positions`: the first `wanted - 1` are the text's, all others are wrong."""
    tokens = []
    for count, position in enumerate(positions, start=1):
        right = text[position] if position < len(text) else mask
        wrong = (right + 1) % vocab
        if wrong == mask:
            wrong = (wrong + 1) % vocab
        # Past the known text every token is "wrong", but never the mask token.
        tokens.append(right if count < wanted and right != mask else wrong)
    return tuple(tokens)


@dataclass(frozen=True)
class Scripted(Tidar):
    """TiDAR with drafts that know the AR text up to a wanted length; the seed names the text."""

    texts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    wanted: Wanted = lambda seed, position: 1
    vocab: int = 0

    def _propose(
        self, step: TidarStep, cells: list[Cell], hidden: Tensor, project: Project
    ) -> list[Draft]:
        drafts = []
        for index, p in enumerate(step.pending):
            own = [cell.predicts for cell in cells if cell.sequence == index]
            wanted = self.wanted(p.params.seed, own[0] - 1) if own else 1
            tokens = scripted_draft(
                self.texts[p.params.seed], own, wanted, self.mask_token_id, self.vocab
            )
            drafts.append(Draft(tokens))
        return drafts


def scripted(model: Transformer, texts: dict[int, tuple[int, ...]], wanted: Wanted) -> Scripted:
    mask = model.config.mask_token_id
    assert mask is not None
    return Scripted(mask, texts=texts, wanted=wanted, vocab=model.config.vocab_size)


def varied(draft_len: int, salt: int = 0) -> Wanted:
    """Every accept count from 1 to K comes up, without a pattern."""

    def wanted(seed: int, position: int) -> int:
        return random.Random(f"{seed}/{position}/{salt}").randint(1, draft_len)

    return wanted


def always(count: int) -> Wanted:
    return lambda seed, position: count
