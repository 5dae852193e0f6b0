"""The paged attention kernel and its plain twin against the visibility rule, row by row in float64.

Without a GPU the kernel runs in Triton's interpreter (conftest.py): slow, so the shapes are small.
"""

import dataclasses
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from models import TRITON_REQUIRED
from torch import Tensor

from tidar.kernels.attention_launch import (
    MAX_SPLITS,
    MOST_LANES,
    SHORT_CONTEXT,
    SHORT_SPLITS,
    AttentionWorkspace,
    LaunchConfig,
    attention_workspace,
    can_copy,
    default_splits,
    launch_config,
)
from tidar.kernels.reference import paged_attention_reference
from tidar.layout import CLEAN, Rows, clean_rows, decode_rows, dense

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

SMALL = LaunchConfig(tile_m=16, tile_n=16, num_warps=4, num_stages=2, min_share=1)
COPIED = dataclasses.replace(SMALL, copies=True)
DENSE = decode_rows(0, 3, (1, 2, 3), 3)
PRUNED = decode_rows(0, 4, (1, 3), 4)
SINGLE = decode_rows(0, 2, (1,), 4)
AR = clean_rows(1)


on_cuda = (
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA, reason="needs a CUDA device"),
)


@pytest.fixture(params=["interpreted", pytest.param("compiled", marks=on_cuda)])
def kernel(request: pytest.FixtureRequest) -> ModuleType:
    """The module of the kernel, which is compiled where there is a GPU and interpreted elsewhere."""
    if not TRITON_REQUIRED:
        pytest.importorskip("triton")
    if CUDA and request.param == "interpreted":
        pytest.skip("compiled here")
    return importlib.import_module("tidar.kernels.attention")


@dataclass(frozen=True)
class Case:
    """One launch's arguments, in the order of the signature, and the right answer (float64)."""

    arguments: tuple[Tensor, ...]
    expected: Tensor

    @property
    def q(self) -> Tensor:
        return self.arguments[0]


def attributes(rows: Rows) -> Tensor:
    return torch.stack((rows.position, rows.span, rows.anchor)).int()


