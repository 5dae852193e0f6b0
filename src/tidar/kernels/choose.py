"""Choosing a token per row of logits: `tidar.sampling.choose_rows` without top-k and top-p, in one launch.

The vocabulary of a row is shared by many programs, because few rows alone would leave a GPU idle; the
one that arrives last for a row compares the winners of all. The noise is that of
`tidar.sampling.gumbel_noise`, bit for bit up to the rounding of two logarithms: it is a function of
(seed, position, token id) alone, so no noise is ever stored.
"""

# Triton has no types that mypy could read, so its decorator hides those of the kernels.
# mypy: disable-error-code="untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidar.kernels.launch import early
from tidar.kernels.noise import gumbel

TILE_V = 1024
"""Vocabulary entries that a program takes at a time."""

PROGRAMS = 2048
"""About how many programs fill a GPU once; with more than that each takes several tiles."""


@triton.jit(do_not_specialize=["mask_token_id"])
def _choose_kernel(
    logits: tl.tensor,
    positions: tl.tensor,
    seeds: tl.tensor,
    temperatures: tl.tensor,
    out: tl.tensor,
    best_scores: tl.tensor,
    best_tokens: tl.tensor,
    counters: tl.tensor,
    logits_stride: tl.tensor,
    mask_token_id: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    SHARES: tl.constexpr,
    ALL_SHARES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """The best of TILES tiles, and by the last program of a row the best of all; grid (rows, SHARES)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    share = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    best = tl.full((TILE,), -float("inf"), tl.float32)
    best_token = share * TILES * TILE + tl.arange(0, TILE)
    for tile in tl.range(0, TILES):
        token = (share * TILES + tile) * TILE + tl.arange(0, TILE)
        at = logits + row.to(tl.int64) * logits_stride + token
        scores = tl.load(at, mask=token < VOCAB, other=-float("inf")).to(tl.float32)
        scores = tl.where(token == mask_token_id, -float("inf"), scores)
        if temperature > 0.0:
            noise = gumbel(tl.load(seeds + row), tl.load(positions + row), token)
            scores = tl.div_rn(scores, tl.zeros((TILE,), tl.float32) + temperature) + noise
        better = scores > best
        best = tl.where(better, scores, best)
        best_token = tl.where(better, token, best_token)
    # Of equal scores the lower token wins, here and among shares.
    score = tl.max(best, axis=0)
    mine = row * SHARES + share
    tl.store(best_scores + mine, score)
    tl.store(best_tokens + mine, tl.min(tl.where(best == score, best_token, VOCAB), axis=0))
    # The atomic is one thread's; the barriers tie the loads and stores of the others to it.
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + row, 1, sem="acq_rel")
    tl.debug_barrier()
    if arrived == SHARES - 1:
        tl.store(counters + row, 0)  # ready for the next launch, also inside a CUDA graph
        other = tl.arange(0, ALL_SHARES)
        at = row * SHARES + other
        there = other < SHARES
        ranked = tl.load(best_scores + at, mask=there, other=-float("inf"), cache_modifier=".cg")
        tokens = tl.load(best_tokens + at, mask=there, other=VOCAB, cache_modifier=".cg")
        chosen = tl.min(tl.where(ranked == tl.max(ranked, axis=0), tokens, VOCAB), axis=0)
        tl.store(out + row, chosen.to(tl.int64))


@dataclass(frozen=True, slots=True)
class ChooseWorkspace:
    """Where programs leave their winners; for one stream at a time.

    scores: float32, tokens: int32, both an entry per row and tile at most. counters: int32, one per row, all 0
    between launches.
    """

    scores: Tensor
    tokens: Tensor
    counters: Tensor


def choose_workspace(rows: int, vocab_size: int, device: torch.device | str) -> ChooseWorkspace:
    """A workspace for up to `rows` rows of up to `vocab_size` logits."""
    entries = rows * triton.cdiv(vocab_size, TILE_V)
    return ChooseWorkspace(
        torch.empty(entries, dtype=torch.float32, device=device),
        torch.empty(entries, dtype=torch.int32, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
    )


def choose_rows(
    logits: Tensor,
    positions: Tensor,
    seeds: Tensor,
    temperatures: Tensor,
    mask_token_id: int,
    *,
    workspace: ChooseWorkspace,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """The model's choice for each row, int64 `[N]`: arg-max, with shared noise where temperature > 0.

    Of equal scores the lowest token wins. Logits must not be NaN. Neither allocates nor waits where
    `out` is given.

    Args:
        logits: float `[N, V]`, rows at any stride; -inf is never chosen.
        positions: int64 `[N]`, of the tokens that are chosen.
        seeds: int64 `[N]`.
        temperatures: float32 `[N]`; 0 is greedy.
        mask_token_id: never chosen; -1 for none.
        workspace: with room for N rows.
        out: int64 `[N]`.
        pdl: programmatic dependent launch; CUDA on Hopper or later only.
    """
    rows, vocab = logits.shape
    tiles = triton.cdiv(vocab, TILE_V)
    if out is None:
        out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    assert logits.stride(1) == 1, logits.stride()
    for vector, dtype in (
        (positions, torch.int64),
        (seeds, torch.int64),
        (temperatures, torch.float32),
        (out, torch.int64),
    ):
        assert vector.shape == (rows,), (vector.shape, rows)
        assert vector.dtype == dtype, (vector.dtype, dtype)
        assert vector.is_contiguous()
    each = max(1, rows * tiles // PROGRAMS)
    shares = triton.cdiv(tiles, each)
    assert workspace.scores.numel() >= rows * shares, (workspace.scores.numel(), rows, shares)
    assert workspace.counters.numel() >= rows, (workspace.counters.numel(), rows)
    _choose_kernel[(rows, shares)](
        logits, positions, seeds, temperatures, out,
        workspace.scores, workspace.tokens, workspace.counters, logits.stride(0), mask_token_id,
        VOCAB=vocab, TILE=TILE_V, TILES=each, SHARES=shares,
        ALL_SHARES=triton.next_power_of_2(shares), PDL=pdl,
        num_warps=4, **early(pdl),
    )  # fmt: skip
    return out
