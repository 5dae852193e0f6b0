"""The laboratory's tables and figures, from records alone: nothing is run.

python -m lab.table RECORDS OUT
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from lab.command import exit_code
from lab.contenders import CONTENDERS, EXACT_VARIANTS, SCHEDULES
from lab.figures import Point, draw_trade_off
from lab.measure import TEMPERATURES, TIMED
from lab.page import (
    Picture,
    Section,
    Shelf,
    joined,
    markdown_table,
    number,
    reach,
    write_page,
)
from lab.quality import SCORES
from tidar.errors import TidarError

COMMAND: Final = "python -m lab.run --out runs/lab --shared SOURCES"

SCORE_NAMES: Final = {"valid_python": "valid Python so far", "exact_match": "exact match"}


def sections(shelf: Shelf) -> list[Section]:
    """Those whose records are there."""
    made = [
        quality(shelf), likelihoods(shelf), twin(shelf), *(speeds(shelf, each) for each in TIMED),
        temperatures(shelf), schedules(shelf),
    ]  # fmt: skip
    return [each for each in made if each is not None]


def _section(key: str, title: str, body: str, records: Sequence[str], *pictures: Picture) -> Section:  # fmt: skip
    return Section(
        key=key, title=f"The laboratory: {title}", body=body, records=records, commands=(COMMAND,),
        pictures=pictures,
    )  # fmt: skip


def decoded(shelf: Shelf, temperature: float) -> dict[str, dict[str, Any]]:
    """Quality records at a temperature, by contender."""
    names = {f"{name}_t{temperature:g}": name for name in CONTENDERS}
    return {names[key]: record for key, record in shelf.present(names)}


def domains_of(record: dict[str, Any]) -> list[str]:
    """The domains of a record, in the corpus's order."""
    return list(record["domains"])


def score(told: dict[str, Any], domain: str) -> float | None:
    """What the texts of a domain are worth, 0 to 1; None where nothing tells."""
    value = told.get(SCORES.get(domain, ""))
    return None if value is None else float(value)


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# --- quality ---


def quality(shelf: Shelf) -> Section | None:
    """As Table 2 of the paper: the score of each domain, T/NFE in brackets."""
    found = decoded(shelf, 0.0)
    if not found:
        return None
    first = next(iter(found.values()))
    scored = [domain for domain in domains_of(first) if domain in SCORES]
    rows = []
    for name, record in found.items():
        told = record["domains"]
        values = [score(told[domain], domain) for domain in scored]
        forwards = [told[domain]["tokens_per_forward"] for domain in scored]
        rows.append(
            [
                f"`{name}`",
                f"`{record['settings']['methods'][0]}`",
                *(
                    f"{number(v, '.1%')} ({number(t)})"
                    for v, t in zip(values, forwards, strict=True)
                ),
                f"{number(_average(values), '.1%')} ({number(_average(forwards))})",
            ]
        )
    heads = [f"{domain}: {SCORE_NAMES[SCORES[domain]]}" for domain in scored]
    counts = ", ".join(f"{first['domains'][domain]['prompts']} {domain}" for domain in scored)
    body = (
        f"Score (T/NFE) at temperature 0, the first held-out prompts of each domain ({counts}), up to "
        f"{first['settings']['max_new_tokens']} tokens, {first['settings']['answer_tokens']} where they end in an "
        "answer, side by side in the plain engine.\n\n"
        + markdown_table(["contender", "method", *heads, "average"], rows)
    )
    return _section(
        "quality", "quality and tokens per forward", body, [f"{name}_t0" for name in found],
        *_forward_picture(shelf, 0.0),
    )  # fmt: skip


def likelihoods(shelf: Shelf) -> Section | None:
    """As Table 3 of the paper, in bits per byte: TiDAR by its causal rows, diffusion by Monte Carlo."""
    stages = list(dict.fromkeys(each.stage for each in CONTENDERS.values()))
    found = shelf.present(f"bits_{stage}" for stage in stages)
    if not found:
        return None
    first = found[0][1]
    rows = [[f"`{record['stage']}`", *_bits(record)] for _, record in found]
    samples = max(record["settings"]["samples"] for _, record in found)
    body = (
        f"Bits per byte of up to {first['settings']['held_out']} held-out documents a domain, less is better. ≤: a "
        f"Monte Carlo upper bound of {samples} samples a document, ± its standard error; a bound is no likelihood, so "
        "it may not be set against an exact value as if it were one.\n\n"
        + markdown_table(["checkpoint", *first["bits_per_byte"], "average"], rows)
    )
    return _section("likelihoods", "held-out text", body, [name for name, _ in found])


def _bits(record: dict[str, Any]) -> list[str]:
    """Of each domain, and their average."""
    told = record["bits_per_byte"].values()
    average = number(_average([each["value"] for each in told]), ".3f")
    if record["settings"]["is_bound"]:
        return [*(f"≤ {each['value']:.3f} ± {each['error']:.3f}" for each in told), f"≤ {average}"]
    return [*(f"{each['value']:.3f}" for each in told), average]


