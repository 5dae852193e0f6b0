"""The fused network and step: equal to the plain ones (law 10), on a CPU in Triton's interpreter.

The interpreter is slow, so models have one layer, but for one with two, and texts are short.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import FAMILIES, TRITON_REQUIRED, Excuses, assert_equal, random_model
from test_paged_engine import SAMPLED, check_all, collect, some_requests

if not TRITON_REQUIRED:
    pytest.importorskip("triton")

from tidar.decode.backend import PlainBackend, fused_stepper
from tidar.decode.engine import FixedPlan
from tidar.decode.fused import FusedBackend
from tidar.decode.paged_engine import EngineLimits, PagedEngine
from tidar.errors import TidarError
from tidar.layout import AUTOREGRESSIVE, Schedule, build_tail, two_forward
from tidar.model import Transformer
from tidar.paged_cache import PagedCache, PagedRows
from tidar.sampling import RowParams

CUDA = torch.cuda.is_available()


def caches(model: Transformer, pages: int, size: int) -> tuple[PagedCache, PagedCache]:
    weight = next(model.parameters())
    first, second = (
        PagedCache(model.config, pages, size, device=weight.device, dtype=weight.dtype)
        for _ in range(2)
    )
    generator = torch.Generator().manual_seed(5)
    for one, other in zip(
        (*first.keys, *first.values), (*second.keys, *second.values), strict=True
    ):
        one.copy_(torch.randn(one.shape, generator=generator))
        other.copy_(one)
    return first, second


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("drafts", "anchors", "draft_len", "prefixes"),
    [(1, (), 1, (9,)), (1, (), 1, (0, 17)), (4, (1, 3), 4, (16, 5, 30)), (12, (12,), 4, (8,))],
)
def test_network_equals_the_plain_one(
    name: str, drafts: int, anchors: tuple[int, ...], draft_len: int, prefixes: Sequence[int]
) -> None:
    """AR, a batch of steps, a chunk: hidden states, choices, and what is in the cache afterwards."""
    model = random_model(name, layers=2 if name == "qwen3" else 1)
    plain_cache, fused_cache = caches(model, 16, 8)
    tail = build_tail(drafts, anchors, draft_len)
    batch = len(prefixes)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 39, (batch, len(tail)), generator=generator)
    table = torch.randperm(15, generator=generator)[: batch * 5].view(batch, 5).int() + 1
    lens = torch.tensor(prefixes, dtype=torch.int32)
    rows = PagedRows(table, lens, tail.attributes, drafts)
    positions = lens.unsqueeze(1) + tail.offsets
    plain, fused = PlainBackend(model, plain_cache), FusedBackend(model, fused_cache)
    with torch.inference_mode():
        expected = plain.forward(ids, positions, rows)
        hidden = fused.forward(ids, positions, rows)
        count = batch * len(tail)
        assert_equal(fused.logits(hidden.flatten(0, 1)), plain.logits(expected.flatten(0, 1)))
        params = RowParams(torch.arange(count) % 2 * 0.7, torch.arange(count))
        choices = [
            backend.choose(states.flatten(0, 1), params, positions.flatten().long())
            for backend, states in ((plain, expected), (fused, hidden))
        ]
    assert torch.equal(*choices)
    for one, other in zip(plain_cache.keys, fused_cache.keys, strict=True):
        assert_equal(other[1:], one[1:])
    for one, other in zip(plain_cache.values, fused_cache.values, strict=True):
        assert_equal(other[1:], one[1:])


def test_a_wrapped_layer_is_not_left_out() -> None:
    model = random_model("llama", layers=2)
    cache, _ = caches(model, 4, 8)
    model.layers[1] = torch.nn.Sequential(model.layers[1])
    with pytest.raises(TidarError, match="wrapped"):
        FusedBackend(model, cache)


@pytest.mark.parametrize(
    ("schedule", "params"),
    [
        (AUTOREGRESSIVE, SAMPLED[1]),
        (Schedule(4, (1, 3)), SAMPLED[0]),
        (Schedule(4, (1, 3)), SAMPLED[1]),
        (Schedule(3, (2,)), SAMPLED[2]),
        (two_forward(4), SAMPLED[1]),
    ],
    ids=str,
)
def test_text_of_the_fused_step_is_ar(
    schedule: Schedule, params: dict[str, Any], excuses: Excuses
) -> None:
    model = random_model("qwen3", layers=1, width=16)
    requests, texts = some_requests(model, params, lengths=(3, 9))
    requests = [replace(request, max_new_tokens=5) for request in requests]
    limits = EngineLimits(
        max_running=2, cache_tokens=96, page_size=16, chunk_tokens=8, max_draft_len=4, behind=1
    )
    engine = PagedEngine(model, FixedPlan(schedule), limits)
    engine.runner.stepper = fused_stepper(engine.runner.stepper, model, engine.cache)
    engine.prefill.stepper = engine.runner.stepper
    check_all(collect(engine, requests), requests, texts, excuses)
