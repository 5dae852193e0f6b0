"""A table and a figure for each ablation, from records alone: nothing is run.

python -m lab.ablation_tables RECORDS OUT
"""

import math
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lab.ablation_plan import ablations
from lab.command import exit_code
from lab.page import Picture, Section, Shelf, joined, markdown_table, write_page
from lab.plan import FULL
from tidar.bench.plot import new_figure, save_figure
from tidar.errors import TidarError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMMAND: Final = "python -m lab.ablations --out runs/lab"

Figures = Mapping[str, Any]
Reading = Callable[[Figures, str], float | str | None]
"""Of a case and a domain: a number, a text, or nothing."""


# --- what a case says ---


def label(name: str) -> Reading:
    """A column that tells cases apart."""
    return lambda case, domain: case["labels"][name]


def figure_of(which: str, name: str) -> Reading:
    """Of texts: which is "forced" (the real ones) or "free" (the model's own)."""

    def read(case: Figures, domain: str) -> float | None:
        told = case["domains"][domain].get(which)
        return None if told is None else told[name]

    return read


REAL: Final = figure_of("forced", "tokens_per_forward")
OWN: Final = figure_of("free", "tokens_per_forward")
ROWS: Final = figure_of("forced", "rows_per_step")


def quality(case: Figures, domain: str) -> float | None:
    """Of the model's own texts: right answers, or Python that compiles where there are none."""
    told = case["domains"][domain].get("free")
    if told is None:
        return None
    return told["valid_python"] if told["exact_match"] is None else told["exact_match"]


def strategy_kind(case: Figures, domain: str) -> str:
    """Strategies that differ in a number alone are points of one line."""
    name: str = case["labels"]["strategy"]
    return name.split(",")[0].split(" >")[0]


# --- tables ---

QUALITY: Final = {"python": "valid Python", "arithmetic": "exact match"}


def table(record: Figures) -> list[list[str]]:
    """The heading, and a row for each case; columns that nothing was measured for are left out."""
    columns = timed_columns(record) if "batches" in record["settings"] else text_columns(record)
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    return [list(kept), *map(list, zip(*kept.values(), strict=True))]


def text_columns(record: Figures) -> dict[str, list[str]]:
    """Labels, T/NFE of real and own texts, rows of a step, quality; losses, where there are several models."""
    cases, losses = record["cases"], record["losses"]
    columns: dict[str, list[str]] = {
        name: [str(case["labels"][name]) for case in cases] for name in cases[0]["labels"]
    }
    for domain in _domains(record):
        columns[f"T/NFE, real · own text: {domain}"] = [
            joined(_cell(REAL(case, domain), ".2f"), _cell(OWN(case, domain), ".2f"))
            for case in cases
        ]
    first = _domains(record)[0]
    columns[f"rows a step: {first}"] = [_cell(ROWS(case, first), ".0f") for case in cases]
    for domain in _domains(record):
        count = record["prompts"][domain]["count"]
        columns[QUALITY[domain]] = [_share(quality(case, domain), count) for case in cases]
    if len(losses) > 1:
        columns |= _loss_columns(record)
    return columns


def _loss_columns(record: Figures) -> dict[str, list[str]]:
    """What the weights of each case say of held-out text."""
    domains = _domains(record)
    of = [
        [record["losses"][case["model"]][domain] for domain in domains] for case in record["cases"]
    ]
    columns = {
        f"bits per byte: {', '.join(domains)}": [
            joined(*(_cell(each["bits_per_byte"], ".3f") for each in told)) for told in of
        ]
    }
    for index, domain in enumerate(domains):
        columns[f"mask loss, K = {_slashed(of[0][index]['mask_loss'])}: {domain}"] = [
            _mask_loss(told[index]) for told in of
        ]
    return columns


def timed_columns(record: Figures) -> dict[str, list[str]]:
    """Labels, then tokens per second at every batch (over AR's), and T/NFE, of each domain."""
    cases = record["cases"]
    columns = {name: [str(c["labels"][name]) for c in cases] for name in cases[0]["labels"]}
    for domain in _domains(record):
        for batch in record["settings"]["batches"]:
            columns[f"tokens/s at batch {batch} (over AR): {domain}"] = [
                f"{_cell(tokens_per_second(case, domain, batch), ',.0f')} "
                f"({_cell(over_ar(record, case, domain, batch), '.2f')})"
                for case in cases
            ]
        first = str(record["settings"]["batches"][0])
        columns[f"T/NFE: {domain}"] = [
            _cell(case["domains"][domain][first]["tokens_per_forward"], ".2f") for case in cases
        ]
    return columns


