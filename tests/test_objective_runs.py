"""Short runs of every objective: the loss falls, the checkpoint says what it is and decodes, resuming holds."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from command import ARCH, tidar
from published import llada_folder
from training_runs import assert_same, log, make_home, run, settings

from tidar.api import load
from tidar.cli import interval
from tidar.cli.interval import methods_of
from tidar.errors import TidarError
from tidar.hf_config import TidarMeta, config_from_hf
from tidar.training.config import TrainConfig
from tidar.training.objectives import OBJECTIVES, ObjectiveName
from tidar.training.start import read_as_base
from tidar.weights import init_model, load_checkpoint

RUNS: dict[str, dict[str, Any]] = {
    "ar": {"objective": "ar"},
    "tidar": {"objective": "tidar"},
    "block": {"objective": "block-diffusion"},
    "full": {"objective": "block-diffusion", "span_attention": "full", "documents": "joined"},
    "llada": {"objective": "masked-diffusion"},
    "dream": {"objective": "masked-diffusion", "label_shift": True, "documents": "joined"},
}
ENTRIES = {
    "block": {"objective": "block-diffusion", "attention": "causal", "span_attention": "causal",
              "draft_lens": [2, 4], "alpha": 0.0, "masking": "random"},
    "full": {"objective": "block-diffusion", "span_attention": "full", "draft_lens": [2, 4]},
    "llada": {"objective": "masked-diffusion", "attention": "bidirectional", "label_shift": False,
              "draft_lens": []},
    "dream": {"objective": "masked-diffusion", "attention": "bidirectional", "label_shift": True},
}  # fmt: skip
METHODS = {
    "block": ["block-diffusion:2:0.9", "block-diffusion:4:0.9"],
    "full": ["block-diffusion:2:0.9:full", "block-diffusion:4:0.9:full"],
    "llada": ["masked-diffusion:32:16"],
    "dream": ["masked-diffusion:32:16:entropy:shift"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("objectives"))


@pytest.mark.parametrize("name", RUNS)
def test_learns_a_few_texts_by_heart(home: Path, tmp_path: Path, name: str) -> None:
    """From random weights; held-out losses are of the same texts, with the noise of epoch 0."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join((home / "data.jsonl").read_text().splitlines(keepends=True)[:4]))
    result = run(
        home, tmp_path / "run", data=str(few), eval_data={"few": str(few)}, learning_rate=1e-2,
        max_steps=60, eval_every=60, logging_steps=20, anchors="grid", save_strategy="no",
        **RUNS[name],
    )  # fmt: skip
    rows = log(tmp_path / "run")
    kind = "clean_loss" if name == "ar" else "mask_loss"
    before, after = (row[f"eval/few/{kind}"] for row in (rows[0], rows[-1]))
    assert before > 4.0
    assert after < (0.5 if name in ("ar", "tidar") else 0.7) * before
    entry = json.loads((result.model / "config.json").read_text()).get("tidar")
    if name in ENTRIES:
        assert entry | ENTRIES[name] == entry
        meta = load_checkpoint(result.model).meta
        assert meta is not None
        assert meta.to_json() == entry
        for method in METHODS[name]:
            options = ("--method", method, "--ignore-eos", "-n", 9, "--device", "cpu", "--json")
            told = tidar("generate", "alpha beta", "--model", result.model, *options).json
            assert told["tokens"] == 9
        # Without a name: the method it was trained for, read as it was trained.
        model = load(result.model, device="cpu")
        assert model.default_method.split(":")[0] == RUNS[name]["objective"]
        named = model.generate(
            "alpha beta", method=METHODS[name][-1], max_new_tokens=9, ignore_eos=True
        )
        short = METHODS[name][-1].removesuffix(":full").removesuffix(":entropy:shift")
        told = model.generate("alpha beta", method=short, max_new_tokens=9, ignore_eos=True)
        assert told.ids == named.ids
        if RUNS[name]["objective"] == "block-diffusion":
            reading_it_causally_is_told(result.model, METHODS[name][-1])
    elif name == "tidar":
        # What earlier versions read: no key that they do not know.
        assert set(entry) == {"format_version", "draft_lens", "mask_token_id", "alpha", "masking"}
    else:
        assert entry is None


