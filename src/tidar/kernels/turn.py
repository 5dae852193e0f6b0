"""The two ends of a decode step on the device: rows from the slots, and from choices back to the slots.

What `tidar.decode.slots` does in some forty small launches of PyTorch, here in two, one program for each
sequence. `prepare_rows` comes before the network, `settle_rows` behind the choice of every row's token.
"""

# Triton has no types that mypy could read, so its decorator hides those of the kernels.
# mypy: disable-error-code="untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidar.kernels.launch import early
from tidar.kernels.noise import mix


@dataclass(frozen=True, slots=True)
class TurnState:
    """The tensors of the slots that a step reads and writes (see `tidar.decode.slots.Slots`)."""

    prefix: Tensor
    drafts: Tensor
    lens: Tensor
    left: Tensor
    shift: Tensor
    seeds: Tensor
    temperatures: Tensor
    page_table: Tensor


@dataclass(frozen=True, slots=True)
class TurnRows:
    """Rows of a step, made by `prepare_rows`: `[B, W]`, and what belongs to them.

    ids, positions, places (the position that a row predicts), seeds: int64 `[B, W]`. temperatures:
    float32 `[B, W]`. prefix_lens: int32 `[B]`. page_table: int32 `[B, max_pages]`.
    """

    ids: Tensor
    positions: Tensor
    places: Tensor
    seeds: Tensor
    temperatures: Tensor
    prefix_lens: Tensor
    page_table: Tensor


