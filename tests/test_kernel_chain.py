"""Launches that overlap: a layer's kernels in a captured graph, replayed over other inputs, against one at a time."""

from typing import Any

import pytest
import torch
from devices import CUDA
from torch import Tensor

from tidar.kernels.attention import paged_attention
from tidar.kernels.attention_launch import attention_workspace, default_splits, launch_config
from tidar.kernels.between import add_parts, embed_rows
from tidar.kernels.linear import default_config as row_config
from tidar.kernels.linear import linear_row
from tidar.kernels.parts import default_config, gated_linear, linear_parts
from tidar.kernels.rotary import rotate_and_store
from tidar.layout import build_tail

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA, reason="needs a CUDA device"),
]

HEADS, KV_HEADS, DIM, HIDDEN, INNER, PAGE = 12, 2, 128, 1536, 2048, 64
SPANS = {"ar": (), "few": (1, 2, 4, 8)}


class Chain:
    """Two layers over fixed weights, one sequence. Inputs are tensors that a graph reads anew."""

    def __init__(self, spans: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator) * scale
            return values.to(torch.bfloat16).cuda()

        tail = build_tail(8 if spans else 1, spans, 8)
        self.rows, self.drafts = len(tail), tail.num_drafts
        self.tail = tail.attributes.cuda()
        self.offsets = tail.offsets.cuda()
        self.table = draw(500, HIDDEN)
        width = (HEADS + 2 * KV_HEADS) * DIM
        self.norm = 1 + draw(HIDDEN, scale=0.1)
        self.qkv, self.o = draw(width, HIDDEN, scale=0.03), draw(HIDDEN, HEADS * DIM, scale=0.03)
        self.gate_up, self.down = (
            draw(2 * INNER, HIDDEN, scale=0.03),
            draw(HIDDEN, INNER, scale=0.03),
        )
        self.cos, self.sin = draw(4096, DIM), draw(4096, DIM)
        self.pages = draw(2, 2, 40, KV_HEADS, PAGE, DIM)
        self.first_pages = self.pages.clone()
        self.ids = torch.zeros(self.rows, dtype=torch.int64, device="cuda")
        self.prefix = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.page_table = torch.zeros(1, 39, dtype=torch.int32, device="cuda")
        self.workspace = attention_workspace(132, DIM, "cuda")
        self.cut = launch_config(self.rows, HEADS // KV_HEADS, DIM)

    def fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids.copy_(torch.randint(500, self.ids.shape, generator=generator))
        self.prefix.fill_(int(torch.randint(2300, (), generator=generator)))
        self.page_table.copy_(1 + torch.randperm(39, generator=generator)[None].int())
        self.pages.copy_(self.first_pages)

    def run(self, pdl: bool) -> Tensor:
        """The residual stream behind both layers; with one row by vectors, else by parts."""
        positions = self.prefix.long() + self.offsets
        single = self.rows == 1
        norm = None if single else self.norm
        x, normed = embed_rows(self.ids, self.table, norm_weight=norm, eps=1e-6, pdl=pdl)
        for layer in range(2):
            if single:
                qkv = self.row(x, self.qkv, pdl, norm_weight=self.norm)
                attended = self.attend(layer, qkv, None, positions, pdl)
                self.row(attended, self.o, pdl, residual=x, out=x)
                inner = self.row(x, self.gate_up, pdl, norm_weight=self.norm, gated=True)
                self.row(inner, self.down, pdl, residual=x, out=x)
                continue
            parts = self.parts(normed, self.qkv, pdl)
            attended = self.attend(layer, x.new_empty(parts.shape[1:]), parts, positions, pdl)
            normed = self.add(self.parts(attended, self.o, pdl), x, pdl)
            cut = default_config(self.rows, *self.gate_up.shape, True)
            inner = gated_linear(normed, self.gate_up, None, config=cut, pdl=pdl)
            normed = self.add(self.parts(inner, self.down, pdl), x, pdl)
        return x

    def row(self, x: Tensor, weight: Tensor, pdl: bool, **more: Any) -> Tensor:
        config = row_config(*weight.shape, more.get("gated", False), pdl=pdl)
        return linear_row(x, weight, eps=1e-6, config=config, **more)

    def parts(self, x: Tensor, weight: Tensor, pdl: bool) -> Tensor:
        return linear_parts(x, weight, config=default_config(len(x), *weight.shape), pdl=pdl)

    def add(self, parts: Tensor, x: Tensor, pdl: bool) -> Tensor:
        return add_parts(parts, x, bias=None, norm_weight=self.norm, eps=1e-6, pdl=pdl)

    def attend(
        self, layer: int, qkv: Tensor, parts: Tensor | None, positions: Tensor, pdl: bool
    ) -> Tensor:
        keys, values = self.pages[0, layer], self.pages[1, layer]
        rotate_and_store(
            qkv, self.cos, self.sin, positions, num_heads=HEADS, num_kv_heads=KV_HEADS, q_norm=None,
            k_norm=None, eps=1e-6, key_pages=keys, value_pages=values, page_table=self.page_table,
            prefix_lens=self.prefix, num_drafts=self.drafts, rows=self.rows, parts=parts, pdl=pdl,
        )  # fmt: skip
        q, k, v = qkv.view(1, self.rows, -1, DIM).split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        splits = default_splits(1, KV_HEADS, self.rows, HEADS // KV_HEADS, self.cut, 132)
        return paged_attention(
            q, k, v, keys, values, self.page_table, self.prefix, self.tail, splits=splits,
            workspace=self.workspace, config=self.cut, pdl=pdl,
        ).flatten(0, 1)  # fmt: skip


@pytest.mark.parametrize("name", SPANS)
def test_overlapping_launches_compute_what_single_ones_do(name: str) -> None:
    """Bit for bit, and the cache too: reading ahead reads nothing that is still to be written."""
    chain = Chain(SPANS[name])
    chain.fill(0)
    chain.run(pdl=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain.run(pdl=True)
    for seed in range(1, 40):
        chain.fill(seed)
        right, cached = chain.run(pdl=False).clone(), chain.pages.clone()
        chain.fill(seed)
        graph.replay()
        assert torch.equal(out, right)
        assert torch.equal(chain.pages, cached)
