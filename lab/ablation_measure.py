"""Measuring the cases of an ablation, as a record: tokens per forward, right answers, held-out losses.

Tokens per forward are taken twice, at temperature 0: over the real text (teacher forced, exact methods
only), and over what the model writes itself, whose quality is judged. Nothing of that is timed. Only
`two-forward` measures speeds. Everything runs in the plain engine, many prompts side by side; timed cases in
the paged one where there is a GPU.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from records import read_rows

from lab.ablation_plan import DOMAINS, MASK_LOSS_LENS, Ablation, Case
from lab.contenders import weights_digest
from lab.plan import SMOKE, Scale
from lab.quality import is_python_so_far
from tidar.bench.measure import Settings, make_request, pick_engine, run_bench, run_pass
from tidar.bench.prompts import Prompt, PromptFile, read_prompts
from tidar.bench.record import make_record
from tidar.bench.summary import Figures, method_figures, summarise
from tidar.cli.bench import settings_json
from tidar.decode.engine import Engine, FixedPlan
from tidar.decode.spec import MethodSpec, parse_method
from tidar.errors import TidarError
from tidar.methods.tidar import Tidar
from tidar.model import num_parameters
from tidar.tokens import Tokenizer
from tidar.training.objectives.tidar import TidarObjective
from tidar.weights import Checkpoint, load_checkpoint

KEPT_FIGURES = ("tokens_per_forward", "rows_per_step", "decode_steps", "accept_histogram")
"""Of a pass; the speeds of many texts side by side would mean nothing."""

TIMED_RUNS = 3


def ablation_record(name: str, ablation: Ablation, out: Path, scale: Scale) -> dict[str, Any]:
    """The record of an ablation whose weights are in OUT. Raises TidarError where some are missing."""
    for model in {case.model: None for case in ablation.cases}:
        if not (out / model / "config.json").is_file():
            raise TidarError(
                f"ablation {name} needs the checkpoint {out / model}, which is not there: run the stages "
                "base and tidar of lab.run first, with this version."
            )
    results = (timed if ablation.batches else measured)(ablation, out, scale)
    models = {case.model: _open(out, case.model) for case in ablation.cases}
    some = next(iter(models.values()))
    scaled = ["--smoke"] if scale == SMOKE else []
    weight = some.model.embed.weight
    return make_record(
        command=["python", "-m", "lab.ablations", "--out", "OUT", *scaled, name],
        device=weight.device,
        subject={
            "ablation": name,
            "question": ablation.question,
            "models": {model: _facts(found) for model, found in models.items()},
            "prompts": {domain: _prompt_facts(out, some, domain, scale) for domain in DOMAINS},
        },
        settings={
            "temperature": 0.0,
            "dtype": str(weight.dtype).removeprefix("torch."),
            **results.pop("settings"),
        },
        results=results,
    )


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    meta = checkpoint.meta
    return {
        "parameters": num_parameters(checkpoint.config),
        "draft_lens": list(meta.draft_lens) if meta else [],
        "alpha": meta.alpha if meta else None,
        "masking": meta.masking if meta else None,
        "weights_sha256": weights_digest(checkpoint),
    }


def _prompt_facts(out: Path, checkpoint: Checkpoint, domain: str, scale: Scale) -> dict[str, Any]:
    file = _prompts(out, checkpoint, domain, scale)
    return {"sha256": file.sha256, "count": len(file.prompts)}


@cache
def _open(out: Path, model: str) -> Checkpoint:
    """Weights: bfloat16 on a GPU, else float32. All that an ablation needs stay in memory, as they are small."""
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    return load_checkpoint(out / model, device="cuda" if cuda else "cpu", dtype=dtype)


def _prompts(out: Path, checkpoint: Checkpoint, domain: str, scale: Scale) -> PromptFile:
    path = out / "data" / f"{domain}_prompts.jsonl"
    tokenizer = Tokenizer.load(checkpoint.folder)
    return read_prompts(path, tokenizer, checkpoint.model, scale.ablated_prompts)


# --- tokens per forward, and what the texts are worth ---


def measured(ablation: Ablation, out: Path, scale: Scale) -> dict[str, Any]:
    """Figures of every case, and the held-out losses of every model."""
    cases = [
        {
            **_told(case),
            "domains": {domain: case_figures(case, out, domain, scale) for domain in DOMAINS},
        }
        for case in ablation.cases
    ]
    models = dict.fromkeys(case.model for case in ablation.cases)
    losses = {
        model: {
            domain: held_out_losses(_open(out, model), out, domain, scale) for domain in DOMAINS
        }
        for model in models
    }
    settings = {"engine": "plain", "seed": 0, "batch": scale.ablated_prompts, "max_new_tokens": scale.new_tokens,
                "answer_tokens": scale.answer_tokens, "held_out": scale.held_out,
                "mask_loss_lens": list(MASK_LOSS_LENS)}  # fmt: skip
    return {"settings": settings, "cases": cases, "losses": losses}


def _told(case: Case) -> dict[str, Any]:
    return {
        "labels": dict(case.labels),
        "model": case.model,
        "method": case.method,
        "beta": case.beta,
    }


def case_figures(case: Case, out: Path, domain: str, scale: Scale) -> dict[str, Any]:
    """T/NFE over the real text ("forced") and over the model's own ("free"), and how good that is.

    None under "forced" for methods that verify nothing and for beta below 1, which real text would hide.
    """
    checkpoint, spec = _open(out, case.model), parse_method(case.method)
    prompts = _prompts(out, checkpoint, domain, scale).prompts
    answers = any(prompt.answer is not None for prompt in prompts)
    limit = scale.answer_tokens if answers else scale.new_tokens
    exact = spec.is_exact and case.beta == 1.0
    told: dict[str, Any] = {"forced": None, "free": None}
    if exact:
        told["forced"] = _pass_figures(checkpoint, case, spec, prompts, limit, forced=True)
    if case.writes:
        told["free"] = _pass_figures(checkpoint, case, spec, prompts, limit, forced=False)
    return told


def _pass_figures(
    checkpoint: Checkpoint,
    case: Case,
    spec: MethodSpec,
    prompts: Sequence[Prompt],
    limit: int,
    *,
    forced: bool,
) -> dict[str, Any]:
    """One pass over all prompts side by side."""
    tokenizer = Tokenizer.load(checkpoint.folder)
    settings = Settings(
        methods=(spec,), max_new_tokens=limit, batch=len(prompts), runs=1, teacher_forced=forced
    )
    engine = make_engine(checkpoint, case, spec, len(prompts))
    requests = [make_request(p, i, settings, tokenizer.eos_ids) for i, p in enumerate(prompts)]
    done = run_pass(engine, requests)
    figures = method_figures([[done]], prompts, tokenizer, forced=forced)
    kept: Figures = {name: figures[name] for name in KEPT_FIGURES}
    if not forced:
        pairs = list(zip(prompts, done.texts, strict=True))
        asked = any(prompt.answer is not None for prompt in prompts)
        valid = [is_python_so_far(tokenizer.decode([*p.ids, *text.ids])) for p, text in pairs]
        kept["exact_match"] = figures["exact_match"]
        kept["valid_python"] = None if asked else sum(valid) / len(valid)
        kept["distinct_4"] = figures["distinct_4"]
    return kept


def make_engine(checkpoint: Checkpoint, case: Case, spec: MethodSpec, batch: int) -> Engine:
    """The plain engine for a case; one of TiDAR with the case's beta."""
    if spec.rival is not None:
        return spec.engine(checkpoint.model, max_batch=batch)
    spec.check(checkpoint.config)
    mask = checkpoint.config.mask_token_id
    assert spec.schedule is not None
    assert mask is not None  # every case decodes weights of the joint loss
    return Engine(
        checkpoint.model, Tidar(mask, case.beta), FixedPlan(spec.schedule), max_batch=batch
    )


