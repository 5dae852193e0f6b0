"""Kernels as a GPU gets them: compiled for Hopper without one, within what a program may take.

In a process of its own: in this one kernels run in Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

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


@pytest.mark.parametrize(
    "options",
    [
        ("--shape", "qwen3-8b", "--methods", "ar,tidar:8:1,tidar:16:1,2,4,8,tidar:16:dense"),
        ("--config", BUNDLED / "config.json", "--batch", "4", "--methods", "ar,tidar:16:dense"),
    ],
    ids=["8B", "bundled"],
)
def test_kernels_of_a_step_compile_and_fit(options: tuple[object, ...]) -> None:
    """Every kernel that this package launches is among them, but those that a batch has no use for."""
    ran = run(*options, "--json", "-")
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert (told["target"], told["dtype"]) == ("sm_90a", "bfloat16")
    found = told["kernels"]
    times = Counter(each["kernel"] for each in found)
    batch = "--batch" in options  # one row's products are for one row alone
    assert set(times) == set(KERNELS) - ({"_gemv_kernel"} if batch else set())
    assert times["_attention_kernel"] >= 2  # tiles of lanes
    assert all(0 < each["registers"] <= 255 and each["stack"] == 0 for each in found)
    assert all(each["shared"] <= 227 for each in found)


def test_a_kernel_that_takes_too_much_is_named() -> None:
    ran = run("--shape", "qwen2.5-1.5b", "--methods", "ar,tidar:8:1,2,4,8", "--shared", "100")
    assert ran.returncode == 1
    assert "_gemv_kernel" in ran.stdout
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
