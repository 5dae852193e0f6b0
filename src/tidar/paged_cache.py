"""The paged KV cache: keys and values of many sequences in pages of one size, named by page tables.

Who owns which page is decided elsewhere (`tidar.decode.pages`); here is only the storage. The slot of
position p of a sequence is slot p % page_size of page table[p // page_size]. Draft rows are stored
straight to the slots of their positions: committing n of them copies nothing, those of rejected rows are
overwritten by the next step and never visible before. Mask rows are never stored. Page 0 belongs to
nobody and takes what nobody will read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.attention import Attend
from tidar.gpu_memory import OutOfMemory, check_fits
from tidar.kernels.reference import paged_attention_reference
from tidar.model import ModelConfig

SLACK_BYTES = 512 << 20
"""GPU memory left alone at start-up: captured graphs, logits and workspaces live in it."""


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Where the W rows of each of B sequences stand in a forward pass.

    page_table: int32 `[B, max_pages]`. prefix_lens: int32 `[B]`, committed tokens. tail: int32 `[3, W]`,
    `Tail.attributes`. kept: so many first rows have their keys and values stored.
    """

    page_table: Tensor
    prefix_lens: Tensor
    tail: Tensor
    kept: int


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page, keys and values of all layers."""
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return per_token * page_size * dtype.itemsize


class PagedCache:
    """Mutable storage: `keys` and `values`, per layer `[num_pages, num_kv_heads, page_size, head_dim]`.

    Raises TidarError when the device has not enough memory for `num_pages`.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        _check_fits(page_bytes(config, page_size, dtype), num_pages, page_size, device)
        shape = (config.num_layers, num_pages, config.num_kv_heads, page_size, config.head_dim)
        with OutOfMemory(f"making the KV cache ({num_pages} pages)", device, "Lower cache_tokens."):
            self._keys = torch.zeros(shape, device=device, dtype=dtype)
            self._values = torch.zeros(shape, device=device, dtype=dtype)
        self.keys, self.values = list(self._keys), list(self._values)

    @property
    def bytes(self) -> int:
        """Memory of the cache."""
        return 2 * self._keys.numel() * self._keys.element_size()

    def attend(self, rows: PagedRows) -> Attend:
        """The attend closure of one forward pass in plain PyTorch, for any device."""
        batch, width = len(rows.prefix_lens), rows.tail.shape[-1]
        places = rows.prefix_lens.long().unsqueeze(1) + torch.arange(
            rows.kept, device=rows.prefix_lens.device
        )
        index = places // self.page_size
        inside = index < rows.page_table.shape[1]
        pages = rows.page_table.long().gather(1, index.clamp(max=rows.page_table.shape[1] - 1))
        pages = torch.where(inside, pages, 0)
        slots = places % self.page_size

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            out = paged_attention_reference(
                q.transpose(1, 2),
                k,
                v,
                self.keys[layer],
                self.values[layer],
                rows.page_table,
                rows.prefix_lens,
                rows.tail,
            )
            self.keys[layer][pages, :, slots] = k[:, : rows.kept]
            self.values[layer][pages, :, slots] = v[:, : rows.kept]
            return out.view(batch, width, q.shape[1], q.shape[3]).transpose(1, 2)

        return attend

    def entries(self, table: tuple[int, ...], length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` positions, each `[layers, num_kv_heads, length, head_dim]`."""
        pages = torch.tensor(table, device=self._keys.device)
        keys, values = (
            stored[:, pages].transpose(1, 2).flatten(2, 3)[:, :, :length]
            for stored in (self._keys, self._values)
        )
        return keys, values


def _check_fits(per_page: int, num_pages: int, page_size: int, device: torch.device) -> None:
    def advice(room: int) -> str:
        fitting = max(room // per_page - 1, 0) * page_size  # page 0 is nobody's
        if not fitting:
            return "Not one page fits: load a smaller model, or in bfloat16."
        lower = f"Lower cache_tokens to {fitting:,} or less (--batch and --context set it)"
        return f"{lower}, or load a smaller model, or in bfloat16."

    what = f"the KV cache of {(num_pages - 1) * page_size:,} positions ({num_pages} pages)"
    check_fits(what, per_page * num_pages, device, advice, left_alone=SLACK_BYTES)
