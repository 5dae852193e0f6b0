"""Block diffusion: span by span, each written over several passes, with a causal cache of what is done.

Arriola et al., arXiv 2503.09573. A span of K rows sees the prefix and itself. Each pass settles the open rows
whose confidence passes a threshold, the most confident one at least (Fast-dLLM, arXiv 2505.22618, section
3.3; the rival that TiDAR's table 4 measures), or a fixed number of them, the most confident or the leftmost
(the other rows of that table). Once none is open its tokens are certain. Their keys and
values are stored by the next pass, where they ride as clean rows before the next span.

Not AR's text: tokens of a span are chosen side by side, none knowing the others'.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from tidar.errors import TidarError
from tidar.layout import Schedule, clean_rows, dense, span_rows
from tidar.methods import Draft, Pending, Project, Step, Verdict
from tidar.methods.choices import Cell, gather
from tidar.methods.denoise import check_unverified, probability_of, propose
from tidar.model import SpanAttention
from tidar.sampling import SamplingParams

QuotaOrder = Literal["best", "left"]


def who_sees(clean: int, span: int, draft_len: int, attention: SpanAttention) -> Tensor:
    """The rule over `clean` rows and one span of `span` rows behind them, bool `[clean + span, ...]`.

    "causal" is TiDAR's rule, and fits checkpoints that were trained with it. "full" adds that clean rows
    of one grid cell of `draft_len` see each other, as block-diffusion checkpoints are trained; the clean rows
    then begin at a cell's start.
    """
    rows = clean_rows(clean).join(span_rows(clean, span, span=0))
    seen = dense(rows, rows)
    if attention == "full":
        cell = torch.arange(clean) // draft_len
        seen[:clean, :clean] |= cell.unsqueeze(1) == cell
    return seen


_kept = lru_cache(maxsize=256)(who_sees)
"""Of decode steps, whose few shapes come again and again."""


@dataclass(frozen=True, slots=True)
class Quota:
    """So many open rows settle in each pass, whatever the confidence.

    order: the most confident ones ("best"), or those that come first ("left").
    """

    count: int
    order: QuotaOrder

    def __post_init__(self) -> None:
        if self.count < 1:
            raise TidarError(f"{self.count} rows a pass are impossible; at least 1 must settle.")


@dataclass(frozen=True, slots=True)
class Writing:
    """A span under way: its tokens, the mask token where it is open, and how many passes it has had."""

    tokens: tuple[int, ...]
    passes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanStep(Step):
    """clean: clean rows of each sequence. spans: what stands behind them; None where nothing does."""

    clean: tuple[int, ...]
    spans: tuple[Writing | None, ...]


@dataclass(frozen=True, slots=True)
class BlockDiffusion:
    """The method; `schedule.draft_len` is K.

    threshold: confidence above which an open row settles. quota: so many settle instead. attention: with
    "causal" a span begins behind the text, wherever that ends; with "full" spans lie on a grid from the
    text's start, and the first one may begin with tokens of the prompt, which are settled from the start.
    """

    mask_token_id: int
    threshold: float = 0.9
    attention: SpanAttention = "causal"
    quota: Quota | None = None

    def check(self, params: SamplingParams, *, forced: bool) -> None:
        """See `Method`."""
        check_unverified("block-diffusion", params, forced=forced)

    def release(self, request_id: int) -> None:
        """See `Method`. Nothing is kept."""

    def step(self, pending: Sequence[Pending], schedule: Schedule) -> SpanStep:
        """See `Method`. A prompt goes in alone, so that every pass over a span is a decode step."""
        size = schedule.draft_len
        clean = tuple(self._clean(p, size) for p in pending)
        prefill = any(p.fresh for p in pending) and clean[0] > 0
        spans = tuple(
            None if prefill else self._span(p, count, size)
            for p, count in zip(pending, clean, strict=True)
        )
        lengths = [c + len(s.tokens if s else ()) for c, s in zip(clean, spans, strict=True)]
        width = max(lengths)
        ids = torch.full((len(pending), width), self.mask_token_id)
        visible = torch.eye(width, dtype=torch.bool).repeat(len(pending), 1, 1)
        for i, (p, count, span) in enumerate(zip(pending, clean, spans, strict=True)):
            row = (*p.draft.tokens[:count], *(span.tokens if span else ()))
            ids[i, : len(row)] = torch.tensor(row)
            rule = who_sees if prefill else _kept
            visible[i, : len(row), : len(row)] = rule(count, len(row) - count, size, self.attention)
        return SpanStep(
            pending=tuple(pending),
            ids=ids,
            positions=torch.tensor([[p.prefix_len] for p in pending]) + torch.arange(width),
            visible=visible[0] if len(pending) == 1 else visible,
            rows=tuple(lengths),
            prefill=prefill,
            clean=clean,
            spans=spans,
        )

    def _clean(self, p: Pending, size: int) -> int:
        """How many of the certain tokens are stored now; on a grid the others belong to the span."""
        certain = p.draft.certain
        return certain if self.attention == "causal" else certain // size * size

    def _span(self, p: Pending, clean: int, size: int) -> Writing:
        if isinstance(p.draft.working, Writing):
            return p.draft.working
        settled = p.draft.tokens[clean : p.draft.certain]
        length = min(size, p.limit - p.prefix_len - clean)
        return Writing((*settled, *[self.mask_token_id] * (length - len(settled))))

    def resolve(self, step: SpanStep, hidden: Tensor, project: Project) -> list[Verdict]:
        """See `Method`. Projects the open rows alone."""
        open_rows = [self._open(step, index) for index in range(len(step.pending))]
        cells = [cell for rows in open_rows for cell in rows]
        logits = project(gather(hidden, cells)) if cells else hidden.new_empty(0, 0)
        verdicts, start = [], 0
        for index, rows in enumerate(open_rows):
            mine = logits[start : start + len(rows)]
            start += len(rows)
            verdicts.append(self._verdict(step, index, rows, mine))
        return verdicts

    def _open(self, step: SpanStep, index: int) -> list[Cell]:
        span, first = step.spans[index], step.clean[index]
        at = step.pending[index].prefix_len + first
        return [
            Cell(index, first + row, at + row)  # a mask row predicts its own position
            for row, token in enumerate(span.tokens if span else ())
            if token == self.mask_token_id
        ]

    def _verdict(self, step: SpanStep, index: int, rows: list[Cell], logits: Tensor) -> Verdict:
        p, clean, span = step.pending[index], step.clean[index], step.spans[index]
        rest = p.draft.tokens[clean : p.draft.certain]
        if span is None:
            return Verdict(clean, Draft(rest, len(rest)))
        chosen = self._settle(logits, p.params, [cell.predicts for cell in rows], span.passes)
        tokens = list(span.tokens)
        for cell, token in zip(rows, chosen, strict=True):
            tokens[cell.row - clean] = token
        done = tuple(tokens)
        settled = sum(token != self.mask_token_id for token in chosen)
        if self.mask_token_id in done:
            after = Draft(rest, len(rest), working=Writing(done, span.passes + 1))
        else:
            after = Draft(done, len(done))
        ended = after.working is None and p.prefix_len + clean + len(done) >= p.limit
        return Verdict(clean, after, tried=len(rows), settled=settled, ended=ended)

    def _settle(
        self, logits: Tensor, params: SamplingParams, positions: list[int], passes: int
    ) -> list[int]:
        """What becomes of the open rows: a token, or the mask token again; at least one settles."""
        tokens = propose(logits, params, positions, passes)
        sure = probability_of(tokens, logits)
        if self.quota is None:
            settled = sure > self.threshold
            settled[sure.argmax()] = True
        else:
            rank = sure.cpu() if self.quota.order == "best" else -torch.arange(len(positions))
            settled = torch.zeros(len(positions), dtype=torch.bool)
            settled[rank.argsort(descending=True, stable=True)[: self.quota.count]] = True
            settled = settled.to(tokens.device)
        return [int(token) for token in torch.where(settled, tokens, self.mask_token_id)]
