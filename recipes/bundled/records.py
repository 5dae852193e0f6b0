"""Rows of JSON, one a line, plain or compressed: the only file format of this recipe's data."""

import gzip
import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, cast

Row = dict[str, Any]


def _open(path: Path, mode: str) -> TextIO:
    """A UTF-8 text stream; `.xz` and `.gz` are (de)compressed, line ends are left alone."""
    if path.suffix == ".xz":
        return cast(TextIO, lzma.open(path, mode, encoding="utf-8", newline=""))
    if path.suffix == ".gz":
        return cast(TextIO, gzip.open(path, mode, encoding="utf-8", newline=""))
    return cast(TextIO, open(path, mode, encoding="utf-8", newline=""))


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of `path` in order; blank lines are skipped."""
    with _open(path, "rt") as stream:
        for line in stream:
            if line.strip():
                yield json.loads(line)


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write `rows` to `path` (its folder is made) and return how many there were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with _open(path, "wt") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def characters(rows: Iterable[Row]) -> int:
    """Characters of all documents: `prompt`, where a row has one, and `text`."""
    return sum(len(row.get("prompt", "")) + len(row["text"]) for row in rows)
