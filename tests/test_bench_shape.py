"""System speed: made-up acceptance comes out as asked, sweeps are labelled, nothing is said of texts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import ARCH, refused, tidar

from tidar.bench.acceptance import LABEL, Acceptance
from tidar.bench.measure import Settings
from tidar.bench.record import read_record
from tidar.bench.shapes import Cell, find_shape, measure_cell, random_prompts, shape_config
from tidar.decode.spec import parse_methods
from tidar.errors import TidarError
from tidar.layout import Schedule, dense_schedule
from tidar.weights import init_model

TINY = {**ARCH, "vocab_size": 64, "max_position_embeddings": 1024}


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


# --- acceptance ---


@pytest.mark.parametrize("mean", [1.0, 1.5, 4.0, 7.3, 16.0])
def test_a_mean_is_solved(mean: float) -> None:
    found = Acceptance.of_mean(mean, 16)
    assert found.mean == pytest.approx(mean, abs=1e-6)
    assert sum(found.histogram) == pytest.approx(1.0)
    assert len(found.histogram) == found.draft_len == 16
    assert len(set(found.survival[1:])) == 1
    assert found.expected(Schedule(1, ())) == 1.0


def test_histogram_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "survival.json"
    path.write_text("[0.5, 0.25, 1.0, 0.9]")
    found = Acceptance.parse(str(path), 4)  # what lies deeper than K is not used
    assert found.survival == (1.0, 0.5, 0.25, 1.0)
    assert found.histogram == (0.5, 0.375, 0.0, 0.125)
    assert found.mean == 0.5 + 2 * 0.375 + 4 * 0.125
    assert found.expected(Schedule(4, (1,))) < found.expected(dense_schedule(4)) <= found.mean
    assert found.to_json()["histogram"] == {"1": 0.5, "2": 0.375, "3": 0.0, "4": 0.125}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[0.5]", "K = 4 needs 3"),
        ("{}", "JSON list"),
        ("[0.5, 2, 0.1]", "from 0 to 1"),
        ("[0.5, true, 0.1]", "from 0 to 1"),
        ("[", "neither a number nor"),
    ],
)
def test_acceptance_files_that_are_wrong(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "survival.json"
    path.write_text(content)
    with pytest.raises(TidarError, match=message):
        Acceptance.parse(str(path), 4)


@pytest.mark.parametrize("spans", ["dense", "two-forward"])
@pytest.mark.parametrize(("mean", "behind"), [(2.0, 0), (4.0, 1)])
def test_what_is_replayed_comes_out(mean: float, behind: int, spans: str, shape: Path) -> None:
    """A long text under schedules whose drafts are never shifted; none is cut short."""
    from tidar.bench.measure import run_pass
    from tidar.decode.paged_engine import EngineLimits
    from tidar.decode.request import Request

    model = init_model(shape_config(str(shape)), 0).eval()
    acceptance = Acceptance.of_mean(mean, 8)
    limits = EngineLimits(max_running=1, max_draft_len=8, behind=behind)
    (spec,) = parse_methods(f"tidar:8:{spans}")
    engine = spec.engine(model, limits=limits, replay=acceptance.replay(torch.device("cpu"), 3))
    (prompt,) = random_prompts(model.config, 1, 20, 0)
    (text,) = run_pass(engine, [Request(prompt=prompt.ids, max_new_tokens=900)]).texts
    assert len(text.ids) == 900
    wanted = mean if spans == "dense" else (1 + mean) / 2
    assert text.decoded / text.steps == pytest.approx(wanted, rel=0.12)
    assert text.decoded / text.steps == pytest.approx(acceptance.expected(spec.schedule), rel=0.12)  # type: ignore[arg-type]


# --- shapes ---


def test_shapes_by_name_file_and_folder(shape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = shape_config("qwen3-8b")
    assert (config.num_layers, config.hidden_size, config.max_positions) == (36, 4096, 40960)
    assert config.qk_norm
    assert not config.tie_embeddings
    assert config.mask_token_id == 151935
    assert find_shape(str(shape)) == shape
    folder = shape.parent / "model"
    folder.mkdir()
    shape.rename(folder / "config.json")
    assert shape_config(str(folder)).mask_token_id == 63
    with pytest.raises(TidarError, match=r"known names: .*qwen3-8b.*Give the path"):
        find_shape("qwen9")
    monkeypatch.setattr("tidar.bench.shapes.shape_folders", list)
    with pytest.raises(TidarError, match=r"source tree, which is not here.*path/to/config"):
        find_shape("qwen3-8b")


def test_random_weights_in_their_own_dtype(shape: Path) -> None:
    config = shape_config(str(shape))
    model = init_model(config, 5, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.layers[0].qkv.weight.detach().float().std().item() == pytest.approx(0.02, rel=0.1)
    again = init_model(config, 5, dtype=torch.bfloat16)
    assert torch.equal(model.embed.weight, again.embed.weight)


def test_random_prompts_are_seeded_and_never_the_mask(shape: Path) -> None:
    config = shape_config(str(shape))
    prompts = random_prompts(config, 3, 200, 1)
    assert prompts == random_prompts(config, 3, 200, 1)
    assert [len(p.ids) for p in prompts] == [200] * 3
    assert len({p.ids for p in prompts}) == 3
    assert max(max(p.ids) for p in prompts) < config.mask_token_id  # type: ignore[operator]


# --- cells ---


def test_a_cell(shape: Path) -> None:
    model = init_model(shape_config(str(shape)), 0).eval()
    settings = Settings(
        methods=parse_methods("ar,tidar:4:dense,tidar:8:1,2"),
        max_new_tokens=60,
        runs=2,
        engine="paged",
        replay=Acceptance.of_mean(3.0, 8),
        replays=2,
    )
    cell = measure_cell(model, Cell(100, 3), settings)
    assert (cell["context"], cell["batch"]) == (100, 3)
    ar = cell["methods"]["ar"]
    assert ar["tokens_per_forward"] == 1.0
    assert ar["x_ar"]["end_to_end"]["median"] == 1.0
    for name, figures in cell["methods"].items():
        assert figures["label"] == LABEL
        assert figures["tokens"] == 2 * 3 * 60 * (1 if name == "ar" else 2)
        assert figures["step_milliseconds"]["sequences"] == 3, name
        assert figures["memory"]["cache_bytes"] > 0
        assert not {"distinct_4", "same_as_ar", "same_in_every_run", "exact_match"} & set(figures)
    assert 1.5 < cell["methods"]["tidar:4:dense"]["tokens_per_forward"] <= 4
    expected = cell["methods"]["tidar:8:1,2"]["expected_tokens_per_forward"]
    assert 1 < expected < 3.0
    gain = cell["methods"]["tidar:8:1,2"]["x_ar"]["decode_at_expected"]
    assert 0 < gain["min"] <= gain["median"] <= gain["max"]
    assert ar["x_ar"]["decode_at_expected"]["median"] == 1.0


def sweep(shape: Path, *changes: object) -> tuple[object, ...]:
    return (
        "bench", "--shape", shape, "--random-weights", "--replay-acceptance", 3, "--runs", 2,
        "--methods", "ar,tidar:8:1,2,4,8", "--max-new-tokens", 24, "--replays", 1, *changes,
    )  # fmt: skip


def test_sweep(shape: Path, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    ran = tidar(*sweep(shape, "--context", "16,40", "--batch", "1,2", "--out", out))
    record = read_record(out)
    assert [(c["context"], c["batch"]) for c in record["cells"]] == [
        (16, 1), (16, 2), (40, 1), (40, 2),
    ]  # fmt: skip
    assert record["label"] == LABEL
    assert record["acceptance"]["mean"] == pytest.approx(3.0)
    assert len(record["acceptance"]["histogram"]) == 8
    assert record["model"]["random_weights"] is True
    assert record["model"]["source"] == "tiny"
    settings = record["settings"]
    assert (settings["engine"], settings["seed"]) == ("paged", 0)
    assert "untimed" in settings["warm_up"]
    assert "gpu_clocks" in record["environment"]
    for cell in record["cells"]:
        assert set(cell["methods"]) == {"ar", "tidar:8:1,2,4,8"}
        assert cell["methods"]["tidar:8:1,2,4,8"]["x_ar"]["decode"]["median"] > 0
    flat = " ".join(ran.out.split())
    assert flat.count(LABEL) >= 5
    assert "P(n): 1:" in flat
    assert "x AR, all (decode only)" in flat
    for absent in ("same as AR", "distinct-4", "end of text"):
        assert absent not in flat
    printed = tidar(*sweep(shape, "--context", "16", "--json")).json
    assert len(printed["cells"]) == 1  # type: ignore[arg-type]


def test_random_weights_alone_are_labelled(shape: Path) -> None:
    ran = tidar("bench", "--shape", shape, "--methods", "ar,tidar:4:1", "--runs", 1,
                "--context", 8, "--max-new-tokens", 8)  # fmt: skip
    assert "random weights" in ran.out
    assert LABEL not in ran.out


def test_one_cell_without_memory_does_not_stop_the_others(
    shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tidar.bench.shapes as shapes

    measure = shapes.measure_cell

    def scarce(model: Any, cell: Cell, *rest: Any) -> Any:
        if cell.batch == 2:
            raise torch.OutOfMemoryError("no room")
        return measure(model, cell, *rest)

    monkeypatch.setattr(shapes, "measure_cell", scarce)
    out = tmp_path / "record.json"
    ran = tidar(*sweep(shape, "--context", "16", "--batch", "1,2", "--out", out))
    assert "not measured: no room" in " ".join(ran.out.split())
    assert [bool(cell["methods"]) for cell in read_record(out)["cells"]] == [True, False]
    assert "no room" in refused(*sweep(shape, "--context", "16", "--batch", "2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--shape", "nope"), "known names"),
        (("--replay-acceptance", "9"), "from 1 to 8"),
        (("--replay-acceptance", "0.5"), "from 1 to 8"),
        (("--replay-acceptance", "absent.json"), "neither a number nor"),
        (("--replays", "0"), "replays is 0"),
        (("--context", "2000"), "does not fit"),
        (("--context", "980", "--decode-only"), "up to 81 new tokens"),
        (("--decode-only", "--engine", "plain"), "Only the paged engine"),
        (("--context", "1,x"), "--context '1,x'"),
        (("--batch", "0"), "--batch '0'"),
        (("--engine", "plain"), "Only the paged engine"),
        (("--engine", "fast"), "auto, plain or paged"),
        (("--teacher-forced",), "--teacher-forced cannot be used with --shape"),
        (("--prompts", "p.jsonl"), "--prompts cannot be used with --shape"),
    ],
)
def test_mistakes(changes: tuple[str, ...], message: str, shape: Path) -> None:
    assert message in " ".join(refused(*sweep(shape, *changes)).split())


def test_mistakes_without_a_shape(tmp_path: Path) -> None:
    assert "--prompts FILE" in refused("bench")
    prompts = ("bench", "--prompts", tmp_path / "p.jsonl")
    assert "--context cannot be used without" in refused(*prompts, "--context", "5")
    assert "--batch with several values" in refused(*prompts, "--batch", "1,2")
    for option in (("--replay-acceptance", "3"), ("--replays", "3"), ("--decode-only",)):
        assert f"{option[0]} cannot be used without" in refused(*prompts, *option)
    assert "it needs one" in refused("bench", "--shape", "qwen3-8b", "--replays", 2)