def twin(shelf: Shelf) -> Section | None:
    """TiDAR's causal quality against the AR twin's: the same base, data, batches and number of clean tokens."""
    names = ("bits_ar", "bits_tidar", "ar_t0", "tidar_t0")
    found = dict(shelf.present(names))
    if len(found) < len(names):
        return None
    rows = []
    for domain, told in found["bits_ar"]["bits_per_byte"].items():
        mine = found["bits_tidar"]["bits_per_byte"][domain]["value"]
        rows.append(_beside(f"{domain}: bits per byte", told["value"], mine, ".3f"))
    for domain, told in found["ar_t0"]["domains"].items():
        base, value = score(told, domain), score(found["tidar_t0"]["domains"][domain], domain)
        if base is not None and value is not None:
            rows.append(
                _beside(f"{domain}: {SCORE_NAMES[SCORES[domain]]}", base, value, ".1%")
            )  # fmt: skip
    head = ["measure", "AR twin", "TiDAR", "TiDAR against AR"]
    body = (
        "The causal reading of both, temperature 0. Bits per byte: less is better; scores: more is.\n\n"
        + markdown_table(head, rows)
    )
    return _section("twin", "what the joint loss costs the causal model", body, names)


def _beside(what: str, base: float, value: float, form: str) -> list[str]:
    change = f"{value / base - 1:+.1%}" if base else "not defined" if value else "+0.0%"
    return [what, format(base, form), format(value, form), change]


# --- speed ---


def speeds(shelf: Shelf, temperature: float) -> Section | None:
    """Of every contender by domain, as figures and labels of Figure 4 of the paper."""
    name = f"speed_t{temperature:g}"
    record = shelf.get(name)
    if record is None:
        return None
    domains = domains_of(record)
    asked, who = record["settings"], record["contenders"]
    told = {name: [record["domains"][domain][name] for domain in domains] for name in who}

    def rows(cell: Callable[[dict[str, Any]], str]) -> list[list[str]]:
        return [[f"`{n}`", about["engine"], *map(cell, told[n])] for n, about in who.items()]

    over = rows(lambda each: joined(reach(each["over_ar"]), number(each["tokens_per_forward"])))
    rates = rows(lambda each: number((each["tokens_per_second"] or {}).get("median"), ",.0f"))
    counts = ", ".join(f"{count} {domain}" for domain, count in asked["prompts"].items())
    head = ["contender", "engine", *domains]
    body = (
        "Over AR in the same engine (median prompt, least to most) · T/NFE; one prompt at a time, end to end "
        f"({counts}), up to {asked['max_new_tokens']} tokens, {asked['runs']} runs. Warm-up: {asked['warm_up']}. "
        f"Order: {asked['order']}.\n\n{markdown_table(head, over)}\n\nTokens per second, median of the runs:\n\n"
        + markdown_table(head, rates)
    )
    return _section(
        f"speed-t{temperature:g}", f"speed at temperature {temperature:g}", body, [name],
        *_speed_picture(shelf, temperature),
    )  # fmt: skip


# --- acceptance ---


def temperatures(shelf: Shelf) -> Section | None:
    """T/NFE beside what the texts repeat, at every temperature."""
    found = {each: decoded(shelf, each) for each in TEMPERATURES}
    some = next((record for each in found.values() for record in each.values()), None)
    if some is None:
        return None
    domains = domains_of(some)
    real = [number(some["domains"][domain]["distinct_4_of_real_text"]) for domain in domains]
    rows = [["real continuations", "", *(joined("", each) for each in real)]]
    for name in CONTENDERS:
        for temperature in TEMPERATURES:
            if record := found[temperature].get(name):
                told = record["domains"]
                cells = [_text_cell(told[d], d) for d in domains]
                rows.append([f"`{name}`", f"{temperature:g}", *cells])
    body = (
        "T/NFE · distinct-4 (distinct 4-grams of tokens over all of them: a text that loops has few, and is easy to "
        "draft) · score, as in the first table. All of the first prompts of each domain, none picked.\n\n"
        + markdown_table(["contender", "temperature", *domains], rows)
    )
    names = [f"{name}_t{each:g}" for name in CONTENDERS for each in TEMPERATURES]
    present = [name for name, _ in shelf.present(names)]
    return _section(
        "temperatures", "tokens per forward and repetition", body, present, *_forward_picture(shelf, 1.0)
    )  # fmt: skip


def _text_cell(told: dict[str, Any], domain: str) -> str:
    """T/NFE, distinct-4, and the score where the domain has one."""
    cell = joined(number(told["tokens_per_forward"]), number(told["distinct_4"]))
    value = score(told, domain)
    return cell if value is None else f"{cell} · {value:.1%}"


