"""Times how the kernels of a decode step are cut up, beside the defaults: the sweeps behind those defaults.

    python benchmarks/kernel_cuts.py products --shape qwen2.5-1.5b --rows 80
    python benchmarks/kernel_cuts.py attention --shape qwen3-8b --rows 1,80 --context 1024,8192

Each launch stands in a CUDA graph behind launches like it, over so much memory that no cache serves it, and
may overlap with them as in a real step. Microseconds, medians. Without a GPU the kernels run in Triton's
interpreter (TRITON_INTERPRET=1): that shows that the script works, and nothing about speed.

Compiling takes longer than timing. Run `--share 0/8` to `--share 7/8` at the same time first: each compiles
an eighth of the cuts (Triton keeps them), and what these runs print is not to be used.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

from tidar.bench.shapes import find_shape
from tidar.hf_config import config_from_hf, read_json
from tidar.kernels.attention import paged_attention
from tidar.kernels.attention_launch import (
    MAX_SPLITS,
    MOST_LANES,
    LaunchConfig,
    attention_workspace,
    can_copy,
    default_splits,
    launch_config,
)
from tidar.kernels.parts import (
    PartsConfig,
    default_config,
    device_shared_memory,
    gated_linear,
    linear_parts,
)
from tidar.layout import build_tail
from tidar.model import ModelConfig

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
CACHE_BYTES = 256 << 20
REPEATS = 5 if CUDA else 1
PAGE = 64

Launch = Callable[[int], object]
"""Launches once; the number says over which of the copies."""


def microseconds(launch: Launch, count: int) -> float:
    """Of one of `count` launches in a row."""
    launch(0)
    if not CUDA:
        began = time.perf_counter()
        launch(0)
        return (time.perf_counter() - began) * 1e6
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            launch(index)
    graph.replay()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(2):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 2 / count * 1e3)
    return statistics.median(times)


def report(
    title: str, named: Iterable[tuple[str, Launch]], count: int, best: int, share: tuple[int, int]
) -> None:
    """Prints the default, which comes first, and the fastest of the others. share: (i, n), those i modulo n."""
    timed = []
    for index, (name, launch) in enumerate(named):
        if index > 0 and index % share[1] != share[0]:
            continue
        try:
            timed.append((microseconds(launch, count), name))
        except Exception as error:  # a cut may ask for more than this GPU has
            print(f"  {name}: {str(error).splitlines()[0][:100]}")
    print(f"{title}\n  default {timed[0][0]:.2f}  {timed[0][1]}")
    for value, name in sorted(timed[1:])[:best]:
        print(f"          {value:.2f}  {name}")


def matrices(config: ModelConfig) -> Iterator[tuple[str, int, int, bool]]:
    """The products of a layer: name, weight rows, columns, whether gated."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_heads * config.head_dim
    yield "qkv", heads + 2 * config.num_kv_heads * config.head_dim, hidden, False
    yield "o", hidden, heads, False
    yield "gate_up", 2 * inner, hidden, True
    yield "down", hidden, inner, False


