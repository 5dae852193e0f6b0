"""The sweeps of kernel cuts run; what they print without a GPU says nothing about speed."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from devices import CUDA
from models import ROOT

TINY = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


@pytest.mark.skipif(CUDA, reason="would sweep for minutes")
@pytest.mark.parametrize("kernel", ["products", "attention"])
def test_sweeps_of_cuts(
    kernel: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps(TINY), encoding="utf-8")
    options = [kernel, "--shape", str(shape), "--rows", "3", "--context", "40"]
    monkeypatch.setattr(sys, "argv", ["kernel_cuts.py", *options])
    runpy.run_path(str(ROOT / "benchmarks" / "kernel_cuts.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    titles = ["qkv", "o", "gate_up", "down"] if kernel == "products" else ["attention"]
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == titles
    assert sum("default" in line for line in lines) == len(titles)
    assert not any("Error" in line for line in lines)
