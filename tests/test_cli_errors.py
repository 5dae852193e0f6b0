"""Mistakes and misfortunes on the command line: one screen that says what to do, and nothing lost."""

import gzip
import json
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from command import (
    assert_same_weights,
    make_base,
    make_world,
    refused,
    scratch_options,
    tidar,
    train_options,
)
from models import BUNDLED

from tidar.tokens import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*decodes as AR only")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    make_world(folder)
    return folder


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return Path(shutil.copytree(home / "base", tmp_path / "broken"))


def says(message: str, *parts: object) -> None:
    flat = " ".join(message.split())
    for part in parts:
        assert str(part) in flat, (part, flat)


# --- generate: the model ---


def test_wrong_folder(home: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    says(refused("generate", "x", "-m", absent), absent, "no such folder", "give a")
    says(refused("generate", "x", "-m", home / "data.jsonl"), "is a file", "config.json")
    says(refused("generate", "x", "-m", home / "tokenizer"), "no config.json")


def test_missing_and_corrupt_weights(copy: Path) -> None:
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"\xff" * 64 + whole[64:])  # the header's length and beginning
    says(refused("generate", "x", "-m", copy), weights, "not a readable safetensors file")
    weights.write_bytes(whole[: len(whole) // 2])
    says(refused("generate", "x", "-m", copy), weights, "corrupt or cut short")
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    says(refused("generate", "x", "-m", copy), "git lfs pull")
    weights.unlink()
    says(refused("generate", "x", "-m", copy), copy, "has no weights", "model.safetensors")
    torch.save({}, copy / "pytorch_model.bin")
    says(refused("generate", "x", "-m", copy), "pytorch_model.bin", "convert them to safetensors")


def test_unsupported_family_and_broken_config(copy: Path) -> None:
    config = copy / "config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps({**raw, "model_type": "gpt2"}))
    says(refused("generate", "x", "-m", copy), "gpt2", "llama, mistral, qwen2, qwen3")
    config.write_text("{")
    says(refused("generate", "x", "-m", copy), config, "not readable as JSON")
    config.write_text(json.dumps({**raw, "num_attention_heads": 3}))
    says(refused("generate", "x", "-m", copy), "3")
    config.write_text(json.dumps(raw))
    (copy / "tokenizer.json").unlink()
    says(refused("generate", "x", "-m", copy), copy, "no tokenizer", "tokenizer.json")


def test_impossible_devices() -> None:
    for device in ("tpu", "meta", "mps", "cuda:99"):
        says(refused("generate", "x", "--device", device), device, "cpu", "auto")
    says(refused("generate", "x", "--dtype", "int4"), "int4", "float32", "bfloat16")


# --- generate: the prompt ---


def test_bad_prompts(tmp_path: Path) -> None:
    says(refused("generate", ""), "prompt is empty", "give some text")
    says(refused("generate", "-", stdin=""), "prompt is empty")
    says(refused("generate"), "--file", "standard input")
    says(refused("generate", "x", "--file", tmp_path / "p"), "once")
    says(refused("generate", "--file", tmp_path / "none.txt"), tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    says(refused("generate", "--file", tmp_path / "latin.txt"), "latin.txt", "as text")
    long = "Compute 1 + 1.\n" * 300
    says(refused("generate", long), "1024 positions", "Shorten the prompt")
    tidar("generate", "x\n" * 500, "-K", 16, "--span-set", "single", "-n", 9)  # nearly full is fine


def test_mask_token_in_the_prompt(home: Path, tmp_path: Path) -> None:
    says(refused("generate", "a <|mask|> b"), "mask token (1)", "take it out")
    mask = Tokenizer.load(home / "tokenizer").encode("alpha beta")[1]
    make_base(tmp_path / "model", home / "tokenizer", mask_token_id=mask)
    message = refused("generate", "alpha beta", "-m", tmp_path / "model")
    says(message, "prompt token 1", f"mask token ({mask})")


# --- generate: numbers ---


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("-K", 100_000), ("100000", "from 1 to 512", "1024 positions")),
        (("-K", 0), ("draft_len is 0", "from 1 to 512")),
        (("-K", -4), ("draft_len is -4", "from 1 to 512")),
        (("-K", 4, "--span-set", "1,9"), ("(1, 9)", "from 1 to 4")),
        (("--span-set", "most"), ("'most'", "dense", "1,2,4")),
        (("--method", "medusa"), ("'medusa'", "'tidar' or 'ar'")),
        (("--beta", 1.5), ("1.5", "from 0 to 1")),
        (("--beta", "nan"), ("nan", "from 0 to 1")),
        (("-n", 0), ("max_new_tokens is 0", "at least 1")),
        (("-t", -1), ("temperature is -1.0", "0 (greedy)")),
        (("-t", "nan"), ("temperature is nan", "to 100")),
        (("-t", "inf"), ("temperature is inf", "to 100")),
        (("-t", 1e-30), ("1e-30", "0 (greedy), or from 1e-05")),
        (("--top-p", 0), ("top_p is 0.0", "above 0 and at most 1")),
        (("--top-p", 1.1), ("top_p is 1.1", "above 0 and at most 1")),
        (("--top-k", -1), ("top_k is -1", "0 (keeps all)")),
        (("--seed", -1), ("seed is -1", "from 0 to")),
        (("--sampling", "luck"), ("'luck'", "'shared-noise' or 'rejection'")),
        (("--stop", ""), ("stop strings", "non-empty")),
        (("-n", "many"), ("--max-new-tokens", "integer")),
        (("--temprature", 1), ("--temprature", "--temperature")),
    ],
    ids=str,
)
def test_absurd_values(options: tuple[object, ...], parts: tuple[str, ...]) -> None:
    says(refused("generate", "x", *options), *parts)


