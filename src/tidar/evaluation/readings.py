"""How diffusion methods read a text whose end is to be scored: which rows there are, and who sees whom."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from tidar.decode.rivals import BlockDiffusionRival, MaskedDiffusionRival
from tidar.decode.spec import MethodSpec
from tidar.layout import Rows, clean_rows, dense, span_rows
from tidar.model import ModelConfig, SpanAttention


@dataclass(frozen=True, slots=True)
class Sheet:
    """Where a text of some shape stands in a forward pass of N rows.

    positions: int64 `[N]`, of each row, and of the token that it holds. visible: bool `[N, N]`; None: all see all.
    holds, predicts: by continuation token, the row that holds it (or the mask token), and the one that predicts it.
    spans: continuation tokens that are bounded together, as ranges of their indices.
    """

    positions: Tensor
    visible: Tensor | None
    holds: tuple[int, ...]
    predicts: tuple[int, ...]
    spans: tuple[range, ...]


class Reading(Protocol):
    """How a diffusion method reads text."""

    @property
    def name(self) -> str: ...

    def sheet(self, context: int, continuation: int) -> Sheet:
        """The sheet of texts with so many tokens of context and of continuation, at least 1 of each."""
        ...


@dataclass(frozen=True, slots=True)
class WholeReading:
    """Masked diffusion's. shift: the row before a position predicts it."""

    shift: bool = False

    @property
    def name(self) -> str:
        return "masked-diffusion" + (":shift" if self.shift else "")

    def sheet(self, context: int, continuation: int) -> Sheet:
        """See `Reading`."""
        rows = range(context, context + continuation)
        return Sheet(
            positions=torch.arange(context + continuation),
            visible=None,
            holds=tuple(rows),
            predicts=tuple(row - self.shift for row in rows),
            spans=(range(continuation),),
        )


@dataclass(frozen=True, slots=True)
class SpanReading:
    """Block diffusion's: clean rows, then the rows of every span, which see the clean ones before it and each other.

    As in decoding, spans begin behind the context ("causal"), or lie on a grid from the text's start ("full"); there
    the first one may hold tokens of the context, which are never hidden. The last span ends with the text.
    """

    size: int
    attention: SpanAttention = "causal"

    @property
    def name(self) -> str:
        return f"block-diffusion:{self.size}" + (":full" if self.attention == "full" else "")

    def sheet(self, context: int, continuation: int) -> Sheet:
        """See `Reading`."""
        return _span_sheet(self.size, self.attention, context, continuation)


@lru_cache(maxsize=64)
def _span_sheet(size: int, attention: SpanAttention, context: int, continuation: int) -> Sheet:
    end = context + continuation
    first = context if attention == "causal" else context // size * size
    anchors = range(first, end, size)
    rows: Rows = clean_rows(clean := anchors[-1])
    for span, anchor in enumerate(anchors):
        rows = rows.join(span_rows(anchor, size, span=span, limit=end))
    visible = dense(rows, rows)
    if attention == "full":
        cell = torch.arange(clean) // size
        visible[:clean, :clean] |= cell.unsqueeze(1) == cell
    holds = tuple(range(clean + context - first, len(rows)))
    starts = [max(anchor, context) - context for anchor in anchors]
    spans = map(range, starts, [*starts[1:], continuation])
    return Sheet(rows.position, visible, holds, holds, tuple(spans))


def reading_of(spec: MethodSpec, config: ModelConfig) -> Reading | None:
    """What a method's likelihoods are bounded by; None where they are the causal model's, in one pass."""
    if isinstance(spec.rival, MaskedDiffusionRival):
        return WholeReading(spec.rival.shifts(config))
    if isinstance(spec.rival, BlockDiffusionRival):
        assert spec.schedule is not None
        attention = spec.rival.attention or config.span_attention
        return SpanReading(spec.schedule.draft_len, attention)
    return None