def make_case(
    tails: Rows | Sequence[Rows],
    lengths: Sequence[int],
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Random keys and values in pages of random order, NaN wherever no committed token lies.

    tails: rows of a step behind an empty prefix, one for all sequences or one each.
    """
    generator = torch.Generator().manual_seed(seed)
    each = [tails] * len(lengths) if isinstance(tails, Rows) else list(tails)
    batch, width, (num_heads, num_kv_heads) = len(lengths), len(each[0]), heads

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    # q, k and v are slices of one merged buffer, as the model's merged projection makes them.
    merged = random(batch * width, (num_heads + 2 * num_kv_heads) * head_dim).to(DEVICE)
    joint = merged.view(batch, width, -1, head_dim)
    q, k, v = joint.split([num_heads, num_kv_heads, num_kv_heads], dim=2)
    used = [math.ceil(length / page_size) for length in lengths]
    order = torch.randperm(sum(used) + 3, generator=generator).tolist()
    shape = (len(order), num_kv_heads, page_size, head_dim)
    key_pages, value_pages = (torch.full(shape, math.nan, dtype=dtype) for _ in range(2))
    table = torch.full((batch, max(used) + 2), 10**9, dtype=torch.int32)
    expected = []
    for index, (rows, length) in enumerate(zip(each, lengths, strict=True)):
        keys, values = (
            random(num_kv_heads, length, head_dim),
            random(num_kv_heads, length, head_dim),
        )
        for place in range(used[index]):
            page = order.pop()
            table[index, place] = page
            start, stop = place * page_size, min((place + 1) * page_size, length)
            key_pages[page, :, : stop - start] = keys[:, start:stop]
            value_pages[page, :, : stop - start] = values[:, start:stop]
        keys = torch.cat([keys, k[index].cpu().transpose(0, 1)], dim=1)
        values = torch.cat([values, v[index].cpu().transpose(0, 1)], dim=1)
        query = q[index].cpu().transpose(0, 1)
        expected.append(oracle(rows, length, query, keys, values))
    lens = torch.tensor(lengths, dtype=torch.int32)
    tail = attributes(each[0]) if isinstance(tails, Rows) else torch.stack([*map(attributes, each)])
    paged = (t.to(DEVICE) for t in (key_pages, value_pages, table, lens, tail))
    return Case((q, k, v, *paged), torch.stack(expected))


def oracle(rows: Rows, length: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention under the rule in float64: `[W, num_heads * head_dim]`.

    rows: the tail's, behind an empty prefix. q: `[num_heads, W, head_dim]`; k, v: `[num_kv_heads, length
    + W, head_dim]`.
    """
    moved = Rows(
        rows.position + length,
        rows.document,
        rows.span,
        rows.anchor + length,
    )
    visible = dense(moved, clean_rows(length).join(moved))
    group = q.shape[0] // k.shape[0]
    keys, values = (t.double().repeat_interleave(group, dim=0) for t in (k, v))
    scores = q.double() @ keys.transpose(1, 2) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
    return (weights @ values).transpose(0, 1).flatten(1)


def make_workspace(case: Case, splits: int) -> AttentionWorkspace:
    batch, rows, num_heads, head_dim = case.q.shape
    num_kv_heads = case.arguments[1].shape[2]
    tiles = math.ceil(rows * num_heads / num_kv_heads / 16)
    return attention_workspace(batch * num_kv_heads * tiles * splits, head_dim, DEVICE)


def check(
    kernel: ModuleType,
    case: Case,
    *,
    splits: int = 1,
    config: LaunchConfig = SMALL,
    tolerance: float = 1e-5,
) -> None:
    """The kernel's answer is right, complete, and the same a second time."""
    workspace = make_workspace(case, splits) if splits > 1 else None
    if workspace is not None:  # what no split has written must not count
        workspace.parts.fill_(math.nan)
        workspace.stats.fill_(math.nan)
    outs = [
        kernel.paged_attention(
            *case.arguments,
            splits=splits,
            workspace=workspace,
            config=config,
            out=torch.full_like(case.expected, math.nan, dtype=case.q.dtype, device=DEVICE),
        )
        for _ in range(2)
    ]
    torch.testing.assert_close(outs[0].double().cpu(), case.expected, rtol=0.0, atol=tolerance)
    assert torch.equal(outs[0], outs[1])


def check_twin(case: Case) -> None:
    out = paged_attention_reference(*case.arguments)
    torch.testing.assert_close(out.double().cpu(), case.expected, rtol=0.0, atol=1e-5)
    given = torch.full_like(out, math.nan)
    assert paged_attention_reference(*case.arguments, out=given) is given
    assert torch.equal(out, given)


RAGGED = (0, 5, 16, 33)
"""An empty prefix, a part of a page, exactly one page, pages and a part."""

LAYOUTS = {"dense": DENSE, "pruned": PRUNED, "single": SINGLE, "ar": AR, "chunk": clean_rows(24)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_over_ragged_prefixes(kernel: ModuleType, name: str) -> None:
    case = make_case(LAYOUTS[name], RAGGED)
    check_twin(case)
    check(kernel, case)
    check(kernel, case, config=COPIED)


def test_tiles_are_copied_whole_or_not_at_all(kernel: ModuleType) -> None:
    """Not of odd head sizes, nor of pages smaller than a tile or with gaps between them."""
    pages = torch.zeros(6, 2, 16, 16, device=DEVICE)
    assert kernel._tiles(pages, SMALL) is None
    assert kernel._tiles(pages, COPIED).block_shape == [16, 16]
    for bad in (pages[:, :, :8].contiguous(), torch.zeros(6, 2, 16, 24, device=DEVICE)):
        with pytest.raises(AssertionError):
            kernel._tiles(bad, COPIED)
    with pytest.raises(RuntimeError, match="view"):
        kernel._tiles(pages[:, :1], COPIED)


def test_what_can_be_copied() -> None:
    hopper = 227 << 10
    assert can_copy(128, 64, hopper)
    assert can_copy(64, 128, hopper)
    assert not can_copy(96, 64, hopper)
    assert not can_copy(256, 64, hopper)  # its tiles are smaller
    assert not can_copy(128, 32, hopper)
    assert not can_copy(128, 64, 99 << 10)
    assert launch_config(72, 4, 128, copies=True).copies
    assert not launch_config(72, 4, 128).copies
    assert not launch_config(72, 4, 128, copies=True, longest=SHORT_CONTEXT).copies
    assert not launch_config(72, 4, 128, 4, copies=True).copies


@pytest.mark.parametrize("splits", [2, 5])
def test_splits_share_the_keys(kernel: ModuleType, splits: int) -> None:
    """Also more splits than pages, a split with tail keys alone, and one without any."""
    check(kernel, make_case(PRUNED, (0, 16, 70)), splits=splits)


def test_a_split_takes_its_least_share(kernel: ModuleType) -> None:
    config = dataclasses.replace(SMALL, min_share=3)
    check(kernel, make_case(PRUNED, (0, 70)), splits=8, config=config)


@pytest.mark.parametrize("heads", [(2, 2), (6, 1), (3, 1)])
def test_head_groups(kernel: ModuleType, heads: tuple[int, int]) -> None:
    case = make_case(SINGLE, (0, 19), heads=heads)
    check_twin(case)
    check(kernel, case, splits=2)


@pytest.mark.parametrize("head_dim", [8, 24, 80])
def test_odd_head_sizes(kernel: ModuleType, head_dim: int) -> None:
    case = make_case(SINGLE, (3, 20), head_dim=head_dim)
    check_twin(case)
    check(kernel, case, splits=2)


@pytest.mark.parametrize(
    ("page_size", "tile_n", "copies"),
    [(16, 64, False), (64, 16, False), (64, 16, True), (32, 32, False), (32, 32, True)],
)
def test_tiles_over_and_under_a_page(
    kernel: ModuleType, page_size: int, tile_n: int, copies: bool
) -> None:
    config = dataclasses.replace(SMALL, tile_n=tile_n, tile_m=32, copies=copies)
    case = make_case(PRUNED, (16, 64, 75), page_size=page_size)
    check_twin(case)
    check(kernel, case, splits=3, config=config)


def test_a_tail_of_its_own_per_sequence(kernel: ModuleType) -> None:
    padded = decode_rows(0, 2, (1, 2), 4)
    case = make_case((padded, clean_rows(10)), (9, 18))
    check_twin(case)
    check(kernel, case, splits=2)


def test_even_prefixes_of_one_row_need_no_mask() -> None:
    check_twin(make_case(AR, (17, 17)))
    check_twin(make_case(AR, (0,)))


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_launch_defaults(rows: int, head_dim: int) -> None:
    for group, longest, copies in ((1, 4096, True), (6, 4096, False), (6, SHORT_CONTEXT, True)):
        for itemsize in (2, 4):
            config = launch_config(rows, group, head_dim, itemsize, longest=longest, copies=copies)
            assert 16 <= config.tile_m <= 128
            assert config.tile_m & (config.tile_m - 1) == 0
            tiles = config.lane_tiles(rows, group)
            assert tiles * config.tile_m >= rows * group > (tiles - 1) * config.tile_m
            assert config.tile_m <= MOST_LANES
            for batch, heads in ((1, 2), (3, 8)):
                splits = default_splits(batch, heads, rows, group, config, 132, longest=longest)
                # One workspace of as many programs as multiprocessors serves every split launch.
                lanes = batch * heads * tiles * splits * config.tile_m
                assert splits == 1 or lanes <= 132 * MOST_LANES


def test_default_splits_fill_the_device() -> None:
    vector = launch_config(1, 6, 128)
    assert default_splits(1, 2, 1, 6, vector, 132) == MAX_SPLITS
    assert default_splits(1, 8, 1, 6, vector, 132) == 16
    assert default_splits(1, 8, 1, 6, vector, 132, longest=SHORT_CONTEXT) == SHORT_SPLITS
    wide = launch_config(80, 6, 128, copies=True)
    assert (wide.per_sm, wide.lane_tiles(80, 6), wide.copies) == (1, 8, True)
    assert default_splits(1, 2, 80, 6, wide, 132) == 132 // 16
    paired = launch_config(80, 6, 128)
    assert (paired.per_sm, paired.copies) == (2, False)
    assert default_splits(1, 2, 80, 6, paired, 132) == 2 * 132 // 16
    assert default_splits(64, 8, 80, 6, wide, 132) == 1


def test_wrong_shapes_are_refused(kernel: ModuleType) -> None:
    case = make_case(SINGLE, (18,))
    q, k, v, *others, tail = case.arguments
    with pytest.raises(AssertionError):
        kernel.paged_attention(q, k[:, :-1], v, *others, tail, splits=1, workspace=None)
    with pytest.raises(AssertionError):
        kernel.paged_attention(q, k, v, *others, tail[:-1], splits=1, workspace=None)
    with pytest.raises(AssertionError, match="needs a workspace"):
        kernel.paged_attention(q, k, v, *others, tail, splits=2, workspace=None)


def check_half(
    kernel: ModuleType,
    case: Case,
    *,
    splits: int,
    config: LaunchConfig | None = None,
    pdl: bool = False,
) -> None:
    """Half an epsilon off in the norm at most: weights and result are rounded once each."""
    workspace = make_workspace(case, splits)
    out = kernel.paged_attention(
        *case.arguments, splits=splits, workspace=workspace, config=config, pdl=pdl
    )
    error = (out.double().cpu() - case.expected).flatten(1).norm(dim=1)
    relative = error / case.expected.flatten(1).norm(dim=1)
    assert float(relative.max()) < torch.finfo(case.q.dtype).eps / 2


def test_half_precision(kernel: ModuleType) -> None:
    case = make_case(
        SINGLE, (0, 37), dtype=torch.float16
    )  # the interpreter has no bfloat16 products
    check_half(kernel, case, splits=2, config=SMALL)


WIDE = decode_rows(0, 16, (1, 2, 3, 5, 8, 16), 16)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("rows", "heads", "head_dim", "splits"),
    [
        (AR, (12, 2), 128, 8),
        (SINGLE, (32, 8), 128, 4),
        (WIDE, (12, 2), 128, 1),
        (WIDE, (12, 2), 128, 6),
        (WIDE, (8, 2), 64, 4),
        (WIDE, (8, 2), 80, 4),
        (clean_rows(300), (8, 2), 128, 2),
    ],
)
@pytest.mark.parametrize("pdl", [False, True], ids=["plain", "pdl"])
@pytest.mark.parametrize("kernel", ["compiled"], indirect=True)
def test_launch_defaults_on_cuda(
    kernel: ModuleType, rows: Rows, heads: tuple[int, int], head_dim: int, splits: int, pdl: bool
) -> None:
    lengths = (0, 63, 64, 1027)
    case = make_case(
        rows, lengths, heads=heads, head_dim=head_dim, page_size=64, dtype=torch.bfloat16
    )
    check_half(kernel, case, splits=splits, pdl=pdl)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["compiled"], indirect=True)
