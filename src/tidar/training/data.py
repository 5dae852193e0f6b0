"""Training data: documents become one token file of fixed-length sequences, made once and reused.

`prepare` streams documents, tokenises them in parallel batches, ends each with end-of-text,
shuffles whole documents by the seed and writes them one after another. A sequence is the next
`seq_len` tokens, so nothing is dropped: a document that crosses the end of a sequence is cut there,
and its rest starts the next sequence at position 0 as a document of its own. The last sequence is
filled up with end-of-text tokens, each its own document, which by `layout.training_labels` carry no
label.

On disk: `tokens.bin` (uint16, or uint32 for large vocabularies), `starts.npy` (where documents
start) and `meta.json`. The folder appears under its final name only when it is whole.
"""

import errno
import json
import os
import shutil
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from tidar.errors import TidarError
from tidar.layout import training_labels
from tidar.training.sources import Document, Source, documents, fingerprint, fingerprint_hash

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = 3
_BATCH_CHARACTERS = 16_000_000
_BATCH_DOCUMENTS = 16_384
_GATHER_TOKENS = 1 << 24

Batch = dict[str, Tensor]
"""`input_ids`, `document`, `labels` int64 `[B, seq_len]`; `index`, `epoch` int64 `[B]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """What `meta.json` says. num_tokens counts real tokens of an epoch, without the filling."""

    seq_len: int
    num_sequences: int
    num_documents: int
    num_tokens: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How text becomes tokens.

    tokenizer: of the `tokenizers` library; its own policy decides about a start token.
    end_id: end-of-text, put after each document that does not end with it.
    vocab_size: rows of the model; ids at or above it are refused.
    mask_id: refused in the data, since its logit is -inf and no row could learn it.
    """

    tokenizer: "Tokenizer"
    end_id: int
    vocab_size: int
    mask_id: int | None = None


