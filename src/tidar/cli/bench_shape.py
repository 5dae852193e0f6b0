"""`tidar bench --shape`: the speed of the system on random weights, over contexts and batches."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidar.cli.bench import settings_json
from tidar.cli.bench_tables import count_rows, figure_range, machine, number, speed_rows
from tidar.cli.options import Place, whole_numbers

if TYPE_CHECKING:
    from rich.console import Console

    from tidar.bench.measure import Settings
    from tidar.bench.shapes import Cell
    from tidar.model import Transformer

DEFAULT_CONTEXT = "1024"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says of a sweep. replays, decode_only: as in `Settings`. figure: a PNG is wanted."""

    shape: str
    context: str | None
    batches: Sequence[int]
    replay: str | None
    replays: int | None = None
    decode_only: bool = False
    figure: bool = False


def bench_shape(
    asked: Asked, settings: "Settings", place: Place, out: Path | None
) -> dict[str, Any]:
    """The record of a sweep, written to `out` after each cell. Raises TidarError for what cannot be run."""
    from tidar.bench.acceptance import LABEL, Acceptance
    from tidar.bench.measure import pick_engine
    from tidar.bench.record import make_record, write_record
    from tidar.bench.shapes import PLAIN_LABEL, describe_shape, make_cells, shape_config
    from tidar.bench.sweep_plot import check_drawable
    from tidar.weights import init_model

    if asked.figure:
        check_drawable([spec.name for spec in settings.methods])
    contexts = whole_numbers("--context", asked.context or DEFAULT_CONTEXT)
    device, dtype = place.settle()
    acceptance = None
    if asked.replay is not None:
        longest = max(spec.max_draft_len() for spec in settings.methods)
        acceptance = Acceptance.parse(asked.replay, longest)
    paged = acceptance is not None or asked.decode_only
    settings = replace(
        settings, engine=pick_engine(place.engine, device, replayed=paged), replay=acceptance,
        replays=asked.replays, decode_only=asked.decode_only,
    )  # fmt: skip
    config = shape_config(asked.shape)
    cells = make_cells(contexts, asked.batches, settings, config)
    network = init_model(config, settings.seed, device=device, dtype=dtype).eval()
    facts = {
        **settings_json(settings, dtype),
        **_how(settings),
        "batch": list(asked.batches),
        "context": list(contexts),
        "texts": "of random weights: not compared with AR's, not judged",
    }

    def record(found: list[dict[str, Any]], interrupted: bool) -> dict[str, Any]:
        return make_record(
            command=["tidar", *sys.argv[1:]],
            device=device,
            subject={
                "label": PLAIN_LABEL if acceptance is None else LABEL,
                "model": describe_shape(asked.shape, network),
                "acceptance": None if acceptance is None else acceptance.to_json(),
            },
            settings=facts,
            results={"interrupted": interrupted, "cells": found},
        )

    def keep(found: list[dict[str, Any]]) -> None:
        if out is not None:
            write_record(out, record(found, len(found) < len(cells)))

    return record(*_sweep(network, cells, settings, keep))


def _how(settings: "Settings") -> dict[str, Any]:
    """What is timed, in words, for the record."""
    from tidar.bench.decode_only import SETTLING, most_tokens

    replayed = (
        "what passes is drawn anew for every run, prompt and repetition, by the requests' seeds"
        if settings.replay is not None
        else None
    )
    told = {"replays": settings.replays, "decode_only": settings.decode_only, "draws": replayed}
    if not settings.decode_only:
        return {**told, "prompts": "random tokens, seeded; prefixes are not reused"}
    return {
        **told,
        "prompts": "random tokens, seeded, one more than the context: the context's full pages are run once "
        "for all methods and runs, held, and reused; the rest of each prompt is run again by each pass, "
        "before its first decode step",
        "engine_shared": "the methods of a cell share one engine, its cache and its limits",
        "pass": f"ends with the turn in which its texts have decoded batch x {settings.max_new_tokens} tokens "
        f"together, or one of them {most_tokens(settings)}",
        "timed": "decode: turns in which all sequences decode and no prompt row runs, without the first "
        f"{SETTLING} of each pass, from one result on the host to the next",
        "warm_up": "one untimed pass per method as long as a timed one; step costs of a plan are measured "
        "before, at the cell's batch and context",
        "plan": "begins each run with what its warm-up pass taught it, and learns no span set",
    }


def _sweep(
    network: "Transformer",
    cells: "Sequence[Cell]",
    settings: "Settings",
    keep: Callable[[list[dict[str, Any]]], None],
) -> tuple[list[dict[str, Any]], bool]:
    """The figures of all cells, under a progress bar on stderr; and whether Ctrl-C ended it after some."""
    from rich.console import Console
    from rich.progress import Progress

    from tidar.bench.shapes import sweep

    found: list[dict[str, Any]] = []
    total = len(cells) * len(settings.methods) * (settings.runs + 1)
    each = total // len(cells)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=total)

        def advance(label: str) -> None:
            cell = cells[min(len(found), len(cells) - 1)]
            told = f"context {cell.context}, batch {cell.batch}: {label}"
            progress.update(task, advance=1, description=told)

        try:
            for figures in sweep(network, cells, settings, advance):
                found.append(figures)
                progress.update(task, completed=each * len(found))
                keep(found)
        except KeyboardInterrupt:
            if not found:
                raise
            return found, True
    return found, False


