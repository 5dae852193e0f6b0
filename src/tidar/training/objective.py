"""What is learned: the joint loss of causal and mask rows (arXiv 2511.08923, section 3.1).

A sequence is read once as `[clean | masks]`. Clean rows predict the next token, mask rows the token
at their own position; both halves have equally many labels. The loss of a batch is

    (alpha * sum of clean losses + sum of mask losses) / (1 + alpha) / number of labels of one half

summed over micro-batches and processes, so that accumulation equals one large batch. Draft lengths,
anchors and masks are a hash of (seed, epoch, sequence index), never of a generator's state:
resuming and the number of processes change nothing.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tidar.attention import Attend, dense_attend
from tidar.errors import TidarError
from tidar.layout import IGNORE, Rows, dense, training_labels, training_rows
from tidar.model import Layer, Transformer
from tidar.sampling import mix
from tidar.training.flex import flex_training_attend

CHUNK_ELEMENTS = 1 << 29
"""Logits held at once by default, in elements (2 GiB as float32)."""

SMALLEST_RATIO = 1e-3
"""Lower bound of the share of a span that random masking masks, so that no row weighs above 1000."""

ChunkLoss = Callable[..., Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What to learn, and how mask rows are laid out.

    name: "tidar" (both halves) or "ar" (the clean half alone, for twins and cost comparisons).
    alpha: weight of the causal loss. draft_lens: values of K; each sequence draws one.
    masking: "full", or "random" (each span masks a share t ~ U(0, 1] of its rows, at least
        0.001, weighted 1 / t; the others hold their token; visibility stays).
    anchors: grid of spans from each document's start ("grid"), or shifted at random ("random").
    soft_labels: share of the loss taken against the teacher's distribution instead of the token;
        0 is the paper's loss.
    teacher: whose distribution. "causal": the network's own causal head, stopped gradient; it teaches
        the mask half. "base": the network before training, frozen; it teaches both halves, which
        keeps the causal head where it was (knowledge distillation, arXiv 1503.02531).
    head_chunk: rows projected to the vocabulary at once; 0 picks it from the vocabulary size.
    """

    name: Literal["tidar", "ar"] = "tidar"
    alpha: float = 1.0
    draft_lens: tuple[int, ...] = (16,)
    masking: Literal["full", "random"] = "full"
    anchors: Literal["grid", "random"] = "grid"
    soft_labels: float = 0.0
    teacher: Literal["causal", "base"] = "causal"
    head_chunk: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {"name": ("tidar", "ar"), "masking": ("full", "random")}
        choices |= {"anchors": ("grid", "random"), "teacher": ("causal", "base")}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise TidarError(
                    f"{field} is {getattr(self, field)!r}; it must be {' or '.join(allowed)}."
                )
        if not 0.0 <= self.alpha < float("inf"):
            raise TidarError(f"alpha is {self.alpha}; it must be a finite number from 0.")
        if not 0.0 <= self.soft_labels <= 1.0:
            raise TidarError(f"soft_labels is {self.soft_labels}; it must be from 0 to 1.")
        lens = self.draft_lens
        if not lens or list(lens) != sorted(set(lens)) or lens[0] < 1:
            raise TidarError(
                f"draft_lens is {lens}; give one or more rising numbers from 1, such as (8, 16)."
            )
        if self.teacher == "base" and not self.soft_labels:
            raise TidarError(
                "teacher 'base' without soft_labels teaches nothing; set soft_labels, 1 for example."
            )
        if self.head_chunk < 0:
            raise TidarError(f"head_chunk is {self.head_chunk}; it must be 0 (automatic) or more.")


def uniform(*counters: Tensor | int) -> Tensor:
    """A uniform number in [0, 1), float32: a hash of the counters, which broadcast.

    The same on every device. Each counter is mixed in separately, so that none trades for another.
    """
    state: Tensor = torch.zeros((), dtype=torch.int64)
    for counter in counters:
        if isinstance(counter, Tensor) and state.dim() == 0:
            state = state.to(counter.device)
        state = mix(state + counter + 0x5851F42D4C957F2D)
    return ((state >> 40) & (2**24 - 1)).float() * 2.0**-24


def layout(objective: Objective, document: Tensor, epoch: Tensor, index: Tensor) -> Rows:
    """Rows of a batch: `[clean | masks]`, or the clean half alone for "ar"."""
    choices = torch.tensor(objective.draft_lens, device=document.device)
    pick = (uniform(objective.seed, 1, epoch, index) * len(choices)).long()
    draft_len = choices[pick]
    offset = torch.zeros_like(draft_len)
    if objective.anchors == "random":
        offset = (uniform(objective.seed, 2, epoch, index) * draft_len).long()
    rows = training_rows(document, draft_len, offset)
    if objective.name == "ar":
        return rows.apply(lambda attribute: attribute[:, : document.shape[1]])
    return rows


