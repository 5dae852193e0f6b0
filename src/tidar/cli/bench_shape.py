"""`tidar bench --shape`: the speed of the system on random weights, over contexts and batches."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tidar.cli.bench import Place, settings_json, whole_numbers
from tidar.cli.bench_tables import count_rows, figure_range, machine, number, speed_rows

if TYPE_CHECKING:
    from rich.console import Console

    from tidar.bench.measure import Settings
    from tidar.bench.shapes import Cell
    from tidar.model import Transformer

DEFAULT_CONTEXT = "1024"


def bench_shape(
    shape: str,
    context: str | None,
    batches: Sequence[int],
    replay: str | None,
    settings: "Settings",
    place: Place,
) -> dict[str, Any]:
    """The record of a sweep. Raises TidarError for what cannot be run."""
    import sys

    from tidar.bench.acceptance import LABEL, Acceptance
    from tidar.bench.measure import pick_engine
    from tidar.bench.record import make_record
    from tidar.bench.shapes import PLAIN_LABEL, describe_shape, make_cells, shape_config
    from tidar.weights import init_model

    contexts = whole_numbers("--context", context or DEFAULT_CONTEXT)
    device, dtype = place.settle()
    acceptance = None
    if replay is not None:
        longest = max(spec.max_draft_len() for spec in settings.methods)
        acceptance = Acceptance.parse(replay, longest)
    engine = pick_engine(place.engine, device, replayed=replay is not None)
    settings = replace(settings, engine=engine, replay=acceptance)
    config = shape_config(shape)
    cells = make_cells(contexts, batches, settings, config)
    network = init_model(config, settings.seed, device=device, dtype=dtype).eval()
    facts = {
        **settings_json(settings, dtype),
        "batch": list(batches),
        "context": list(contexts),
        "prompts": "random tokens, seeded; prefixes are not reused",
        "texts": "of random weights: not compared with AR's, not judged",
    }
    return make_record(
        command=["tidar", *sys.argv[1:]],
        device=device,
        subject={
            "label": PLAIN_LABEL if acceptance is None else LABEL,
            "model": describe_shape(shape, network),
            "acceptance": None if acceptance is None else acceptance.to_json(),
        },
        settings=facts,
        results={"cells": _sweep(network, cells, settings)},
    )


def _sweep(
    network: "Transformer", cells: "Sequence[Cell]", settings: "Settings"
) -> list[dict[str, Any]]:
    """The figures of all cells, under a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    from tidar.bench.shapes import sweep

    total = len(cells) * len(settings.methods) * (settings.runs + 1)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=total)
        return sweep(
            network,
            cells,
            settings,
            lambda label: progress.update(task, advance=1, description=label),
        )


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
    for cell in record["cells"]:
        _show_cell(cell, record["label"], console)
    console.print(
        "T/NFE: tokens of decode steps per step, as measured, with what shifts and cuts of drafts cost. Ranges: "
        'median (least-most) over runs; "all": prefill and host included; decode: steps without prompt rows; '
        "ms/step: their median with all sequences running. The texts are random and are not judged.",
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
