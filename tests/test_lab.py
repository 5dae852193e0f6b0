"""The laboratory: its pieces, and all of it at once, tiny, on the CPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import ROOT, plain_logits

sys.path.append(str(ROOT))  # `lab` is run from the root of the repository

from lab import corpus, measure, plan, run, table

from tidar.bench.record import read_record
from tidar.errors import TidarError
from tidar.hf_config import config_from_hf
from tidar.model import num_parameters
from tidar.tokens import Tokenizer
from tidar.training.config import TrainConfig
from tidar.training.objectives import OBJECTIVES
from tidar.training.objectives.ar import ArObjective
from tidar.training.objectives.masked_diffusion import MaskedDiffusionObjective
from tidar.weights import load_checkpoint

STAGES = [name for name, stage in plan.STAGES.items() if stage.values["objective"] in OBJECTIVES]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lab") / "out"
    command = [sys.executable, "-m", "lab.run", "--smoke", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_smoke_run_goes_from_text_to_table(
    smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((smoke / "data" / "manifest.json").read_text())
    domains = corpus.domains(smoke / "data")
    assert set(domains) >= {"python", "arithmetic", "words"}
    for stage in STAGES:
        assert (smoke / stage / "model" / "config.json").is_file(), stage
    contenders = [
        name
        for name, each in measure.CONTENDERS.items()
        if each.stage in STAGES and (each.helper is None or each.helper in STAGES)
    ]
    assert len(contenders) >= 7
    for name in contenders:
        for temperature in (0, 1):
            record = read_record(smoke / "records" / f"{name}_t{temperature}.json")
            assert record["contender"] == name
            assert list(record["domains"]) == domains
            for domain, told in record["domains"].items():
                assert told["speed"]["tokens_per_second"]["median"] > 0
                assert told["quality"]["prompts"] == manifest[domain]["prompts"] > 0
    for stage in {measure.CONTENDERS[name].stage for name in contenders}:
        record = read_record(smoke / "records" / f"bits_{stage}.json")
        assert record["settings"]["is_bound"] == (stage not in ("ar", "tidar"))
        # Three steps from random weights: about the vocabulary's logarithm a token still.
        assert all(2 < each["value"] < 9 for each in record["bits_per_byte"].values())
    assert table.main([str(smoke / "records"), str(tmp_path)]) == 0
    text = (tmp_path / "table.md").read_text()
    assert text == (smoke / "table.md").read_text()
    for name in contenders:
        assert text.count(f"| `{name}` |") == 2 * len(domains)
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    # Given again it finds everything there, and neither trains nor measures.
    for module, names in (
        (run, ("train", "train_tokenizer")),
        (measure, ("run_bench", "bits_per_byte")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, None)
    monkeypatch.setattr(corpus, "build", None)
    assert run.main(["--smoke", "--out", str(smoke)]) == 0


def test_bits_per_byte_is_what_the_model_says(smoke: Path) -> None:
    """The AR twin's, token by token with plain passes; a text of one token after the first, for the bound."""
    checkpoint = load_checkpoint(smoke / "ar" / "model")
    tokenizer = Tokenizer.load(checkpoint.folder)
    texts = ["def f(x):\n    return x\n", "12 + 5 = 17\n"]
    told = measure.bits_per_byte(checkpoint, tokenizer, ArObjective(), texts, 1)
    nats = size = 0.0
    for text in texts:
        ids = [*tokenizer.encode(text), min(tokenizer.eos_ids)]
        scores = plain_logits(checkpoint.model, ids[:-1]).log_softmax(-1)
        nats -= scores.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).sum().item()
        size += len(tokenizer.decode(ids[1:]).encode())
    assert told["value"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert told["bytes"] == size
    # Without context, whatever is hidden, the bound is the value: a model that says the same everywhere.
    model = load_checkpoint(smoke / "llada" / "model").model
    with torch.no_grad():
        model.embed.weight.copy_(model.embed.weight[:1].expand_as(model.embed.weight))
    level = measure.Checkpoint(
        model=model, config=model.config, meta=None, raw_config={}, generation_config={}, source="",
        folder=checkpoint.folder,
    )  # fmt: skip
    bound = measure.bits_per_byte(level, tokenizer, MaskedDiffusionObjective(), texts, 400)
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    exact = tokens * math.log2(model.config.vocab_size - 1) / size
    assert bound["value"] == pytest.approx(exact, abs=4 * bound["error"])
    assert bound["error"] < 0.1 * exact


def test_contenders_have_seen_equally_many_clean_tokens() -> None:
    def steps(name: str) -> int:
        stage = plan.STAGES[name]
        return int(stage.values["max_steps"]) + (steps(stage.after) if stage.after else 0)

    assert {name: steps(name) for name in plan.STAGES} == {
        name: {"base": 1500, "eagle": 4500}.get(name, 3500) for name in plan.STAGES
    }
    for name in STAGES:
        values = {**plan.COMMON, **plan.STAGES[name].values, "data": "d", "out": "o", "base": "b"}
        config = TrainConfig.from_mapping(values)
        assert config.seq_len * config.arguments["per_device_train_batch_size"] == 131_072


def test_the_backbone_is_as_small_as_it_should_be() -> None:
    shapes = {
        name: json.loads(Path(plan.arch_file(name)).read_text()) for name in ("backbone", "draft")
    }
    sizes = {name: num_parameters(config_from_hf(raw)) for name, raw in shapes.items()}
    assert 20e6 <= sizes["backbone"] <= 28e6
    assert 2 * sizes["backbone"] < 64 << 20
    assert sizes["draft"] < sizes["backbone"] / 10
    assert (
        shapes["backbone"]["vocab_size"] == shapes["draft"]["vocab_size"] > plan.FULL.tokenizer_size
    )


def test_held_out_text_is_not_in_training() -> None:
    words = [[f"w{document}x{place}" for place in range(60)] for document in range(200)]
    texts = [" ".join(each) for each in words]
    held_out = {row["text"] for row in corpus.divide(texts)[1]}
    assert 3 < len(held_out) < 30
    near = [text + " and more" for text in held_out]
    train, again = corpus.divide([*texts, *near])
    kept = {row["text"] for row in train}
    assert held_out <= {row["text"] for row in again}
    assert not kept & {*held_out, *near}
    assert kept == set(texts) - held_out
    assert corpus.divide(reversed(texts)) == corpus.divide([*texts, texts[0]])


def test_passages_hold_all_of_a_book() -> None:
    book = "\n\n".join(f"paragraph {number} " + "word " * 60 for number in range(100))
    parts = list(corpus.passages(book))
    assert len(parts) > 10
    assert all(corpus.PASSAGE <= len(part) < corpus.PASSAGE + 400 for part in parts[:-1])
    assert [line.split()[1] for part in parts for line in part.split("\n\n")] == [
        str(number) for number in range(100)
    ]


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("def f(x):\n    return x\n", True),
        ("def f(x):\n    return x\n\ndef g(", True),
        ("def f(x):\n", True),
        ("x = [1,\n     2,\n", True),
        ("def f(x):\nreturn x\n", False),
        ("x = = 1\n", False),
        ("if x:\n    y = 1\n  z = 2\n", False),
    ],
)
def test_python_so_far(text: str, valid: bool) -> None:
    assert measure.is_python_so_far(text) == valid


def test_what_cannot_be_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--out", str(tmp_path), "teacher"]) == 2
    assert run.main(["--out", str(tmp_path), "tokenizer"]) == 2
    assert run.main(["--out", str(tmp_path), "table"]) == 2
    told = capsys.readouterr().err
    assert "stage 'teacher' is not known; allowed: corpus, tokenizer" in told
    assert "build the corpus first" in told
    assert "has no records" in told
    sizes = corpus.Sizes(calculations=0, stories=0, held_out=0)
    with pytest.raises(TidarError, match="no domain has text"):
        corpus.build(tmp_path / "data", corpus.Texts(), sizes)
