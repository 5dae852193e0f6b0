"""A corpus, a tokenizer and an architecture to train, and short runs over them. Not a test itself."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from command import ARCH, WORDS
from safetensors.torch import load_file

from tidar.training.config import TrainConfig, objective_options
from tidar.training.sources import Source
from tidar.training.tokenizer import train_tokenizer

RUN = """
import json, sys
from tidar.training.config import TrainConfig
from tidar.training.trainer import train
train(TrainConfig.from_mapping(json.loads(sys.argv[1])))
"""
"""A program that trains by the settings in its first argument."""


def make_home(folder: Path) -> Path:
    """data.jsonl, tokenizer/ and arch.json in `folder`, which is returned."""
    chance = random.Random(0)
    rows = [" ".join(chance.choices(WORDS, k=chance.randint(4, 30))) for _ in range(120)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    train_tokenizer([Source(str(folder / "data.jsonl"))], folder / "tokenizer", vocab_size=280)
    (folder / "arch.json").write_text(json.dumps(ARCH))
    return folder


def settings(home: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Of a short run, with `changes`; of the options for spans those that the objective has."""
    has = objective_options(changes.get("objective", "tidar"))
    spans = {"draft_lens": "2,4", "anchors": "random"}
    spans = {name: changes.pop(name, usual) for name, usual in spans.items()}
    return {
        "out": str(out), "arch": str(home / "arch.json"), "tokenizer": str(home / "tokenizer"),
        "data": str(home / "data.jsonl"), "cache_dir": str(home / "cache"), "seq_len": 32,
        "max_steps": 8, "learning_rate": 1e-3,
        "per_device_train_batch_size": 4, "save_steps": 3, "logging_steps": 1, "seed": 3,
        "report_to": "none", "use_cpu": True,
        **{name: value for name, value in spans.items() if name in has}, **changes,
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