def product_cuts(rows: int, n: int, k: int, gated: bool) -> Iterator[PartsConfig]:
    """The default, then what is worth trying."""
    first = default_config(rows, n, k, gated, itemsize=DTYPE.itemsize)
    yield first
    row_tiles = {first.row_tile, 32, 128}
    for tile_n, tile_k, stages, warps, row_tile in product(
        (32, 64, 128), (64, 128), (2, 3, 4, 5), (4, 8), row_tiles
    ):
        for splits in {1} if gated else {first.splits, 2 * first.splits, -(-first.splits // 2)}:
            steps = -(-k // tile_k)
            splits = -(-steps // -(-steps // min(splits, steps)))
            yield PartsConfig(
                tile_n=tile_n,
                tile_k=tile_k,
                splits=splits,
                row_tile=row_tile,
                num_stages=stages,
                num_warps=warps,
            )


def time_products(config: ModelConfig, rows: int, best: int, share: tuple[int, int]) -> None:
    for name, n, k, gated in matrices(config):
        count = max(2, CACHE_BYTES // (n * k * DTYPE.itemsize)) if CUDA else 1
        weights = [torch.randn(n, k, device=DEVICE, dtype=DTYPE) * 0.02 for _ in range(count)]
        x = torch.randn(rows, k, device=DEVICE, dtype=DTYPE)

        def launch(cut: PartsConfig, w: list[torch.Tensor], x: torch.Tensor, g: bool) -> Launch:
            if g:
                return lambda i: gated_linear(x, w[i % len(w)], None, config=cut, pdl=CUDA)
            return lambda i: linear_parts(x, w[i % len(w)], config=cut, pdl=CUDA)

        cuts = dict.fromkeys(product_cuts(rows, n, k, gated))
        named = [(str(cut), launch(cut, weights, x, gated)) for cut in cuts]
        named = named if CUDA else named[:2]
        title = f"{name} {n} x {k}, {rows} rows"
        if CUDA:
            plain = microseconds(lambda i: F.linear(x, weights[i % count]), max(24, count))  # noqa: B023
            title += f"; cuBLAS {plain:.2f}{' without the activation' if gated else ''}"
        report(title, named, max(24, count), best, share)


def attention_cuts(rows: int, config: ModelConfig) -> Iterator[tuple[LaunchConfig, int]]:
    """The default with its splits, then what is worth trying."""
    group, longest = config.num_heads // config.num_kv_heads, config.max_positions
    sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count if CUDA else 4
    copies = (
        CUDA
        and torch.cuda.get_device_capability(DEVICE) >= (9, 0)
        and can_copy(config.head_dim, PAGE, device_shared_memory(torch.device(DEVICE)))
    )
    first = launch_config(
        rows, group, config.head_dim, DTYPE.itemsize, longest=longest, copies=copies
    )

    def splits_of(cut: LaunchConfig) -> int:
        return default_splits(1, config.num_kv_heads, rows, group, cut, sms, longest=longest)

    yield first, max(2, splits_of(first))
    tiles = (16, 64) if rows * group <= 64 else (64, 128)
    readers = [(by_copies, count) for by_copies in {False, copies} for count in (1, 2)]
    for tile_m, tile_n, stages, share, (by_copies, per_sm) in product(
        tiles, (32, 64), (2, 3, 5), (1, 2, 4), readers
    ):
        if tile_m * per_sm > MOST_LANES:
            continue
        warps = 8 if tile_m == 128 else 4
        cut = replace(
            first,
            tile_m=tile_m,
            tile_n=tile_n,
            num_warps=warps,
            num_stages=stages,
            min_share=share,
            per_sm=per_sm,
            copies=by_copies,
        )
        for splits in {splits_of(cut), splits_of(cut) // 2, 2 * splits_of(cut)}:
            yield cut, min(MAX_SPLITS, max(2, splits))


def time_attention(
    config: ModelConfig, rows: int, context: int, best: int, share: tuple[int, int]
) -> None:
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    pages = context // PAGE + 4
    layers = config.num_layers if CUDA else 1
    shape = (layers, pages + 1, kv_heads, PAGE, dim)
    keys, values = (torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(2))
    merged = torch.randn(1, rows, heads + 2 * kv_heads, dim, device=DEVICE, dtype=DTYPE)
    q, k, v = merged.split((heads, kv_heads, kv_heads), dim=2)
    table = torch.arange(1, pages + 1, device=DEVICE, dtype=torch.int32).unsqueeze(0)
    lens = torch.tensor([context], device=DEVICE, dtype=torch.int32)
    # As many rows as a step of K = 16 with some spans has; how they see each other takes no time.
    tail = build_tail(rows, (), 1) if rows <= 16 else build_tail(16, tuple(range(1, 17)), 16)
    attributes = tail.attributes[:, :rows].contiguous().to(DEVICE)
    out = torch.empty(1, rows, heads * dim, device=DEVICE, dtype=DTYPE)

    def launch(cut: LaunchConfig, splits: int) -> Launch:
        tiles = cut.lane_tiles(rows, heads // kv_heads)
        workspace = attention_workspace(kv_heads * tiles * splits, dim, DEVICE)
        return lambda i: paged_attention(
            q, k, v, keys[i % layers], values[i % layers], table, lens, attributes,
            splits=splits, workspace=workspace, out=out, config=cut, pdl=CUDA,
        )  # fmt: skip

    cuts = list(dict.fromkeys(attention_cuts(rows, config)))
    named = [(f"splits {splits} {cut}", launch(cut, splits)) for cut, splits in cuts]
    title = f"attention {heads}/{kv_heads} heads of {dim}, {rows} rows, context {context}"
    report(title, named if CUDA else named[:2], layers, best, share)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernel", choices=("products", "attention"))
    parser.add_argument(
        "--shape", default="qwen2.5-1.5b", help="a name of recipes/shapes, or a config.json"
    )
    parser.add_argument("--rows", type=numbers, default=[80], help="rows of a step, such as 1,80")
    parser.add_argument("--context", type=numbers, default=[1024], help="committed tokens")
    parser.add_argument("--best", type=int, default=5, help="how many of the fastest to print")
    parser.add_argument("--share", default="0/1", help="I/N: only every N-th cut, from number I on")
    arguments = parser.parse_args()
    first, every = (int(part) for part in arguments.share.split("/"))
    path: Path = find_shape(arguments.shape)
    config = config_from_hf(read_json(path))
    for rows in arguments.rows:
        if arguments.kernel == "products":
            time_products(config, rows, arguments.best, (first, every))
        for context in arguments.context if arguments.kernel == "attention" else ():
            time_attention(config, rows, context, arguments.best, (first, every))


if __name__ == "__main__":
    main()
