#!/usr/bin/env python3
"""Compile the kernels of a decode step for a GPU that is not here, and say what each takes of it.

    python tools/kernel_resources.py --shape qwen3-8b
    python tools/kernel_resources.py --config src/tidar/bundled/config.json --methods ar,tidar:8:1,2,4 --json -

Triton's interpreter, in which kernels are tested without a GPU, knows neither tensor descriptors as a GPU's copy
engine takes them, nor programmatic launches, nor how much shared memory there is. Here the fused step runs on tensors
without storage; each launch is compiled as on a GPU, to machine code, by the Triton that is installed, and not made.
One layer stands for all. Steps are in bfloat16, greedy or with shared noise; prefill, replays, filters and rejection
sampling use the same kernels, some in other variants, and PyTorch's. Fails when a kernel needs more shared memory
than a program may have, or keeps registers in memory.

Needs Triton (Linux x86_64), whose own tools compile and tell the resources, and its cache (TRITON_CACHE_DIR) to write
into; no GPU, no driver. TRITON_INTERPRET must not be set.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tidar.bench.shapes import shape_config
from tidar.decode.backend import fused_stepper
from tidar.decode.engine import FixedPlan
from tidar.decode.paged_engine import EngineLimits, PagedEngine
from tidar.decode.slots import StepShape
from tidar.decode.spec import parse_methods
from tidar.errors import TidarError
from tidar.layout import AUTOREGRESSIVE, Schedule
from tidar.model import ModelConfig, Transformer

HOPPER = 90
MULTIPROCESSORS = 132
SHARED_MEMORY = 227
"""KiB that one program may have on a Hopper GPU."""

METHODS = "ar,tidar:8:1,tidar:8:dense,tidar:16:1,2,4,8,tidar:16:dense"
WARP = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one compiled kernel takes. shared: KiB a program; stack: bytes a thread, 0 where nothing is spilled."""

    kernel: str
    warps: int
    registers: int
    shared: float
    stack: int


def compile_instead() -> dict[str, Any]:
    """From here on Triton's kernels are compiled for Hopper where they would be launched; those, by their hash.

    For the rest of the process: without a GPU Triton has no driver to go back to.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class NoDevice:
        """What a launch asks of Triton's driver before it compiles."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", HOPPER, WARP)

    compiled: dict[str, Any] = {}
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        compiled[kernel.hash] = kernel
        return kernel

    JITFunction.run = compile_only
    driver.set_active(NoDevice())
    return compiled


@torch.inference_mode()
def compile_steps(
    config: ModelConfig, schedules: Sequence[Schedule], batch: int
) -> list[Resources]:
    """The kernels of these steps for `batch` sequences, in bfloat16, in the order of their names."""
    nowhere = torch.device("meta")
    with nowhere:
        model = Transformer(replace(config, num_layers=1)).to(torch.bfloat16).eval()
    model.rotary.to(nowhere)
    longest = max(schedule.draft_len for schedule in schedules)
    limits = EngineLimits(max_running=batch, cache_tokens=4096, max_draft_len=longest)
    engine = PagedEngine(model, FixedPlan(AUTOREGRESSIVE), limits)
    stepper: Any = fused_stepper(engine.runner.stepper, model, engine.cache)
    from tidar.decode.fused_attention import (
        FusedAttention,
    )  # needs Triton, whose absence was told above

    # As on a GPU, whose properties the tensors' device would tell.
    backend, shared = stepper.backend, SHARED_MEMORY << 10
    backend.sms, backend.pdl, backend.shared_memory = MULTIPROCESSORS, True, shared
    backend.attention = FusedAttention(
        model, engine.cache, sms=MULTIPROCESSORS, shared_memory=shared, pdl=True
    )
    chosen = torch.arange(1, batch + 1, device=nowhere)
    compiled = compile_instead()
    for schedule in schedules:
        for step in schedule.steps:
            replace(stepper, shape=StepShape(step, nowhere), pdl=True)(chosen)
    found = {resources(kernel) for kernel in compiled.values()}
    return sorted(found, key=lambda one: tuple(asdict(one).values()))


def resources(kernel: Any) -> Resources:
    """Of a kernel that Triton has compiled, as `cuobjdump` reads its machine code."""
    import triton.backends.nvidia

    told = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(told), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(count) for name, count in re.findall(r"(REG|STACK):(\d+)", text)}
    return Resources(
        kernel=kernel.metadata.name,
        warps=kernel.metadata.num_warps,
        registers=usage["REG"],
        shared=kernel.metadata.shared / 1024,
        stack=usage["STACK"],
    )


def main() -> int:
    """Exit status 1 where a kernel takes too much, 2 where nothing could be compiled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", default="qwen2.5-1.5b", help="a name of recipes/shapes")
    what.add_argument("--config", help="a config.json instead")
    parser.add_argument("--methods", default=METHODS, help="schedules, as for tidar bench")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a step")
    parser.add_argument(
        "--shared", type=int, default=SHARED_MEMORY, help="KiB that a program may take"
    )
    parser.add_argument("--json", type=Path, help="write what was found here; - prints it")
    arguments = parser.parse_args()
    try:
        if os.environ.get("TRITON_INTERPRET", "0") != "0":
            raise TidarError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
        config = shape_config(arguments.config or arguments.shape)
        schedules = [spec.schedule for spec in parse_methods(arguments.methods)]
        if None in schedules:
            raise TidarError("only methods with a schedule of their own have kernels to compile")
        found = compile_steps(config, [each for each in schedules if each], arguments.batch)
        show(found, arguments.json)
    except (TidarError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    bad = [one for one in found if one.shared > arguments.shared or one.stack]
    for one in bad:
        print(f"too much: {one} (shared: {arguments.shared} at most, stack: 0)", file=sys.stderr)
    return 1 if bad else 0


def show(found: Sequence[Resources], path: Path | None) -> None:
    """A table on the screen, or JSON in a file or (-) on the screen."""
    import triton

    told = {"triton": triton.__version__, "target": f"sm_{HOPPER}a", "dtype": "bfloat16"}
    if path is None:
        print(", ".join(f"{name} {value}" for name, value in told.items()))
        print(f"{'kernel':20} {'warps':>5} {'registers':>9} {'shared KiB':>10} {'stack bytes':>11}")
        for one in found:
            print(
                f"{one.kernel:20} {one.warps:5} {one.registers:9} {one.shared:10.1f} {one.stack:11}"
            )
        return
    text = json.dumps({**told, "kernels": [asdict(each) for each in found]}, indent=1) + "\n"
    if str(path) == "-":
        print(text, end="")
    else:
        path.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
