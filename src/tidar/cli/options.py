"""Options that several commands share, and what reads them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

ModelArg = Annotated[
    str | None, typer.Argument(help="Folder or hub id; default: the bundled checkpoint.")
]
ShapeArg = Annotated[
    str | None,
    typer.Option(help="No model: random weights of this shape, a config.json or a known name."),
]
RandomWeightsArg = Annotated[
    bool, typer.Option("--random-weights", help="Of --shape, or of the folder's config.")
]
DtypeArg = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, or auto: bfloat16 on CUDA.")
]
DeviceArg = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]

ACCEPTANCE = (
    "made-up acceptance, as the mean accept count of the largest K with all spans, or a JSON list of how "
    "likely the draft token of depth 1, 2, ... passes."
)
"""What --replay-acceptance takes."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how to decode, as the command line says it."""

    device: str
    dtype: str
    engine: str = "auto"

    def settle(self) -> "tuple[torch.device, torch.dtype]":
        """The device and the dtype. Raises TidarError for those that are not known or not there."""
        from tidar.api import pick_device, pick_dtype
        from tidar.errors import TidarError
        from tidar.weights import DTYPES

        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise TidarError(
                f"dtype {self.dtype!r} is not supported; allowed: auto, {', '.join(DTYPES)}"
            )
        device = pick_device(self.device)
        if self.dtype == "auto":
            return device, pick_dtype("auto", device)
        return device, DTYPES[self.dtype]


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Numbers of 1 or more separated by commas, each once. Raises TidarError for anything else."""
    from tidar.errors import TidarError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise TidarError(
            f"{option} {text!r} is not understood: give whole numbers of 1 or more, separated by commas."
        )
    return tuple(dict.fromkeys(map(int, parts)))


def refuse(where: str, **options: object) -> None:
    """Raises TidarError for options that were given where they mean nothing."""
    from tidar.errors import TidarError

    wrong = [
        name if name.isupper() else f"--{name.replace('_', '-')}"
        for name, value in options.items()
        if value not in (None, False)
    ]
    if wrong:
        several = " with several values" if wrong == ["--batch"] else ""
        raise TidarError(f"{' and '.join(wrong)}{several} cannot be used {where}.")
