"""The rotary kernel against the pieces of the model that it replaces, and its stores against the rule.

Without a GPU the kernel runs in Triton's interpreter (conftest.py): slow, so the shapes are small.
"""

from dataclasses import dataclass

import pytest
import torch
from devices import CUDA, DEVICES
from models import TOLERANCE
from torch import Tensor

from tidar.kernels.rotary import rotate_and_store
from tidar.model import RopeConfig, RotaryEmbedding

EPS = 1e-6
MAX_POSITIONS = 64


@dataclass
class Step:
    """Two sequences of `rows` rows; their pages are shuffled and one page is nobody's."""

    qkv: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    key_pages: Tensor
    value_pages: Tensor
    page_table: Tensor
    prefix_lens: Tensor
    heads: tuple[int, int]
    rows: int

    def run(
        self,
        num_drafts: int,
        *,
        parts: Tensor | None = None,
        bias: Tensor | None = None,
        pdl: bool = False,
    ) -> None:
        rotate_and_store(
            self.qkv,
            self.cos,
            self.sin,
            self.positions,
            num_heads=self.heads[0],
            num_kv_heads=self.heads[1],
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            eps=EPS,
            key_pages=self.key_pages,
            value_pages=self.value_pages,
            page_table=self.page_table,
            prefix_lens=self.prefix_lens,
            num_drafts=num_drafts,
            rows=self.rows,
            parts=parts,
            bias=bias,
            pdl=pdl,
        )

    def expected(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B * W, heads, head_dim]`, computed in `dtype` as the model does."""
        head_dim = self.cos.shape[1]
        q_heads, kv_heads = self.heads
        qkv = self.qkv.to(dtype).view(len(self.qkv), -1, head_dim)
        q, k, v = qkv.split([q_heads, kv_heads, kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q = torch.nn.functional.rms_norm(q, (head_dim,), self.q_norm.to(dtype), EPS)
            k = torch.nn.functional.rms_norm(k, (head_dim,), self.k_norm.to(dtype), EPS)
        cos, sin = (table[self.positions].unsqueeze(1).to(dtype) for table in (self.cos, self.sin))

        def rotate(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)

        return rotate(q), rotate(k), v.clone()


def make_step(
    device: str,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    rows: int = 5,
    prefix_lens: tuple[int, ...] = (6, 3),
    page_size: int = 4,
    max_pages: int = 4,
    norms: bool = True,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
) -> Step:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    batch = len(prefix_lens)
    embedding = RotaryEmbedding(RopeConfig(theta=100.0), head_dim)
    cos, sin = embedding(torch.arange(MAX_POSITIONS).unsqueeze(0), dtype)
    # Positions that repeat and jump, as those of spans do; draft rows stand behind their prefix.
    offsets = torch.tensor([min(row, 2 + row // 2) for row in range(rows)])
    positions = (torch.tensor(prefix_lens).unsqueeze(1) + offsets).flatten()
    num_pages = batch * max_pages + 1
    table = torch.randperm(num_pages, generator=generator)[: batch * max_pages]
    pages = torch.full((2, num_pages, heads[1], page_size, head_dim), -7.0, dtype=dtype)
    pages = pages.to(device)
    return Step(
        qkv=draw(batch * rows, (heads[0] + 2 * heads[1]) * head_dim),
        cos=cos[0, :, 0].contiguous().to(device),
        sin=sin[0, :, 0].contiguous().to(device),
        positions=positions.to(index_dtype).to(device),
        q_norm=1 + 0.3 * draw(head_dim) if norms else None,
        k_norm=1 + 0.3 * draw(head_dim) if norms else None,
        key_pages=pages[0],
        value_pages=pages[1],
        page_table=table.view(batch, max_pages).to(torch.int32).to(device),
        prefix_lens=torch.tensor(prefix_lens, dtype=torch.int32, device=device),
        heads=heads,
        rows=rows,
    )


def check(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        tolerance = TOLERANCE * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance)
    else:
        # Rounded behind the norm and behind the rotation, by a unit in the last place at most (the
        # interpreter cuts off); a rotated number can be smaller than the two it is made of.
        largest = expected.abs().amax(dim=-1, keepdim=True)
        error = (actual.double() - expected.double()).abs()
        assert bool((error <= 2.0**-6 * largest).all()), float((error / largest).max())


def check_run(step: Step, num_drafts: int, dtype: torch.dtype, *, pdl: bool = False) -> None:
    """Runs the step and looks at every number of qkv and of the cache."""
    wide = torch.float32 if dtype == torch.float32 else torch.float64
    q, k, v = step.expected(wide)
    key_pages, value_pages = step.key_pages.to(wide), step.value_pages.to(wide)
    page_size = step.key_pages.shape[2]
    for b, start in enumerate(step.prefix_lens.tolist()):
        for r in range(num_drafts):
            entry, slot = divmod(start + r, page_size)
            if entry < step.page_table.shape[1]:
                page = int(step.page_table[b, entry])
                key_pages[page, :, slot] = k[b * step.rows + r]
                value_pages[page, :, slot] = v[b * step.rows + r]
    step.run(num_drafts, pdl=pdl)
    actual = step.qkv.view(len(step.qkv), -1, step.cos.shape[1])
    rotated = step.heads[0] + step.heads[1]
    check(actual[:, :rotated].to(wide), torch.cat([q, k], dim=1), dtype)
    assert torch.equal(actual[:, rotated:].to(wide), v), "values must stay as they are"
    check(step.key_pages.to(wide), key_pages, dtype)
    assert torch.equal(step.value_pages.to(wide), value_pages)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize("head_dim", [8, 16, 24, 96])
def test_equals_the_model(device: str, norms: bool, head_dim: int) -> None:
    """Half of 24 and of 96 is no power of two."""
    check_run(make_step(device, head_dim=head_dim, norms=norms), 3, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (12, 2), (8, 8)])
def test_head_counts(device: str, heads: tuple[int, int]) -> None:
    """Groups of heads that hold queries, keys and values together, and a group that is not full."""
    check_run(make_step(device, heads=heads), 3, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_drafts", [0, 1, 5])
def test_number_of_drafts(device: str, num_drafts: int) -> None:
    check_run(make_step(device), num_drafts, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_rows_behind_the_last_page_are_not_stored(device: str, index_dtype: torch.dtype) -> None:
    step = make_step(device, prefix_lens=(14, 16, 0), index_dtype=index_dtype)
    check_run(step, 5, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_one_row(device: str) -> None:
    check_run(make_step(device, rows=1, prefix_lens=(7,)), 1, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_and_pages_that_are_slices(device: str) -> None:
    """The projection's output may be wider; a layer's pages may lie apart."""
    step = make_step(device)
    step.qkv = torch.cat([step.qkv, step.qkv], dim=1)[:, : step.qkv.shape[1]]
    step.key_pages, step.value_pages = torch.stack([step.key_pages, step.value_pages], 1).unbind(1)
    q, k, _ = step.expected(torch.float32)
    step.run(3)
    actual = step.qkv.reshape(len(step.qkv), -1, 16)[:, :6]
    check(actual, torch.cat([q, k], dim=1), torch.float32)
    page = int(step.page_table[0, 1])
    check(step.key_pages[page, :, 2], k[0], torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norms", [False, True], ids=["plain", "norms"])
def test_bfloat16_within_its_rounding(device: str, norms: bool) -> None:
    check_run(make_step(device, norms=norms, dtype=torch.bfloat16), 3, torch.bfloat16)


@pytest.mark.parametrize("device", DEVICES)
def test_shape_errors(device: str) -> None:
    for name, value in (
        ("qkv", torch.zeros(10, 64, device=device)),
        ("positions", torch.zeros(9, dtype=torch.int64, device=device)),
        ("q_norm", None),
        ("rows", 4),
        ("value_pages", torch.zeros(1, 2, 4, 16, device=device)),
    ):
        step = make_step(device)
        setattr(step, name, value)
        with pytest.raises(AssertionError):
            step.run(1)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("pdl", [False, True], ids=["plain", "pdl"])
@pytest.mark.parametrize(("heads", "norms"), [((12, 2), False), ((32, 8), True)])
def test_model_shapes_on_cuda(heads: tuple[int, int], norms: bool, pdl: bool) -> None:
    for rows, lengths in ((1, (33,)), (20, (0, 11, 40)), (112, (0,))):
        step = make_step(
            "cuda",
            heads=heads,
            head_dim=128,
            rows=rows,
            prefix_lens=lengths,
            page_size=16,
            norms=norms,
            dtype=torch.bfloat16,
        )
        step.positions.clamp_(max=MAX_POSITIONS - 1)
        check_run(step, min(rows, 16), torch.bfloat16, pdl=pdl)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("biased", [False, True])
def test_a_projection_in_parts(device: str, biased: bool) -> None:
    """The same as from their sum; what `qkv` held before does not matter."""
    whole, apart = make_step(device), make_step(device)
    parts = torch.stack((whole.qkv * 0.25, whole.qkv * 2.0, whole.qkv * -1.25)).float()
    bias = whole.qkv[0].clone() if biased else None
    whole.qkv.copy_(parts.sum(0) + (0.0 if bias is None else bias))
    apart.qkv.fill_(torch.nan)
    whole.run(3)
    apart.run(3, parts=parts, bias=bias)
    for one, other in (
        (apart.qkv, whole.qkv),
        (apart.key_pages, whole.key_pages),
        (apart.value_pages, whole.value_pages),
    ):
        torch.testing.assert_close(one, other, rtol=0.0, atol=TOLERANCE)
