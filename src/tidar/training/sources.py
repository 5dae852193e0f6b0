"""Where training text comes from: files, folders, globs and hub datasets, as a stream of documents.

A document is a string (a row's text, after its `prompt` where it has one), or a list of token ids
(rows with an `ids` field, such as text that a model sampled itself). Nothing here holds more than one
file's text at a time, and every problem with a file names the file, and the line where there is one.
"""

import glob
import gzip
import hashlib
import json
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO, cast

from tidar.errors import TidarError

Document = str | list[int]

ROWS: Final = (".jsonl", ".json", ".ndjson")
TEXTS: Final = (".txt", ".text", ".md")
TABLES: Final = (".parquet",)
PACKED: Final = (".gz", ".xz")
SUPPORTED: Final = "jsonl, ndjson, txt, text, md (also .gz or .xz), parquet"


@dataclass(frozen=True, slots=True)
class Source:
    """A file, folder, glob or hub dataset, and how often an epoch holds it.

    weight: copies of each document per epoch; the fractional part is a random subset chosen by a
    hash, so `0.25` is the same quarter in every run with the same seed.
    """

    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (0.0 < self.weight <= 1000.0):
            raise TidarError(
                f"data weight of {self.name} is {self.weight}; it must be above 0 and at most 1000."
            )

    @classmethod
    def parse(cls, text: str) -> "Source":
        """From a command line: `PATH`, or `PATH=WEIGHT`."""
        name, _, weight = text.rpartition("=")
        try:
            return cls(name, float(weight)) if name else cls(text)
        except ValueError as error:
            if isinstance(error, TidarError):
                raise
            return cls(text)


def _kind(path: Path) -> str:
    """The extension that decides how a file is read, a compression suffix left out."""
    name = path.name.lower()
    for suffix in PACKED:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def _is_supported(path: Path) -> bool:
    return _kind(path) in ROWS + TEXTS + TABLES


def files_of(source: Source) -> list[Path] | None:
    """The files of a source in a fixed order, or None for a hub dataset.

    Raises TidarError for a path that does not exist, an extension that is not read, and a folder or
    glob without a readable file.
    """
    path = Path(source.name).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and _is_supported(p))
    elif path.is_file():
        if not _is_supported(path):
            raise TidarError(f"{path}: the extension is not supported; allowed: {SUPPORTED}.")
        return [path]
    elif glob.has_magic(source.name):
        matches = (Path(name) for name in glob.glob(str(path), recursive=True))
        found = sorted(p for p in matches if p.is_file() and _is_supported(p))
    elif source.name.startswith(("/", ".", "~")) or _is_supported(path) or path.suffix in PACKED:
        raise TidarError(f"{path}: no such file or folder.")
    elif source.name.count("/") <= 1 and source.name.strip():
        return None
    else:
        raise TidarError(
            f"{source.name}: neither a file, a folder, a glob, nor a hub dataset name."
        )
    if not found:
        raise TidarError(f"{source.name}: no file to read in it; supported: {SUPPORTED}.")
    return found


def fingerprint(source: Source) -> list[object]:
    """What decides a source's documents: names, sizes and times of its files, and its weight."""
    files = files_of(source)
    if files is None:
        return ["hub", source.name, source.weight]
    stats = [(str(path.resolve()), path.stat()) for path in files]
    return ["files", source.weight, [(name, s.st_size, s.st_mtime_ns) for name, s in stats]]


def fingerprint_hash(parts: object) -> str:
    """A short name for a JSON-like value, for cache folders."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def documents(source: Source, text_field: str) -> Iterator[Document]:
    """All documents of a source in a fixed order; blank ones are left out.

    Raises TidarError for anything unreadable, with the file (and line) it was found in.
    """
    files = files_of(source)
    if files is None:
        yield from _hub(source.name, text_field)
        return
    for path in files:
        with _explained(path):
            if path.stat().st_size == 0:
                raise TidarError(f"{path}: the file is empty.")
            kind = _kind(path)
            if kind in ROWS:
                yield from _json_rows(path, text_field)
            elif kind in TABLES:
                yield from _parquet(path, text_field)
            else:
                with _open(path) as stream:
                    text = stream.read()
                if text.strip():
                    yield text


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn a failure to read `path` into a TidarError that names it."""
    try:
        yield
    except TidarError:
        raise
    except UnicodeDecodeError as error:
        raise TidarError(f"{path}: not UTF-8 text ({error.reason}).") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise TidarError(f"{path}: cannot be read ({reason}).") from error


