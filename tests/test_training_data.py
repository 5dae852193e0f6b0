"""From documents to packed tokens: nothing is lost, formats read alike, bad rows are named."""

import errno
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import make_home

from tidar.errors import TidarError
from tidar.training import data
from tidar.training.data import Encoding, TokenData, prepare
from tidar.training.sources import Source, documents


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def encoding(home: Path) -> Encoding:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(home / "tokenizer" / "tokenizer.json"))
    return Encoding(tokenizer=tokenizer, end_id=0, vocab_size=320, mask_id=319)


def prepared(encoding: Encoding, cache: Path, *sources: Source, **changes: Any) -> TokenData:
    values = {"cache": cache, "seq_len": 16, "progress": False, **changes}
    return prepare(sources, encoding, **values)


def all_documents(data: TokenData) -> list[tuple[int, ...]]:
    """The documents of an epoch in order, cut pieces put together by their end-of-text."""
    ids = data.batch(range(len(data)))["input_ids"].flatten()[: data.meta.num_tokens].tolist()
    found: list[tuple[int, ...]] = [()]
    for token in ids:
        found[-1] += (token,)
        if token == 0:
            found.append(())
    return found[:-1]


def test_packing_keeps_every_token_and_marks_documents(encoding: Encoding, tmp_path: Path) -> None:
    texts = ["alpha beta", "one " * 30, "gamma"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = prepared(encoding, tmp_path / "cache", Source(str(path)))
    expected = [(*encoding.tokenizer.encode(text).ids, 0) for text in texts]
    assert sorted(all_documents(data)) == sorted(expected)
    whole = data.batch(range(len(data)))
    for ids, document, labels in zip(
        whole["input_ids"], whole["document"], whole["labels"], strict=True
    ):
        assert (document.diff() >= 0).all()
        first = torch.ones(16, dtype=torch.bool)
        first[1:] = document.diff() > 0
        assert (labels[first] == -100).all()
        assert torch.equal(labels[~first], ids[~first])
        ends = (ids[:-1] == 0).nonzero().flatten()
        assert first[ends + 1].all()
    filling = len(data) * 16 - data.meta.num_tokens
    assert (whole["labels"].flatten()[-filling:] == -100).all()
    again = prepared(encoding, tmp_path / "cache", Source(str(path)))
    assert again.folder == data.folder
    other = prepared(encoding, tmp_path / "cache", Source(str(path)), seed=1)
    assert other.folder != data.folder
    assert sorted(all_documents(other)) == sorted(expected)


def test_weights_formats_and_ids(encoding: Encoding, tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as out:
        out.write(json.dumps({"ids": [5, 6, 7, 0]}) + "\n")
    (tmp_path / "b.txt").write_text("alpha")
    rows = [{"body": f"two {n}"} for n in range(200)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepared(
        encoding, tmp_path / "cache", Source(str(tmp_path / "a.jsonl.gz"), 3.0),
        Source(str(tmp_path / "*.txt")), Source(str(tmp_path / "c.jsonl"), 0.5), text_field="body",
    )  # fmt: skip
    found = all_documents(data)
    assert found.count((5, 6, 7, 0)) == 3
    assert found.count((*encoding.tokenizer.encode("alpha").ids, 0)) == 1
    assert 70 < len(found) - 4 < 130


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["alpha", "", "beta"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(documents(Source(str(tmp_path)), "text")) == ["alpha", "beta"]
    with pytest.raises(TidarError, match="'text'"):
        list(documents(Source(str(tmp_path / "a.parquet")), "body"))


def test_parquet_rows_are_read_as_json_rows_are(tmp_path: Path) -> None:
    """A prompt comes first, ids win, and a null is a field that the row lacks."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"

    def read(text_field: str = "text", **columns: Any) -> list[Any]:
        parquet.write_table(pyarrow.table(columns), path)
        return list(documents(Source(str(path)), text_field))

    assert read(text=["b", "c", ""], prompt=["a ", None, "d"], n=[1, 2, 3]) == ["a b", "c", "d"]
    assert read("prompt", text=["b"], prompt=["a"]) == ["a"]
    assert read(ids=[[1, 2], [3]]) == [[1, 2], [3]]
    assert read(ids=[[1, 2], None], text=[None, "b"], prompt=["a", "a"]) == [[1, 2], "ab"]
    for message, columns in (
        (r"rows\.parquet, row 2: .*'text' must be text, got NoneType", {"text": ["a", None]}),
        (r"row 1: .*must be text, got list", {"text": ["a"], "prompt": [["b"]]}),
        (r"row 2: `ids` must be a list of token ids", {"ids": [[1], None]}),
        (r"row 1: `ids` must be a list of token ids", {"ids": [[1.5]]}),
        (r"row 1: `ids` must be a list of token ids", {"ids": [[1, -1]]}),
        (r"no column 'text'; the table has 'prompt'", {"prompt": ["a"]}),
    ):
        with pytest.raises(TidarError, match=message):
            read(**columns)


def test_prompt_comes_before_the_text(encoding: Encoding, tmp_path: Path) -> None:
    """Rows of question and answer: the prompt as it is, then the text, with nothing in between."""
    rows = [
        {"text": "beta", "prompt": "alpha "},
        {"prompt": "Why?", "text": "one\n"},
        {"text": "two", "prompt": ""},
        {"prompt": "three", "text": " "},
        {"ids": [5, 6], "prompt": "four"},
        {"prompt": "", "text": " "},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = ["alpha beta", "Why?one\n", "two", "three ", [5, 6]]
    assert list(documents(Source(str(path)), "text")) == expected
    # Where the prompt itself is the text field it is taken once.
    path.write_text('{"prompt": "alpha", "text": "beta"}\n')
    assert list(documents(Source(str(path)), "prompt")) == ["alpha"]
    path.write_text('{"text": "a"}\n{"prompt": ["alpha"], "text": "beta"}\n')
    with pytest.raises(
        TidarError, match=r"rows\.jsonl, line 2: .*'prompt'.*must be text, got list"
    ):
        list(documents(Source(str(path)), "text"))
    path.write_text('{"prompt": "alpha", "texts": "beta"}\n')
    with pytest.raises(TidarError, match=r"rows\.jsonl, line 1: no field 'text'"):
        list(documents(Source(str(path)), "text"))


def test_bad_data_is_named(encoding: Encoding, tmp_path: Path) -> None:
    def refused(name: str, content: bytes, match: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TidarError, match=match):
            prepared(encoding, tmp_path / "cache", Source(str(tmp_path / name)))

    refused("broken.jsonl", b'{"text": "a"}\n{"text": \n', r"broken\.jsonl, line 2: not a JSON row")
    refused("other.jsonl", b'{"body": "a", "n": 1}\n', r"line 1: no field 'text'.*'body', 'n'")
    refused("number.jsonl", b'{"text": 3}\n', "must be text, got int")
    refused("list.jsonl", b"[1]\n", "JSON object")
    refused("empty.jsonl", b"", "file is empty")
    refused("blank.jsonl", b'{"text": "  "}\n\n', "no usable text")
    refused("latin.txt", b"caf\xe9", "not UTF-8")
    refused("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-20], "cannot be read")
    refused("not.jsonl.xz", b"plain", "cannot be read")
    refused("image.png", b"x", "extension is not supported")
    refused("ids.jsonl", b'{"ids": [999]}\n', "outside the model's vocabulary")
    refused("mask.jsonl", b'{"ids": [1, 319]}\n', "mask token")
    with pytest.raises(TidarError, match="no such file"):
        prepared(encoding, tmp_path / "cache", Source(str(tmp_path / "absent.jsonl")))
    (tmp_path / "folder").mkdir()
    with pytest.raises(TidarError, match="no file to read"):
        prepared(encoding, tmp_path / "cache", Source(str(tmp_path / "folder")))
    assert not [p.name for p in (tmp_path / "cache").iterdir()]


def test_full_disk_while_tokenising_leaves_nothing(
    encoding: Encoding, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tidar.training import data

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, "_gather", full)
    with pytest.raises(TidarError, match="no space left"):
        prepared(encoding, tmp_path / "cache", Source(str(home / "data.jsonl")))
    assert not list((tmp_path / "cache").iterdir())


def test_two_runs_may_prepare_one_text_at_a_time(
    encoding: Encoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finishes first while this one writes: both have the same tokens, and nothing is left over."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "alpha beta"}) + "\n")
    write, first = data._write, []

    def slow(*arguments: Any) -> None:
        write(*arguments)
        if not first:
            first.append(None)
            monkeypatch.setattr(data.os, "getpid", lambda: 1)
            first[0] = prepared(encoding, tmp_path / "cache", Source(str(path))).folder

    monkeypatch.setattr(data, "_write", slow)
    found = prepared(encoding, tmp_path / "cache", Source(str(path)))
    assert found.folder == first[0]
    assert all_documents(found) == [(*encoding.tokenizer.encode("alpha beta").ids, 0)]
    assert list((tmp_path / "cache").iterdir()) == [found.folder]
    # A folder in the way that holds no tokens is told of.
    (found.folder / "meta.json").unlink()
    with pytest.raises(TidarError, match="cannot be written"):
        prepared(encoding, tmp_path / "cache", Source(str(path)))
