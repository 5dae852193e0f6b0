"""The network of a decode step in fused kernels, for a GPU; the weights are the model's own tensors.

Three ways through a layer, by the number of rows. One: products at the speed of the memory, with norms,
biases, activation and residual inside. Up to 128: products by matrix units whose parts the next
launch adds up. More, or weights that those kernels do not take: cuBLAS and small kernels between. The
kernels are launched so that each starts while the one before it ends (programmatic dependent launch),
where the GPU can do that.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar.decode.fused_attention import FusedAttention, Step
from tidar.errors import TidarError
from tidar.kernels import linear, parts
from tidar.kernels.between import add_parts, embed_rows, gated, rms_norm
from tidar.kernels.choose import ChooseWorkspace, choose_rows, choose_workspace
from tidar.kernels.linear import linear_row
from tidar.kernels.parts import PartsConfig, gated_linear, linear_parts
from tidar.model import Layer, Transformer
from tidar.paged_cache import PagedCache, PagedRows
from tidar.sampling import RowParams
from tidar.sampling import choose_rows as choose_filtered

INTERPRETED_SMS = 4
"""Stands in for the GPU's multiprocessors where the kernels run in Triton's interpreter."""

HOPPER = (9, 0)

PARTS_ROWS = 128
"""Rows up to which products in parts are used."""

SMALL_HEAD = 10_000_000
"""Weights of a vocabulary projection up to which its logits are float32, from kernels of this package."""


class FusedBackend:
    """See `tidar.decode.slots.Backend`. For one stream at a time; workspaces are kept by size."""

    def __init__(self, model: Transformer, cache: PagedCache) -> None:
        self.model, self.config = model, model.config
        weight = next(model.parameters())
        self.device, self.itemsize = weight.device, weight.dtype.itemsize
        self.layers = [layer for layer in model.layers if isinstance(layer, Layer)]
        if len(self.layers) < len(model.layers):
            raise TidarError(
                "The fused network reads the weights of plain layers, and some of this model's are wrapped "
                "(by torch.compile, perhaps): give it the model as it was loaded."
            )
        self.sms, self.pdl = INTERPRETED_SMS, False
        self.shared_memory = parts.SHARED_MEMORY
        if self.device.type == "cuda":
            self.sms = torch.cuda.get_device_properties(self.device).multi_processor_count
            self.shared_memory = parts.device_shared_memory(self.device)
            self.pdl = torch.cuda.get_device_capability(self.device) >= HOPPER
        self.attention = FusedAttention(
            model, cache, sms=self.sms, shared_memory=self.shared_memory, pdl=self.pdl
        )
        self.aligned = all(
            parts.aligned(matrix.weight)
            for layer in self.layers
            for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down)
        )
        head = model.head_weight
        self.small_head = head.numel() <= SMALL_HEAD and parts.aligned(head)
        self._choosing: dict[int, ChooseWorkspace] = {}
        self._normed = False  # whether what `forward` last returned has the final norm

    def forward(self, ids: Tensor, positions: Tensor, rows: PagedRows) -> Tensor:
        """Hidden states `[B, W, hidden_size]`; of one row without the final norm, which `logits` adds."""
        batch, width = ids.shape
        step = Step(batch, width, positions.flatten().contiguous(), rows)
        count, tokens = batch * width, ids.flatten()
        self._normed = count > 1
        if not self._normed:
            hidden = self._layers_of_row(tokens, step)
        elif count <= PARTS_ROWS and self.aligned:
            hidden = self._layers_by_parts(tokens, step)
        else:
            hidden = self._layers_by_cublas(tokens, step)
        return hidden.view(batch, width, -1)

    def choose(self, hidden: Tensor, params: RowParams, positions: Tensor) -> Tensor:
        """See `Backend`."""
        if params.top_k is not None:  # sorts the vocabulary: PyTorch's, in the same graph
            return choose_filtered(self.logits(hidden), params, positions)
        logits, mask = self._project(hidden), self.config.mask_token_id
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

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Backend`."""
        logits, mask = self._project(hidden), self.config.mask_token_id
        if mask is not None:
            logits[:, mask] = -torch.inf
        return logits

    def _project(self, hidden: Tensor) -> Tensor:
        """Logits `[N, V]`; that of the mask token is still to be dropped."""
        head, norm = self.model.head_weight, self.model.norm.weight
        hidden = hidden.contiguous()
        if len(hidden) == 1:
            dtype = torch.float32 if self.small_head else head.dtype
            out = torch.empty(1, len(head), dtype=dtype, device=self.device)
            return self._row(hidden, head, norm_weight=None if self._normed else norm, out=out)
        assert self._normed, "so many rows come from a forward pass of so many"
        if not self.small_head:
            return F.linear(hidden, head)
        whole = replace(self._cut(hidden[: parts.MAX_ROWS], head), splits=1)
        logits = [
            linear_parts(some, head, config=whole, pdl=self.pdl)[0]
            for some in hidden.split(parts.MAX_ROWS)
        ]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _layers_of_row(self, ids: Tensor, step: Step) -> Tensor:
        """The residual stream `[1, hidden_size]` behind all layers."""
        x, _ = embed_rows(ids, self.model.embed.weight, pdl=self.pdl)
        for index, layer in enumerate(self.layers):
            norm, mlp_norm = layer.attn_norm.weight, layer.mlp_norm.weight
            qkv = self._row(x, layer.qkv.weight, bias=layer.qkv.bias, norm_weight=norm)
            attended = self.attention(index, layer, qkv, step)
            self._row(attended, layer.o.weight, bias=layer.o.bias, residual=x)
            inner = self._row(
                x,
                layer.gate_up.weight,
                bias=layer.gate_up.bias,
                norm_weight=mlp_norm,
                gated_pairs=True,
            )
            self._row(inner, layer.down.weight, bias=layer.down.bias, residual=x)
        return x

    def _layers_by_parts(self, ids: Tensor, step: Step) -> Tensor:
        """Normed hidden states `[up to 128, hidden_size]` behind all layers."""
        norms = [*(layer.attn_norm.weight for layer in self.layers), self.model.norm.weight]
        x, normed = embed_rows(
            ids,
            self.model.embed.weight,
            norm_weight=norms[0],
            eps=self.config.rms_norm_eps,
            pdl=self.pdl,
        )
        for index, layer in enumerate(self.layers):
            products = self._parts(normed, layer.qkv.weight)
            qkv = x.new_empty(products.shape[1:])
            attended = self.attention(index, layer, qkv, step, parts=products, bias=layer.qkv.bias)
            products = self._parts(attended, layer.o.weight)
            normed = self._add(products, x, layer.o.bias, layer.mlp_norm.weight)
            inner = self._inner(normed, layer)
            products = self._parts(inner, layer.down.weight)
            normed = self._add(products, x, layer.down.bias, norms[index + 1])
        return normed

    def _layers_by_cublas(self, ids: Tensor, step: Step) -> Tensor:
        """Normed hidden states `[M, hidden_size]` behind all layers."""
        x, _ = embed_rows(ids, self.model.embed.weight, pdl=self.pdl)
        for index, layer in enumerate(self.layers):
            normed = self._norm(x, layer.attn_norm.weight)
            qkv = F.linear(normed, layer.qkv.weight, layer.qkv.bias)
            attended = self.attention(index, layer, qkv, step)
            _add_product(x, attended, layer.o.weight, layer.o.bias)
            normed = self._norm(x, layer.mlp_norm.weight)
            inner = gated(F.linear(normed, layer.gate_up.weight, layer.gate_up.bias), pdl=self.pdl)
            _add_product(x, inner, layer.down.weight, layer.down.bias)
        return self._norm(x, self.model.norm.weight)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.config.rms_norm_eps, pdl=self.pdl)

    def _row(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        norm_weight: Tensor | None = None,
        residual: Tensor | None = None,
        gated_pairs: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """A linear layer of one row with what surrounds it; a residual is changed in place."""
        return linear_row(
            x,
            weight,
            bias=bias,
            norm_weight=norm_weight,
            eps=self.config.rms_norm_eps,
            residual=residual,
            gated=gated_pairs,
            config=linear.default_config(*weight.shape, gated_pairs, pdl=self.pdl),
            out=residual if out is None else out,
        )

    def _parts(self, x: Tensor, weight: Tensor) -> Tensor:
        """Parts of a product, float32 `[splits, M, N]`."""
        return linear_parts(x, weight, config=self._cut(x, weight), pdl=self.pdl)

    def _inner(self, x: Tensor, layer: Layer) -> Tensor:
        """The activated inside of the MLP, `[M, intermediate_size]`."""
        weight, bias = layer.gate_up.weight, layer.gate_up.bias
        config = self._cut(x, weight, gated_pairs=True)
        return gated_linear(x, weight, bias, config=config, pdl=self.pdl)

    def _add(self, products: Tensor, x: Tensor, bias: Tensor | None, norm_weight: Tensor) -> Tensor:
        """Takes a product into the residual stream x; returns its norm."""
        eps = self.config.rms_norm_eps
        return add_parts(products, x, bias=bias, norm_weight=norm_weight, eps=eps, pdl=self.pdl)

    def _cut(self, x: Tensor, weight: Tensor, *, gated_pairs: bool = False) -> PartsConfig:
        return parts.default_config(
            len(x),
            *weight.shape,
            gated_pairs,
            itemsize=self.itemsize,
            sms=self.sms,
            shared_memory=self.shared_memory,
        )


def _add_product(stream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Adds a linear layer of x to the residual stream."""
    stream.addmm_(x, weight.t())
    if bias is not None:
        stream.add_(bias)