def test_one_graph_serves_every_prefix_on_cuda(kernel: ModuleType) -> None:
    """Captured once at a short prefix, replayed after the lengths and pages have changed."""
    small = make_case(DENSE, (5, 40), heads=(12, 2), head_dim=64, page_size=64)
    large = make_case(DENSE, (2000, 900), heads=(12, 2), head_dim=64, page_size=64, seed=1)
    inputs = [torch.empty_like(t) for t in large.arguments]
    workspace = make_workspace(large, 8)

    def fill(case: Case) -> None:
        q, k, v, key_pages, value_pages, table, lens, tail = case.arguments
        for buffer, value in zip(inputs[:3], (q, k, v), strict=True):
            buffer.copy_(value)
        inputs[3][: len(key_pages)] = key_pages
        inputs[4][: len(value_pages)] = value_pages
        inputs[5][:, : table.shape[1]] = table
        inputs[6].copy_(lens)
        inputs[7].copy_(tail)

    def launch() -> Tensor:
        return kernel.paged_attention(*inputs, splits=8, workspace=workspace)

    fill(small)
    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch()
    for case in (large, small, large):
        fill(case)
        graph.replay()
        torch.testing.assert_close(out.double().cpu(), case.expected, rtol=0.0, atol=1e-5)


def test_oracle_sees_what_the_rule_says() -> None:
    """The oracle's own check: a mask row behind anchor 1 sees the prefix, one draft row and its span."""
    rows = SINGLE
    assert rows.span.tolist() == [CLEAN, CLEAN, 0, 0, 0, 0]
    assert dense(rows, rows)[2].tolist() == [True, False, True, True, True, True]
