"""The one exception a user can cause, at the bottom of the import layers, and how it tells of a GPU that is full."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is imported where it is needed: `import tidar` goes without
    import torch


class TidarError(ValueError):
    """A mistake in input, configuration or files, explained for the person who made it.

    The message says what was wrong, what was given, and what is allowed. Broken invariants of our own
    are `AssertionError`s and never reach a user in a correct program.
    """


def gib(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 2**30:.2f} GiB"


def check_room(what: str, needed: int, device: "torch.device", advice: str) -> None:
    """Raises TidarError where `needed` bytes are more than a GPU has; elsewhere nothing is known beforehand.

    What PyTorch keeps for later counts as free. what: needs the bytes, in the plural ("The weights"). advice: which
    setting lowers it.
    """
    import torch

    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed > free:
        raise TidarError(
            f"{what} need {gib(needed)}, and {gib(free)} of the GPU's {gib(total)} are free. {advice}"
        )


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """A context that raises TidarError where a GPU's memory runs out: what was asked for, what is free, what to change.

    doing: what is under way ("loading the weights"). advice: which setting lowers it.
    """

    doing: str
    device: "torch.device"
    advice: str

    def __enter__(self) -> None:
        """Costs next to nothing: every turn of the engine goes through it."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if not isinstance(error, RuntimeError) or (said := _asked(error)) is None:
            return
        free = _free(self.device)
        raise TidarError(f"{said} That was while {self.doing}{free}. {self.advice}") from error


def _free(device: "torch.device") -> str:
    """What a GPU has free, as the end of a sentence. PyTorch has given back what it could before it failed."""
    import torch

    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f", with {gib(free)} of the GPU's {gib(total)} free"


def _asked(error: BaseException | None) -> str | None:
    """The sentence that says how much memory was asked for in vain; None for an error of another kind.

    A capture that fails ends with an error of its own, behind which the cause is; and what is not allocated
    by PyTorch (Triton, cuBLAS, the graph itself) has no error type of its own.
    """
    import torch

    while error is not None:
        lines = str(error).splitlines() or [""]
        if isinstance(error, torch.OutOfMemoryError) or re.search(
            "out of memory|ALLOC_FAILED", lines[0]
        ):
            amount = re.match(r".*?Tried to allocate [\d.]+ \w+", lines[0])
            return (amount[0] if amount else lines[0]).rstrip(".") + "."
        error = error.__cause__ or error.__context__
    return None
