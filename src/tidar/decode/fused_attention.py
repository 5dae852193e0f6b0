"""From the merged projection of a step to what the output projection takes: rotary, cache, attention."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.kernels.attention import paged_attention
from tidar.kernels.attention_launch import (
    LaunchConfig,
    attention_workspace,
    can_copy,
    default_splits,
    launch_config,
)
from tidar.kernels.rotary import rotate_and_store
from tidar.model import Layer, Transformer
from tidar.paged_cache import PagedCache, PagedRows


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of a forward pass share: B sequences of W rows, positions `[B * W]`."""

    batch: int
    width: int
    positions: Tensor
    rows: PagedRows


class FusedAttention:
    """For one stream at a time. sms, shared_memory: multiprocessors of the GPU, bytes of each for a program."""

    def __init__(
        self, model: Transformer, cache: PagedCache, *, sms: int, shared_memory: int, pdl: bool
    ) -> None:
        self.cache, self.config = cache, model.config
        self.sms, self.pdl = sms, pdl
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        places = torch.arange(self.config.max_positions, device=self.device).unsqueeze(0)
        self.cos, self.sin = (
            table.flatten(0, 2).contiguous() for table in model.rotary(places, self.dtype)
        )
        # Programmatic launches and the copy engine came with the same GPUs.
        self.copies = pdl and can_copy(self.config.head_dim, cache.page_size, shared_memory)
        self.workspace = attention_workspace(sms, self.config.head_dim, self.device)

    def __call__(
        self,
        index: int,
        layer: Layer,
        qkv: Tensor,
        step: Step,
        *,
        parts: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """`[B * W, num_heads * head_dim]` of layer `index`; rotates qkv `[B * W, ...]` in place.

        parts, bias: what qkv is still to be made from; see `rotate_and_store`.
        """
        config = self.config
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        keys, values = self.cache.keys[index], self.cache.values[index]
        rows, batch, width = step.rows, step.batch, step.width
        rotate_and_store(
            qkv,
            self.cos,
            self.sin,
            step.positions,
            num_heads=heads,
            num_kv_heads=kv_heads,
            q_norm=None if layer.q_norm is None else layer.q_norm.weight,
            k_norm=None if layer.k_norm is None else layer.k_norm.weight,
            eps=config.rms_norm_eps,
            key_pages=keys,
            value_pages=values,
            page_table=rows.page_table,
            prefix_lens=rows.prefix_lens,
            num_drafts=rows.kept,
            rows=width,
            parts=parts,
            bias=bias,
            pdl=self.pdl,
        )
        q, k, v = qkv.view(batch, width, -1, dim).split((heads, kv_heads, kv_heads), dim=2)
        cut = self._cut(width)
        return paged_attention(
            q,
            k,
            v,
            keys,
            values,
            rows.page_table,
            rows.prefix_lens,
            rows.tail,
            splits=self._splits(batch, width, cut),
            workspace=self.workspace,
            config=cut,
            pdl=self.pdl,
        ).flatten(0, 1)

    def _cut(self, width: int) -> LaunchConfig:
        """How attention over steps of this width is cut up."""
        config = self.config
        group = config.num_heads // config.num_kv_heads
        longest, copies = config.max_positions, self.copies
        return launch_config(
            width, group, config.head_dim, self.dtype.itemsize, longest=longest, copies=copies
        )

    def _splits(self, batch: int, width: int, cut: LaunchConfig) -> int:
        """Programs that share the keys of a tile; one captured graph serves all contexts."""
        config = self.config
        group = config.num_heads // config.num_kv_heads
        return default_splits(
            batch, config.num_kv_heads, width, group, cut, self.sms, longest=config.max_positions
        )
