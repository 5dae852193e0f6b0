"""How the paged attention kernel is cut up, and the memory that it needs for that; free of Triton."""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_SPLITS = 32
"""More parts than that take longer to add up than they save."""

MOST_LANES = 128
"""Lanes of the largest tile."""

COPIED_TILE, COPIED_MEMORY = 64, 160 << 10
"""Keys of a tile that is read by the copy engine; bytes for the tiles in flight of 64 lanes, heads of 128."""

SHORT_CONTEXT, SHORT_SPLITS = 2048, 8
"""Positions up to which a model's contexts count as short, and the most splits there."""


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """How the kernel is cut up: powers of two, but for `num_stages` and `min_share`.

    tile_m: lanes (rows x query heads per key head) of a program, 16 to 128. tile_n: keys per tile,
    at least 16. num_stages: tiles of page numbers and of keys in flight each take half of it, so 2 n + 1
    keeps n tiles of keys and values in flight. min_share: the fewest tiles of keys that make a split.
    per_sm: programs that a multiprocessor may be given where keys are split; times tile_m at most 128, what
    a workspace has room for. copies: the GPU's copy engine reads the tiles of the prefix, see `can_copy`.
    """

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int
    min_share: int
    per_sm: int = 1
    copies: bool = False

    def lane_tiles(self, rows: int, group: int) -> int:
        """Tiles of lanes per sequence and key head."""
        return _tiles(rows * group, self.tile_m)


def can_copy(head_dim: int, page_size: int, shared_memory: int) -> bool:
    """Whether a GPU with a copy engine (Hopper or later) should read the prefix by it.

    A tile of keys lies in one page, vectors are a power of two long, and `shared_memory` bytes hold a program.
    """
    whole = page_size >= COPIED_TILE and head_dim in (16, 32, 64, 128)
    return whole and shared_memory >= COPIED_MEMORY


def launch_config(
    rows: int,
    group: int,
    head_dim: int,
    itemsize: int = 2,
    *,
    longest: int = 1 << 20,
    copies: bool = False,
) -> LaunchConfig:
    """Defaults, measured on one H200; `dataclasses.replace` varies them.

    rows: rows of each sequence; group: query heads per key head; itemsize: bytes per element; longest:
    positions of the model, as one cut serves all contexts. copies: whether `can_copy`.
    """
    lanes = rows * group
    if itemsize > 2:  # float32 has no matrix unit that keeps its precision: right, not fast
        return LaunchConfig(tile_m=16, tile_n=32, num_warps=4, num_stages=3, min_share=2)
    wide = head_dim > 128
    tile_m = 128 if lanes > 1024 and not wide else 16 if lanes <= 16 else 64
    # With short contexts a program has few tiles: what counts is how soon the first one is there.
    short = longest <= SHORT_CONTEXT
    copies = copies and not short and tile_m < 128
    # What is not read ahead by copies: two small programs to a multiprocessor, one computes while one waits.
    paired = tile_m == 64 and not short and not copies
    stages = 5 if copies or (tile_m == 16 and not short) else 3 if tile_m == 16 else 2
    return LaunchConfig(
        tile_m=tile_m,
        tile_n=32 if wide else 64,
        num_warps=8 if tile_m == 128 or wide else 4,
        num_stages=stages,
        min_share=1,
        per_sm=2 if paired else 1,
        copies=copies,
    )


def default_splits(
    batch: int,
    num_kv_heads: int,
    rows: int,
    group: int,
    cut: LaunchConfig,
    num_sms: int,
    *,
    longest: int = 1 << 20,
) -> int:
    """Splits that fill `num_sms` multiprocessors once, but no more than are worth adding up.

    rows, group: as in `launch_config`, which made `cut`. longest: positions of the model.
    """
    programs = batch * num_kv_heads * cut.lane_tiles(rows, group)
    most = SHORT_SPLITS if longest <= SHORT_CONTEXT else MAX_SPLITS
    return max(1, min(num_sms * cut.per_sm // programs, most))


def _tiles(count: int, tile: int) -> int:
    """Tiles that hold `count` things."""
    return -(-count // tile)


@dataclass(frozen=True, slots=True)
class AttentionWorkspace:
    """Parts of the splits that wait to be added up.

    May be shared by all launches on one stream. parts: float32, a vector per split and lane; stats:
    float32, two numbers each.
    """

    parts: Tensor
    stats: Tensor


def attention_workspace(
    programs: int, head_dim: int, device: torch.device | str
) -> AttentionWorkspace:
    """Memory for any launch of up to so many programs of `MOST_LANES` lanes, splits counted.

    Where splits are those of `default_splits`, the number of multiprocessors is enough, and one workspace
    serves all sizes: graphs that were captured with it need it for as long as they live.
    """
    vectors = programs * MOST_LANES
    return AttentionWorkspace(
        torch.empty(vectors * head_dim, dtype=torch.float32, device=device),
        torch.empty(vectors * 2, dtype=torch.float32, device=device),
    )