def test_drafting_without_having_been_trained_to(home: Path) -> None:
    message = refused("generate", "alpha", "-m", home / "base", "--method", "tidar")
    says(message, home / "base", "decodes as AR only", "tidar train --base")


# --- train: options and data ---


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--draft-lens", "4,100"), ("100", "32")),
        (("--draft-lens", "0"), ("draft_lens", "0")),
        (("--draft-lens", "many"), ("draft_lens is 'many'", "8,16")),
        (("--seq-len", 4096), ("seq_len is 4096", "64")),
        (("--alpha", -1), ("alpha is -1",)),
        (("--masking", "half"), ("masking is 'half'", "full, random")),
        (("--objective", "both"), ("objective is 'both'", "tidar, ar")),
        (("--max-steps", "soon"), ("max_steps", "soon")),
        (("--learning-rate", "fast"), ("learning_rate", "fast")),
        (("--base", "./absent"), ("not both",)),
    ],
    ids=str,
)
def test_bad_training_options(
    home: Path, tmp_path: Path, options: tuple[object, ...], parts: tuple[str, ...]
) -> None:
    says(refused(*scratch_options(home, tmp_path / "run"), *options), *parts)
    assert not (tmp_path / "run").exists()


def test_what_to_train_is_missing(home: Path, tmp_path: Path) -> None:
    given = train_options(home, tmp_path / "run")
    says(refused(*given), "data")
    says(refused(*given, "--data", home / "data.jsonl"), "nothing to train", "give base")
    says(refused(*given, "--data", home / "data.jsonl", "--base", "./absent"), "./absent")
    says(refused(*given, "--self-data", 5), "--self-data", "give --base")
    says(refused("train", "--config", tmp_path / "none.yaml"), "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    says(refused("train", "--config", tmp_path / "list.yaml"), "list.yaml", "mapping")
    (tmp_path / "arch.json").write_text("{")
    other = scratch_options(home, tmp_path / "run")
    other[other.index("--arch") + 1] = tmp_path / "arch.json"
    says(refused(*other), tmp_path / "arch.json", "not a readable architecture")


def test_bad_data_is_named_by_file_and_line(home: Path, tmp_path: Path) -> None:
    def bad(name: str, content: bytes, *parts: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        says(refused(*scratch_options(home, tmp_path / "run", path)), path, *parts)
        tokenizer = ("train-tokenizer", "--vocab-size", 300, "--out", tmp_path / "tokenizer")
        says(refused(*tokenizer, "--data", path), path, *parts)
        assert not (tmp_path / "tokenizer").exists()

    bad("broken.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2", "one JSON object")
    bad("field.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', "line 3", "'body'", "--text-field")
    bad("kind.jsonl", b'{"prompt": 7, "text": "b"}\n', "line 1", "must be text, got int")
    bad("empty.jsonl", b"", "empty")
    bad("latin.txt", b"caf\xe9", "not UTF-8")
    bad("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-20], "cannot be read")
    bad("picture.png", b"x", "not supported", "jsonl")
    absent = tmp_path / "absent.jsonl"
    says(refused(*scratch_options(home, tmp_path / "run", absent)), absent, "no such file")
    says(refused(*scratch_options(home, tmp_path / "run", BUNDLED / "none")), "no such file")
    assert not (tmp_path / "run").exists()


def test_out_is_taken(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    says(refused(*scratch_options(home, out)), out, "not empty", "--resume")
    own = [*train_options(home, out), "--base", home / "base", "--self-data", 5]
    says(refused(*own), out, "not empty")
    assert (out / "thesis.tex").read_text() == "precious"
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]  # and nothing was sampled
    (tmp_path / "file").write_text("x")
    says(refused(*scratch_options(home, tmp_path / "file")), "is a file")
    says(refused("train-tokenizer", "--data", home / "data.jsonl", "--out", out), "not empty")


def test_options_are_checked_before_sampling(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tidar.cli.self_sampling import BaseSampler

    monkeypatch.setattr(BaseSampler, "__call__", lambda *_: pytest.fail("hours of sampling"))
    given = [*train_options(home, tmp_path / "run"), "--base", home / "base", "--self-data", 5]
    says(refused(*given, "--learning-rat", 1), "learning_rate")
    says(refused(*given, "--masking", "half"), "full, random")


# --- other commands ---


def test_bench_verify_and_inspect(home: Path, copy: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "alpha"}\n{"prompt": \n')
    bench = ("bench", home / "base", "--runs", 1, "--max-new-tokens", 4)
    says(refused(*bench, "--prompts", prompts, "--methods", "ar"), prompts, "2")
    prompts.write_text('{"prompt": "alpha"}\n')
    says(refused(*bench, "--prompts", prompts, "--methods", "art"), "'art'", "tidar:plan")
    says(refused(*bench, "--prompts", prompts, "--methods", "tidar:4"), "tidar train")
    says(refused("verify", tmp_path / "absent"), tmp_path / "absent")
    says(refused("verify", copy, "--prompts", tmp_path / "absent"), tmp_path / "absent")
    says(refused("inspect", "decode", "--draft-len", 0), "0")
    (copy / "model.safetensors").write_bytes(b"")
    says(refused("verify", copy), copy / "model.safetensors")


# --- full disk ---


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes: the system refuses the write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_at_a_checkpoint(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = scratch_options(home, out)
    tidar(*scratch_options(home, tmp_path / "whole"))
    with small_files(100_000):  # the weights fit, the optimizer's state does not
        says(
            refused(*given), out, "could not be written", "No checkpoint was saved yet", "--resume"
        )
    tidar(*given, "--resume")
    assert_same_weights(tmp_path / "whole", out)
    for gone in ("checkpoint-6", "model"):
        shutil.rmtree(out / gone)
    with small_files(100_000):
        says(refused(*given, "--resume"), f"{out}/checkpoint-4 is whole", "free some space")
    assert not (out / ".partial").exists()
    assert not (out / "model").exists()
    tidar(*given, "--resume")
    assert_same_weights(tmp_path / "whole", out)


def test_full_disk_at_the_log(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    long = ("--max-steps", "12", "--save-strategy", "no")
    given, warm = [*scratch_options(home, out), *long], tmp_path / "warm"
    tidar(*scratch_options(home, warm), *long)  # the tokens are in the cache
    whole, other = ((warm / name).stat().st_size for name in ("log.jsonl", "run.json"))
    assert whole > other + 200, "the log is what must not fit"
    with small_files(whole - 100):
        says(refused(*given), out, "could not be written")
    half = (out / "log.jsonl").read_text()
    assert half
    assert len(half) <= whole - 100
    shutil.rmtree(warm)
    tidar(*given, "--resume")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))


def test_full_disk_while_tokenising(home: Path, tmp_path: Path) -> None:
    given = scratch_options(home, tmp_path / "run")
    given[given.index("--cache-dir") + 1] = tmp_path / "cache"
    with small_files(1000):
        says(refused(*given), tmp_path / "cache", "cannot be written")
    assert not list((tmp_path / "cache").iterdir())
    tidar(*given)


def test_full_disk_while_sampling(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was sampled stays, and the finished file is the one of an uninterrupted run."""
    from tidar.cli import train

    monkeypatch.setattr(train, "SAMPLED", 8)

    def convert(out: Path) -> list[object]:
        return [*train_options(home, out), "--base", home / "base", "--self-data", 60]

    tidar(*convert(tmp_path / "whole"))
    whole = (tmp_path / "whole" / "self-data.jsonl").read_bytes()
    with small_files(len(whole) // 2):
        message = refused(*convert(tmp_path / "run"))
    says(message, tmp_path / "run" / "self-data.jsonl", "same command again")
    assert len((tmp_path / "run" / "self-data.jsonl").read_bytes()) > len(whole) // 3
    tidar(*convert(tmp_path / "run"))
    assert (tmp_path / "run" / "self-data.jsonl").read_bytes() == whole
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


def test_full_disk_elsewhere(home: Path, tmp_path: Path) -> None:
    with small_files(1000):
        message = refused("train-tokenizer", "--data", home / "data.jsonl", "--vocab-size", 300,
                          "--out", tmp_path / "tokenizer")  # fmt: skip
    says(message, "tokenizer")
    (tmp_path / "p.jsonl").write_text('{"prompt": "alpha"}\n')
    bench = ("bench", home / "base", "--methods", "ar", "--runs", 1, "--max-new-tokens", 4)
    with small_files(100):
        says(refused(*bench, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "r.json"),
             tmp_path / "r.json")  # fmt: skip


# --- Ctrl-C ---


def interrupt_at(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int, *, times: int = 1
) -> None:
    """Presses Ctrl-C (`times` times) in the call number `calls` of `owner.name`."""
    original, count = getattr(owner, name), 0

    def pressed(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, pressed)


def test_ctrl_c_in_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    from tidar.decode.engine import Engine

    interrupt_at(monkeypatch, Engine, "_decode", 3)
    message = refused("generate", "x", "--method", "ar", "--json", code=130)
    assert message.split() == ["interrupted"]


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_training(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Once: a checkpoint at this step. Twice: at once, and the last checkpoint is there."""
    from tidar.training.objective import TrainingModel

    given = scratch_options(home, tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_at(patch, TrainingModel, "forward", 5, times=times)
        message = training_refused(given)
    says(message, tmp_path / "run", "--resume")
    if times == 1:
        says(message, "Stopped at step 5 of 6")
    saved = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert saved[-1] == ("checkpoint-5" if times == 1 else "checkpoint-4")
    assert not (tmp_path / "run" / "model").exists()
    tidar(*given, "--resume")
    tidar(*scratch_options(home, tmp_path / "whole"))
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


def training_refused(given: list[object]) -> str:
    """Like `refused`, with the log lines of a run left out."""
    message = refused(*given, code=130)
    return "\n".join(line for line in message.splitlines() if not line.startswith("step "))


def test_ctrl_c_while_tokenising(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tidar.training import data

    given = scratch_options(home, tmp_path / "run")
    given[given.index("--cache-dir") + 1] = tmp_path / "cache"
    with monkeypatch.context() as patch:
        interrupt_at(patch, data, "_encode", 1)
        says(training_refused(given), "Interrupted", "--resume")
    assert not list((tmp_path / "cache").iterdir())
    tidar(*given, "--resume")


def test_ctrl_c_while_sampling(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tidar.cli import self_sampling, train

    monkeypatch.setattr(train, "SAMPLED", 8)
    given = [*train_options(home, tmp_path / "run"), "--base", home / "base", "--self-data", 24]
    with monkeypatch.context() as patch:
        interrupt_at(patch, self_sampling, "sample_streams", 3)
        says(training_refused(given), tmp_path / "run", "are kept", "same command again")
    kept = (tmp_path / "run" / "self-data.jsonl").read_text().splitlines()
    assert len(kept) == 16
    with (tmp_path / "run" / "self-data.jsonl").open("a") as out:
        out.write('{"ids": [3')  # killed inside a line
    tidar(*given)
    lines = (tmp_path / "run" / "self-data.jsonl").read_text().splitlines()
    assert lines[:16] == kept
    assert len(lines) == 24
