"""From step times to what they mean: rows that cost next to nothing, and the schedule that pays."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidar.bench.acceptance import Acceptance
from tidar.bench.plot import new_figure, save_figure
from tidar.bench.shares import ATTENTION, MLP
from tidar.decode.step_times import StepTime
from tidar.layout import AUTOREGRESSIVE, Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Figures = dict[str, Any]

FREE = (1.1, 1.25)
"""Costs in AR steps up to which rows are called free: next to nothing, and little."""

DRAWN = ((ATTENTION, "-"), (MLP, "--"))
"""Kinds of kernels that are drawn, and how: what grows with rows and context, what with rows alone."""


def step_figures(times: Sequence[StepTime], names: Mapping[Schedule, str]) -> list[Figures]:
    """One line a step: rows, milliseconds, multiple of the AR step of the same context and batch.

    prefix_milliseconds: what the step costs above the same one behind a prefix of one token, which is
    attention over the prefix; None where that one was not timed. Raises AssertionError without AR steps.
    """
    ar = {(t.context, t.batch): t.seconds for t in times if t.schedule == AUTOREGRESSIVE}
    bare = {(t.schedule, t.batch): t.seconds for t in times if t.context == 1}
    rows = []
    for each in times:
        assert (each.context, each.batch) in ar, "no AR step was timed"
        short = bare.get((each.schedule, each.batch))
        rows.append(
            {
                "method": names[each.schedule],
                "draft_len": each.schedule.draft_len,
                "span_set": list(each.schedule.span_set),
                "context": each.context,
                "batch": each.batch,
                "rows": each.rows,
                "milliseconds": 1e3 * each.seconds,
                "min_milliseconds": 1e3 * each.fastest,
                "max_milliseconds": 1e3 * each.slowest,
                "steps_timed": each.count,
                "x_ar": each.seconds / ar[each.context, each.batch],
                "prefix_milliseconds": None if short is None else 1e3 * (each.seconds - short),
            }
        )
    return rows


def free_rows(steps: Sequence[Figures], most: float) -> int:
    """The largest measured number of rows, per sequence, of a step that costs at most `most` AR steps."""
    return max(int(step["rows"]) for step in steps if step["x_ar"] <= most)


def rate_schedules(
    times: Sequence[StepTime], acceptance: Acceptance, names: Mapping[Schedule, str]
) -> list[Figures]:
    """Expected tokens per forward and per second of each schedule, the quickest first.

    times: of one context and batch. By the step rule in the long run; a step costs what was measured,
    however short its draft is, as the engine's steps have a fixed shape. Tokens per second are those of
    all sequences; engine overhead between steps is not in it. Two-forward is rated once, by both its steps.
    """
    seconds = {t.schedule: t.seconds for t in times}
    ar = next(t for t in times if t.schedule == AUTOREGRESSIVE)
    rated = []
    for each in times:
        steps = each.schedule.steps
        if each.schedule != steps[0]:
            continue
        tokens = acceptance.expected(each.schedule)
        rate = tokens * each.batch * len(steps) / sum(seconds[step] for step in steps)
        rated.append(
            {
                "method": names[each.schedule],
                "tokens_per_forward": tokens,
                "tokens_per_second": rate,
                "x_ar": rate * ar.seconds / ar.batch,
            }
        )
    return sorted(rated, key=lambda figures: -figures["tokens_per_second"])


def summarise_steps(
    times: Sequence[StepTime], acceptance: Acceptance, names: Mapping[Schedule, str]
) -> list[Figures]:
    """For each batch and context: the AR step, free rows, and the schedules by speed."""
    found = []
    places = dict.fromkeys((each.batch, each.context) for each in times)
    for batch, context in places:
        mine = [t for t in times if (t.batch, t.context) == (batch, context)]
        steps = step_figures(mine, names)
        found.append(
            {
                "batch": batch,
                "context": context,
                "ar_milliseconds": next(
                    s["milliseconds"] for s in steps if s["method"] == names[AUTOREGRESSIVE]
                ),
                "free_rows": {f"{most:g}": free_rows(steps, most) for most in FREE},
                "recommended": (rated := rate_schedules(mine, acceptance, names))[0]["method"],
                "schedules": rated,
            }
        )
    return found


def save_plot(
    steps: Sequence[Figures], title: str, path: Path, *, kernels: Sequence[Figures] = ()
) -> None:
    """`draw_steps`, into a PNG. Raises TidarError without matplotlib or a place to write."""
    save_figure(draw_steps(steps, title, kernels), path)


def draw_steps(steps: Sequence[Figures], title: str, kernels: Sequence[Figures] = ()) -> "Figure":
    """Step time over AR against rows, a line per context, a panel per batch.

    kernels: of the same steps, what a record has as "kernels"; where a profiler saw any, panels below have the
    GPU time of attention and of the MLP. Raises TidarError without matplotlib.
    """
    batches = list(dict.fromkeys(step["batch"] for step in steps))
    contexts = list(dict.fromkeys(step["context"] for step in steps))
    split = [line for line in kernels if line["kinds"] is not None]
    high = 2 if split else 1
    figure = new_figure(1.0 + 5.0 * len(batches), 0.4 + 4.0 * high)
    panels = figure.subplots(high, len(batches), squeeze=False, sharex="col", sharey="row")
    for axes, batch in zip(panels[0], batches, strict=True):
        _draw(axes, [step for step in steps if step["batch"] == batch], f"batch {batch}")
    panels[0][0].set_ylabel("step time, AR steps")
    panels[0][0].legend(title="context")
    if split:
        for axes, batch in zip(panels[1], batches, strict=True):
            _draw_kinds(axes, [line for line in split if line["batch"] == batch], contexts)
        panels[1][0].set_ylabel("GPU time of a step, ms")
        for kind, style in DRAWN:
            panels[1][0].plot([], [], style, color="0.3", label=kind)
        panels[1][0].legend()
    for row in panels:
        row[0].set_ylim(bottom=0.0)
    for axes in panels[-1]:
        axes.set_xlabel("rows of a sequence's step")
    figure.suptitle(title, fontsize=10)
    return figure


def _draw(axes: "Axes", steps: Sequence[Figures], title: str) -> None:
    for context in dict.fromkeys(step["context"] for step in steps):
        line = sorted((step["rows"], step["x_ar"]) for step in steps if step["context"] == context)
        axes.plot(*zip(*line, strict=True), marker="o", markersize=3.5, label=f"{context:,}")
    for most in FREE:
        axes.axhline(most, color="0.6", linewidth=0.8, linestyle=":")
        across = axes.get_yaxis_transform()  # x in panel widths, y in AR steps
        axes.text(
            0.99,
            most,
            f"{most:g}",
            transform=across,
            ha="right",
            va="bottom",
            fontsize=7,
            color="0.4",
        )
    axes.set_title(title, fontsize=9)


def _draw_kinds(axes: "Axes", lines: Sequence[Figures], contexts: Sequence[int]) -> None:
    """Attention and MLP of one batch against rows, in the colours that the contexts have above."""
    for number, context in enumerate(contexts):
        mine = [line for line in lines if line["context"] == context]
        for kind, style in DRAWN:
            spent = sorted((line["rows"], line["kinds"][kind]) for line in mine)
            axes.plot(
                [rows for rows, _ in spent],
                [milliseconds for _, milliseconds in spent],
                style,
                marker="o",
                markersize=3.5,
                color=f"C{number}",
            )
