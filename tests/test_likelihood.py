"""Likelihoods of `tidar eval` against one plain causal forward pass for each text."""

import pytest
import torch
from models import FAMILIES, any_model, plain_logits, random_prompt

from tidar.errors import TidarError
from tidar.evaluation import likelihood
from tidar.evaluation.likelihood import Pair, Score, Work, score
from tidar.model import Transformer


def oracle(model: Transformer, context: tuple[int, ...], continuation: tuple[int, ...]) -> Score:
    whole = (context + continuation)[-(model.config.max_positions + 1) :]
    rows = plain_logits(model, whole[:-1])[-len(continuation) :].double().log_softmax(-1)
    picked = [float(row[token]) for row, token in zip(rows, continuation, strict=True)]
    greedy = [int(row.argmax()) == token for row, token in zip(rows, continuation, strict=True)]
    return Score(sum(picked), all(greedy))


def pairs_for(model: Transformer) -> list[Pair]:
    """Texts of many lengths, some with the same beginning, some longer than the model, some the model's own."""
    made: list[Pair] = []
    for seed, (before, after) in enumerate([(1, 1), (3, 7), (20, 1), (9, 30), (90, 20), (1, 96)]):
        ids = random_prompt(model, before + after, seed)
        made.append((ids[:before], ids[before:]))
    question = random_prompt(model, 12, 99)
    made += [(question, (choice,)) for choice in random_prompt(model, 4, 5)]
    made += [(question[:8], (*question[8:], 3)), (question, (3, 4))]
    best = int(plain_logits(model, question)[-1].argmax())
    return [*made, (question, (best,))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_scores_are_those_of_one_plain_pass(
    family: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 200)  # five rows of logits at a time
    model = any_model(family)
    pairs, work, done = pairs_for(model), Work(), []
    found = score(model, pairs, batch=batch, work=work, on_done=done.append)
    for (context, continuation), mine in zip(pairs, found, strict=True):
        expected = oracle(model, tuple(context), tuple(continuation))
        assert mine.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert mine.greedy == expected.greedy
    assert found[-1].greedy
    assert sum(done) == len(pairs)
    assert work.truncated == 1
    # Six texts of their own, one that five choices and a longer continuation share, one with another ending.
    assert work.forwards == -(-8 // batch)
    assert torch.isfinite(torch.tensor([each.logprob for each in found])).all()


def test_impossible_pairs() -> None:
    model = any_model("qwen3")
    too_long = random_prompt(model, 97, 0)
    for pair in (((), (1,)), ((1,), ()), ((1,), too_long)):
        with pytest.raises(TidarError, match="text 0 has"):
            score(model, [pair])
    assert score(model, []) == []