def reading_it_causally_is_told(folder: Path, own: str) -> None:
    """Block diffusion's weights: by everything that reads them so, and by nothing else."""
    told = rf"{folder} was trained for block diffusion.* own method is {own.removesuffix(':full')}$"
    model = load(folder, device="cpu")
    for method in ("ar", "tidar", f"speculative:{folder}:2"):
        with pytest.warns(UserWarning, match=told):
            model.generate("alpha beta", method=method, max_new_tokens=4, span_set="plan")
        with pytest.warns(UserWarning, match=told):
            tidar(
                "generate",
                "alpha",
                "--model",
                folder,
                "--method",
                method,
                "-n",
                3,
                "--device",
                "cpu",
            )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate("alpha beta", max_new_tokens=4)
    read = tidar("inspect", "model", folder)
    assert "no causal loss has trained it" in read.out
    assert f"--method {own.removesuffix(':full')}" in read.out
    assert tidar("inspect", "model", folder, "--json").json["method"] == own.removesuffix(":full")


@pytest.mark.parametrize("name", ["full", "dream"])
def test_resumed_ends_in_the_same_weights(home: Path, tmp_path: Path, name: str) -> None:
    """Law 9: stopped behind step 3 of 8 and resumed, with the noise of the steps that were left."""
    options = {**RUNS[name], "anchors": "grid", "lr_scheduler_type": "constant"}
    run(home, tmp_path / "whole", **options)
    run(home, tmp_path / "cut", **options, max_steps=3)
    run(home, tmp_path / "cut", **options, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert log(tmp_path / "cut")[-1]["mask_loss"] == log(tmp_path / "whole")[-1]["mask_loss"]


def test_what_may_follow_what(home: Path, tmp_path: Path) -> None:
    """Dream's way from autoregressive weights, and on; what was never read causally is not trained so."""
    options = {"max_steps": 2, "save_strategy": "no"}
    first = run(home, tmp_path / "ar", objective="ar", **options).model
    options |= {"arch": None, "tokenizer": None}
    dream = run(home, tmp_path / "dream", base=str(first), **RUNS["dream"], **options).model
    for unset, shifted in ((None, True), (False, False), ("no", False)):
        on = run(home, tmp_path / f"on-{unset}", base=str(dream), objective="masked-diffusion",
                 label_shift=unset, **options).model  # fmt: skip
        config = load_checkpoint(on).config
        assert (config.attention, config.label_shift) == ("bidirectional", shifted)
    for objective in ("ar", "tidar", "block-diffusion"):
        with pytest.raises(TidarError, match=f"objective '{objective}' reads causally"):
            run(home, tmp_path / "none", base=str(dream), objective=objective, **options)
    for name in ("tidar", "block", "full"):
        grid = {**options, "anchors": "grid"}
        spans = run(home, tmp_path / name, base=str(first), **RUNS[name], **grid).model
        generation = json.loads((spans / "generation_config.json").read_text())
        assert generation["suppress_tokens"]
        # Back to a plain causal model, which knows no mask token.
        back = run(home, tmp_path / f"{name}-ar", base=str(spans), objective="ar", **options).model
        opened = load_checkpoint(back)
        assert opened.meta is None
        assert opened.config.mask_token_id is None
        assert "tidar" not in json.loads((back / "config.json").read_text())
        generation = json.loads((back / "generation_config.json").read_text())
        assert "suppress_tokens" not in generation
    # Unset is as the base is read; what is given wins.
    changes = {**grid, "base": str(spans), "objective": "block-diffusion", "documents": "joined"}
    for given, read in ((None, "full"), ("causal", "causal")):
        out = tmp_path / f"again-{given}"
        again = run(home, out, **changes, span_attention=given).model
        assert load_checkpoint(again).config.span_attention == read
        again_config = TrainConfig.from_mapping(
            settings(home, out, **changes, span_attention=given)
        )
        full = ":full" if read == "full" else ""
        assert methods_of(read_as_base(again_config))[-1] == f"block-diffusion:4:0.9{full}"
    with pytest.raises(TidarError, match="'full' needs anchors 'grid'"):
        run(home, tmp_path / "none", **{**changes, "anchors": "random"})


def test_published_families_are_no_base(home: Path, tmp_path: Path) -> None:
    llada_folder(tmp_path / "llada")
    changes = {"base": str(tmp_path / "llada"), "arch": None, "tokenizer": None, **RUNS["llada"]}
    with pytest.raises(TidarError, match="llada checkpoint, which opens for decoding alone"):
        run(home, tmp_path / "out", **changes)


@pytest.mark.parametrize("name", ["tidar", *METHODS])
def test_interval_decodes_with_the_method_of_the_objective(
    home: Path, tmp_path: Path, name: str
) -> None:
    values = {**RUNS[name], "anchors": "grid", "eval_data": {"held": str(home / "data.jsonl")}}
    config = TrainConfig.from_mapping(settings(home, tmp_path, **values))
    net = init_model(config_from_hf(ARCH, mask_token_id=319), 0).eval()
    logs = interval.IntervalDecoding(config, 2, 8)(config.objective_with(0).model(net), 0)
    labels = METHODS.get(name, ["k2", "k4"])
    assert set(logs) == {
        f"decode/held/t{temperature}/{label}/{figure}"
        for temperature in (0, 1)
        for label in labels
        for figure in ("tokens_per_forward", "distinct_4")
    }
    if name in ("llada", "dream"):
        # 56 tokens: spans of 32 and 24 in 16 passes each.
        assert logs[f"decode/held/t0/{labels[0]}/tokens_per_forward"] == pytest.approx(56 / 32)


def test_the_command_says_how_the_checkpoint_decodes(home: Path, tmp_path: Path) -> None:
    options = ["train", "--arch", home / "arch.json", "--tokenizer", home / "tokenizer", "--data",
               home / "data.jsonl", "--cache-dir", home / "cache", "--seq-len", 32, "--max-steps", 1,
               "--per-device-train-batch-size", 2, "--use-cpu", "true", "--report-to", "none"]  # fmt: skip
    ran = tidar(*options, "--out", tmp_path / "one", "--objective", "masked-diffusion", "--label-shift",
                "--documents", "joined")  # fmt: skip
    assert "Decodes with --method masked-diffusion:32:16:entropy:shift" in ran.out
    told = tidar(*options, "--out", tmp_path / "two", "--objective", "block-diffusion",
                 "--span-attention", "full", "--draft-lens", 4, "--json").json  # fmt: skip
    assert told["methods"] == ["block-diffusion:4:0.9:full"]
    config = json.loads((tmp_path / "two" / "model" / "config.json").read_text())
    assert config["tidar"]["span_attention"] == "full"


def test_every_objective_takes_its_options_from_the_configuration(
    home: Path, tmp_path: Path
) -> None:
    for name in OBJECTIVES:
        values = settings(home, tmp_path, objective=name, seed=9, head_chunk=7, anchors="grid")
        if name == "eagle":  # never from scratch
            values.update(base="base", arch=None, tokenizer=None)
        objective = TrainConfig.from_mapping(values).objective_with(11)
        assert type(objective) is OBJECTIVES[name]
        assert (objective.seed, objective.head_chunk) == (11, 7)
        if name in ("tidar", "block-diffusion"):
            assert objective.draft_lens == (2, 4)  # type: ignore[attr-defined]
    assert set(OBJECTIVES) == set(ObjectiveName.__args__)  # type: ignore[attr-defined]


def test_an_option_of_another_objective_is_refused(home: Path, tmp_path: Path) -> None:
    for objective, option, value, having in (
        ("eagle", "alpha", 2, "tidar"),
        ("masked-diffusion", "draft_lens", 4, "tidar, block-diffusion"),
        ("ar", "label_shift", False, "masked-diffusion"),
        ("ar", "ttt_length", 7, "eagle"),
        ("tidar", "documents", "apart", "block-diffusion, masked-diffusion"),
    ):
        values = settings(home, tmp_path, objective=objective, base="b", arch=None) | {
            option: value
        }
        told = f"{option} is no option of objective '{objective}'.*has it: {having}\\."
        with pytest.raises(TidarError, match=told):
            TrainConfig.from_mapping(values)
        TrainConfig.from_mapping(values | {option: None, "head_chunk": 3})


def test_an_entry_that_no_run_writes_is_refused() -> None:
    good = TidarMeta(draft_lens=(), mask_token_id=1, attention="bidirectional").to_json()
    for key, value, told in (
        ("objective", "mdlm", "'mdlm' is unknown; allowed: tidar, block-diffusion"),
        ("attention", "both", "'both' is unknown; allowed: causal, bidirectional"),
        ("span_attention", 1, "1 is unknown; allowed: causal, full"),
        ("label_shift", "no", "label_shift must be true or false"),
        ("attention", "causal", "draft_lens must be whole numbers"),
    ):
        with pytest.raises(TidarError, match=told):
            TidarMeta.from_json({**good, "draft_lens": [], key: value})
