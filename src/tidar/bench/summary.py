"""From passes to figures, all plain JSON values: what a table shows and a record keeps."""

import statistics
from collections import Counter
from collections.abc import Sequence
from math import isfinite
from typing import Any

from tidar.bench.measure import Pass, Passes, Settings, Text, Timing
from tidar.bench.memory import MemoryMeter
from tidar.bench.prompts import Prompt, exact_match
from tidar.bench.repetition import distinct_ngrams, mean_distinct
from tidar.decode.compare import first_difference, near_tie_margin
from tidar.decode.request import tokens_per_forward
from tidar.model import Transformer
from tidar.sampling import SamplingParams
from tidar.tokens import Tokenizer

Figures = dict[str, Any]

SLOWEST_ALLOWED = 0.95
"""No prompt may be slower than this times AR, the spread of AR against itself taken off."""


TOO_NOISY = 0.1
"""Spread of AR against itself above which that line is not judged: it would excuse anything."""


def spread(values: Sequence[float]) -> Figures | None:
    """Median, least and most; None of nothing."""
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _texts(passes: Sequence[Pass]) -> list[Text]:
    return [text for each in passes for text in each.texts]


def ratio(number: float, by: float) -> float | None:
    """None where there is nothing to divide by."""
    return number / by if by else None


def _total(passes: Sequence[Pass]) -> Timing:
    total = Timing()
    for each in passes:
        total.add(each.timing)
    total.check()
    return total


def run_figures(passes: Sequence[Pass]) -> Figures:
    """One run of one method: seconds by bucket, tokens, speeds; decoding's without mixed turns."""
    timing, texts = _total(passes), _texts(passes)
    tokens, decoded = sum(len(t.ids) for t in texts), sum(t.decoded for t in texts)
    return {
        "prefill_seconds": timing.prefill,
        "decode_seconds": timing.decode,
        "mixed_seconds": timing.mixed,
        "host_seconds": timing.host,
        "wall_seconds": timing.wall,
        "tokens": tokens,
        "decoded_tokens": decoded,
        "decode_steps": sum(t.steps for t in texts),
        "forwards": timing.forwards,
        "decode_tokens_per_second": ratio(
            decoded - timing.mixed_tokens, timing.decode - timing.mixed
        ),
        "tokens_per_second": ratio(tokens, timing.wall),
        "mean_step": _mean_step(timing),
    }


def _mean_step(timing: Timing) -> Figures | None:
    """Mean milliseconds of the steps with nothing beside them, at the most sequences that any had."""
    alone = [step for step in timing.steps if step.alone]
    most = max((step.sequences for step in alone), default=0)
    values = [1e3 * step.seconds for step in alone if step.sequences == most]
    return {"milliseconds": statistics.mean(values), "sequences": most} if values else None


def step_milliseconds(runs: Sequence[Sequence[Pass]]) -> Figures | None:
    """Spread of a decode step with nothing beside it, at the most sequences that any step had.

    steps: how many there were. None where prompt rows ran beside all of them.
    """
    steps = [s for run in runs for each in run for s in each.timing.steps if s.alone]
    most = max((step.sequences for step in steps), default=0)
    values = [1e3 * step.seconds for step in steps if step.sequences == most]
    found = spread(values)
    return None if found is None else {**found, "steps": len(values), "sequences": most}


def speed_figures(runs: Sequence[Sequence[Pass]]) -> Figures:
    """One method: counts and speeds over all runs, whatever the texts are."""
    texts = [text for run in runs for text in _texts(run)]
    decoded, steps = sum(t.decoded for t in texts), sum(t.steps for t in texts)
    accepts: Counter[int] = sum((t.accepts for t in texts), Counter())
    schedules: Counter[str] = sum((t.schedules for t in texts), Counter())
    each = [run_figures(run) for run in runs]
    return {
        "tokens": sum(len(t.ids) for t in texts),
        "decoded_tokens": decoded,
        "decode_steps": steps,
        "tokens_per_forward": tokens_per_forward(decoded, steps),
        "draft_forwards_per_step": ratio(sum(t.draft_forwards for t in texts), steps),
        "rows_per_step": ratio(sum(t.rows for t in texts), steps),
        "accept_histogram": {str(n): accepts[n] for n in sorted(accepts)},
        "schedules": dict(schedules.most_common()),
        "step_milliseconds": step_milliseconds(runs),
        "decode_tokens_per_second": spread(_known(each, "decode_tokens_per_second")),
        "tokens_per_second": spread(_known(each, "tokens_per_second")),
        "runs": each,
    }


