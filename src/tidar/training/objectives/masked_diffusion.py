"""Masked diffusion: some tokens of a text are hidden, and all rows see each other to predict them.

The loss of LLaDA (arXiv 2502.09992, equation 3; `forward_process` in its GUIDELINES.md): a share t of
(0, 1] is drawn for a text, each of its tokens is hidden with probability t, and

    sum over hidden tokens of cross entropy / t, divided by the number of tokens

which in expectation is an upper bound of the text's negative log likelihood. Dream (arXiv 2508.15487,
section 3) starts from autoregressive weights and keeps what their rows predict: the next token
(`label_shift`). Its rescheduling of noise by token (CART) is not here.

The first token of a document is given, as for every objective: never hidden, never predicted. LLaDA
cuts 1% of its sequences to a random length, so that shorter texts than its 4096 tokens occur. That
rule is left out: here positions restart with each document, so all lengths occur anyway.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tidar.hf_config import TidarMeta
from tidar.layout import IGNORE, Rows, document_rows, document_starts, training_labels
from tidar.model import Transformer
from tidar.training.noise import hide, linear_shares
from tidar.training.objective import Attention, Objective, Sums, TrainingModel
from tidar.training.spans import Documents, texts_of


@dataclass(frozen=True, kw_only=True)
class MaskedDiffusionObjective(Objective):
    """The options.

    label_shift: the row before a position predicts it (Dream), not the row at it (LLaDA).
    documents: see `texts_of`.
    """

    label_shift: bool = False
    documents: Documents = "apart"

    def meta(self, mask_token_id: int) -> TidarMeta:
        """See `Objective`."""
        return TidarMeta(
            draft_lens=(),
            mask_token_id=mask_token_id,
            alpha=0.0,
            masking="random",
            objective="masked-diffusion",
            attention="bidirectional",
            label_shift=self.label_shift,
        )

    def model(
        self, net: Transformer, *, attention: Attention = "dense", fast: bool = False
    ) -> "MaskedDiffusionModel":
        """See `Objective`."""
        return MaskedDiffusionModel(net, self, attention, fast)


def whole_rows(text: Tensor) -> tuple[Rows, Tensor]:
    """Rows that see all of their text, both ways, and which text each belongs to, counted from 0.

    text: int64 `[B, L]`, ids that do not decrease. In the words of the visibility rule they are clean
    rows whose anchor is the text's end.
    """
    number = document_starts(text).long().cumsum(dim=1) - 1
    length = torch.zeros_like(number).scatter_add_(1, number, torch.ones_like(number))
    return replace(document_rows(text), anchor=length.gather(1, number)), number


class MaskedDiffusionModel(TrainingModel):
    """The network with the loss of masked diffusion."""

    losses: ClassVar[tuple[str, ...]] = ("mask_loss",)

    def __init__(
        self,
        net: Transformer,
        objective: MaskedDiffusionObjective,
        attention: Attention,
        fast: bool,
    ) -> None:
        super().__init__(net, objective, attention, fast)
        self.objective = objective

    def sums(self, batch: dict[str, Tensor]) -> Sums:
        """See `TrainingModel`."""
        seed, mask_id = self.objective.seed, self.net.config.mask_token_id
        assert mask_id is not None
        next_labels, labels = training_labels(batch["input_ids"], batch["document"])
        labelled = labels != IGNORE
        rows, number = whole_rows(texts_of(batch["document"], self.objective.documents))
        shares = linear_shares(seed, batch, number)
        ids, weights = hide(seed, batch, shares, mask_id, labelled)
        hidden = self.net(ids, rows.position, self.attend(rows))
        if self.objective.label_shift:
            # The last row has no label, so what comes around to it does not count.
            labels, weights = next_labels, weights.roll(-1, dims=1)
        loss = self.sum_loss(hidden, labels, weights)
        return Sums(loss, (loss,), labelled.sum(), rows.anchor.sum())
