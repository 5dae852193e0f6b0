"""Linear layers for the 2 to 256 rows of a decode step, by matrix units: every weight read once or twice.

A tile of weight rows is multiplied with all rows of x (with 128 at a time, or fewer where the weights are
few), so the programs share out the weights and little else. Where that leaves multiprocessors idle the
columns are shared out as well: the result then comes in float32 parts, and whatever runs next, which would
have to read it anyway, adds them up (`tidar.kernels.between.add_parts`, `tidar.kernels.rotary`). No
atomics: sums are the same every time. While the kernel before still runs, each program reads ahead.
"""

# Triton has no types that mypy could read, so its decorator hides those of the kernels.
# mypy: disable-error-code="untyped-decorator"

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tidar.kernels.ahead import ask_rows_ahead
from tidar.kernels.launch import early

MAX_ROWS = 256
"""Rows that one launch takes."""

ROW_TILE = 128
"""The most rows that one program takes."""

MIN_TILE = 16
"""Rows of the smallest product that matrix units do."""

TINY_PRODUCT, SMALL_PRODUCT = 1_000_000, 4_000_000
"""Weights up to which smaller tiles of rows are faster (one H200)."""

LINES_AHEAD = 2
"""Cache lines of each of its weight rows that a program reads ahead; more were slower (one H200)."""

ALIGNMENT = 16
"""Bytes at which rows of x and of the weights must start, for the GPU's copy engine."""

SHARED_MEMORY = 227 << 10
"""Bytes of shared memory that a program may have on a Hopper GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsConfig:
    """How one launch is cut up; changes speed, and results by rounding only.

    Attributes:
        tile_n: weight rows of a program, a power of two from 16; gated: so many gate rows and up rows.
        tile_k: columns per loop step, a power of two from 16.
        splits: programs that share the columns of a tile; each leaves a part. 1 where gated.
        num_stages: loop steps whose loads are under way at a time.
        row_tile: rows of a program, a power of two from 16 to `ROW_TILE`.
    """

    tile_n: int
    tile_k: int
    splits: int = 1
    row_tile: int = ROW_TILE
    num_stages: int = 4
    num_warps: int = 4


def row_tiles(rows: int, row_tile: int = ROW_TILE) -> tuple[int, int]:
    """Two powers of two (the second may be 0) that hold a program's rows with little room left."""
    rows = min(rows, row_tile)
    whole = max(MIN_TILE, triton.next_power_of_2(rows))
    head = whole // 2
    if rows <= head or head < MIN_TILE:
        return whole, 0
    rest = max(MIN_TILE, triton.next_power_of_2(rows - head))
    return (head, rest) if rest < head else (whole, 0)