# --- held-out losses ---


@torch.no_grad()
def held_out_losses(checkpoint: Checkpoint, out: Path, domain: str, scale: Scale) -> dict[str, Any]:
    """What the weights say of held-out documents, each cut at the model's last position.

    bits_per_byte: of the causal rows, exact, first tokens not counted. mask_loss: nats per token of the mask
    rows, spans on a grid, for each K of `MASK_LOSS_LENS` as text.
    """
    tokenizer = Tokenizer.load(checkpoint.folder)
    end, limit = min(tokenizer.eos_ids), checkpoint.config.max_positions
    file = read_rows(out / "data" / f"{domain}_held_out.jsonl")
    texts = [
        r.get("prompt", "") + r["text"] for r, _ in zip(file, range(scale.held_out), strict=False)
    ]
    rows = [[*tokenizer.encode(text), end][:limit] for text in texts]
    size = sum(len(tokenizer.decode(row[1:]).encode()) for row in rows)
    clean, masks = 0.0, {}
    for draft_len in MASK_LOSS_LENS:
        learner = TidarObjective(draft_lens=(draft_len,)).model(checkpoint.model)
        sums = torch.zeros(3, dtype=torch.float64)
        for row in rows:
            ids = torch.tensor([row], device=checkpoint.model.embed.weight.device)
            nought = torch.zeros(1, dtype=torch.int64, device=ids.device)
            told = learner(
                input_ids=ids, document=torch.zeros_like(ids), index=nought, epoch=nought
            )
            sums += told["stats"][:3].cpu()
        clean, mask, labels = sums.tolist()
        masks[str(draft_len)] = mask / labels
    return {
        "bits_per_byte": clean / math.log(2) / size, "mask_loss": masks, "documents": len(rows),
        "bytes": size,
    }  # fmt: skip


