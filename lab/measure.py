"""What is measured: the records of a laboratory run by their names. A record that is there is not taken again.

`bits_STAGE` is held-out bits per byte, `CONTENDER_tT` quality at temperature T, `schedules_free` and
`schedules_forced` TiDAR's span sets beside each other, `speed_tT` the speeds of all contenders, taken in
turns and therefore in one process. All but the last may be taken in any order, on any device.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from lab.bits import bits_record
from lab.contenders import CONTENDERS, is_there
from lab.plan import Scale
from lab.quality import decode_record, is_python_so_far, schedules_record
from lab.speeds import speed_record
from tidar.bench.record import write_record

TEMPERATURES: Final = (0.0, 0.7, 1.0)
"""Of quality; see `temperatures_of`."""

TIMED: Final = (0.0, 1.0)
"""Of speeds."""

__all__ = [
    "CONTENDERS", "TEMPERATURES", "TIMED", "bits_record", "decode_record", "is_python_so_far", "jobs", "measure_all",
    "schedules_record", "speed_record", "tell_missing", "temperatures_of",
]  # fmt: skip

Job = Callable[[], dict[str, Any]]


def temperatures_of(contender: str) -> tuple[float, ...]:
    """Those at which its quality is measured: all for AR and TiDAR, the two ends for others, 0 for their variants."""
    about = CONTENDERS[contender]
    if about.stage in ("ar", "tidar") and not about.helper:
        return TEMPERATURES
    return TEMPERATURES[:1] if about.is_variant else (TEMPERATURES[0], TEMPERATURES[-1])


def jobs(out: Path, scale: Scale) -> dict[str, Job]:
    """The records whose checkpoints are there, by name: calling one measures it."""
    stages = dict.fromkeys(each.stage for each in CONTENDERS.values())
    found: dict[str, Job] = {
        f"bits_{stage}": partial(bits_record, out, stage, scale)
        for stage in stages
        if is_there(out, stage)
    }
    present = [name for name, each in CONTENDERS.items() if not each.missing(out)]
    for name in present:
        for temperature in temperatures_of(name):
            found[f"{name}_t{temperature:g}"] = partial(
                decode_record, out, name, temperature, scale
            )
    if is_there(out, "tidar"):
        for kind in ("free", "forced"):
            found[f"schedules_{kind}"] = partial(
                schedules_record, out, forced=kind == "forced", scale=scale
            )
    if present:
        for temperature in TIMED:
            found[f"speed_t{temperature:g}"] = partial(speed_record, out, temperature, scale)
    return found


def tell_missing(out: Path) -> None:
    """Names the contenders without their checkpoints, which are left out."""
    for name, contender in CONTENDERS.items():
        if missing := contender.missing(out):
            print(f"{name}: no checkpoint of {', '.join(missing)}; left out")


def measure_all(out: Path, scale: Scale) -> None:
    """Write what is missing of OUT/records. A contender without its checkpoints is named and left out."""
    tell_missing(out)
    for name, job in jobs(out, scale).items():
        path = out / "records" / f"{name}.json"
        if not path.is_file():
            write_record(path, job())
            print(f"wrote {path.name}", flush=True)
