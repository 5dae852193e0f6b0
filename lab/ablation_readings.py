"""What the cases of an ablation's record say: numbers that its tables and its figure both show."""

from collections.abc import Callable, Mapping
from typing import Any, Final

Figures = Mapping[str, Any]
Reading = Callable[[Figures, str], float | str | None]
"""Of a case and a domain: a number, a text, or nothing."""

QUALITY: Final = {"python": "valid Python", "arithmetic": "exact match"}
"""What `quality` is of the texts of a domain."""


def domains_of(record: Figures) -> list[str]:
    """Those that were measured."""
    return list(record["cases"][0]["domains"])


def figure_of(which: str, name: str) -> Callable[[Figures, str], float | None]:
    """Of texts: which is "forced" (the real ones) or "free" (the model's own)."""

    def read(case: Figures, domain: str) -> float | None:
        told = case["domains"][domain].get(which)
        return None if told is None else told[name]

    return read


REAL: Final = figure_of("forced", "tokens_per_forward")
OWN: Final = figure_of("free", "tokens_per_forward")
ROWS: Final = figure_of("forced", "rows_per_step")


def quality(case: Figures, domain: str) -> float | None:
    """Of the model's own texts: right answers, or Python that compiles where there are none."""
    told = case["domains"][domain].get("free")
    if told is None:
        return None
    return told["valid_python"] if told["exact_match"] is None else told["exact_match"]


def tokens_per_second(case: Figures, domain: str, batch: int) -> float | None:
    """The median over runs, end to end."""
    told = case["domains"][domain][str(batch)]["tokens_per_second"]
    return None if told is None else float(told["median"])


def over_ar(record: Figures, case: Figures, domain: str, batch: int) -> float | None:
    """Tokens per second over those of AR, same weights and batch."""
    base = next(each for each in record["cases"] if each["method"] == "ar")
    mine, slow = (tokens_per_second(each, domain, batch) for each in (case, base))
    return mine / slow if mine and slow else None
