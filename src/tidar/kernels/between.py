"""What stands between the matrix products of a step: embedding, sums of parts, RMSNorm, activation.

What is a weight is loaded before a kernel waits for the one before it.
"""

# Triton has no types that mypy could read, so its decorator hides those of the kernels.
# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidar.kernels.launch import early

GATED_TILE = 1024


@triton.jit
def _gated_kernel(
    gate_up: tl.tensor,
    out: tl.tensor,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One row, one tile of columns."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = column < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + column, mask=real, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + column, mask=real, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * SIZE + column, result.to(out.dtype.element_ty), mask=real)


def gated(gate_up: Tensor, *, pdl: bool = False) -> Tensor:
    """silu(gate) * up: `[M, 2 * size]`, gate first, contiguous, to `[M, size]`.

    pdl: programmatic dependent launch; CUDA on Hopper or later only.
    """
    rows, both = gate_up.shape
    assert gate_up.is_contiguous(), gate_up.stride()
    size = both // 2
    out = gate_up.new_empty(rows, size)
    _gated_kernel[(rows, triton.cdiv(size, GATED_TILE))](
        gate_up, out, SIZE=size, TILE=GATED_TILE, PDL=pdl, num_warps=4,
        **early(pdl),
    )  # fmt: skip
    return out


@triton.jit
def _store_normed(
    values: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    column: tl.tensor,
    real: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    """RMSNorm of a row to the row at `out`; values, weights: float32 `[TILE]`, zeros where not `real`."""
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / SIZE + eps)
    result = values * scale * weights
    tl.store(out + column, result.to(out.dtype.element_ty), mask=real)


@triton.jit
def _norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    real = column < SIZE
    weights = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    values = tl.load(x + row * SIZE + column, mask=real, other=0.0).to(tl.float32)
    _store_normed(values, weights, out + row * SIZE, column, real, eps, SIZE)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, pdl: bool = False) -> Tensor:
    """RMSNorm of rows `[M, size]`, contiguous; weight `[size]`.

    pdl: programmatic dependent launch; CUDA on Hopper or later only.
    """
    rows, size = x.shape
    assert x.is_contiguous(), x.stride()
    assert weight.shape == (size,), weight.shape
    out = torch.empty_like(x)
    tile = triton.next_power_of_2(size)
    _norm_kernel[(rows,)](
        x, weight, out, eps, SIZE=size, TILE=tile, PDL=pdl, num_warps=max(1, min(8, tile // 512)),
        **early(pdl),
    )  # fmt: skip
    return out


@triton.jit
def _add_kernel(
    parts: tl.tensor,
    bias: tl.tensor,
    stream: tl.tensor,
    norm_weight: tl.tensor,
    out: tl.tensor,
    part_stride: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    real = column < SIZE
    weights = tl.load(norm_weight + column, mask=real, other=0.0).to(tl.float32)
    added = tl.zeros((TILE,), tl.float32)
    if bias is not None:
        added += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    total = tl.load(parts + row * SIZE + column, mask=real, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + split * part_stride + row * SIZE + column, mask=real, other=0.0)
    total += added
    at = stream + row * SIZE + column
    total += tl.load(at, mask=real, other=0.0).to(tl.float32)
    # The norm reads what the stream keeps of the sum, not the sum.
    kept = total.to(stream.dtype.element_ty)
    tl.store(at, kept, mask=real)
    values = kept.to(tl.float32)
    _store_normed(values, weights, out + row * SIZE, column, real, eps, SIZE)


def add_parts(
    parts: Tensor,
    stream: Tensor,
    *,
    bias: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    pdl: bool = False,
) -> Tensor:
    """Adds a product's parts and bias to the residual stream in place; returns its RMSNorm.

    Args:
        parts: float32 `[splits, M, size]`, contiguous, of `tidar.kernels.parts.linear_parts`.
        stream: `[M, size]`, contiguous.
        bias: `[size]`.
        norm_weight: `[size]`, with `eps`.
        pdl: programmatic dependent launch; CUDA on Hopper or later only.
    """
    splits, rows, size = parts.shape
    assert stream.shape == (rows, size), (stream.shape, parts.shape)
    assert stream.is_contiguous(), stream.stride()
    assert parts.is_contiguous(), parts.stride()
    assert all(vector is None or vector.shape == (size,) for vector in (bias, norm_weight))
    out = torch.empty_like(stream)
    tile = triton.next_power_of_2(size)
    _add_kernel[(rows,)](
        parts, bias, stream, norm_weight, out, rows * size, eps,
        SIZE=size, TILE=tile, SPLITS=splits, PDL=pdl, num_warps=max(1, min(8, tile // 256)),
        **early(pdl),
    )  # fmt: skip
    return out


@triton.jit
def _embed_kernel(
    ids: tl.tensor,
    table: tl.tensor,
    norm_weight: tl.tensor,
    stream: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    real = column < SIZE
    entry = tl.load(table + tl.load(ids + row) * SIZE + column, mask=real, other=0.0)
    tl.store(stream + row * SIZE + column, entry, mask=real)
    if norm_weight is not None:
        values = entry.to(tl.float32)
        weights = tl.load(norm_weight + column, mask=real, other=0.0).to(tl.float32)
        _store_normed(values, weights, out + row * SIZE, column, real, eps, SIZE)


def embed_rows(
    ids: Tensor,
    table: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """The residual stream `[M, size]` of tokens `ids` int64 `[M]`, and its RMSNorm.

    table: `[V, size]`, contiguous. norm_weight: `[size]`, with `eps`; where None the stream stands for its
    norm. pdl: programmatic dependent launch; CUDA on Hopper or later only.
    """
    (rows,), size = ids.shape, table.shape[1]
    assert table.is_contiguous(), table.stride()
    assert ids.is_contiguous(), ids.stride()
    assert norm_weight is None or norm_weight.shape == (size,), norm_weight.shape
    stream = table.new_empty(rows, size)
    out = stream if norm_weight is None else torch.empty_like(stream)
    tile = triton.next_power_of_2(size)
    _embed_kernel[(rows,)](
        ids, table, norm_weight, stream, out, eps,
        SIZE=size, TILE=tile, PDL=pdl, num_warps=max(1, min(8, tile // 256)),
        **early(pdl),
    )  # fmt: skip
    return stream, out
