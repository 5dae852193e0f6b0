"""A linear layer for one row, with what surrounds it in a transformer layer fused in.

`out = act(rmsnorm(x) @ weight.T + bias) + residual`, where the norm, the bias, the activation (SwiGLU,
weight rows gate then up) and the residual are each optional. At one row the weights are all that
matters: each is read from memory exactly once, and multiplied without matrix units. From two rows on
those are faster (`tidar.kernels.parts`). The norm's scale is applied behind the product, so its sum of
squares comes from the x that the product reads anyway.
"""

# Triton has no types that mypy could read, so its decorator hides those of the kernels.
# mypy: disable-error-code="untyped-decorator"

from dataclasses import dataclass, replace
from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from tidar.kernels.launch import early

WARP_K = 256
"""Neighbouring 16-bit weights that a warp loads at once, 16 bytes a thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearConfig:
    """How one launch is cut up; changes speed, and results by rounding only.

    Attributes:
        tile_n: weight rows of a program, a power of two; gated: gate and up rows counted both.
        tile_k: k per loop step, a power of two.
        num_stages: loads under way at a time, through shared memory; 1 loads into registers.
        unroll: loop steps laid out side by side, with num_stages 1.
        pdl: programmatic dependent launch: start while the kernel before ends. CUDA on Hopper or
            later only.
    """

    tile_n: int
    tile_k: int
    num_warps: int = 4
    num_stages: int = 1
    unroll: int = 1
    pdl: bool = False


def _config(k: int, tile_n: int, warps: int, stages: int = 1) -> LinearConfig:
    """A launch whose warps stand side by side along k, as many of them as k has work for.

    With `WARP_K` for each warp a thread holds the x that belongs to its weights, and no warp waits for
    another inside the loop. Without stages eight loads per thread are under way, or all there are.
    """
    tile_k = min(WARP_K * warps, triton.next_power_of_2(k))
    unroll = min(triton.cdiv(k, tile_k), max(1, 8 // tile_n)) if stages == 1 else 1
    return LinearConfig(
        tile_n=tile_n,
        tile_k=tile_k,
        num_warps=max(1, tile_k // WARP_K),
        num_stages=stages,
        unroll=unroll,
    )


@cache
def default_config(n: int, k: int, gated: bool = False, *, pdl: bool = False) -> LinearConfig:
    """The configuration to use where nothing was measured.

    Measured on one H200, bfloat16:

    | launch | tile_n | tile_k | warps | stages | unroll |
    |---|---|---|---|---|---|
    | gated, or n >= 100 000; k <= 2048 | 4 | 1024 | 4 | 1 | 2 |
    | gated, or n >= 100 000; k > 2048 | 8 | 1024 | 4 | 4 | 1 |
    | k >= 8192 and n < 2048 | 2 | 1024 | 4 | 1 | 4 |
    | n * k >= 20 000 000 and k < 8192 | 4 | 512 | 2 | 1 | 2 |
    | any other | 1 | 256 | 1 | 1 | 8 |

    A small k makes tile_k, warps and unroll smaller.

    Args:
        n: weight rows, gate and up counted both. k: columns. pdl: programmatic dependent launch; CUDA on
            Hopper or later only.
    """
    stages = 1
    if gated or n >= 100_000:
        tile_n, warps, stages = (4, 4, 1) if k <= 2048 else (8, 4, 4)
    elif k >= 8192 and n < 2048:
        tile_n, warps = 2, 4
    elif n * k >= 20_000_000 and k < 8192:
        tile_n, warps = 4, 2
    else:
        tile_n, warps = 1, 1
    return replace(_config(k, tile_n, warps, stages), pdl=pdl)


@triton.jit
def _weight_rows(N: tl.constexpr, TILE_N: tl.constexpr, GATED: tl.constexpr) -> tl.tensor:
    """Weight rows `[TILE_N]` of this program; behind the last row it is repeated (and never stored).

    Gated: a gate row, its up row, the next gate row, ..., so that one program has both, side by side.
    """
    row = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    if N % TILE_N != 0:
        row = tl.minimum(row, N - 1)
    if GATED:
        row = row // 2 + (row % 2) * (N // 2)
    return row


@triton.jit
def _weight_tile(
    weight: tl.tensor, row: tl.tensor, k: tl.tensor, K: tl.constexpr, TILE_K: tl.constexpr
) -> tl.tensor:
    """Weights `[TILE_N, TILE_K]` of `row` and `k`, zero behind the last k; the L2 cache may forget them."""
    at = weight + row[:, None] * K + k[None, :]
    if K % TILE_K == 0:
        tile = tl.load(at, eviction_policy="evict_first")
    else:
        tile = tl.load(at, mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first")
    return tile.to(tl.float32)


@triton.jit
def _vector(at: tl.tensor, k: tl.tensor, K: tl.constexpr, TILE_K: tl.constexpr) -> tl.tensor:
    """`at[k]` in float32, zero behind the last k."""
    if K % TILE_K == 0:
        vector = tl.load(at + k)
    else:
        vector = tl.load(at + k, mask=k < K, other=0.0)
    return vector.to(tl.float32)


@triton.jit
def _columns(N: tl.constexpr, TILE_N: tl.constexpr, GATED: tl.constexpr) -> tl.tensor:
    """Columns of the result that this program has, and whether each exists."""
    if GATED:
        column = tl.program_id(0) * (TILE_N // 2) + tl.arange(0, TILE_N // 2)
        real = column < N // 2
    else:
        column = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
        real = column < N
    return column, real


@triton.jit
def _gemv_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    norm_weight: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GATED: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """TILE_N weight rows."""
    row = _weight_rows(N, TILE_N, GATED)
    column, real = _columns(N, TILE_N, GATED)
    if bias is not None:
        added = tl.load(bias + row).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    # Asked for here, to be there when the sums are.
    if residual is not None:
        kept = tl.load(residual + column, mask=real, other=0.0).to(tl.float32)
    # Products add up element by element; threads meet once, behind the loop.
    sums = tl.zeros((TILE_N, TILE_K), tl.float32)
    squares = tl.zeros((TILE_K,), tl.float32)
    # Stages named here, not at the launch: only so are loads without a `tl.dot` pipelined.
    for step in tl.range(0, tl.cdiv(K, TILE_K), num_stages=STAGES, loop_unroll_factor=UNROLL):
        k = step * TILE_K + tl.arange(0, TILE_K)
        tile = _weight_tile(weight, row, k, K, TILE_K)
        part = _vector(x, k, K, TILE_K)
        if norm_weight is not None:
            squares += part * part
            part *= _vector(norm_weight, k, K, TILE_K)
        sums += tile * part[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    result = tl.sum(sums, axis=1)
    if norm_weight is not None:
        result *= tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    if bias is not None:
        result += added
    if GATED:
        gate, up = tl.split(tl.reshape(result, (TILE_N // 2, 2)))
        result = gate * tl.sigmoid(gate) * up
    if residual is not None:
        result += kept
    tl.store(out + column, result.to(out.dtype.element_ty), mask=real)


def _check(
    x: Tensor,
    weight: Tensor,
    vectors: list[Tensor | None],
    rows: list[Tensor | None],
    width: int,
) -> None:
    """AssertionError for what the kernel would read wrong."""
    n, k = weight.shape
    assert x.shape == (1, k), f"{tuple(x.shape)}; one launch takes one row of {k}"
    assert weight.is_contiguous(), weight.stride()
    assert weight.dtype == x.dtype, (weight.dtype, x.dtype)
    assert n * k < 2**31, f"offsets into {n} x {k} weights do not fit 32 bits"
    assert x.stride(1) == 1, x.stride()
    for vector, length in zip(vectors, (n, k), strict=True):
        assert vector is None or (vector.shape == (length,) and vector.is_contiguous())
    for row in rows:
        assert row is None or (row.shape == (1, width) and row.stride(1) == 1)


def linear_row(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
    config: LinearConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`act(rmsnorm(x) @ weight.T + bias) + residual` for one row, reading each weight once.

    Sums are float32 throughout; the only rounding is that of the result. Neither allocates nor waits
    where `out` is given.

    Args:
        x: `[1, K]`.
        weight: `[N, K]`, contiguous, of x's dtype; gated: N/2 gate rows, then N/2 up rows.
        bias: `[N]`.
        norm_weight: `[K]`; x goes through an RMSNorm of this weight and `eps` first.
        residual: `[1, N]`, or `[1, N/2]` when gated; may be `out` itself.
        gated: the result is silu(gate) * up.
        config: how to cut the launch up; `default_config` where None.
        out: where to write, `[1, N]`, or `[1, N/2]` when gated, any float dtype; must not overlap x.

    Returns:
        `out`, or a new tensor of x's dtype.
    """
    n, k = weight.shape
    width = n // 2 if gated else n
    if out is None:
        out = x.new_empty(1, width)
    _check(x, weight, [bias, norm_weight], [residual, out], width)
    if config is None:
        config = default_config(n, k, gated)
    assert not gated or (n % 2 == 0 and config.tile_n >= 2), (n, config)
    _gemv_kernel[(triton.cdiv(n, config.tile_n),)](
        x, weight, norm_weight, bias, residual, out, eps,
        N=n, K=k, TILE_N=config.tile_n, TILE_K=config.tile_k, GATED=gated,
        STAGES=config.num_stages, UNROLL=config.unroll, PDL=config.pdl,
        num_warps=config.num_warps, **early(config.pdl),
    )  # fmt: skip
    return out
