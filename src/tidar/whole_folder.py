"""A checkpoint's folder on the disk: all of it or nothing."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tidar.errors import TidarError


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` to write into; behind it, flushed, it takes the place of `target`.

    A crash leaves the old checkpoint or the new one. Raises TidarError where writing failed, or where
    `target` is more than an empty folder or a checkpoint without sub-folders: that is left alone.
    """
    _check_target(target)
    partial = target.parent / f".{target.name}.{secrets.token_hex(6)}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.iterdir(), partial):
            _sync(path)
        _swap(partial, target)
    except (OSError, SafetensorError) as error:
        raise TidarError(f"could not write the checkpoint {target}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise TidarError(f"{target} exists and is no folder")
    entries = sorted(target.iterdir())
    if not entries:
        return
    if not (target / "config.json").is_file() or any(path.is_dir() for path in entries):
        names = ", ".join(path.name for path in entries[:5])
        more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
        raise TidarError(
            f"{target} exists and is not just a checkpoint; saving there would delete "
            f"{names}{more}. Give a new folder"
        )


def _sync(path: Path) -> None:
    """Force a file or folder to disk, so that the rename cannot get there before the data."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; the old folder goes only once the new one stands."""
    old = new.with_suffix(".old")
    replacing = target.exists()
    if replacing:
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if replacing:
            old.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
