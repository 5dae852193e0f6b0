"""The real command line, in this process, and a small world for it to work on. Not a test itself."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tidar.cli import app
from tidar.hf_config import TidarMeta
from tidar.model import ModelConfig
from tidar.weights import init_model, save_checkpoint

WORDS = ("alpha", "beta", "gamma", "delta", "one", "two", "three", "four")
ARCH = {
    "model_type": "qwen3", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


class Ran:
    """How a command ended: exit code, what it printed, and what it said on stderr."""

    def __init__(self, arguments: tuple[object, ...], stdin: str | None = None) -> None:
        result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception  # a traceback for the user

    @property
    def json(self) -> dict[str, object]:
        return json.loads(self.out)  # type: ignore[no-any-return]


def tidar(*arguments: object, stdin: str | None = None) -> Ran:
    """Runs `tidar ARGUMENTS`; it must succeed."""
    ran = Ran(arguments, stdin)
    assert ran.code == 0, ran.err
    return ran


def refused(*arguments: object, stdin: str | None = None, code: int = 2) -> str:
    """Runs `tidar ARGUMENTS`, which must fail with one screen on stderr and nothing else; the screen."""
    ran = Ran(arguments, stdin)
    assert ran.code == code, (ran.code, ran.out, ran.err)
    assert ran.out.strip() == ""
    lines = ran.err.strip().splitlines()
    assert 1 <= len(lines) < 25, ran.err
    assert max(map(len, lines)) < 600
    assert "Traceback" not in ran.err
    assert 'File "' not in ran.err
    return ran.err


def make_world(folder: Path) -> None:
    """data.jsonl, tokenizer/, arch.json and a random base model that ends its texts: base/."""
    chance = random.Random(0)
    rows = [" ".join(chance.choices(WORDS, k=chance.randint(4, 30))) for _ in range(120)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    tidar("train-tokenizer", "--data", folder / "data.jsonl", "--vocab-size", 280,
          "--out", folder / "tokenizer")  # fmt: skip
    (folder / "arch.json").write_text(json.dumps(ARCH))
    make_base(folder / "base", folder / "tokenizer")


def make_base(folder: Path, tokenizer: Path, *, mask_token_id: int | None = None) -> None:
    """A random model of the shape of `ARCH`; with a mask token, one that drafts at K = 2 and 4."""
    config = ModelConfig(
        model_type="qwen3", vocab_size=320, hidden_size=32, intermediate_size=48, num_layers=2,
        num_heads=2, num_kv_heads=1, head_dim=16, max_positions=64, tie_embeddings=True,
        qk_norm=True, mask_token_id=mask_token_id,
    )  # fmt: skip
    meta = None
    if mask_token_id is not None:
        meta = TidarMeta(draft_lens=(2, 4), mask_token_id=mask_token_id)
    model = init_model(config, seed=0)
    with torch.no_grad():
        model.embed.weight.mul_(4.0)
    save_checkpoint(folder, model, meta=meta, tokenizer_source=tokenizer,
                    generation_config={"eos_token_id": 0})  # fmt: skip


def train_options(home: Path, out: Path, *, spans: bool = True) -> list[object]:
    """Options of a short run on the CPU, with spans or without; what it starts from is left to the caller."""
    laid = ["--draft-lens", "2,4", "--anchors", "random"] if spans else []
    return [
        "train", "--out", out, "--cache-dir", home / "cache", "--seq-len", 32,
        *laid, "--max-steps", 6, "--save-steps", 2,
        "--learning-rate", "1e-3", "--per-device-train-batch-size", 4, "--logging-steps", 1,
        "--seed", 3, "--report-to", "none", "--use-cpu", "true",
    ]  # fmt: skip


def scratch_options(
    home: Path, out: Path, data: Path | None = None, *, spans: bool = True
) -> list[object]:
    """A short run from scratch."""
    return [*train_options(home, out, spans=spans), "--arch", home / "arch.json",
            "--tokenizer", home / "tokenizer", "--data", data or home / "data.jsonl"]  # fmt: skip


def assert_same_weights(one: Path, other: Path) -> None:
    left, right = (load_file(out / "model" / "model.safetensors") for out in (one, other))
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
