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

from tidar.layout import Schedule, Tail, build_tail, cached_tail, nearest_anchor
from tidar.methods import Draft, Pending, Project, Step, Verdict
from tidar.methods.choices import Cell, choices, draft_cells, gather, verify
from tidar.sampling import SamplingParams, probabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class TidarStep(Step):
    """anchors: for each sequence, the anchor offsets it uses among those of `tail`."""

    tail: Tail
    anchors: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Tidar:
    """The method. beta is the paper's trust in the causal logits (section 3.3); only 1.0 is exact."""

    mask_token_id: int
    beta: float = 1.0

    def check(self, params: SamplingParams, *, forced: bool) -> None:
        """See `Method`. Everything goes."""

    def release(self, request_id: int) -> None:
        """See `Method`. Nothing is kept."""

    def step(self, pending: Sequence[Pending], schedule: Schedule) -> TidarStep:
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
        return TidarStep(
            pending=tuple(pending),
            ids=ids,
            positions=positions,
            visible=visible,
            rows=tuple(
                p.length + len(each) * schedule.draft_len
                for p, each in zip(pending, own, strict=True)
            ),
            prefill=any(p.fresh for p in pending),
            tail=tail,
            anchors=own,
        )

    def _anchors(self, p: Pending, schedule: Schedule) -> tuple[int, ...]:
        anchors = schedule.anchors(p.length)
        return (p.length,) if anchors and p.draft.certain > 1 else anchors

    def resolve(self, step: TidarStep, hidden: Tensor, project: Project) -> list[Verdict]:
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

    def _verify(self, step: TidarStep, hidden: Tensor, project: Project) -> list[tuple[int, int]]:
        """For each sequence, how many tokens commit and which token the causal model chooses next."""
        cells = draft_cells(step.pending)
        logits = project(gather(hidden, cells))
        if self.beta != 1.0:
            logits = self._mix(step, cells, logits, hidden, project)
        return verify(step.pending, cells, logits)

    def _mix(
        self, step: TidarStep, cells: list[Cell], logits: Tensor, hidden: Tensor, project: Project
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
        other = project(gather(hidden, twins))
        logits = logits.clone()
        logits[mixed] = self.beta * logits[mixed] + (1 - self.beta) * other
        logits[:, self.mask_token_id] = -torch.inf  # 0 * -inf would leave NaN here
        return logits

    def _chosen_span(self, step: TidarStep, index: int, accepted: int) -> list[Cell]:
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
        self, step: TidarStep, cells: list[Cell], hidden: Tensor, project: Project
    ) -> list[Draft]:
        """The uncertain part of each sequence's next draft, from the rows of its chosen span."""
        if not cells:
            return [Draft(()) for _ in step.pending]
        logits = project(gather(hidden, cells))
        chosen = choices(step.pending, cells, logits)
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
                drafts.append(Draft(tuple(chosen[rows])))
        return drafts
