"""How repetitive a text is: drafting is easy where a model loops."""

from collections.abc import Hashable, Sequence


def distinct_ngrams(ids: Sequence[Hashable], n: int = 4) -> float | None:
    """Distinct n-grams / all n-grams; None for a text too short to have one."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def mean_distinct(texts: Sequence[Sequence[Hashable]], n: int = 4) -> float | None:
    """Mean of `distinct_ngrams` over texts; those too short are left out."""
    values = [value for text in texts if (value := distinct_ngrams(text, n)) is not None]
    return sum(values) / len(values) if values else None
