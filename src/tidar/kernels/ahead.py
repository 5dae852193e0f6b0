"""Reading ahead: what a kernel asks the memory for while the kernel before it still runs."""

# mypy: disable-error-code="untyped-decorator"
# (triton has no types; its kernels are annotated for the reader)

import triton
import triton.language as tl

LINE = tl.constexpr(128)
"""Bytes of a cache line."""


@triton.jit
def ask_ahead(at: tl.tensor) -> None:
    """Has the cache lines of the pointers `at` brought into L2, and waits for nothing. CUDA only."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [at.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def ask_rows_ahead(
    matrix: tl.tensor,
    first: tl.tensor,
    column: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    TILE_N: tl.constexpr,
    LINES: tl.constexpr,
) -> None:
    """`LINES` cache lines from `column` on of TILE_N rows of a matrix `[n, k]`."""
    row = tl.minimum(first + tl.arange(0, TILE_N), n - 1).to(tl.int64)
    PER_LINE: tl.constexpr = LINE * 8 // matrix.dtype.element_ty.primitive_bitwidth
    for line in tl.static_range(LINES):
        ask_ahead(matrix + row * k + tl.minimum(column + line * PER_LINE, k - 1))


@triton.jit
def ask_vectors_ahead(at: tl.tensor, SIZE: tl.constexpr) -> None:
    """All of the vectors of SIZE elements at the pointers `at` `[N]`."""
    PER_LINE: tl.constexpr = LINE * 8 // at.dtype.element_ty.primitive_bitwidth
    for line in tl.static_range((SIZE + PER_LINE - 1) // PER_LINE):
        ask_ahead(at + line * PER_LINE)
