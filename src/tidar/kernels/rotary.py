"""Rotary embedding of queries and keys in place, and the store of draft rows into KV pages.

One kernel between the merged q, k, v projection and attention: the optional RMSNorm of each query and
key head, RoPE at explicit positions, and the copy of the draft rows' keys and values to their cache
slots. Positions come as a tensor and never from the row index: clean and mask rows repeat them.
"""

# Triton has no types that mypy could read, so its decorator hides those of the kernel.
# mypy: disable-error-code="untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from tidar.kernels.launch import early

HEADS_PER_PROGRAM = 4


@triton.jit
def _projected(
    qkv: tl.tensor,
    parts: tl.tensor,
    bias: tl.tensor,
    at: tl.tensor,
    column: tl.tensor,
    real: tl.tensor,
    part_stride: tl.tensor,
    SPLITS: tl.constexpr,
) -> tl.tensor:
    """Entries `at` of the projection: as `qkv` has them, or the sum of its parts and bias."""
    if parts is None:
        entries = tl.load(qkv + at, mask=real, other=0.0)
    else:
        total = tl.load(parts + at, mask=real, other=0.0)
        for split in tl.static_range(1, SPLITS):
            total += tl.load(parts + split * part_stride + at, mask=real, other=0.0)
        if bias is not None:
            total += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
        entries = total.to(qkv.dtype.element_ty)
    return entries


