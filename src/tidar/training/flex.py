"""The visibility rule as a FlexAttention `BlockMask`, made fresh for each batch.

`create_block_mask` evaluates the rule through vmap for every pair of rows; here the same rule is
evaluated by broadcasting and reduced to tiles at once, which compiles into one kernel. A test holds
the two equal.
"""

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tidar.attention import Attend, flex_attend
from tidar.errors import TidarError
from tidar.layout import Rows, mask_mod, visible

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.nn.attention.flex_attention import BlockMask

TILE = 128
"""Rows of a tile of the attention kernel."""


def tile_flags(rows: Rows) -> tuple[Tensor, Tensor]:
    """Which tiles are visible in part, and which in full: two int32 `[B, N / TILE, N / TILE]`."""
    batch, length = rows.position.shape
    tiles = length // TILE
    small = rows.apply(lambda attribute: attribute.to(torch.int32))
    query = small.apply(lambda attribute: attribute.view(batch, tiles, TILE, 1, 1))
    key = small.apply(lambda attribute: attribute.view(batch, 1, 1, tiles, TILE))
    count = visible(query, key).to(torch.int32).sum(dim=(2, 4))
    full = count == TILE * TILE
    return ((count > 0) & ~full).to(torch.int32), full.to(torch.int32)


@cache
def _compiled_tile_flags() -> "Callable[[Rows], tuple[Tensor, Tensor]]":
    return torch.compile(tile_flags, dynamic=False)


def _ordered(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Set flags per row, and the key tiles with set ones first: int32 `[B, 1, T]`, `[.., T]`."""
    order = torch.argsort(flags, dim=-1, descending=True, stable=True)
    return (
        flags.sum(dim=-1).to(torch.int32).unsqueeze(1),
        order.to(torch.int32).unsqueeze(1).contiguous(),
    )


def flex_mask(rows: Rows, *, fast: bool = True) -> "BlockMask":
    """The mask of batched rows (`[B, N]`) for `flex_attend`. fast: compile the tile computation.

    Raises TidarError when N is not a multiple of 128: pick seq_len so.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = rows.position.shape[1]
    if length % TILE:
        raise TidarError(
            f"FlexAttention needs a multiple of {TILE} rows, got {length}: "
            f"choose seq_len as a multiple of {TILE}."
        )
    partial, full = (_compiled_tile_flags() if fast else tile_flags)(rows)
    return BlockMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(full),
        BLOCK_SIZE=TILE,
        mask_mod=mask_mod(rows),
        seq_lengths=(length, length),
    )


def separate(attend: Attend) -> Attend:
    """`attend`, given q, k and v in memory of their own.

    The model cuts them from one merged tensor. Compiled FlexAttention on a CPU reads such views
    wrong (torch 2.13) or refuses them (2.11), without a word in its documentation; inside a
    compiled layer the copies are part of the rotary kernel and cost nothing.
    """

    def attend_separately(layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor:
        return attend(layer, q.contiguous(), k.contiguous(), v.contiguous())

    return attend_separately


def flex_training_attend(rows: Rows, *, fast: bool) -> Attend:
    """FlexAttention over these rows, for CUDA."""
    return separate(flex_attend(flex_mask(rows, fast=fast)))
