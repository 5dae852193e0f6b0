"""What a run does besides: its options, its measurements at intervals, when it stops, how it chains."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import ARCH
from safetensors.torch import load_file
from training_runs import assert_same, log, make_home, run, settings, weights

from tidar.errors import TidarError
from tidar.hf_config import config_from_hf
from tidar.training import trainer
from tidar.training.config import TrainConfig
from tidar.training.sources import Source
from tidar.training.start import make_start
from tidar.weights import init_model, load_checkpoint


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("training"))


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

    def on_interval(learner: Any, step: int) -> dict[str, float]:
        net = learner.net
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


def test_held_out_losses_do_not_depend_on_the_batch(home: Path, tmp_path: Path) -> None:
    """5 sequences in batches of 2: the last one is filled up, and what fills it carries no label."""
    held = {"eval_data": {"held": str(home / "data.jsonl")}, "eval_every": 1, "eval_sequences": 5}
    for options in ({}, {"objective": "ar"}):
        found = []
        for size in (1, 2, 5):
            out = tmp_path / f"{len(options)}-{size}"
            run(home, out, **options, **held, max_steps=1, per_device_train_batch_size=size,
                save_strategy="no")  # fmt: skip
            found.append({k: v for k, v in log(out)[0].items() if k.startswith("eval/held/")})
        assert all(row == pytest.approx(found[0], rel=1e-5) for row in found)
        assert len(found[0]) == 2 - len(options)


def test_memory_that_runs_out_says_what_to_lower(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tidar.training.loop import ObjectiveTrainer
    from tidar.training.trainer import train

    def full(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")

    monkeypatch.setattr(ObjectiveTrainer, "training_step", full)
    config = TrainConfig.from_mapping(settings(home, tmp_path / "run", max_steps=2))
    told = (
        r"2\.50 GiB\. That was while training\. Lower per_device_train_batch_size .*_checkpointing"
    )
    with pytest.raises(TidarError, match=told):
        train(config)


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
    config = TrainConfig.from_mapping(values)
    net = init_model(config_from_hf(ARCH, mask_token_id=319), 0).eval()
    logs = interval.IntervalDecoding(config, 3, 8)(config.objective_with(0).model(net), 0)
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


def test_models_are_kept_on_the_way(home: Path, tmp_path: Path) -> None:
    """Weights alone, those of the step; keeping them changes nothing, and a resumed run keeps them too."""
    out = tmp_path / "kept"
    run(home, out, keep_models="3,5,8", save_total_limit=9)
    run(home, tmp_path / "plain")
    assert_same(out, tmp_path / "plain")
    saved = load_file(out / "checkpoint-3" / "model.safetensors")
    for name, tensor in load_checkpoint(out / "model-3").model.named_parameters():
        assert torch.equal(tensor, saved[f"net.{name}"]), name
    assert not (out / "model-3" / "optimizer.pt").exists()
    last = load_file(out / "model-8" / "model.safetensors")
    assert all(torch.equal(last[name], tensor) for name, tensor in weights(out).items())
    config = json.loads((out / "model-5" / "config.json").read_text())
    assert config["tidar"]["draft_lens"] == [2, 4]
    before = load_file(out / "model-5" / "model.safetensors")
    for name in ("model-5", "model-8", "model", "checkpoint-6", "checkpoint-8"):
        shutil.rmtree(out / name)
    run(home, out, keep_models=[5, 8], resume=True, save_dtype="bfloat16")
    after = load_file(out / "model-5" / "model.safetensors")
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name], tensor.bfloat16())
    for wrong in ("0,4", "often"):
        with pytest.raises(TidarError, match="keep_models"):
            TrainConfig.from_mapping(settings(home, out, keep_models=wrong))


def test_data_seed_zero_is_a_seed(home: Path, tmp_path: Path) -> None:
    """With seed 3, data_seed 0 is the order of seed 0, in the token file and in the run."""
    first = {}
    for name, changes in (
        ("zero", {"seed": 3, "data_seed": 0}), ("same", {"seed": 0}), ("three", {"seed": 3})
    ):  # fmt: skip
        config = TrainConfig.from_mapping(settings(home, tmp_path / name, **changes))
        arguments = trainer.make_arguments(config, tmp_path / name)
        start = make_start(config, config.objective_with(3), 3)
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
