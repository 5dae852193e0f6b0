"""`benchmarks/plan_clock.py`: the plan under the step costs of another machine."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from models import random_model

from tidar.decode.costs import StepCosts
from tidar.decode.engine import FixedPlan
from tidar.decode.request import StepEvent
from tidar.decode.spec import parse_methods
from tidar.errors import TidarError
from tidar.layout import Schedule

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
    methods_told = json.loads(RECORD.read_text())["methods"]
    told, few, many = (
        methods_told[name]["step_milliseconds"]["median"]
        for name in ("ar", "tidar:8:1,2,4,8", "tidar:16:1,2,3,5,8,16")
    )
    costs, ar, planned, fixed = capsys.readouterr().out.splitlines()
    assert costs.startswith(f"ms a step: {{1: {round(told, 4)}, 40:")
    assert ar.startswith("ar: 1.00 x AR (")
    rates = {
        line.split(":")[1]: line.partition(" x AR")[0].split()[-1] for line in (planned, fixed)
    }
    assert float(rates["plan"]) > 2, "nearly every draft of arithmetic passes"
    # Of a step of 72 rows, between those of 40 and of 112, in AR steps; it commits eight tokens.
    price = (few + (many - few) * (72 - 40) / (112 - 40)) / told
    assert float(rates["8"]) == pytest.approx(8 / price, rel=0.05)


def test_a_plan_is_told_the_clock() -> None:
    """And not what the step took here."""
    script = runpy.run_path(str(SCRIPT))
    told: list[StepEvent] = []

    class Listening(FixedPlan):
        def observe(self, event: StepEvent) -> None:
            told.append(event)

    plan = script["Clocked"](Listening(Schedule(8, (1,))), StepCosts((1, 16), (1.0, 3.0)))
    plan.observe(StepEvent(0, (1,), False, 8, 1, 16, Schedule(8, (1,)), 99.0, None))
    assert [event.seconds for event in told] == [3.0]


def test_other_methods_have_no_costs() -> None:
    run = runpy.run_path(str(SCRIPT))["run"]
    (spec,) = parse_methods("block-diffusion:16:0.9")
    with pytest.raises(TidarError, match="has no step costs here"):
        run(spec, random_model("qwen3"), StepCosts((1,), (1.0,)), [])


def test_costs_are_those_of_fixed_schedules() -> None:
    costs = runpy.run_path(str(SCRIPT))["costs_of"](RECORD)
    assert isinstance(costs, StepCosts)
    assert costs.rows == (1, 40, 112, 272), "the plan's own steps are of many sizes"
    assert costs.fixed_shape
    assert list(costs.seconds) == sorted(costs.seconds)
