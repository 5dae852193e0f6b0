"""Speed and quality of every contender, as records; `lab/table.py` makes the table of them.

A record holds one contender at one temperature: for each domain the figures of `tidar bench` over a few
prompts one at a time (speeds) and over many side by side (quality). Bits per byte of held-out text are
records of their own, one a checkpoint. A record that is there is not taken again.
"""

import codeop
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from records import read_rows
from torch import Tensor

from lab import corpus
from lab.plan import Scale
from tidar.bench.measure import Settings, run_bench
from tidar.bench.prompts import Prompt, PromptFile, read_prompts
from tidar.bench.record import make_record, write_record
from tidar.bench.summary import summarise
from tidar.cli.bench import settings_json
from tidar.decode.rivals import Target
from tidar.decode.spec import MethodSpec, parse_method
from tidar.hf_config import TidarMeta
from tidar.model import num_parameters
from tidar.tokens import Tokenizer
from tidar.training.objective import Objective
from tidar.training.objectives.ar import ArObjective
from tidar.training.objectives.block_diffusion import BlockDiffusionObjective
from tidar.training.objectives.masked_diffusion import MaskedDiffusionObjective
from tidar.weights import Checkpoint, load_checkpoint

TEMPERATURES: Final = (0.0, 1.0)
SCORED_TOGETHER: Final = 8


@dataclass(frozen=True, slots=True)
class Contender:
    """A checkpoint and how it decodes. helper: the stage whose checkpoint `{helper}` in the method's name is."""

    stage: str
    method: str
    helper: str | None = None


CONTENDERS: Final[Mapping[str, Contender]] = {
    "ar": Contender("ar", "ar"),
    "tidar": Contender("tidar", "tidar:16:dense"),
    "tidar-sparse": Contender("tidar", "tidar:16:1,2,3,5,8,16"),
    "speculative": Contender("ar", "speculative:{helper}:4", "draft"),
    "eagle": Contender("ar", "eagle:{helper}:4", "eagle"),
    "block-diffusion": Contender("block-diffusion", "block-diffusion:16:0.9"),
    "llada": Contender("llada", "masked-diffusion:32:16"),
    "dream": Contender("dream", "masked-diffusion:32:16"),
}


def measure_all(out: Path, scale: Scale) -> None:
    """Write what is missing of OUT/records. A contender without its checkpoints is named and left out."""
    stages = [contender.stage for contender in CONTENDERS.values()]
    for stage in dict.fromkeys(stages):
        path = out / "records" / f"bits_{stage}.json"
        if _is_there(out, stage) and not path.is_file():
            write_record(path, bits_record(out, stage, scale))
    for name, contender in CONTENDERS.items():
        missing = [s for s in (contender.stage, contender.helper) if s and not _is_there(out, s)]
        if missing:
            print(f"{name}: no checkpoint of {', '.join(missing)}; left out")
            continue
        for temperature in TEMPERATURES:
            path = out / "records" / f"{name}_t{temperature:g}.json"
            if not path.is_file():
                write_record(path, decode_record(out, name, temperature, scale))
                print(f"wrote {path.name}", flush=True)


def _is_there(out: Path, stage: str) -> bool:
    return (out / stage / "model" / "config.json").is_file()


def _open(out: Path, stage: str) -> Checkpoint:
    """The checkpoint of a stage: bfloat16 on a GPU, else float32."""
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    return load_checkpoint(out / stage / "model", device="cuda" if cuda else "cpu", dtype=dtype)


