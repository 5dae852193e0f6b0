"""Law 9: training ends in equal weights after any interruption, and in several processes as in one."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import RUN, assert_same, log, make_home, run, settings, weights

from tidar.errors import TidarError


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("training"))


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
