"""TiDAR decoding: verify the last draft and prepare the next one for every outcome, in one forward pass.

arXiv 2511.08923, sections 3.2 and 3.3. A step's rows are the draft (causal) and, for the accept counts in
the span set, a span of mask rows that drafts from there. With n tokens accepted the next draft is
[what the causal model chooses after them, rows 1.. of the span with anchor n]; where n has no span, the
nearest earlier one serves, shifted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.layout import Schedule, build_tail, cached_tail, nearest_anchor
from tidar.methods import Draft, Pending, Project, Step, Verdict
from tidar.sampling import SamplingParams, choose, count_matches, probabilities, reject


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of a step, named: which sequence, which row of the tail, and the position it predicts."""

    sequence: int
    row: int
    predicts: int


@dataclass(frozen=True, slots=True)
class Tidar:
    """The method. beta is the paper's trust in the causal logits (section 3.3); only 1.0 is exact."""

    mask_token_id: int
    beta: float = 1.0

    def step(self, pending: Sequence[Pending], schedule: Schedule) -> Step:
        """See `Method`. Sequences with shorter drafts get rows that are never accepted."""
        drafts = max(p.length for p in pending)
        own = tuple(self._anchors(p, schedule) for p in pending)
        anchors = tuple(sorted({anchor for each in own for anchor in each}))
        prefill = any(p.draft.certain > 1 for p in pending)
        tail = (build_tail if prefill else cached_tail)(drafts, anchors, schedule.draft_len)
        ids = torch.full((len(pending), len(tail)), self.mask_token_id)
        for row, p in zip(ids, pending, strict=True):
            row[: p.length] = torch.tensor(p.draft.tokens)
        positions = torch.tensor([[p.prefix_len] for p in pending]) + tail.offsets
        rooms = [p.limit - p.prefix_len for p in pending]
        visible = tail.matrix
        if min(rooms) <= int(tail.offsets.max()):
            visible = torch.stack([tail.within(room) for room in rooms])
        return Step(tuple(pending), tail, ids, positions, visible, own)

    def _anchors(self, p: Pending, schedule: Schedule) -> tuple[int, ...]:
        anchors = schedule.anchors(p.length)
        return (p.length,) if anchors and p.draft.certain > 1 else anchors

    def resolve(self, step: Step, hidden: Tensor, project: Project) -> list[Verdict]:
        """See `Method`. Projects the rows that verify, then the one chosen span of each sequence."""
        outcomes = self._verify(step, hidden, project)
        cells: list[Cell] = []
        counts: list[int] = []
        for index, (accepted, _) in enumerate(outcomes):
            span = self._chosen_span(step, index, accepted)
            cells += span
            counts.append(len(span))
        drafts = self._propose(step, cells, hidden, project)
        verdicts = []
        for (accepted, token), draft, count in zip(outcomes, drafts, counts, strict=True):
            assert len(draft.tokens) == count
            verdicts.append(Verdict(accepted, Draft((token, *draft.tokens), 1, draft.probs)))
        return verdicts

    def _verify(self, step: Step, hidden: Tensor, project: Project) -> list[tuple[int, int]]:
        """For each sequence, how many tokens commit and which token the causal model chooses next."""
        cells = [
            Cell(index, row, p.prefix_len + row + 1)
            for index, p in enumerate(step.pending)
            for row in range(p.draft.certain - 1, p.length)
        ]
        logits = project(_gather(hidden, cells))
        if self.beta != 1.0:
            logits = self._mix(step, cells, logits, hidden, project)
        choices = _choices(step, cells, logits)
        outcomes = []
        start = 0
        for p in step.pending:
            draft = p.draft.tokens[p.draft.certain - 1 :]
            rows = slice(start, start + len(draft))
            start += len(draft)
            if p.params.rejects and p.forced is None:
                target = probabilities(logits[rows], p.params)
                accepted, token = reject(draft, p.draft.probs, target, p.draw)
            else:
                accepted = count_matches(draft, choices[rows])
                token = choices[rows][accepted - 1]
            outcomes.append((p.draft.certain - 1 + accepted, token))
        return outcomes

    def _mix(
        self, step: Step, cells: list[Cell], logits: Tensor, hidden: Tensor, project: Project
    ) -> Tensor:
        """beta * causal + (1 - beta) * mask logits of the same position, where a span covers it."""
        twins: list[Cell] = []
        mixed: list[int] = []
        for index, cell in enumerate(cells):
            offset = cell.row + 1
            anchor = nearest_anchor(step.anchors[cell.sequence], offset)
            covered = anchor and offset - anchor < step.tail.draft_len
            if covered and cell.predicts < step.pending[cell.sequence].limit:
                row = step.tail.span_start(anchor) + offset - anchor
                twins.append(Cell(cell.sequence, row, cell.predicts))
                mixed.append(index)
        if not twins:
            return logits
        other = project(_gather(hidden, twins))
        logits = logits.clone()
        logits[mixed] = self.beta * logits[mixed] + (1 - self.beta) * other
        logits[:, self.mask_token_id] = -torch.inf  # 0 * -inf would leave NaN here
        return logits

    def _chosen_span(self, step: Step, index: int, accepted: int) -> list[Cell]:
        """The rows that draft after `accepted` tokens; the first row of the span is d[0]'s own, and left out."""
        p = step.pending[index]
        anchor = nearest_anchor(step.anchors[index], accepted)
        if not anchor:
            return []
        first = step.tail.span_start(anchor)
        cells = [
            Cell(index, first + row, p.prefix_len + anchor + row)
            for row in range(accepted - anchor + 1, step.tail.draft_len)
        ]
        return [cell for cell in cells if cell.predicts < p.limit]

    def _propose(
        self, step: Step, cells: list[Cell], hidden: Tensor, project: Project
    ) -> list[Draft]:
        """The uncertain part of each sequence's next draft, from the rows of its chosen span."""
        if not cells:
            return [Draft(()) for _ in step.pending]
        logits = project(_gather(hidden, cells))
        choices = _choices(step, cells, logits)
        drafts = []
        start = 0
        for index, p in enumerate(step.pending):
            count = sum(cell.sequence == index for cell in cells)
            rows = slice(start, start + count)
            start += count
            if p.params.rejects and p.params.draft == "sample" and count:
                probs = probabilities(logits[rows], p.params)
                drafts.append(Draft(tuple(p.draw(row) for row in probs), 1, probs))
            else:
                drafts.append(Draft(tuple(choices[rows])))
        return drafts