def _subject(name: str, stage: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """What a record is about."""
    meta = checkpoint.meta
    return {
        "model": {
            "source": f"lab:{stage}",
            "parameters": num_parameters(checkpoint.config),
            "random_weights": False,
            "trained_draft_lens": list(meta.draft_lens) if meta else [],
        },
        "contender": name,
        "stage": stage,
    }


# --- decoding ---


def decode_record(out: Path, name: str, temperature: float, scale: Scale) -> dict[str, Any]:
    """One contender at one temperature, all domains."""
    contender = CONTENDERS[name]
    helper = out / (contender.helper or "") / "model"
    spec = parse_method(contender.method.format(helper=helper))
    checkpoint = _open(out, contender.stage)
    tokenizer = Tokenizer.load(checkpoint.folder)
    told: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for domain in corpus.domains(out / "data"):
        path = out / "data" / f"{domain}_prompts.jsonl"
        file = read_prompts(path, tokenizer, checkpoint.model, scale.judged_prompts)
        told[domain] = {"sha256": file.sha256}
        for figure, count, batch in (
            ("speed", scale.timed_prompts, 1), ("quality", scale.judged_prompts, scale.judged_prompts),
        ):  # fmt: skip
            asked = Settings(
                methods=(spec,), max_new_tokens=scale.new_tokens, temperature=temperature, runs=1,
                batch=batch, draft_lens=checkpoint.meta.draft_lens if checkpoint.meta else (),
            )  # fmt: skip
            prompts = file.prompts[:count]
            told[domain][figure] = _figures(
                checkpoint, tokenizer, file, prompts, spec, asked, domain
            )
            settings[figure] = settings_json(asked, checkpoint.model.embed.weight.dtype)
    return make_record(
        command=sys.argv, device=checkpoint.model.embed.weight.device,
        subject=_subject(name, contender.stage, checkpoint), settings=settings,
        results={"domains": told},
    )  # fmt: skip


def _figures(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    file: PromptFile,
    prompts: Sequence[Prompt],
    spec: MethodSpec,
    settings: Settings,
    domain: str,
) -> dict[str, Any]:
    """Figures of one method over some prompts, without those of each prompt and run."""
    network = checkpoint.model
    target = Target(network, tokenizer)
    passes = run_bench(network, prompts, settings, tokenizer.eos_ids, target=target)
    figures = summarise(network, passes, prompts, settings, tokenizer)[spec.name]
    for long in ("prompts", "runs"):
        figures.pop(long)
    if domain == "python":
        texts = [text.ids for each in passes[spec.name][0] for text in each.texts]
        pairs = zip(prompts, texts, strict=True)
        valid = [is_python_so_far(tokenizer.decode([*p.ids, *ids])) for p, ids in pairs]
        figures["valid_python"] = sum(valid) / len(valid)
    return {**figures, "prompts": len(prompts)}


def is_python_so_far(text: str) -> bool:
    """Whether the whole lines of a text compile, or would if they went on."""
    whole, newline, _ = text.rpartition("\n")
    try:
        codeop.compile_command(whole + newline, symbol="exec")
    except (SyntaxError, ValueError, OverflowError):
        return False
    return True


# --- likelihood ---


def objective_of(meta: TidarMeta | None) -> Objective:
    """Whose held-out loss bounds the negative log-likelihood of a checkpoint; the causal loss is that itself."""
    if meta is None or meta.objective == "tidar":
        return ArObjective()
    if meta.objective == "masked-diffusion":
        return MaskedDiffusionObjective(label_shift=meta.label_shift)
    return BlockDiffusionObjective(
        draft_lens=meta.draft_lens[-1:], span_attention=meta.span_attention
    )


def bits_record(out: Path, stage: str, scale: Scale) -> dict[str, Any]:
    """Held-out bits per byte of each domain. is_bound: an upper bound in expectation, of `draws` draws of noise."""
    checkpoint = _open(out, stage)
    tokenizer = Tokenizer.load(checkpoint.folder)
    objective = objective_of(checkpoint.meta)
    bound = not isinstance(objective, ArObjective)
    told = {}
    for domain in corpus.domains(out / "data"):
        rows = read_rows(out / "data" / f"{domain}_held_out.jsonl")
        texts = [
            row.get("prompt", "") + row["text"]
            for row, _ in zip(rows, range(scale.held_out), strict=False)
        ]
        told[domain] = bits_per_byte(
            checkpoint, tokenizer, objective, texts, scale.draws if bound else 1
        )
    return make_record(
        command=sys.argv, device=checkpoint.model.embed.weight.device,
        subject=_subject(stage, stage, checkpoint),
        settings={"held_out": scale.held_out, "draws": scale.draws if bound else 1, "is_bound": bound},
        results={"bits_per_byte": told},
    )  # fmt: skip


@torch.no_grad()
def bits_per_byte(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    objective: Objective,
    texts: Sequence[str],
    draws: int,
) -> dict[str, Any]:
    """Bits to write the texts behind their first tokens, ends included, over the bytes of that.

    Texts are cut at the model's last position. error: the standard error of the mean over the draws.
    """
    end, limit = min(tokenizer.eos_ids), checkpoint.config.max_positions
    rows = [[*tokenizer.encode(text), end][:limit] for text in texts]
    size = sum(len(tokenizer.decode(row[1:]).encode()) for row in rows)
    learner = objective.model(checkpoint.model)
    bits = []
    for draw in range(draws):
        nats = 0.0
        for inputs in _batches(rows, draw, checkpoint.model.embed.weight.device, end):
            nats += float(learner(**inputs)["stats"][0])
        bits.append(nats / math.log(2) / size)
    spread = statistics.stdev(bits) / math.sqrt(draws) if draws > 1 else 0.0
    return {"value": statistics.mean(bits), "error": spread, "documents": len(rows), "bytes": size}


def _batches(
    rows: Sequence[Sequence[int]], draw: int, device: torch.device, end: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of one document a row; what fills a row up is documents of one token, which carry no label."""
    for first in range(0, len(rows), SCORED_TOGETHER):
        some = rows[first : first + SCORED_TOGETHER]
        width = max(map(len, some))
        ids = torch.tensor([[*row, *[end] * (width - len(row))] for row in some])
        place = torch.arange(width)
        document = torch.stack([(place - len(row) + 1).clamp(min=0) for row in some])
        index = torch.arange(first, first + len(some))
        inputs = {"input_ids": ids, "document": document, "index": index,
                  "epoch": torch.full_like(index, draw)}  # fmt: skip
        yield {name: value.to(device) for name, value in inputs.items()}
