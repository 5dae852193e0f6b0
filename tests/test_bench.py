"""The benchmark: clocks add up, repetition and answers are counted right, differences are found."""

import json
import subprocess
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from models import random_model, random_prompt
from typer.testing import CliRunner

from tidar.bench.measure import (
    EngineName,
    Pass,
    Settings,
    Text,
    Timing,
    pick_engine,
    run_bench,
    run_pass,
)
from tidar.bench.memory import MemoryMeter
from tidar.bench.prompts import Prompt, answer_matches, exact_match, find_answer, read_prompts
from tidar.bench.record import environment, git_state, read_record, write_record
from tidar.bench.repetition import distinct_ngrams, mean_distinct
from tidar.bench.summary import (
    acceptance_line,
    ar_against_itself,
    run_figures,
    same_tokens,
    speed_ups,
    step_milliseconds,
    summarise,
)
from tidar.cli.bench import bench
from tidar.decode.compare import first_difference, near_tie_margin
from tidar.decode.paged_engine import EngineLimits, PagedEngine
from tidar.decode.request import Request
from tidar.decode.spec import parse_method, parse_methods
from tidar.errors import TidarError
from tidar.hf_config import TidarMeta
from tidar.layout import AUTOREGRESSIVE, Schedule, dense_schedule, two_forward
from tidar.model import num_parameters
from tidar.sampling import SamplingParams
from tidar.weights import save_checkpoint

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(bench)

MODEL = random_model("llama")
PROMPTS = [
    Prompt(f"p{i}", random_prompt(MODEL, 5 + i, i), real=random_prompt(MODEL, 12, 9 + i))
    for i in range(3)
]


def settings(methods: str = "ar,tidar:4:dense", **changes) -> Settings:
    base = Settings(methods=parse_methods(methods), max_new_tokens=12, runs=2)
    return replace(base, **changes)


def made_up(seconds: Sequence[float], tokens: int = 10) -> list[Pass]:
    """One run: a pass per prompt that took so long."""
    return [
        Pass(
            Timing(decode=each, wall=each, forwards=tokens),
            (Text(ids=list(range(tokens)), decoded=tokens, steps=tokens),),
        )
        for each in seconds
    ]


def test_methods_by_name() -> None:
    specs = parse_methods("ar,tidar:16:dense,tidar:4:1,2,tidar:8,tidar:plan")
    short, long = parse_methods("tidar:two-forward,tidar:4:two-forward")
    assert (short.name, short.schedule) == ("tidar:16:two-forward", two_forward(16))
    assert (long.schedule, long.is_ar) == (two_forward(4), False)
    assert [spec.schedule for spec in specs] == [
        AUTOREGRESSIVE,
        dense_schedule(16),
        Schedule(4, (1, 2)),
        dense_schedule(8),
        None,
    ]
    assert [spec.name for spec in specs][-2:] == ["tidar:8:dense", "tidar:plan"]
    assert specs[0].is_ar
    assert not specs[-1].is_ar


@pytest.mark.parametrize("text", ["", "arr", "tidar", "tidar:x", "tidar:4:9", "ar:4", "ar,ar"])
def test_methods_not_understood(text: str) -> None:
    with pytest.raises(TidarError):
        parse_methods(text)


def test_drafting_needs_a_mask_token() -> None:
    plain = deepcopy(random_model("mistral"))
    plain.set_mask_token(None)
    parse_method("ar").engine(plain)
    with pytest.raises(TidarError, match="no mask token"):
        parse_method("tidar:4:dense").engine(plain)


def test_distinct_4_by_hand() -> None:
    assert distinct_ngrams([1, 2, 3]) is None
    assert distinct_ngrams([1, 2, 3, 4]) == 1.0
    assert distinct_ngrams([7] * 10) == 1 / 7
    assert distinct_ngrams([1, 2, 1, 2, 1, 2, 1, 2]) == 2 / 5
    assert mean_distinct([[7] * 10, [1, 2, 3, 4], [1]]) == (1 / 7 + 1) / 2
    assert mean_distinct([]) is None


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("Sum: 9\nAnswer: 84108\n", "84108", True),
        ("Answer: 7\nno, wait\nAnswer: 8", "8", True),
        ("Answer: 7\nAnswer: 8", "7", False),
        ("Final Answer:\n-2.177\n```\n", "-2.177", True),
        ("Answer: 1,234.", "1234.0", True),
        ("Answer: $5", "5", True),
        ("Answer: false", "False", True),
        ("Answer: 12", "1", False),
        ("the answer is 5", "5", False),
        ("Answer:", "5", False),
        ("", "5", False),
    ],
)
def test_answers(text: str, answer: str, right: bool) -> None:
    assert answer_matches(text, answer) is right


