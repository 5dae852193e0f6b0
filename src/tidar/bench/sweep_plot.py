"""Speed over AR against batch, from the record of a sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidar.bench.plot import new_figure, save_figure
from tidar.errors import TidarError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_drawable(names: Sequence[str]) -> None:
    """Raises TidarError, before anything is measured, where these methods will leave nothing to draw."""
    if "ar" not in names or len(names) < 2:
        raise TidarError("A figure is of speeds over AR: name ar and another method (--methods).")
    new_figure(1.0, 1.0)


def save_sweep(record: dict[str, Any], path: Path) -> None:
    """Decode speed over AR against batch, a line per context, a panel per method, into a PNG.

    Solid: as measured, least to most over runs; dotted: at the expected T/NFE, where there is one.
    Raises TidarError where nothing was measured beside AR, without matplotlib or a place to write.
    """
    cells = [cell for cell in record["cells"] if cell["methods"]]
    names = [name for name in record["settings"]["methods"] if name != "ar"]
    check_drawable(record["settings"]["methods"])
    if not cells:
        raise TidarError("There is nothing to draw: no cell was measured.")
    figure = new_figure(1.0 + 5.0 * len(names), 4.4)
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axes, name in zip(panels, names, strict=True):
        _draw(axes, cells, name)
    panels[0].set_ylim(bottom=0.0)
    panels[0].set_ylabel("decode speed, x AR")
    panels[0].legend(title="context")
    model, where = record["model"], record["environment"]
    figure.suptitle(
        f"{record['label']}, {model['source']}, {record['settings']['dtype']}, {where['gpu'] or where['cpu']}\n"
        "solid: measured T/NFE; dotted: expected T/NFE",
        fontsize=9,
    )
    save_figure(figure, path)


def _draw(axes: "Axes", cells: Sequence[dict[str, Any]], name: str) -> None:
    for context in dict.fromkeys(cell["context"] for cell in cells):
        mine = sorted(
            (cell["batch"], cell["methods"][name]["x_ar"])
            for cell in cells
            if cell["context"] == context
        )
        colour = None
        for key, style in (("decode", "-"), ("decode_at_expected", ":")):
            points = [(batch, gain[key]) for batch, gain in mine if gain[key] is not None]
            if not points:
                continue
            middles = [gain["median"] for _, gain in points]
            reach = None
            if key == "decode":
                low = [gain["median"] - gain["min"] for _, gain in points]
                reach = [low, [gain["max"] - gain["median"] for _, gain in points]]
            drawn = axes.errorbar(
                [batch for batch, _ in points],
                middles,
                yerr=reach,
                linestyle=style,
                color=colour,
                marker="o" if reach else None,
                markersize=3.5,
                capsize=2.0,
                label=f"{context:,}" if key == "decode" else None,
            )
            colour = drawn.lines[0].get_color()
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    axes.set_xscale("log", base=2)
    batches = sorted({cell["batch"] for cell in cells})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("batch")
    axes.set_title(name, fontsize=9)
