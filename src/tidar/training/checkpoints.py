"""Folders of a run: finding the last whole checkpoint, and writing one whole or not at all."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from tidar.errors import TidarError

PARTIAL: Final = ".partial"
_NAME: Final = re.compile(r"checkpoint-(\d+)")
_NEEDED: Final = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def whole_checkpoints(out: Path) -> list[Path]:
    """Checkpoints that can be resumed from, oldest first. Half-written ones never have the name."""
    if not out.is_dir():
        return []
    found = [
        (int(match[1]), path)
        for path in out.iterdir()
        if (match := _NAME.fullmatch(path.name)) and all((path / n).is_file() for n in _NEEDED)
    ]
    return [path for _, path in sorted(found)]


def start_point(out: Path, *, resume: bool) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start.

    Raises TidarError when `out` holds something and `resume` is off. Text sampled for the run
    (`self-data*`) may be there: it was made before training began.
    """
    shutil.rmtree(out / PARTIAL, ignore_errors=True)
    if out.exists() and not out.is_dir():
        raise TidarError(f"{out} is a file; out must be a folder.")
    if resume:
        whole = whole_checkpoints(out)
        return whole[-1] if whole else None
    ours = ("self-data", ".self-data")  # the second: a description that was being written
    if out.is_dir() and any(not path.name.startswith(ours) for path in out.iterdir()):
        raise TidarError(
            f"{out} is not empty. Give --resume to carry on from its last checkpoint, or another "
            "folder for a new run."
        )
    return None


def publish(out: Path, name: str, keep: int | None) -> None:
    """Give the finished checkpoint its name, then drop the oldest beyond `keep` (None: none)."""
    target = out / name
    shutil.rmtree(target, ignore_errors=True)  # the same step, saved before an interrupted resume
    (out / PARTIAL / name).rename(target)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)
    if keep is not None and keep > 0:
        for old in whole_checkpoints(out)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole: until the new text stands on the disk, the old file does."""
    new = path.with_name(f".{path.name}.partial")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """A full disk while writing, as a TidarError that says what is still there."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        text = str(error)
        # torch.save reports a failed write as a RuntimeError without a number.
        full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text
        if not full and isinstance(error, RuntimeError) and "PytorchStreamWriter" not in text:
            raise
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
        whole = whole_checkpoints(out)
        last = (
            f"{whole[-1]} is whole: free some space and give --resume"
            if whole
            else "No checkpoint was saved yet: free some space and start again with --resume"
        )
        what = "no space left on the device" if full else text
        raise TidarError(f"{out}: the run could not be written ({what}). {last}.") from error
