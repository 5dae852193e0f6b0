"""Text that the base model writes itself, to convert it without moving away from its own words.

The sampling comes in as a callback (training does not import decoding). Rows hold token ids, so
`data.py` reads them back without tokenising. Beside `self-data.jsonl` stands `self-data.meta.json`, which
says what the texts were sampled from and how, so that text of another base or seed is never taken for
this run's.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tidar.errors import TidarError
from tidar.training.checkpoints import replace_text

Sampler = Callable[[int, int], Sequence[Sequence[int]]]
"""`sampler(first, number)`: token ids of documents `first` ... `first + number - 1`."""


_PROBES: Final = 64
_PROBE_BYTES: Final = 4096


def folder_hash(folder: Path) -> str:
    """A hash of a checkpoint: its config and tokenizer, and size, header and probes of its weights.

    The probes, spread over each file, tell two trainings of one architecture apart; reading all of a
    large checkpoint would take minutes.
    """
    state = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        if (folder / name).is_file():
            state.update(f"{name}\n".encode() + (folder / name).read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        state.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as weights:
            header = int.from_bytes(weights.read(8), "little")
            state.update(weights.read(min(header, size)))
            for probe in range(_PROBES):
                weights.seek(max(0, size - _PROBE_BYTES) * probe // (_PROBES - 1))
                state.update(weights.read(_PROBE_BYTES))
    return state.hexdigest()[:32]


def claim_corpus(path: Path, origin: Mapping[str, Any]) -> None:
    """Note beside `path` where its texts come from; before the first text, and checked from then on.

    Raises TidarError when `path` has texts of another origin, or none that is known.
    """
    note = path.with_suffix(".meta.json")
    if path.exists() and path.stat().st_size:
        _check_origin(path, note, origin)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(note, json.dumps(dict(origin), indent=1) + "\n")
    except OSError as error:
        raise TidarError(f"{note}: cannot be written ({error.strerror or error}).") from error


def _check_origin(path: Path, note: Path, origin: Mapping[str, Any]) -> None:
    way_out = (
        f"or delete {path.name} and {note.name} in {path.parent} to sample anew, or give another --out. "
        "To train on the text as it is: --data with its path instead of --self-data."
    )
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict):
        raise TidarError(
            f"{path} has texts, but {note.name} beside it, which says what they were sampled from, is "
            f"missing or unreadable. Put it back, {way_out}"
        )
    if differing := [key for key in origin if before.get(key) != origin[key]]:
        told = [
            "base (other files than now)"
            if key == "base"
            else f"{key} ({before.get(key, 'unknown')}, now {origin[key]})"
            for key in differing
        ]
        raise TidarError(
            f"{path} was sampled with another {', another '.join(told)}. Give the values it was sampled "
            f"with, {way_out}"
        )


def sample_corpus(
    sampler: Sampler, count: int, path: Path, *, batch: int = 64, append: bool = False
) -> int:
    """Write `count` sampled documents to `path` as JSON rows `{"ids": [...]}`; how many it now has.

    With `append`, batches that the file already has are not sampled again, so an interrupted
    sampling carries on and ends in the file that an uninterrupted one writes; a half-written last
    batch is dropped.

    Raises TidarError when the file exists and `append` is off, it has more than `count` documents
    already, a document has no tokens, or the disk is full (what is written by then stays).
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
    return count


def _drop_half_batch(path: Path, count: int, batch: int) -> int:
    """Cuts what an interrupted sampling left half-done off the end; how many documents it keeps.

    That is a half-written line, and below `count` all lines after the last whole batch. Raises
    TidarError, and cuts nothing, when there are more than `count` documents.
    """
    ends = [0]
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"}\n"):
                break
            ends.append(ends[-1] + len(line))
    done = len(ends) - 1
    if done > count:
        raise TidarError(
            f"{path} has {done} documents, more than the {count} asked for. Ask for as many as it has, "
            "remove those at its end that are too many, or give another file."
        )
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