# --- speeds ---


def timed(ablation: Ablation, out: Path, scale: Scale) -> dict[str, Any]:
    """Tokens per second of all cases in turns, for each batch and domain; all of one model."""
    (model,) = {case.model for case in ablation.cases}
    checkpoint = _open(out, model)
    network, tokenizer = checkpoint.model, Tokenizer.load(checkpoint.folder)
    specs = tuple(parse_method(case.method) for case in ablation.cases)
    engine = pick_engine("auto", network.embed.weight.device)
    found: dict[str, dict[int, Mapping[str, Figures]]] = {domain: {} for domain in DOMAINS}
    for domain in DOMAINS:
        file = _prompts(out, checkpoint, domain, scale)
        for batch in ablation.batches:
            asked = Settings(
                methods=specs, max_new_tokens=scale.new_tokens, runs=TIMED_RUNS, batch=batch, engine=engine,
                draft_lens=checkpoint.meta.draft_lens if checkpoint.meta else (),
            )  # fmt: skip
            prompts = file.prompts[: max(batch, scale.timed_prompts)]
            passes = run_bench(network, prompts, asked, tokenizer.eos_ids)
            told = summarise(network, passes, prompts, asked, tokenizer)
            found[domain][batch] = {
                name: {**_speeds(each), "prompts": len(prompts)} for name, each in told.items()
            }
    cases = [
        {
            **_told(case),
            "domains": {
                domain: {str(batch): told[spec.name] for batch, told in batches.items()}
                for domain, batches in found.items()
            },
        }
        for case, spec in zip(ablation.cases, specs, strict=True)
    ]
    settings = {
        **settings_json(asked, network.embed.weight.dtype),
        "batches": list(ablation.batches),
    }
    del settings["batch"]
    return {"settings": settings, "cases": cases}


def _speeds(figures: Figures) -> Figures:
    kept = ("tokens_per_second", "decode_tokens_per_second", "tokens_per_forward", "rows_per_step",
            "step_milliseconds")  # fmt: skip
    return {name: figures[name] for name in kept}
