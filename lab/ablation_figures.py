"""The figure of each ablation, from its record alone."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lab.ablation_readings import (
    OWN,
    QUALITY,
    REAL,
    ROWS,
    Figures,
    Reading,
    domains_of,
    over_ar,
    quality,
)
from tidar.bench.plot import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def label(name: str) -> Reading:
    """A value that tells cases apart."""
    return lambda case, domain: case["labels"][name]


def strategy_kind(case: Figures, domain: str) -> str:
    """Strategies that differ in a number alone are points of one line."""
    name: str = case["labels"]["strategy"]
    return name.split(",")[0].split(" >")[0]


@dataclass(frozen=True, slots=True)
class Curve:
    """What a figure shows: x and y of each case, and which line it is on. log: the x axis is, with that base."""

    line: Reading
    x: Reading
    x_label: str
    ys: Mapping[str, Reading]
    log: int | None = None


REAL_TEXT: Final = {"tokens per forward, real text": REAL}
CURVES: Final[Mapping[str, Curve]] = {
    "masking": Curve(label("masks"), label("K"), "K, tokens", REAL_TEXT, 2),
    "strategies": Curve(strategy_kind, OWN, "tokens per forward, own text", {"quality": quality}),
    "weights": Curve(
        label("alpha"), label("beta"), "beta: trust in the causal logits",
        {"quality": quality, "tokens per forward, own text": OWN},
    ),
    "draft-lens": Curve(label("trained"), label("K"), "K that is used, tokens (32: six spans)", REAL_TEXT, 2),
    "anchors": Curve(label("anchors"), label("K"), "K, tokens", REAL_TEXT, 2),
    "labels": Curve(label("labels"), label("K"), "K, tokens", REAL_TEXT, 2),
    "tokens": Curve(
        label("K"), label("clean tokens, M"), "clean tokens of the conversion, millions", REAL_TEXT, 10,
    ),
    "spans": Curve(lambda case, domain: "K = 16", ROWS, "rows of a step", REAL_TEXT),
}  # fmt: skip
"""All but `two-forward`, whose figure is of speeds."""


def draw(record: Figures, path: Path) -> None:
    """A column of panels for each domain, a row for each measure. Raises TidarError without matplotlib."""
    name, domains = record["ablation"], domains_of(record)
    curve = CURVES.get(name)
    ys = list(curve.ys) if curve else ["tokens/s over AR"]
    figure = new_figure(4.4 * len(domains), 0.6 + 3.0 * len(ys))
    panels = figure.subplots(len(ys), len(domains), squeeze=False)
    for row, y_label in zip(panels, ys, strict=True):
        for axes, domain in zip(row, domains, strict=True):
            lines = _lines(record, curve, y_label, domain) if curve else _speeds(record, domain)
            for told, points in lines.items():
                axes.plot(*zip(*sorted(points), strict=True), "o-", markersize=3.5, label=told)
            axes.set_title(domain, fontsize=9)
            axes.set_ylabel(QUALITY[domain] if y_label == "quality" else y_label, fontsize=8)
            axes.set_xlabel(curve.x_label if curve else "batch, sequences", fontsize=8)
            _scale_x(axes, curve.log if curve else 2, lines)
            _scale_y(axes, y_label)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.25)
    if name == "spans":
        _name_points(panels[0], record, domains)
    else:
        title = curve and {"weights": "alpha", "tokens": "K", "draft-lens": "K trained"}.get(name)
        panels[0][-1].legend(
            loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize=7, title=title, title_fontsize=7
        )
    figure.suptitle("\n".join(textwrap.wrap(record["question"], 80)), fontsize=10)
    save_figure(figure, path)


Lines = Mapping[str, Sequence[tuple[float, float]]]


def _lines(record: Figures, curve: Curve, y_label: str, domain: str) -> Lines:
    found: dict[str, list[tuple[float, float]]] = {}
    for case in record["cases"]:
        x, y = curve.x(case, domain), curve.ys[y_label](case, domain)
        if x is not None and y is not None:
            found.setdefault(str(curve.line(case, domain)), []).append((float(x), float(y)))
    return found


def _speeds(record: Figures, domain: str) -> Lines:
    return {
        case["method"]: [
            (batch, gain)
            for batch in record["settings"]["batches"]
            if (gain := over_ar(record, case, domain, batch)) is not None
        ]
        for case in record["cases"]
    }


def _scale_x(axes: "Axes", base: int | None, lines: Lines) -> None:
    if base is not None:
        axes.set_xscale("log", base=base)
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.minorticks_off()


def _scale_y(axes: "Axes", y_label: str) -> None:
    """Shares from 0 to 1; else up from AR, which has one token per forward, so that small differences look small."""
    if y_label == "quality":
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        return
    axes.axhline(1.0, color="0.6", linewidth=0.8, linestyle=":")
    lowest, highest = axes.get_ylim()
    axes.set_ylim(min(lowest, 0.95), max(highest, 1.5))


def _name_points(panels: "Sequence[Axes]", record: Figures, domains: Sequence[str]) -> None:
    """Which span set a point is, beside it."""
    for axes, domain in zip(panels, domains, strict=True):
        for case in record["cases"]:
            at = (float(ROWS(case, domain) or 0), float(REAL(case, domain) or 0))
            axes.annotate(
                case["labels"]["spans"], at, fontsize=6, xytext=(0, -4), textcoords="offset points",
                rotation=-50, rotation_mode="anchor", va="top",
            )  # fmt: skip
