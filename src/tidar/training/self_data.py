"""Text that the base model writes itself, to convert it without moving away from its own words.

The sampling comes in as a callback (training does not import decoding). Rows hold token ids, so
`data.py` reads them back without tokenising.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tidar.errors import TidarError

Sampler = Callable[[int, int], Sequence[Sequence[int]]]
"""`sampler(first, number)`: token ids of documents `first` ... `first + number - 1`."""


def sample_corpus(
    sampler: Sampler, count: int, path: Path, *, batch: int = 64, append: bool = False
) -> int:
    """Write `count` sampled documents to `path` as JSON rows `{"ids": [...]}`; how many it now has.

    With `append`, batches that the file already has are not sampled again, so an interrupted
    sampling carries on and ends in the file that an uninterrupted one writes; a half-written last
    batch is dropped.

    Raises TidarError when the file exists and `append` is off, a document has no tokens, or the disk
    is full (what is written by then stays).
    """
    done = 0
    if path.exists():
        if not append:
            raise TidarError(f"{path} exists; give another file, or append to it.")
        done = _drop_half_batch(path, count, batch)
    try:
        _append(sampler, done, count, path, batch)
    except OSError as error:
        raise TidarError(
            f"{path}: cannot be written ({error.strerror or error}). What is in it stays: free some "
            "space and give the same command again, and sampling carries on."
        ) from error
    return max(done, count)


def _drop_half_batch(path: Path, count: int, batch: int) -> int:
    """Cuts the file after its last whole batch (or after `count` documents); how many it keeps."""
    ends = [0]
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"}\n"):
                break
            ends.append(ends[-1] + len(line))
    done = len(ends) - 1
    if done < count:
        done -= done % batch
    if path.stat().st_size > ends[done]:
        os.truncate(path, ends[done])
    return done


def _append(sampler: Sampler, done: int, count: int, path: Path, batch: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as out:
        while done < count:
            rows = sampler(done, min(batch, count - done))
            if not rows or not all(len(row) for row in rows):
                raise TidarError(f"the sampler gave an empty document (number {done} or later).")
            for row in rows:
                out.write(json.dumps({"ids": [int(i) for i in row]}) + "\n")
            out.flush()
            done += len(rows)
