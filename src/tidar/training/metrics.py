"""Numbers about a run: throughput, model FLOPs utilisation, memory, and the JSONL log."""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from tidar.model import ModelConfig, flops_per_row
from tidar.training.checkpoints import disk_errors, replace_text

# Dense bfloat16, vendor's figure, TFLOP/s; the first name that is part of the device's name counts.
_PEAKS: Final = (
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("GH200", 989.0),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("RTX 4090", 165.0),
    ("RTX 3090", 71.0),
    ("A10G", 70.0),
    ("L4", 121.0),
)


def device_peak(device: torch.device) -> float | None:
    """Peak FLOP/s of a GPU we know, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for key, peak in _PEAKS if key in name), None)


def step_flops(config: ModelConfig, tokens: float, visible: float, rows_per_token: int) -> float:
    """Forward and backward operations: `tokens` clean tokens whose rows see `visible` keys in all.

    Recomputation is not counted, as is custom.
    """
    rows = tokens * rows_per_token
    return 3.0 * rows * flops_per_row(config, visible / max(rows, 1.0))


def peak_memory_gib(device: torch.device) -> float | None:
    """Most GPU memory in use so far, GiB."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 2**30


@dataclass(slots=True)
class StepTimes:
    """Seconds of each optimizer step; those with evaluation or saving in them are left out."""

    durations: list[float] = field(default_factory=list)
    last: float | None = None

    def mark(self, now: float) -> None:
        """An optimizer step has just been taken."""
        if self.last is not None:
            self.durations.append(now - self.last)
        self.last = now

    def interrupt(self) -> None:
        """Something else happened; the time until the next step says nothing."""
        self.last = None

    def median(self, *, skip: int) -> float | None:
        """Median without the first `skip` steps (compilation), if any are left."""
        kept = self.durations[skip:] or self.durations[-1:]
        return statistics.median(kept) if kept else None


class JsonLog:
    """`log.jsonl` of a run: one row per logging step; values that are no number are null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: dict[str, Any]) -> None:
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        with disk_errors(self.path.parent), self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(clean) + "\n")

    def truncate_after(self, step: int) -> None:
        """Drop rows of steps that a resumed run will take again."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line).get("step", 0) <= step:
                    kept.append(line + "\n")
            except ValueError:  # the half line of a killed run
                continue
        replace_text(self.path, "".join(kept))
