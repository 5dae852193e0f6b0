"""`tidar profile`: how many rows a decode step carries for next to nothing on this machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidar.cli.options import (
    ACCEPTANCE,
    DeviceArg,
    DtypeArg,
    ModelArg,
    Place,
    RandomWeightsArg,
    ShapeArg,
    refuse,
    whole_numbers,
)

if TYPE_CHECKING:
    from rich.console import Console

    from tidar.decode.paged_engine import PagedEngine
    from tidar.decode.step_times import StepTime
    from tidar.layout import Schedule
    from tidar.model import ModelConfig, Transformer

DEFAULT_METHODS = (
    "ar,tidar:4:1,tidar:8:1,tidar:8:1,2,4,8,tidar:8:dense,tidar:16:1,2,4,8,tidar:16:1,2,3,5,8,16,"
    "tidar:16:1,2,3,4,6,8,11,16,tidar:16:dense"
)
DEFAULT_CONTEXTS = (512, 1024, 4096, 8192)
DEFAULT_MEAN = 4

ROUNDS = 7
"""Bursts of each kind of step, in turn with all others; a figure is the median of all their steps."""

MethodsArg = Annotated[
    str | None,
    typer.Option(
        help="Steps to time, as in bench: ar, tidar:K:SPANSET, tidar:two-forward. [default: a ladder of rows]"
    ),
]
ContextArg = Annotated[
    str | None,
    typer.Option(help="Prefix tokens, by commas. [default: those of 512,1024,4096,8192 that fit]"),
]
BatchArg = Annotated[str, typer.Option(help="Sequences in a step, several by commas.")]
ReplayArg = Annotated[
    str | None,
    typer.Option(
        "--replay-acceptance",
        help=f"What to recommend a schedule for: {ACCEPTANCE} [default: 4, or K]",
    ),
]
RepeatsArg = Annotated[int, typer.Option(help="Timed steps of each kind, at least.")]
KernelsArg = Annotated[
    bool,
    typer.Option("--kernels", help="On CUDA, also the GPU time of each step by kind of kernel."),
]
JsonArg = Annotated[
    Path | None, typer.Option("--json", help="Write the record to this file; - prints it.")
]
PngArg = Annotated[Path | None, typer.Option(help="Draw it into this file (needs tidar[plot]).")]


def profile(
    model: ModelArg = None,
    shape: ShapeArg = None,
    random_weights: RandomWeightsArg = False,
    methods: MethodsArg = None,
    context: ContextArg = None,
    batch: BatchArg = "1",
    replay_acceptance: ReplayArg = None,
    repeats: RepeatsArg = 30,
    kernels: KernelsArg = False,
    dtype: DtypeArg = "auto",
    device: DeviceArg = "auto",
    json: JsonArg = None,
    png: PngArg = None,
) -> None:
    """Time decode steps against their rows: the free token slots of this machine.

    The paged engine's own step, behind prefixes of several lengths. The unit is the plain AR step; rows whose
    step costs little more are what drafting lives on. Also: the schedule that would pay most at a given
    acceptance.

    Examples:

        tidar profile

        tidar profile DIR --context 1024,8192 --batch 1,4 --png steps.png

        tidar profile --shape qwen3-8b --random-weights --device cuda --replay-acceptance 5 --json steps.json
    """
    if shape is not None:
        refuse("with --shape", MODEL=model)
    asked = whole_numbers("--context", context) if context else None
    batches, place = whole_numbers("--batch", batch), Place(device, dtype, "paged")
    schedules = pick_schedules(methods)
    network, facts = load_network(model, shape, random_weights, place)
    contexts = pick_contexts(network.config, tuple(schedules), asked)
    record = measure_profile(
        network, facts, schedules, contexts, batches, replay_acceptance, repeats, kernels
    )
    report(record, json, png)


def pick_schedules(methods: str | None) -> "dict[Schedule, str]":
    """Schedules to time and their names, AR first, by rows. Raises TidarError for what is not fixed."""
    from tidar.decode.spec import parse_method, parse_methods
    from tidar.errors import TidarError

    found: dict[Schedule, str] = {}
    for spec in (parse_method("ar"), *parse_methods(methods or DEFAULT_METHODS)):
        if spec.schedule is None or spec.rival is not None:
            raise TidarError(f"{spec.name} has no schedule of its own whose steps could be timed.")
        for step in spec.schedule.steps:
            found.setdefault(step, f"{spec.name}, {step.half}" if step.half else spec.name)
    return found


def pick_contexts(
    config: "ModelConfig", schedules: "Sequence[Schedule]", asked: Sequence[int] | None
) -> tuple[int, ...]:
    """Prefix lengths in rising order, 1 among them, for what a step costs without one."""
    from tidar.decode.step_times import room_needed

    room = config.max_positions - room_needed(0, schedules)
    wanted = asked or [each for each in DEFAULT_CONTEXTS if each <= room] or [max(room, 1)]
    return tuple(sorted({1, *wanted}))


def load_network(
    model: str | None, shape: str | None, random_weights: bool, place: Place
) -> "tuple[Transformer, dict[str, Any]]":
    """The network on its device, and what it is, for the record."""
    from tidar.bench.shapes import describe_shape, shape_config
    from tidar.cli.bench import load_subject
    from tidar.weights import init_model

    if shape is None:
        network, _, subject = load_subject(model, place, random_weights)
        return network, subject["model"]
    device, dtype = place.settle()
    network = init_model(shape_config(shape), seed=0, device=device, dtype=dtype).eval()
    return network, describe_shape(shape, network)


def measure_profile(
    network: "Transformer",
    facts: dict[str, Any],
    schedules: "dict[Schedule, str]",
    contexts: Sequence[int],
    batches: Sequence[int],
    replay: str | None,
    repeats: int,
    kernels: bool,
) -> dict[str, Any]:
    """The record: every step's time, and what follows from them."""
    import sys

    from tidar.bench.acceptance import Acceptance
    from tidar.bench.free_rows import step_figures, summarise_steps
    from tidar.bench.memory import weight_bytes
    from tidar.bench.record import make_record
    from tidar.decode.engine import FixedPlan
    from tidar.decode.paged_engine import PagedEngine
    from tidar.decode.step_times import WARM_UP, limits_for
    from tidar.layout import AUTOREGRESSIVE

    longest = max(each.draft_len for each in schedules)
    acceptance = Acceptance.parse(replay or str(min(DEFAULT_MEAN, longest)), longest)
    limits = limits_for(network.config, tuple(schedules), contexts, max(batches))
    engine = PagedEngine(network, FixedPlan(AUTOREGRESSIVE), limits)
    times = _time_steps(engine, tuple(schedules), contexts, batches, repeats)
    split = _kernels(engine, times, schedules) if kernels else None
    return make_record(
        command=["tidar", *sys.argv[1:]],
        device=engine.device,
        subject={
            "model": facts,
            "acceptance": acceptance.to_json(),
            "memory": {"weight_bytes": weight_bytes(network), "cache_bytes": engine.cache.bytes},
        },
        settings={
            "methods": list(schedules.values()),
            "context": list(contexts),
            "batch": list(batches),
            "seed": 0,
            "dtype": str(network.embed.weight.dtype).removeprefix("torch."),
            "warm_up": f"one step of each kind, then {WARM_UP} before each of {ROUNDS} bursts",
            "clock": "CUDA events around graph replays" if engine.runner.graphs else "wall clock",
        },
        results={
            "steps": step_figures(times, schedules),
            "summary": summarise_steps(times, acceptance, schedules),
            "kernels": split,
        },
    )


