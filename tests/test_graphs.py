"""Captures, with stand-ins for CUDA: on which streams they run, and in what order. On a GPU: test_gpu_engine.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tidar.decode import graphs


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
        yield
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
        assert graphs.capture(run, pool) == ("graph", 7)
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
