"""The record of a measurement: every number, and all that is needed to take it again."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tidar.errors import TidarError

FORMAT_VERSION = 1
PACKAGES = ("tidar", "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy",
            "lm_eval")  # fmt: skip


COMMIT_VARIABLE = "TIDAR_COMMIT"
"""Names the commit of an exported tree, which cannot tell it itself, or would tell a wrong one."""

SHORTEST_NAME = 7
"""Digits of a commit that name it."""


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the tree around `folder`, and whether tracked files changed; None where nothing tells.

    The environment variable TIDAR_COMMIT wins: a tree that was copied may lie in an older checkout. What
    such a checkout says stands beside it as `checkout` where it differs; whether files changed against
    the commit that was named is then not known (None).
    """
    found, named = _checkout(folder), os.environ.get(COMMIT_VARIABLE)
    if not named:
        return found
    state: dict[str, Any] = {"commit": named, "dirty": None, "from": COMMIT_VARIABLE}
    if found is None:
        return state
    if len(named) >= SHORTEST_NAME and found["commit"].startswith(named):
        return {**state, "dirty": found["dirty"]}
    return {**state, "checkout": found}


def _checkout(folder: Path) -> dict[str, Any] | None:
    """What git says; None outside a checkout."""

    def git(*arguments: str) -> str:
        # A killed `git status` would leave the lock of the index behind, which stops every commit.
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


def gpu_clocks(device: torch.device) -> dict[str, int | None] | None:
    """Clocks of the GPU at this moment in MHz, by nvidia-smi; None without a GPU or the tool.

    Ask right after the work: an idle GPU slows down.
    """
    if device.type != "cuda":
        return None
    fields = ("clocks.sm", "clocks.max.sm", "clocks.mem")
    which = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", "-i", which, f"--query-gpu={','.join(fields)}"]
    try:
        line = subprocess.run(
            [*command, "--format=csv,noheader,nounits"],
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    values = [int(part) if part.strip().isdecimal() else None for part in line.split(",")]
    return dict(zip(("sm_mhz", "max_sm_mhz", "memory_mhz"), values, strict=False))


def cpu_name() -> str:
    """The processor's model name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """Software and hardware that the numbers belong to."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "git": git_state(Path(__file__).parent),
        "python": platform.python_version(),
        "packages": versions,
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "gpu_clocks": gpu_clocks(device),
    }


def make_record(
    *,
    command: Sequence[str],
    device: torch.device,
    subject: dict[str, Any],
    settings: dict[str, Any],
    results: dict[str, Any],
) -> dict[str, Any]:
    """The record. subject: what was measured; settings: how; results: figures under their names."""
    return {
        "format_version": FORMAT_VERSION,
        "command": list(command),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment(device),
        **subject,
        "settings": settings,
        **results,
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes the record as JSON. Raises TidarError where it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise TidarError(f"cannot write the record {path}: {error}") from error


def read_record(path: Path) -> dict[str, Any]:
    """A record from its file. Raises TidarError for anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TidarError(f"{path} is not a readable record: {error}") from error
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        raise TidarError(f"{path} is no record of format version {FORMAT_VERSION}.")
    return record
