"""`[clean | masks]` rows of a training pass: which K a sequence draws, and where its spans begin."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tidar.errors import TidarError
from tidar.layout import Rows, training_rows
from tidar.sampling import uniform

Anchors = Literal["grid", "random"]


@dataclass(frozen=True, slots=True)
class SpanGrid:
    """How spans are laid over documents.

    draft_lens: values of K; each sequence draws one. anchors: grid of spans from each document's
    start ("grid"), or shifted at random ("random"). Raises TidarError for impossible values.
    """

    draft_lens: tuple[int, ...]
    anchors: Anchors
    seed: int

    def __post_init__(self) -> None:
        lens = self.draft_lens
        if not lens or list(lens) != sorted(set(lens)) or lens[0] < 1:
            raise TidarError(
                f"draft_lens is {lens}; give one or more rising numbers from 1, such as (8, 16)."
            )
        if self.anchors not in ("grid", "random"):
            raise TidarError(f"anchors is {self.anchors!r}; it must be grid or random.")

    def rows(self, document: Tensor, epoch: Tensor, index: Tensor) -> Rows:
        """Rows `[B, 2 L]` for the document ids `[B, L]` of the sequences `index` `[B]`."""
        choices = torch.tensor(self.draft_lens, device=document.device)
        pick = (uniform(self.seed, 1, epoch, index) * len(choices)).long()
        draft_len = choices[pick]
        offset = torch.zeros_like(draft_len)
        if self.anchors == "random":
            offset = (uniform(self.seed, 2, epoch, index) * draft_len).long()
        return training_rows(document, draft_len, offset)

    def visible(self, rows: Rows) -> Tensor:
        """About how many keys all these rows see, for the count of operations: spans of mean length."""
        return rows.anchor.sum() + rows.is_mask.sum() * (
            sum(self.draft_lens) / len(self.draft_lens)
        )
