"""Bits per byte of held-out text: exact where a causal pass tells, else a Monte Carlo bound."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from records import read_rows

from lab import corpus
from lab.contenders import CONTENDERS, lab_record, open_checkpoint
from lab.plan import Scale
from tidar.decode.spec import MethodSpec
from tidar.evaluation.bound import score_bound
from tidar.evaluation.likelihood import score
from tidar.evaluation.readings import reading_of
from tidar.tokens import Tokenizer
from tidar.weights import Checkpoint

TOGETHER: Final = 32
"""Rows of a forward pass."""

GROUPS: Final = 4
"""Independent estimates of a bound, for its standard error; each takes `Scale.draws` samples of a text."""


def bits_record(out: Path, stage: str, scale: Scale) -> dict[str, Any]:
    """Held-out bits per byte of each domain, in the reading of the first contender with this checkpoint.

    is_bound: an upper bound in expectation, of `samples` samples of each text.
    """
    contender = next(each for each in CONTENDERS.values() if each.stage == stage)
    checkpoint, spec = open_checkpoint(out, stage), contender.spec(out)
    tokenizer = Tokenizer.load(checkpoint.folder)
    bound = reading_of(spec, checkpoint.config) is not None
    told = {}
    for domain in corpus.domains(out / "data"):
        rows = read_rows(out / "data" / f"{domain}_held_out.jsonl")
        first = zip(rows, range(scale.held_out), strict=False)
        texts = [row.get("prompt", "") + row["text"] for row, _ in first]
        told[domain] = bits_per_byte(checkpoint, tokenizer, spec, texts, scale.draws)
    settings = {
        "held_out": scale.held_out, "samples": GROUPS * scale.draws if bound else 0, "is_bound": bound,
        "seeds": list(range(GROUPS)) if bound else [],
    }  # fmt: skip
    return lab_record({stage: checkpoint}, settings, {"stage": stage, "bits_per_byte": told})


def bits_per_byte(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    spec: MethodSpec,
    texts: Sequence[str],
    draws: int,
) -> dict[str, Any]:
    """Bits to write the texts behind their first tokens, ends included, over the bytes of that.

    Texts are cut at the model's last position. A bound is the mean of `GROUPS` estimates of `draws` samples of
    each text (`tidar.evaluation.bound`), and error its standard error.
    """
    end, limit = min(tokenizer.eos_ids), checkpoint.config.max_positions
    rows = [[*tokenizer.encode(text), end][:limit] for text in texts]
    size = sum(len(tokenizer.decode(row[1:]).encode()) for row in rows)
    pairs = [(row[:1], row[1:]) for row in rows]
    reading, network = reading_of(spec, checkpoint.config), checkpoint.model
    if reading is None:
        groups = [score(network, pairs, batch=TOGETHER)]
    else:
        groups = [
            score_bound(
                network, reading, pairs, samples=draws, seed=seed, batch=TOGETHER, greedy=False
            )
            for seed in range(GROUPS)
        ]
    bits = [-sum(each.logprob for each in scores) / math.log(2) / size for scores in groups]
    error = statistics.stdev(bits) / math.sqrt(len(bits)) if len(bits) > 1 else 0.0
    return {"value": statistics.mean(bits), "error": error, "documents": len(rows), "bytes": size}
