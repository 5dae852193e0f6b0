"""The laboratory's table and figure, from records alone: nothing is run.

python -m lab.table RECORDS OUT
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.measure import CONTENDERS, TEMPERATURES
from tidar.bench.plot import new_figure, save_figure
from tidar.bench.record import read_record
from tidar.errors import TidarError

Records = dict[str, dict[str, Any]]


def read_all(folder: Path) -> Records:
    """The records of a folder by their names without suffix. Raises TidarError where there are none."""
    found = {path.stem: read_record(path) for path in sorted(folder.glob("*.json"))}
    if not found:
        raise TidarError(f"{folder} has no records: run the stage measure first.")
    return found


def speed(records: Records, name: str, temperature: float, domain: str) -> float | None:
    """Tokens per second, prompts one at a time, end to end."""
    record = records.get(f"{name}_t{temperature:g}")
    if record is None:
        return None
    told = record["domains"][domain]["speed"]["tokens_per_second"]
    return None if told is None else float(told["median"])


def over_ar(records: Records, name: str, temperature: float, domain: str) -> float | None:
    """That speed over the AR twin's."""
    mine, base = (speed(records, who, temperature, domain) for who in (name, "ar"))
    return mine / base if mine and base else None


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _bits(records: Records, name: str, domain: str) -> str:
    record = records.get(f"bits_{CONTENDERS[name].stage}")
    if record is None:
        return ""
    told = record["bits_per_byte"][domain]
    bound = record["settings"]["is_bound"]
    return f"≤ {told['value']:.3f} ± {told['error']:.3f}" if bound else f"{told['value']:.3f}"


def rows(records: Records, temperature: float, domain: str) -> list[list[str]]:
    """A row a contender: name, bits per byte, quality, T/NFE, tokens per second, speed over AR."""
    made = []
    for name in CONTENDERS:
        record = records.get(f"{name}_t{temperature:g}")
        if record is None or domain not in record["domains"]:
            continue
        told = record["domains"][domain]
        quality, timed = told["quality"], told["speed"]
        made.append(
            [
                f"`{name}`",
                _bits(records, name, domain),
                _cell(quality["exact_match"], ".0%"),
                _cell(quality.get("valid_python"), ".0%"),
                _cell(quality["distinct_4"], ".2f"),
                _cell(timed["tokens_per_forward"], ".2f"),
                _cell(speed(records, name, temperature, domain), ".0f"),
                _cell(over_ar(records, name, temperature, domain), ".2f"),
            ]
        )
    return made


HEADINGS = ("contender", "bits per byte", "exact match", "valid Python", "distinct-4", "T/NFE",
            "tokens/s", "over AR")  # fmt: skip


def markdown(records: Records) -> str:
    """A table for each domain and temperature."""
    parts = []
    for domain in _domains(records):
        for temperature in TEMPERATURES:
            lines = [" | ".join(row) for row in rows(records, temperature, domain)]
            head = [" | ".join(HEADINGS), " | ".join("---" for _ in HEADINGS)]
            body = "\n".join(f"| {line} |" for line in [*head, *lines])
            parts.append(f"## {domain}, temperature {temperature:g}\n\n{body}\n")
    return "\n".join(parts)


def _domains(records: Records) -> list[str]:
    return list(next(iter(r["domains"] for r in records.values() if "domains" in r), {}))


def draw(records: Records, path: Path) -> None:
    """Bits per byte against speed over AR at temperature 0: a panel for each domain; down and right is better."""
    domains = _domains(records)
    figure = new_figure(3.4 * len(domains), 3.2)
    for axis, domain in zip(
        figure.subplots(1, len(domains), squeeze=False)[0], domains, strict=True
    ):
        for name, contender in CONTENDERS.items():
            x, bits = over_ar(records, name, 0.0, domain), records.get(f"bits_{contender.stage}")
            if x is None or bits is None:
                continue
            y, bound = bits["bits_per_byte"][domain]["value"], bits["settings"]["is_bound"]
            axis.plot([x], [y], "v" if bound else "o", label=name)
            axis.annotate(name, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.set_title(domain, fontsize=9)
        axis.set_xlabel("tokens/s over AR", fontsize=8)
        axis.set_ylabel("bits per byte (▼: upper bound)", fontsize=8)
        axis.grid(alpha=0.25)
    save_figure(figure, path)


def write(records: Path, out: Path) -> None:
    """Write OUT/table.md and OUT/pareto.png. Raises TidarError without records or matplotlib."""
    found = read_all(records)
    (out / "table.md").write_text(markdown(found), encoding="utf-8")
    draw(found, out / "pareto.png")
    print(f"wrote {out / 'table.md'} and {out / 'pareto.png'}")


def main(arguments: Sequence[str]) -> int:
    """`python -m lab.table RECORDS OUT`."""
    if len(arguments) != 2:
        print(f"usage: {(__doc__ or '').splitlines()[2].strip()}", file=sys.stderr)
        return 2
    try:
        write(Path(arguments[0]), Path(arguments[1]))
    except TidarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