def tokens_per_second(case: Figures, domain: str, batch: int) -> float | None:
    """The median over runs, end to end."""
    told = case["domains"][domain][str(batch)]["tokens_per_second"]
    return None if told is None else float(told["median"])


def over_ar(record: Figures, case: Figures, domain: str, batch: int) -> float | None:
    """Tokens per second over those of AR, same weights and batch."""
    base = next(each for each in record["cases"] if each["method"] == "ar")
    mine, slow = (tokens_per_second(each, domain, batch) for each in (case, base))
    return mine / slow if mine and slow else None


def _domains(record: Figures) -> list[str]:
    return list(record["cases"][0]["domains"])


def _share(value: float | None, count: int) -> str:
    """With the standard error that a share of `count` independent texts has."""
    return "" if value is None else f"{value:.0%} ± {math.sqrt(value * (1 - value) / count):.0%}"


def _slashed(values: Iterable[str]) -> str:
    return " / ".join(values)


def _mask_loss(losses: Figures) -> str:
    return _slashed(_cell(value, ".2f") for value in losses["mask_loss"].values())


def _cell(value: float | str | None, form: str) -> str:
    return "" if value is None else format(value, form)


def section(record: Figures) -> Section:
    """The question, the table, and what the numbers are of."""
    name, settings = record["ablation"], record["settings"]
    counts = ", ".join(f"{each['count']} of {domain}" for domain, each in record["prompts"].items())
    told = f"{_notes(record)}Temperature 0, the {settings['engine']} engine; prompts: {counts}."
    picture = Picture(f"ablation_{name}.png", _alt(record), partial(draw, record))
    return Section(
        key=f"ablation-{name}",
        title=f"Ablation: {name}",
        body=f"{record['question']}\n\n{markdown_table(*_head_and_rows(record))}\n\n{told}",
        records=(name,),
        commands=(f"{COMMAND} {name}",),
        pictures=(picture,),
    )


def _head_and_rows(record: Figures) -> tuple[list[str], list[list[str]]]:
    head, *rows = table(record)
    return head, rows


def _alt(record: Figures) -> str:
    """The picture in words."""
    curve = CURVES.get(record["ablation"])
    shown = ", ".join(curve.ys) if curve else "tokens per second over AR"
    x_label = curve.x_label if curve else "batch"
    return f"{shown} against {x_label.split(',')[0]}"


def sections(shelf: Shelf) -> list[Section]:
    """Of the ablations whose records are there."""
    return [section(record) for _, record in shelf.present(ablations(FULL))]


def _notes(record: Figures) -> str:
    """What the columns do not say: units, and the losses of the one model there is."""
    if "losses" not in record:
        return f"Medians of {record['settings']['runs']} runs, end to end. "
    losses = record["losses"]
    notes = f"Bits per byte and mask loss (nats a token): {record['settings']['held_out']} held-out documents"
    if len(losses) > 1:
        return f"{notes} of each domain. "
    (only,) = losses.values()
    told = "; ".join(
        f"{domain} {each['bits_per_byte']:.3f} bits, mask loss {_mask_loss(each)} "
        f"at K = {_slashed(each['mask_loss'])}"
        for domain, each in only.items()
    )
    return f"{notes}: {told}. "


# --- figures ---


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
    "draft-lens": Curve(label("trained"), label("K"), "K that is used, tokens", REAL_TEXT, 2),
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
    name, domains = record["ablation"], _domains(record)
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
        panels[0][0].legend(fontsize=7, title=title, title_fontsize=7)
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


# --- files ---


def write(records: Path, out: Path) -> None:
    """Write OUT/ablations.md and its pictures. Raises TidarError without records or matplotlib."""
    shelf = Shelf(records)
    if not (made := sections(shelf)):
        raise TidarError(f"{records} has no records of ablations: run lab.ablations first.")
    write_page(made, shelf, out / "ablations.md")


def main(arguments: Sequence[str]) -> int:
    """`python -m lab.ablation_tables RECORDS OUT`."""
    if len(arguments) != 2:
        print(f"usage: {(__doc__ or '').splitlines()[2].strip()}", file=sys.stderr)
        return 2
    return exit_code(lambda: write(Path(arguments[0]), Path(arguments[1])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