def schedules(shelf: Shelf) -> Section | None:
    """T/NFE of TiDAR by K and span set: free, and forced to write the real text."""
    names = ("schedules_free", "schedules_forced")
    found = dict(shelf.present(names))
    if len(found) < len(names):
        return None
    free, forced = (found[name]["domains"] for name in names)
    trained = found["schedules_free"]["models"]["tidar"]["trained_draft_lens"]
    rows = []
    for method in ("ar", *SCHEDULES):
        cells = [
            joined(
                number(free[d]["methods"][method]["tokens_per_forward"]),
                number(forced[d]["methods"][method]["tokens_per_forward"]),
            )
            for d in free
        ]
        largest = max(free[d]["methods"][method]["rows_per_step"] for d in free)
        same = [free[d]["methods"][method]["same_as_ar"] for d in free]
        differ = f"{sum(s['differ'] for s in same)} ({sum(s['excused'] for s in same)})"
        star = "" if method == "ar" or int(method.split(":")[1]) in trained else "*"
        rows.append([f"`{method}`{star}", f"{largest:.0f}", *cells, differ])
    head = ["method", "rows a step", *free, "texts unlike AR's (near-ties)"]
    count = sum(each["prompts"] for each in free.values())
    body = (
        "T/NFE at temperature 0: writing freely · teacher forced, on the real continuations. The text is AR's "
        f"whatever the schedule; the last column counts those that are not, of {count}, and how many of them part at a "
        "near-tie. "
        f"*: trained with K = {', '.join(map(str, trained))}, so longer spans are longer than any in training.\n\n"
        + markdown_table(head, rows)
    )  # fmt: skip
    return _section("schedules", "draft length and span set", body, names)


# --- figures ---


def _points(
    shelf: Shelf, temperature: float, x_of: Callable[[str, str], float | None]
) -> dict[str, list[Point]]:
    """By domain with a score: a point for each contender whose figure `x_of` (name, domain) tells.

    Where no text of a variant was judged, an exact one's are worth what its contender's are: both are AR's.
    """
    found, panels = decoded(shelf, temperature), dict[str, list[Point]]()
    for name, contender in CONTENDERS.items():
        record = found.get(name)
        if record is None and name in EXACT_VARIANTS:
            record = found.get(name.rpartition("-")[0])
        for domain, told in record["domains"].items() if record else ():
            x, y = x_of(name, domain), score(told, domain)
            if x is not None and y is not None:
                panels.setdefault(domain, []).append(Point(name, x, y, contender.is_variant))
    return panels


def _picture(name: str, title: str, x_label: str, panels: dict[str, list[Point]]) -> list[Picture]:
    if not panels:
        return []
    labels = {domain: SCORE_NAMES[SCORES[domain]] for domain in panels}
    alt = (
        f"{title}: {x_label} against the score, a panel for each domain; open: variants of the contender of that "
        "colour (other draft lengths, a tree, a token a pass)"
    )
    return [Picture(name, alt, partial(draw_trade_off, panels, title, x_label, labels))]


def _forward_picture(shelf: Shelf, temperature: float) -> list[Picture]:
    found = decoded(shelf, temperature)

    def forward(name: str, domain: str) -> float | None:
        return found[name]["domains"][domain]["tokens_per_forward"] if name in found else None

    return _picture(
        f"pareto_forward_t{temperature:g}.png",
        f"Quality against tokens per forward, temperature {temperature:g}",
        "tokens per forward (T/NFE)",
        _points(shelf, temperature, forward),
    )


def _speed_picture(shelf: Shelf, temperature: float) -> list[Picture]:
    timed = shelf.get(f"speed_t{temperature:g}") or {"domains": {}}

    def over_ar(name: str, domain: str) -> float | None:
        told = timed["domains"].get(domain, {}).get(name)
        return told["over_ar"]["median"] if told and told["over_ar"] else None

    return _picture(
        f"pareto_speed_t{temperature:g}.png",
        f"Quality against speed, temperature {temperature:g}, plain engine",
        "tokens/s over AR",
        _points(shelf, temperature, over_ar),
    )


# --- files ---


def write(records: Path, out: Path) -> None:
    """Write OUT/table.md and its pictures. Raises TidarError without records or matplotlib."""
    shelf = Shelf(records)
    if not (made := sections(shelf)):
        raise TidarError(f"{records} has no records: run the stage measure first.")
    write_page(made, shelf, out / "table.md")


def main(arguments: Sequence[str]) -> int:
    """`python -m lab.table RECORDS OUT`."""
    if len(arguments) != 2:
        print(f"usage: {(__doc__ or '').splitlines()[2].strip()}", file=sys.stderr)
        return 2
    return exit_code(lambda: write(Path(arguments[0]), Path(arguments[1])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
