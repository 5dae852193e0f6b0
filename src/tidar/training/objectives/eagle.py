"""An EAGLE-3 head for a frozen model, by training-time test (arXiv 2503.01840, section 3.2).

The head is unrolled as in decoding. Row i of step 1 reads the true feature of position i and the token
behind it; row i of step t + 1 reads its own output of step t and the token after that. It attends to the
true rows up to i (of step 1) and to itself in steps 2 .. t + 1: so the mask of a step is causal over the
first one and a diagonal over each simulated one, within a document. Step t stands t - 1 positions further.

Loss of a row: cross-entropy against the model's own distribution over the draft vocabulary, scaled up to 1;
0 where the model's likeliest token is not in it. Step t weighs 0.8 ** (t - 1), all is divided by the labels
of the sequences. These, 7 steps and the mask follow SafeAILab/EAGLE (`eagle/traineagle3/cnets.py`, class
`Model`; `main.py`); the draft vocabulary, the most frequent tokens of the data, is its `scandata`.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tidar.eagle_files import save_eagle_head
from tidar.eagle_head import EagleConfig, EagleHead
from tidar.errors import TidarError
from tidar.layout import IGNORE, Rows, dense, document_rows, training_labels
from tidar.model import Transformer, flops_per_row
from tidar.training.chunked import even_chunk
from tidar.training.data import TokenData
from tidar.training.objective import Attention, Objective, Sums, TrainingModel
from tidar.training.start import Start

DECAY = 0.8
"""Weight of a step's loss, relative to the step before."""

PUBLISHED_VOCAB = 32000
"""Draft tokens of the published heads, and the most that are taken unasked."""


@dataclass(frozen=True, kw_only=True)
class EagleObjective(Objective):
    """What the head learns.

    draft_vocab_size: tokens it can draft; 0 is 32,000, or all where the model has fewer.
    ttt_length: steps that are unrolled, the one over true features included.
    """

    draft_vocab_size: int = 0
    ttt_length: int = 7

    needs_mask: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draft_vocab_size < 0:
            raise TidarError(
                f"draft_vocab_size is {self.draft_vocab_size}; it must be 0 (automatic) or more."
            )
        if self.ttt_length < 1:
            raise TidarError(f"ttt_length is {self.ttt_length}; it must be at least 1.")

    def model(
        self, net: Transformer, *, attention: Attention = "dense", fast: bool = False
    ) -> "EagleModel":
        """See `Objective`."""
        return EagleModel(net, self, attention, fast)


class Unrolled:
    """Mutable: the keys and values of all steps so far, and what a row of the next step sees of them.

    rows: those of step 1, `[B, L]`. Steps attend in turn, through `attend`.
    """

    def __init__(self, rows: Rows) -> None:
        self.causal = dense(rows, rows)
        self.own = torch.eye(len(rows), dtype=torch.bool, device=self.causal.device)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor:
        """See `tidar.model.Attend`."""
        simulated = self.own.expand_as(self.causal)
        mask = torch.cat((self.causal, *(simulated for _ in self.keys)), dim=-1)
        self.keys.append(k)
        self.values.append(v)
        return F.scaled_dot_product_attention(
            q,
            torch.cat(self.keys, dim=2),
            torch.cat(self.values, dim=2),
            attn_mask=mask.unsqueeze(1),
            enable_gqa=q.shape[1] != k.shape[1],
        )


