"""The autoregressive objective: every clean row predicts the next token. For bases and twins."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tidar.layout import IGNORE, document_rows, training_labels
from tidar.model import Transformer
from tidar.training.objective import Attention, Objective, Sums, TrainingModel


@dataclass(frozen=True, kw_only=True)
class ArObjective(Objective):
    """The plain causal loss; it has no options of its own."""

    needs_mask: ClassVar[bool] = False

    def model(
        self, net: Transformer, *, attention: Attention = "dense", fast: bool = False
    ) -> "ArModel":
        """See `Objective`."""
        return ArModel(net, self, attention, fast)


class ArModel(TrainingModel):
    """The network with the causal loss."""

    losses: ClassVar[tuple[str, ...]] = ("clean_loss",)

    def sums(self, batch: dict[str, Tensor]) -> Sums:
        """See `TrainingModel`."""
        ids, document = batch["input_ids"], batch["document"]
        rows = document_rows(document)
        labels, _ = training_labels(ids, document)
        loss = self.sum_loss(self.net(ids, rows.position, self.attend(rows)), labels)
        return Sums(loss, (loss,), (labels != IGNORE).sum(), rows.anchor.sum())