@triton.jit
def _prepare_kernel(
    chosen: tl.tensor,
    prefix: tl.tensor,
    drafts: tl.tensor,
    lens: tl.tensor,
    slot_seeds: tl.tensor,
    slot_temperatures: tl.tensor,
    slot_table: tl.tensor,
    offsets: tl.tensor,
    predicts: tl.tensor,
    ids: tl.tensor,
    positions: tl.tensor,
    places: tl.tensor,
    seeds: tl.tensor,
    temperatures: tl.tensor,
    prefix_lens: tl.tensor,
    page_table: tl.tensor,
    mask_token: tl.tensor,
    limit: tl.tensor,
    MAX_DRAFT: tl.constexpr,
    DRAFTS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGES: tl.constexpr,
    TILE_W: tl.constexpr,
    TILE_P: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One sequence."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sequence = tl.program_id(0)
    slot = tl.load(chosen + sequence)
    start = tl.load(prefix + slot).to(tl.int64)
    length = tl.minimum(tl.load(lens + slot), DRAFTS)
    row = tl.arange(0, TILE_W)
    real = row < WIDTH
    token = tl.load(drafts + slot * MAX_DRAFT + row, mask=row < length, other=0)
    at = sequence * WIDTH + row
    tl.store(ids + at, tl.where(row < length, token, mask_token), mask=real)
    place = start + tl.load(offsets + row, mask=real, other=0)
    tl.store(positions + at, tl.minimum(place, limit - 1), mask=real)
    tl.store(places + at, start + tl.load(predicts + row, mask=real, other=0), mask=real)
    nothing = tl.zeros((TILE_W,), tl.int64)
    tl.store(seeds + at, nothing + tl.load(slot_seeds + slot), mask=real)
    temperature = tl.zeros((TILE_W,), tl.float32) + tl.load(slot_temperatures + slot)
    tl.store(temperatures + at, temperature, mask=real)
    tl.store(prefix_lens + sequence, start.to(tl.int32))
    for first in tl.range(0, PAGES, TILE_P):
        page = first + tl.arange(0, TILE_P)
        own = tl.load(slot_table + slot * PAGES + page, mask=page < PAGES, other=0)
        tl.store(page_table + sequence * PAGES + page, own, mask=page < PAGES)


@triton.jit
def _settle_kernel(
    chosen: tl.tensor,
    choices: tl.tensor,
    prefix: tl.tensor,
    drafts: tl.tensor,
    lens: tl.tensor,
    left: tl.tensor,
    shifts: tl.tensor,
    seeds: tl.tensor,
    anchors: tl.tensor,
    first_rows: tl.tensor,
    survival: tl.tensor,
    results: tl.tensor,
    replay_seed: tl.tensor,
    NOBODY: tl.constexpr,
    MAX_DRAFT: tl.constexpr,
    DRAFTS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTHS: tl.constexpr,
    TILE_K: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One sequence. survival: None but for replays."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sequence = tl.program_id(0)
    slot = tl.load(chosen + sequence)
    start = tl.load(prefix + slot)
    length = tl.minimum(tl.load(lens + slot), DRAFTS)
    mine = drafts + slot * MAX_DRAFT
    own = choices + sequence * WIDTH
    row = tl.arange(0, TILE_K)
    inside = (row >= 1) & (row < length)
    token = tl.load(mine + row, mask=inside, other=0)
    if survival is None:
        passes = token == tl.load(own + row - 1, mask=inside, other=-1)
    else:
        own_seed = mix(tl.load(seeds + slot) + replay_seed)
        noise = (mix((start.to(tl.int64) + row) * 0x9E3779B1 + own_seed) >> 40) & 0xFFFFFF
        depth = tl.minimum(tl.load(shifts + slot) + row, DEPTHS - 1)
        passes = noise.to(tl.float32) * (1.0 / 16777216.0) < tl.load(survival + depth)
    fails = (row >= 1) & ((row >= length) | (passes == 0))
    accepted = tl.minimum(tl.min(tl.where(fails, row, DRAFTS), axis=0), length).to(tl.int64)
    last = tl.load(own + accepted - 1)
    following = tl.load(mine + row + 1, mask=row + 1 < length, other=0)
    emitted = tl.where(row == accepted - 1, last, following)
    out = results + sequence * (2 + DRAFTS)
    tl.store(out, length)
    tl.store(out + 1, accepted)
    tl.store(out + 2 + row, emitted, mask=row < DRAFTS)
    anchor = tl.load(anchors + length * (DRAFTS + 1) + accepted)
    shift = tl.where(anchor > 0, accepted - anchor, DRAFTS - 1)
    behind = tl.load(first_rows + anchor) + tl.minimum(shift + row, DRAFTS - 1)
    later = tl.load(own + behind, mask=(row >= 1) & (row < DRAFTS), other=0)
    tl.debug_barrier()  # all of the old draft has been read
    tl.store(mine + row, tl.where(row == 0, last, later), mask=row < DRAFTS)
    remaining = tl.load(left + slot) - accepted
    tl.store(left + slot, remaining)
    tl.store(lens + slot, tl.minimum(DRAFTS - shift, tl.maximum(remaining, 1)))
    tl.store(shifts + slot, shift)
    # Nobody stays where it is: a growing prefix would make its rows ever dearer.
    tl.store(prefix + slot, tl.where(slot == NOBODY, 0, start + accepted).to(tl.int32))


def prepare_rows(
    state: TurnState,
    chosen: Tensor,
    offsets: Tensor,
    predicts: Tensor,
    *,
    drafts: int,
    mask_token_id: int,
    limit: int,
    pdl: bool = False,
) -> TurnRows:
    """The rows of a step over the slots `chosen`, int64 `[B]`.

    offsets, predicts: int64 `[W]`, position of each row and of the token it predicts, minus the prefix
    length. drafts: draft rows, which come first. limit: positions of the model. pdl: programmatic
    dependent launch; CUDA on Hopper or later only.
    """
    batch, width = len(chosen), len(offsets)
    assert drafts <= state.drafts.shape[1], (drafts, state.drafts.shape)
    device = chosen.device
    ids, positions, places, seeds = torch.empty(
        4, batch, width, dtype=torch.int64, device=device
    ).unbind(0)
    temperatures = torch.empty(batch, width, dtype=torch.float32, device=device)
    prefix_lens = torch.empty(batch, dtype=torch.int32, device=device)
    pages = state.page_table.shape[1]
    page_table = torch.empty(batch, pages, dtype=torch.int32, device=device)
    _prepare_kernel[(batch,)](
        chosen, state.prefix, state.drafts, state.lens, state.seeds, state.temperatures,
        state.page_table, offsets, predicts, ids, positions, places, seeds, temperatures,
        prefix_lens, page_table, mask_token_id, limit,
        MAX_DRAFT=state.drafts.shape[1], DRAFTS=drafts, WIDTH=width, PAGES=pages,
        TILE_W=triton.next_power_of_2(width), TILE_P=256, PDL=pdl, num_warps=4,
        **early(pdl),
    )  # fmt: skip
    return TurnRows(ids, positions, places, seeds, temperatures, prefix_lens, page_table)


def settle_rows(
    state: TurnState,
    chosen: Tensor,
    choices: Tensor,
    anchors: Tensor,
    first_rows: Tensor,
    *,
    drafts: int,
    nobody: int,
    survival: Tensor | None = None,
    replay_seed: int = 0,
    pdl: bool = False,
) -> Tensor:
    """Verifies, and leaves the next drafts in the slots. Returns int64 `[B, 2 + K]`: L, n, n tokens.

    choices: int64 `[B, W]`, contiguous, of every row. anchors: int64 `[K + 1, K + 1]`, the anchor used
    after n of L tokens at [L, n]. first_rows: int64 `[K + 1]`, where the span of an anchor begins.
    nobody: the slot of no sequence. survival: float32, for replays (`tidar.decode.slots.Replay`).
    """
    batch, width = choices.shape
    assert choices.is_contiguous(), choices.stride()
    assert drafts <= state.drafts.shape[1], (drafts, state.drafts.shape)
    results = torch.empty(batch, 2 + drafts, dtype=torch.int64, device=chosen.device)
    _settle_kernel[(batch,)](
        chosen, choices, state.prefix, state.drafts, state.lens, state.left, state.shift, state.seeds,
        anchors, first_rows, survival, results, replay_seed,
        NOBODY=nobody, MAX_DRAFT=state.drafts.shape[1], DRAFTS=drafts, WIDTH=width,
        DEPTHS=0 if survival is None else len(survival),
        TILE_K=max(2, triton.next_power_of_2(drafts)), PDL=pdl, num_warps=1,
        **early(pdl),
    )  # fmt: skip
    return results
