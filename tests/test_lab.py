"""The laboratory: its pieces, and all of it at once, tiny, on the CPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import ROOT, plain_logits, random_model

sys.path.append(str(ROOT))  # `lab` is run from the root of the repository

from lab import bits, contenders, corpus, measure, page, plan, quality, results, run, speeds, table

from tidar.bench.measure import AnyEngine, Pass, Settings, make_engine, make_request
from tidar.bench.prompts import Prompt
from tidar.bench.record import read_record
from tidar.decode.request import Request
from tidar.decode.spec import parse_method
from tidar.errors import TidarError
from tidar.hf_config import config_from_hf
from tidar.model import num_parameters
from tidar.tokens import Tokenizer
from tidar.training.config import TrainConfig
from tidar.training.objectives import OBJECTIVES
from tidar.weights import Checkpoint, load_checkpoint

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


def test_smoke_run_goes_from_text_to_table(smoke: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((smoke / "data" / "manifest.json").read_text())
    domains = corpus.domains(smoke / "data")
    assert set(domains) >= {"python", "arithmetic", "words"}
    for stage in STAGES:
        assert (smoke / stage / "model" / "config.json").is_file(), stage
    records = {path.stem: read_record(path) for path in (smoke / "records").glob("*.json")}
    present = [name for name, each in contenders.CONTENDERS.items() if not each.missing(smoke)]
    assert len(present) >= 7
    for name in present:
        for temperature in measure.temperatures_of(name):
            record = records[f"{name}_t{temperature:g}"]
            assert record["contender"] == name
            assert list(record["domains"]) == domains
            for domain, told in record["domains"].items():
                assert told["tokens_per_forward"] > 0
                assert told["prompts"] == manifest[domain]["prompts"] > 0
                assert 0 < told["distinct_4_of_real_text"] <= 1
            assert 0 <= record["domains"]["python"]["valid_python"] <= 1
    for stage in {contenders.CONTENDERS[name].stage for name in present}:
        record = records[f"bits_{stage}"]
        assert record["settings"]["is_bound"] == (stage not in ("ar", "tidar"))
        # Three steps from random weights: about the vocabulary's logarithm a token still.
        for told in record["bits_per_byte"].values():
            assert 2 < told["value"] < 9
            assert (told["error"] > 0) == record["settings"]["is_bound"]
    timed = [*present, *contenders.PAGED]
    for temperature in ("0", "1"):
        record = records[f"speed_t{temperature}"]
        assert list(record["contenders"]) == timed
        assert list(record["domains"]) == ["python", "arithmetic", "words"], "prose has no score"
        for told in record["domains"].values():
            assert list(told) == timed
            assert all(each["tokens_per_second"]["median"] > 0 for each in told.values())
            assert told["ar"]["over_ar"]["median"] == told["ar-paged"]["over_ar"]["median"] == 1
    qualities = sum(len(measure.temperatures_of(name)) for name in present)
    variants = sum(contenders.CONTENDERS[name].is_variant for name in present)
    assert qualities == 3 * 3 + 2 * (len(present) - 3 - variants) + variants
    assert len(records) == qualities + 5 + 2 + 2
    # On several GPUs they are taken in parts.
    parts = [record for part in run.measurements().values() for record in part.records]
    assert sorted(parts) == sorted(records)
    assert str(smoke) not in "".join(json.dumps(each["settings"]) for each in records.values())
    text = (smoke / "table.md").read_text()
    assert table.main([str(smoke / "records"), str(smoke)]) == 0
    assert text == (smoke / "table.md").read_text()
    # Given again it finds everything there, and neither trains nor measures.
    for module, names in (
        (run, ("train", "train_tokenizer")),
        (measure, ("write_record",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, None)
    monkeypatch.setattr(corpus, "build", None)
    assert run.main(["--smoke", "--out", str(smoke)]) == 0


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def rows_of(text: str, title: str, table: int = 0) -> dict[str, list[str]]:
    """Rows of a table of a section by their first cell (the two first, where the second is no figure)."""
    part = text.split(f"\n## The laboratory: {title}\n", 1)[1].split("\n## ", 1)[0]
    found = [each for each in part.split("\n\n") if each.startswith("|")][table]
    lines = [cells(line) for line in found.splitlines()]
    return {" ".join(row[: 1 + (lines[0][1] == "temperature")]): row for row in lines[2:]}


def test_page_tells_what_the_records_say(smoke: Path, tmp_path: Path) -> None:
    """Every contender has its rows, and the figures in them are the records'."""
    folder, target = smoke / "records", tmp_path / "docs" / "results.md"
    assert results.main([str(folder), "--page", str(target)]) == 0
    text = target.read_text()
    shelf = page.Shelf(folder)
    record = {path.stem: read_record(path) for path in folder.glob("*.json")}
    names = list(contenders.CONTENDERS)
    digests = {
        stage: {each["models"][stage]["weights_sha256"] for each in record.values() if stage in each["models"]}
        for stage in ("ar", "tidar", "llada")
    }  # fmt: skip
    assert all(len(each) == 1 for each in digests.values())  # all measured the same weights
    assert len({digest for each in digests.values() for digest in each}) == 3
    found = rows_of(text, "quality and tokens per forward")
    assert list(found) == [f"`{name}`" for name in names]
    for name in names:
        told = record[f"{name}_t0"]["domains"]
        assert found[f"`{name}`"][2] == (
            f"{told['python']['valid_python']:.1%} ({told['python']['tokens_per_forward']:.2f})"
        )
        assert f"{told['words']['exact_match']:.1%}" in found[f"`{name}`"][4]
    assert found["`speculative`"][1] == "`speculative:draft:4`"
    found = rows_of(text, "held-out text")
    for stage in ("ar", "tidar", "block-diffusion", "llada", "dream"):
        told = record[f"bits_{stage}"]["bits_per_byte"]["arithmetic"]
        assert f"{told['value']:.3f}" in found[f"`{stage}`"][2]
        assert found[f"`{stage}`"][2].startswith("≤") == (stage not in ("ar", "tidar"))
    found = rows_of(text, "what the joint loss costs the causal model")
    base, mine = (record[f"bits_{s}"]["bits_per_byte"]["words"]["value"] for s in ("ar", "tidar"))
    row = found["words: bits per byte"]
    assert row[1:] == [f"{base:.3f}", f"{mine:.3f}", f"{mine / base - 1:+.1%}"]
    for temperature in ("0", "1"):
        found = rows_of(text, f"speed at temperature {temperature}")
        told = record[f"speed_t{temperature}"]
        assert list(found) == [f"`{name}`" for name in (*names, *contenders.PAGED)]
        for name, about in told["contenders"].items():
            figures = told["domains"]["python"][name]
            assert found[f"`{name}`"][1] == about["engine"]
            assert found[f"`{name}`"][2].split(" ")[0] == f"{figures['over_ar']['median']:.2f}"
            assert found[f"`{name}`"][2].endswith(f" · {figures['tokens_per_forward']:.2f}")
            rate = f"{figures['tokens_per_second']['median']:,.0f}"
            assert rows_of(text, f"speed at temperature {temperature}", 1)[f"`{name}`"][2] == rate
    found = rows_of(text, "tokens per forward and repetition")
    assert len(found) == 1 + sum(len(measure.temperatures_of(name)) for name in names)
    told = record["tidar_t0.7"]["domains"]["python"]
    expected = (
        f"{told['tokens_per_forward']:.2f} · {told['distinct_4']:.2f} · {told['valid_python']:.1%}"
    )
    assert found["`tidar` 0.7"][2] == expected
    found = rows_of(text, "draft length and span set")
    free, forced = (record[f"schedules_{k}"]["domains"]["python"]["methods"] for k in ("free", "forced"))  # fmt: skip
    for name in contenders.SCHEDULES:
        row = found[f"`{name}`" + ("*" if ":32:" in name else "")]
        pair = (each[name]["tokens_per_forward"] for each in (free, forced))
        assert row[2] == " · ".join(f"{value:.2f}" for value in pair)
        assert row[-1].startswith(str(sum(
            each["methods"][name]["same_as_ar"]["differ"]
            for each in record["schedules_free"]["domains"].values()
        )))  # fmt: skip
    for picture in ("pareto_forward_t0", "pareto_forward_t1", "pareto_speed_t0", "pareto_speed_t1"):
        assert f"(images/{picture}.png)" in text
        assert (tmp_path / "docs" / "images" / f"{picture}.png").stat().st_size > 10_000
    for name in record:
        assert shelf.path(name) is not None
        assert f"[{name}](" in text


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On each prompt, in each run, with the same seed; speed over AR is over AR in the same engine."""
    network = random_model("qwen3")
    prompts = [Prompt(f"p{i}", (1 + i, 2, 3)) for i in range(2)]
    entrants = {}
    for name, method in (("ar", "ar"), ("tidar", "tidar:4:1"), ("ar-paged", "ar")):
        engine, spec = contenders.EVERYONE[name].engine, parse_method(method)
        asked = Settings(methods=(spec,), max_new_tokens=4, engine=engine)
        requests = [make_request(prompt, 0, asked, frozenset()) for prompt in prompts]
        made = make_engine(spec, network, requests, asked)
        entrants[name] = speeds.Entrant(spec, asked, made, frozenset())
    order, walls = [], {"ar": 2.0, "tidar": 0.5, "ar-paged": 0.1}
    real = speeds.run_pass

    def timed(engine: AnyEngine, requests: list[Request]) -> Pass:
        name = next(name for name, each in entrants.items() if each.engine is engine)
        order.append((name, requests[0].prompt, requests[0].params.seed))
        taken = real(engine, requests)
        taken.timing.wall = walls[name]
        taken.timing.host = walls[name] - taken.timing.prefill - taken.timing.decode
        return taken

    monkeypatch.setattr(speeds, "run_pass", timed)
    figures = speeds.figures_of(speeds.take_turns(entrants, prompts))
    assert order == speeds.RUNS * [
        (name, prompt.ids, index) for index, prompt in enumerate(prompts) for name in entrants
    ]
    over = {name: each["over_ar"]["median"] for name, each in figures.items()}
    assert over == {"ar": 1.0, "tidar": 4.0, "ar-paged": 1.0}
    rates = {name: each["tokens_per_second"]["median"] for name, each in figures.items()}
    assert rates == pytest.approx({"ar": 2.0, "tidar": 8.0, "ar-paged": 40.0})


def test_sections_without_records_are_not_written(smoke: Path, tmp_path: Path) -> None:
    for name in ("speed_t1", "bits_ar", "bits_tidar"):
        (tmp_path / f"{name}.json").write_bytes((smoke / "records" / f"{name}.json").read_bytes())
    text = results.text_of([tmp_path], tmp_path / "results.md")
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## The laboratory: held-out text", "## The laboratory: speed at temperature 1"]  # fmt: skip
    with pytest.raises(TidarError, match="no record that the page tells of"):
        results.text_of([tmp_path / "images"], tmp_path / "results.md")


def test_bits_per_byte_is_what_the_model_says(smoke: Path) -> None:
    """The AR twin's, token by token with plain passes; the bound of a model that says the same everywhere."""
    checkpoint = load_checkpoint(smoke / "ar" / "model")
    tokenizer = Tokenizer.load(checkpoint.folder)
    texts = ["def f(x):\n    return x\n", "12 + 5 = 17\n"]
    told = bits.bits_per_byte(checkpoint, tokenizer, parse_method("ar"), texts, 1)
    nats = size = 0.0
    for text in texts:
        ids = [*tokenizer.encode(text), min(tokenizer.eos_ids)]
        scores = plain_logits(checkpoint.model, ids[:-1]).log_softmax(-1)
        nats -= scores.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).sum().item()
        size += len(tokenizer.decode(ids[1:]).encode())
    assert told["value"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert told["bytes"] == size
    model = load_checkpoint(smoke / "llada" / "model").model
    with torch.no_grad():
        model.embed.weight.copy_(model.embed.weight[:1].expand_as(model.embed.weight))
    level = Checkpoint(
        model=model, config=model.config, meta=None, raw_config={}, generation_config={}, source="",
        folder=checkpoint.folder,
    )  # fmt: skip
    bound = bits.bits_per_byte(level, tokenizer, parse_method("masked-diffusion:32:16"), texts, 4)
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    exact = tokens * math.log2(model.config.vocab_size - 1) / size
    assert bound["value"] == pytest.approx(exact, rel=1e-5)
    assert bound["error"] < 1e-5


def test_contenders_have_seen_equally_many_clean_tokens() -> None:
    def steps(name: str) -> int:
        stage = plan.STAGES[name]
        return int(stage.values["max_steps"]) + (steps(stage.after) if stage.after else 0)

    assert {name: steps(name) for name in plan.STAGES} == {
        name: {"base": 1000, "eagle": 2400}.get(name, 2000) for name in plan.STAGES
    }
    for name in STAGES:
        values = {**plan.COMMON, **plan.STAGES[name].values, "data": "d", "out": "o", "base": "b"}
        config = TrainConfig.from_mapping(values)
        given = config.arguments
        sequences = given["per_device_train_batch_size"] * given.get(
            "gradient_accumulation_steps", 1
        )
        assert config.seq_len * sequences == 131_072


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
    assert quality.is_python_so_far(text) == valid


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
