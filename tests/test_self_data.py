"""Text sampled from the base: it carries on after an interruption, and is never another base's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command import make_world, refused, tidar, train_options
from safetensors.torch import load_file, save_file

from tidar.errors import TidarError
from tidar.training.self_data import claim_corpus, folder_hash, sample_corpus
from tidar.training.sources import Source, documents

ORIGIN = {"base": "f00", "seed": 3, "seq_len": 32, "start ids": [0], "count": 5}


def sampler(first: int, number: int) -> list[list[int]]:
    return [[first + i, 1] for i in range(number)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("self_data")
    make_world(folder)
    return folder


def test_sampled_corpus_carries_on(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    assert sample_corpus(sampler, 3, path, batch=2) == 3
    with path.open("a") as out:
        out.write('{"ids": [9')
    assert sample_corpus(sampler, 5, path, batch=2, append=True) == 5
    assert list(documents(Source(str(path)), "text")) == [[n, 1] for n in range(5)]
    with pytest.raises(TidarError, match="exists"):
        sample_corpus(sampler, 5, path)


def test_more_texts_than_asked_for_are_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    sample_corpus(sampler, 7, path)
    before = path.read_bytes()
    with pytest.raises(TidarError, match="has 7 documents, more than the 5 asked for"):
        sample_corpus(sampler, 5, path, append=True)
    assert path.read_bytes() == before
    with path.open("a") as out:
        out.write('{"ids": [9')  # the half line of a killed run is no text
    assert sample_corpus(sampler, 7, path, append=True) == 7
    assert path.read_bytes() == before


def test_text_of_another_origin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run" / "self-data.jsonl"
    note = tmp_path / "run" / "self-data.meta.json"
    claim_corpus(path, {**ORIGIN, "seed": 1})  # nothing was sampled: the next one may claim it
    claim_corpus(path, ORIGIN)
    assert json.loads(note.read_text()) == ORIGIN
    sample_corpus(sampler, 3, path)
    claim_corpus(path, ORIGIN)
    for changes, message in (
        ({"seed": 4}, r"another seed \(3, now 4\)\. Give the values"),
        ({"base": "ba2"}, r"another base \(other files than now\)\. "),
        ({"seq_len": 64, "count": 9}, r"seq_len \(32, now 64\), another count \(5, now 9\)\. "),
        ({"temperature": 1.0}, r"temperature \(unknown, now 1\.0\)\. "),
    ):
        with pytest.raises(TidarError, match=message) as refusal:
            claim_corpus(path, {**ORIGIN, **changes})
        for way in ("delete self-data.jsonl and self-data.meta.json", "another --out", "--data"):
            assert way in str(refusal.value)
    for broken in ("", "[1]"):
        note.write_text(broken)
        with pytest.raises(TidarError, match="missing or unreadable"):
            claim_corpus(path, ORIGIN)
    note.unlink()
    with pytest.raises(TidarError, match=r"self-data\.meta\.json beside it.*missing"):
        claim_corpus(path, ORIGIN)
    assert list(documents(Source(str(path)), "text")) == [[n, 1] for n in range(3)]


def test_hash_of_a_folder_is_of_its_content(home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(home / "base", copy)
    expected = folder_hash(home / "base")
    assert folder_hash(copy) == expected  # wherever it lies
    weights = load_file(copy / "model.safetensors")
    save_file({name: value + 1.0 for name, value in weights.items()}, copy / "model.safetensors")
    assert folder_hash(copy) != expected  # one shape, other values
    shutil.copy(home / "base" / "model.safetensors", copy)
    assert folder_hash(copy) == expected
    with (copy / "config.json").open("a") as out:
        out.write(" ")
    assert folder_hash(copy) != expected
    save_file({"small": torch.zeros(1)}, copy / "model.safetensors")
    assert len(folder_hash(copy)) == len(expected)


def test_command_refuses_text_of_another_run(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def command(count: int, *more: object, base: Path = home / "base") -> list[object]:
        return [*train_options(home, out), "--base", base, "--self-data", count, *more]

    tidar(*command(40))
    shutil.rmtree(out / "model")
    before = (out / "self-data.jsonl").read_bytes()
    note = json.loads((out / "self-data.meta.json").read_text())
    assert (note["seed"], note["seq_len"], note["count"], note["temperature"]) == (3, 32, 40, 1.0)
    held_out = json.loads((out / "self-data-held-out.meta.json").read_text())
    assert held_out["stream"] != note["stream"]
    other = tmp_path / "other"
    shutil.copytree(home / "base", other)
    weights = load_file(other / "model.safetensors")
    save_file({name: value * 1.1 for name, value in weights.items()}, other / "model.safetensors")
    for given, said in (
        (command(40, "--resume", "--seed", 4), "seed (3, now 4)"),
        (command(40, "--resume", "--seq-len", 16), "seq_len (32, now 16)"),
        (command(30, "--resume"), "count (40, now 30)"),
        (command(40, "--resume", base=other), "another base"),
    ):
        assert said in " ".join(refused(*given).split())
    assert (out / "self-data.jsonl").read_bytes() == before
    shutil.move(home / "base", tmp_path / "moved")  # the same base under another name
    try:
        tidar(*command(40, "--resume", base=tmp_path / "moved"))
    finally:
        shutil.move(tmp_path / "moved", home / "base")
    assert (out / "self-data.jsonl").read_bytes() == before


def test_one_of_several_processes_does_not_sample(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = [*train_options(home, tmp_path / "run"), "--base", home / "base", "--self-data", 5]
    message = " ".join(refused(*given).split())
    assert "one of 2" in message
    assert "--data DIR/self-data.jsonl" in message
    assert not (tmp_path / "run").exists()
