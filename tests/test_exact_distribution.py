"""Law 4: rejection-sampled text has exactly the AR distribution, by enumeration through the engine.

A vocabulary of five tokens and the mask token. `walk` replays the whole run once for every way in
which its draws can fall, so the weights of the outcomes are exact; no chi-square, no luck. The
model is in float64, so that two ways to compute the same logits give the same probabilities.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from enumeration import (
    EXACT,
    PROMPT,
    VOCAB,
    Enough,
    ar_distribution,
    distance,
    joint_distribution,
    rejection,
    tiny,
)
from models import make_engine, walk
from torch import Tensor

import tidar.methods.choices as choices_module
from tidar.decode.engine import Engine
from tidar.layout import Schedule, nearest_anchor, two_forward
from tidar.methods import Draft, Project, Verdict
from tidar.methods.choices import Cell
from tidar.methods.tidar import Tidar, TidarStep
from tidar.model import Transformer
from tidar.sampling import Draw, SamplingParams, probabilities, reject


@dataclass(frozen=True)
class Watched(Tidar):
    """TiDAR, left once `count` tokens are chosen: saves the branches of a draft nobody verifies."""

    count: int = 0
    engines: list[Engine] = field(default_factory=list)
    accepts: set[int] = field(default_factory=set)
    shifts: set[int] = field(default_factory=set)

    def _verify(self, step: TidarStep, hidden: Tensor, project: Project) -> list[tuple[int, int]]:
        outcomes = super()._verify(step, hidden, project)
        ((accepted, token),) = outcomes
        draft = step.pending[0].draft
        emitted = self.engines[0].running[0].emitted
        tokens = (*emitted, *draft.tokens[draft.certain : accepted], token)
        if draft.certain == 1:
            self.accepts.add(accepted)
        if len(tokens) >= self.count:
            raise Enough(tokens[: self.count])
        if step.anchors[0]:
            self.shifts.add(accepted - nearest_anchor(step.anchors[0], accepted))
        return outcomes


def engine_distribution(
    method: Watched,
    schedule: Schedule,
    params: SamplingParams,
    *,
    model: Transformer | None = None,
    max_new_tokens: int | None = None,
) -> Counter[tuple[int, ...]]:
    """The joint distribution of the first `method.count` tokens."""
    engine = make_engine(model or tiny(), method, schedule, max_batch=1)
    method.engines[:] = [engine]
    return joint_distribution(engine, method.count, params, max_new_tokens)


def test_the_distribution_is_not_a_special_one() -> None:
    """Every token is possible everywhere, and drafts are neither always nor never accepted."""
    expected = ar_distribution(3, rejection())
    assert len(expected) == VOCAB**3
    assert min(expected.values()) > 1e-5
    assert max(expected.values()) < 0.3


CASES = [
    # (draft_len, span set, tokens, parameters)
    (2, (1, 2), 3, {}),
    (2, (1,), 3, {}),
    (2, (2,), 3, {}),
    (2, (), 3, {}),
    (2, (1, 2), 3, {"temperature": 0.7}),
    (2, (1, 2), 4, {"top_k": 3}),
    (2, (1,), 4, {"top_k": 3, "temperature": 1.6}),
    (2, (1, 2), 3, {"top_p": 0.8}),
    (2, (1, 2), 3, {"top_k": 4, "top_p": 0.85, "temperature": 1.3}),
    (3, (1, 2, 3), 2, {}),
    (3, (1, 2, 3), 3, {"top_k": 3}),
    (3, (1,), 3, {"top_k": 3}),
    (3, (2,), 3, {"top_k": 3, "temperature": 1.4}),
    (3, (1, 3), 3, {"top_k": 2, "temperature": 2.0}),
    (3, (1,), 4, {"top_k": 2, "temperature": 0.9}),
    (3, (), 4, {"top_k": 2}),
]
ARGMAX_CASES = [
    (2, (1, 2), 3, {}),
    (2, (1,), 4, {"top_k": 4}),
    (3, (1, 2, 3), 4, {}),
    (3, (1,), 4, {}),
    (3, (2,), 4, {}),
    (3, (1, 3), 4, {"temperature": 0.6}),
    (3, (), 4, {}),
    (3, (1, 2, 3), 5, {"top_k": 3}),
    (3, (1, 2), 4, {"top_p": 0.8}),
]


@pytest.mark.parametrize(("draft_len", "spans", "count", "values"), CASES)
def test_sampled_drafts(
    draft_len: int, spans: tuple[int, ...], count: int, values: dict[str, Any]
) -> None:
    params = rejection(**values)
    method = Watched(VOCAB, count=count)
    joint = engine_distribution(method, Schedule(draft_len, spans), params)
    assert distance(joint, ar_distribution(count, params)) < EXACT
    assert method.accepts >= {1, 2}
    if draft_len == 3 and count > 3 and spans == (1,):
        assert method.shifts >= {0, 1}  # a shifted draft was verified too


@pytest.mark.parametrize(("draft_len", "spans", "count", "values"), ARGMAX_CASES)
def test_argmax_drafts(
    draft_len: int, spans: tuple[int, ...], count: int, values: dict[str, Any]
) -> None:
    params = rejection(draft="argmax", **values)
    method = Watched(VOCAB, count=count)
    joint = engine_distribution(method, Schedule(draft_len, spans), params)
    assert distance(joint, ar_distribution(count, params)) < EXACT
    assert method.accepts >= set(range(1, draft_len + 1))


@pytest.mark.parametrize("draft", ["sample", "argmax"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_families(family: str, draft: str) -> None:
    params = rejection(draft=draft, top_k=3)
    joint = engine_distribution(
        Watched(VOCAB, count=3), Schedule(2, (1, 2)), params, model=tiny(family)
    )
    assert distance(joint, ar_distribution(3, params, tiny(family))) < EXACT


@pytest.mark.parametrize("draft", ["sample", "argmax"])
def test_two_forward(draft: str) -> None:
    """Steps that draft and steps that verify, in turn; the last draft is cut."""
    params = rejection(draft=draft, top_k=3)
    method = Watched(VOCAB, count=4)
    joint = engine_distribution(method, two_forward(3), params, max_new_tokens=4)
    assert distance(joint, ar_distribution(4, params)) < EXACT
    assert method.accepts >= {1, 2}


@pytest.mark.parametrize("draft", ["sample", "argmax"])
def test_drafts_cut_by_max_new_tokens(draft: str) -> None:
    """Where only a part of the draft is verified the kept part still has its own q."""
    params = rejection(draft=draft, top_k=3)
    joint = engine_distribution(
        Watched(VOCAB, count=3), Schedule(3, (1, 2, 3)), params, max_new_tokens=3
    )
    assert distance(joint, ar_distribution(3, params)) < EXACT


def test_drafts_cut_by_the_context_end() -> None:
    params = rejection(top_k=3)
    model = copy.deepcopy(tiny())
    model.config = replace(model.config, max_positions=len(PROMPT) + 3)
    joint = engine_distribution(Watched(VOCAB, count=4), Schedule(2, (1,)), params, model=model)
    assert distance(joint, ar_distribution(4, params)) < EXACT


# Negative controls: wrong rules that look right. The check above must notice each of them.


@dataclass(frozen=True)
class ArgmaxWithSoftProbs(Watched):
    """Drafts the arg-max, then verifies with a distribution that it was not drawn from."""

    def _propose(
        self, step: TidarStep, cells: list[Cell], hidden: Tensor, project: Project
    ) -> list[Draft]:
        (draft,) = super()._propose(step, cells, hidden, project)
        if draft.probs is None:
            return [draft]
        return [replace(draft, tokens=tuple(draft.probs.argmax(dim=-1).tolist()))]


@dataclass(frozen=True)
class LengthDependsOnTheValue(Watched):
    """Gives up a draft token of one value unverified: the bias that the design warns of."""

    def resolve(self, step: TidarStep, hidden: Tensor, project: Project) -> list[Verdict]:
        (verdict,) = super().resolve(step, hidden, project)
        if verdict.draft.tokens[1:2] == (2,):
            verdict = replace(verdict, draft=verdict.draft.cut(1))
        return [verdict]


@dataclass(frozen=True)
class ProbsOfAnotherRow(Watched):
    """Verifies with (nearly) the q of the row before the draft token's own."""

    def _propose(
        self, step: TidarStep, cells: list[Cell], hidden: Tensor, project: Project
    ) -> list[Draft]:
        (draft,) = super()._propose(step, cells, hidden, project)
        if draft.probs is None:
            return [draft]
        before = torch.stack([hidden[0, cell.row - 1] for cell in cells])
        wrong = probabilities(project(before), step.pending[0].params)
        return [replace(draft, probs=0.9 * wrong + 0.1 * draft.probs)]


