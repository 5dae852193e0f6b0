"""The second launch of paged attention: the parts that its splits have left, added up."""

# mypy: disable-error-code="untyped-decorator"
# (triton has no types; its kernels are annotated for the reader)

import triton
import triton.language as tl
from torch import Tensor

from tidar.kernels.attention_launch import LaunchConfig
from tidar.kernels.attention_tiles import load_vectors, share_of, store_vectors
from tidar.kernels.launch import early

SUM_TILE = 4096
"""Numbers that a program adds up."""


@triton.jit(do_not_specialize=["rows", "splits", "min_share"])
def _sum_kernel(
    parts: tl.tensor,
    stats: tl.tensor,
    prefix_lens: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    splits: tl.tensor,
    min_share: tl.tensor,
    out_batch: tl.tensor,
    out_row: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ALL_PARTS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """LANES lanes of a tile, all their parts at once. Grid: (B * KV_HEADS * tiles, TILE_M // LANES)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    lane_tiles = tl.cdiv(rows * GROUP, TILE_M)
    batch = program // (KV_HEADS * lane_tiles)
    head = program // lane_tiles % KV_HEADS
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    lanes = (program % lane_tiles) * TILE_M + lane
    row, query_head = lanes // GROUP, head * GROUP + lanes % GROUP
    real = row < rows
    _, active = share_of(tl.load(prefix_lens + batch), rows, splits, min_share, TILE_N)
    if PDL:
        tl.extra.cuda.gdc_wait()
    # Parts past the active ones are of an earlier launch, or of none: neither may count.
    part = tl.arange(0, ALL_PARTS)[:, None]
    exists = (part < active) & real[None, :]
    stat = stats + program * splits * (2 * TILE_M) + lane
    peaks = tl.load(stat[None, :] + part * (2 * TILE_M), mask=exists, other=-1e30)
    totals = tl.load(stat[None, :] + part * (2 * TILE_M) + TILE_M, mask=exists, other=0.0)
    peak = tl.max(peaks, 0)
    total = tl.sum(totals * tl.exp2(peaks - peak[None, :]), 0)
    cell = parts + program.to(tl.int64) * splits * (TILE_M * HEAD_DIM) + lane * HEAD_DIM
    result = tl.zeros([LANES, TILE_D], tl.float32)
    # Laid out flat, so that all loads are under way at once.
    for index in tl.static_range(ALL_PARTS):
        exist = real & (index < active)
        weight = tl.exp2(tl.load(stat + index * (2 * TILE_M), mask=exist, other=-1e30) - peak)
        vectors = load_vectors(cell + index * (TILE_M * HEAD_DIM), exist, HEAD_DIM, TILE_D)
        result += vectors * weight[:, None]
    at = out + batch * out_batch + row * out_row + query_head * HEAD_DIM
    store_vectors(at, result / tl.where(real, total, 1.0)[:, None], real, HEAD_DIM, TILE_D)


def sum_parts(
    parts: Tensor,
    stats: Tensor,
    prefix_lens: Tensor,
    out: Tensor,
    sizes: tuple[int, int, int, int],
    splits: int,
    config: LaunchConfig,
    *,
    pdl: bool,
) -> None:
    """Writes `out` `[B, W, num_heads * head_dim]` from what `splits` splits cut by `config` have left.

    sizes: sequences, rows of each, key heads, query heads of each key head. The rest as in
    `tidar.kernels.attention.paged_attention`.
    """
    batch, rows, num_kv_heads, group = sizes
    head_dim = out.shape[-1] // (num_kv_heads * group)
    tile_d = max(16, triton.next_power_of_2(head_dim))
    all_parts = triton.next_power_of_2(splits)
    lanes = max(1, min(config.tile_m, SUM_TILE // (all_parts * tile_d)))
    programs = batch * num_kv_heads * config.lane_tiles(rows, group)
    _sum_kernel[(programs, config.tile_m // lanes)](
        parts, stats, prefix_lens, out, rows, splits, config.min_share, *out.stride()[:2],
        KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, ALL_PARTS=all_parts,
        TILE_M=config.tile_m, TILE_N=config.tile_n, TILE_D=tile_d, LANES=lanes, PDL=pdl,
        num_warps=max(1, lanes * tile_d // 256), **early(pdl),
    )  # fmt: skip
