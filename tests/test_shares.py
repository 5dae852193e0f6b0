"""Kinds of kernels: every kernel has one, and every launch of a real step gets that of the weight it reads."""

import ast
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import ROOT, TRITON_REQUIRED, random_model
from torch.utils._python_dispatch import TorchDispatchMode

from tidar.bench import shares
from tidar.bench.shares import (
    KERNELS,
    KINDS,
    Launch,
    kernel_times,
    kinds_in_order,
    marked_steps,
    profiled_steps,
    time_by_kind,
)
from tidar.decode.engine import FixedPlan
from tidar.decode.paged_engine import EngineLimits, PagedEngine
from tidar.decode.slots import StepShape
from tidar.decode.step_times import WARM_UP, Seat, limits_for, room_needed, seated
from tidar.layout import AUTOREGRESSIVE, Schedule, dense_schedule, two_forward
from tidar.model import Transformer
from tidar.weights import init_model

ONE_KIND = {
    "_prepare_kernel": "other",
    "_settle_kernel": "other",
    "_embed_kernel": "vocabulary and choice",
    "_choose_kernel": "vocabulary and choice",
    "_rotary_kernel": "attention",
    "_attention_kernel": "attention",
    "_sum_kernel": "attention",
    "_add_kernel": "norms",
    "_norm_kernel": "norms",
    "_gated_kernel": "MLP",
}
PRODUCTS = {"_gemv_kernel", "_parts_kernel"}


def busy(step: Sequence[Launch]) -> float:
    """Milliseconds in which any of these runs, by looking at every stretch between two of their ends."""
    marks = sorted({mark for launch in step for mark in (launch.start, launch.end)})
    return sum(
        (to - at) / 1e3
        for at, to in pairwise(marks)
        if any(launch.start <= at and to <= launch.end for launch in step)
    )


def test_every_kernel_has_a_kind() -> None:
    """By the sources: what is launched, `name[grid](...)`, is what the split knows; the rest is called by it."""
    launched, called, known = set(), set(), set()
    for path in sorted((ROOT / "src/tidar/kernels").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                if any("triton.jit" in ast.unparse(line) for line in node.decorator_list):
                    known.add(node.name)
            elif isinstance(node, ast.Call):
                if isinstance(node.func, ast.Name):
                    called.add(node.func.id)
                elif isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name):
                    launched.add(node.func.value.id)
    assert launched | (known & called) == known
    assert launched == set(ONE_KIND) | PRODUCTS == set(KERNELS)
    for name, kind in ONE_KIND.items():
        assert KERNELS[name] == kind
    assert set(ONE_KIND.values()) | {"attention projections"} == set(KINDS)


class Watch(TorchDispatchMode):
    """Notes what a step would launch on a GPU, in order, and of which kind it is by the weight that it reads."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.inside = False  # a kernel, which the interpreter runs by PyTorch itself
        self.kinds = {model.head_weight.data_ptr(): "vocabulary and choice"}
        for layer in model.layers:
            for linear, kind in (
                (layer.qkv, "attention projections"),
                (layer.o, "attention projections"),
                (layer.gate_up, "MLP"),
                (layer.down, "MLP"),
            ):
                for weight in linear.parameters():
                    self.kinds[weight.data_ptr()] = kind

    def kind(self, values: Sequence[Any], default: str) -> str:
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        return next((k for t in tensors if (k := self.kinds.get(t.data_ptr()))), default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not self.inside and not func.is_view and "empty" not in name:
            kind = self.kind(args, "other")
            if name in ("mm", "addmm", "addmm_", "linear"):
                assert kind != "other"
                product = (
                    "Memset (Device)",
                    "nvjet_tst_64x8_splitK_TNT",
                    "cublasLt::splitKreduce_kernel",
                )
                self.found += [(part, kind) for part in product]
            else:
                self.found.append((f"void at::native::vectorized_{name}_kernel<4>", kind))
        return func(*args, **(kwargs or {}))


class Watched:
    """A kernel whose launches are noted. A product's kind is its weight's, any other's is in `ONE_KIND`."""

    def __init__(self, name: str, kernel: Any, watch: Watch) -> None:
        self.name, self.kernel, self.watch = name, kernel, watch

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any, **options: Any) -> None:
            kind = ONE_KIND.get(self.name) or self.watch.kind(args, "no weight")
            self.watch.found.append((self.name, kind))
            self.watch.inside = True
            self.kernel[grid](*args, **options)
            self.watch.inside = False

        return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run in Triton's interpreter")
