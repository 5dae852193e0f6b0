"""Products in parts, and what adds them up, against the same arithmetic in float64.

Without a GPU the kernels run in Triton's interpreter (conftest.py): slow, so the shapes are small.
"""

from dataclasses import replace

import pytest
import torch
from devices import CUDA, DEVICES
from models import TOLERANCE
from torch import Tensor
from torch.nn.functional import silu

from tidar.kernels.between import add_parts, embed_rows
from tidar.kernels.parts import (
    MAX_ROWS,
    ROW_TILE,
    SHARED_MEMORY,
    PartsConfig,
    aligned,
    default_config,
    gated_linear,
    linear_parts,
    row_tiles,
)

EPS = 1e-6

# Tiles that divide neither the 76 weight rows nor the 104 columns of the cases.
SMALL = PartsConfig(tile_n=32, tile_k=32, num_stages=2)


def draw(
    device: str, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)


def check(actual: Tensor, right: Tensor) -> None:
    """float32 within the tolerance of the laws; bfloat16 within the one rounding of its result."""
    assert actual.shape == right.shape
    budget = torch.full_like(right, TOLERANCE * float(right.abs().max()))
    if actual.dtype == torch.bfloat16:
        budget += right.abs() * 2.0**-8
    error = (actual.double() - right).abs()
    assert bool((error <= budget).all()), float((error / budget).max())


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm in float64."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS) * weight.double()


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 40, 72, 80, 96, 112, ROW_TILE])
@pytest.mark.parametrize("row_tile", [32, ROW_TILE])
def test_row_tiles_hold_all_rows_and_waste_less_than_half(rows: int, row_tile: int) -> None:
    head, rest = row_tiles(rows, row_tile)
    rows = min(rows, row_tile)
    for tile in (head, rest):
        assert tile == 0 or tile & (tile - 1) == 0
    assert head >= max(16, rest)
    assert rows <= head + rest <= max(16, 2 * rows - 1)
    assert rows > head or rest == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 5, 40, 72, 130])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("row_tile", [16, ROW_TILE])
def test_parts_add_up_to_the_product(device: str, rows: int, splits: int, row_tile: int) -> None:
    x, weight = draw(device, rows, 104), draw(device, 76, 104)
    parts = linear_parts(x, weight, config=replace(SMALL, splits=splits, row_tile=row_tile))
    assert parts.shape == (splits, rows, 76)
    check(parts.sum(0), x.double() @ weight.double().T)
    # Each part is the product over its own columns: 2 of the 4 tiles of columns, and nothing twice.
    share = 32 * -(-4 // splits)
    for part, columns, weights in zip(
        parts, x.double().split(share, 1), weight.double().split(share, 1), strict=False
    ):
        assert torch.allclose(part.double(), columns @ weights.T, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [3, 40, 130])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("row_tile", [16, ROW_TILE])
def test_gated_equals_plain_arithmetic(device: str, rows: int, biased: bool, row_tile: int) -> None:
    x, weight = draw(device, rows, 104), draw(device, 2 * 76, 104, scale=0.1)
    bias = draw(device, 2 * 76) if biased else None
    sums = x.double() @ weight.double().T
    gate, up = (sums if bias is None else sums + bias.double()).chunk(2, dim=1)
    config = replace(SMALL, row_tile=row_tile)
    check(gated_linear(x, weight, bias, config=config), silu(gate) * up)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_parts_go_into_the_stream(device: str, splits: int, biased: bool) -> None:
    parts, stream, weight = (
        draw(device, splits, 5, 72),
        draw(device, 5, 72),
        draw(device, 72, seed=2),
    )
    bias = draw(device, 72, seed=1) if biased else None
    right = stream.double() + parts.double().sum(0)
    if bias is not None:
        right += bias.double()
    out = add_parts(parts, stream, bias=bias, norm_weight=weight, eps=EPS)
    check(stream, right)
    check(out, normed(right, weight))


@pytest.mark.parametrize("device", DEVICES)
def test_embedding_and_first_norm(device: str) -> None:
    table, weight = draw(device, 9, 72), draw(device, 72, seed=2)
    ids = torch.tensor([3, 0, 8, 3], device=device)
    stream, out = embed_rows(ids, table, norm_weight=weight, eps=EPS)
    assert torch.equal(stream, table[ids])
    check(out, normed(table[ids].double(), weight))
    stream, out = embed_rows(ids, table)
    assert out is stream
    assert torch.equal(stream, table[ids])


@pytest.mark.parametrize("shape", [(2048, 1536), (1536, 8960), (6144, 4096), (384, 384), (40, 24)])
@pytest.mark.parametrize("rows", [3, 80, ROW_TILE, MAX_ROWS])
@pytest.mark.parametrize("gated", [False, True])
def test_default_cuts(shape: tuple[int, int], rows: int, gated: bool) -> None:
    """No split without work, about a program per multiprocessor, within its memory."""
    for itemsize in (2, 4):
        config = default_config(rows, *shape, gated, itemsize=itemsize)
        steps = -(-shape[1] // config.tile_k)
        assert config.splits * -(-steps // config.splits) - steps < -(-steps // config.splits)
        tiles = -(-shape[0] // config.tile_n)
        assert config.splits == 1 or config.splits * tiles <= 132
        stage = (
            (config.tile_n * (1 + gated) + sum(row_tiles(rows, config.row_tile)))
            * config.tile_k
            * itemsize
        )
        assert config.num_stages * stage <= SHARED_MEMORY


@pytest.mark.parametrize("device", DEVICES)
def test_wrong_arguments_are_refused(device: str) -> None:
    weight = draw(device, 76, 104)
    with pytest.raises(AssertionError, match="one launch takes"):
        linear_parts(draw(device, MAX_ROWS + 1, 104), weight, config=SMALL)
    with pytest.raises(AssertionError):
        linear_parts(draw(device, 3, 103), weight, config=SMALL)
    odd = draw(device, 76, 101)
    assert not aligned(odd)
    with pytest.raises(AssertionError):
        linear_parts(draw(device, 3, 101), odd, config=SMALL)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("pdl", [False, True], ids=["plain", "pdl"])
@pytest.mark.parametrize("rows", [8, 80, 112])
@pytest.mark.parametrize(("n", "k"), [(2048, 1536), (1536, 8960), (4096, 4096), (640, 384)])
def test_default_cuts_on_cuda(n: int, k: int, rows: int, pdl: bool) -> None:
    """bfloat16 at the sizes of real models: sums are float32, so the parts are nearly exact."""
    x = draw("cuda", rows, k, dtype=torch.bfloat16)
    weight = draw("cuda", n, k, scale=k**-0.5, dtype=torch.bfloat16)
    config = default_config(rows, n, k)
    right = x.double() @ weight.double().T
    check(linear_parts(x, weight, config=config, pdl=pdl).sum(0), right)
    config = default_config(rows, n, k, True)
    gate, up = right.chunk(2, dim=1)
    check(gated_linear(x, weight, None, config=config, pdl=pdl), silu(gate) * up)