@pytest.mark.parametrize("schedule", [Schedule(2, (1, 2)), Schedule(2, (1,))])
@pytest.mark.parametrize("wrong", [ArgmaxWithSoftProbs, LengthDependsOnTheValue, ProbsOfAnotherRow])
def test_a_wrong_method_is_noticed(wrong: type[Watched], schedule: Schedule) -> None:
    joint = engine_distribution(wrong(VOCAB, count=2), schedule, rejection())
    assert distance(joint, ar_distribution(2, rejection())) > 1e-3


def _target_for_residual(
    draft: Sequence[int], draft_probs: Tensor | None, target_probs: Tensor, draw: Draw
) -> tuple[int, int]:
    """Draws again from p, not from max(p - q, 0)."""
    for i in range(1, len(draft)):
        target = target_probs[i - 1]
        chosen = 1.0 if draft_probs is None else float(draft_probs[i - 1][draft[i]])
        accept = min(1.0, float(target[draft[i]]) / chosen)
        if draw(torch.tensor([1.0 - accept, accept], dtype=torch.float64)) == 0:
            return i, draw(target)
    return len(draft), draw(target_probs[len(draft) - 1])


def _distribution_of_the_row_before(
    draft: Sequence[int], draft_probs: Tensor | None, target_probs: Tensor, draw: Draw
) -> tuple[int, int]:
    """Takes the token after a wholly accepted draft from the row before the last."""
    n, token = reject(draft, draft_probs, target_probs, draw)
    return (n, draw(target_probs[n - 2])) if 1 < n == len(draft) else (n, token)


