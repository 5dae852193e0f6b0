"""What is trained: the stages as values of `TrainConfig`, and how small all of it is in a smoke run.

Every contender has seen the same number of clean tokens in the end: those of `base`, then those of
its own stage; what starts from random weights gets both at once. Data, their order, batch and
optimizer are the same for all. Only the EAGLE head learns on top of that, for a twin that is done.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from lab import ROOT
from lab.corpus import Sizes

BASE_STEPS, OWN_STEPS = 1000, 1000
"""Of 131,072 clean tokens: 131 M for the base, as many more for each contender."""

EAGLE_STEPS = 400
"""Of the EAGLE head, beside those that the twin has seen: its weights are no part of the twin's."""

COMMON: Final[Mapping[str, Any]] = {
    "seq_len": 1024,
    "per_device_train_batch_size": 128,
    "optimizer": "muon",
    "learning_rate": 3e-3,
    "logging_steps": 50,
    "save_steps": 600,
    "save_total_limit": 1,
    "report_to": "none",
    "save_dtype": "bfloat16",
    "seed": 7,
    "data_seed": 7,
}

CONTINUED: Final[Mapping[str, Any]] = {
    "max_steps": OWN_STEPS, "min_lr_ratio": 0.02, "warmup_steps": 50, "seed": 8,
}  # fmt: skip
FROM_SCRATCH: Final[Mapping[str, Any]] = {
    "max_steps": BASE_STEPS + OWN_STEPS, "min_lr_ratio": 0.02, "warmup_steps": 100,
}  # fmt: skip

WEIGHTS: Final[Mapping[str, float]] = {"python": 1, "arithmetic": 0.5, "words": 1, "prose": 2}
"""Copies of each domain in an epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One training run.

    after: the stage whose checkpoint it starts from; None is random weights. keeps: models on the way are
    kept (`Scale.kept_steps`).
    """

    what: str
    values: Mapping[str, Any]
    after: str | None = None
    arch: str = "backbone"
    keeps: bool = False


STAGES: Final[Mapping[str, Stage]] = {
    "base": Stage(
        what="plain AR from random weights: where the others start",
        values={"objective": "ar", "max_steps": BASE_STEPS, "warmup_steps": 100,
                "lr_scheduler_type": "constant_with_warmup"},
    ),
    "ar": Stage(
        what="the AR twin: the base, trained on", after="base",
        values={**CONTINUED, "objective": "ar"},
    ),
    "tidar": Stage(
        what="TiDAR, by continual pretraining (arXiv 2511.08923)", after="base",
        # So small a model pays for drafts with its causal loss: with alpha 1 and tokens as labels prose cost
        # 1.8% more bits than the twin's, word problems 3.5% (LOG.md).
        values={**CONTINUED, "objective": "tidar", "draft_lens": (4, 8, 16), "anchors": "random",
                "alpha": 4.0, "soft_labels": 0.5},
        keeps=True,
    ),
    "eagle": Stage(
        what="an EAGLE-3 head for the twin", after="ar",
        # Its simulated steps see each other by dense masks: a quarter of a step at a time.
        values={**CONTINUED, "objective": "eagle", "max_steps": EAGLE_STEPS, "save_steps": 200,
                "per_device_train_batch_size": 32, "gradient_accumulation_steps": 4},
    ),
    "block-diffusion": Stage(
        what="block diffusion (BD3-LM, SDAR): K = 16, clean rows see their span", after="base",
        values={**CONTINUED, "objective": "block-diffusion", "draft_lens": (16,),
                "span_attention": "full", "documents": "joined"},
    ),
    "llada": Stage(
        what="masked diffusion from random weights (LLaDA)",
        values={**FROM_SCRATCH, "objective": "masked-diffusion", "documents": "joined"},
    ),
    "dream": Stage(
        what="masked diffusion from AR weights, labels shifted (Dream)", after="base",
        values={**CONTINUED, "objective": "masked-diffusion", "label_shift": True, "documents": "joined"},
    ),
    "draft": Stage(
        what="a small AR model that drafts for the twin (speculative decoding)", arch="draft",
        values={**FROM_SCRATCH, "objective": "ar"},
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large a run is. changes: values of every stage. arch: fields of every architecture.

    prompts: of each domain, for speeds (one at a time), for quality (side by side), for the ablations.
    new_tokens: of a text; timed_tokens: of one whose speed is taken; answer_tokens: of one that ends in
    an answer. held_out: documents of each domain that are scored; draws: of their noise, for bounds.
    kept_steps: of the stage tidar, after which its model is kept, to see what a conversion takes.
    """

    sizes: Sizes = field(default_factory=Sizes)
    tokenizer_size: int = 2496
    changes: Mapping[str, Any] = field(default_factory=dict)
    arch: Mapping[str, Any] = field(default_factory=dict)
    timed_prompts: int = 4
    timed_tokens: int = 128
    judged_prompts: int = 64
    new_tokens: int = 256
    held_out: int = 200
    draws: int = 16
    kept_steps: tuple[int, ...] = (75, 150, 300, 600)
    ablated_prompts: int = 64
    answer_tokens: int = 400


FULL: Final = Scale()

SMOKE: Final = Scale(
    sizes=Sizes(package_files=150, calculations=300, stories=100, held_out=20, prompts=2),
    tokenizer_size=440,
    changes={
        "seq_len": 128, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "max_steps": 3, "warmup_steps": 1,
        "save_strategy": "no", "logging_steps": 1, "use_cpu": True,
    },
    arch={
        "vocab_size": 448, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    },
    timed_prompts=1, timed_tokens=16, judged_prompts=2, new_tokens=16, held_out=4, draws=2, kept_steps=(1, 2),
    ablated_prompts=2, answer_tokens=16,
)  # fmt: skip


def arch_file(name: str) -> str:
    """The JSON file of an architecture."""
    return str(ROOT / "lab" / f"{name}.json")
