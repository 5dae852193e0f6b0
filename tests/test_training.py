"""Runs from data to checkpoint: equal weights after any interruption, errors one can act on."""

import errno
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tidar.errors import TidarError
from tidar.hf_config import config_from_hf
from tidar.training import trainer
from tidar.training.config import TrainConfig
from tidar.training.data import Encoding, TokenData, prepare
from tidar.training.sources import Source, documents
from tidar.training.tokenizer import train_tokenizer
from tidar.weights import init_model

WORDS = ("alpha", "beta", "gamma", "delta", "one", "two", "three", "four")
RUN = """
import json, sys
from tidar.training.config import TrainConfig
from tidar.training.trainer import train
train(TrainConfig.from_mapping(json.loads(sys.argv[1])))
"""
ARCH = {
    "model_type": "qwen3", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a tokenizer and an architecture."""
    folder = tmp_path_factory.mktemp("training")
    chance = random.Random(0)
    rows = [" ".join(chance.choices(WORDS, k=chance.randint(4, 30))) for _ in range(120)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    train_tokenizer([Source(str(folder / "data.jsonl"))], folder / "tokenizer", vocab_size=280)
    (folder / "arch.json").write_text(json.dumps(ARCH))
    return folder


def settings(home: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "out": str(out), "arch": str(home / "arch.json"), "tokenizer": str(home / "tokenizer"),
        "data": str(home / "data.jsonl"), "cache_dir": str(home / "cache"), "seq_len": 32,
        "draft_lens": "2,4", "anchors": "random", "max_steps": 8, "learning_rate": 1e-3,
        "per_device_train_batch_size": 4, "save_steps": 3, "logging_steps": 1, "seed": 3,
        "report_to": "none", "use_cpu": True, **changes,
    }  # fmt: skip


def run(home: Path, out: Path, **changes: Any) -> Any:
    from tidar.training.trainer import train

    return train(TrainConfig.from_mapping(settings(home, out, **changes)))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def started(home: Path, out: Path, **changes: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", RUN, json.dumps(settings(home, out, **changes))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 100
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if not path.exists():
        process.kill()
        raise AssertionError(process.communicate()[1])


# --- runs ---


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_after_kill_ends_in_the_same_weights(
    home: Path, tmp_path: Path, optimizer: str
) -> None:
    """Law 9: kill -9 at some moment, resume, and get the weights of the uninterrupted run."""
    changes = {"optimizer": optimizer, "masking": "random", "max_steps": 40}
    whole = run(home, tmp_path / "whole", **changes)
    process = started(home, tmp_path / "killed", **changes)
    wait_for(tmp_path / "killed" / "checkpoint-6", process)
    time.sleep(random.Random(time.time()).random() * 0.2)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "model").exists()
    result = run(home, tmp_path / "killed", **changes, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "killed")
    assert result.clean_tokens == whole.clean_tokens == 40 * 4 * 32
    assert [row["step"] for row in log(tmp_path / "killed")] == list(range(1, 41))
    assert len(list((tmp_path / "killed").glob("checkpoint-*"))) == 2


def test_interrupt_leaves_a_checkpoint_to_resume_from(home: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 60, "save_steps": 1000}
    process = started(home, tmp_path / "run", **changes)
    wait_for(tmp_path / "run" / "log.jsonl", process)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode not in (0, None)
    assert "--resume" in message
    saved = list((tmp_path / "run").glob("checkpoint-*"))
    assert len(saved) == 1, message
    assert not (tmp_path / "run" / ".partial").exists()
    run(home, tmp_path / "run", **changes, resume=True)
    run(home, tmp_path / "whole", **changes)
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_a_half_written_checkpoint_is_never_resumed(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "run", max_steps=3)
    partial = tmp_path / "run" / ".partial" / "checkpoint-6"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    broken = tmp_path / "run" / "checkpoint-5"
    broken.mkdir()
    run(home, tmp_path / "run", resume=True)
    assert log(tmp_path / "run")[-1]["step"] == 8
    with pytest.raises(TidarError, match="not empty"):
        run(home, tmp_path / "run")


def test_two_processes_equal_one_with_twice_the_batch(home: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 5, "save_strategy": "no", "gradient_accumulation_steps": 2}
    (tmp_path / "run.py").write_text(RUN)
    given = settings(home, tmp_path / "two", per_device_train_batch_size=2, **changes)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        str(tmp_path / "run.py"), json.dumps(given),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    run(home, tmp_path / "one", **changes)
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        for key in ("loss", "clean_loss", "mask_loss"):
            assert one[key] == pytest.approx(two[key], abs=1e-5), key
    left, right = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in left:
        assert torch.allclose(left[name], right[name], atol=1e-4), name


def test_overfits_and_chains_from_ar_to_joint(home: Path, tmp_path: Path) -> None:
    """From scratch as AR, then joint from that checkpoint; a few sequences are learned by heart."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join((home / "data.jsonl").read_text().splitlines(keepends=True)[:4]))
    common = {"data": str(few), "learning_rate": 1e-2, "max_steps": 60, "logging_steps": 10}
    common |= {"save_strategy": "no", "anchors": "grid"}
    first = run(home, tmp_path / "ar", objective="ar", **common)
    assert "mask_loss" not in log(tmp_path / "ar")[-1]
    assert "tidar" not in json.loads((first.model / "config.json").read_text())
    base = {"base": str(first.model), "arch": None, "tokenizer": None}
    run(home, tmp_path / "joint", **base, **common, gradient_checkpointing=True)
    last = log(tmp_path / "joint")[-1]
    assert last["clean_loss"] < 1.0
    assert last["mask_loss"] < log(tmp_path / "joint")[0]["mask_loss"] / 2
    config = json.loads((tmp_path / "joint" / "model" / "config.json").read_text())
    assert config["tidar"]["draft_lens"] == [2, 4]
    assert config["eos_token_id"] == 0


def test_evaluation_changes_no_weight(home: Path, tmp_path: Path) -> None:
    from tidar.training.trainer import train

    calls = []

    def on_interval(net: Any, step: int) -> dict[str, float]:
        assert not net.training
        assert [layer.index for layer in net.layers] == [0, 1]
        torch.manual_seed(step)
        torch.rand(3), random.random()
        calls.append(step)
        return {"tokens_per_forward": 2.0}

    config = settings(
        home, tmp_path / "with", eval_every=3, eval_data={"held": str(home / "data.jsonl")}
    )
    train(TrainConfig.from_mapping({**config, "eval_sequences": 5}), on_interval=on_interval)
    run(home, tmp_path / "without")
    assert_same(tmp_path / "with", tmp_path / "without")
    assert calls == [0, 3, 6, 8]
    rows = [row for row in log(tmp_path / "with") if "tokens_per_forward" in row]
    assert [row["step"] for row in rows] == calls
    assert all(0 < row["eval/held/mask_loss"] < 10 for row in rows)


def test_the_measurement_before_the_first_step_is_taken_once(home: Path, tmp_path: Path) -> None:
    from tidar.training.trainer import train

    calls: list[int] = []

    def measured(**changes: Any) -> None:
        config = TrainConfig.from_mapping(
            settings(home, tmp_path / "run", eval_every=2, max_steps=4, save_steps=2, **changes)
        )
        train(config, on_interval=lambda _, step: calls.append(step) or {"measured": step})

    measured()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    measured(resume=True)
    assert calls == [0, 2, 4, 4]
    # Stopped before its first checkpoint: it begins again, and so does its log.
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    measured(resume=True)
    assert calls == [0, 2, 4, 4, 0, 2, 4]
    rows = [row["step"] for row in log(tmp_path / "run") if "measured" in row]
    assert rows == [0, 2, 4]


def test_interval_decoding_measures_each_draft_length(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tidar.cli import interval

    requests = []

    class Watched(interval.Engine):
        def run(self, given: Any = ()) -> Any:
            requests.extend(given)
            return super().run(given)

    monkeypatch.setattr(interval, "Engine", Watched)
    values = settings(home, tmp_path, eval_data={"held": str(home / "data.jsonl")})
    net = init_model(config_from_hf(ARCH, mask_token_id=319), 0).eval()
    logs = interval.IntervalDecoding(TrainConfig.from_mapping(values), 3, 8)(net, 0)
    assert list(logs) == [
        f"decode/held/t{temperature}/k{draft_len}/{name}"
        for temperature in (0, 1)
        for draft_len in (2, 4)
        for name in ("tokens_per_forward", "distinct_4")
    ]
    # At most one token per draft, and the model's own.
    assert all(1 <= logs[f"decode/held/t0/k{k}/tokens_per_forward"] <= k + 1 for k in (2, 4))
    assert [(r.params.temperature, r.params.seed) for r in requests] == [
        (temperature, seed) for temperature in (0, 0, 1, 1) for seed in range(3)
    ]


def test_data_seed_zero_is_a_seed(home: Path, tmp_path: Path) -> None:
    """With seed 3, data_seed 0 is the order of seed 0, in the token file and in the run."""
    first = {}
    for name, changes in (
        ("zero", {"seed": 3, "data_seed": 0}), ("same", {"seed": 0}), ("three", {"seed": 3})
    ):  # fmt: skip
        config = TrainConfig.from_mapping(settings(home, tmp_path / name, **changes))
        arguments = trainer.make_arguments(config, tmp_path / name)
        start = trainer._make_start(config, 3)
        data, _ = trainer._make_data(config, start, arguments)
        first[name] = trainer._make_run(data, arguments).__getitems__(range(4))["input_ids"]
    assert torch.equal(first["zero"], first["same"])
    assert not torch.equal(first["zero"], first["three"])


def test_one_process_uses_one_gpu(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class FourGpus(trainer.TrainingArguments):  # type: ignore[misc, unused-ignore]
        def __post_init__(self) -> None:
            super().__post_init__()
            assert self.device.type == "cpu"
            self._n_gpu = 4

    config = TrainConfig.from_mapping(settings(home, tmp_path))
    trainer.make_arguments(config, tmp_path)
    assert "torchrun" not in capsys.readouterr().err
    monkeypatch.setattr(trainer, "TrainingArguments", FourGpus)
    arguments = trainer.make_arguments(config, tmp_path)
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == 4
    assert "torchrun --nproc-per-node 4" in capsys.readouterr().err


def test_non_finite_gradient_stops_before_the_step(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tidar.training.objective import TrainingModel

    forward, kept, count = TrainingModel.forward, [], 0

    def broken(self: TrainingModel, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        nonlocal count
        count += 1
        outputs = forward(self, *args, **kwargs)
        if count == 3:
            kept.append((self, [p.detach().clone() for p in self.parameters()]))
            outputs["loss"] = outputs["loss"] * float("nan")
        return outputs

    monkeypatch.setattr(trainer.TrainingModel, "forward", broken)
    with pytest.raises(TidarError, match=r"step 3: the gradient norm is nan.*learning rate"):
        run(home, tmp_path / "run")
    model, before = kept[0]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_full_disk_keeps_the_last_checkpoint(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-6" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TidarError, match=r"no space left.*checkpoint-3 is whole"):
        run(home, tmp_path / "run")
    monkeypatch.undo()
    run(home, tmp_path / "run", resume=True)
    run(home, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "run")


# --- configuration ---


def test_unknown_options_name_the_nearest(home: Path, tmp_path: Path) -> None:
    good = settings(home, tmp_path / "run")
    for key, near in (("learning_rat", "learning_rate"), ("draft_len", "draft_lens")):
        with pytest.raises(TidarError, match=f"{key}.*{near}"):
            TrainConfig.from_mapping({**good, key: 1})
    with pytest.raises(TidarError, match="eval_every"):
        TrainConfig.from_mapping({**good, "eval_steps": 5})
    with pytest.raises(TidarError, match=r"save_only_model.*resumed"):
        TrainConfig.from_mapping({**good, "save_only_model": True})
    with pytest.raises(TidarError, match=r"optim \(adafactor\).*muon"):
        TrainConfig.from_mapping({**good, "optim": "adafactor", "optimizer": "muon"})
    assert TrainConfig.from_mapping({**good, "optim": "adafactor"}).optimizer == "adamw"
    with pytest.raises(TidarError, match="objective"):
        TrainConfig.from_mapping({**good, "objective": "both"})
    with pytest.raises(TidarError, match="nothing to train"):
        TrainConfig.from_mapping({**good, "arch": None})
    config = TrainConfig.from_mapping({**good, "data": ["a.jsonl=2.5", "b.jsonl"], "resume": "yes"})
    assert config.data == (Source("a.jsonl", 2.5), Source("b.jsonl"))
    assert config.resume
    assert config.draft_lens == (2, 4)
    assert config.arguments["max_steps"] == 8


# --- data ---


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
