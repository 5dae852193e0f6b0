"""Whether something fits into a GPU's memory, asked before it is made; and what is said where memory runs out."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tidar.errors import TidarError


def gib(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 2**30:.2f} GiB"


def release_unused(device: torch.device) -> tuple[int, int]:
    """Has PyTorch give back what it keeps for later; the GPU's free bytes then, and all it has.

    Not while a graph is captured.
    """
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)


def check_fits(
    what: str,
    needed: int,
    device: torch.device,
    advice: Callable[[int], str],
    *,
    left_alone: int = 0,
) -> None:
    """Raises TidarError where `needed` bytes are more than a GPU has; elsewhere nothing is known beforehand.

    what: takes the bytes ("the weights"). advice: which setting lowers it, given the bytes there are for it.
    left_alone: bytes that must stay free beside it, for graphs and logits.
    """
    if device.type != "cuda":
        return
    free, total = release_unused(device)
    room = max(free - left_alone, 0)
    if needed <= room:
        return
    beside = f" ({gib(left_alone)} are left alone for graphs and logits)" if left_alone else ""
    raise TidarError(
        f"{gib(needed)} are needed for {what}, and {gib(room)} of the GPU's {gib(total)} are free for that"
        f"{beside}. {advice(room)}"
    )


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """A context that raises TidarError where a GPU's memory runs out: what was asked for, what is free, what to change.

    doing: what is under way ("loading the weights"). advice: which setting lowers it.
    """

    doing: str
    device: torch.device
    advice: str

    def __enter__(self) -> None:
        """Costs next to nothing: every turn of the engine goes through it."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if not isinstance(error, RuntimeError) or (said := _asked(error)) is None:
            return
        free = ""
        if self.device.type == "cuda":
            # PyTorch has given back what it could before it failed.
            now, total = torch.cuda.mem_get_info(self.device)
            free = f", with {gib(now)} of the GPU's {gib(total)} free"
        raise TidarError(f"{said} That was while {self.doing}{free}. {self.advice}") from error


def _asked(error: BaseException | None) -> str | None:
    """The sentence that says how much memory was asked for in vain; None for an error of another kind.

    A capture that fails ends with an error of its own, behind which the cause is; and what is not allocated
    by PyTorch (Triton, cuBLAS, the graph itself) has no error type of its own.
    """
    while error is not None:
        lines = str(error).splitlines() or [""]
        if isinstance(error, torch.OutOfMemoryError) or re.search(
            "out of memory|ALLOC_FAILED", lines[0]
        ):
            amount = re.match(r".*?Tried to allocate [\d.]+ \w+", lines[0])
            return (amount[0] if amount else lines[0]).rstrip(".") + "."
        error = error.__cause__ or error.__context__
    return None
