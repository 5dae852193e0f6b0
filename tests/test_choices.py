"""Rows of several requests are chosen together, each as it would be alone."""

import pytest
import torch
from torch import Tensor

from tidar.methods import Draft, Pending
from tidar.methods import choices as module
from tidar.methods.choices import Cell, choices
from tidar.sampling import SamplingParams, choose, seeded_draw

SEVERAL = [
    SamplingParams(),
    SamplingParams(seed=7),
    SamplingParams(temperature=0.7, seed=1),
    SamplingParams(temperature=0.7, seed=2**63 - 1),
    SamplingParams(temperature=0.7, top_k=3, seed=1),
    SamplingParams(temperature=0.7, top_p=0.5, seed=1),
    SamplingParams(temperature=1.5, seed=1),
    SamplingParams(temperature=1.0, seed=5, sampling="rejection"),
]


def pending(params: SamplingParams) -> Pending:
    return Pending(0, Draft((1,)), 100, params, seeded_draw(0))


def test_rows_are_chosen_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [pending(params) for params in SEVERAL]
    cells = [Cell(i, row, 10 * i + row) for i in range(len(texts)) for row in range(3)]
    logits = torch.randn(len(cells), 50, generator=torch.Generator().manual_seed(0))
    alone = []
    for row, cell in zip(logits, cells, strict=True):
        params = SEVERAL[cell.sequence]
        best = choose(row[None], params, torch.tensor([cell.predicts]))
        alone.append(int(row.argmax()) if params.rejects else int(best))
    calls = []

    def counted(rows: Tensor, params: SamplingParams, positions: Tensor, seeds: Tensor) -> Tensor:
        calls.append(len(rows))
        return choose(rows, params, positions, seeds)

    monkeypatch.setattr(module, "choose", counted)
    assert choices(texts, cells, logits) == alone
    assert sorted(calls) == [3, 3, 3, 6], "requests that differ in their seed alone share a call"
    assert len({*alone}) > 10
    monkeypatch.setattr(module, "NOISE_ENTRIES", 2 * 50)
    assert choices(texts, cells, logits) == alone, "a few rows at a time as well"
    assert max(calls[4:]) == 2
