"""Where the GPU time of a decode step goes, by kind of kernel.

Of a replayed graph the profiler sees names and times of launches, nothing else: ranges (`record_function`)
are the host's, and a replay has none. A name alone does not say enough: one kernel does several products of
a layer, and cuBLAS has names of its own for each shape and version. But the launches of a layer have one
order, and kernels of this package stand between all products that are not its own. So a product is told by
where it stands, and no name but this package's has to be known (`kinds_in_order`).
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from tidar.decode.graphs import on_device
from tidar.decode.paged_engine import PagedEngine
from tidar.decode.step_times import SPIN_UP, WARM_UP, check_measurable, room_needed, seated
from tidar.layout import Schedule

ATTENTION = "attention"
"""With the rotary embedding and the store into the cache."""

PROJECTIONS = "attention projections"
"""To queries, keys and values, and the output projection."""

MLP = "MLP"

NORMS = "norms"
"""With the sums of split products and the residual. One row's are inside its products, and count there."""

VOCABULARY = "vocabulary and choice"

OTHER = "other"
"""The two ends of a step: rows from the slots, verification, the next draft into the slots."""

KINDS = (ATTENTION, PROJECTIONS, MLP, NORMS, VOCABULARY, OTHER)

KERNELS: dict[str, str | None] = {
    "_prepare_kernel": OTHER,
    "_embed_kernel": VOCABULARY,
    "_gemv_kernel": None,
    "_parts_kernel": None,
    "_rotary_kernel": ATTENTION,
    "_attention_kernel": ATTENTION,
    "_sum_kernel": ATTENTION,
    "_add_kernel": NORMS,
    "_norm_kernel": NORMS,
    "_gated_kernel": MLP,  # of `kernels.parts` with both products, of `kernels.between` without
    "_choose_kernel": VOCABULARY,
    "_settle_kernel": OTHER,
}
"""Every kernel that `tidar.kernels` launches; None: a product, told by its place."""

_LAYER = (MLP, MLP, PROJECTIONS)
"""The products of a layer behind attention, from the last one: down, gate and up, output."""

BEFORE = {
    "_choose_kernel": (VOCABULARY, *_LAYER),
    "_rotary_kernel": (PROJECTIONS, *_LAYER),
    "_embed_kernel": (OTHER,),
}
"""The kinds of the products in front of these launches, going back; up to the next of these that is met."""

PARTING = ("_add_kernel", "_norm_kernel", "_gated_kernel", "_gemv_kernel")
"""Before one of these comes the next product back. cuBLAS may make several launches of one product, so what
counts is the kernels between products; one row's products have none between, but are one launch each.
"""

MARK = "Memcpy DtoH"
"""A copy to the host, as the profiler calls it: it tells steps apart, as no step has one within."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel, copy or fill as the profiler saw it. start, end: microseconds, of one clock."""

    name: str
    start: float
    end: float


def kinds_in_order(names: Sequence[str]) -> list[str]:
    """The kind of each launch of one step; names in order of launch.

    Read from the end, where each product is known by what comes behind it: before the rotary embedding that
    to queries, keys and values, before a choice that to the vocabulary, and from there back through the layer.
    Raises AssertionError for layers in another order than this one.
    """
    kinds = []
    products: tuple[str, ...] = (OTHER,)
    back = seen = 0  # which of them is next, and which was last
    for name in reversed(names):
        if name == "_attention_kernel":
            assert seen == len(_LAYER), f"{seen} of a layer's products are behind its attention"
        if name in BEFORE:
            products, back = BEFORE[name], 0
        place = products[back] if back < len(products) else OTHER
        if place == VOCABULARY and "at::native" in name:
            place = OTHER  # PyTorch's verification, between the two projections of a large step
        own = KERNELS.get(name)
        if own is None:
            seen = back
        kinds.append(own or place)
        back += name in PARTING
    return kinds[::-1]


def time_by_kind(step: Sequence[Launch]) -> dict[str, float]:
    """Milliseconds of GPU time of one step by kind, all of `KINDS`; launches in order.

    Chained launches overlap: each starts while the one before it ends, and waits. Time counts for the
    launch that came first, so what the kinds take adds up to the time in which the GPU ran any.
    """
    split = dict.fromkeys(KINDS, 0.0)
    ended = float("-inf")
    for launch, kind in zip(step, kinds_in_order([each.name for each in step]), strict=True):
        split[kind] += max(0.0, launch.end - max(launch.start, ended)) / 1e3
        ended = max(ended, launch.end)
    return split


def marked_steps(launches: Iterable[Launch]) -> list[list[Launch]]:
    """The launches of each step, in order: those between the first and the second `MARK`, and so on."""
    pieces: list[list[Launch]] = [[]]
    for launch in sorted(launches, key=lambda each: (each.start, each.end)):
        if launch.name.startswith(MARK):
            pieces.append([])
        else:
            pieces[-1].append(launch)
    return pieces[1::2]


@torch.inference_mode()
def profiled_steps(
    engine: PagedEngine, schedule: Schedule, context: int, batch: int = 1, *, count: int = 7
) -> list[list[Launch]] | None:
    """The launches of `count` equal steps by torch.profiler, each step's in order.

    None where there are no graphs, or where the profiler did not see every launch of every step. The steps
    run one behind the other, after others, with nothing between that waits: the clocks of an idle GPU are low.
    """
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if not engine.runner.graphs:
        return None
    check_measurable(engine, (schedule,), (context,), batch)
    marked = torch.zeros(1, device=engine.device)
    host = torch.zeros(1, pin_memory=True)
    with (
        on_device(engine.device),
        seated(engine, batch, room_needed(context, (schedule,))) as seat,
    ):
        began = time.perf_counter()
        while time.perf_counter() - began < SPIN_UP:
            seat.time_burst(schedule, context, WARM_UP)
        replay = seat.replay(schedule)
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
            for _ in range(WARM_UP + count):
                seat.reset(schedule, context)
                host.copy_(marked, non_blocking=True)
                replay()
                host.copy_(marked, non_blocking=True)
            torch.cuda.synchronize(engine.device)
    steps = marked_steps(
        Launch(event.name, event.time_range.start, event.time_range.end)
        for event in seen.events()
        if event.device_type == DeviceType.CUDA
    )
    if len(steps) != WARM_UP + count:
        return None
    steps = steps[WARM_UP:]
    orders = {tuple(launch.name for launch in step) for step in steps}
    return steps if len(orders) == 1 and all(orders) else None


def kernel_times(
    engine: PagedEngine, schedule: Schedule, context: int, batch: int = 1
) -> dict[str, float] | None:
    """Milliseconds of GPU time by kind (`time_by_kind`) of the median of several equal steps.

    Of the step in the middle by its whole time, so that its kinds add up. None as for `profiled_steps`.
    """
    steps = profiled_steps(engine, schedule, context, batch)
    if steps is None:
        return None
    splits = sorted(map(time_by_kind, steps), key=lambda split: sum(split.values()))
    return splits[len(splits) // 2]
