"""Tables that people write, in README.md and docs/gpu.md, say what the records say, to the digits they show."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from models import ROOT

LAB, BENCH = ROOT / "lab/records", ROOT / "benchmarks/records"


@cache
def record(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


def table(page: str, head: str) -> dict[str, list[str]]:
    """Rows by their first cell, of the table whose header line begins with `head`; labels without marks."""
    lines = (ROOT / page).read_text(encoding="utf-8").split("\n")
    (start,) = [at for at, line in enumerate(lines) if line.startswith(head)]
    rows: dict[str, list[str]] = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        label, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[label.replace("*", "")] = cells
    return rows


def shown(number: str, value: float) -> bool:
    """Whether a written number is the value, rounded to as many digits; a percentage is of a share."""
    digits = len(number.rstrip("%").partition(".")[2])
    exact = 100 * value if number.endswith("%") else value
    return abs(float(number.rstrip("%")) - exact) <= 0.5 * 10**-digits + 1e-9


def check(cell: str, values: Sequence[float | None], where: object) -> None:
    """A cell with a number for each value, or with one that is every value's."""
    numbers = re.findall(r"\d+(?:\.\d+)?%?", cell)
    assert numbers, (where, cell)
    if len(numbers) == 1:
        numbers *= len(values)
    assert len(numbers) == len(values), (where, cell, values)
    for number, value in zip(numbers, values, strict=True):
        assert value is not None, (where, cell)
        assert shown(number, value), (where, cell, value)


METHODS: Mapping[str, tuple[str, ...]] = {
    "AR": ("ar",),
    "TiDAR, K = 16, all spans": ("tidar",),
    "EAGLE-3 head, drafts of 2; 4; 8": ("eagle-2", "eagle", "eagle-8"),
    "the same, a tree of depth 4": ("eagle-tree",),
    "speculative, 1.7M drafter, drafts of 2; 4; 8": ("speculative-2", "speculative", "speculative-8"),
    "block diffusion, threshold 0.9": ("block-diffusion",),
    "LLaDA; Dream, two tokens a pass": ("llada", "dream"),
    "fast engine: TiDAR, K = 16, all spans": ("tidar-paged",),
    "TiDAR, K = 16, {1,2,3,5,8,16}": ("tidar-sparse-paged",),
    "TiDAR, K = 8, {1,2,4,8}": ("tidar-8-paged",),
    "TiDAR, K = 4, all spans": ("tidar-4-paged",),
}  # fmt: skip


def test_methods_side_by_side() -> None:
    rows = table("README.md", "| | arithmetic: score, T/NFE |")
    assert set(rows) == set(METHODS), "a row without a record, or the other way round"
    timed = record(LAB / "speed_t0.json")["domains"]
    for label, names in METHODS.items():
        for at, domain, score in ((0, "arithmetic", "exact_match"), (2, "python", "valid_python")):
            told, over = rows[label][at : at + 2]
            check(over, [timed[domain][name]["over_ar"]["median"] for name in names], label)
            if names[0].endswith("-paged"):
                forward = told.removeprefix("T/NFE ")
                check(forward, [timed[domain][n]["tokens_per_forward"] for n in names], label)
                continue
            records = [record(LAB / f"{name}_t0.json")["domains"][domain] for name in names]
            scores, forward = told.split(", ")
            check(scores, [each[score] for each in records], label)
            check(forward, [each["tokens_per_forward"] for each in records], label)
        is_exact = {"no"} if {"block-diffusion", "llada"} & {*names} else {"yes", ""}
        assert rows[label][4] in is_exact


def test_speeds_of_the_bundled_checkpoint() -> None:
    rows = table("README.md", "| | T/NFE | x AR, a fixed span set |")
    for domain, sets in {
        "arithmetic": ("tidar:16:1,2,3,5,8,16", "tidar:16:1,2,3,5,8,16"),
        "python": ("tidar:8:1,2,4", "tidar:4:dense"),
    }.items():
        told = [record(BENCH / f"gpu_{domain}_t{t}.json")["methods"] for t in (0, 1)]
        (label,) = [label for label in rows if domain in label.lower()]
        forward, fixed, planned, beside = rows[label]
        mine = [each[name] for each, name in zip(told, sets, strict=True)]
        check(forward, [each["tokens_per_forward"] for each in mine], label)
        over = [each["speed_up"]["end_to_end"]["median"] for each in mine]
        check(fixed.partition(" end to end")[0], over, label)
        plans = [each["tidar:plan"]["speed_up"]["end_to_end"]["median"] for each in told]
        check(planned, plans, label)
        if domain == "python":
            distinct = [each["distinct_4"] for each in (*mine, *(each["ar"] for each in told))]
            check(beside.replace("distinct-4", ""), distinct, label)
        else:
            for each in told:
                assert {each[name]["exact_match"] for name in ("ar", "tidar:plan", *sets)} == {1.0}


