#!/usr/bin/env python3
"""What a measured plan is worth where steps cost what they cost on another machine: real texts, made-up time.

The bundled checkpoint decodes here, the clock goes on by what each step took in a record of `tidar bench`, and
the plan knows nothing but that clock. Only how long its decisions take is real; the second figure adds all that
time, of this machine's processor, to the clock. Decoding alone: prefill and the engine's own host time are left
out, and a step's outcome is known at once, which on a GPU comes a step later.

    python benchmarks/plan_clock.py benchmarks/records/gpu_python_t0.json recipes/bundled/eval/python.jsonl --ignore-eos
"""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import tidar
from tidar.bench.measure import Settings, make_request
from tidar.bench.prompts import read_prompts
from tidar.bench.record import read_record
from tidar.decode.costs import StepCosts, step_rows
from tidar.decode.engine import Engine, FixedPlan, Plan
from tidar.decode.plan import MeasuredPlan
from tidar.decode.request import Request, StepEvent
from tidar.decode.spec import MethodSpec, parse_methods
from tidar.errors import TidarError
from tidar.layout import Schedule
from tidar.methods.tidar import Tidar
from tidar.model import Transformer


class Clocked:
    """A plan that is told the clock's seconds. host: real seconds that it took itself."""

    def __init__(self, plan: Plan, costs: StepCosts) -> None:
        self.plan, self.costs, self.host = plan, costs, 0.0

    def seconds(self, schedule: Schedule) -> float:
        """Of a step, which has the rows of a full draft whatever it holds."""
        return self.costs.of(step_rows(schedule, schedule.draft_len))

    def choose(self, request_ids: Sequence[int]) -> Schedule:
        began = time.perf_counter()
        schedule = self.plan.choose(request_ids)
        self.host += time.perf_counter() - began
        return schedule

    def observe(self, event: StepEvent) -> None:
        event = replace(event, seconds=self.seconds(event.schedule))
        began = time.perf_counter()
        self.plan.observe(event)
        self.host += time.perf_counter() - began


def costs_of(path: Path) -> StepCosts:
    """Step medians against rows, of the methods of a record that always run the same step."""
    methods = read_record(path)["methods"]
    told = {
        round(each["rows_per_step"]): each["step_milliseconds"]["median"] / 1e3
        for name, each in methods.items()
        if name != "tidar:plan"
    }
    rows = tuple(sorted(told))
    return StepCosts(rows, tuple(told[count] for count in rows), fixed_shape=True)


def run(
    spec: MethodSpec, network: Transformer, costs: StepCosts, requests: Sequence[Request]
) -> str:
    """Decodes all texts one after the other; a line about how that went. Raises TidarError for other methods."""
    if spec.rival is not None:
        raise TidarError(
            f"{spec.name} has no step costs here: give ar, tidar:plan or tidar:K:SPANS."
        )
    inner: Plan
    if spec.schedule is None:
        inner = MeasuredPlan(costs, lag=1, learn=64)
    else:
        inner = FixedPlan(spec.schedule)
    plan = Clocked(inner, costs)
    assert network.config.mask_token_id is not None
    engine = Engine(network, Tidar(network.config.mask_token_id), plan, max_batch=1)
    seconds, tokens, used = 0.0, 0, Counter[str]()
    for request in requests:
        for event in engine.run([request]):
            if not event.prefill:
                seconds += plan.seconds(event.schedule)
                tokens += event.accepted
                spans = ",".join(map(str, event.schedule.span_set))
                used[f"{event.schedule.draft_len}:{spans}"] += 1
    steps = used.total()
    most = ", ".join(f"{schedule} {count / steps:.0%}" for schedule, count in used.most_common(4))
    speeds = [tokens / spent * costs.of(1) for spent in (seconds, seconds + plan.host)]
    return (
        f"{spec.name}: {speeds[0]:.2f} x AR ({speeds[1]:.2f} with the plan's own time), "
        f"T/NFE {tokens / steps:.2f}; {most}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path, help="of tidar bench, one prompt at a time")
    parser.add_argument("prompts", type=Path, help="a file of prompts, as for tidar bench")
    parser.add_argument("--methods", default="tidar:plan,tidar:8:dense,tidar:16:1,2,3,5,8,16")
    parser.add_argument("--limit", type=int, default=20, help="prompts")
    parser.add_argument("--tokens", type=int, default=256, help="of each text at most")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--ignore-eos", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = tidar.load(device="cpu", dtype="float32")
    prompts = read_prompts(options.prompts, model.tokenizer, model.network, options.limit).prompts
    settings = Settings(
        methods=(), max_new_tokens=options.tokens, temperature=options.temperature, runs=1
    )
    eos_ids = frozenset[int]() if options.ignore_eos else model.tokenizer.eos_ids
    requests = [make_request(p, i, settings, eos_ids) for i, p in enumerate(prompts)]
    costs = costs_of(options.record)
    print(
        "ms a step:", {n: round(s * 1e3, 4) for n, s in zip(costs.rows, costs.seconds, strict=True)}
    )
    for spec in parse_methods(options.methods):
        print(run(spec, model.network, costs, requests), flush=True)


if __name__ == "__main__":
    main()
