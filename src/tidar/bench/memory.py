"""GPU memory of each method on its own, while engines of several are alive."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from tidar.decode.engine import Engine
from tidar.decode.paged_engine import PagedEngine
from tidar.methods.eagle import Eagle
from tidar.methods.speculative import Speculative
from tidar.model import Transformer


def weight_bytes(model: Transformer) -> int:
    """Bytes of all parameters, a tied embedding counted once."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def cache_bytes(engine: Engine | PagedEngine) -> int:
    """Bytes of an engine's KV cache as it is now (the plain engine's grows), a drafter's with it."""
    if isinstance(engine, PagedEngine):
        return engine.cache.bytes
    caches = [engine.cache]
    if isinstance(engine.method, Speculative | Eagle):
        caches.append(engine.method.draft.cache)
    stored = [tensor for cache in caches for tensor in (*cache.keys, *cache.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in stored)


@dataclass(slots=True)
class MemoryMeter:
    """Mutable: peaks by method, in bytes, of what PyTorch allocates; none off CUDA.

    What other methods hold meanwhile is taken off, so each peak is that of the weights and one engine.
    """

    model: Transformer
    peaks: dict[str, int] = field(default_factory=dict)
    caches: dict[str, int] = field(default_factory=dict)
    _held: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def watch(self, name: str) -> Iterator[None]:
        """Counts what happens inside for the method `name`."""
        device = self.model.embed.weight.device
        if device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        others = sum(held for other, held in self._held.items() if other != name)
        peak = torch.cuda.max_memory_allocated(device) - others
        self.peaks[name] = max(self.peaks.get(name, 0), peak)
        grown = torch.cuda.memory_allocated(device) - before
        self._held[name] = self._held.get(name, 0) + grown

    def figures(self, name: str) -> dict[str, Any]:
        """Bytes of the weights, of the method's cache, and its peak with both (None off CUDA)."""
        return {
            "weight_bytes": weight_bytes(self.model),
            "cache_bytes": self.caches.get(name),
            "peak_bytes": self.peaks.get(name),
        }