def method_figures(
    runs: Sequence[Sequence[Pass]],
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer | None,
    *,
    forced: bool = False,
) -> Figures:
    """`speed_figures`, and what the texts of the first run are worth. A forced text is not judged."""
    first = _texts(runs[0])
    figures = {
        **speed_figures(runs),
        "distinct_4": mean_distinct([t.ids for t in first]),
        "end_of_text_rate": sum(t.finish == "end-of-text" for t in first) / len(first),
        "same_in_every_run": all(
            [t.ids for t in _texts(r)] == [t.ids for t in first] for r in runs
        ),
        "characters_per_forward": None,
        "exact_match": None,
    }
    if tokenizer is not None:
        strings = [tokenizer.decode(text.ids) for text in first]
        share = [t.decoded / len(t.ids) * len(s) for t, s in zip(first, strings, strict=True)]
        figures["characters_per_forward"] = ratio(sum(share), sum(t.steps for t in first))
        figures["exact_match"] = None if forced else exact_match(strings, prompts)
    return figures


def _known(rows: Sequence[Figures], key: str) -> list[float]:
    return [row[key] for row in rows if row[key] is not None]


def per_prompt(runs: Sequence[Sequence[Pass]], prompts: Sequence[Prompt]) -> list[Figures]:
    """One line a prompt: T/NFE, repetition, and seconds of each run where it was timed alone."""
    rows = []
    texts = [_texts(run) for run in runs]
    alone = all(len(each.texts) == 1 for each in runs[0])
    for index, prompt in enumerate(prompts):
        mine = [run[index] for run in texts]
        row: Figures = {
            "id": prompt.name,
            "tokens": len(mine[0].ids),
            "tokens_per_forward": tokens_per_forward(
                sum(t.decoded for t in mine), sum(t.steps for t in mine)
            ),
            "distinct_4": distinct_ngrams(mine[0].ids),
            "finish": mine[0].finish,
        }
        if alone:
            row["wall_seconds"] = [run[index].timing.wall for run in runs]
            row["decode_seconds"] = [run[index].timing.decode for run in runs]
        rows.append(row)
    return rows


def _speed(each: Pass, decode: bool) -> float | None:
    text = each.texts[0]
    if decode:
        return ratio(text.decoded, each.timing.decode)
    return ratio(len(text.ids), each.timing.wall)


def speed_ups(
    mine: Sequence[Sequence[Pass]], base: Sequence[Sequence[Pass]], *, decode: bool
) -> list[float]:
    """For each prompt the median over runs of this method's tokens per second over the base's."""
    found = []
    for index in range(len(mine[0])):
        ratios = []
        for my_run, base_run in zip(mine, base, strict=True):
            fast, slow = _speed(my_run[index], decode), _speed(base_run[index], decode)
            if fast and slow:
                ratios.append(fast / slow)
        if ratios:
            found.append(statistics.median(ratios))
    return found


def acceptance_line(ratios: Sequence[float], ar_spreads: Sequence[float] | None) -> Figures:
    """ "No prompt below 0.95x AR", each prompt's own spread of AR against itself taken off.

    ratios, ar_spreads: for each prompt, speed over AR and AR's shortfall against itself.
    """
    if ar_spreads is None:
        return {
            "met": None,
            "reason": "needs two runs or more, for the spread of AR against itself",
        }
    typical = statistics.median(ar_spreads)
    if typical > TOO_NOISY:
        return {"met": None, "reason": f"AR differs from itself by {typical:.0%} here: too noisy"}
    _, slowest, own = min(
        (ratio + own, ratio, own) for ratio, own in zip(ratios, ar_spreads, strict=True)
    )
    bar = SLOWEST_ALLOWED - own
    return {"met": slowest >= bar, "slowest": slowest, "ar_spread": own, "bar": bar}