def _time_steps(
    engine: "PagedEngine",
    schedules: "Sequence[Schedule]",
    contexts: Sequence[int],
    batches: Sequence[int],
    repeats: int,
) -> "list[StepTime]":
    """All step times, under a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    from tidar.decode.step_times import measure_steps

    total = ROUNDS * len(schedules) * len(contexts) * len(batches)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("compiling", total=total)
        found = []
        for batch in batches:
            found += measure_steps(
                engine,
                schedules,
                contexts,
                batch,
                repeats=repeats,
                rounds=ROUNDS,
                on_step=lambda label: progress.update(task, advance=1, description=label),
            )
        return found


def _kernels(
    engine: "PagedEngine", times: "Sequence[StepTime]", names: "dict[Schedule, str]"
) -> list[dict[str, Any]] | None:
    """GPU time of every timed step by kind of kernel, in milliseconds; None off CUDA."""
    from rich.console import Console
    from rich.progress import track

    from tidar.bench.shares import kernel_times

    if not engine.runner.graphs:
        return None
    found = []
    for each in track(times, "kernels", console=Console(stderr=True), transient=True):
        kinds = kernel_times(engine, each.schedule, each.context, each.batch)
        found.append(
            {
                "method": names[each.schedule],
                "context": each.context,
                "batch": each.batch,
                "rows": each.rows,
                "gpu_milliseconds": None if kinds is None else sum(kinds.values()),
                "kinds": kinds,
            }
        )
    return found


def report(record: dict[str, Any], path: Path | None, png: Path | None) -> None:
    """Shows the record, and writes the files that were asked for."""
    from json import dumps

    from rich.console import Console

    from tidar.bench.free_rows import save_plot
    from tidar.bench.record import write_record

    printed = path is not None and str(path) == "-"
    if path is not None and not printed:
        write_record(path, record)
    if png is not None:
        save_plot(record["steps"], heading(record), png, kernels=record["kernels"] or ())
    if printed:
        typer.echo(dumps(record, indent=1))
    else:
        show_profile(record, Console())
    for written in (path, png):
        if written is not None and str(written) != "-":
            typer.echo(f"Wrote {written}", err=True)


def heading(record: dict[str, Any]) -> str:
    """What was timed, in a line."""
    from tidar.cli.bench_tables import machine

    model = record["model"]
    label = "random weights, " if model["random_weights"] else ""
    return (
        f"{label}{model['source']}, {record['settings']['dtype']}, {machine(record['environment'])}"
    )


def show_profile(record: dict[str, Any], console: "Console") -> None:
    """A table per batch, and lines on free rows and the schedule that pays."""
    from tidar.cli.bench_shape import acceptance_line

    memory = record["memory"]
    console.print(
        f"{heading(record)} · {record['model']['parameters']:,} parameters · weights "
        f"{memory['weight_bytes'] / 2**30:.2f} GiB, cache {memory['cache_bytes'] / 2**30:.2f} GiB · "
        f"{record['settings']['clock']}"
    )
    for batch in record["settings"]["batch"]:
        _show_batch(record, batch, console)
    console.print(
        "Milliseconds of a step (over the AR step of the same context; + what attention over the prefix "
        "takes: above the same step behind one token). Medians.",
        style="dim",
    )
    console.print(f"Schedules are rated for: {acceptance_line(record['acceptance'])}")
    longest = max(record["settings"]["context"])
    for line in record["kernels"] or ():
        if line["context"] == longest:  # the others are in the record
            console.print(
                f"{line['method']}, batch {line['batch']}, context {longest:,}: {_split(line)}"
            )


def _show_batch(record: dict[str, Any], batch: int, console: "Console") -> None:
    from rich.table import Table

    mine = [step for step in record["steps"] if step["batch"] == batch]
    contexts = record["settings"]["context"]
    table = Table(
        "",
        "rows",
        *(f"context {c:,}" for c in contexts),
        title=f"batch {batch}, rows of each sequence",
    )
    for name in record["settings"]["methods"]:
        steps = [step for step in mine if step["method"] == name]
        table.add_row(name, str(steps[0]["rows"]), *map(_cell, steps))
    console.print(table)
    for line in record["summary"]:
        if line["batch"] == batch and (line["context"] > 1 or len(contexts) == 1):
            best = line["schedules"][0]
            free = ", ".join(f"{rows} up to {most}x" for most, rows in line["free_rows"].items())
            console.print(
                f"context {line['context']:,}: AR {line['ar_milliseconds']:.3g} ms; free token slots, "
                f"in rows: {free}; best {best['method']}: {best['tokens_per_forward']:.2f} tokens a "
                f"step, {best['x_ar']:.2f}x AR"
            )


def _cell(step: dict[str, Any]) -> str:
    prefix = step["prefix_milliseconds"]
    over = "" if prefix is None or step["context"] == 1 else f", {prefix:+.2g}"
    return f"{step['milliseconds']:.3g} ({step['x_ar']:.2f}x{over})"


def _split(line: dict[str, Any]) -> str:
    """Kinds of kernels, the dearest first, with milliseconds and shares of all GPU time."""
    if line["kinds"] is None:
        return "the profiler did not see all kernels"
    whole = line["gpu_milliseconds"]
    parts = sorted(line["kinds"].items(), key=lambda kind: -kind[1])
    return ", ".join(f"{kind} {spent:.3g} ms ({spent / whole:.0%})" for kind, spent in parts)
