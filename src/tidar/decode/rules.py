"""What the sequences of a step ask of it beside comparing choices, and what is kept of each for that."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.decode.request import Request
from tidar.gpu_memory import OutOfMemory, gib
from tidar.model import ModelConfig

FREE = -1
"""Stands where no token is forced."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How sequences verify; of several ones side by side, whatever any of them needs.

    compares: some compare choices. rejects: some verify by rejection sampling. mixes: some have a beta
    below 1. forced: some are teacher forced.
    """

    compares: bool = True
    rejects: bool = False
    mixes: bool = False
    forced: bool = False

    def __or__(self, other: "Rule") -> "Rule":
        return Rule(
            self.compares or other.compares,
            self.rejects or other.rejects,
            self.mixes or other.mixes,
            self.forced or other.forced,
        )


COMPARING = Rule()
"""Greedy and shared noise alone: what the fast path and its kernels do."""


def rule_of(request: Request, beta: float) -> Rule:
    """How one request verifies. A forced text leaves nothing to chance, so it never rejects."""
    forced = request.forced is not None
    rejects = request.params.rejects and not forced
    return Rule(compares=not rejects, rejects=rejects, mixes=beta != 1.0, forced=forced)


def draft_probs_bytes(config: ModelConfig, count: int, max_draft_len: int, itemsize: int) -> int:
    """Bytes of the draft distributions of `count` slots and nobody's: 78 MiB for 8 of K = 16 and V = 151,936."""
    return (count + 1) * (max_draft_len - 1) * config.vocab_size * itemsize


class SlotRules:
    """Mutable device state beside `Slots`; made with the first request that does not only compare.

    rejects, samples: bool `[slots]`, the latter whether draft tokens are drawn or the arg-max. betas:
    float32 `[slots]`. probs: `[slots, K - 1, V]`, row i the distribution that d[i + 1] was really drawn
    from; made with the first request that rejects, as it is large (`draft_probs_bytes`). forced: int64
    `[slots, positions + 1]`, `FREE` where the model chooses; made with the first request that is forced.
    """

    def __init__(self, config: ModelConfig, count: int, max_draft_len: int, like: Tensor) -> None:
        self.config, self.count, self.max_draft_len = config, count, max_draft_len
        self.device = like.device
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.rejects = torch.zeros(count + 1, dtype=torch.bool, device=self.device)
        self.samples = torch.zeros(count + 1, dtype=torch.bool, device=self.device)
        self.betas = torch.ones(count + 1, dtype=torch.float32, device=self.device)
        self.probs: Tensor | None = None
        self.forced: Tensor | None = None

    def make_room(self, rule: Rule) -> None:
        """Allocates what this rule needs. Raises TidarError where there is no memory for it."""
        if rule.rejects and self.probs is None:
            self.probs = self._empty_probs()
        if rule.forced and self.forced is None:
            self.forced = self._nothing_forced()

    def _empty_probs(self) -> Tensor:
        size = draft_probs_bytes(self.config, self.count, self.max_draft_len, self.dtype.itemsize)
        doing = f"making room for the draft distributions of rejection sampling ({gib(size)})"
        advice = "Use shared noise, or lower max_running or cache_tokens."
        shape = (self.count + 1, self.max_draft_len - 1, self.config.vocab_size)
        with OutOfMemory(doing, self.device, advice):
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _nothing_forced(self) -> Tensor:
        doing = "making room for the tokens of teacher forcing"
        shape = (self.count + 1, self.config.max_positions + 1)
        with OutOfMemory(doing, self.device, "Lower max_running or cache_tokens."):
            return torch.full(shape, FREE, dtype=torch.int64, device=self.device)

    def enter(self, slot: int, request: Request, beta: float) -> None:
        """Notes how the request that takes this slot verifies."""
        params, rule = request.params, rule_of(request, beta)
        self.rejects[slot] = rule.rejects
        self.samples[slot] = params.draft == "sample"
        self.betas[slot] = beta
        if self.forced is not None:
            self.forced[slot] = FREE
            given = torch.tensor((request.forced or ())[: self.forced.shape[1]], dtype=torch.int64)
            self.forced[slot, : len(given)] = given.to(self.device)
