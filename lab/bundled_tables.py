"""Sections about the bundled checkpoint, from records of `tidar bench`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from lab.figures import draw_speeds
from lab.page import (
    Picture,
    Record,
    Section,
    Shelf,
    command_of,
    joined,
    markdown_table,
    number,
    reach,
)

ACCEPTANCE: Final = {
    "python_t0": "Python", "python_tf": "Python, teacher forced", "python_t1": "Python, temperature 1",
    "arithmetic_t0": "arithmetic", "stepmath_t0": "stepmath",
}  # fmt: skip
GPU: Final = {
    "gpu_python_t0": "Python", "gpu_python_t1": "Python, temperature 1",
    "gpu_arithmetic_t0": "arithmetic", "gpu_arithmetic_t1": "arithmetic, temperature 1",
}  # fmt: skip
CPU: Final = {
    "cpu_python_t0": "Python", "cpu_python_bf16": "Python, bfloat16",
    "cpu_python_t1": "Python, temperature 1", "cpu_arithmetic_t0": "arithmetic",
    "cpu_arithmetic_bf16": "arithmetic, bfloat16",
}  # fmt: skip
RIVALS: Final = {"rivals_python": "Python", "rivals_arithmetic": "arithmetic"}

Figures = Mapping[str, Any]


def sections(shelf: Shelf) -> list[Section]:
    """Those whose records are there, or some of them."""
    made = (
        _section(shelf, "bundled-acceptance", "The bundled checkpoint: tokens per forward", ACCEPTANCE, acceptance),
        _section(shelf, "bundled-gpu", "The bundled checkpoint: speed on a GPU", GPU, speeds),
        _section(shelf, "bundled-cpu", "The bundled checkpoint: speed on a CPU", CPU, speeds),
        _section(shelf, "bundled-rivals", "The bundled checkpoint: other ways to decode it", RIVALS, rivals),
    )  # fmt: skip
    return [each for each in made if each is not None]


def _section(
    shelf: Shelf,
    key: str,
    title: str,
    texts: Mapping[str, str],
    body: Callable[[Sequence[tuple[str, Record]]], str],
) -> Section | None:
    found = shelf.present(texts)
    if not found:
        return None
    labelled = [(texts[name], record) for name, record in found]
    return Section(
        key=key, title=title, body=body(labelled), records=[name for name, _ in found],
        commands=[command_of(record) for _, record in found],
        pictures=_pictures(labelled) if key == "bundled-gpu" else (),
    )  # fmt: skip


def _pictures(found: Sequence[tuple[str, Record]]) -> list[Picture]:
    """One for each kind of text, at whatever temperatures."""
    kinds: dict[str, list[tuple[str, Record]]] = {}
    for label, record in found:
        kinds.setdefault(label.partition(",")[0], []).append((label, record))
    return [
        Picture(
            f"bundled_speed_{kind.lower()}.png",
            f"Tokens per second over AR by method: {'; '.join(label for label, _ in some)}",
            partial(_draw, some),
        )
        for kind, some in kinds.items()
    ]


def methods_of(found: Sequence[tuple[str, Record]]) -> list[str]:
    """All methods of these records, in the order of their first mention."""
    return list(dict.fromkeys(method for _, record in found for method in record["methods"]))


def by_method(
    found: Sequence[tuple[str, Record]], cell: Callable[[Figures], str]
) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row for each method, a column for each text."""
    rows = [
        [f"`{method}`", *(cell(record["methods"].get(method, {})) for _, record in found)]
        for method in methods_of(found)
    ]
    return ["method", *(label for label, _ in found)], rows


def acceptance(found: Sequence[tuple[str, Record]]) -> str:
    """T/NFE of each schedule, and what the texts are worth: every schedule writes the same."""
    head, rows = by_method(
        found,
        lambda told: joined(
            number(told.get("tokens_per_forward")), number(told.get("characters_per_forward"))
        ),
    )

    def of_ar(name: str, form: str) -> list[str]:
        return [number(record["methods"]["ar"].get(name), form) for _, record in found]

    real = [number(record["prompts"].get("distinct_4_of_real_text")) for _, record in found]
    prompts = [str(record["prompts"]["count"]) for _, record in found]
    rows += [
        ["distinct-4 of the text", *of_ar("distinct_4", ".2f")],
        ["distinct-4 of the real text", *real],
        ["exact match", *of_ar("exact_match", ".1%")],
        ["prompts", *prompts],
    ]
    return (
        "T/NFE · characters per forward, as the small vocabulary has short pieces.\n\n"
        + markdown_table(head, rows)
        + _differences(found)
    )


def speeds(found: Sequence[tuple[str, Record]]) -> str:
    """Speed over AR in the same engine, T/NFE, tokens per second."""
    head, rows = by_method(found, _speed)
    told = found[0][1]["settings"]
    engine = told.get("engine", "plain")  # records of before there was another do not say
    return (
        f"Over AR (median prompt, least to most) · T/NFE · tokens/s. The {engine} engine for all, one prompt at a "
        f"time, {found[0][1]['prompts']['count']} prompts, up to {told['max_new_tokens']} tokens; {told['warm_up']}; "
        f"{told['order']}.\n\n" + markdown_table(head, rows) + _differences(found)
    )


def _speed(told: Figures) -> str:
    """Speed over AR (median, least to most), T/NFE and tokens per second."""
    rate = told.get("tokens_per_second")
    return joined(
        reach((told.get("speed_up") or {}).get("end_to_end")),
        number(told.get("tokens_per_forward")),
        number(rate and rate["median"], ",.0f"),
    )


def rivals(found: Sequence[tuple[str, Record]]) -> str:
    """The same weights decoded by methods they were not trained for."""
    head, rows = by_method(found, _rival)
    return "Over AR · T/NFE · distinct-4 · exact match.\n\n" + markdown_table(head, rows)


def _rival(told: Figures) -> str:
    over = (told.get("speed_up") or {}).get("end_to_end")
    return joined(
        number(over["median"]) if over else "1" if told else "",
        number(told.get("tokens_per_forward")),
        number(told.get("distinct_4")),
        number(told.get("exact_match"), ".0%"),
    )


def _differences(found: Sequence[tuple[str, Record]]) -> str:
    """How many texts are not AR's, over all methods of a record."""
    told = []
    for label, record in found:
        same = [each["same_as_ar"] for each in record["methods"].values() if "same_as_ar" in each]
        if not same:
            continue
        most = max(each["differ"] for each in same)
        near = all(each["differ"] == each["excused"] for each in same)
        count = record["prompts"]["count"]
        how = "none" if not most else f"up to {most}, {'all' if near else 'not all'} at near-ties"
        told.append(f"{label}: {how} of {count}" if not most else f"{label}: {how}, of {count}")
    return f"\n\nTexts that leave AR's, by any method: {'; '.join(told)}." if told else ""


def _draw(found: Sequence[tuple[str, Record]], path: Path) -> None:
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for label, record in found:
        panels[label] = {
            method: told["speed_up"]["end_to_end"]
            for method, told in record["methods"].items()
            if "end_to_end" in told["speed_up"]
        }
    where = found[0][1]["environment"]
    draw_speeds(panels, f"Speed over AR, bundled checkpoint, {where['gpu'] or where['cpu']}", path)