@cache
def default_config(
    rows: int,
    n: int,
    k: int,
    gated: bool = False,
    *,
    itemsize: int = 2,
    sms: int = 132,
    shared_memory: int = SHARED_MEMORY,
) -> PartsConfig:
    """The configuration to use where nothing was measured: about one program a multiprocessor.

    rows: of x. n: weight rows, gate and up counted both. k: columns. itemsize: bytes of a number. sms,
    shared_memory: multiprocessors of the GPU, and bytes of each for a program.
    """
    tile_k = (64 if gated else 128) if itemsize <= 2 else 32
    tile_n = 64  # what the matrix units take at a time
    row_tile = _row_tile(rows, n * k)
    steps = triton.cdiv(k, tile_k)
    programs = triton.cdiv(n, tile_n) * triton.cdiv(rows, row_tile)
    splits = 1 if gated else max(1, min(sms // programs, steps))
    own_steps = triton.cdiv(steps, splits)
    stage = (tile_n * (2 if gated else 1) + sum(row_tiles(rows, row_tile))) * tile_k * itemsize
    # Memory for more stages than there are steps would only keep the next kernel from starting early.
    most = 3 if gated and rows > 96 else 4
    stages = max(2, min(most, own_steps, shared_memory // stage))
    return PartsConfig(
        tile_n=tile_n,
        tile_k=tile_k,
        splits=triton.cdiv(steps, own_steps),  # none without work
        row_tile=row_tile,
        num_stages=stages,
    )


def _row_tile(rows: int, weights: int) -> int:
    """Rows of a program: few where the weights are, which several programs then read from the L2 cache."""
    if weights <= TINY_PRODUCT:
        return 32
    return 64 if weights <= SMALL_PRODUCT and rows > 96 else ROW_TILE


@triton.jit
def _product(
    weight: tl.tensor,
    x: tl.tensor,
    total: tl.tensor,
) -> tl.tensor:
    """Weights `[N, K]` times rows `[M, K]`, added to `[N, M]`."""
    return tl.dot(weight, tl.trans(x), total, input_precision="ieee")


@triton.jit
def _store(
    out: tl.tensor,
    result: tl.tensor,
    column: tl.tensor,
    columns: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
) -> None:
    """`[N, M]` to the rows `row` and columns `column` of `out`."""
    at = out + row[None, :] * columns + column[:, None]
    real = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows", "steps"])
def _parts_kernel(
    x_head: tl.tensor,
    x_rest: tl.tensor,
    weight: tl.tensor,
    matrix: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    steps: tl.tensor,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    HEAD: tl.constexpr,
    REST: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Grid: (tiles of rows, tiles of weight rows, splits); x_head, x_rest, weight: descriptors.

    A tile of rows: HEAD + REST; REST where one tile holds all of them.
    """
    first_m = tl.program_id(0) * HEAD
    first_n = tl.program_id(1) * TILE_N
    split = tl.program_id(2)
    first_k = split * steps * TILE_K
    if PDL:
        ask_rows_ahead(matrix, first_n, first_k, n, k, TILE_N, AHEAD)
        tl.extra.cuda.gdc_wait()
    head = tl.zeros((TILE_N, HEAD), tl.float32)
    if REST > 0:
        rest = tl.zeros((TILE_N, REST), tl.float32)
    # What lies behind the last row or column loads as zeros.
    for at in tl.range(first_k, tl.minimum(first_k + steps * TILE_K, k), TILE_K):
        tile = weight.load([first_n, at])
        x = x_head.load([first_m, at])
        if REST > 0:
            more = x_rest.load([HEAD, at])
        head = _product(tile, x, head)
        if REST > 0:
            rest = _product(tile, more, rest)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    column = first_n + tl.arange(0, TILE_N)
    part = out + split.to(tl.int64) * rows * n
    _store(part, head, column, n, first_m + tl.arange(0, HEAD), rows)
    if REST > 0:
        _store(part, rest, column, n, HEAD + tl.arange(0, REST), rows)


@triton.jit(do_not_specialize=["rows"])
def _gated_kernel(
    x_head: tl.tensor,
    x_rest: tl.tensor,
    weight: tl.tensor,
    matrix: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    k: tl.tensor,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    HEAD: tl.constexpr,
    REST: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """TILE_N columns of the result, from as many gate and up rows; grid: (tiles of rows, of columns)."""
    first_m = tl.program_id(0) * HEAD
    first_n = tl.program_id(1) * TILE_N
    if PDL:
        ask_rows_ahead(matrix, first_n, 0, 2 * size, k, TILE_N, AHEAD)
        ask_rows_ahead(matrix, size + first_n, 0, 2 * size, k, TILE_N, AHEAD)
        tl.extra.cuda.gdc_wait()
    gate_head = tl.zeros((TILE_N, HEAD), tl.float32)
    up_head = tl.zeros((TILE_N, HEAD), tl.float32)
    if REST > 0:
        gate_rest = tl.zeros((TILE_N, REST), tl.float32)
        up_rest = tl.zeros((TILE_N, REST), tl.float32)
    for at in tl.range(0, k, TILE_K):
        gate = weight.load([first_n, at])
        x = x_head.load([first_m, at])
        up = weight.load([size + first_n, at])
        if REST > 0:
            more = x_rest.load([HEAD, at])
        gate_head = _product(gate, x, gate_head)
        up_head = _product(up, x, up_head)
        if REST > 0:
            gate_rest = _product(gate, more, gate_rest)
            up_rest = _product(up, more, up_rest)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    column = first_n + tl.arange(0, TILE_N)
    if bias is not None:
        inside = column < size
        gate_bias = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[:, None]
        up_bias = tl.load(bias + size + column, mask=inside, other=0.0).to(tl.float32)[:, None]
        gate_head += gate_bias
        up_head += up_bias
        if REST > 0:
            gate_rest += gate_bias
            up_rest += up_bias
    result = gate_head * tl.sigmoid(gate_head) * up_head
    _store(out, result, column, size, first_m + tl.arange(0, HEAD), rows)
    if REST > 0:
        result = gate_rest * tl.sigmoid(gate_rest) * up_rest
        _store(out, result, column, size, HEAD + tl.arange(0, REST), rows)


def device_shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have on this GPU."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def aligned(matrix: Tensor) -> bool:
    """Whether the GPU's copy engine reads this matrix: contiguous, each row at a multiple of 16 bytes."""
    row = matrix.shape[1] * matrix.element_size()
    return matrix.is_contiguous() and matrix.data_ptr() % ALIGNMENT == 0 and row % ALIGNMENT == 0


def _descriptors(
    x: Tensor, weight: Tensor, config: PartsConfig
) -> tuple[TensorDescriptor, TensorDescriptor | None, TensorDescriptor, int, int]:
    """Both tiles of x and the weights as the copy engine sees them, and the rows of the two tiles."""
    assert x.shape[1] == weight.shape[1], (x.shape, weight.shape)
    assert x.dtype == weight.dtype, (x.dtype, weight.dtype)
    assert 1 <= len(x) <= MAX_ROWS, f"{len(x)} rows; one launch takes 1 to {MAX_ROWS}"
    assert aligned(x), (x.shape, x.stride(), x.dtype)
    assert aligned(weight), (weight.shape, weight.stride(), weight.dtype)
    head, rest = row_tiles(len(x), config.row_tile)

    def describe(tensor: Tensor, rows: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor, [rows, config.tile_k])

    return (
        describe(x, head),
        describe(x, rest) if rest else None,
        describe(weight, config.tile_n),
        head,
        rest,
    )


def linear_parts(x: Tensor, weight: Tensor, *, config: PartsConfig, pdl: bool = False) -> Tensor:
    """`x @ weight.T` of 1 to 256 rows as float32 parts `[splits, M, N]`, whose sum over dim 0 it is.

    Args:
        x: `[M, K]`, contiguous.
        weight: `[N, K]`, contiguous, of x's dtype; a row of either is a multiple of 16 bytes (`aligned`).
        config: how to cut the launch up.
        pdl: programmatic dependent launch; CUDA on Hopper or later only.
    """
    (rows, k), n = x.shape, weight.shape[0]
    x_head, x_rest, weights, head, rest = _descriptors(x, weight, config)
    out = torch.empty(config.splits, rows, n, dtype=torch.float32, device=x.device)
    steps = triton.cdiv(triton.cdiv(k, config.tile_k), config.splits)
    _parts_kernel[(triton.cdiv(rows, config.row_tile), triton.cdiv(n, config.tile_n), config.splits)](
        x_head, x_rest, weights, weight, out, rows, n, k, steps,
        TILE_N=config.tile_n, TILE_K=config.tile_k, HEAD=head, REST=rest, AHEAD=LINES_AHEAD, PDL=pdl,
        num_warps=config.num_warps, num_stages=config.num_stages,
        **early(pdl),
    )  # fmt: skip
    return out


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    config: PartsConfig,
    pdl: bool = False,
) -> Tensor:
    """`silu(x @ gate.T) * (x @ up.T)` of 1 to 256 rows: `[M, N / 2]` in x's dtype.

    weight: `[N, K]`, N/2 gate rows, then N/2 up rows; bias: `[N]` or None. Otherwise as `linear_parts`.
    """
    (rows, k), size = x.shape, weight.shape[0] // 2
    x_head, x_rest, weights, head, rest = _descriptors(x, weight, config)
    out = x.new_empty(rows, size)
    _gated_kernel[(triton.cdiv(rows, config.row_tile), triton.cdiv(size, config.tile_n))](
        x_head, x_rest, weights, weight, bias, out, rows, size, k,
        TILE_N=config.tile_n, TILE_K=config.tile_k, HEAD=head, REST=rest, AHEAD=LINES_AHEAD, PDL=pdl,
        num_warps=config.num_warps, num_stages=config.num_stages,
        **early(pdl),
    )  # fmt: skip
    return out
