"""Records of `tidar eval` as tables."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tidar.cli.bench_tables import machine, number

if TYPE_CHECKING:
    from rich.console import Console


def show_record(record: dict[str, Any], console: "Console") -> None:
    """A table for each task, and the lines that go with it."""
    from rich.table import Table

    model, settings = record["model"], record["settings"]
    console.print(
        f"{model['source']} · {model['parameters']:,} parameters · {settings['dtype']} · "
        f"{machine(record['environment'])} · {settings['engine']} engine, batch {settings['batch']}"
    )
    for name, task in record["tasks"].items():
        console.print(f"\n[bold]{name}[/] · {heading(task)}")
        table = Table()
        for label in ("method", "metric"):
            table.add_column(label, overflow="fold")
        for label in ("score", "T/NFE", "distinct-4", "tok/s", "not AR's"):
            table.add_column(label, justify="right", no_wrap=True)
        for row in task_rows(name, task):
            table.add_row(*row)
        console.print(table)
        for line in (*bounds(task), *cut_prompts(task)):
            console.print(line)
    console.print(
        "T/NFE: tokens of decode steps per step, easily high where distinct-4 (at most 1) is low, loops are easy to "
        "draft; tok/s: end to end, prompts included; all of generated texts alone. Likelihoods are the causal model's; "
        "a bound is a diffusion method's, a Monte Carlo estimate of at most its own likelihood. ±: standard error over "
        "examples. Not AR's: texts with other tokens than AR's.",
        style="dim",
    )
    for line in protection(record["sandbox"]):
        console.print(line)


def heading(task: dict[str, Any]) -> str:
    """Examples, shots and length of a task, and whose settings they are."""
    settings = task["settings"]
    shots = ",".join(sorted({str(value) for value in settings["shots"].values()}))
    length = settings["max_gen_toks"]
    upto = f" · up to {length} new tokens" if length else ""
    return f"{task['examples']} examples, {shots} shots{upto} · settings of {settings['from']}"


def task_rows(name: str, task: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for each method and headline figure of a task."""
    for method, figures in task["methods"].items():
        cost = figures["generation"] or {}
        differ = figures.get("texts_other_than_ar")
        first, beside = method, (
            number(cost.get("tokens_per_forward")),
            number(cost.get("distinct_4")),
            number(cost.get("tokens_per_second"), 0),
            "-" if differ is None else f"{differ} of {cost['requests']}",
        )  # fmt: skip
        for score in figures["scores"]:
            if score["task"] in task["headline"]:
                metric = score["metric"] + (f", {score['filter']}" if score["filter"] else "")
                if score["task"] != name:
                    metric = f"{score['task']}: {metric}"
                yield first, metric, _score(score), *beside
                first, beside = "", ("", "", "", "")


def _score(score: dict[str, Any]) -> str:
    error = f" ± {score['stderr']:.3f}" if score["stderr"] is not None else ""
    return number(score["value"], 3) + error


def bounds(task: dict[str, Any]) -> Iterator[str]:
    """How well likelihoods were estimated that no single pass gives."""
    for method, figures in task["methods"].items():
        if samples := (figures["likelihood"] or {}).get("mc_samples"):
            yield f"{method}: Monte Carlo, {samples} samples of each text"


def cut_prompts(task: dict[str, Any]) -> Iterator[str]:
    """What did not fit into the model's positions."""
    for method, figures in task["methods"].items():
        cut = (figures["generation"] or {}).get("prompts_truncated", 0)
        cut += (figures["likelihood"] or {}).get("truncated", 0)
        if cut:
            yield f"{method}: {cut} prompts were too long and lost their beginning"


def protection(sandbox: dict[str, Any] | None) -> Iterator[str]:
    """What held the programs of the model in."""
    if sandbox is not None:
        yield f"Programs of the model ran under protection of: {', '.join(sandbox['active'])}"
        for name, why in sandbox["missing"].items():
            yield f"[bold red]without protection of {name}[/]: {why}"