class TokenData(Dataset[Batch]):
    """Sequences of a prepared folder; the memory map is read as batches ask for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = Meta(**json.loads((folder / "meta.json").read_text()))
        self._starts: NDArray[np.int64] = np.load(folder / "starts.npy", mmap_mode="r")
        self._tokens: NDArray[Any] = np.memmap(
            folder / "tokens.bin", dtype=self.meta.dtype, mode="r"
        ).reshape(self.meta.num_sequences, self.meta.seq_len)

    def __len__(self) -> int:
        return self.meta.num_sequences

    def batch(self, indices: Sequence[int], epochs: Sequence[int] | None = None) -> Batch:
        """The sequences with these indices, as a batch; document ids count up within a sequence."""
        index = np.asarray(indices, dtype=np.int64)
        length = self.meta.seq_len
        first = np.zeros((len(index), length), dtype=np.int64)
        low = np.searchsorted(self._starts, index * length)
        high = np.searchsorted(self._starts, (index + 1) * length)
        for row, (start, end) in enumerate(zip(low, high, strict=True)):
            first[row, self._starts[start:end] - index[row] * length] = 1
        ids = torch.from_numpy(self._tokens[index].astype(np.int64))
        document = torch.from_numpy(first.cumsum(axis=1))
        return {
            "input_ids": ids,
            "document": document,
            # The mask rows' labels; both halves have equally many, which is what Trainer counts.
            "labels": training_labels(ids, document)[1],
            "index": torch.from_numpy(index),
            "epoch": torch.tensor(epochs if epochs is not None else [0] * len(index)),
        }

    def counts(self, vocab_size: int) -> NDArray[np.int64]:
        """How often each token comes up, `[vocab_size]`, filling at the end included."""
        total = np.zeros(vocab_size, dtype=np.int64)
        step = max(1, _GATHER_TOKENS // self.meta.seq_len)
        for start in range(0, len(self), step):
            part = self._tokens[start : start + step].ravel()
            total += np.bincount(part, minlength=vocab_size)
        return total

    def __getitem__(self, index: int) -> Batch:
        return {name: value[0] for name, value in self.batch([index]).items()}


class RunData(Dataset[Batch]):
    """All sequences of a run: item g is sequence `order(g // n)[g % n]` of epoch `g // n`.

    One long epoch for the trainer, so that the end of an epoch falls where it may, and skipping to
    a step is arithmetic. The order depends on (seed, epoch) only, not on workers or world size.
    """

    def __init__(self, data: TokenData, *, seed: int, total: int) -> None:
        self.data, self.seed, self.total = data, seed, total
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return self.total

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.data))

    def __getitems__(self, items: Sequence[int]) -> Batch:
        places = [divmod(item, len(self.data)) for item in items]
        indices = [int(self._order(epoch)[place]) for epoch, place in places]
        return self.data.batch(indices, [epoch for epoch, _ in places])

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "seed": self.seed, "total": self.total}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["data"], seed=state["seed"], total=state["total"])  # type: ignore[misc]


class InOrder(Sampler[int]):
    """Items 0, 1, 2, ...: the shuffling is in `RunData`, and no global randomness is drawn."""

    def __init__(self, total: int) -> None:
        self.total = total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.total))


def prepared_folder(
    sources: Sequence[Source],
    encoding: Encoding,
    *,
    cache: Path,
    seq_len: int,
    seed: int,
    text_field: str,
) -> Path:
    """Where `prepare` puts this data: its name is a hash of all that decides the content."""
    key = [
        FORMAT,
        [fingerprint(source) for source in sources],
        fingerprint_hash(encoding.tokenizer.to_str()),
        [encoding.end_id, encoding.vocab_size, encoding.mask_id],
        [seq_len, seed, text_field],
    ]
    return cache / f"tokens-{fingerprint_hash(key)}"


def prepare(
    sources: Sequence[Source],
    encoding: Encoding,
    *,
    cache: Path,
    seq_len: int,
    seed: int = 0,
    text_field: str = "text",
    progress: bool = True,
) -> TokenData:
    """Open the data, tokenising and packing it first unless `cache` has it already.

    Raises TidarError for unreadable or empty sources, token ids outside the vocabulary, and a full
    disk; an interrupted or failed preparation leaves nothing behind.
    """
    if not sources:
        raise TidarError("no training data: give at least one file, folder, glob or dataset name.")
    if seq_len < 2:
        raise TidarError(f"seq_len is {seq_len}; it must be at least 2.")
    folder = prepared_folder(
        sources, encoding, cache=cache, seq_len=seq_len, seed=seed, text_field=text_field
    )
    if (folder / "meta.json").is_file():
        return TokenData(folder)
    with _full_disk_explained(cache):
        cache.mkdir(parents=True, exist_ok=True)
        partial = cache / f".partial-{folder.name}-{os.getpid()}"
        partial.mkdir()
        try:
            _write(partial, sources, encoding, seq_len, seed, text_field, progress)
            try:
                partial.rename(folder)
            except OSError:  # another process may have been quicker
                if not (folder / "meta.json").is_file():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return TokenData(folder)


@contextmanager
def _full_disk_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise TidarError(f"{folder}: cannot be written ({error}).") from error
        raise TidarError(
            f"{folder}: no space left on the device while writing tokens. Free some, or name "
            "another folder with --cache-dir."
        ) from error


def _write(
    folder: Path,
    sources: Sequence[Source],
    encoding: Encoding,
    seq_len: int,
    seed: int,
    text_field: str,
    progress: bool,
) -> None:
    """Fill `folder`: tokens in the order of reading first, then in the order of training."""
    dtype = np.dtype(np.uint16 if encoding.vocab_size <= 1 << 16 else np.uint32)
    lengths, origin = array("q"), array("q")
    raw = folder / "raw.bin"
    with raw.open("wb") as out:
        _tokenise(out, dtype, sources, encoding, text_field, lengths, origin, progress)
    if not lengths:
        names = ", ".join(source.name for source in sources)
        raise TidarError(f"no usable text in {names}: all documents are blank.")
    order = _epoch_order(np.array(origin, dtype=np.int64), sources, seed)
    if not len(order):
        raise TidarError("the data weights leave no document; raise them.")
    length = np.array(lengths, dtype=np.int64)[order]
    starts = np.concatenate(([0], np.cumsum(length)))
    total = int(starts[-1])
    sequences = -(-total // seq_len)
    filling = np.arange(total, sequences * seq_len, dtype=np.int64)
    with (folder / "tokens.bin").open("wb") as out:
        _gather(out, raw, dtype, np.array(lengths, dtype=np.int64), order)
        out.write(np.full(len(filling), encoding.end_id, dtype=dtype).tobytes())
    raw.unlink()
    np.save(folder / "starts.npy", np.concatenate((starts[:-1], filling)))
    meta = Meta(
        seq_len=seq_len,
        num_sequences=sequences,
        num_documents=len(order),
        num_tokens=total,
        dtype=dtype.name,
    )
    (folder / "meta.json").write_text(json.dumps(asdict(meta), indent=1) + "\n")


def _tokenise(
    out: BinaryIO,
    dtype: np.dtype[Any],
    sources: Sequence[Source],
    encoding: Encoding,
    text_field: str,
    lengths: "array[int]",
    origin: "array[int]",
    progress: bool,
) -> None:
    """Append the tokens of all documents to `out`, and each one's length and source number."""
    from tqdm.auto import tqdm

    encoding.tokenizer.no_truncation()
    encoding.tokenizer.no_padding()
    start, tokens = time.monotonic(), 0
    with tqdm(unit=" documents", desc="tokenising", disable=None if progress else True) as bar:
        for number, source in enumerate(sources):
            for batch in _batches(documents(source, text_field)):
                rows = _encode(batch, encoding)
                for row in rows:
                    lengths.append(len(row))
                    origin.append(number)
                flat = np.fromiter((i for row in rows for i in row), np.int64, sum(map(len, rows)))
                _check_ids(flat, encoding, source)
                out.write(flat.astype(dtype).tobytes())
                tokens += len(flat)
                rate = tokens / max(time.monotonic() - start, 1e-9)
                bar.set_postfix_str(
                    f"{tokens / 1e6:.1f}M tokens, {rate / 1e6:.2f}M/s", refresh=False
                )
                bar.update(len(batch))


