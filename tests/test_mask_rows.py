"""Law 2: mask rows change no logit of a clean row, in training and in decoding."""

import random
from dataclasses import dataclass, field

import pytest
import torch
from models import any_model, assert_equal, make_engine, plain_logits, random_prompt, run_engine
from scripted import ALL_MODELS, make_schedule, method
from torch import Tensor

from tidar.attention import dense_attend
from tidar.decode.request import Request
from tidar.layout import dense, training_rows
from tidar.methods import Pending, Project, Step, Verdict
from tidar.methods.tidar import Tidar
from tidar.sampling import SamplingParams


@pytest.mark.parametrize("name", ALL_MODELS)
def test_mask_rows_change_no_clean_logit_in_training(name: str) -> None:
    """The clean half of the training layout equals each document's own causal forward."""
    model = any_model(name)
    lengths = [9, 1, 14, 8]
    tokens = [random_prompt(model, length, seed) for seed, length in enumerate(lengths)]
    ids = torch.tensor([[token for own in tokens for token in own]] * 3)
    document = torch.tensor([[i for i, length in enumerate(lengths) for _ in range(length)]] * 3)
    rows = training_rows(document, torch.tensor([1, 4, 16]), torch.tensor([0, 3, 5]))
    masks = torch.full_like(ids, method(model).mask_token_id)
    with torch.inference_mode():
        hidden = model(
            torch.cat([ids, masks], dim=1), rows.position, dense_attend(dense(rows, rows))
        )
        logits = model.logits(hidden[:, : ids.shape[1]])
    expected = torch.cat([plain_logits(model, own) for own in tokens])
    for row in logits:
        assert_equal(row, expected)


@dataclass(frozen=True)
class Recorder(Tidar):
    """Keeps the draft rows' logits of every step."""

    steps: list[tuple[Pending, Tensor]] = field(default_factory=list)

    def resolve(self, step: Step, hidden: Tensor, project: Project) -> list[Verdict]:
        for index, p in enumerate(step.pending):
            self.steps.append((p, project(hidden[index, : p.length])))
        return super().resolve(step, hidden, project)


@pytest.mark.parametrize("name", ALL_MODELS)
@pytest.mark.parametrize("kind", ["dense", "random", "two-forward"])
def test_mask_rows_change_no_clean_logit_in_decoding(name: str, kind: str) -> None:
    """The draft rows of every step equal a causal forward over committed and draft tokens."""
    model = any_model(name)
    draft_len = 5
    schedule = make_schedule(kind, draft_len, random.Random(2))
    recorder = Recorder(method(model).mask_token_id)
    requests = [
        Request(
            prompt=random_prompt(model, length, length),
            max_new_tokens=8,
            params=SamplingParams(seed=length),
        )
        for length in (3, 11, 6)
    ]
    runs = run_engine(make_engine(model, recorder, schedule), requests)
    texts = {
        request.params.seed: [*request.prompt, *run.ids]
        for request, run in zip(requests, runs, strict=True)
    }
    assert len(recorder.steps) > len(requests)
    for p, logits in recorder.steps:
        whole = [*texts[p.params.seed][: p.prefix_len], *p.draft.tokens]
        expected = plain_logits(model, whole)[p.prefix_len :]
        assert_equal(logits, expected)