@pytest.mark.parametrize("shape", ["1.5B", "8B"])
def test_replays(shape: str) -> None:
    (cell,) = record(BENCH / f"gpu_replay_{shape.lower()}.json")["cells"]
    front = table("README.md", "| | T/NFE | x AR, a fixed span set |")
    rows = table("docs/gpu.md", "| shape, method |")
    for label, name in {
        "AR": "ar",
        "K = 16, {1,5,9,13}": "tidar:16:1,5,9,13",
        "planned": "tidar:plan",
        "K = 8, all spans": "tidar:8:dense",
    }.items():
        told = cell["methods"][name]
        step, forward, over, expected = rows[f"{shape}, {label}"]
        check(step, [told["step_milliseconds"]["median"]], label)
        gains = told["x_ar"]["decode"]
        if name == "ar":
            continue
        both = [told["tokens_per_forward"], told["expected_tokens_per_forward"]]
        check(forward, both, label)
        check(over, [gains["median"], gains["min"], gains["max"]], label)
        check(expected, [told["x_ar"]["decode_at_expected"]["median"]], label)
        written = front[f"{shape} shape, random weights, replayed acceptance"]
        if name == "tidar:plan":
            check(written[2], [gains["median"]], label)
        elif name != "tidar:8:dense":
            check(written[0], [told["tokens_per_forward"]], label)
            check(written[1].partition(" decode")[0], [gains["median"]], label)


def test_sweep() -> None:
    rows = table("docs/gpu.md", "| context | 1 | 2 |")
    told = record(BENCH / "gpu_sweep_1.5b.json")["cells"]
    assert len(told) == 3 * 7
    for cell in told:
        at = (1, 2, 4, 8, 16, 32, 64).index(cell["batch"])
        gains = cell["methods"]["tidar:plan"]["x_ar"]["decode"]
        check(rows[f"{cell['context']:,}"][at], [gains["median"]], cell["batch"])


def test_memory_beside_weights_and_cache() -> None:
    """docs/gpu.md names the least and the most, in GiB."""
    names = ("gpu_sweep_1.5b", "gpu_replay_1.5b", "gpu_replay_8b")
    cells = [cell for name in names for cell in record(BENCH / f"{name}.json")["cells"]]
    memory = [told["memory"] for cell in cells for told in cell["methods"].values()]
    beside = [m["peak_bytes"] - m["weight_bytes"] - m["cache_bytes"] for m in memory]
    page = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    written = re.search(r"weights, cache and\s+(\d\.\d+) to (\d\.\d+) GiB", page)
    assert written is not None
    for number, value in zip(written.groups(), (min(beside), max(beside)), strict=True):
        assert shown(number, value / 2**30)


def test_profiles() -> None:
    """Steps at batch 1: milliseconds and, in brackets, over the AR step of the same context."""
    rows = table("docs/gpu.md", "| step of | 1.5B")
    sets = {
        "AR; reading the weights alone takes 0.74 and 3.6 ms": "ar",
        "K = 8, {1}: 16 rows": "tidar:8:1",
        "K = 8, all spans: 72 rows": "tidar:8:dense",
        "K = 16, {1,2,4,8}: 80 rows": "tidar:16:1,2,4,8",
        "K = 16, {1,2,3,5,8,16}: 112 rows": "tidar:16:1,2,3,5,8,16",
        "K = 16, all spans: 272 rows": "tidar:16:dense",
    }
    assert set(rows) == set(sets)
    places = [(shape, context) for shape in ("1.5b", "8b") for context in (1024, 8192)]
    for label, method in sets.items():
        for cell, (shape, context) in zip(rows[label], places, strict=True):
            (step,) = [
                step
                for step in record(BENCH / f"gpu_profile_{shape}.json")["steps"]
                if (step["method"], step["context"], step["batch"]) == (method, context, 1)
            ]
            assert label.endswith(f" {step['rows']} rows") or method == "ar"
            both = [step["milliseconds"], step["x_ar"]]
            check(cell, both[:1] if method == "ar" else both, (label, shape, context))


def test_kinds_of_kernels() -> None:
    rows = table("docs/gpu.md", "| step of | attention |")
    sets = {
        "AR": "ar",
        "K = 8, all spans": "tidar:8:dense",
        "K = 16, {1,2,4,8}": "tidar:16:1,2,4,8",
        "K = 16, all spans": "tidar:16:dense",
    }
    kinds = ("attention", "attention projections", "MLP", "norms", "vocabulary and choice")
    shapes = ("1.5B", "8B")
    assert set(rows) == {f"{shape}, {label}" for shape in shapes for label in sets}
    for shape in shapes:
        lines = record(BENCH / f"gpu_profile_{shape.lower()}.json")["kernels"]
        for label, method in sets.items():
            (line,) = [
                line
                for line in lines
                if (line["method"], line["context"], line["batch"]) == (method, 1024, 1)
            ]
            for cell, kind in zip(rows[f"{shape}, {label}"], kinds, strict=True):
                value = line["kinds"][kind]
                if cell == "-":  # inside the products
                    assert (method, kind, value) == ("ar", "norms", 0.0)
                else:
                    check(cell, [value], (shape, label, kind))


def test_numbers_are_compared_as_they_are_written() -> None:
    assert shown("1.4", 1.352)
    assert shown("92%", 0.921875)
    assert not shown("1.3", 1.352)
    with pytest.raises(AssertionError):
        check("1.4; 1.2", [1.36, 1.31], "a row")
