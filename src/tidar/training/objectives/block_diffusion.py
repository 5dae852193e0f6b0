"""Block diffusion: each span of a text is masked diffusion, behind clean tokens.

BD3-LM (Arriola et al., arXiv 2503.09573, its L_BD) and SDAR (Cheng et al., arXiv 2510.06303): rows are
`[clean | noised]`. The noised rows of a span see each other and the clean tokens before their
anchor; a share t of (0, 1] is drawn for each span, as in BD3-LM, and

    sum over hidden tokens of cross entropy / t, divided by the number of tokens

which in expectation is an upper bound of the text's negative log likelihood. There is no causal loss:
neither of the two has one, and no clean row is ever asked for a token (`prepare_for_bd_training` in
https://github.com/JetAstra/SDAR, training/model/SDAR-4B-Chat/modeling_sdar.py, keeps logits of
hidden rows alone). A checkpoint of this objective is therefore no autoregressive model.

The rows are TiDAR's with random masks. Clean rows are read as `methods/block_diffusion.py` decodes:
causally, or all of their own span as well, which is what BD3-LM and SDAR train ("full").
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tidar.errors import TidarError
from tidar.hf_config import TidarMeta
from tidar.layout import IGNORE, Rows, training_labels, training_rows
from tidar.model import SpanAttention, Transformer
from tidar.training.noise import hide, linear_shares
from tidar.training.objective import Attention, Sums, TrainingModel
from tidar.training.spans import Documents, SpanObjective, texts_of


@dataclass(frozen=True, kw_only=True)
class BlockDiffusionObjective(SpanObjective):
    """The options beside those of spans.

    documents: see `texts_of`.
    span_attention: what clean rows see, those before them ("causal") or all of their own span as
        well ("full"; spans then lie on the grid, where decoding looks for them).
    """

    span_attention: SpanAttention = "causal"
    documents: Documents = "apart"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.span_attention == "full" and self.anchors == "random":
            raise TidarError(
                "span_attention 'full' needs anchors 'grid', got 'random': decoding lays such spans on a "
                "grid from the text's start."
            )

    def meta(self, mask_token_id: int) -> TidarMeta:
        """See `Objective`."""
        return TidarMeta(
            draft_lens=self.draft_lens,
            mask_token_id=mask_token_id,
            alpha=0.0,
            masking="random",
            objective="block-diffusion",
            span_attention=self.span_attention,
        )

    def model(
        self, net: Transformer, *, attention: Attention = "dense", fast: bool = False
    ) -> "BlockDiffusionModel":
        """See `Objective`."""
        return BlockDiffusionModel(net, self, attention, fast)


def noised_rows(
    text: Tensor, draft_len: Tensor, offset: Tensor, span_attention: SpanAttention
) -> Rows:
    """Rows `[clean | noised]` `[B, 2 L]` of the texts `[B, L]`; draft_len and offset int64 `[B]`.

    With "full" a clean row's anchor, how far it sees, is the end of its span.
    """
    rows = training_rows(text, draft_len, offset)
    if span_attention == "causal":
        return rows
    start = rows.anchor[:, text.shape[1] :]
    return replace(rows, anchor=torch.cat((start + draft_len.unsqueeze(1), start), dim=1))


class BlockDiffusionModel(TrainingModel):
    """The network with the loss of block diffusion."""

    losses: ClassVar[tuple[str, ...]] = ("mask_loss",)
    rows_per_token: ClassVar[int] = 2

    def __init__(
        self, net: Transformer, objective: BlockDiffusionObjective, attention: Attention, fast: bool
    ) -> None:
        super().__init__(net, objective, attention, fast)
        self.objective = objective

    def sums(self, batch: dict[str, Tensor]) -> Sums:
        """See `TrainingModel`."""
        seed, mask_id = self.objective.seed, self.net.config.mask_token_id
        assert mask_id is not None
        input_ids, document = batch["input_ids"], batch["document"]
        grid, length = self.objective.grid, input_ids.shape[1]
        _, labels = training_labels(input_ids, document)
        rows = noised_rows(
            texts_of(document, self.objective.documents),
            *grid.draw(batch["epoch"], batch["index"]),
            self.objective.span_attention,
        )
        shares = linear_shares(seed, batch, rows.span[:, length:])
        noised, weights = hide(seed, batch, shares, mask_id, labels != IGNORE)
        ids = torch.cat((input_ids, noised), dim=1)
        hidden = self.net(ids, rows.position, self.attend(rows))
        loss = self.sum_loss(hidden[:, length:], labels, weights)
        return Sums(loss, (loss,), (labels != IGNORE).sum(), grid.visible(rows))
