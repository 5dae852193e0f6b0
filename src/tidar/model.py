"""The network: one decoder-only transformer for the Llama, Mistral, Qwen2, Qwen3, LLaDA and Dream families.

It has one seam. `model(ids, positions, attend)` returns hidden states, and `attend(layer, q, k, v)`
is any callable: dense training mask, FlexAttention, a cache. The model itself knows nothing of caches or
masks, and RoPE uses the explicit positions only, because clean and mask rows of TiDAR (arXiv
2511.08923) repeat positions and so the row index means nothing.

Numbers follow the modelling files of the families, so that logits are equal in float32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal, Protocol, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tidar.errors import TidarError

ModelType = Literal["llama", "mistral", "qwen2", "qwen3", "llada", "Dream"]
Attention = Literal["causal", "bidirectional"]
SpanAttention = Literal["causal", "full"]
RopeKind = Literal["default", "linear", "yarn", "llama3"]
MODEL_TYPES: Final[tuple[str, ...]] = get_args(ModelType)
ROPE_KINDS: Final[tuple[str, ...]] = get_args(RopeKind)


class Attend(Protocol):
    """The seam between the network and whatever attends."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor:
        """Attend with RoPE already applied.

        Args:
            layer: index of the transformer layer, from 0.
            q: `[B, num_heads, N, head_dim]`.
            k: `[B, num_kv_heads, N, head_dim]`.
            v: `[B, num_kv_heads, N, head_dim]`.

        Returns:
            `[B, num_heads, N, head_dim]`.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding and its long-context scaling; field meanings are those of `transformers`."""

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        """Refuse values that no frequency can be computed from."""
        if self.kind not in ROPE_KINDS:
            raise TidarError(
                f"rope kind {self.kind!r} is not supported; allowed: {', '.join(ROPE_KINDS)}"
            )
        if not (math.isfinite(self.theta) and self.theta > 1.0):
            raise TidarError(f"rope theta must be a finite number above 1, got {self.theta}")
        if not (math.isfinite(self.factor) and self.factor > 0.0):
            raise TidarError(f"rope factor must be a finite number above 0, got {self.factor}")
        if self.kind in ("yarn", "llama3") and not self.original_max_positions:
            raise TidarError(f"rope kind {self.kind!r} needs original_max_positions above 0")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise TidarError(
                "rope kind 'llama3' needs 0 < low_freq_factor < high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """All that decides shapes, arithmetic and how rows are read; made from `config.json` by `tidar.hf_config`.

    attention: how rows saw each other in training; the network itself asks `attend`. label_shift: with bidirectional
    attention, the row before a position predicts it, not the row at it. span_attention: in block diffusion, what
    clean rows saw: those before them, or all of their own span as well.
    """

    model_type: ModelType
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    max_positions: int = 2048
    tie_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)
    mask_token_id: int | None = None
    attention: Attention = "causal"
    label_shift: bool = False
    span_attention: SpanAttention = "causal"

    def __post_init__(self) -> None:
        """Refuse sizes that cannot make a network."""
        if self.model_type not in MODEL_TYPES:
            raise TidarError(
                f"model_type {self.model_type!r} is not supported; "
                f"allowed: {', '.join(MODEL_TYPES)}"
            )
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers",
            "num_heads", "num_kv_heads", "head_dim", "max_positions",
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise TidarError(f"{name} must be a whole number above 0, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise TidarError(
                f"num_heads ({self.num_heads}) must be a multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise TidarError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps > 0):
            raise TidarError(
                f"rms_norm_eps must be a finite number above 0, got {self.rms_norm_eps}"
            )
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise TidarError(
                f"mask_token_id {self.mask_token_id} is outside the vocabulary "
                f"of {self.vocab_size} rows"
            )


def _yarn_frequencies(rope: RopeConfig, dim: int) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071) as in `transformers`: `[dim / 2]` and the attention factor."""
    assert rope.original_max_positions is not None  # RopeConfig checks it
    original = rope.original_max_positions

    def magnitude(scale: float, mscale: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

    attention_factor = rope.attention_factor
    if attention_factor is None:
        if rope.mscale and rope.mscale_all_dim:
            attention_factor = magnitude(rope.factor, rope.mscale) / magnitude(
                rope.factor, rope.mscale_all_dim
            )
        else:
            attention_factor = magnitude(rope.factor)

    def correction_dim(rotations: float) -> float:
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as upstream: keeps the ramp finite
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    wave = rope.theta ** (torch.arange(0, dim, 2).float() / dim)
    keep = 1 - ramp
    return (1.0 / (rope.factor * wave)) * (1 - keep) + (1.0 / wave) * keep, attention_factor


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies of the rotary embedding and the factor on its cosines and sines.

    Returns:
        `[head_dim / 2]` float32 on the CPU, and the attention factor (1.0 for all kinds but yarn).
    """
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, head_dim)
    inv_freq = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    if rope.kind == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.kind == "llama3":
        assert rope.original_max_positions is not None  # RopeConfig checks it
        original, low, high = (
            rope.original_max_positions,
            rope.low_freq_factor,
            rope.high_freq_factor,
        )
        wavelen = 2 * math.pi / inv_freq
        scaled = torch.where(wavelen > original / low, inv_freq / rope.factor, inv_freq)
        smooth = (original / wavelen - low) / (high - low)
        between = (1 - smooth) * scaled / rope.factor + smooth * scaled
        is_between = (wavelen >= original / high) & (wavelen <= original / low)
        inv_freq = torch.where(is_between, between, scaled)
    return inv_freq, 1.0


class RotaryEmbedding(nn.Module):
    """Cosines and sines for explicit positions, always computed in float32."""

    inv_freq: Tensor

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self.rope = rope
        self.head_dim = head_dim
        frequencies, self.scale = self._signed_frequencies()
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def _signed_frequencies(self) -> tuple[Tensor, float]:
        """`[head_dim]`: the frequencies negated, then as they are.

        cos(-x) = cos(x) and sin(-x) = -sin(x), so the minus sign of RoPE's rotate-half is in the
        sine already and a layer only has to swap the halves.
        """
        with torch.device("cpu"):
            frequencies, scale = rope_frequencies(self.rope, self.head_dim)
            return torch.cat((-frequencies, frequencies)), scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move along, but never lose precision: `.to(bfloat16)` would round the frequencies."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.inv_freq = self._signed_frequencies()[0].to(self.inv_freq.device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`positions` `[B, N]` -> cosines and signed sines `[B, N, 1, head_dim]` in `dtype`."""
        angles = positions[..., None, None].float() * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.scale != 1.0:
            cos, sin = cos * self.scale, sin * self.scale
        return cos.to(dtype), sin.to(dtype)


class Layer(nn.Module):
    """One transformer layer with merged projections: q, k, v in one, gate and up in another."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        self.index = index
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_heads,
            config.num_kv_heads,
            dim,
        )
        self.attn_norm = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
        rows = (config.num_heads + 2 * config.num_kv_heads) * dim
        self.qkv = nn.Linear(hidden, rows, bias=config.attention_bias)
        self.q_norm = nn.RMSNorm(dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.o = nn.Linear(config.num_heads * dim, hidden, bias=config.output_bias)
        self.mlp_norm = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
        self.gate_up = nn.Linear(hidden, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, hidden, bias=config.mlp_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """`x` `[B, N, hidden_size]`, cosines and sines -> `[B, N, hidden_size]`."""
        return self.read(x, self.attn_norm(x), cos, sin, attend)

    def read(self, x: Tensor, normed: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """The layer on the residual stream `x`, its attention fed `normed` `[B, N, width of qkv]`.

        That is the norm of `x`, but for an EAGLE head (`tidar.eagle_head`), which reads more.
        """
        x = x + self.o(self._attention(normed, cos, sin, attend))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """`[B, N, width of qkv]` -> `[B, N, num_heads * head_dim]`, before the output projection."""
        batch, rows, _ = x.shape
        heads, rotated = self.num_heads, self.num_heads + self.num_kv_heads
        qkv = self.qkv(x).view(batch, rows, rotated + self.num_kv_heads, self.head_dim)
        qk = qkv[:, :, :rotated]
        if self.q_norm is not None and self.k_norm is not None:
            # Under autocast the projection is bfloat16 and the norm's weight float32, which has no
            # fused norm; attend is promised one dtype. Both casts are free otherwise.
            wide = qk.to(self.q_norm.weight.dtype)
            normed = (self.q_norm(wide[:, :, :heads]), self.k_norm(wide[:, :, heads:]))
            qk = torch.cat(normed, dim=2).to(qkv.dtype)
        # q and k are rotated together, in one pass; swapping halves plus the signed sine is
        # rotate-half.
        first, second = qk.chunk(2, dim=-1)
        qk = torch.addcmul(qk * cos, torch.cat((second, first), dim=-1), sin).transpose(1, 2)
        out = attend(self.index, qk[:, :heads], qk[:, heads:], qkv[:, :, rotated:].transpose(1, 2))
        return out.transpose(1, 2).reshape(batch, rows, heads * self.head_dim)


class Transformer(nn.Module):
    """Embedding, layers, final norm and vocabulary projection.

    Attributes:
        config: sizes and the mask token id.
        gradient_checkpointing: recompute each layer in the backward pass; used in training mode
            only.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        tied = config.tie_embeddings
        self.head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    if TYPE_CHECKING:

        def __call__(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor: ...

    @property
    def head_weight(self) -> Tensor:
        """`[vocab_size, hidden_size]`: projection to the vocabulary, the embedding when tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run all rows through the network.

        Args:
            ids: `[B, N]` token ids.
            positions: `[B, N]` positions for RoPE; below `config.max_positions`, which is not
                checked here because looking at values would stall an accelerator.
            attend: what attends; called once per layer in order.

        Returns:
            `[B, N, hidden_size]` after the final norm.
        """
        return self.forward_with_taps(ids, positions, attend, ())[0]

    def forward_with_taps(
        self, ids: Tensor, positions: Tensor, attend: Attend, taps: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """`forward`, and the outputs of the layers named in `taps`, in the order of `taps`.

        A tap is the residual stream `[B, N, hidden_size]` after that layer, before the final norm
        (what EAGLE-3 heads read).

        Raises:
            TidarError: a tap names no layer.
        """
        for tap in taps:
            if not 0 <= tap < self.config.num_layers:
                raise TidarError(
                    f"tap {tap} names no layer; allowed: 0 to {self.config.num_layers - 1}"
                )
        x = self.embed(ids)
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        # Under autocast the projections answer in the autocast dtype; q, k and v must leave in one
        # dtype.
        cos, sin = self.rotary(positions, torch.get_autocast_dtype(kind) if autocast else x.dtype)
        seen: dict[int, Tensor] = {}
        recompute = self.gradient_checkpointing and self.training
        for index, layer in enumerate(self.layers):
            if recompute:
                x = checkpoint(layer, x, cos, sin, attend, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attend)
            if index in taps:
                seen[index] = x
        return self.norm(x), [seen[tap] for tap in taps]

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """`[..., hidden_size]` -> `[..., vocab_size]`, the mask token's logit left as it is.

        For losses that mask it themselves, and for comparing weights. Never for choosing a token.
        """
        return F.linear(hidden, self.head_weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., hidden_size]` -> `[..., vocab_size]`, the mask token's logit `-inf`.

        `-inf` in every reading, causal ones included, so that no method can emit the mask token and
        the causal distribution is one and the same for all methods.
        """
        logits = self.raw_logits(hidden)
        if self.config.mask_token_id is not None:
            logits.select(-1, self.config.mask_token_id).fill_(-torch.inf)
        return logits

    def set_mask_token(self, mask_token_id: int | None) -> None:
        """Name the mask token, or none. Raises TidarError for an id outside the vocabulary."""
        self.config = replace(self.config, mask_token_id=mask_token_id)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, std: float = 0.02) -> None:
        """Initialise in place for training from scratch; a function of `generator`'s state alone.

        Projections into the residual stream get `std / sqrt(2 * num_layers)` (GPT-2's rule), so
        that the stream's variance does not grow with depth.
        """
        residual = std / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                into_stream = name.endswith((".o.weight", ".down.weight"))
                parameter.normal_(0.0, residual if into_stream else std, generator=generator)


def _layer_matrix_parameters(config: ModelConfig) -> int:
    """Weights of the matrices of one layer, without biases and norms."""
    rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    attention = config.hidden_size * (rows + config.num_heads * config.head_dim)
    return attention + 3 * config.hidden_size * config.intermediate_size


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the network, a tied embedding counted once."""
    rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = _layer_matrix_parameters(config) + 2 * config.hidden_size
    layer += config.attention_bias * rows + config.output_bias * config.hidden_size
    layer += config.mlp_bias * (2 * config.intermediate_size + config.hidden_size)
    layer += config.qk_norm * 2 * config.head_dim
    embeddings = (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size
    return config.num_layers * layer + config.hidden_size + embeddings


def flops_per_row(config: ModelConfig, visible_keys: float, *, head: bool = True) -> float:
    """Floating point operations of one forward row, a multiply-add counted as two.

    Args:
        config: the network.
        visible_keys: keys that the row attends to, on average (half the length for plain causal
            rows).
        head: whether the row is projected to the vocabulary.

    Returns:
        Forward operations; training costs three times as many (four with gradient checkpointing,
        though recomputation is by custom not counted in model FLOPs utilisation).
    """
    attention = 4.0 * config.num_heads * config.head_dim * visible_keys
    layers = config.num_layers * (2.0 * _layer_matrix_parameters(config) + attention)
    return layers + (2.0 * config.hidden_size * config.vocab_size if head else 0.0)