def show_sweep(record: dict[str, Any], console: "Console") -> None:
    """The record as a table per cell, and one of speeds over AR where there are several."""
    model, settings = record["model"], record["settings"]
    console.print(
        f"[bold red]{record['label']}[/] · shape {model['source']} · "
        f"{model['parameters']:,} parameters, {model['weight_bytes'] / 2**30:.2f} GiB · "
        f"{settings['dtype']} · {machine(record['environment'])} · {settings['engine']} engine\n"
        f"random prompts, {settings['max_new_tokens']} new tokens each, temperature "
        f"{settings['temperature']:g}, {settings['runs']} runs taking turns; warm-up: "
        f"{settings['warm_up']}"
    )
    if record["acceptance"] is not None:
        console.print(f"{record['label']}: {acceptance_line(record['acceptance'])}")
    if settings["decode_only"]:
        show_decoding(record, console)
        return
    for cell in record["cells"]:
        _show_cell(cell, record["label"], console)
    console.print(
        "T/NFE: tokens of decode steps per step, as measured, with what shifts and cuts of drafts cost. Ranges: "
        'median (least-most) over runs; "all": prefill and host included; decode: steps without prompt rows; '
        "ms/step: their median with all sequences running. T/NFE expected: without the luck of the draw; speed "
        "at it: T/NFE expected x AR's step time / step time (means). The texts are random and are not judged.",
        style="dim",
    )
    if len(record["cells"]) > 1:
        _show_summary(record, console)


def acceptance_line(acceptance: dict[str, Any]) -> str:
    """What is replayed, in words: mean, probabilities, accept counts."""
    survival = acceptance["survival"]
    each = f"{survival[0]:.3f}" if len(set(survival)) == 1 else "as listed"
    shares = " ".join(f"{n}:{share:.1%}" for n, share in acceptance["histogram"].items())
    return (
        f"{acceptance['source']}; a dense step of K = {acceptance['draft_len']} accepts "
        f"{acceptance['mean']:.2f} tokens on average, each draft token with probability {each}; P(n): {shares}"
    )


def _show_cell(cell: dict[str, Any], label: str, console: "Console") -> None:
    from rich.table import Column, Table

    title = f"context {cell['context']}, batch {cell['batch']} ({label})"
    if "error" in cell:
        console.print(f"{title}: not measured: {cell['error']}")
        return
    heads = (Column(name, overflow="fold") for name in cell["methods"])
    table = Table("", *heads, title=title, title_justify="left")
    columns = [_column(figures) for figures in cell["methods"].values()]
    for row in columns[0]:
        cells = [column[row] for column in columns]
        if any(text != "-" for text in cells):
            table.add_row(row, *cells)
    console.print(table)


def _column(figures: dict[str, Any]) -> dict[str, str]:
    gain, memory = figures.get("x_ar") or {}, figures["memory"]
    return {
        **count_rows(figures),
        "T/NFE expected": number(figures["expected_tokens_per_forward"]),
        **speed_rows(figures),
        "cache GiB": f"{memory['cache_bytes'] / 2**30:.2f}",
        "x AR decode": figure_range(gain.get("decode")),
        "... at T/NFE expected": figure_range(gain.get("decode_at_expected")),
        "x AR all": figure_range(gain.get("end_to_end")),
    }


def _show_summary(record: dict[str, Any], console: "Console") -> None:
    """Speed over AR end to end, decoding alone in brackets, a line per cell."""
    from rich.table import Column, Table

    names = record["settings"]["methods"]
    title = f"x AR, all (decode only): {record['label']}"
    heads = (Column(name, overflow="fold") for name in names)
    table = Table("context", "batch", *heads, title=title, title_justify="left")
    for cell in record["cells"]:
        texts = []
        for name in names:
            gain = cell["methods"].get(name, {}).get("x_ar") or {}
            whole, decode = (
                number((gain.get(key) or {}).get("median")) for key in ("end_to_end", "decode")
            )
            texts.append("-" if whole == "-" else f"{whole} ({decode})")
        table.add_row(str(cell["context"]), str(cell["batch"]), *texts)
    console.print(table)


def show_decoding(record: dict[str, Any], console: "Console") -> None:
    """Decoding alone: a line per cell and method."""
    from rich.table import Column, Table

    heads = (
        "context",
        "batch",
        "method",
        "ms/step",
        "T/NFE (expected)",
        "tok/s",
        "x AR",
        "at expected",
    )
    title = f"decoding alone: {record['label']}"
    columns = (Column(head, overflow="fold") for head in heads)
    table = Table(*columns, title=title, title_justify="left")
    for cell in record["cells"]:
        for name, figures in cell["methods"].items():
            gain, step = figures.get("x_ar") or {}, figures["step_milliseconds"]
            rate, expected = figures["tokens_per_forward"], figures["expected_tokens_per_forward"]
            table.add_row(
                str(cell["context"]),
                str(cell["batch"]),
                name,
                "-" if step is None else f"{step['median']:.3g}",
                number(rate) + ("" if expected is None else f" ({expected:.2f})"),
                number((figures["decode_tokens_per_second"] or {}).get("median"), 0),
                figure_range(gain.get("decode"), 2),
                figure_range(gain.get("decode_at_expected"), 2),
            )
        table.add_section()
    console.print(table)
    for cell in record["cells"]:
        if "error" in cell:
            where = f"context {cell['context']:,}, batch {cell['batch']}"
            console.print(f"{where}: not measured: {cell['error']}")
    console.print(
        f"Timed: {record['settings']['timed']}. Ranges: median (least-most) over runs. T/NFE: of all decode "
        "steps; expected: without the luck of the draw; at expected: T/NFE expected x AR's step time / step time "
        "(means). The texts are random and are not judged.",
        style="dim",
    )
