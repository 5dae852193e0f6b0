"""Text that the base model writes itself, to convert it without moving away from its own words.

The sampling comes in as a callback (training does not import decoding). Rows hold token ids, so
`data.py` reads them back without tokenising.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tidar.errors import TidarError

Sampler = Callable[[int, int], Sequence[Sequence[int]]]
"""`sampler(first, number)`: token ids of documents `first` ... `first + number - 1`."""


def sample_corpus(
    sampler: Sampler, count: int, path: Path, *, batch: int = 64, append: bool = False
) -> int:
    """Write `count` sampled documents to `path` as JSON rows `{"ids": [...]}`; how many it now has.

    With `append`, documents that the file already has are not sampled again, so an interrupted
    sampling carries on; a half-written last line is dropped.

    Raises TidarError when the file exists and `append` is off, or a document has no tokens.
    """
    done = 0
    if path.exists():
        if not append:
            raise TidarError(f"{path} exists; give another file, or append to it.")
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("}\n")]
        path.write_text("".join(whole), encoding="utf-8")
        done = len(whole)
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
    return done
