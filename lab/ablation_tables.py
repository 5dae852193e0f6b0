"""The tables of each ablation, and its section with figure and command, from records alone: nothing is run.

python -m lab.ablation_tables RECORDS OUT
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from lab.ablation_figures import CURVES, draw
from lab.ablation_plan import ablations
from lab.ablation_readings import (
    OWN,
    QUALITY,
    REAL,
    ROWS,
    Figures,
    domains_of,
    over_ar,
    quality,
    tokens_per_second,
)
from lab.command import exit_code
from lab.page import Picture, Section, Shelf, markdown_table, number, write_page
from lab.plan import FULL
from tidar.errors import TidarError

COMMAND: Final = "python -m lab.ablations --out runs/lab"


@dataclass(frozen=True, slots=True)
class Table:
    """caption: what its numbers are. rows: as many cells as head has names."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(record: Figures) -> list[Table]:
    """Of speeds one for each domain; else of the cases, and of the models' losses where there are several models."""
    if "batches" in record["settings"]:
        return [speed_table(record, domain) for domain in domains_of(record)]
    several = len(record["losses"]) > 1
    by_len = several and "K" in record["cases"][0]["labels"] and "K" not in model_labels(record)
    of_cases = table_by_len(record) if by_len else table_of_cases(record)
    return [of_cases, loss_table(record)] if several else [of_cases]


def model_labels(record: Figures) -> list[str]:
    """Those labels that say which model a case has: the same for all of its cases."""
    return [
        name
        for name in record["cases"][0]["labels"]
        if all(len({case["labels"][name] for case in of}) == 1 for of in _by_model(record).values())
    ]


def _by_model(record: Figures) -> dict[str, list[Figures]]:
    found: dict[str, list[Figures]] = {}
    for case in record["cases"]:
        found.setdefault(case["model"], []).append(case)
    return found


def _named(cases: Sequence[Figures], names: Sequence[str]) -> dict[str, list[str]]:
    """Columns of labels."""
    return {name: [_label(case["labels"][name]) for case in cases] for name in names}


def _label(value: float | str) -> str:
    return number(value, ".3g") if isinstance(value, float) else str(value)


def table_of_cases(record: Figures) -> Table:
    """A row for each case: T/NFE of real and own texts, quality; rows of a step where span sets differ."""
    cases = record["cases"]
    columns = _named(cases, list(cases[0]["labels"]))
    if "spans" in columns:
        first = domains_of(record)[0]
        columns[f"{first}: rows a step"] = [number(ROWS(case, first), ".0f") for case in cases]
    for domain in domains_of(record):
        columns[f"{domain}: real text"] = [number(REAL(case, domain), ".2f") for case in cases]
        columns[f"{domain}: own text"] = [number(OWN(case, domain), ".2f") for case in cases]
        columns |= _quality_column(record, cases, domain)
    return _table(_caption(record), columns)


def table_by_len(record: Figures) -> Table:
    """A row for each model: T/NFE of real texts by the K that is used; of own texts, which one K of each writes."""
    models = list(_by_model(record).values())
    firsts = [of[0] for of in models]
    columns = _named(firsts, model_labels(record))
    lens = " / ".join(_length(case) for case in models[0])
    writers = [
        next((case for case in of if OWN(case, domains_of(record)[0])), of[0]) for of in models
    ]
    for domain in domains_of(record):
        columns[f"{domain}: real text, K = {lens}"] = [
            " / ".join(number(REAL(case, domain), ".2f") for case in of) for of in models
        ]
        name = f"{domain}: own text, K = {_length(writers[0])}"
        columns[name] = [number(OWN(case, domain), ".2f") for case in writers]
        columns |= _quality_column(record, writers, domain)
    return _table(_caption(record), columns)


def _length(case: Figures) -> str:
    """K, with the span set where that is not dense."""
    spans = case["method"].split(":")[2]
    return f"{case['labels']['K']}" + ("" if spans == "dense" else f" {{{spans}}}")