def _shortfalls(base: Sequence[Sequence[Pass]], *, decode: bool) -> list[float]:
    """For each prompt, by how much AR falls short of itself from one run to the next."""
    ratios = speed_ups(base[1:], base[:-1], decode=decode)
    return [1 - min(ratio, 1 / ratio) for ratio in ratios]


def ar_against_itself(base: Sequence[Sequence[Pass]], *, decode: bool) -> Figures | None:
    """AR from one run to the next; `spread` is the median prompt's shortfall, `worst` the largest."""
    if len(base) < 2:
        return None
    ratios = speed_ups(base[1:], base[:-1], decode=decode)
    falls = _shortfalls(base, decode=decode)
    if not ratios:
        return None
    return {"ratio": spread(ratios), "spread": statistics.median(falls), "worst": max(falls)}


def same_tokens(
    model: Transformer,
    prompts: Sequence[Prompt],
    mine: Sequence[Pass],
    base: Sequence[Pass],
    settings: Settings,
) -> Figures:
    """Whether the texts are AR's: how many prompts differ, and how many of those are near-ties."""
    differences = []
    near_tie: float | None = None
    pairs = zip(prompts, _texts(mine), _texts(base), strict=True)
    for index, (prompt, text, expected) in enumerate(pairs):
        if text.ids == expected.ids:
            continue
        if near_tie is None:
            near_tie = near_tie_margin(model, [*prompt.ids, *expected.ids])
        params = SamplingParams(temperature=settings.temperature, seed=settings.seed + index)
        found = first_difference(model, prompt.ids, expected.ids, text.ids, params, near_tie)
        assert found is not None
        differences.append(
            {
                "id": prompt.name,
                "at": found.index,
                "margin": found.margin if isfinite(found.margin) else None,
                "excused": found.excused,
            }
        )
    excused = sum(bool(d["excused"]) for d in differences)
    return {
        "same": excused == len(differences),
        "differ": len(differences),
        "excused": excused,
        "near_tie": near_tie,
        "differences": differences,
    }


def summarise(
    model: Transformer,
    passes: Passes,
    prompts: Sequence[Prompt],
    settings: Settings,
    tokenizer: Tokenizer | None,
    meter: MemoryMeter | None = None,
) -> dict[str, Figures]:
    """Figures of every method, each against AR where AR was measured."""
    base = next((passes[spec.name] for spec in settings.methods if spec.is_ar), None)
    methods: dict[str, Figures] = {}
    for spec in settings.methods:
        runs = passes[spec.name]
        figures = method_figures(runs, prompts, tokenizer, forced=settings.teacher_forced)
        figures["prompts"] = per_prompt(runs, prompts)
        figures["is_exact"] = spec.is_exact
        if base is not None and spec.is_exact and not settings.teacher_forced:
            figures["same_as_ar"] = same_tokens(model, prompts, runs[0], base[0], settings)
        if base is not None and settings.batch == 1:
            figures["speed_up"] = _against_ar(runs, base)
        if meter is not None:
            figures["memory"] = meter.figures(spec.name)
        methods[spec.name] = figures
    return methods


def _against_ar(runs: Sequence[Sequence[Pass]], base: Sequence[Sequence[Pass]]) -> Figures:
    """Speed-ups per prompt over AR; for AR itself, its spread against itself."""
    if runs is base:
        return {
            "end_to_end_self": ar_against_itself(base, decode=False),
            "decode_self": ar_against_itself(base, decode=True),
        }
    whole, decode = (speed_ups(runs, base, decode=only) for only in (False, True))
    own = _shortfalls(base, decode=False) if len(base) > 1 else None
    line = acceptance_line(whole, own) if whole else None
    return {"end_to_end": spread(whole), "decode": spread(decode), "acceptance": line}
