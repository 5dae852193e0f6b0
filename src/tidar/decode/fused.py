"""The network of a decode step in fused kernels and cuBLAS, for a GPU.

One or two rows: five launches a layer, all of them weight reads at the speed of the memory. More rows:
cuBLAS for the products, which no kernel of ours beat from 3 rows on (LOG.md), and small kernels between
them. The weights are the model's own tensors. The kernels are launched so that each starts while the one
before it ends (programmatic dependent launch), where the GPU can do that.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tidar.kernels.attention import paged_attention
from tidar.kernels.attention_launch import (
    AttentionWorkspace,
    LaunchConfig,
    attention_workspace,
    default_splits,
    launch_config,
)
from tidar.kernels.between import gated, rms_norm
from tidar.kernels.choose import ChooseWorkspace, choose_rows, choose_workspace
from tidar.kernels.linear import MAX_ROWS, default_config, small_linear
from tidar.kernels.rotary import rotate_and_store
from tidar.model import Layer, Transformer
from tidar.paged_cache import PagedCache, PagedRows
from tidar.sampling import RowParams
from tidar.sampling import choose_rows as choose_filtered

INTERPRETED_SMS = 4
"""Stands in for the GPU's multiprocessors where the kernels run in Triton's interpreter."""

HOPPER = (9, 0)


class FusedBackend:
    """See `tidar.decode.slots.Backend`. For one stream at a time; workspaces are kept by size."""

    def __init__(self, model: Transformer, cache: PagedCache) -> None:
        self.model, self.cache, self.config = model, cache, model.config
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.layers = [layer for layer in model.layers if isinstance(layer, Layer)]
        places = torch.arange(self.config.max_positions, device=self.device).unsqueeze(0)
        self.cos, self.sin = (
            table.flatten(0, 2).contiguous() for table in model.rotary(places, self.dtype)
        )
        self.sms, self.pdl = INTERPRETED_SMS, False
        if self.device.type == "cuda":
            self.sms = torch.cuda.get_device_properties(self.device).multi_processor_count
            self.pdl = torch.cuda.get_device_capability(self.device) >= HOPPER
        self._attention: dict[tuple[int, int], tuple[int, AttentionWorkspace | None]] = {}
        self._choosing: dict[int, ChooseWorkspace] = {}

    def forward(self, ids: Tensor, positions: Tensor, rows: PagedRows) -> Tensor:
        """Residual stream `[B, W, hidden_size]` behind the last layer; `choose` applies the final norm."""
        batch, width = ids.shape
        flat = positions.flatten().contiguous()
        x = F.embedding(ids.flatten(), self.model.embed.weight)
        for index, layer in enumerate(self.layers):
            attended = self._attend(index, layer, x, flat, rows, batch, width)
            x = self._linear(attended, layer.o, residual=x)
            inner = self._linear(x, layer.gate_up, norm=layer.mlp_norm, gated_pairs=True)
            x = self._linear(inner, layer.down, residual=x)
        return x.view(batch, width, -1)

    def choose(self, hidden: Tensor, params: RowParams, positions: Tensor) -> Tensor:
        """See `Backend`."""
        logits = self._project(hidden)
        mask = self.config.mask_token_id
        if params.top_k is not None:  # sorts the vocabulary: PyTorch's, in the same graph
            if mask is not None:
                logits[:, mask] = -torch.inf
            return choose_filtered(logits, params, positions)
        rows = len(logits)
        if rows not in self._choosing:
            self._choosing[rows] = choose_workspace(rows, self.config.vocab_size, self.device)
        return choose_rows(
            logits,
            positions,
            params.seeds,
            params.temperatures,
            -1 if mask is None else mask,
            workspace=self._choosing[rows],
            pdl=self.pdl,
        )

    def _attend(
        self,
        index: int,
        layer: Layer,
        x: Tensor,
        positions: Tensor,
        rows: PagedRows,
        batch: int,
        width: int,
    ) -> Tensor:
        """From the residual stream `[B * W, hidden_size]` to what the output projection takes."""
        config = self.config
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        keys, values = self.cache.keys[index], self.cache.values[index]
        qkv = self._linear(x, layer.qkv, norm=layer.attn_norm)
        rotate_and_store(
            qkv,
            self.cos,
            self.sin,
            positions,
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
            pdl=self.pdl,
        )
        q, k, v = qkv.view(batch, width, -1, dim).split((heads, kv_heads, kv_heads), dim=2)
        splits, workspace = self._attention_plan(batch, width)
        return paged_attention(
            q,
            k,
            v,
            keys,
            values,
            rows.page_table,
            rows.prefix_lens,
            rows.tail,
            splits=splits,
            workspace=workspace,
            config=self._cut(batch, width),
            pdl=self.pdl,
        ).flatten(0, 1)

    def _project(self, hidden: Tensor) -> Tensor:
        """Logits `[N, V]` of rows of the residual stream."""
        head, norm = self.model.head_weight, self.model.norm
        if len(hidden) <= MAX_ROWS:
            return self._small(hidden, head, norm_weight=norm.weight)
        hidden = rms_norm(hidden.contiguous(), norm.weight, self.config.rms_norm_eps, pdl=self.pdl)
        return F.linear(hidden, head)

    def _linear(
        self,
        x: Tensor,
        linear: nn.Linear,
        *,
        norm: nn.RMSNorm | None = None,
        residual: Tensor | None = None,
        gated_pairs: bool = False,
    ) -> Tensor:
        """A linear layer of rows `[M, K]` with what surrounds it; a residual is changed in place."""
        if len(x) <= MAX_ROWS:
            return self._small(
                x,
                linear.weight,
                bias=linear.bias,
                norm_weight=None if norm is None else norm.weight,
                residual=residual,
                gated_pairs=gated_pairs,
            )
        if norm is not None:
            x = rms_norm(x, norm.weight, self.config.rms_norm_eps, pdl=self.pdl)
        if residual is not None:
            residual.addmm_(x, linear.weight.t())
            return residual if linear.bias is None else residual.add_(linear.bias)
        out = F.linear(x, linear.weight, linear.bias)
        return gated(out, pdl=self.pdl) if gated_pairs else out

    def _small(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        norm_weight: Tensor | None = None,
        residual: Tensor | None = None,
        gated_pairs: bool = False,
    ) -> Tensor:
        return small_linear(
            x,
            weight,
            bias=bias,
            norm_weight=norm_weight,
            eps=self.config.rms_norm_eps,
            residual=residual,
            gated=gated_pairs,
            config=default_config(len(x), *weight.shape, gated_pairs, pdl=self.pdl),
            out=residual,
        )

    def _cut(self, batch: int, width: int) -> LaunchConfig:
        """How attention over steps of this size is cut up."""
        config = self.config
        group, heads = config.num_heads // config.num_kv_heads, batch * config.num_kv_heads
        return launch_config(width, group, config.head_dim, self.dtype.itemsize, heads=heads)

    def _attention_plan(self, batch: int, width: int) -> tuple[int, AttentionWorkspace | None]:
        """Splits and their memory for steps up to this size; one captured graph serves all contexts."""
        config = self.config
        group = config.num_heads // config.num_kv_heads
        cut = self._cut(batch, width)
        tiles = cut.lane_tiles(width, group)
        splits = default_splits(batch, config.num_kv_heads, tiles, self.sms, tile_m=cut.tile_m)
        if splits == 1:
            return 1, None
        # Widths are rounded up, so that prompts of all lengths share a few workspaces.
        key = (batch, 1 << (width - 1).bit_length())
        if key not in self._attention or self._attention[key][0] < splits:
            workspace = attention_workspace(
                key[0],
                key[1],
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                splits,
                self.device,
            )
            self._attention[key] = (splits, workspace)
        return splits, self._attention[key][1]