@triton.jit(do_not_specialize=["table_width", "num_drafts", "num_rows"])
def _rotary_kernel(
    qkv: tl.tensor,
    parts: tl.tensor,
    bias: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    key_pages: tl.tensor,
    value_pages: tl.tensor,
    page_table: tl.tensor,
    prefix_lens: tl.tensor,
    qkv_stride: tl.tensor,
    part_stride: tl.tensor,
    cos_stride: tl.tensor,
    key_page_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_page_stride: tl.tensor,
    value_head_stride: tl.tensor,
    table_stride: tl.tensor,
    table_width: tl.tensor,
    num_drafts: tl.tensor,
    num_rows: tl.tensor,
    eps: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_TILE: tl.constexpr,
    TILE_H: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """TILE_H heads of one row; grid (rows of all sequences, groups of heads)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    HALF: tl.constexpr = HEAD_DIM // 2
    row = tl.program_id(0)
    head = tl.program_id(1) * TILE_H + tl.arange(0, TILE_H)
    dim = tl.arange(0, HALF_TILE)[None, :]
    within = dim < HALF
    real = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & within
    # What the whole step shares, and weights, need not wait for the kernel before.
    angle = tl.load(positions + row).to(tl.int64) * cos_stride + dim
    # The table's sines are signed (RotaryEmbedding): swapping the halves is all that is left to do.
    cos_first = tl.load(cos + angle, mask=within, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + angle + HALF, mask=within, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + angle, mask=within, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + angle + HALF, mask=within, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    # Both halves of a head live in one thread, which reads and then writes them.
    column = head[:, None] * HEAD_DIM + dim
    at = row.to(tl.int64) * qkv_stride + column
    raw_first = _projected(qkv, parts, bias, at, column, real, part_stride, SPLITS)
    raw_second = _projected(qkv, parts, bias, at + HALF, column + HALF, real, part_stride, SPLITS)
    first, second = raw_first.to(tl.float32), raw_second.to(tl.float32)
    if q_norm is not None:
        total = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = tl.rsqrt(total / HEAD_DIM + eps)[:, None]
        is_query = (head < NUM_HEADS)[:, None]
        weight_first = tl.where(
            is_query,
            tl.load(q_norm + dim, mask=within, other=0.0).to(tl.float32),
            tl.load(k_norm + dim, mask=within, other=0.0).to(tl.float32),
        )
        weight_second = tl.where(
            is_query,
            tl.load(q_norm + HALF + dim, mask=within, other=0.0).to(tl.float32),
            tl.load(k_norm + HALF + dim, mask=within, other=0.0).to(tl.float32),
        )
        first = (first * scale * weight_first).to(raw_first.dtype).to(tl.float32)
        second = (second * scale * weight_second).to(raw_first.dtype).to(tl.float32)
    turned_first = first * cos_first + second * sin_first
    turned_second = second * cos_second + first * sin_second
    turned_first = turned_first.to(raw_first.dtype)
    turned_second = turned_second.to(raw_first.dtype)
    # Values stay as they come. Where threads outnumber the tile several hold the same numbers, and none
    # may write before all have read.
    tl.debug_barrier()
    turns = real & (head < NUM_HEADS + NUM_KV_HEADS)[:, None]
    tl.store(qkv + at, turned_first, mask=turns)
    tl.store(qkv + at + HALF, turned_second, mask=turns)
    if parts is not None:
        stays = real & (head >= NUM_HEADS + NUM_KV_HEADS)[:, None]
        tl.store(qkv + at, raw_first, mask=stays)
        tl.store(qkv + at + HALF, raw_second, mask=stays)

    draft = row % num_rows
    if draft < num_drafts:
        sequence = row // num_rows
        position = tl.load(prefix_lens + sequence).to(tl.int32) + draft
        entry = position // PAGE_SIZE
        if entry < table_width:
            page = tl.load(page_table + sequence * table_stride + entry).to(tl.int64)
            slot = position % PAGE_SIZE * HEAD_DIM + dim
            key_head = (head - NUM_HEADS)[:, None]
            is_key = real & (key_head >= 0) & (key_head < NUM_KV_HEADS)
            to = key_pages + page * key_page_stride + key_head * key_head_stride + slot
            tl.store(to, turned_first, mask=is_key)
            tl.store(to + HALF, turned_second, mask=is_key)
            value_head = key_head - NUM_KV_HEADS
            is_value = real & (value_head >= 0)
            to = value_pages + page * value_page_stride + value_head * value_head_stride + slot
            tl.store(to, raw_first, mask=is_value)
            tl.store(to + HALF, raw_second, mask=is_value)


def _check(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    norms: tuple[Tensor | None, Tensor | None],
    pages: tuple[Tensor, Tensor],
    page_table: Tensor,
    prefix_lens: Tensor,
    shape: tuple[int, int, int],
) -> None:
    """AssertionError for what the kernel would read wrong; shape: rows, heads of q, k, v, head_dim."""
    rows, heads, head_dim = shape
    count = len(prefix_lens) * rows
    assert qkv.shape == (count, heads * head_dim), (qkv.shape, count, heads, head_dim)
    assert qkv.stride(1) == 1, qkv.stride()
    assert positions.shape == (count,), (positions.shape, count)
    assert positions.is_contiguous()
    for table in (cos, sin):
        assert table.shape[1] == head_dim, (table.shape, head_dim)
        assert table.stride() == (cos.stride(0), 1), table.stride()
    assert (norms[0] is None) == (norms[1] is None), "q_norm and k_norm go together"
    for norm in norms:
        assert norm is None or (norm.shape == (head_dim,) and norm.is_contiguous())
    assert pages[0].shape == pages[1].shape, (pages[0].shape, pages[1].shape)
    for page in pages:
        assert page.stride()[2:] == (head_dim, 1), page.stride()
    assert page_table.shape[0] == len(prefix_lens), (page_table.shape, len(prefix_lens))
    assert page_table.stride(1) == 1, page_table.stride()
    assert prefix_lens.is_contiguous()


def _check_parts(qkv: Tensor, parts: Tensor | None, bias: Tensor | None) -> None:
    """AssertionError for parts of another shape than qkv's."""
    if parts is None:
        assert bias is None, "a bias goes with parts"
    else:
        assert parts.shape[1:] == qkv.shape, (parts.shape, qkv.shape)
        assert parts.is_contiguous(), parts.stride()
        assert qkv.is_contiguous(), qkv.stride()


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    prefix_lens: Tensor,
    num_drafts: int,
    rows: int,
    parts: Tensor | None = None,
    bias: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Norms and rotates the queries and keys of a step in place, and stores its draft rows in the cache.

    Of B sequences with W = `rows` tail rows each, the first `num_drafts` rows of sequence b go to the
    positions from `prefix_lens[b]` on; rows behind the last entry of the page table are not stored.
    Neither allocates nor waits.

    Args:
        qkv: `[B * W, (num_heads + 2 * num_kv_heads) * head_dim]`, rows at any stride.
        cos, sin: `[max_positions, head_dim]` in qkv's dtype, sines signed, as `RotaryEmbedding` makes them.
        positions: int32 or int64 `[B * W]`.
        q_norm, k_norm: `[head_dim]`, weights of the RMSNorm of each head; or both None.
        eps: of those norms.
        key_pages, value_pages: `[num_pages, num_kv_heads, page_size, head_dim]`.
        page_table: int `[B, max_pages]`, the pages of each sequence in order.
        prefix_lens: int `[B]`, committed tokens.
        num_drafts: 0 to W.
        parts: float32 `[splits, *qkv.shape]`, contiguous: qkv, which is then only written, is their sum.
        bias: `[(num_heads + 2 * num_kv_heads) * head_dim]`, added to the parts; only with them.
        pdl: programmatic dependent launch; CUDA on Hopper or later only. Positions are then read before
            the kernel before has ended; see `tidar.kernels.launch.early`.
    """
    heads = num_heads + 2 * num_kv_heads
    head_dim, page_size = key_pages.shape[3], key_pages.shape[2]
    _check(
        qkv, cos, sin, positions, (q_norm, k_norm), (key_pages, value_pages), page_table, prefix_lens,
        (rows, heads, head_dim),
    )  # fmt: skip
    _check_parts(qkv, parts, bias)
    half_tile = triton.next_power_of_2(head_dim // 2)
    tile_h = min(HEADS_PER_PROGRAM, triton.next_power_of_2(heads))
    _rotary_kernel[(len(qkv), triton.cdiv(heads, tile_h))](
        qkv, parts, bias, cos, sin, positions, q_norm, k_norm, key_pages, value_pages, page_table,
        prefix_lens, qkv.stride(0), qkv.numel(), cos.stride(0), key_pages.stride(0), key_pages.stride(1),
        value_pages.stride(0), value_pages.stride(1), page_table.stride(0), page_table.shape[1],
        num_drafts, rows, eps,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, HALF_TILE=half_tile,
        TILE_H=tile_h, PAGE_SIZE=page_size, SPLITS=1 if parts is None else len(parts), PDL=pdl,
        num_warps=max(1, min(4, tile_h * half_tile // 256)), **early(pdl),
    )  # fmt: skip
