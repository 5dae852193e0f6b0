"""What is ablated: short conversions that differ in one thing, and how which weights decode.

Each ablation asks one question of the paper (arXiv 2511.08923), or one of this implementation. Its
cases are measured alike (`lab/ablation_measure.py`); those of `two-forward` are timed instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from lab.plan import COMMON, CONTINUED, OWN_STEPS, Scale

DOMAINS: Final = ("python", "arithmetic")

VARIANT: Final[Mapping[str, Any]] = {
    **CONTINUED, "objective": "tidar", "draft_lens": (4, 8, 16), "anchors": "random", "max_steps": 300,
    "save_steps": 150,
}  # fmt: skip
"""A conversion of `base` with the paper's loss (alpha 1, tokens as labels): 39 M clean tokens. Each variant changes
some of these values."""

VARIANTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "mix": {},
    **{f"k{size}": {"draft_lens": (size,)} for size in (4, 8, 16, 32)},
    **{f"k{size}-random-masks": {"draft_lens": (size,), "masking": "random"} for size in (4, 8)},
    **{f"alpha-{alpha}": {"alpha": alpha} for alpha in (0.8, 1.2, 4)},
    "grid": {"anchors": "grid"},
    "soft": {"soft_labels": 0.5, "teacher": "causal"},
}

PRUNED: Final = {16: "1,2,3,5,8,16", 32: "1,2,4,8,16,32"}
"""Span sets that leave most accept counts to the nearest smaller one."""

MASK_LOSS_LENS: Final = (4, 8, 16)
"""K of the spans over which the held-out mask loss is taken, the same for all weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to decode some weights.

    model: their folder in the laboratory's OUT. labels: what tells this case from the others of its
    ablation, and its tables name. beta: see `Tidar`. writes: whether texts are written freely as well;
    exact methods with one K write what those with another write.
    """

    model: str
    method: str
    labels: Mapping[str, str | float]
    beta: float = 1.0
    writes: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """A question and the cases that answer it. batches: timed at these instead, sequences at a time."""

    question: str
    cases: tuple[Case, ...]
    batches: tuple[int, ...] = field(default=())

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that must be trained for it, in the order of `VARIANTS`."""
        models = {case.model for case in self.cases}
        return tuple(name for name in VARIANTS if trained(name) in models)


TIDAR: Final = "tidar/model"
"""The laboratory's TiDAR, at the end of its conversion."""


def trained(variant: str) -> str:
    """The folder of a variant's weights in OUT."""
    return f"ablations/{variant}/model"


def _masking() -> Ablation:
    cases = [
        Case(model=trained(f"k{size}{end}"), method=f"tidar:{size}:dense", labels={"masks": masks, "K": size})
        for size in (4, 8)
        for masks, end in (("full", ""), ("random", "-random-masks"))
    ]  # fmt: skip
    question = (
        "Is it better to mask all rows of a span in training, or a random share? (paper, table 5)"
    )
    return Ablation(question=question, cases=tuple(cases))


def _strategies() -> Ablation:
    rules = {
        **{f"most confident, {n} a pass": f"best{n}" for n in (1, 2)},
        **{f"left to right, {n} a pass": f"left{n}" for n in (1, 2)},
        **{f"confidence > {t}": f"{t}" for t in (0.9, 0.8, 0.7, 0.6)},
    }
    cases = [
        Case(model=TIDAR, method=f"block-diffusion:16:{rule}:causal", labels={"strategy": name})
        for name, rule in rules.items()
    ]
    cases += [
        Case(model=TIDAR, method=f"tidar:{size}:dense", labels={"strategy": f"TiDAR, K = {size}"})
        for size in (4, 8, 16)
    ]
    question = "What does verifying drafts save over trusting them? (paper, table 4)"
    return Ablation(question=question, cases=tuple(cases))


def _weights() -> Ablation:
    alphas = {0.8: "alpha-0.8", 1.0: "mix", 1.2: "alpha-1.2", 4.0: "alpha-4"}
    cases = [
        Case(
            model=trained(variant), method="tidar:16:dense", beta=beta,
            labels={"alpha": alpha, "beta": beta},
        )
        for alpha, variant in alphas.items()
        for beta in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]  # fmt: skip
    question = "Does the weight of the causal loss matter, or trust in the causal logits? (paper, figure 6)"
    return Ablation(question=question, cases=tuple(cases))


def _draft_lens() -> Ablation:
    used = {**dict.fromkeys((4, 8, 16), "dense"), 32: PRUNED[32]}
    cases = [
        Case(
            model=trained(variant), method=f"tidar:{size}:{spans}", writes=size == 16,
            labels={"trained": "4, 8, 16" if variant == "mix" else variant[1:], "K": size},
        )
        for variant in ("k4", "k8", "k16", "k32", "mix")
        for size, spans in used.items()
    ]  # fmt: skip
    question = "Which draft lengths should be trained, for which to be used?"
    return Ablation(question=question, cases=tuple(cases))


def _pairs(question: str, column: str, variants: Mapping[str, str]) -> Ablation:
    """Two ways to train, used at three K."""
    cases = [
        Case(
            model=trained(variant), method=f"tidar:{size}:dense", writes=size == 16,
            labels={column: name, "K": size},
        )
        for name, variant in variants.items()
        for size in (4, 8, 16)
    ]  # fmt: skip
    return Ablation(question=question, cases=tuple(cases))


def _tokens(scale: Scale) -> Ablation:
    values = {**COMMON, "max_steps": OWN_STEPS, **scale.changes}
    step_tokens = values["seq_len"] * values["per_device_train_batch_size"]
    models = {step: f"tidar/model-{step}" for step in scale.kept_steps}
    models[values["max_steps"]] = TIDAR
    cases = [
        Case(
            model=model, method=f"tidar:{size}:dense", writes=size == 16,
            labels={"K": size, "clean tokens, M": step * step_tokens / 1e6},
        )
        for size in (4, 8, 16)
        for step, model in models.items()
    ]  # fmt: skip
    question = "How much text does a conversion take?"
    return Ablation(question=question, cases=tuple(cases))


def _spans() -> Ablation:
    sets = ("dense", "1,2,3,4,6,8,12,16", PRUNED[16], "1,2,4,8,16", "1,2,4", "1,2", "1")
    cases = tuple(
        Case(model=TIDAR, method=f"tidar:16:{spans}", labels={"spans": spans}, writes=False)
        for spans in sets
    )
    return Ablation(question="Does every accept count need a span of its own?", cases=cases)


def _two_forward() -> Ablation:
    methods = ("ar", "tidar:16:dense", f"tidar:16:{PRUNED[16]}", "tidar:16:two-forward")
    cases = tuple(Case(model=TIDAR, method=name, labels={"method": name}) for name in methods)
    question = "Is one fused forward faster than two in turn, and up to which batch?"
    return Ablation(question=question, cases=cases, batches=(1, 4, 16))


def ablations(scale: Scale) -> dict[str, Ablation]:
    """All of them by name."""
    anchors = {"grid": "grid", "random": "mix"}
    labels = {"the token": "mix", "half causal head": "soft"}
    return {
        "masking": _masking(),
        "strategies": _strategies(),
        "weights": _weights(),
        "draft-lens": _draft_lens(),
        "anchors": _pairs("Should spans begin on a fixed grid, or at random?", "anchors", anchors),
        "labels": _pairs("Should drafts learn the token, or the causal head?", "labels", labels),
        "tokens": _tokens(scale),
        "spans": _spans(),
        "two-forward": _two_forward(),
    }
