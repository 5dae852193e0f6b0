"""`tidar eval`: tasks are scored, records are complete, and what goes wrong is explained."""

import gzip
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from command import Ran, refused, tidar
from lm_eval.tasks import TaskManager
from models import ROOT
from test_eval_model import DATA, QUESTIONS, ask

import tidar as package
from tidar.errors import TidarError
from tidar.evaluation import run
from tidar.evaluation.code_metric import sandboxed, score_program
from tidar.evaluation.harness import TidarLM
from tidar.evaluation.local_data import KINDS, read_rows
from tidar.evaluation.presets import HARNESS, PAPER, PRESETS
from tidar.evaluation.sandbox import Sandbox

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*decodes as AR only"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PROBLEMS = ROOT / "recipes" / "bundled" / "eval"


@pytest.fixture(scope="module")
def bundled() -> package.LanguageModel:
    return package.load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder as a user has it, with a few rows of each kind."""
    folder = tmp_path_factory.mktemp("data")
    rows: dict[str, list[dict[str, object]]] = {
        "gsm8k/test.jsonl": [{"question": q, "answer": "So 17.\n#### 17"} for q in QUESTIONS],
        "gsm8k/train.jsonl": [{"question": q, "answer": "Take 4.\n#### 4"} for q in QUESTIONS[::-1]],
        "HumanEval.jsonl": [{
            "task_id": f"t/{i}", "prompt": f"def f{i}(x):\n    \"\"\"x plus {i}\"\"\"\n", "entry_point": f"f{i}",
            "test": f"def check(f):\n    assert f(1) == {1 + i}\n", "canonical_solution": f"    return x + {i}\n",
        } for i in range(2)],
        "choices.jsonl": [{"question": "1 + 1 =", "choices": ["2", "a frog"], "answer": 0},
                          {"question": "def f(x):\n    return", "choices": [" lamp", " x"], "answer": " x"}],
        "text.jsonl": [{"text": "import os\n"}, {"prompt": "def f(x):\n", "continuation": "    return x\n"}],
    }  # fmt: skip
    for name, lines in rows.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


LOCAL = "gsm8k_local,humaneval_local,stepmath_local,choices_local,text_local"


def local_options(files: Path) -> list[object]:
    return [
        "--data", files, "--data", f"stepmath_local={PROBLEMS / 'stepmath.jsonl'}", "--data",
        f"choices_local={files / 'choices.jsonl'}", "--data", f"text_local={files / 'text.jsonl'}",
        "--device", "cpu", "--dtype", "float32", "--allow-weak-sandbox",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ran(files: Path) -> Ran:
    """All local tasks by two methods."""
    return tidar(
        "eval", "--tasks", LOCAL, *local_options(files), "--methods", "ar,tidar:16:1,2,4,8",
        "--limit", 2, "--shots", 0, "--max-gen-toks", 150, "--json", "--out", files / "out.json",
        "--samples", files / "samples.jsonl",
    )  # fmt: skip


def test_record(ran: Ran, files: Path) -> None:
    record: dict[str, Any] = ran.json
    assert record == json.loads((files / "out.json").read_text())
    assert record["environment"]["git"] is None or record["environment"]["git"]["commit"]
    assert record["environment"]["packages"]["lm_eval"] == "0.4.13"
    assert record["settings"]["seed"] == 0
    assert record["interrupted"] is False
    assert "limits" in record["sandbox"]["active"]
    assert list(record["tasks"]) == LOCAL.split(",")
    for name, task in record["tasks"].items():
        assert task["examples"] == 2
        assert task["settings"]["shots"] == {name: 0}
        generates = name not in ("choices_local", "text_local")
        assert list(task["methods"]) == (["ar", "tidar:16:1,2,4,8"] if generates else ["likelihood"])  # fmt: skip
        for method, figures in task["methods"].items():
            assert {score["task"] for score in figures["scores"]} == {name}
            assert all(math.isfinite(score["value"]) for score in figures["scores"])
            if generates:
                assert figures["texts_other_than_ar"] == 0
                assert figures["likelihood"] is None
                rate = figures["generation"]["tokens_per_forward"]
                # The bundled model may end a HumanEval answer with its first token: there is no step then.
                assert rate is None or (rate == 1.0) == (method == "ar")
                assert rate is None or 0.0 < figures["generation"]["distinct_4"] <= 1.0
            else:
                assert figures["generation"] is None
                assert figures["likelihood"]["forwards"] == 1


def figure(record: dict[str, Any], task: str, method: str, metric: str) -> float:
    scores = record["tasks"][task]["methods"][method]["scores"]
    return next(float(score["value"]) for score in scores if score["metric"] == metric)


def test_scores(ran: Ran, bundled: package.LanguageModel, files: Path) -> None:
    """By our own arithmetic, from the engine's texts and the scorer's numbers."""
    record: dict[str, Any] = ran.json
    rows = read_rows("stepmath_local", PROBLEMS / "stepmath.jsonl")[:2]
    right = 0
    for row in rows:
        text = bundled.generate(row["prompt"], max_new_tokens=150, method="ar").text
        found = re.findall(r"Answer:\s*(\S+)", text)
        right += bool(found) and found[-1] == row["answer"]
    for method in ("ar", "tidar:16:1,2,4,8"):
        assert figure(record, "stepmath_local", method, "exact_match") == right / 2
    assert figure(record, "choices_local", "likelihood", "acc") == 1.0
    lm = TidarLM(bundled, "ar")
    texts = [row["text"] for row in read_rows("text_local", files / "text.jsonl")]
    sums = lm.loglikelihood_rolling([ask("loglikelihood_rolling", text) for text in texts])
    bits = -sum(sums) / math.log(2) / sum(map(len, texts))
    assert figure(record, "text_local", "likelihood", "bits_per_byte") == pytest.approx(bits)


def test_samples_are_written(ran: Ran, files: Path) -> None:
    lines = [json.loads(line) for line in (files / "samples.jsonl").read_text().splitlines()]
    generating = [line for line in lines if line["task"] == "stepmath_local"]
    assert [line["method"] for line in generating] == ["ar"] * 2 + ["tidar:16:1,2,4,8"] * 2
    assert all(line["resps"] and line["arguments"] for line in lines)
    assert {line["asked"] for line in lines} == set(LOCAL.split(","))


def test_tables_and_defaults(files: Path) -> None:
    shown = tidar("eval", "--tasks", "gsm8k_local", "--data", files, "--device", "cpu",
                  "--max-gen-toks", 8, "--shots", 2, "--limit", 1).out  # fmt: skip
    flat = " ".join(shown.split())
    assert "gsm8k_local · 1 examples, 2 shots · up to 8 new tokens" in flat
    for word in ("tidar:plan", "exact_match", "strict-match", "T/NFE", "distinct-4"):
        assert word in shown
    plain = tidar("eval", "--tasks", "text_local", "--data", f"text_local={files / 'text.jsonl'}",
                  "--device", "cpu").out  # fmt: skip
    assert "settings of tidar" in plain
    assert "bits_per_byte" in plain


def test_examples_come_from_the_train_file(files: Path, tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    tidar("eval", "--tasks", "gsm8k_local", "--data", files, "--device", "cpu", "--methods", "ar",
          "--max-gen-toks", 4, "--shots", 3, "--limit", 1, "--samples", samples)  # fmt: skip
    prompt = json.loads(samples.read_text().splitlines()[0])["arguments"][0][0]
    assert prompt.count("#### 4") == 3
    assert "#### 17" not in prompt
    assert prompt.endswith("Answer:")


def test_right_programs_pass(files: Path) -> None:
    """The published solutions, of the real set where there is a copy beside the repository."""
    path = DATA / "human_eval" / "HumanEval.jsonl.gz"
    if path.is_file():
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for _, line in zip(range(6), lines, strict=False)]
    else:
        rows = [json.loads(line) for line in (files / "HumanEval.jsonl").open()]
    with sandboxed(Sandbox(allow_weak=True)):
        for row in rows:
            assert score_program(row, [row["canonical_solution"]]) == {"pass@1": 1.0}
            assert score_program(row, ["    return 'nonsense'\n"]) == {"pass@1": 0.0}


def test_presets_are_tasks_of_the_harness() -> None:
    known = TaskManager().task_index
    for name, preset in PRESETS.items():
        assert (name in known) != (name in KINDS), name
        if preset.source == PAPER:
            assert preset.shots is not None
    assert PRESETS["gsm8k"].source == HARNESS


# --- what goes wrong ---


def test_interrupted_runs_keep_finished_tasks(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TidarLM.loglikelihood

    def interrupted(self: TidarLM, requests: list[Any], disable_tqdm: bool = True) -> Any:
        original(self, requests)
        raise KeyboardInterrupt

    monkeypatch.setattr(TidarLM, "loglikelihood", interrupted)
    ran = Ran(("eval", "--tasks", "text_local,choices_local,stepmath_local",
               *local_options(files)[2:], "--out", files / "part.json"))  # fmt: skip
    assert ran.code == 130
    assert "finished are kept" in ran.err
    record = json.loads((files / "part.json").read_text())
    assert list(record["tasks"]) == ["text_local"]
    assert record["interrupted"] is True


def test_mistakes(files: Path, tmp_path: Path) -> None:
    def says(message: str, *parts: str) -> None:
        flat = " ".join(message.split())
        assert all(part in flat for part in parts), flat

    says(refused("eval"), "--tasks NAME,NAME", "gsm8k_cot", "choices_local: question, choices")
    says(refused("eval", "--tasks", "nonsense"), "no task nonsense", "humaneval")
    says(refused("eval", "--tasks", "text_local"), "text_local=FILE", "(or prompt")
    says(refused("eval", "--tasks", "gsm8k_local", "--data", tmp_path), "gsm8k/test.jsonl[.gz|.xz]")
    says(refused("eval", "--tasks", "gsm8k_local", "--data", "nowhere"), "neither a folder")
    says(refused("eval", "--tasks", "text_local", "--data", "choices_local=x"), "not among --tasks")
    says(refused("eval", "--tasks", "text_local", "--data", "text_local=x"), "no such file")
    says(refused("eval", "--tasks", "mmlu", "--data", files), "is for local tasks")
    says(refused("eval", "--tasks", "x", "--settings", "mine"), "paper or harness")
    says(refused("eval", "--tasks", "x", "--engine", "fast"), "'auto', 'plain' or 'paged'")
    says(refused("eval", "--tasks", "x", "--methods", "medusa"), "'medusa' is not understood")
    data = f"text_local={files / 'text.jsonl'}"
    says(refused("eval", "--tasks", "text_local", "--data", data, "--shots", "1"), "must be 0")
    says(refused("eval", "--tasks", "text_local", "--data", data, "--chat-template"), "no chat")
    own = tmp_path / "gsm.jsonl"
    own.write_text((files / "gsm8k/test.jsonl").read_text())
    says(refused("eval", "--tasks", "gsm8k_local", "--data", f"gsm8k_local={own}"), "train.jsonl")


def test_programs_run_in_the_sandbox_or_not_at_all(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that runs programs by other means than the metric we stand in for is refused."""
    monkeypatch.setattr(run, "IN_SANDBOX", ("mbpp",))
    message = refused("eval", "--tasks", "humaneval_local", "--data", files, "--device", "cpu")
    assert "outside our sandbox" in message