class EagleModel(TrainingModel):
    """The head with its loss. The model that it drafts for is no part of the module: nothing trains or saves it."""

    losses: ClassVar[tuple[str, ...]] = (
        "first_draft_loss", "last_draft_loss", "first_draft_accuracy", "last_draft_accuracy",
    )  # fmt: skip
    """Of the first and the last step, over the rows that count in it; accuracy: the model's likeliest token."""
    own_rows: ClassVar[bool] = True

    def __init__(
        self, net: Transformer, objective: EagleObjective, attention: Attention, fast: bool
    ) -> None:
        super().__init__(net, objective, attention, fast)
        del self.net
        object.__setattr__(self, "net", net.requires_grad_(False).eval())
        config = net.config
        self.objective = objective
        size = objective.draft_vocab_size or min(PUBLISHED_VOCAB, config.vocab_size)
        self.head = EagleHead(EagleConfig.for_model(config, size))

    @property
    def draft_head(self) -> EagleHead:
        """See `TrainingModel`."""
        return self.head

    def prepare(self, data: TokenData) -> None:
        """See `TrainingModel`. Picks the draft vocabulary, of two equally frequent tokens the lower id."""
        counts = torch.from_numpy(data.counts(self.net.config.vocab_size))
        order = counts.sort(descending=True, stable=True).indices
        self.head.set_vocabulary(order[: self.head.draft_vocab_size].sort().values.tolist())
        generator = torch.Generator().manual_seed(self.objective.seed)
        self.head.init_weights(self.net, generator)

    def sums(self, batch: dict[str, Tensor]) -> Sums:
        """See `TrainingModel`."""
        ids, document = batch["input_ids"], batch["document"]
        labels, _ = training_labels(ids, document)
        rows = document_rows(document)
        hidden, tapped = self._read(ids, rows)
        # Row i of step t predicts what the model's row i + t does, so it is moved to that row here.
        outputs = torch.stack(
            [
                F.pad(each, (0, 0, step, 0))[:, : ids.shape[1]]
                for step, each in enumerate(self.unrolled(ids, rows, tapped), start=1)
            ]
        )
        before = [
            F.pad(document, (step, 0), value=-1)[:, : ids.shape[1]]
            for step in range(1, len(outputs) + 1)
        ]
        keep = (torch.stack(before) == document) & (labels != IGNORE)
        loss, right, counted = self._step_sums(outputs, hidden, keep)
        weights = DECAY ** torch.arange(len(loss), device=loss.device)
        return Sums(
            (weights * loss).sum(),
            (loss[0], loss[-1], right[0], right[-1]),
            (labels != IGNORE).sum(),
            rows.anchor.sum(),
            (counted[0], counted[-1]) * 2,
        )

    @torch.no_grad()
    def _read(self, ids: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Final hidden states of the model, `[B, L, hidden_size]`, and what its taps gave, three times as wide."""
        net = self.net.to(ids.device)
        hidden, tapped = net.forward_with_taps(
            ids, rows.position, self.attend(rows), self.head.taps
        )
        return hidden, torch.cat(tapped, dim=-1)

    def unrolled(self, ids: Tensor, rows: Rows, tapped: Tensor) -> Iterator[Tensor]:
        """The head's outputs `[B, L, hidden_size]`, step by step.

        ids: int64 `[B, L]`. tapped: what the model's taps gave. Rows whose token would lie beyond the
        document hold nothing of use, and no other row sees them.
        """
        embed, attend = self.head.embedding(self.net), Unrolled(rows).attend
        features = self.head.fuse(tapped)
        for step in range(self.objective.ttt_length):
            token = F.pad(ids[:, step + 1 :], (0, min(step + 1, ids.shape[1])))
            features = self.head(embed(token), features, rows.position + step, attend)
            yield features

    def _step_sums(
        self, outputs: Tensor, hidden: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of each of T steps the loss, the right guesses and the rows that count: float32 `[T]`.

        outputs: `[T, B, L, hidden_size]`, hidden: the model's, `[B, L, hidden_size]`, keep: `[T, B, L]`. Logits
        are made for a chunk of rows at a time, the model's once for all steps.
        """
        drawn, guide, kept = outputs.flatten(1, 2), hidden.flatten(0, 1), keep.flatten(1, 2)
        width = self.net.config.vocab_size + len(drawn) * self.head.draft_vocab_size
        size = self._head_chunk or even_chunk(len(guide), width)
        total = drawn.new_zeros(3, len(drawn), dtype=torch.float32)
        for start in range(0, len(guide), size):
            part = slice(start, start + size)
            total = total + checkpoint(
                self._rows_sums,
                drawn[:, part],
                guide[part],
                kept[:, part],
                use_reentrant=False,
                preserve_rng_state=False,
            )
        loss, right, counted = total
        return loss, right, counted

    def _rows_sums(self, outputs: Tensor, hidden: Tensor, keep: Tensor) -> Tensor:
        """`_step_sums` of R rows, `[3, T]`: outputs `[T, R, hidden_size]`, hidden `[R, hidden_size]`, keep `[T, R]`."""
        with torch.no_grad():
            full = self.net.logits(hidden).float()
            counted = keep & self.head.t2d[full.argmax(dim=-1)]
            target = full[:, self.head.target_ids].softmax(dim=-1)
        log_probs = self.head.draft_logits(outputs).float().log_softmax(dim=-1)
        loss = -(target * log_probs).sum(dim=-1)
        right = counted & (log_probs.argmax(dim=-1) == target.argmax(dim=-1))
        sums = torch.where(counted, loss, 0.0), right.float(), counted.float()
        return torch.stack([each.sum(dim=-1) for each in sums])

    def flops(self, tokens: float, visible: float) -> float:
        """See `TrainingModel`: the model forward, and each step of the head forward and backward.

        Features are fused once. A row of step t sees t - 1 simulated keys beside the true ones.
        """
        head, steps, seen = self.head, self.objective.ttt_length, visible / max(tokens, 1.0)
        matrices = sum(p.numel() for p in head.parameters() if p.dim() == 2)
        keys = steps * seen + steps * (steps - 1) / 2
        attention = 4.0 * head.config.num_heads * head.config.head_dim * keys
        once = head.fc.weight.numel()
        unrolled = 2.0 * once + 2.0 * steps * (matrices - once) + attention
        return tokens * (flops_per_row(self.net.config, seen) + 3.0 * unrolled)

    def save(self, folder: Path, start: Start) -> None:
        """See `TrainingModel`: the head alone, in the published format."""
        save_eagle_head(folder, copy.deepcopy(self.head).to(start.save_dtype), self.net.config)
