"""Verification, as every exact method does it: draft rows against what the causal model chooses there.

Comparing choices (greedy, shared noise) or rejection sampling, each by the functions of `tidar.sampling`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.methods import Pending
from tidar.sampling import SamplingParams, choose, count_matches, probabilities, reject

NOISE_ENTRIES = 1 << 24
"""Logits for which noise is drawn at a time."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of a step, named: which sequence, which row of the tail, and the position it predicts."""

    sequence: int
    row: int
    predicts: int


def gather(hidden: Tensor, cells: Sequence[Cell]) -> Tensor:
    """The hidden rows of `cells`, `[len(cells), hidden_size]`, from `[B, W, hidden_size]`."""
    if hidden.shape[0] == 1:
        rows = [cell.row for cell in cells]
        if rows[-1] - rows[0] == len(rows) - 1:
            return hidden[0, rows[0] : rows[-1] + 1]
        return hidden[0, rows]
    sequences = torch.tensor([cell.sequence for cell in cells], device=hidden.device)
    rows_index = torch.tensor([cell.row for cell in cells], device=hidden.device)
    return hidden[sequences, rows_index]


def draft_cells(pending: Sequence[Pending]) -> list[Cell]:
    """The rows that verify: each sequence's last certain token, and the draft tokens behind it."""
    return [
        Cell(index, row, p.prefix_len + row + 1)
        for index, p in enumerate(pending)
        for row in range(p.draft.certain - 1, p.length)
    ]


def choices(pending: Sequence[Pending], cells: Sequence[Cell], logits: Tensor) -> list[int]:
    """The choice of each cell's sequence for the position it predicts, from logits `[len(cells), V]`."""
    alike: dict[tuple[float, ...], list[int]] = {}
    for index, cell in enumerate(cells):
        alike.setdefault(_way(pending[cell.sequence].params), []).append(index)
    chosen = [0] * len(cells)
    for way, indices in alike.items():
        rows = logits if len(indices) == len(cells) else logits[indices]
        if not way:
            best = rows.argmax(dim=-1)
        else:
            own = [pending[cells[i].sequence].params for i in indices]
            positions, seeds = torch.tensor(
                [[cells[i].predicts for i in indices], [params.seed for params in own]],
                device=logits.device,
            )
            # Noise of a row takes several times what its logits take.
            size = max(1, NOISE_ENTRIES // rows.shape[-1])
            parts = zip(*(each.split(size) for each in (rows, positions, seeds)), strict=True)
            best = torch.cat([choose(some, own[0], at, by) for some, at, by in parts])
        for i, token in zip(indices, best.tolist(), strict=True):
            chosen[i] = token
    return chosen


def _way(params: SamplingParams) -> tuple[float, ...]:
    """What requests must have in common for their rows to be chosen together; nothing for the arg-max.

    With rejection sampling a choice is only ever an arg-max draft: its randomness is in the draws.
    """
    if params.greedy or params.rejects:
        return ()
    return params.temperature, params.top_k, params.top_p


def decisions(pending: Sequence[Pending], cells: Sequence[Cell], logits: Tensor) -> list[int]:
    """`choices` as verdicts take them: what a text is forced to say is chosen, whatever the logits."""
    chosen = choices(pending, cells, logits)
    for i, cell in enumerate(cells):
        forced = pending[cell.sequence].forced
        # Only verdicts are forced, never what a drafter writes.
        if forced is not None and cell.predicts < len(forced):
            chosen[i] = forced[cell.predicts]
    return chosen


def verify(
    pending: Sequence[Pending], cells: Sequence[Cell], logits: Tensor
) -> list[tuple[int, int]]:
    """For each sequence, how many tokens commit and which token the causal model chooses next.

    cells, logits: the rows of `draft_cells` and their logits `[len(cells), V]`.
    """
    chosen = decisions(pending, cells, logits)
    outcomes = []
    start = 0
    for p in pending:
        draft = p.draft.tokens[p.draft.certain - 1 :]
        rows = slice(start, start + len(draft))
        start += len(draft)
        if p.params.rejects and p.forced is None:
            target = probabilities(logits[rows], p.params)
            accepted, token = reject(draft, p.draft.probs, target, p.draw)
        else:
            accepted = count_matches(draft, chosen[rows])
            token = chosen[rows][accepted - 1]
        outcomes.append((p.draft.certain - 1 + accepted, token))
    return outcomes
