"""Paged attention of a decode step: the tail rows of each sequence over its prefix and over each other.

The query heads that share a key head are packed into one tile with the rows ("lanes", row-major), so
keys and values are read once per key head and tile of lanes. A sequence's keys are a row of tiles: its
prefix, page by page, then the tail; `splits` programs share that row evenly, in shares found from the
prefix length on the device, so that one captured CUDA graph serves every context length. Each leaves a
part; a second kernel adds the parts up in their order. (The program that arrives last could do that too,
but it alone: measured, a launch of its own for the whole device takes less time.)
"""

# mypy: disable-error-code="untyped-decorator"
# (triton has no types; its kernels are annotated for the reader)

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tidar.kernels.ahead import ask_vectors_ahead
from tidar.kernels.attention_launch import AttentionWorkspace, LaunchConfig, launch_config
from tidar.kernels.attention_sum import sum_parts
from tidar.kernels.attention_tiles import load_vectors, share_of, store_vectors
from tidar.kernels.launch import early
from tidar.kernels.parts import aligned

_LOG2_E = math.log2(math.e)


@triton.jit
def _offsets(
    table: tl.tensor,
    start: tl.tensor,
    length: tl.tensor,
    page_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE_N: tl.constexpr,
) -> tl.tensor:
    """Where in the pages the TILE_N positions from `start` are; page 0 for those past `length`."""
    if TILE_N <= PAGE_SIZE:
        page = tl.load(table + start // PAGE_SIZE, mask=start < length, other=0)
        slots = start % PAGE_SIZE + tl.arange(0, TILE_N)
    else:
        positions = start + tl.arange(0, TILE_N)
        page = tl.load(table + positions // PAGE_SIZE, mask=positions < length, other=0)
        slots = positions % PAGE_SIZE
    return page.to(tl.int64) * page_stride + slots * HEAD_DIM


@triton.jit
def _whole_tile(
    key_pages: tl.tensor,
    value_pages: tl.tensor,
    key_tiles: tl.tensor,
    value_tiles: tl.tensor,
    table: tl.tensor,
    start: tl.tensor,
    length: tl.tensor,
    page_stride: tl.tensor,
    head: tl.tensor,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
) -> tl.tensor:
    """Keys and values of the TILE_N positions from `start`, all of them committed."""
    if key_tiles is None:
        offsets = _offsets(table, start, length, page_stride, HEAD_DIM, PAGE_SIZE, TILE_N)
        keys = load_vectors(key_pages + offsets, None, HEAD_DIM, TILE_D)
        values = load_vectors(value_pages + offsets, None, HEAD_DIM, TILE_D)
    else:
        at = (tl.load(table + start // PAGE_SIZE) * KV_HEADS + head) * PAGE_SIZE + start % PAGE_SIZE
        keys, values = key_tiles.load([at, 0]), value_tiles.load([at, 0])
    return keys, values


@triton.jit
def _sees(
    tail: tl.tensor,
    rows: tl.tensor,
    place: tl.tensor,
    own_span: tl.tensor,
    own_anchor: tl.tensor,
) -> tl.tensor:
    """Which rows of the tail, at `place`, each lane sees: the visibility rule (`tidar.layout.visible`).

    From what each row is, as a matrix of rows x rows would have to be loaded element by element. Lanes of no
    row see what is clean.
    """
    there = place < rows
    position = tl.load(tail + place, mask=there, other=2147483647)
    span = tl.load(tail + rows + place, mask=there, other=-2)
    clean = position[None, :] < own_anchor[:, None]
    return tl.where((span == -1)[None, :], clean, span[None, :] == own_span[:, None])


@triton.jit
def _fold(
    scores: tl.tensor,
    values: tl.tensor,
    scale: tl.tensor,
    result: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
) -> tl.tensor:
    """One step of the online softmax over raw scores [TILE_M, TILE_N], -inf where invisible."""
    # `peak` starts finite, so a row that has seen nothing yet gives exp2(-inf) = 0 and never NaN.
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    result = result * decay[:, None]
    result = tl.dot(weights.to(values.dtype), values, result, input_precision="ieee")
    return result, new_peak, total * decay + tl.sum(weights, 1)


@triton.jit
def _leave(
    parts: tl.tensor,
    stats: tl.tensor,
    part: tl.tensor,
    result: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    real: tl.tensor,
    HEAD_DIM: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_D: tl.constexpr,
) -> None:
    """What a split has found, for `tidar.kernels.attention_sum`."""
    lane = tl.arange(0, TILE_M)
    at = parts + part.to(tl.int64) * (TILE_M * HEAD_DIM) + lane * HEAD_DIM
    store_vectors(at, result, real, HEAD_DIM, TILE_D)
    tl.store(stats + part * (2 * TILE_M) + lane, peak)
    tl.store(stats + part * (2 * TILE_M) + TILE_M + lane, total)


@triton.jit(do_not_specialize=["rows", "splits", "min_share", "table_batch", "tail_batch"])
def _attention_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    key_pages: tl.tensor,
    value_pages: tl.tensor,
    page_table: tl.tensor,
    prefix_lens: tl.tensor,
    tail: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    stats: tl.tensor,
    key_tiles: tl.tensor,
    value_tiles: tl.tensor,
    rows: tl.tensor,
    splits: tl.tensor,
    min_share: tl.tensor,
    scale: tl.tensor,
    q_batch: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    pages_page: tl.tensor,
    pages_head: tl.tensor,
    out_batch: tl.tensor,
    out_row: tl.tensor,
    table_batch: tl.tensor,
    tail_batch: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Grid: (B * KV_HEADS * tiles of lanes, splits). Strides are in elements, named tensor_dimension.

    parts: None where there is one split, which writes `out`. key_tiles, value_tiles: descriptors of the pages
    as one matrix of vectors, by which the copy engine reads whole tiles; or None.
    """
    program, split = tl.program_id(0), tl.program_id(1)
    lane_tiles = tl.cdiv(rows * GROUP, TILE_M)
    batch = program // (KV_HEADS * lane_tiles)
    head = program // lane_tiles % KV_HEADS
    lanes = (program % lane_tiles) * TILE_M + tl.arange(0, TILE_M)
    row, query_head = lanes // GROUP, head * GROUP + lanes % GROUP
    real = row < rows
    # What the whole step shares stands since its beginning: it need not wait for the kernel before.
    length = tl.load(prefix_lens + batch)
    tail += batch * tail_batch
    own_span = tl.load(tail + rows + row, mask=real, other=-1)
    own_anchor = tl.load(tail + 2 * rows + row, mask=real, other=2147483647)

    # All keys of the sequence as one row of tiles: whole ones of the prefix, a broken one, the tail's.
    whole_tiles, prefix_tiles = length // TILE_N, tl.cdiv(length, TILE_N)
    share, active = share_of(length, rows, splits, min_share, TILE_N)
    if split >= active:
        return
    first = split * share
    last = tl.minimum(first + share, prefix_tiles + tl.cdiv(rows, TILE_N))

    key_pages += head * pages_head
    value_pages += head * pages_head
    table = page_table + batch * table_batch
    if PDL:
        if first < prefix_tiles:
            ahead = _offsets(table, first * TILE_N, length, pages_page, HEAD_DIM, PAGE_SIZE, TILE_N)
            ask_vectors_ahead(key_pages + ahead, HEAD_DIM)
            ask_vectors_ahead(value_pages + ahead, HEAD_DIM)
        tl.extra.cuda.gdc_wait()
    q += batch * q_batch + query_head * q_head
    queries = load_vectors(q + row * q_row, real, HEAD_DIM, TILE_D)
    k += batch * k_batch + head * k_head
    v += batch * k_batch + head * k_head
    within = tl.arange(0, TILE_N)

    result, total = tl.zeros([TILE_M, TILE_D], tl.float32), tl.zeros([TILE_M], tl.float32)
    peak = tl.full([TILE_M], -1e30, tl.float32)
    for tile in tl.range(first, tl.minimum(last, whole_tiles)):
        keys, values = _whole_tile(
            key_pages, value_pages, key_tiles, value_tiles, table, tile * TILE_N, length, pages_page, head,
            KV_HEADS, HEAD_DIM, PAGE_SIZE, TILE_N, TILE_D,
        )  # fmt: skip
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        result, peak, total = _fold(scores, values, scale, result, peak, total)

    if (whole_tiles < prefix_tiles) & (first <= whole_tiles) & (whole_tiles < last):
        start = whole_tiles * TILE_N
        seen = start + within < length
        offsets = _offsets(table, start, length, pages_page, HEAD_DIM, PAGE_SIZE, TILE_N)
        # Slots behind the prefix may hold NaN. A score there is replaced, a value must load as 0.
        keys = load_vectors(key_pages + offsets, seen, HEAD_DIM, TILE_D)
        values = load_vectors(value_pages + offsets, seen, HEAD_DIM, TILE_D)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        scores = tl.where(seen[None, :], scores, float("-inf"))
        result, peak, total = _fold(scores, values, scale, result, peak, total)

    for tile in tl.range(tl.maximum(first, prefix_tiles), last):
        place = (tile - prefix_tiles) * TILE_N + within
        seen = place < rows
        keys = load_vectors(k + place * k_row, seen, HEAD_DIM, TILE_D)
        values = load_vectors(v + place * k_row, seen, HEAD_DIM, TILE_D)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        visible = _sees(tail, rows, place, own_span, own_anchor)
        scores = tl.where(visible, scores, float("-inf"))
        result, peak, total = _fold(scores, values, scale, result, peak, total)

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if parts is None:
        at = out + batch * out_batch + row * out_row + query_head * HEAD_DIM
        store_vectors(at, result / total[:, None], real, HEAD_DIM, TILE_D)
    else:
        part = program * splits + split
        _leave(parts, stats, part, result, peak, total, real, HEAD_DIM, TILE_M, TILE_D)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    prefix_lens: Tensor,
    tail: Tensor,
    *,
    splits: int,
    workspace: AttentionWorkspace | None,
    out: Tensor | None = None,
    config: LaunchConfig | None = None,
    pdl: bool = False,
) -> Tensor:
    """Attention of W tail rows per sequence over its paged prefix and over each other; deterministic.

    Neither waits for the device nor allocates (but `out` where it is None): a captured CUDA graph
    serves every prefix length that `page_table` has room for. No dimension may be strided but where
    said; all floats are float32, float16 or bfloat16 alike.

    Args:
        q: `[B, W, num_heads, head_dim]`, rotary embedding applied. Only its last dimension need be
            contiguous, and so for k, v, out: views of one merged buffer are fine.
        k, v: `[B, W, num_kv_heads, head_dim]` of equal strides, keys and values of the same rows.
        key_pages, value_pages: `[num_pages, num_kv_heads, page_size, head_dim]` of equal strides,
            page_size a power of two; what is one head's of a page lies in one piece.
        page_table: int32 `[B, max_pages]`; entries behind a sequence's last page are not read.
        prefix_lens: int32 `[B]`, committed tokens; what the slots behind them hold has no effect.
        tail: int32 `[3, W]` or `[B, 3, W]`: position (minus the prefix length), span and anchor of each
            tail row, as in `tidar.layout.Rows`. Every row sees the whole prefix.
        splits: programs that share the keys of a tile of lanes; fewer where `min_share` says so.
        workspace: of `attention_workspace` for these sizes or larger; None where splits is 1.
        out: `[B, W, num_heads * head_dim]`, returned; made where it is None.
        config: instead of `launch_config`'s choice.
        pdl: programmatic dependent launch; CUDA on Hopper or later only. page_table, prefix_lens and tail
            are then read before the kernel before has ended; see `tidar.kernels.launch.early`.
    """
    batch, rows, num_heads, head_dim = q.shape
    group = num_heads // key_pages.shape[1]
    if out is None:
        out = q.new_empty(batch, rows, num_heads * head_dim)
    _check(q, k, v, key_pages, value_pages, page_table, prefix_lens, tail, out)
    config = config or launch_config(rows, group, head_dim, q.element_size())
    tensors = (
        q,
        k,
        v,
        key_pages,
        value_pages,
        page_table,
        prefix_lens,
        tail,
        out,
    )
    _launch(tensors, splits, workspace, config, pdl)
    return out


def _launch(
    tensors: tuple[Tensor, ...],
    splits: int,
    workspace: AttentionWorkspace | None,
    config: LaunchConfig,
    pdl: bool,
) -> None:
    """The launches themselves; `tensors` are the first kernel's first arguments."""
    q, k, _, key_pages, _, page_table, prefix_lens, tail, out = tensors
    batch, rows, num_heads, head_dim = q.shape
    num_kv_heads, page_size = key_pages.shape[1:3]
    group = num_heads // num_kv_heads
    programs = batch * num_kv_heads * config.lane_tiles(rows, group)
    parts = stats = None
    if splits > 1:
        assert workspace is not None, "more than one split needs a workspace"
        parts, stats = workspace.parts, workspace.stats
        vectors = programs * splits * config.tile_m
        assert parts.numel() >= vectors * head_dim, "the workspace is for smaller sizes"
        assert stats.numel() >= vectors * 2
    _attention_kernel[(programs, splits)](
        *tensors,
        parts,
        stats,
        *(_tiles(pages, config) for pages in tensors[3:5]),
        rows,
        splits,
        config.min_share,
        _LOG2_E / math.sqrt(head_dim),
        *q.stride()[:3],
        *k.stride()[:3],
        *key_pages.stride()[:2],
        *out.stride()[:2],
        page_table.stride(0),
        tail.stride(0) if tail.dim() == 3 else 0,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        TILE_M=config.tile_m,
        TILE_N=config.tile_n,
        TILE_D=max(16, triton.next_power_of_2(head_dim)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        PDL=pdl,
        **early(pdl),
    )
    if parts is not None:
        assert stats is not None
        sum_parts(
            parts,
            stats,
            prefix_lens,
            out,
            (batch, rows, num_kv_heads, group),
            splits,
            config,
            pdl=pdl,
        )


def _tiles(pages: Tensor, config: LaunchConfig) -> TensorDescriptor | None:
    """The pages as the copy engine reads a tile of them; None where it is not to."""
    if not config.copies:
        return None
    page_size, head_dim = pages.shape[2:]
    assert config.tile_n <= page_size, (config.tile_n, page_size)
    assert head_dim == triton.next_power_of_2(head_dim) >= 16, head_dim
    vectors = pages.view(-1, head_dim)  # raises for pages with gaps between them
    assert aligned(vectors), (pages.shape, pages.stride())
    return TensorDescriptor.from_tensor(vectors, [config.tile_n, head_dim])


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    prefix_lens: Tensor,
    tail: Tensor,
    out: Tensor,
) -> None:
    """What the kernel takes for granted; reads no device memory."""
    batch, rows, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = key_pages.shape
    assert num_heads % num_kv_heads == 0, (q.shape, key_pages.shape)
    assert k.shape == v.shape == (batch, rows, num_kv_heads, head_dim), (k.shape, v.shape)
    assert key_pages.shape == value_pages.shape, (key_pages.shape, value_pages.shape)
    assert key_pages.shape[3] == head_dim, (key_pages.shape, q.shape)
    assert page_size & (page_size - 1) == 0, page_size
    assert len({tensor.dtype for tensor in (q, k, v, key_pages, value_pages, out)}) == 1
    assert all(tensor.stride(-1) == 1 for tensor in (q, k, v, key_pages, value_pages, out))
    assert k.stride() == v.stride(), (k.stride(), v.stride())
    assert key_pages.stride() == value_pages.stride(), (key_pages.stride(), value_pages.stride())
    assert key_pages.stride(2) == head_dim, key_pages.stride()
    assert page_table.shape[0] == batch, page_table.shape
    assert page_table.stride(1) == 1 or page_table.shape[1] == 1, page_table.stride()
    assert prefix_lens.shape == (batch,), prefix_lens.shape
    assert prefix_lens.is_contiguous(), prefix_lens.stride()
    assert page_table.dtype == prefix_lens.dtype == torch.int32
    assert tail.shape in ((3, rows), (batch, 3, rows)), (tail.shape, q.shape)
    assert tail.dtype == torch.int32, tail.dtype
    assert tail.is_contiguous(), tail.stride()
    assert out.shape == (batch, rows, num_heads * head_dim), out.shape
