"""What all objectives share. An objective is one file in `objectives/`: its options, and its loss.

The options say what the checkpoint will be. Its `model` is the network with the loss: one forward is
one loss. That loss is a sum over labels, divided by the labels of the whole optimizer step, so that
accumulation and several processes equal one large batch. Whatever is drawn is a hash of (seed, epoch,
sequence index), never of a generator's state: resuming and the number of processes change nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tidar.attention import Attend, dense_attend
from tidar.eagle_head import EagleHead
from tidar.errors import TidarError
from tidar.hf_config import TidarMeta
from tidar.layout import Rows, dense
from tidar.model import Layer, Transformer
from tidar.training.chunked import ChunkLoss, chunk_loss, even_chunk
from tidar.training.data import TokenData
from tidar.training.flex import flex_training_attend
from tidar.training.metrics import step_flops
from tidar.training.start import Start
from tidar.weights import save_checkpoint

Attention = Literal["dense", "flex"]


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """The options of an objective; each field is one of `TrainConfig`.

    head_chunk: rows projected to the vocabulary at once; 0 picks it from the vocabulary size.
    seed: of everything that is drawn.
    """

    head_chunk: int = 0
    seed: int = 0

    needs_mask: ClassVar[bool] = True
    """Whether it reads mask rows, so that the network needs a mask token."""

    def __post_init__(self) -> None:
        """Raises TidarError for impossible values."""
        if self.head_chunk < 0:
            raise TidarError(f"head_chunk is {self.head_chunk}; it must be 0 (automatic) or more.")

    def meta(self, mask_token_id: int) -> TidarMeta | None:
        """What the checkpoint says of this training; None where it is a plain autoregressive one."""
        return None

    @abstractmethod
    def model(
        self, net: Transformer, *, attention: Attention = "dense", fast: bool = False
    ) -> "TrainingModel":
        """The network with this loss; see `TrainingModel`."""


@dataclass(frozen=True, slots=True)
class Sums:
    """What a forward pass comes to, each a number of one element.

    total: the loss summed over labels, with gradient. losses: what is logged, one for each name in
    `TrainingModel.losses`, summed too. labels: how many there are. visible: keys that all rows see.
    counted: rows that each of `losses` sums over, where these are not the labels.
    """

    total: Tensor
    losses: tuple[Tensor, ...]
    labels: Tensor
    visible: Tensor
    counted: tuple[Tensor, ...] = ()


class TrainingModel(nn.Module, ABC):
    """The network together with its objective: one forward is one loss.

    attention: "dense" (SDPA, any device) or "flex" (FlexAttention, CUDA).
    fast: compile the layers, the loss and the mask; shapes must then stay fixed.
    """

    accepts_loss_kwargs = True  # Trainer then passes num_items_in_batch
    main_input_name = "input_ids"

    losses: ClassVar[tuple[str, ...]]
    """Names of what is logged, such as `mask_loss`; nats per label."""
    own_rows: ClassVar[bool] = False
    """Whether each of `losses` counts rows of its own, and is a mean over those."""
    rows_per_token: ClassVar[int] = 1
    """Rows of a pass for each clean token, for the count of operations."""

    def __init__(
        self, net: Transformer, objective: Objective, attention: Attention, fast: bool
    ) -> None:
        super().__init__()
        if objective.needs_mask and net.config.mask_token_id is None:
            raise TidarError("this objective needs a model with a mask token.")
        self.net, self.attention, self.fast = net, attention, fast
        self._head_chunk = objective.head_chunk
        self._chunk_loss: ChunkLoss = chunk_loss
        if fast:
            self._chunk_loss = torch.compile(chunk_loss, dynamic=False)
            self.compile_layers(net)

    def prepare(self, data: TokenData) -> None:
        """Looks at the training data, before the first step; what comes of it must be a function of the data."""

    @abstractmethod
    def sums(self, batch: dict[str, Tensor]) -> Sums:
        """One forward pass over a batch: `input_ids`, `document` `[B, L]`, `index`, `epoch` `[B]`."""

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
        float32: the sums that `losses` names, the rows of each (with `own_rows`), then the labels, then
        the visible keys of all rows; `means` reads sums of it. `labels` only serves Trainer's counting;
        without a count this batch is the whole.
        """
        batch = {"input_ids": input_ids, "document": document, "index": index, "epoch": epoch}
        sums = self.sums(batch)
        items = sums.labels if num_items_in_batch is None else num_items_in_batch
        stats = [*sums.losses, *sums.counted, sums.labels, sums.visible]
        return {
            "loss": sums.total / items,
            "stats": torch.stack([value.detach().float() for value in stats]),
        }

    @property
    def draft_head(self) -> EagleHead | None:
        """The head that is trained to draft for the network; None where there is none."""
        return None

    @property
    def stats_size(self) -> int:
        """Numbers in the `stats` of a forward pass."""
        return len(self.losses) * (1 + self.own_rows) + 2

    def means(self, stats: Tensor) -> dict[str, float]:
        """What is logged, by the names of `losses`, from the sum of the `stats` of some passes."""
        *found, labels, _ = stats.tolist()
        sums, counted = found[: len(self.losses)], found[len(self.losses) :]
        each = counted if self.own_rows else [labels] * len(sums)
        return {
            name: total / max(count, 1.0)
            for name, total, count in zip(self.losses, sums, each, strict=True)
        }

    def attend(self, rows: Rows) -> Attend:
        """The attention of a forward pass over these rows."""
        if self.attention == "flex":
            return flex_training_attend(rows, fast=self.fast)
        return dense_attend(dense(rows, rows))

    def sum_loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        teacher: tuple[Tensor, Tensor] | None = None,
        soft: float = 0.0,
    ) -> Tensor:
        """Summed loss of `[B, L, D]` hidden states, a chunk of logits at a time; see `chunk_loss`.

        teacher: hidden states like `hidden` and the head that reads them; `soft` is its share.
        """
        flat, goal = hidden.flatten(0, 1), labels.flatten()
        weight = None if weights is None else weights.flatten()
        guide = None if teacher is None else teacher[0].flatten(0, 1)
        guide_head = self.net.head_weight if teacher is None else teacher[1]
        config = self.net.config
        size = self._head_chunk or even_chunk(len(goal), config.vocab_size)
        total = flat.new_zeros((), dtype=torch.float32)
        for start in range(0, len(goal), size):
            part = slice(start, start + size)
            total = total + checkpoint(
                self._chunk_loss,
                flat[part],
                self.net.head_weight,
                goal[part],
                None if weight is None else weight[part],
                None if guide is None else guide[part],
                guide_head,
                config.mask_token_id,
                soft,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return total

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
        yield

    def flops(self, tokens: float, visible: float) -> float:
        """Operations of a step over `tokens` clean tokens whose rows see `visible` keys in all; see `step_flops`."""
        return step_flops(self.net.config, tokens, visible, self.rows_per_token)

    def save(self, folder: Path, start: Start) -> None:
        """Writes what was trained to `folder`. Raises TidarError when that fails."""
        with self.plain() as net:
            save_checkpoint(
                folder,
                net,
                meta=start.meta,
                raw_config=start.raw_config,
                tokenizer_source=start.tokenizer_folder,
                generation_config=start.generation_config,
                dtype=start.save_dtype,
            )