def test_exact_match_counts_prompts_with_an_answer() -> None:
    prompts = [Prompt("a", (1,), answer="5"), Prompt("b", (1,)), Prompt("c", (1,), answer="6")]
    assert exact_match(["Answer: 5", "", "Answer: 5"], prompts) == 0.5
    assert exact_match(["Answer: 5"], prompts[1:2]) is None
    assert find_answer("Answer:  \n\n  x \n") == "x"


@pytest.mark.parametrize("batch", [1, 3])
def test_buckets_add_up(batch: int) -> None:
    engine = parse_method("tidar:4:dense").engine(MODEL, max_batch=batch)
    requests = [Request(prompt=p.ids, max_new_tokens=10 + i) for i, p in enumerate(PROMPTS)]
    timing = run_pass(engine, requests).timing
    assert timing.prefill > 0
    assert timing.decode > 0
    assert timing.host >= 0
    assert timing.prefill + timing.decode + timing.host == pytest.approx(timing.wall, rel=0.01)
    assert timing.forwards >= 10 / 4


def test_a_batched_forward_is_counted_once() -> None:
    engine = parse_method("ar").engine(MODEL, max_batch=3)
    done = run_pass(engine, [Request(prompt=p.ids, max_new_tokens=10) for p in PROMPTS])
    assert done.timing.forwards == 9
    assert [text.steps for text in done.texts] == [9, 9, 9]


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("batch", [1, 3])
def test_buckets_of_the_paged_engine_add_up(batch: int, behind: int) -> None:
    """Prompts of several chunks; at batch 3 they run beside the decode steps of those before."""
    limits = EngineLimits(max_running=batch, max_draft_len=4, chunk_tokens=5, behind=behind)
    engine = parse_method("tidar:4:dense").engine(MODEL, limits=limits)
    assert isinstance(engine, PagedEngine)
    requests = [
        Request(prompt=random_prompt(MODEL, 12 + i, i), max_new_tokens=24 + i) for i in range(4)
    ]
    done = run_pass(engine, requests)
    timing = done.timing
    assert timing.prefill > 0
    assert timing.decode > 0
    assert timing.host >= 0
    assert timing.prefill + timing.decode + timing.host == pytest.approx(timing.wall, rel=0.01)
    assert timing.forwards == len(timing.steps)
    assert sum(step.seconds for step in timing.steps) == pytest.approx(timing.decode)
    assert sum(step.tokens for step in timing.steps) == sum(text.decoded for text in done.texts)
    assert sum(step.sequences for step in timing.steps) == sum(text.steps for text in done.texts)
    if batch == 1:
        assert timing.mixed == 0
    else:  # the first text decodes while others are in prefill, and in the end all decode
        assert 0 < timing.mixed < timing.decode
        assert not timing.steps[0].alone
        assert timing.steps[-1].alone
    assert [len(text.ids) for text in done.texts] == [24, 25, 26, 27]
    figures = run_figures([done])
    alone = [step for step in timing.steps if step.alone]
    assert figures["decode_tokens_per_second"] == pytest.approx(
        sum(step.tokens for step in alone) / sum(step.seconds for step in alone)
    )
    step = step_milliseconds([[done]])
    assert step is not None
    assert step["sequences"] == max(s.sequences for s in alone)
    assert 0 < step["min"] <= step["median"] <= step["max"]


def test_an_engine_refuses_a_longer_draft_than_its_limits() -> None:
    with pytest.raises(TidarError, match="max_draft_len"):
        parse_method("tidar:8:dense").engine(MODEL, limits=EngineLimits(max_draft_len=4))


def test_engine_by_name() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pick_engine("auto", cpu) == "plain"
    assert pick_engine("auto", cuda) == "paged"
    assert pick_engine("auto", cuda, plain_only=True) == "plain"
    assert pick_engine("auto", cpu, replayed=True) == "paged"
    assert pick_engine("plain", cuda) == "plain"
    with pytest.raises(TidarError, match="not known"):
        pick_engine("fast", cpu)


def test_commit_of_an_exported_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("TIDAR_COMMIT", raising=False)
    assert git_state(tmp_path) is None
    monkeypatch.setenv("TIDAR_COMMIT", "abc123")
    assert git_state(tmp_path) == {"commit": "abc123", "dirty": None, "from": "TIDAR_COMMIT"}