def mask_half(
    objective: Objective, ids: Tensor, span: Tensor, batch: dict[str, Tensor], mask_id: int
) -> tuple[Tensor, Tensor | None]:
    """Token ids of the mask half `[B, L]`, and the loss weight of each row (None: all 1)."""
    if objective.masking == "full":
        return torch.full_like(ids, mask_id), None
    epoch, index = batch["epoch"].unsqueeze(1), batch["index"].unsqueeze(1)
    place = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    # LLaDA keeps the share, by which it too divides, at or above eps = 1e-3: `forward_process` in
    # https://github.com/ML-GSAI/LLaDA/blob/main/GUIDELINES.md, p_mask = (1 - eps) * t + eps.
    # Rows are drawn by the bounded share as well, so the weight stays unbiased.
    ratio = (1.0 - uniform(objective.seed, 3, epoch, index, span)).clamp(min=SMALLEST_RATIO)
    masked = uniform(objective.seed, 4, epoch, index, place) < ratio
    return torch.where(masked, mask_id, ids), masked / ratio


def chunk_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    teacher: Tensor | None,
    teacher_head: Tensor,
    mask_id: int | None,
    soft: float,
) -> Tensor:
    """Summed loss of some rows, float32: hidden `[R, D]`, labels and weights `[R]`.

    teacher: hidden `[R, D]` of the causal rows whose distribution, by `teacher_head`, is the soft
    label, or None.
    """
    logits = F.linear(hidden, head).float()
    if mask_id is not None:
        logits[:, mask_id] = -torch.inf
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    if teacher is not None:
        target = F.linear(teacher, teacher_head).float()
        log_probs = logits.log_softmax(dim=-1)
        if mask_id is not None:
            target[:, mask_id] = -torch.inf
            log_probs = log_probs.index_fill(
                1, torch.tensor([mask_id], device=logits.device), 0.0
            )  # 0 * -inf is not a number
        spread = -(target.softmax(dim=-1).detach() * log_probs).sum(dim=-1)
        loss = (1.0 - soft) * loss + soft * torch.where(labels == IGNORE, 0.0, spread)
    if weights is not None:
        loss = loss * weights
    return loss.sum()


