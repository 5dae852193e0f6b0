"""The joint loss of causal and mask rows (arXiv 2511.08923, section 3.1).

A sequence is read once as `[clean | masks]`. Clean rows predict the next token, mask rows the token
at their own position; both halves have equally many labels. The loss of a batch is

    (alpha * sum of clean losses + sum of mask losses) / (1 + alpha) / number of labels of one half
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar.errors import TidarError
from tidar.hf_config import TidarMeta
from tidar.layout import IGNORE, Rows, training_labels
from tidar.model import Transformer
from tidar.training.noise import SMALLEST_SHARE, draw_shares, hide
from tidar.training.objective import Attention, Sums, TrainingModel
from tidar.training.spans import SpanObjective


@dataclass(frozen=True, kw_only=True)
class TidarObjective(SpanObjective):
    """What to learn; how mask rows are laid out is `SpanObjective`'s.

    alpha: weight of the causal loss.
    masking: "full", or "random" (each span masks a share t ~ U(0, 1] of its rows, at least
        0.001, weighted 1 / t; the others hold their token; visibility stays).
    soft_labels: share of the loss taken against the teacher's distribution instead of the token;
        0 is the paper's loss.
    teacher: whose distribution. "causal": the network's own causal head, stopped gradient; it teaches
        the mask half. "base": the network before training, frozen; it teaches both halves, which
        keeps the causal head where it was (knowledge distillation, arXiv 1503.02531).
    """

    alpha: float = 1.0
    masking: Literal["full", "random"] = "full"
    soft_labels: float = 0.0
    teacher: Literal["causal", "base"] = "causal"

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"masking": ("full", "random"), "teacher": ("causal", "base")}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise TidarError(
                    f"{field} is {getattr(self, field)!r}; it must be {' or '.join(allowed)}."
                )
        if not 0.0 <= self.alpha < float("inf"):
            raise TidarError(f"alpha is {self.alpha}; it must be a finite number from 0.")
        if not 0.0 <= self.soft_labels <= 1.0:
            raise TidarError(f"soft_labels is {self.soft_labels}; it must be from 0 to 1.")
        if self.teacher == "base" and not self.soft_labels:
            raise TidarError(
                "teacher 'base' without soft_labels teaches nothing; set soft_labels, 1 for example."
            )

    def meta(self, mask_token_id: int) -> TidarMeta:
        """See `Objective`."""
        return TidarMeta(
            draft_lens=self.draft_lens,
            mask_token_id=mask_token_id,
            alpha=self.alpha,
            masking=self.masking,
        )

    def model(
        self, net: Transformer, *, attention: Attention = "dense", fast: bool = False
    ) -> "TidarModel":
        """See `Objective`."""
        return TidarModel(net, self, attention, fast)


def mask_half(
    objective: TidarObjective, batch: dict[str, Tensor], span: Tensor, mask_id: int
) -> tuple[Tensor, Tensor | None]:
    """Token ids of the mask half `[B, L]`, and the loss weight of each row (None: all 1)."""
    ids = batch["input_ids"]
    if objective.masking == "full":
        return torch.full_like(ids, mask_id), None
    # Rows are drawn by the bounded share as well, so the weight stays unbiased.
    share = draw_shares(objective.seed, batch, span).clamp(min=SMALLEST_SHARE)
    return hide(objective.seed, batch, share, mask_id)


class TidarModel(TrainingModel):
    """The network with the joint loss.

    With the teacher "base", a frozen copy of `net` as given is kept. It is no part of the module: an
    optimizer or a checkpoint never sees it.
    """

    losses: ClassVar[tuple[str, ...]] = ("clean_loss", "mask_loss")
    rows_per_token: ClassVar[int] = 2

    def __init__(
        self, net: Transformer, objective: TidarObjective, attention: Attention, fast: bool
    ) -> None:
        base = (copy.deepcopy(net).requires_grad_(False),) if objective.teacher == "base" else ()
        super().__init__(net, objective, attention, fast)
        self.objective = objective
        self._base: tuple[Transformer, ...] = base  # in a tuple, so that it is no submodule
        self._soft = bool(objective.soft_labels)
        if fast:
            for network in base:
                self.compile_layers(network)

    @contextmanager
    def hard_labels(self) -> Iterator[None]:
        """See `TrainingModel`."""
        soft, self._soft = self._soft, False
        try:
            yield
        finally:
            self._soft = soft

    def sums(self, batch: dict[str, Tensor]) -> Sums:
        """See `TrainingModel`."""
        input_ids, document = batch["input_ids"], batch["document"]
        length, objective = input_ids.shape[1], self.objective
        rows = objective.grid.rows(document, batch["epoch"], batch["index"])
        clean_labels, mask_labels = training_labels(input_ids, document)
        assert self.net.config.mask_token_id is not None
        mask_ids, weights = mask_half(
            objective, batch, rows.span[:, length:], self.net.config.mask_token_id
        )
        ids = torch.cat((input_ids, mask_ids), dim=1)
        hidden = self.net(ids, rows.position, self.attend(rows))
        clean_hidden = hidden[:, :length]
        teacher = self._teacher(input_ids, rows, clean_hidden)
        taught = teacher if self._base else None
        clean = self.sum_loss(clean_hidden, clean_labels, None, taught, objective.soft_labels)
        if teacher is not None:
            # The clean row before a mask row's position predicts the same token.
            teacher = F.pad(teacher[0][:, :-1], (0, 0, 1, 0)), teacher[1]
        mask = self.sum_loss(
            hidden[:, length:], mask_labels, weights, teacher, objective.soft_labels
        )
        total = (objective.alpha * clean + mask) / (1.0 + objective.alpha)
        labels = (mask_labels != IGNORE).sum()
        return Sums(total, (clean, mask), labels, objective.grid.visible(rows))

    def _teacher(
        self, ids: Tensor, rows: Rows, clean_hidden: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Hidden states `[B, L, D]` of the clean rows that give the soft labels, and their head."""
        if not self._soft:
            return None
        if not self._base:
            return clean_hidden.detach(), self.net.head_weight
        clean = rows.apply(lambda attribute: attribute[:, : ids.shape[1]])
        base = self._base[0].to(ids.device)
        with torch.no_grad():
            return base(ids, clean.position, self.attend(clean)), base.head_weight
