"""Records of `tidar bench` as tables."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


ANOTHER = "another model's text"
"""Told of a method whose text is not AR's by design: it is never compared, for no likeness would mean anything."""


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def figure_range(values: dict[str, float] | None, digits: int | None = None, unit: str = "") -> str:
    """Median, and least to most in brackets."""
    if values is None:
        return "-"
    if digits is None:
        digits = 0 if values["median"] >= 100 else 2
    low, middle, high = (f"{values[key]:.{digits}f}" for key in ("min", "median", "max"))
    if low == high:
        return f"{middle}{unit}"
    return f"{middle}{unit} ({low}-{high})"


def _same(figures: dict[str, Any]) -> str:
    if not figures.get("is_exact", True):
        return ANOTHER
    same = figures.get("same_as_ar")
    if same is None:
        return "-"
    counts = f" ({same['differ']} differ, {same['excused']} excused)" if same["differ"] else ""
    return ("yes" if same["same"] else "NO") + counts


def machine(environment: dict[str, Any]) -> str:
    """The GPU, or the CPU and its threads."""
    gpu: str | None = environment["gpu"]
    return gpu or f"{environment['cpu']}, {environment['torch_threads']} threads"


def show_record(record: dict[str, Any], console: "Console") -> None:
    """The record as a table and the lines that go with it."""
    from rich.table import Column, Table

    model, settings, where = record["model"], record["settings"], record["environment"]
    label = "[bold red]random weights[/] · " if model["random_weights"] else ""
    forced = ", teacher forced" if settings["teacher_forced"] else ""
    console.print(
        f"{label}{model['source']} · {model['parameters']:,} parameters · {settings['dtype']} · "
        f"{machine(where)} · {settings['engine']} engine\n"
        f"{record['prompts']['count']} prompts, up to {settings['max_new_tokens']} tokens{forced}, "
        f"temperature {settings['temperature']:g}, batch {settings['batch']}, "
        f"{settings['runs']} runs taking turns; warm-up: {settings['warm_up']}"
    )
    table = Table("", *(Column(name, overflow="fold") for name in record["methods"]))
    columns = [method_column(figures) for figures in record["methods"].values()]
    for label in columns[0]:
        cells = [column[label] for column in columns]
        if any(cell != "-" for cell in cells):
            table.add_row(label, *cells)
    console.print(table)
    console.print(
        "T/NFE: tokens of decode steps per step, prefill in neither. Ranges: median (least-most), "
        'of tok/s over runs, of x AR over prompts; "all": prefill and host included; ms/step: median.',
        style="dim",
    )
    real = record["prompts"]["distinct_4_of_real_text"]
    if real is not None:
        console.print(f"distinct-4 of the prompts' real continuations: {real:.2f}")
    for line in _spread_lines(record["methods"]):
        console.print(line)


def method_column(figures: dict[str, Any]) -> dict[str, str]:
    """What the table shows of one method; ranges are median (least-most) over runs or prompts."""
    gain = figures.get("speed_up") or {}
    exact = figures["exact_match"]
    return {
        **count_rows(figures),
        "chars/forward": number(figures["characters_per_forward"]),
        **speed_rows(figures),
        "x AR decode": figure_range(gain.get("decode")),
        "x AR all": figure_range(gain.get("end_to_end")),
        "same as AR": _same(figures),
        "distinct-4": number(figures["distinct_4"]),
        "end of text": f"{figures['end_of_text_rate']:.0%}",
        "exact match": "-" if exact is None else f"{exact:.1%}",
    }


def count_rows(figures: dict[str, Any]) -> dict[str, str]:
    """Table rows of what the steps did."""
    return {
        "tokens / steps": f"{figures['tokens']} / {figures['decode_steps']}",
        "T/NFE": number(figures["tokens_per_forward"]),
        "draft model/step": number(figures.get("draft_forwards_per_step") or None),
        "rows/step": number(figures["rows_per_step"], 1),
        "accepts/step": _histogram(figures["accept_histogram"]),
    }


def speed_rows(figures: dict[str, Any]) -> dict[str, str]:
    """Table rows of what the steps cost."""
    peak = (figures.get("memory") or {}).get("peak_bytes")
    step = figures["step_milliseconds"]
    return {
        "ms/step": "-" if step is None else f"{step['median']:.3g}",
        "decode tok/s": figure_range(figures["decode_tokens_per_second"]),
        "all tok/s": figure_range(figures["tokens_per_second"]),
        "peak GiB": "-" if peak is None else f"{peak / 2**30:.2f}",
    }


def _histogram(accepts: dict[str, int], limit: int = 5) -> str:
    """Shares of accept counts, the most frequent first."""
    total = sum(accepts.values())
    ranked = sorted(accepts.items(), key=lambda item: -item[1])
    shown = sorted(ranked[:limit], key=lambda item: int(item[0]))
    return " ".join(f"{n}:{count / total:.0%}" for n, count in shown) + " …" * (len(ranked) > limit)


def _spread_lines(methods: dict[str, Any]) -> list[str]:
    """AR against itself, and for each method whether any prompt got slower."""
    lines = []
    for name, figures in methods.items():
        gain = figures.get("speed_up") or {}
        if gain.get("end_to_end_self"):
            own = gain["end_to_end_self"]
            lines.append(
                f"{name} against itself, end to end: {figure_range(own['ratio'], 3, 'x')}, "
                f"spread {own['spread']:.3f}"
            )
        line = gain.get("acceptance")
        if line and line["met"] is None:
            lines.append(f"{name}: no prompt below 0.95x AR: not judged, {line['reason']}")
        elif line:
            verdict = "yes" if line["met"] else "NO"
            lines.append(
                f"{name}: no prompt below 0.95x AR, its spread of {line['ar_spread']:.3f} "
                f"taken off ({line['bar']:.3f}x): {verdict}, the slowest is {line['slowest']:.2f}x"
            )
    return lines
