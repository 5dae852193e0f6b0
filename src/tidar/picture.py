"""Masks drawn from the visibility rule: as text for a terminal, as a PNG for a page.

Nothing here knows a mask of its own. Each picture is `layout.dense` of the rows that training,
prefill or a decode step really uses, coloured by which clause of the rule lets a query see a key.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from tidar.errors import TidarError
from tidar.layout import (
    CLEAN,
    Rows,
    Schedule,
    clean_rows,
    decode_rows,
    dense,
    prefill_rows,
    training_rows,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_ROWS: Final = 512
"""Pictures with more rows than this are refused: nobody can read them."""


class Relation(IntEnum):
    """Which clause of the rule applies to a query and a key."""

    HIDDEN = 0
    CAUSAL = 1
    CLEAN_BEFORE_ANCHOR = 2
    SAME_SPAN = 3


MEANINGS: Final = {
    Relation.CAUSAL: "clean row sees clean row: key position <= query position",
    Relation.CLEAN_BEFORE_ANCHOR: "mask row sees clean row: key position < anchor of its span",
    Relation.SAME_SPAN: "mask row sees mask row of its own span, both directions",
}
_GLYPHS: Final = {
    Relation.HIDDEN: "·",
    Relation.CAUSAL: "■",
    Relation.CLEAN_BEFORE_ANCHOR: "▣",
    Relation.SAME_SPAN: "●",
}
_SHORT: Final = {
    Relation.HIDDEN: "not visible",
    Relation.CAUSAL: "causal",
    Relation.CLEAN_BEFORE_ANCHOR: "clean before anchor",
    Relation.SAME_SPAN: "same span",
}
_COLOURS: Final = {
    Relation.HIDDEN: "#f6f7f9",
    Relation.CAUSAL: "#2f6db3",
    Relation.CLEAN_BEFORE_ANCHOR: "#e39a3b",
    Relation.SAME_SPAN: "#2f9c76",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """Rows of one forward pass, drawn against themselves.

    groups: names of the neighbouring groups of rows (prefix, draft, span ...) with how many rows
    each has. note: one line that says what the picture shows.
    """

    title: str
    note: str
    rows: Rows
    groups: tuple[tuple[str, int], ...]

    @property
    def matrix(self) -> Tensor:
        """The mask, bool `[N, N]`: row sees column."""
        return dense(self.rows, self.rows)

    @property
    def relations(self) -> Tensor:
        """`Relation` of each query (row) and key (column), int64 `[N, N]`."""
        mask = self.rows.is_mask
        kind = torch.full_like(self.matrix, Relation.CAUSAL, dtype=torch.int64)
        kind[mask] = Relation.CLEAN_BEFORE_ANCHOR
        kind[:, mask] = Relation.SAME_SPAN
        return kind * self.matrix

    def to_json(self) -> dict[str, Any]:
        """Rows and matrix as JSON values."""
        rows = self.rows
        return {
            "title": self.title,
            "note": self.note,
            "groups": [{"name": name, "rows": count} for name, count in self.groups],
            "rows": [
                {
                    "kind": "clean" if span == CLEAN else "mask",
                    "position": position,
                    "document": document,
                    "span": None if span == CLEAN else span,
                    "anchor": anchor,
                }
                for position, document, span, anchor in zip(
                    rows.position.tolist(),
                    rows.document.tolist(),
                    rows.span.tolist(),
                    rows.anchor.tolist(),
                    strict=True,
                )
            ],
            "visible": self.matrix.int().tolist(),
            "relation": self.relations.tolist(),
            "relations": {str(int(r)): _SHORT[r] for r in Relation},
        }


def _checked(picture: Picture) -> Picture:
    if len(picture.rows) > MAX_ROWS:
        raise TidarError(
            f"That picture would have {len(picture.rows)} rows; the most is {MAX_ROWS}. "
            "Make the lengths smaller."
        )
    return picture


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise TidarError(f"{name} is {value}; it must be at least {least}.")


def training_picture(documents: Sequence[int], draft_len: int, offset: int = 0) -> Picture:
    """A training sequence of packed documents with these lengths: clean half, then mask half."""
    _at_least("draft length", draft_len, 1)
    if not documents or min(documents) < 1:
        raise TidarError(f"document lengths are {list(documents)}; give one or more, each above 0.")
    if sum(documents) > MAX_ROWS:
        raise TidarError(f"{sum(documents)} tokens are too many to draw; at most {MAX_ROWS // 2}.")
    if not 0 <= offset < draft_len:
        raise TidarError(
            f"offset is {offset}; it must be from 0 to {draft_len - 1} (draft_len - 1)."
        )
    document = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
    batched = training_rows(document[None], torch.tensor([draft_len]), torch.tensor([offset]))
    rows = batched.apply(lambda attribute: attribute[0])
    size = len(document)
    spans = rows.span[size:].unique_consecutive(return_counts=True)[1].tolist()
    several = len(documents) > 1
    groups = [(f"text {i}" if several else "clean", n) for i, n in enumerate(documents)]
    groups += [(f"span {i}", n) for i, n in enumerate(spans)]
    shift = f", grid offset {offset}" if offset else ""
    note = (
        f"{size} tokens in {len(documents)} document{'s' * several}, K = {draft_len}{shift}: "
        "every position once as a clean row (predicts the next token), once as a mask row "
        "(predicts its own)"
    )
    return _checked(Picture("Training: clean half, then mask half", note, rows, tuple(groups)))


def prefill_picture(prompt_len: int, draft_len: int) -> Picture:
    """A prefill: the prompt, and one span that drafts what follows it."""
    _at_least("prompt length", prompt_len, 1)
    _at_least("draft length", draft_len, 1)
    rows = prefill_rows(prompt_len, draft_len)
    groups = (("prompt", prompt_len), ("span", draft_len))
    note = f"{prompt_len} prompt tokens and one span of K = {draft_len} mask rows, in one pass"
    return _checked(Picture("Prefill: prompt, then one span", note, rows, groups))


def decode_picture(
    prefix_len: int, schedule: Schedule, drafts: int | None = None, shown_prefix: int = 12
) -> Picture:
    """A decode step: the last `shown_prefix` tokens of the prefix, the draft, the spans."""
    draft_len = schedule.draft_len
    drafts = draft_len if drafts is None else drafts
    _at_least("prefix length", prefix_len, 0)
    if not 1 <= drafts <= draft_len:
        raise TidarError(f"drafts is {drafts}; a step verifies from 1 to K = {draft_len} of them.")
    anchors = schedule.anchors(drafts)
    shown = min(prefix_len, shown_prefix)
    prefix = clean_rows(shown, start=prefix_len - shown)
    tail = decode_rows(prefix_len, drafts, anchors, draft_len)
    groups = (("prefix", shown), ("draft", drafts), *((f"n = {n}", draft_len) for n in anchors))
    cut = f" (the last {shown} shown)" if shown < prefix_len else ""
    spans = ", ".join(map(str, anchors)) or "none"
    if len(anchors) > 2 and anchors == tuple(range(1, len(anchors) + 1)):
        spans = f"1 to {len(anchors)}"
    note = (
        f"{prefix_len} committed tokens{cut}, {drafts} draft rows, "
        f"spans for accept counts {spans}: "
        f"{len(tail)} rows in the step (the prefix is in the cache)"
    )
    title = f"Decode step: draft, then spans (K = {draft_len})"
    return _checked(Picture(title, note, prefix.join(tail), tuple(g for g in groups if g[1])))


def _edges(picture: Picture) -> list[int]:
    """Row index at which each group but the first starts."""
    starts, at = [], 0
    for _, count in picture.groups[:-1]:
        at += count
        starts.append(at)
    return starts


def draw_text(picture: Picture) -> str:
    """The picture as text: one line a row, labelled kind, position and group; columns ditto."""
    relations, rows = picture.relations.tolist(), picture.rows
    positions, edges = rows.position.tolist(), set(_edges(picture))
    names = [name for name, count in picture.groups for _ in range(count)]
    kinds = ["mask" if mask else "clean" for mask in rows.is_mask.tolist()]
    width = max(map(len, names))
    digits = len(str(max(positions)))
    margin = 5 + 1 + width + 2 + digits + 2

    def spread(cells: Sequence[str]) -> str:
        return "".join(
            (" │ " if i in edges else " " if i else "") + cell for i, cell in enumerate(cells)
        )

    lines = [picture.title, picture.note, ""]
    heads = [str(position).rjust(digits) for position in positions]
    for digit in range(digits):
        label = "key position".rjust(margin - 2) if digit == digits - 1 else ""
        lines.append(label.ljust(margin) + spread([head[digit] for head in heads]))
    for i, row in enumerate(relations):
        if i in edges:
            rule = spread(["─"] * len(row)).replace("─ ─", "───").replace("─ ─", "───")
            lines.append(" " * margin + rule.replace(" │ ", "─┼─"))
        name = names[i] if i in edges or not i else ""
        label = f"{kinds[i]:<5} {name:<{width}}  {positions[i]:>{digits}}  "
        lines.append(label + spread([_GLYPHS[Relation(cell)] for cell in row]))
    used = {Relation(cell) for row in relations for cell in row}
    lines.append("")
    lines += [f"{_GLYPHS[r]}  {meaning}" for r, meaning in MEANINGS.items() if r in used]
    lines.append(f"{_GLYPHS[Relation.HIDDEN]}  not visible")
    return "\n".join(lines)


def save_png(picture: Picture, path: Path) -> None:
    """Draws the picture into a PNG. Raises TidarError without matplotlib or a place to write."""
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise TidarError(
            "Drawing a PNG needs matplotlib, which is not installed: pip install 'tidar[plot]'."
        ) from error
    size = len(picture.rows)
    side = min(max(0.26 * size, 4.0), 14.0)
    figure = Figure(figsize=(side + 1.7, side + 2.5), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    colours = ListedColormap([_COLOURS[relation] for relation in Relation])
    axes.pcolormesh(
        picture.relations.numpy(),
        cmap=colours,
        vmin=-0.5,
        vmax=len(Relation) - 0.5,
        edgecolors="white",
        linewidth=min(1.2, 40 / size),
    )
    axes.set_aspect("equal")
    axes.invert_yaxis()
    _label_axes(axes, picture, side)
    used = set(picture.relations.unique().tolist())
    handles = [
        Patch(facecolor=_COLOURS[r], edgecolor="#c4c9d1", label=MEANINGS.get(r, "not visible"))
        for r in (*MEANINGS, Relation.HIDDEN)
        if r in used or r is Relation.HIDDEN
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=1, frameon=False, fontsize=8.5)
    try:
        figure.savefig(path, facecolor="white", bbox_inches="tight", pad_inches=0.25)
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no image format
        raise TidarError(f"cannot write the picture {path}: {error}") from error


def _label_axes(axes: "Axes", picture: Picture, side: float) -> None:
    """Title, positions along both axes, lines between groups, group names above and to the left."""
    size, positions = len(picture.rows), picture.rows.position.tolist()
    longest = max(len(name) for name, _ in picture.groups)
    narrow = any(count * side / size < 0.085 * len(name) for name, count in picture.groups)
    above = 10 + (5.6 * longest if narrow else 12)
    note = fill(picture.note, max(int(side * 13), 40))
    lines = note.count("\n") + 1
    styles: tuple[tuple[str, float, dict[str, Any]], ...] = (
        (picture.title, above + 12 * lines + 5, {"fontsize": 13, "fontweight": "bold"}),
        (note, above, {"fontsize": 8.5, "color": "#4a5563", "linespacing": 1.3}),
    )
    for text, height, style in styles:
        axes.annotate(
            text, (0, 1), xytext=(0, height), xycoords="axes fraction",
            textcoords="offset points", va="bottom", **style,
        )  # fmt: skip
    every = max(1, -(-size // int(side * 4)))
    ticks = [i + 0.5 for i in range(0, size, every)]
    labels = [str(positions[i]) for i in range(0, size, every)]
    axes.set_xticks(ticks, labels, fontsize=7, color="#4a5563")
    axes.set_yticks(ticks, labels, fontsize=7, color="#4a5563")
    axes.tick_params(length=0, pad=3)
    axes.set_xlabel("key: position of the row that is looked at", fontsize=9, color="#1d2733")
    axes.set_ylabel(
        "query: position of the row that looks", fontsize=9, color="#1d2733", labelpad=8
    )
    axes.yaxis.set_label_coords(-(30 + 5.8 * longest) / (72 * side), 0.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for edge in _edges(picture):
        axes.axhline(edge, color="#1d2733", linewidth=0.9)
        axes.axvline(edge, color="#1d2733", linewidth=0.9)
    start = 0
    masks = picture.rows.is_mask.tolist()
    for name, count in picture.groups:
        middle = start + count / 2
        colour = _COLOURS[Relation.SAME_SPAN if masks[start] else Relation.CAUSAL]
        axes.annotate(
            name, (middle, 0), xytext=(0, 6), textcoords="offset points", ha="center",
            va="bottom", fontsize=8, color=colour, fontweight="bold", rotation=90 if narrow else 0,
        )  # fmt: skip
        axes.annotate(
            name, (0, middle), xytext=(-24, 0), textcoords="offset points", ha="right",
            va="center", fontsize=8, color=colour, fontweight="bold",
        )  # fmt: skip
        start += count
