"""Captures, with stand-ins for CUDA: on which streams they run, and in what order. On a GPU: test_gpu_engine.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tidar.decode import graphs
from tidar.errors import TidarError


class Stream:
    """Writes down that it waits."""

    def __init__(self, name: str, told: list[Any]) -> None:
        self.name, self.told = name, told

    def wait_stream(self, other: "Stream") -> None:
        self.told.append(f"{self.name} waits for {other.name}")


class Cuda:
    """What `capture` asks of torch.cuda; told: what happened, in order."""

    CUDAGraph = staticmethod(lambda: "graph")

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.made: list[int] = []
        self.here = self.main = Stream("main", self.told)

    def Stream(self, device: int) -> Stream:
        self.made.append(device)
        return Stream(f"side of {device}", self.told)

    def current_device(self) -> int:
        return 1

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        assert device == torch.device("cuda:1")
        return 3 << 29, 40 << 30

    def current_stream(self) -> Stream:
        return self.here

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.here = stream
        yield
        self.here = self.main

    @contextmanager
    def graph(self, graph: str, pool: str | None) -> Iterator[None]:
        self.told.append(f"begin {graph} in {pool}")
        try:
            yield
        except RuntimeError:
            self.told.append("broken off")
            raise RuntimeError("CUDA error: operation failed") from None  # as CUDA's does
        self.told.append("end")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    fake = Cuda()
    graphs._side_stream.cache_clear()
    monkeypatch.setattr(graphs.torch, "cuda", fake)
    yield fake
    graphs._side_stream.cache_clear()


def test_all_captures_warm_up_on_one_stream(cuda: Cuda) -> None:
    """Each stream that cuBLAS has run on costs memory for good."""

    def run() -> int:
        cuda.told.append(f"run on {cuda.here.name}")
        return 7

    for pool in (None, "pool"):
        cuda.told.clear()
        assert graphs.capture(run, pool, "a step") == ("graph", 7)
        assert cuda.told == [
            "side of 1 waits for main",
            "run on side of 1",
            "run on side of 1",
            "main waits for side of 1",
            f"begin graph in {pool}",
            "run on main",
            "end",
        ]
    assert cuda.made == [1]


@pytest.mark.parametrize("runs", [0, 1, 2], ids=["warm-up", "second", "capture"])
def test_memory_that_runs_out_is_explained(cuda: Cuda, runs: int) -> None:
    """Amount asked for, what was captured, what was free, what to lower."""

    def run() -> None:
        if sum(str(told).startswith("run") for told in cuda.told) == runs:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 40 GiB"
            )
        cuda.told.append(f"run on {cuda.here.name}")

    with pytest.raises(TidarError) as refused:
        graphs.capture(run, None, "a step of 8 sequences")
    assert str(refused.value).startswith(
        "CUDA out of memory. Tried to allocate 2.50 GiB. That was while capturing a step of 8 sequences, with "
        "1.50 GiB of the GPU's 40.00 GiB free. Lower max_running (--batch), max_draft_len (K)"
    )
    assert "cache_tokens" in str(refused.value)
    assert "broken off" in cuda.told if runs == 2 else "broken off" not in cuda.told


def test_other_errors_stay_what_they_are(cuda: Cuda) -> None:
    def run() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        graphs.capture(run, None, "a step")
