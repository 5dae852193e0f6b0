"""What law 4 is enumerated with: a tiny model, every way a run can fall, AR's own distribution. Not a test itself."""

import copy
import itertools
import math
from collections import Counter
from functools import cache
from typing import Any

import pytest
from models import plain_logits, random_model, walk

from tidar.decode.engine import Engine
from tidar.decode.request import Request
from tidar.model import Transformer
from tidar.sampling import Draw, SamplingParams, probabilities

VOCAB = 5
PROMPT = (3, 0, 4)
EXACT = 1e-9


@cache
def tiny(family: str = "llama") -> Transformer:
    """Five tokens and a mask token in float64; its distributions are neither flat nor sharp."""
    model = copy.deepcopy(
        random_model(family, vocab=VOCAB + 1, layers=1, width=16, seed=0, limit=16)
    )
    return model.double()


class Enough(Exception):
    """The tokens that were asked for are known; what the step would draft next does not matter."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        super().__init__(tokens)
        self.tokens = tokens


def joint_distribution(
    engine: Engine, count: int, params: SamplingParams, max_new_tokens: int | None = None
) -> Counter[tuple[int, ...]]:
    """The distribution of the first `count` tokens behind `PROMPT`, through a real engine.

    Its method must raise `Enough` with them as soon as they are known.
    """
    request = Request(prompt=PROMPT, max_new_tokens=max_new_tokens or count + 8, params=params)

    def run(draw: Draw) -> tuple[int, ...]:
        engine.submit(request)
        engine.waiting[0].draw = draw
        try:
            for _ in engine.run():
                pass
        except Enough as enough:
            return enough.tokens
        raise AssertionError("the run ended before its tokens were known")

    joint: Counter[tuple[int, ...]] = Counter()
    for weight, tokens in walk(run):
        joint[tokens] += weight
    return joint


def ar_distribution(
    count: int, params: SamplingParams, model: Transformer | None = None
) -> dict[tuple[int, ...], float]:
    """The product of AR's conditionals, from plain causal forwards."""
    model = model or tiny()

    @cache
    def conditional(tokens: tuple[int, ...]) -> list[float]:
        logits = plain_logits(model, [*PROMPT, *tokens])[-1:]
        return probabilities(logits, params)[0].tolist()

    return {
        tokens: math.prod(conditional(tokens[:i])[tokens[i]] for i in range(count))
        for tokens in itertools.product(range(VOCAB), repeat=count)
    }


def distance(joint: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """The largest difference of a probability; impossible outcomes (the mask token) count too."""
    assert sum(joint.values()) == pytest.approx(1.0, abs=EXACT)
    assert sum(expected.values()) == pytest.approx(1.0, abs=EXACT)
    return max(abs(joint[key] - expected.get(key, 0.0)) for key in {*joint, *expected})


def rejection(**values: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "sampling": "rejection", **values})
