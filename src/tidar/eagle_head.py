"""The EAGLE-3 draft head (Li et al., arXiv 2503.01840): one layer that reads the model's own hidden states.

A row is a pair: the feature of position i and the token of position i + 1, at RoPE position i. It predicts
the token of position i + 2. Features are true ones, fused from three layers of the model that has read
position i, or the head's own last output, where the model has not been there yet. Attention is fed both,
each with a norm of its own; the vocabulary projection knows a part of the model's tokens only.

Numbers, names and the layers that are read follow SafeAILab/EAGLE (`eagle/model/cnets.py`, class `Model`;
`eagle/model/modeling_llama_kv.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from tidar.errors import TidarError
from tidar.model import Attend, Layer, ModelConfig, RotaryEmbedding, Transformer

SHALLOW: Final = 12
"""Layers below which the published choice of taps would leave most of a network unread."""


def published_taps(num_layers: int) -> tuple[int, int, int]:
    """The layers whose outputs published heads read: low, middle, high; the first layer is 0.

    EAGLE takes what goes into layers 2, n // 2 and n - 3 (`modeling_llama_kv.py`; the same in vLLM's
    `get_eagle3_aux_hidden_state_layers`), so the outputs of the layers before those. A network of fewer
    than 12 layers, for which no head was ever published, gives its first, middle and last output instead.
    """
    if num_layers < SHALLOW:
        return 0, (num_layers - 1) // 2, num_layers - 1
    return 1, num_layers // 2 - 1, num_layers - 4


@dataclass(frozen=True, slots=True, kw_only=True)
class EagleConfig:
    """Sizes of a head. layer: of its one layer, with the vocabulary size of the model it drafts for.

    taps: the model's layers whose outputs are fused. Raises TidarError for sizes that make no head.
    """

    layer: ModelConfig
    draft_vocab_size: int
    taps: tuple[int, int, int]

    def __post_init__(self) -> None:
        if not 1 <= self.draft_vocab_size <= self.layer.vocab_size:
            raise TidarError(
                f"draft_vocab_size is {self.draft_vocab_size}; it must be from 1 to vocab_size, "
                f"{self.layer.vocab_size}"
            )

    @classmethod
    def for_model(cls, target: ModelConfig, draft_vocab_size: int) -> "EagleConfig":
        """A head as published ones are: one Llama layer of the model's own width."""
        layer = replace(
            target, model_type="llama", num_layers=1, tie_embeddings=False, attention_bias=False,
            output_bias=False, mlp_bias=False, qk_norm=False, mask_token_id=None,
            span_attention="causal",
        )  # fmt: skip
        return cls(
            layer=layer,
            draft_vocab_size=draft_vocab_size,
            taps=published_taps(target.num_layers),
        )


class EagleHead(nn.Module):
    """The head. embed: an embedding of its own; None where it shares the model's, as published ones do.

    d2t: int64 `[draft_vocab_size]`, target id minus draft id. t2d: bool `[vocab_size]`, whether a token of
    the model is in the draft vocabulary. Both as published; draft ids go by rising target ids.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: EagleConfig, *, own_embedding: bool = False) -> None:
        super().__init__()
        sizes = self.config = config.layer
        self.draft_vocab_size, self.taps = config.draft_vocab_size, config.taps
        hidden = sizes.hidden_size
        self.embed = nn.Embedding(sizes.vocab_size, hidden) if own_embedding else None
        self.fc = nn.Linear(3 * hidden, hidden, bias=False)
        self.rotary = RotaryEmbedding(sizes.rope, sizes.head_dim)
        self.layer = Layer(sizes, 0)
        self.layer.qkv = nn.Linear(2 * hidden, self.layer.qkv.out_features, bias=False)
        self.hidden_norm = nn.RMSNorm(hidden, eps=sizes.rms_norm_eps)
        self.norm = nn.RMSNorm(hidden, eps=sizes.rms_norm_eps)
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(sizes.vocab_size, dtype=torch.bool))

    if TYPE_CHECKING:

        def __call__(
            self, embedded: Tensor, features: Tensor, positions: Tensor, attend: Attend
        ) -> Tensor: ...

    @property
    def target_ids(self) -> Tensor:
        """Token of the model for each draft id, int64 `[draft_vocab_size]`."""
        return self.d2t + torch.arange(self.draft_vocab_size, device=self.d2t.device)

    def set_vocabulary(self, target_ids: Sequence[int]) -> None:
        """Drafts these tokens and no others. Raises TidarError unless they rise and fit."""
        size, vocab = self.draft_vocab_size, self.config.vocab_size
        ids = torch.tensor(list(target_ids), dtype=torch.int64)
        inside = len(ids) == size and int(ids[0]) >= 0 and int(ids[-1]) < vocab
        if not inside or not bool((ids[1:] > ids[:-1]).all()):
            raise TidarError(
                f"a draft vocabulary must be {size} rising token ids from 0 to {vocab - 1}, got "
                f"{len(ids)}: {ids[:3].tolist()} ... {ids[-3:].tolist()}"
            )
        self.d2t.copy_(ids - torch.arange(size))
        self.t2d.zero_()
        self.t2d[ids] = True

    def embedding(self, target: Transformer) -> nn.Embedding:
        """The token embedding its rows are read with."""
        return target.embed if self.embed is None else self.embed

    def fuse(self, tapped: Tensor) -> Tensor:
        """Features `[..., hidden_size]` from what the model's taps gave, `[..., 3 * hidden_size]`."""
        fused: Tensor = self.fc(tapped)
        return fused

    def forward(
        self, embedded: Tensor, features: Tensor, positions: Tensor, attend: Attend
    ) -> Tensor:
        """One pass over rows.

        Args:
            embedded: `[B, N, hidden_size]`, the embedding of each row's token.
            features: `[B, N, hidden_size]`, of the position before that token: fused, or an output.
            positions: int64 `[B, N]`, those of the features.
            attend: as for the model; called once, for layer 0.

        Returns:
            `[B, N, hidden_size]`, before the final norm: the feature of the next row of a draft.
        """
        features = features.to(embedded.dtype)  # autocast answers in another one
        fed = torch.cat((self.layer.attn_norm(embedded), self.hidden_norm(features)), dim=-1)
        kind = features.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else fed.dtype
        cos, sin = self.rotary(positions, cast)
        return self.layer.read(features, fed, cos, sin, attend)

    def draft_logits(self, outputs: Tensor) -> Tensor:
        """`[..., hidden_size]` -> logits over the draft vocabulary, `[..., draft_vocab_size]`."""
        logits: Tensor = self.lm_head(self.norm(outputs))
        return logits

    def logits(self, outputs: Tensor, vocab_size: int, mask_token_id: int | None) -> Tensor:
        """Logits over the model's `vocab_size` tokens, `[..., vocab_size]`; what it does not draft is -inf."""
        drafted = self.draft_logits(outputs)
        wide = drafted.new_full((*drafted.shape[:-1], vocab_size), -torch.inf)
        wide[..., self.target_ids] = drafted
        if mask_token_id is not None:
            wide[..., mask_token_id] = -torch.inf
        return wide

    @torch.no_grad()
    def init_weights(self, target: Transformer, generator: torch.Generator) -> None:
        """Initialise for training, behind `set_vocabulary`; a function of the model and `generator` alone.

        Matrices are drawn as the model's are. The vocabulary projection begins as the model's own rows of
        these tokens and the final norm as the model's: our choice, the source draws the first.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        self.lm_head.weight.copy_(target.head_weight[self.target_ids])
        self.norm.weight.copy_(target.norm.weight)