def test_the_named_commit_wins_over_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copied tree whose .git is older than its files."""
    monkeypatch.delenv("TIDAR_COMMIT", raising=False)
    run = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*run, *command], check=True, capture_output=True)
    found = git_state(tmp_path)
    assert found is not None
    assert set(found) == {"commit", "dirty"}
    assert found["dirty"] is False
    for name in (found["commit"], found["commit"][:7]):
        monkeypatch.setenv("TIDAR_COMMIT", name)
        assert git_state(tmp_path) == {"commit": name, "dirty": False, "from": "TIDAR_COMMIT"}
    monkeypatch.setenv("TIDAR_COMMIT", "abc123")
    told = {"commit": "abc123", "dirty": None, "from": "TIDAR_COMMIT"}
    assert git_state(tmp_path) == {**told, "checkout": found}


def test_buckets_that_miss_the_clock_are_refused() -> None:
    with pytest.raises(AssertionError, match="add up"):
        Timing(prefill=1.0, decode=1.0, host=0.5, wall=3.0).check()
    with pytest.raises(AssertionError, match="longer"):
        Timing(prefill=2.0, decode=2.0, host=-1.0, wall=3.0).check()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch": 3},
        {"temperature": 0.9},
        {"runs": 1},
        {"engine": "paged"},
        {"engine": "paged", "batch": 2, "temperature": 0.9},
    ],
)
def test_methods_side_by_side(changes: dict) -> None:
    chosen = settings(**changes)
    meter = MemoryMeter(MODEL)
    passes = run_bench(MODEL, PROMPTS, chosen, frozenset(), meter=meter)
    figures = summarise(MODEL, passes, PROMPTS, chosen, None, meter)
    assert figures["ar"]["memory"]["weight_bytes"] == 4 * num_parameters(MODEL.config)
    assert figures["ar"]["memory"]["cache_bytes"] > 0
    assert figures["ar"]["step_milliseconds"]["median"] > 0
    ar, tidar = figures["ar"], figures["tidar:4:dense"]
    assert ar["tokens_per_forward"] == 1.0
    assert tidar["tokens_per_forward"] >= 1.0
    assert ar["rows_per_step"] == 1.0
    assert tidar["rows_per_step"] > 4
    assert sum(tidar["accept_histogram"].values()) == tidar["decode_steps"]
    assert tidar["same_as_ar"]["same"]
    assert tidar["same_in_every_run"]
    assert ("speed_up" in tidar) == (chosen.batch == 1)
    assert len(tidar["runs"]) == chosen.runs
    assert len(tidar["prompts"]) == len(PROMPTS)


@pytest.mark.parametrize("engine", ["plain", "paged"])
def test_teacher_forced_writes_the_real_text(engine: EngineName) -> None:
    chosen = settings(teacher_forced=True, max_new_tokens=10, runs=1, engine=engine)
    passes = run_bench(MODEL, PROMPTS, chosen, frozenset())
    for runs in passes.values():
        for prompt, done in zip(PROMPTS, runs[0], strict=True):
            assert tuple(done.texts[0].ids) == prompt.real[:10]
    with pytest.raises(TidarError, match="continuation"):
        run_bench(MODEL, [Prompt("bare", (1, 2))], chosen, frozenset())


def test_a_planted_difference_is_found() -> None:
    chosen = settings("ar", runs=1)
    [honest] = run_bench(MODEL, PROMPTS, chosen, frozenset())["ar"]
    assert same_tokens(MODEL, PROMPTS, honest, honest, chosen)["same"]
    text = honest[1].texts[0]
    wrong = replace(text, ids=[*text.ids[:4], (text.ids[4] + 1) % 30, *text.ids[5:]])
    planted = [honest[0], Pass(honest[1].timing, (wrong,)), honest[2]]
    found = same_tokens(MODEL, PROMPTS, planted, honest, chosen)
    assert not found["same"]
    assert (found["differ"], found["excused"]) == (1, 0)
    assert found["differences"][0]["id"] == "p1"
    assert found["differences"][0]["at"] == 4


def test_near_ties_are_excused_and_nothing_else() -> None:
    prompt, params = PROMPTS[0].ids, SamplingParams()
    [done] = run_bench(MODEL, PROMPTS[:1], settings("ar", runs=1), frozenset())["ar"][0]
    right = done.texts[0].ids
    wrong = [*right[:2], (right[2] + 1) % 30]
    strict = first_difference(MODEL, prompt, right[:3], wrong, params, near_tie=1e-4)
    assert strict is not None
    assert not strict.excused
    loose = first_difference(MODEL, prompt, right[:3], wrong, params, near_tie=1e4)
    assert loose is not None
    assert loose.excused
    short = first_difference(MODEL, prompt, right, right[:3], params, near_tie=1e4)
    assert short is not None
    assert not short.excused
    assert near_tie_margin(MODEL, prompt) == 1e-4


def test_speeds_by_hand() -> None:
    ar = [made_up([1.0, 2.0]), made_up([1.0, 2.0]), made_up([1.0, 2.1])]
    fast = [made_up([0.5, 2.0]), made_up([0.25, 2.0]), made_up([0.5, 4.0])]
    assert speed_ups(fast, ar, decode=True) == [2.0, 1.0]
    own = ar_against_itself(ar, decode=False)
    assert own is not None
    assert own["spread"] == pytest.approx(1 - 2.05 / 2.1, abs=0.02)
    assert ar_against_itself(ar[:1], decode=False) is None


def test_acceptance_line() -> None:
    assert acceptance_line([1.2, 0.94], [0.0, 0.02])["met"] is True
    assert acceptance_line([1.2, 0.92], [0.0, 0.02])["met"] is False
    assert acceptance_line([1.2, 0.92], [0.09, 0.02])["met"] is False  # only its own spread counts
    assert acceptance_line([0.92], None)["met"] is None
    assert acceptance_line([0.92], [0.5])["met"] is None  # so noisy that it would excuse anything


def test_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt_ids": [1, 2], "continuation_ids": [3], "answer": 5}\n\n', "utf-8")
    file = read_prompts(path, None, MODEL)
    assert file.prompts == (Prompt("1", (1, 2), (3,), "5"),)
    assert len(file.sha256) == 64
    for line, message in (
        ('{"prompt": "text"}', "no tokenizer"),
        ("{}", "line 1.*needs a text"),
        ("[]", "not a JSON object"),
        ("{", "line 1"),
        ('{"prompt_ids": [39]}', "mask token"),
        ("", "no prompts"),
    ):
        path.write_text(line, "utf-8")
        with pytest.raises(TidarError, match=message):
            read_prompts(path, None, MODEL)


def test_record_round_trips(tmp_path: Path) -> None:
    record = {"format_version": 1, "environment": environment(MODEL.embed.weight.device)}
    write_record(tmp_path / "runs" / "record.json", record)
    assert read_record(tmp_path / "runs" / "record.json") == record
    (tmp_path / "other.json").write_text("{}", "utf-8")
    with pytest.raises(TidarError, match="no record"):
        read_record(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("random_weights", "engine"), [(False, "auto"), (True, "auto"), (False, "paged")]
)
def test_command(tmp_path: Path, random_weights: bool, engine: str) -> None:
    meta = TidarMeta(draft_lens=(4,), mask_token_id=39)
    folder = save_checkpoint(tmp_path / "model", MODEL, meta=meta)
    if random_weights:
        (folder / "model.safetensors").unlink()
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt_ids": p.ids, "continuation_ids": p.real} for p in PROMPTS]
    prompts.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    out = tmp_path / "record.json"
    arguments = [str(folder), "--prompts", str(prompts), "--methods", "ar,tidar:4:1,2,tidar:plan"]
    arguments += ["--max-new-tokens", "8", "--runs", "2", "--limit", "2", "--out", str(out)]
    arguments += ["--random-weights"] if random_weights else []
    arguments += ["--engine", engine]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert ("random weights" in result.stdout) == random_weights
    assert "against itself" in result.stdout
    record = read_record(out)
    assert record["prompts"]["count"] == 2
    assert record["prompts"]["distinct_4_of_real_text"] is not None
    assert record["environment"]["packages"]["torch"]
    assert record["environment"]["git"]
    assert record["settings"]["engine"] == ("paged" if engine == "paged" else "plain")
    assert set(record["methods"]) == {"ar", "tidar:4:1,2", "tidar:plan"}
    for figures in record["methods"].values():
        for run in figures["runs"]:
            parts = run["prefill_seconds"] + run["decode_seconds"] + run["host_seconds"]
            assert parts == pytest.approx(run["wall_seconds"], rel=0.01, abs=1e-4)