def _gather(hidden: Tensor, cells: Sequence[Cell]) -> Tensor:
    """The hidden rows of `cells`, `[len(cells), hidden_size]`."""
    if hidden.shape[0] == 1:
        rows = [cell.row for cell in cells]
        if rows[-1] - rows[0] == len(rows) - 1:
            return hidden[0, rows[0] : rows[-1] + 1]
        return hidden[0, rows]
    sequences = torch.tensor([cell.sequence for cell in cells], device=hidden.device)
    rows_index = torch.tensor([cell.row for cell in cells], device=hidden.device)
    return hidden[sequences, rows_index]


def _choices(step: Step, cells: Sequence[Cell], logits: Tensor) -> list[int]:
    """The choice of each cell's sequence for the position it predicts, from logits `[len(cells), V]`."""
    by_params: dict[SamplingParams, list[int]] = {}
    for index, cell in enumerate(cells):
        by_params.setdefault(step.pending[cell.sequence].params, []).append(index)
    chosen = [0] * len(cells)
    for indices in by_params.values():
        params = step.pending[cells[indices[0]].sequence].params
        positions = torch.tensor([cells[i].predicts for i in indices], device=logits.device)
        rows = logits if len(indices) == len(cells) else logits[indices]
        # With rejection sampling a choice is only ever an arg-max draft: its randomness is in the draws.
        best = rows.argmax(dim=-1) if params.rejects else choose(rows, params, positions)
        for i, token in zip(indices, best.tolist(), strict=True):
            chosen[i] = token
    for i, cell in enumerate(cells):
        forced = step.pending[cell.sequence].forced
        # Only verdicts are forced: rows of the draft, never the drafter's own rows.
        if forced is not None and cell.row < step.tail.num_drafts:
            chosen[i] = forced[cell.predicts] if cell.predicts < len(forced) else chosen[i]
    return chosen
