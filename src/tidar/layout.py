"""Which row may look at which: the one visibility rule of TiDAR, and every form of it that the project uses.

Rows are clean (a real token, read causally) or mask rows of a span (arXiv 2511.08923, section 3.1 and
figure 3). A row carries four numbers: its position, its document, its span (-1 when clean) and its
anchor, the count of clean tokens of its document that it sees. `visible` is the rule; the dense form,
the FlexAttention form and the tail matrix of a decode step are all evaluations of it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from tidar.errors import TidarError

CLEAN = -1
"""Span id of a clean row."""

IGNORE = -100
"""Label of a row that predicts nothing (PyTorch's default `ignore_index`)."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Attributes of the rows of a forward pass; four int64 tensors of one shape, `[N]` or `[B, N]`.

    `anchor` is the number of clean tokens of its own document that a row sees: the span's anchor for a
    mask row, `position + 1` for a clean one that reads causally. Span ids are unique within a batch row;
    rows of a document that does not exist (padding) may use any otherwise unused document id.
    """

    position: Tensor
    document: Tensor
    span: Tensor
    anchor: Tensor

    @property
    def is_mask(self) -> Tensor:
        return self.span != CLEAN

    def __len__(self) -> int:
        return self.position.shape[-1]

    def apply(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        """The same rows with `change` applied to each attribute (an index, a view, a move)."""
        return Rows(
            change(self.position), change(self.document), change(self.span), change(self.anchor)
        )

    def join(self, other: "Rows") -> "Rows":
        """These rows, then the other ones."""
        pairs = (
            (self.position, other.position),
            (self.document, other.document),
            (self.span, other.span),
            (self.anchor, other.anchor),
        )
        return Rows(*(torch.cat(pair, dim=-1) for pair in pairs))


def visible(query: Rows, key: Rows) -> Tensor:
    """The rule, on rows whose attributes broadcast against each other. Returns bool.

    Within one document: a clean key is seen by the rows whose anchor lies behind it (for a clean query
    that is causal attention), a mask key only by the rows of its own span. Clean rows have span -1, so
    they never see a mask row.
    """
    sees_clean = key.position < query.anchor
    sees_mask = key.span == query.span
    # Written without torch.where: under FlexAttention's vmap this stays a handful of integer compares.
    clean_key = key.span == CLEAN
    allowed = (clean_key & sees_clean) | (~clean_key & sees_mask)
    return (key.document == query.document) & allowed


def dense(query: Rows, key: Rows) -> Tensor:
    """The dense form, `[..., Nq, Nk]` bool, True where the query (row) sees the key (column)."""
    return visible(
        query.apply(lambda attribute: attribute.unsqueeze(-1)),
        key.apply(lambda attribute: attribute.unsqueeze(-2)),
    )


def mask_mod(rows: Rows) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The FlexAttention form for batched rows (`[B, N]`): a `mask_mod(b, h, q_idx, kv_idx)`."""
    # int32 halves what the kernel loads for each element of a partly visible tile.
    small = rows.apply(lambda attribute: attribute.to(torch.int32))

    def tidar_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return visible(
            small.apply(lambda attribute: attribute[b, q_idx]),
            small.apply(lambda attribute: attribute[b, kv_idx]),
        )

    return tidar_mask


def clean_rows(length: int, *, start: int = 0) -> Rows:
    """`length` clean rows of one document at positions `start`, `start + 1`, ..."""
    position = torch.arange(start, start + length)
    zero = torch.zeros_like(position)
    return Rows(position, zero, zero + CLEAN, position + 1)


def span_rows(anchor: int, draft_len: int, *, span: int, limit: int | None = None) -> Rows:
    """One span: mask rows at positions `anchor` ... `anchor + draft_len - 1`, those past `limit` dropped."""
    end = anchor + draft_len if limit is None else min(anchor + draft_len, limit)
    position = torch.arange(anchor, max(anchor, end))
    zero = torch.zeros_like(position)
    return Rows(position, zero, zero + span, zero + anchor)


def prefill_rows(prompt_len: int, draft_len: int, *, limit: int | None = None) -> Rows:
    """Rows of a prefill: the prompt, then one span at its end (none when `draft_len` is 0)."""
    return clean_rows(prompt_len).join(span_rows(prompt_len, draft_len, span=0, limit=limit))


def decode_rows(
    prefix_len: int,
    num_drafts: int,
    anchors: Iterable[int],
    draft_len: int,
    *,
    limit: int | None = None,
) -> Rows:
    """Rows of a decode step behind `prefix_len` committed tokens: the draft, then one span per anchor offset."""
    rows = clean_rows(num_drafts, start=prefix_len)
    for span, offset in enumerate(anchors):
        rows = rows.join(span_rows(prefix_len + offset, draft_len, span=span, limit=limit))
    return rows


@dataclass(frozen=True, slots=True)
class Tail:
    """The rows of a decode step, relative to the prefix: constant for a given shape of step.

    Every row sees the whole prefix, so the step's mask is "all of the prefix, then `matrix`".

    offsets: int64 `[W]`, position of each row minus the prefix length.
    matrix: bool `[W, W]`, which tail row (column) each tail row sees.
    attributes: int32 `[3, W]`, position (minus the prefix length), span and anchor of each row: what the
    paged kernel applies the rule to.
    """

    num_drafts: int
    draft_len: int
    anchors: tuple[int, ...]
    offsets: Tensor
    matrix: Tensor
    attributes: Tensor

    def __len__(self) -> int:
        return self.num_drafts + len(self.anchors) * self.draft_len

    def span_start(self, anchor: int) -> int:
        """Index of the first row of the span with this anchor offset."""
        return self.num_drafts + self.anchors.index(anchor) * self.draft_len

    def within(self, room: int) -> Tensor:
        """`matrix` for a sequence with `room` positions left: rows past the end are seen by themselves alone."""
        inside = self.offsets < room
        return (self.matrix & inside) | torch.eye(len(self), dtype=torch.bool)


def build_tail(num_drafts: int, anchors: tuple[int, ...], draft_len: int) -> Tail:
    """The tail of a step with `num_drafts` draft rows and a span of `draft_len` mask rows per anchor offset.

    A prefill is the same thing behind an empty prefix: the prompt in the place of the draft, one span at
    its end. Raises AssertionError when an anchor offset lies outside `1..num_drafts`.
    """
    assert all(1 <= offset <= num_drafts for offset in anchors), (anchors, num_drafts)
    rows = decode_rows(0, num_drafts, anchors, draft_len)
    attributes = torch.stack((rows.position, rows.span, rows.anchor)).int()
    return Tail(num_drafts, draft_len, anchors, rows.position, dense(rows, rows), attributes)


cached_tail = lru_cache(maxsize=1024)(build_tail)
"""`build_tail` for decode steps, whose few shapes come again and again."""


def spans_for(span_set: tuple[int, ...], num_drafts: int) -> tuple[int, ...]:
    """Anchor offsets that a step with `num_drafts` draft rows runs: the span set's, or {1} if it has none there."""
    return tuple(offset for offset in span_set if offset <= num_drafts) or (1,)


def nearest_anchor(anchors: tuple[int, ...], accepted: int) -> int:
    """The anchor offset whose span carries on after `accepted` tokens: the largest one not past it.

    Where every anchor lies past it there is none, and the caller drafts nothing: 0.
    """
    return max((offset for offset in anchors if offset <= accepted), default=0)


def document_starts(document: Tensor) -> Tensor:
    """Where documents begin, bool `[B, N]`, from the document id of each token."""
    first = torch.ones_like(document, dtype=torch.bool)
    first[:, 1:] = document[:, 1:] != document[:, :-1]
    return first


def document_rows(document: Tensor) -> Rows:
    """Clean rows of packed documents, causal; positions restart with each.

    document: int64 `[B, N]`, ids that do not decrease along a packed sequence.
    """
    index = torch.arange(document.shape[1], device=document.device).expand_as(document)
    start = torch.where(document_starts(document), index, 0).cummax(dim=1).values
    position = index - start
    return Rows(position, document, torch.full_like(document, CLEAN), position + 1)


def training_rows(document: Tensor, draft_len: Tensor, offset: Tensor) -> Rows:
    """Rows of a training sequence, clean half then mask half, from the document id of each token.

    document: as for `document_rows`.
    draft_len, offset: int64 `[B]`; the grid of spans of each document starts at `offset` (the rows before
    it form a shorter span), 0 <= offset < draft_len. A span never crosses a document's end.
    """
    clean = document_rows(document)
    position = clean.position
    step, shift = draft_len.unsqueeze(1), offset.unsqueeze(1)
    anchor = (
        torch.div(position - shift, step, rounding_mode="floor").mul(step).add(shift).clamp(min=0)
    )
    span = (document_starts(document) | (position == anchor)).cumsum(dim=1) - 1
    return clean.join(Rows(position, document, span, anchor))


def training_labels(ids: Tensor, document: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of the clean rows (the next token) and of the mask rows (their own token), both `[B, N]`.

    A clean row at its document's last position and a mask row at its first carry `IGNORE`, so both halves
    have the same number of labels.
    """
    mask_labels = ids.masked_fill(document_starts(document), IGNORE)
    clean_labels = torch.full_like(ids, IGNORE)
    clean_labels[:, :-1] = mask_labels[:, 1:]
    return clean_labels, mask_labels


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a step is built: rows per span and draft (`draft_len`), and which accept counts get a span.

    `Schedule(1, ())` is plain autoregressive decoding. half: one of the two steps that the two-forward
    schedule takes in turn (see `two_forward`): "verify" has the draft and no span, "draft" the certain
    token alone and one span behind it. Raises TidarError for impossible values.
    """

    draft_len: int
    span_set: tuple[int, ...]
    half: Literal["draft", "verify"] | None = None

    def __post_init__(self) -> None:
        if self.draft_len < 1:
            raise TidarError(
                f"draft_len is {self.draft_len}; it must be at least 1 (1 is plain AR)."
            )
        wrong = [n for n in self.span_set if not 1 <= n <= self.draft_len]
        if wrong or list(self.span_set) != sorted(set(self.span_set)):
            raise TidarError(
                f"span set {self.span_set} does not fit draft_len {self.draft_len}: give accept counts "
                f"from 1 to {self.draft_len}, each once, in rising order."
            )
        assert self.half is None or (self.drafts and self.span_set == (1,)), self

    @property
    def drafts(self) -> bool:
        """Whether it drafts at all; with one token per span there is nothing to draft."""
        return self.draft_len > 1

    @property
    def draft_rows(self) -> int:
        """The most draft rows of a step. A longer draft is cut, which is always exact."""
        return 1 if self.half == "draft" else self.draft_len

    def anchors(self, num_drafts: int) -> tuple[int, ...]:
        """Anchor offsets of the spans of a step with `num_drafts` draft rows."""
        if not self.drafts or self.half == "verify":
            return ()
        return spans_for(self.span_set, num_drafts)

    @property
    def steps(self) -> tuple["Schedule", ...]:
        """What its steps are in turn: itself alone, or both halves."""
        if self.half is None:
            return (self,)
        return (replace(self, half="verify"), replace(self, half="draft"))

    def after(self, last: "Schedule | None") -> "Schedule":
        """The schedule of a step behind one with the schedule `last`; None: of a prefill.

        Itself, but that a half gives way to the other one: there is something to verify only behind a
        step that had spans. So whoever runs steps alternates, and plans need not know.
        """
        if self.half is None:
            return self
        verify, draft = self.steps
        return verify if last is not None and last.anchors(last.draft_rows) else draft

    @classmethod
    def parse(cls, draft_len: int, text: str) -> "Schedule":
        """From a command line: `dense`, `single` ({1}), `none`, `two-forward`, or numbers: `1,2,4,8`."""
        if text == "dense":
            return cls(draft_len, tuple(range(1, draft_len + 1)))
        if text == "two-forward":
            return two_forward(draft_len)
        if text in ("single", "none"):
            return cls(draft_len, (1,) if text == "single" else ())
        try:
            numbers = tuple(sorted({int(part) for part in text.split(",")}))
        except ValueError:
            raise TidarError(
                f"span set {text!r} is not understood: give dense, single, none, two-forward, or accept "
                "counts separated by commas, such as 1,2,4,8."
            ) from None
        return cls(draft_len, numbers)


AUTOREGRESSIVE = Schedule(1, ())


def dense_schedule(draft_len: int) -> Schedule:
    """The paper's schedule: a span for every accept count from 1 to K."""
    return Schedule(draft_len, tuple(range(1, draft_len + 1)))


def two_forward(draft_len: int) -> Schedule:
    """Two steps in turn, one that drafts and one that verifies, instead of one that does both.

    A "draft" step has 1 + K rows, the certain token d[0] and a span behind it: d[0] commits, its row
    resolves the next d[0], the span's rows 1.. draft what follows. A "verify" step has K rows, that draft
    alone: n of its tokens commit and only the next d[0] is left. Together 1 + n tokens for 1 + 2K rows:
    more tokens per row than any fused step, fewer per step. So it is for loads whose rows cost time.
    """
    return Schedule(draft_len, (1,), "verify") if draft_len > 1 else AUTOREGRESSIVE
