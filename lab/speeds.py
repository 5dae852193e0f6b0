"""Speeds: every contender in one process, on one clock, taking turns on every prompt.

One prompt at a time, end to end. Speed over AR is of the same engine, prompt by prompt and run by run,
so that what disturbs the machine hits both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lab import corpus
from lab.contenders import EVERYONE, Contender, draft_lens, lab_record, open_checkpoint
from lab.plan import Scale
from lab.quality import SCORES, short_name
from tidar.bench.measure import (
    WARM_UP_TOKENS,
    AnyEngine,
    Pass,
    Settings,
    make_engine,
    make_request,
    run_pass,
    warm_up,
)
from tidar.bench.prompts import Prompt, read_prompts
from tidar.bench.summary import speed_figures, speed_ups, spread
from tidar.decode.plan import MeasuredPlan
from tidar.decode.request import Request
from tidar.decode.rivals import Target
from tidar.decode.spec import MethodSpec
from tidar.tokens import Tokenizer
from tidar.weights import Checkpoint

RUNS: Final = 3


@dataclass(frozen=True, slots=True)
class Entrant:
    """A contender with its engine, which stays warm from domain to domain."""

    spec: MethodSpec
    settings: Settings
    engine: AnyEngine
    eos_ids: frozenset[int]

    def request(self, prompt: Prompt, index: int) -> Request:
        """The request of a prompt; its seed is the same for every entrant and run."""
        return make_request(prompt, index, self.settings, self.eos_ids)


def speed_record(out: Path, temperature: float, scale: Scale) -> dict[str, Any]:
    """Speeds of all contenders whose checkpoints are there, by domain and name: where texts have a score."""
    present = {name: each for name, each in EVERYONE.items() if not each.missing(out)}
    stages = dict.fromkeys(each.stage for each in present.values())
    opened = {stage: open_checkpoint(out, stage) for stage in stages}
    first = next(iter(opened.values()))
    tokenizer = Tokenizer.load(first.folder)
    prompts = {
        domain: read_prompts(
            out / "data" / f"{domain}_prompts.jsonl", tokenizer, first.model, scale.timed_prompts
        ).prompts
        for domain in corpus.domains(out / "data")
        if domain in SCORES
    }
    every = [prompt for some in prompts.values() for prompt in some]
    entrants = {
        name: _enter(out, each, opened[each.stage], tokenizer, every, temperature, scale)
        for name, each in present.items()
    }
    told = {domain: figures_of(take_turns(entrants, some)) for domain, some in prompts.items()}
    settings = {
        "temperature": temperature, "seed": 0, "max_new_tokens": scale.timed_tokens, "runs": RUNS, "batch": 1,
        "prompts": {domain: len(some) for domain, some in prompts.items()},
        "warm_up": f"one untimed pass of {WARM_UP_TOKENS} tokens: over every prompt in the paged engine, over the "
        "first in the plain one",
        "order": "contenders take turns on each prompt, in each run",
    }  # fmt: skip
    about = {
        name: {"engine": each.engine, "method": short_name(each.spec(out).name), "over": each.baseline}
        for name, each in present.items()
    }  # fmt: skip
    return lab_record(opened, settings, {"contenders": about, "domains": told})


def _enter(
    out: Path,
    contender: Contender,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    temperature: float,
    scale: Scale,
) -> Entrant:
    """Makes the engine of a contender, with room for each of the prompts, and warms it up."""
    spec = contender.spec(out)
    settings = Settings(
        methods=(spec,), max_new_tokens=scale.timed_tokens, temperature=temperature, runs=RUNS,
        draft_lens=draft_lens(checkpoint), engine=contender.engine,
    )  # fmt: skip
    requests = [make_request(p, i, settings, tokenizer.eos_ids) for i, p in enumerate(prompts)]
    target = Target(checkpoint.model, tokenizer)
    engine = make_engine(spec, checkpoint.model, requests, settings, target)
    warm_up(engine, spec, [[request] for request in requests], batch=1)
    return Entrant(spec, settings, engine, tokenizer.eos_ids)


def take_turns(
    entrants: Mapping[str, Entrant], prompts: Sequence[Prompt]
) -> dict[str, list[list[Pass]]]:
    """By name, then run: the pass over each prompt. What plans learned of other prompts is forgotten."""
    passes: dict[str, list[list[Pass]]] = {name: [] for name in entrants}
    for _ in range(RUNS):
        for name, entrant in entrants.items():
            passes[name].append([])
            if isinstance(entrant.engine.plan, MeasuredPlan):
                entrant.engine.plan = entrant.engine.plan.fresh(experienced=False)
        for index, prompt in enumerate(prompts):
            for name, entrant in entrants.items():
                asked = entrant.request(prompt, index)
                passes[name][-1].append(run_pass(entrant.engine, [asked]))
    return passes


def figures_of(passes: Mapping[str, list[list[Pass]]]) -> dict[str, dict[str, Any]]:
    """For each contender its speeds over the runs, and over AR: of each prompt the median over the runs."""
    found = {}
    for name, runs in passes.items():
        figures = speed_figures(runs)
        figures.pop("runs")
        base = passes.get(EVERYONE[name].baseline)
        figures["over_ar"] = spread(speed_ups(runs, base, decode=False)) if base else None
        found[name] = figures
    return found