def _batches(stream: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists of up to about `_BATCH_CHARACTERS` (or as many token ids)."""
    batch: list[Document] = []
    size = 0
    for document in stream:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: Sequence[Document], encoding: Encoding) -> list[list[int]]:
    """Token ids of each document, in order; texts end with end-of-text, rows of ids are taken as they are."""
    texts = [document for document in batch if isinstance(document, str)]
    encoded = iter(encoding.tokenizer.encode_batch_fast(texts) if texts else [])
    rows = []
    for document in batch:
        if isinstance(document, str):
            ids = next(encoded).ids
            document = ids if ids and ids[-1] == encoding.end_id else [*ids, encoding.end_id]
        rows.append(document)
    return rows


def _check_ids(flat: NDArray[np.int64], encoding: Encoding, source: Source) -> None:
    highest = int(flat.max(initial=0))
    if highest >= encoding.vocab_size:
        raise TidarError(
            f"{source.name}: token id {highest} is outside the model's vocabulary of "
            f"{encoding.vocab_size}; the ids or the tokenizer belong to another model."
        )
    if encoding.mask_id is not None and bool((flat == encoding.mask_id).any()):
        raise TidarError(
            f"{source.name}: a document holds the mask token (id {encoding.mask_id}), which no "
            "text may contain; remove its spelling from the text, or choose another mask token."
        )


def _epoch_order(
    origin: NDArray[np.int64], sources: Sequence[Source], seed: int
) -> NDArray[np.int64]:
    """Document numbers in the order of training: repeated or thinned by weight, then shuffled."""
    weight = np.array([source.weight for source in sources])[origin]
    whole = np.floor(weight).astype(np.int64)
    chance = np.random.default_rng([seed, 1]).random(len(origin))
    copies = whole + (chance < weight - whole)
    order = np.repeat(np.arange(len(origin), dtype=np.int64), copies)
    return np.random.default_rng([seed, 0]).permutation(order)


def _gather(
    out: BinaryIO,
    raw: Path,
    dtype: np.dtype[Any],
    lengths: NDArray[np.int64],
    order: NDArray[np.int64],
) -> None:
    """Write the documents of `raw` in this order, about `_GATHER_TOKENS` at a time."""
    tokens = np.memmap(raw, dtype=dtype, mode="r")
    begin = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    ends = np.cumsum(lengths[order])
    first = 0
    while first < len(order):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + _GATHER_TOKENS, side="right")))
        part = order[first:last]
        size = lengths[part]
        # Token t of document d lies at begin[d] + t: one index array for the whole group.
        within = np.arange(int(size.sum())) - np.repeat(np.cumsum(size) - size, size)
        out.write(tokens[np.repeat(begin[part], size) + within].tobytes())
        first = last
    del tokens