@pytest.mark.parametrize(
    ("line", "says"),
    [("{", "line 2"), ("[1]", "line 2"), ('{"question": "x"}', "no field 'choices'"),
     ('{"question": "x", "choices": ["a"], "answer": 3}', "none of 1 choices"),
     ('{"question": "x", "choices": ["a"], "answer": "b"}', "line 2")],
)  # fmt: skip
def test_bad_rows(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "x", "choices": ["a", "b"], "answer": "b"}\n' + line + "\n")
    message = refused("eval", "--tasks", "choices_local", "--data", f"choices_local={path}")
    assert says in message
    assert "rows.jsonl, line 2" in message


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.gz").write_bytes(b"no archive")
    with pytest.raises(TidarError, match="cannot be read"):
        read_rows("text_local", tmp_path / "rows.jsonl.gz")
    (tmp_path / "rows.jsonl").write_text("\n\n")
    with pytest.raises(TidarError, match="no rows"):
        read_rows("text_local", tmp_path / "rows.jsonl")


@pytest.fixture
def without_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.usefixtures("without_harness")
def test_harness_is_missing() -> None:
    message = refused("eval", "--tasks", "text_local")
    assert "pip install 'tidar[eval]'" in message


def test_help_loads_no_harness() -> None:
    import subprocess

    program = (
        "import sys; from typer.testing import CliRunner; from tidar.cli import app\n"
        "assert CliRunner().invoke(app, ['eval', '--help']).exit_code == 0\n"
        "assert not {'lm_eval', 'torch', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
