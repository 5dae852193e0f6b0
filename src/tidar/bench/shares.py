"""Where the time of a decode step goes, by kind of kernel."""

import torch

from tidar.decode.paged_engine import PagedEngine
from tidar.decode.step_times import check_room, room_needed, seated
from tidar.layout import Schedule

KINDS = {
    "attention": ("attention",),
    "linear layers": ("gemv", "skinny", "gemm", "nvjet", "cutlass", "splitk"),
    "choice of tokens": ("choose", "argmax"),
    "rotary and cache": ("rotary",),
    "activation": ("gated",),
}
"""Kernels by parts of their names."""


def kernel_kind(name: str) -> str:
    """What a kernel of this name does."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(p in lower for p in parts)), "other")


@torch.inference_mode()
def kernel_shares(
    engine: PagedEngine, schedule: Schedule, context: int, batch: int = 1, *, count: int = 5
) -> dict[str, float] | None:
    """Share of GPU time by kind of kernel in a step, by torch.profiler; None where it saw no kernels."""
    from torch.profiler import ProfilerActivity, profile

    if not engine.runner.graphs:
        return None
    check_room(engine, (schedule,), (context,), batch)
    totals: dict[str, float] = {}
    with seated(engine, batch, room_needed(context, (schedule,))) as seat:
        seat.time_burst(schedule, context, 2)
        replay = seat.replay(schedule)
        seat.reset(schedule, context)
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
            for _ in range(count):
                replay()
            torch.cuda.synchronize(engine.device)
    for row in seen.key_averages():
        kind = kernel_kind(row.key)
        totals[kind] = totals.get(kind, 0.0) + float(row.self_device_time_total)
    whole = sum(totals.values())
    return {kind: spent / whole for kind, spent in totals.items()} if whole else None
