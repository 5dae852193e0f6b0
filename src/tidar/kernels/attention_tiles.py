"""What both kernels of paged attention say the same way: vectors of a tile, and shares of the keys."""

# mypy: disable-error-code="untyped-decorator"
# (triton has no types; its kernels are annotated for the reader)

import triton
import triton.language as tl


@triton.jit
def load_vectors(
    at: tl.tensor,
    seen: tl.tensor,
    HEAD_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
) -> tl.tensor:
    """Vectors `[N, TILE_D]` at the pointers `at` `[N]`, zeros where not `seen` (None: all are)."""
    dims = tl.arange(0, TILE_D)[None, :]
    if seen is None:
        if HEAD_DIM == TILE_D:
            vectors = tl.load(at[:, None] + dims)
        else:
            mask = dims < HEAD_DIM
            vectors = tl.load(at[:, None] + dims, mask=mask, other=0.0)
    else:
        if HEAD_DIM == TILE_D:
            vectors = tl.load(at[:, None] + dims, mask=seen[:, None], other=0.0)
        else:
            mask = seen[:, None] & (dims < HEAD_DIM)
            vectors = tl.load(at[:, None] + dims, mask=mask, other=0.0)
    return vectors


@triton.jit
def store_vectors(
    at: tl.tensor,
    vectors: tl.tensor,
    real: tl.tensor,
    HEAD_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
) -> None:
    """Vectors `[M, TILE_D]` to the pointers `at` `[M]`, those that are `real`."""
    dims = tl.arange(0, TILE_D)[None, :]
    if HEAD_DIM == TILE_D:
        tl.store(at[:, None] + dims, vectors.to(at.dtype.element_ty), mask=real[:, None])
    else:
        mask = real[:, None] & (dims < HEAD_DIM)
        tl.store(at[:, None] + dims, vectors.to(at.dtype.element_ty), mask=mask)


@triton.jit
def share_of(
    length: tl.tensor,
    rows: tl.tensor,
    splits: tl.tensor,
    min_share: tl.tensor,
    TILE_N: tl.constexpr,
) -> tl.tensor:
    """Tiles of keys that a split takes, and how many splits that keeps busy."""
    tiles = tl.cdiv(length, TILE_N) + tl.cdiv(rows, TILE_N)
    share = tl.maximum(tl.cdiv(tiles, splits), min_share)
    return share, tl.cdiv(tiles, share)
