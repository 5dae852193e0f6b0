"""Kernels as a GPU gets them: compiled for Hopper without one, within what a program may take.

In a process of its own: in this one kernels run in Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from models import BUNDLED, ROOT, TRITON_REQUIRED

from tidar.bench.shares import KERNELS

if not TRITON_REQUIRED:
    pytest.importorskip("triton")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of Triton's that is empty at first: what is compiled is compiled here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def run(*options: object, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    command = [sys.executable, ROOT / "tools/kernel_resources.py", *options]
    return subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True
    )


def kernels_of(text: str) -> list[dict[str, Any]]:
    """What the tool prints as JSON; each kernel fits a Hopper GPU."""
    told = json.loads(text)
    assert (told["target"], told["dtype"]) == ("sm_90a", "bfloat16")
    found: list[dict[str, Any]] = told["kernels"]
    assert all(0 < each["registers"] <= 255 and each["stack"] == 0 for each in found)
    assert all(each["shared"] <= 227 for each in found)
    return found


def test_kernels_of_a_step_compile_and_fit() -> None:
    """Every kernel that this package launches is among them, but for those of one row alone."""
    options = ("--config", BUNDLED / "config.json", "--batch", "4", "--json", "-")
    ran = run(*options, "--methods", "ar,tidar:16:dense")
    assert ran.returncode == 0, ran.stderr
    assert {each["kernel"] for each in kernels_of(ran.stdout)} == set(KERNELS) - {"_gemv_kernel"}


def test_a_kernel_that_takes_too_much_is_named() -> None:
    """Of a large network, were there less room than a GPU has."""
    methods = "ar,tidar:8:1,tidar:16:1,2,4,8,tidar:16:dense"
    ran = run("--shape", "qwen3-8b", "--methods", methods, "--shared", "100", "--json", "-")
    assert ran.returncode == 1
    times = Counter(each["kernel"] for each in kernels_of(ran.stdout))
    assert set(times) == set(KERNELS)
    assert times["_attention_kernel"] >= 3  # tiles of lanes
    told = ran.stderr.splitlines()
    assert told
    assert all("too much" in line and "shared: 100 at most" in line for line in told)
    assert "_attention_kernel" in ran.stderr
    assert "_gemv_kernel" not in ran.stderr


def test_what_cannot_be_compiled_is_refused() -> None:
    ran = run("--methods", "tidar:plan")
    assert ran.returncode == 2
    assert "error: only methods with a schedule of their own" in ran.stderr
    ran = run(interpret="1")
    assert ran.returncode == 2
    assert "error: TRITON_INTERPRET is set" in ran.stderr
