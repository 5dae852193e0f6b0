"""What the texts are worth, and how many tokens a forward gives: many prompts side by side, nothing timed."""

import codeop
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from lab import corpus
from lab.contenders import CONTENDERS, SCHEDULES, draft_lens, lab_record, open_checkpoint
from lab.plan import Scale
from tidar.bench.measure import Pass, Settings, run_bench
from tidar.bench.prompts import Prompt, PromptFile, read_prompts
from tidar.bench.repetition import mean_distinct
from tidar.bench.summary import summarise
from tidar.cli.bench import settings_json
from tidar.decode.rivals import Target
from tidar.decode.spec import MethodSpec, parse_method
from tidar.tokens import Tokenizer
from tidar.weights import Checkpoint

SCORES: Final = {"python": "valid_python", "arithmetic": "exact_match", "words": "exact_match"}
"""The figure that says what a domain's texts are worth; prose has none."""

LEFT_OUT: Final = (
    "step_milliseconds", "decode_tokens_per_second", "tokens_per_second", "runs", "prompts",
    "end_of_text_rate", "same_in_every_run",
)  # fmt: skip
"""Figures that are left out: speeds of a batch that nobody compares, and long lists."""


def decode_record(out: Path, name: str, temperature: float, scale: Scale) -> dict[str, Any]:
    """One contender at one temperature: for each domain T/NFE, repetition, right answers, valid Python."""
    contender = CONTENDERS[name]
    checkpoint, spec = open_checkpoint(out, contender.stage), contender.spec(out)
    asked = _settings(checkpoint, (spec,), scale, temperature=temperature)
    told = {
        domain: {**facts, **methods[spec.name]}
        for domain, (facts, methods) in _by_domain(out, checkpoint, asked, scale).items()
    }
    about = {"contender": name, "stage": contender.stage}
    return lab_record(
        {contender.stage: checkpoint}, _told(asked, checkpoint, scale), {**about, "domains": told}
    )


def schedules_record(out: Path, *, forced: bool, scale: Scale) -> dict[str, Any]:
    """TiDAR's schedules at temperature 0, by domain and method: writing freely, or the real text (forced)."""
    checkpoint = open_checkpoint(out, "tidar")
    # AR first: the same weights decoded plainly, so that texts can be compared.
    specs = tuple(parse_method(name) for name in ("ar", *SCHEDULES))
    asked = _settings(checkpoint, specs, scale, temperature=0.0)
    asked = replace(asked, teacher_forced=forced)
    told = {
        domain: {**facts, "methods": methods}
        for domain, (facts, methods) in _by_domain(out, checkpoint, asked, scale).items()
    }
    return lab_record({"tidar": checkpoint}, _told(asked, checkpoint, scale), {"domains": told})


def _settings(
    checkpoint: Checkpoint, specs: tuple[MethodSpec, ...], scale: Scale, *, temperature: float
) -> Settings:
    return Settings(
        methods=specs, max_new_tokens=scale.new_tokens, temperature=temperature, runs=1,
        batch=scale.judged_prompts, draft_lens=draft_lens(checkpoint),
    )  # fmt: skip


def _told(settings: Settings, checkpoint: Checkpoint, scale: Scale) -> dict[str, Any]:
    """Settings for a record. answer_tokens: instead of max_new_tokens where a text ends in an answer."""
    made = settings_json(settings, checkpoint.model.embed.weight.dtype)
    made["answer_tokens"] = scale.answer_tokens
    return {**made, "methods": [short_name(spec.name) for spec in settings.methods]}


def short_name(method: str) -> str:
    """A method's name with the folder of its helper left to its last part: no path of one machine."""
    kind, *parts = method.split(":")
    return ":".join([kind, *(Path(part).parent.name if "/" in part else part for part in parts)])


def _by_domain(
    out: Path, checkpoint: Checkpoint, settings: Settings, scale: Scale
) -> dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """For each domain facts about its prompts, and figures of each method over them."""
    tokenizer, found = Tokenizer.load(checkpoint.folder), {}
    for domain in corpus.domains(out / "data"):
        path = out / "data" / f"{domain}_prompts.jsonl"
        file = read_prompts(path, tokenizer, checkpoint.model, settings.batch)
        answers = any(prompt.answer is not None for prompt in file.prompts)
        asked = replace(settings, max_new_tokens=scale.answer_tokens) if answers else settings
        found[domain] = (
            _facts(file, asked),
            _figures(checkpoint, tokenizer, file.prompts, asked, code=domain == "python"),
        )
    return found


def _facts(file: PromptFile, settings: Settings) -> dict[str, Any]:
    """The first prompts of the file, all of them: none is picked. The real text is cut where the others end."""
    real = [prompt.real[: settings.max_new_tokens] for prompt in file.prompts if prompt.real]
    return {
        "sha256": file.sha256, "prompts": len(file.prompts),
        "distinct_4_of_real_text": mean_distinct(real),
    }  # fmt: skip


def _figures(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    settings: Settings,
    *,
    code: bool,
) -> dict[str, dict[str, Any]]:
    """Figures of each method; code: also the share of texts that are Python so far."""
    network, eos_ids = checkpoint.model, tokenizer.eos_ids
    target = Target(network, tokenizer)
    passes = run_bench(network, prompts, settings, eos_ids, target=target)
    found = summarise(network, passes, prompts, settings, tokenizer)
    for name, figures in found.items():
        for long in LEFT_OUT:
            figures.pop(long)
        figures.get("same_as_ar", {}).pop("differences", None)
        if code and not settings.teacher_forced:
            figures["valid_python"] = _valid_share(tokenizer, prompts, passes[name][0])
    return found


def _valid_share(tokenizer: Tokenizer, prompts: Sequence[Prompt], passes: Sequence[Pass]) -> float:
    texts = [text.ids for each in passes for text in each.texts]
    whole = [[*prompt.ids, *ids] for prompt, ids in zip(prompts, texts, strict=True)]
    return sum(is_python_so_far(tokenizer.decode(ids)) for ids in whole) / len(whole)


def is_python_so_far(text: str) -> bool:
    """Whether the whole lines of a text compile, or would if they went on."""
    whole, newline, _ = text.rpartition("\n")
    try:
        codeop.compile_command(whole + newline, symbol="exec")
    except (SyntaxError, ValueError, OverflowError):
        return False
    return True