@pytest.mark.parametrize(
    ("schedule", "batch", "changes", "biased"),
    [
        (AUTOREGRESSIVE, 1, {}, False),
        (Schedule(4, (1, 3)), 1, {}, False),
        (Schedule(4, (1, 3)), 2, {"SMALL_HEAD": 0}, True),
        (two_forward(4).steps[1], 1, {"SMALL_HEAD": 0}, False),
        (Schedule(4, (1, 3)), 2, {"PARTS_ROWS": 1}, False),
        (Schedule(4, (1, 3)), 1, {"PARTS_ROWS": 1, "SMALL_HEAD": 0}, True),
        (Schedule(4, (1, 3)), 2, {"PARTS_ROWS": 1, "SMALL_HEAD": 0, "all_rows": False}, True),
    ],
    ids=str,
)
def test_launches_of_real_steps(
    schedule: Schedule,
    batch: int,
    changes: dict[str, int],
    biased: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The launches of the fused step itself, two layers of it: each is of the kind that its weight says."""
    if not TRITON_REQUIRED:
        pytest.importorskip("triton")
    from tidar.decode import fused
    from tidar.decode.backend import fused_stepper
    from tidar.kernels import attention, attention_sum, between, choose, linear, parts, rotary, turn

    config = random_model("llama", width=16).config
    config = replace(config, attention_bias=biased, output_bias=biased, mlp_bias=biased)
    model = init_model(config, 0).eval()
    engine = PagedEngine(model, FixedPlan(schedule), EngineLimits(max_running=2, max_draft_len=4))
    watch = Watch(model)
    for module in (attention, attention_sum, between, choose, linear, parts, rotary, turn):
        for name in KERNELS.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, Watched(name, vars(module)[name], watch))
    for name, value in {"INTERPRETED_SMS": 12, **changes}.items():
        monkeypatch.setattr(fused, name, value, raising=name != "all_rows")
    step = fused_stepper(engine.runner.stepper, model, engine.cache)
    shape = StepShape(schedule, torch.device("cpu"))
    step = replace(step, shape=shape, all_rows=changes.get("all_rows"))
    with torch.inference_mode(), seated(engine, batch, room_needed(40, (schedule,))) as seat:
        seat.reset(schedule, 40)
        own = torch.arange(1, batch + 1)
        step(own)  # makes what all steps share
        watch.found.clear()
        seat.reset(schedule, 40)
        with watch:
            step(own)
    names = [name for name, _ in watch.found]
    assert names.count("_attention_kernel") == names.count("_sum_kernel") == 2
    assert ("nvjet_tst_64x8_splitK_TNT" in names) == bool(changes)
    assert ("_norm_kernel" in names) == ("PARTS_ROWS" in changes)
    assert list(zip(names, kinds_in_order(names), strict=True)) == watch.found

    # Each starts before the one in front of it has ended, but for a pause in the middle.
    launches, expected, ended = [], Counter(dict.fromkeys(KINDS, 0.0)), 7.0
    for number, (name, kind) in enumerate(watch.found):
        pause = 50.0 if number == 9 else 0.0
        spent = 1.0 + number**2 % 23
        launches.append(
            Launch(name, ended + pause - (0.0 if pause else 3.0), ended + pause + spent)
        )
        expected[kind] += (spent + (3.0 if number == 0 else 0.0)) / 1e3
        ended += pause + spent
    split = time_by_kind(launches)
    assert split == pytest.approx(dict(expected))
    assert sum(split.values()) == pytest.approx(busy(launches))
    assert all(split[kind] > 0 for kind in set(KINDS) - {"norms"})
    assert (split["norms"] > 0) == ("_gemv_kernel" not in names)


def test_launches_in_another_order_are_refused() -> None:
    layer = ["_rotary_kernel", "_attention_kernel", "_gemv_kernel", "_gemv_kernel", "_gemv_kernel"]
    step = ["_embed_kernel", "_gemv_kernel", *layer, "_gemv_kernel", "_choose_kernel"]
    assert kinds_in_order(step)[4:7] == ["attention projections", "MLP", "MLP"]
    for changed in ([*step[:4], *step[5:]], [*step[:4], "_gemv_kernel", *step[4:]]):
        with pytest.raises(AssertionError, match="products"):
            kinds_in_order(changed)


def test_steps_between_marks() -> None:
    """What runs between two steps is in neither; the profiler's order is not that of time."""
    mark = "Memcpy DtoH (Device -> Pinned)"
    between = f"fill|{mark}|a|b|{mark}|fill|Memcpy DtoD (Device -> Device)|{mark}|a|b|{mark}"
    names = between.split("|")
    launches = [Launch(name, float(at), at + 0.5) for at, name in enumerate(names)]
    steps = marked_steps(reversed(launches))
    assert steps == [launches[2:4], launches[8:10]]
    assert marked_steps([]) == []


def test_the_middle_step_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for GPU and profiler: resets and warm-up do not count, and a launch that is missing is noticed."""
    layer = ["_rotary_kernel", "_attention_kernel", *["_gemv_kernel"] * 4]
    kernels = ["_embed_kernel", "_gemv_kernel", *layer, "_choose_kernel"]
    launches: list[Any] = []
    lost: set[int] = set()  # replays whose first launch the profiler misses
    replays = iter(range(1000))

    def launch(name: str, spent: float) -> None:
        ended = launches[-1].time_range.end if launches else 0.0
        device = torch._C._autograd.DeviceType.CUDA
        interval = SimpleNamespace(start=ended + 1.0, end=ended + 1.0 + spent)
        launches.append(SimpleNamespace(name=name, time_range=interval, device_type=device))

    def replay() -> None:
        number = next(replays)
        for name in kernels[number in lost :]:
            launch(name, 1000.0 * ((number - WARM_UP) * 3 % 7 + 1) if number >= WARM_UP else 1e6)

    class Profile(nullcontext):  # type: ignore[type-arg]
        def __init__(self, **_: object) -> None:
            super().__init__(self)

        def events(self) -> list[Any]:
            host = {"device_type": torch._C._autograd.DeviceType.CPU}  # a call that launches
            return [SimpleNamespace(**vars(launches[0]) | host), *launches]

    engine = PagedEngine(random_model("llama"), FixedPlan(AUTOREGRESSIVE), EngineLimits())
    engine.runner.graphs = True
    mark = SimpleNamespace(copy_=lambda *_, **__: launch("Memcpy DtoH (Device -> Pinned)", 1.0))
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: mark)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(shares, "SPIN_UP", 0.0)
    monkeypatch.setattr(Seat, "replay", lambda *_: replay)
    monkeypatch.setattr(Seat, "reset", lambda *_: launch("fill", 1e9))
    found = kernel_times(engine, AUTOREGRESSIVE, 40)
    assert found == pytest.approx(  # 4 ms a launch in the middle one
        {
            "attention": 8.0,
            "attention projections": 8.0,
            "MLP": 8.0,
            "norms": 0.0,
            "vocabulary and choice": 12.0,
            "other": 0.0,
        }
    )
    lost.add(WARM_UP + 3 + 12)
    launches.clear()
    assert kernel_times(engine, AUTOREGRESSIVE, 40) is None
    engine.pages.check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("schedule", "batch"),
    [(AUTOREGRESSIVE, 1), (Schedule(4, (1,)), 2), (dense_schedule(8), 2)],
    ids=str,
)
def test_replayed_graphs_are_split_on_cuda(schedule: Schedule, batch: int) -> None:
    """1, 16 and 144 rows, the three ways through a layer: what the profiler sees has the order that is read."""
    config = replace(
        random_model("qwen3").config, hidden_size=256, intermediate_size=512, head_dim=64
    )
    model = init_model(config, 0, device="cuda", dtype=torch.bfloat16).eval()
    engine = PagedEngine(model, FixedPlan(schedule), limits_for(config, (schedule,), (40,), 2))
    steps = profiled_steps(engine, schedule, 40, batch)
    assert steps is not None
    assert len(steps) == 7
    names = [launch.name for launch in steps[0]]
    assert names.count("_attention_kernel") == names.count("_rotary_kernel") == config.num_layers
    for step in steps:
        assert [launch.name for launch in step] == names
        split = time_by_kind(step)
        assert sum(split.values()) == pytest.approx(busy(step), rel=1e-6)
        for kind in ("attention", "attention projections", "MLP", "vocabulary and choice"):
            assert split[kind] > 0, (kind, split)
    assert set(kernel_times(engine, schedule, 40, batch) or ()) == set(KINDS)
    assert engine.pages.free == engine.pages.usable
