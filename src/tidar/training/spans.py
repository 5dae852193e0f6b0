"""What a training pass takes as one text, which K a sequence draws, where its spans begin; the options of that."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tidar.errors import TidarError
from tidar.layout import Rows, training_rows
from tidar.sampling import uniform
from tidar.training.objective import Objective

Anchors = Literal["grid", "random"]
Documents = Literal["apart", "joined"]


def texts_of(document: Tensor, documents: Documents) -> Tensor:
    """Which text each token belongs to, `[B, L]`, from the document ids.

    "apart": each document is a text, and no other sees it. "joined": a packed sequence is one text,
    as BD3-LM, LLaDA and Dream are trained. A network that denoises documents apart has never seen a
    mask behind the end of one, and where decoding must fix the length in advance it always does.
    """
    return document if documents == "apart" else torch.zeros_like(document)


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

    def draw(self, epoch: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """K and the grid's offset for the sequences `index` `[B]`."""
        choices = torch.tensor(self.draft_lens, device=index.device)
        pick = (uniform(self.seed, 1, epoch, index) * len(choices)).long()
        draft_len = choices[pick]
        offset = torch.zeros_like(draft_len)
        if self.anchors == "random":
            offset = (uniform(self.seed, 2, epoch, index) * draft_len).long()
        return draft_len, offset

    def rows(self, document: Tensor, epoch: Tensor, index: Tensor) -> Rows:
        """Rows `[B, 2 L]` for the document ids `[B, L]` of the sequences `index` `[B]`."""
        return training_rows(document, *self.draw(epoch, index))

    def visible(self, rows: Rows) -> Tensor:
        """About how many keys all these rows see, for the count of operations: spans of mean length."""
        return rows.anchor.sum() + rows.is_mask.sum() * (
            sum(self.draft_lens) / len(self.draft_lens)
        )


@dataclass(frozen=True, kw_only=True)
class SpanObjective(Objective):
    """An objective whose mask rows stand in spans. draft_lens, anchors: see `SpanGrid`."""

    draft_lens: tuple[int, ...] = (16,)
    anchors: Anchors = "grid"

    def __post_init__(self) -> None:
        super().__post_init__()
        SpanGrid(self.draft_lens, self.anchors, self.seed)

    @property
    def grid(self) -> SpanGrid:
        """Where the spans of a sequence are."""
        return SpanGrid(self.draft_lens, self.anchors, self.seed)