def even_chunk(rows: int, vocab_size: int) -> int:
    """Rows of a chunk of at most about `CHUNK_ELEMENTS` logits, if possible a divisor of `rows`.

    Equal chunks have one shape, so that the compiled loss has one graph.
    """
    fewest = -(-rows * vocab_size // CHUNK_ELEMENTS)
    for chunks in range(fewest, 2 * fewest + 1):
        if rows % chunks == 0:
            return rows // chunks
    return -(-rows // fewest)


class TrainingModel(nn.Module):
    """The network together with its objective: one forward is one loss.

    attention: "dense" (SDPA, any device) or "flex" (FlexAttention, CUDA).
    fast: compile the layers, the loss and the mask; shapes must then stay fixed.

    With the teacher "base", a frozen copy of `net` as given is kept. It is no part of the module: an
    optimizer or a checkpoint never sees it.
    """

    accepts_loss_kwargs = True  # Trainer then passes num_items_in_batch
    main_input_name = "input_ids"

    def __init__(
        self,
        net: Transformer,
        objective: Objective,
        *,
        attention: Literal["dense", "flex"] = "dense",
        fast: bool = False,
    ) -> None:
        super().__init__()
        if objective.name == "tidar" and net.config.mask_token_id is None:
            raise TidarError("the tidar objective needs a model with a mask token.")
        self.net, self.objective, self.attention, self.fast = net, objective, attention, fast
        self._chunk_loss: ChunkLoss = chunk_loss
        self._base: tuple[Transformer, ...] = ()  # in a tuple, so that it is no submodule
        self._soft = bool(objective.soft_labels)
        if objective.name == "tidar" and objective.teacher == "base":
            self._base = (copy.deepcopy(net).requires_grad_(False),)
        if fast:
            self._chunk_loss = torch.compile(chunk_loss, dynamic=False)
            for network in (net, *self._base):
                self.compile_layers(network)

    def compile_layers(self, network: Transformer) -> None:
        """Compile each layer in place: names of parameters stay as they are.

        The layers share one graph. Their `index`, which only `attend` is told and our closures
        ignore, is set to 0 meanwhile: torch 2.11 compiles anew for each value, and gives up after
        eight.
        """
        for layer in network.layers:
            assert isinstance(layer, Layer)
            layer.compile(dynamic=False)
            layer.index = 0

    @contextmanager
    def plain(self) -> Iterator[Transformer]:
        """The network with its layers as they were made, for decoding and saving."""
        layers = [layer for layer in self.net.layers if isinstance(layer, Layer)]
        compiled = [layer._compiled_call_impl for layer in layers]
        indices = [layer.index for layer in layers]
        for index, layer in enumerate(layers):
            layer._compiled_call_impl, layer.index = None, index
        try:
            yield self.net
        finally:
            for layer, call, index in zip(layers, compiled, indices, strict=True):
                layer._compiled_call_impl, layer.index = call, index

    @contextmanager
    def hard_labels(self) -> Iterator[None]:
        """Losses against the tokens alone, whatever the objective teaches: for held-out text."""
        soft, self._soft = self._soft, False
        try:
            yield
        finally:
            self._soft = soft

    def attend(self, rows: Rows) -> Attend:
        """The attention of a forward pass over these rows."""
        if self.attention == "flex":
            return flex_training_attend(rows, fast=self.fast)
        return dense_attend(dense(rows, rows))

    def forward(
        self,
        input_ids: Tensor,
        document: Tensor,
        index: Tensor,
        epoch: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """The loss of a batch, all inputs int64 `[B, L]` or (`index`, `epoch`) `[B]`.

        Returns `loss` (a share of the mean over `num_items_in_batch`, with gradient) and `stats`,
        float32 `[4]`: sums of clean and of mask losses, labels of one half, visible keys of all
        rows. `labels` only serves Trainer's counting; without a count this batch is the whole.
        """
        batch = {"index": index, "epoch": epoch}
        length, objective = input_ids.shape[1], self.objective
        rows = layout(objective, document, epoch, index)
        clean_labels, mask_labels = training_labels(input_ids, document)
        ids, weights = input_ids, None
        if objective.name == "tidar":
            assert self.net.config.mask_token_id is not None
            mask_ids, weights = mask_half(
                objective, input_ids, rows.span[:, length:], batch, self.net.config.mask_token_id
            )
            ids = torch.cat((input_ids, mask_ids), dim=1)
        hidden = self.net(ids, rows.position, self.attend(rows))
        clean_hidden = hidden[:, :length]
        teacher = self._teacher(input_ids, rows, clean_hidden)
        clean = self._sum_loss(clean_hidden, clean_labels, teacher=teacher if self._base else None)
        total = clean
        mask = torch.zeros_like(clean)
        if objective.name == "tidar":
            if teacher is not None:
                # The clean row before a mask row's position predicts the same token.
                teacher = F.pad(teacher[:, :-1], (0, 0, 1, 0))
            mask = self._sum_loss(hidden[:, length:], mask_labels, weights, teacher)
            total = (objective.alpha * clean + mask) / (1.0 + objective.alpha)
        labelled = (mask_labels != IGNORE).sum()
        items = labelled if num_items_in_batch is None else num_items_in_batch
        span_len = sum(objective.draft_lens) / len(objective.draft_lens)
        seen = rows.anchor.sum() + rows.is_mask.sum() * span_len
        stats = torch.stack((clean.detach(), mask.detach(), labelled.float(), seen.float()))
        return {"loss": total / items, "stats": stats}

    def _teacher(self, ids: Tensor, rows: Rows, clean_hidden: Tensor) -> Tensor | None:
        """Hidden states `[B, L, D]` of the clean rows whose distributions are the soft labels."""
        if self.objective.name == "ar" or not self._soft:
            return None
        if not self._base:
            return clean_hidden.detach()
        clean = rows.apply(lambda attribute: attribute[:, : ids.shape[1]])
        base = self._base[0].to(ids.device)
        with torch.no_grad():
            return base(ids, clean.position, self.attend(clean))

    def _sum_loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> Tensor:
        """Summed loss of `[B, L, D]` hidden states, a chunk of logits at a time.

        Logits are recomputed in the backward pass, so at most one chunk of them exists.
        """
        flat, goal = hidden.flatten(0, 1), labels.flatten()
        weight = None if weights is None else weights.flatten()
        guide = None if teacher is None else teacher.flatten(0, 1)
        config = self.net.config
        size = self.objective.head_chunk or even_chunk(len(goal), config.vocab_size)
        total = flat.new_zeros((), dtype=torch.float32)
        for start in range(0, len(goal), size):
            part = slice(start, start + size)
            arguments: tuple[Any, ...] = (
                flat[part],
                self.net.head_weight,
                goal[part],
                None if weight is None else weight[part],
                None if guide is None else guide[part],
                (self._base[0] if self._base else self.net).head_weight,
                config.mask_token_id,
                self.objective.soft_labels,
            )
            total = total + checkpoint(
                self._chunk_loss, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        return total