def _open(path: Path) -> TextIO:
    suffix = path.suffix.lower()
    if suffix == ".xz":
        return cast(TextIO, lzma.open(path, "rt", encoding="utf-8", newline=""))
    if suffix == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8", newline=""))
    return cast(TextIO, open(path, encoding="utf-8", newline=""))


def _json_rows(path: Path, text_field: str) -> Iterator[Document]:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TidarError(
                    f"{path}, line {number}: not a JSON row ({error.msg}); "
                    "each line must be one JSON object."
                ) from error
            document = _field(row, text_field, f"{path}, line {number}")
            if document:
                yield document


def _field(row: Any, text_field: str, where: str) -> Document:
    """The document of a row: its token ids if it has them, else its text field; "" when blank."""
    if not isinstance(row, dict):
        raise TidarError(f"{where}: a row must be a JSON object, got {type(row).__name__}.")
    if "ids" in row:
        ids = row["ids"]
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise TidarError(f"{where}: `ids` must be a list of token ids (whole numbers from 0).")
        return ids
    if text_field not in row:
        raise TidarError(
            f"{where}: no field {text_field!r}; the row has {', '.join(map(repr, row)) or 'none'}. "
            "Name the right one with --text-field."
        )
    # Rows of question and answer: the prompt comes before the text, as it is.
    parts = [row[name] for name in dict.fromkeys(("prompt", text_field)) if name in row]
    for part in parts:
        if not isinstance(part, str):
            raise TidarError(
                f"{where}: fields 'prompt' and {text_field!r} must be text, got {type(part).__name__}."
            )
    text = "".join(parts)
    return text if text.strip() else ""


def _parquet(path: Path, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise TidarError(
            f"{path}: reading parquet needs pyarrow (pip install 'tidar[train]')."
        ) from None
    try:
        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        columns = [c for c in dict.fromkeys(("ids", "prompt", text_field)) if c in names]
        if "ids" not in names and text_field not in names:
            raise TidarError(
                f"{path}: no column {text_field!r}; the table has {', '.join(map(repr, names))}. "
                "Name the right one with --text-field."
            )
        # A table has all columns in all rows: a null is a field that the row lacks. Only where the
        # row has nothing else to give is it a value of the wrong kind.
        needed = text_field if text_field in names else "ids"
        rows = (
            {name: value for name, value in row.items() if value is not None or name == needed}
            for batch in table.iter_batches(columns=columns, batch_size=1024)
            for row in batch.to_pylist()
        )
        for number, row in enumerate(rows, start=1):
            document = _field(row, text_field, f"{path}, row {number}")
            if document:
                yield document
    except TidarError:
        raise
    except Exception as error:  # pyarrow's own exceptions; the package is optional
        raise TidarError(f"{path}: not a readable parquet file ({error}).") from error


def _hub(name: str, text_field: str) -> Iterator[Document]:
    """A hub dataset, streamed: `owner/name`, `owner/name:config` or `owner/name:config:split`."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise TidarError(
            f"{name}: no such file or folder, and hub datasets need the `datasets` package "
            "(pip install 'tidar[train]')."
        ) from None
    repo, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        stream = load_dataset(repo, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(stream):
            document = _field(row, text_field, f"{name}, row {number}")
            if document:
                yield document
    except TidarError:
        raise
    except Exception as error:  # the hub client raises many kinds; all mean "not available"
        raise TidarError(
            f"{name}: neither a file here nor a hub dataset that can be opened ({error})."
        ) from error
