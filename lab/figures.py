"""Figures: one message each, a colour for each method that is the same everywhere, names beside the points."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tidar.bench.plot import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: Final[Mapping[str, str]] = {
    "ar": "#5f6b7a", "tidar": "#2f9c76", "speculative": "#2f6db3", "eagle": "#7a4fb5",
    "block-diffusion": "#d98a1f", "llada": "#c0453f", "dream": "#b0478f", "masked-diffusion": "#c0453f",
}  # fmt: skip

CLEAR: Final = 0.07
"""Between two names at the side of a panel, as a share of its height."""


def colour(name: str) -> str:
    """Of a contender or a method; raises KeyError for one that has none."""
    kind = name.partition(":")[0]
    return COLOURS[kind] if kind in COLOURS else COLOURS[kind.partition("-")[0]]


@dataclass(frozen=True, slots=True)
class Point:
    """A contender in a panel of a trade-off. is_variant: of another one, whose name stands for both."""

    name: str
    x: float
    y: float
    is_variant: bool = False


def draw_trade_off(
    panels: Mapping[str, Sequence[Point]], title: str, x_label: str, y_labels: Mapping[str, str], path: Path
) -> None:  # fmt: skip
    """Quality against speed, a panel for each domain; up and right is better. The line is AR's own quality."""
    figure = new_figure(4.3 * len(panels), 3.6)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (domain, points) in zip(axes, panels.items(), strict=True):
        for point in points:
            inside = "white" if point.is_variant else colour(point.name)
            size = 4.5 if point.is_variant else 6
            axis.plot(
                [point.x], [point.y], "o", color=colour(point.name), markersize=size, markerfacecolor=inside
            )  # fmt: skip
        base = next((point.y for point in points if point.name == "ar"), None)
        if base is not None:
            axis.axhline(base, color=COLOURS["ar"], linewidth=0.8, linestyle=":")
        axis.set_xlim(0.0, 1.08 * max(1.0, *(point.x for point in points)))
        axis.set_ylim(-0.05, 1.05)
        _write_names(axis, [point for point in points if not point.is_variant])
        axis.set_title(domain, fontsize=10)
        axis.set_xlabel(x_label, fontsize=9)
        axis.set_ylabel(y_labels[domain], fontsize=9)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        _plain(axis)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def _write_names(axis: "Axes", points: Sequence[Point]) -> None:
    """Names in a column at the right, in the order of the points, each with a line to its own."""
    low, high = axis.get_ylim()
    ordered = sorted(points, key=lambda each: (each.y, -each.x))
    heights = apart([(point.y - low) / (high - low) for point in ordered])
    for point, height in zip(ordered, heights, strict=True):
        axis.annotate(
            point.name, (point.x, point.y), xytext=(1.04, height), textcoords="axes fraction", fontsize=8,
            va="center", color=colour(point.name), annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": colour(point.name), "alpha": 0.35, "linewidth": 0.7,
                "relpos": (0.0, 0.5),
            },
        )  # fmt: skip


def apart(heights: Sequence[float]) -> list[float]:
    """Rising heights moved as little as keeps them `CLEAR` apart, and within 0 to 1 where there is room."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + CLEAR) if moved else height)
    highest = 1.0
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], highest)
        highest = moved[index] - CLEAR
    return moved


def draw_speeds(
    panels: Mapping[str, Mapping[str, Mapping[str, float]]], title: str, path: Path
) -> None:
    """Speed over AR: panel, method, then median, min and max over prompts. The line is AR."""
    methods = list(dict.fromkeys(method for each in panels.values() for method in each))
    figure = new_figure(2.9 * len(panels) + 1.2, 0.42 * len(methods) + 1.5)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    places = {method: -i for i, method in enumerate(methods)}
    for axis, (label, told) in zip(axes, panels.items(), strict=True):
        for method, speed in told.items():
            reach = [[speed["median"] - speed["min"]], [speed["max"] - speed["median"]]]
            axis.errorbar(
                [speed["median"]], [places[method]], xerr=reach, fmt="o", color=colour(method),
                markersize=5, capsize=2,
            )  # fmt: skip
            axis.annotate(
                f"{speed['median']:.2f}", (speed["median"], places[method]), xytext=(0, 6),
                textcoords="offset points", fontsize=8, ha="center",
            )  # fmt: skip
        axis.axvline(1.0, color=COLOURS["ar"], linewidth=0.8)
        axis.set_xlim(0.0, None)
        axis.set_ylim(0.5 - len(methods), 0.7)
        axis.set_yticks(list(places.values()), list(places), fontsize=8)
        axis.set_title(label, fontsize=9)
        axis.set_xlabel("tokens/s over AR", fontsize=8)
        _plain(axis)
    figure.suptitle(f"{title}\nmedian prompt, least to most", fontsize=10)
    save_figure(figure, path)


def _plain(axis: "Axes") -> None:
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
