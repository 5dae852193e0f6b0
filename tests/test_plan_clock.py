"""`benchmarks/plan_clock.py`: the plan under the step costs of another machine."""

import runpy
import sys
from pathlib import Path

import pytest

from tidar.decode.costs import StepCosts

ROOT = Path(__file__).parents[1]
SCRIPT, RECORD = (
    ROOT / "benchmarks" / "plan_clock.py",
    ROOT / "benchmarks/records/gpu_arithmetic_t0.json",
)


def test_one_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ROOT / "recipes/bundled/eval/arithmetic.jsonl"
    methods = "ar,tidar:plan,tidar:8:dense"
    options = ["--methods", methods, "--limit", "1", "--tokens", "40"]
    monkeypatch.setattr(sys, "argv", ["plan_clock.py", str(RECORD), str(prompts), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    costs, ar, planned, fixed = capsys.readouterr().out.splitlines()
    assert costs.startswith("ms a step: {1: 0.0993, 40:")
    assert ar.startswith("ar: 1.00 x AR, T/NFE 1.00")
    assert "tidar:plan: " in planned
    assert fixed.endswith("8:1,2,3,4,5,6,7,8 100%")


def test_costs_are_those_of_fixed_schedules() -> None:
    costs = runpy.run_path(str(SCRIPT))["costs_of"](RECORD)
    assert isinstance(costs, StepCosts)
    assert costs.rows == (1, 40, 112, 272), "the plan's own steps are of many sizes"
    assert costs.fixed_shape
    assert list(costs.seconds) == sorted(costs.seconds)