@pytest.mark.parametrize("draft", ["sample", "argmax"])
@pytest.mark.parametrize("wrong", [_target_for_residual, _distribution_of_the_row_before])
def test_a_wrong_verification_is_noticed(
    wrong: Callable[..., tuple[int, int]], draft: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices_module, "reject", wrong)
    params = rejection(draft=draft, top_k=3)
    joint = engine_distribution(Watched(VOCAB, count=3), Schedule(2, (1, 2)), params)
    assert distance(joint, ar_distribution(3, params)) > 1e-3


@dataclass(frozen=True)
class SampledTakenForOneHot(Watched):
    """Draws the draft, then verifies as if there had been no other choice."""

    def _propose(
        self, step: TidarStep, cells: list[Cell], hidden: Tensor, project: Project
    ) -> list[Draft]:
        return [
            replace(draft, probs=None) for draft in super()._propose(step, cells, hidden, project)
        ]


def test_a_sampled_draft_may_be_taken_for_one_hot() -> None:
    """No negative control: given the draft token the one-hot rule is exact, however it was come by.

    So it is exact on average too. Only the reverse is wrong; but fewer tokens are accepted.
    """
    method = SampledTakenForOneHot(VOCAB, count=3)
    params = rejection(top_k=3)
    joint = engine_distribution(method, Schedule(2, (1, 2)), params)
    assert distance(joint, ar_distribution(3, params)) < EXACT


def test_walk_is_exact() -> None:
    """The enumerator itself: two dice, the second thrown only after a five."""
    one = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    two = torch.tensor([0.25, 0.75], dtype=torch.float64)

    def run(draw: Draw) -> tuple[int, ...]:
        first = draw(one)
        return (first, draw(two)) if first else (first,)

    assert sorted((tokens, weight) for weight, tokens in walk(run)) == [
        ((0,), 0.5),
        ((2, 0), 0.125),
        ((2, 1), 0.375),
    ]