def _quality_column(record: Figures, cases: Sequence[Figures], domain: str) -> dict[str, list[str]]:
    count = record["prompts"][domain]["count"]
    return {QUALITY[domain]: [_share(quality(case, domain), count) for case in cases]}


def loss_table(record: Figures) -> Table:
    """A row for each model: what its weights say of held-out text."""
    models = _by_model(record)
    columns = _named([of[0] for of in models.values()], model_labels(record))
    for domain in domains_of(record):
        told = [record["losses"][model][domain] for model in models]
        lens = " / ".join(told[0]["mask_loss"])
        columns[f"{domain}: bits per byte"] = [f"{each['bits_per_byte']:.3f}" for each in told]
        columns[f"{domain}: mask loss, K = {lens}"] = [
            " / ".join(f"{value:.2f}" for value in each["mask_loss"].values()) for each in told
        ]
    held_out = record["settings"]["held_out"]
    caption = (
        f"{held_out} held-out documents of each domain; mask loss: nats a token, spans on a grid"
    )
    return _table(caption, columns)


def speed_table(record: Figures, domain: str) -> Table:
    """Tokens per second of each case at every batch (over AR's), and T/NFE at the first, on one domain."""
    cases, batches = record["cases"], record["settings"]["batches"]
    columns = _named(cases, list(cases[0]["labels"]))
    for batch in batches:
        columns[f"batch {batch}"] = [_speednumber(record, case, domain, batch) for case in cases]
    told = [case["domains"][domain] for case in cases]
    columns[f"T/NFE, batch {batches[0]}"] = [
        number(each[str(batches[0])]["tokens_per_forward"], ".2f") for each in told
    ]
    counts = ", ".join(f"{told[0][str(batch)]['prompts']} at batch {batch}" for batch in batches)
    return _table(
        f"{domain}: tokens/s (over AR), end to end, medians of {record['settings']['runs']} runs; temperature 0, up to "
        f"{record['settings']['max_new_tokens']} tokens, the {record['settings']['engine']} engine; prompts: {counts}",
        columns,
    )


def _speednumber(record: Figures, case: Figures, domain: str, batch: int) -> str:
    speed, gain = tokens_per_second(case, domain, batch), over_ar(record, case, domain, batch)
    return "" if speed is None else f"{speed:,.0f} ({number(gain, '.2f')})"


def _table(caption: str, columns: dict[str, list[str]]) -> Table:
    """Without the columns that nothing was measured for."""
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    return Table(caption, list(kept), list(zip(*kept.values(), strict=True)))


def _caption(record: Figures) -> str:
    counts = ", ".join(f"{each['count']} of {domain}" for domain, each in record["prompts"].items())
    return (
        "T/NFE at temperature 0 of the real text (teacher forced; only where decoding is exact) and of the model's "
        f"own, whose quality is beside it, ± its standard error; prompts: {counts}; the "
        f"{record['settings']['engine']} engine"
    )


def _share(value: float | None, count: int) -> str:
    """With the standard error that a share of `count` independent texts has."""
    return "" if value is None else f"{value:.0%} ± {math.sqrt(value * (1 - value) / count):.0%}"


# --- the page ---


def section(record: Figures) -> Section:
    """The question, its tables and its figure."""
    name = record["ablation"]
    told = [f"{each.caption}:\n\n{markdown_table(each.head, each.rows)}" for each in tables(record)]
    return Section(
        key=f"ablation-{name}",
        title=f"Ablation: {name}",
        body="\n\n".join([record["question"], *told]),
        records=(name,),
        commands=(f"{COMMAND} {name}",),
        pictures=(Picture(f"ablation_{name}.png", _alt(record), partial(draw, record)),),
    )


def _alt(record: Figures) -> str:
    """The picture in words."""
    curve = CURVES.get(record["ablation"])
    shown = ", ".join(curve.ys) if curve else "tokens per second over AR"
    x_label = curve.x_label if curve else "batch"
    return f"{shown} against {x_label.split(',')[0]}"


def sections(shelf: Shelf) -> list[Section]:
    """Of the ablations whose records are there."""
    return [section(record) for _, record in shelf.present(ablations(FULL))]


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
