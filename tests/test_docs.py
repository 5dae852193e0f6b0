"""The documentation says what is so: its commands run, its links resolve, its tables match the disk."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from models import ROOT

from tidar.training.config import TrainConfig

PAGES = (
    "README.md",
    "recipes/bundled/README.md",
    "docs/training.md",
    "docs/methods.md",
    "docs/evaluation.md",
    "docs/gpu.md",
    "docs/how-it-works.md",
    "CONTRIBUTING.md",
    "lab/README.md",
)
CARD = "src/tidar/bundled/README.md"

CHEAP: dict[str, tuple[str, ...]] = {
    "generate": ("--max-new-tokens", "8"),
    "inspect": (),
    "verify": ("--quick",),
    "bench": ("--runs", "1", "--limit", "1", "--max-new-tokens", "8", "--batch", "1",
              "--device", "cpu"),
    "eval": ("--limit", "1", "--max-gen-toks", "8", "--device", "cpu", "--methods", "ar,tidar:4:1"),
    "profile": ("--device", "cpu", "--context", "8", "--repeats", "1", "--batch", "1",
                "--methods", "tidar:4:1"),
    "train": ("--max-steps", "2", "--seq-len", "64", "--per-device-train-batch-size", "2",
              "--use-cpu", "true", "--report-to", "none", "--cache-dir", "cache"),
}  # fmt: skip
"""What is appended to a documented command, by subcommand; of an option given twice the last counts."""

ELSEWHERE = {
    "make demo": (".ci/run", "demo"),
    "make test": (".ci/run", "test"),
    "python -m pip install -c constraints.txt -e .": ("Makefile", "-c constraints.txt -e ."),
    "python recipes/bundled/prepare.py": (
        "tests/test_bundled_data.py",
        "test_corpus_keeps_permissive_new_files_only",
    ),
    "python recipes/bundled/tokenizer.py": ("tests/test_bundled_data.py", "test_vocabulary"),
    "python recipes/bundled/eval_prompts.py": ("tests/test_bundled_data.py", "test_prompt_files"),
    "recipes/bundled/train.sh": ("tests/test_docs.py", "test_training_recipes_are_understood"),
    "python -m lab.run": ("tests/test_lab.py", "test_smoke_run_goes_from_text_to_table"),
    "python -m lab.table": ("tests/test_lab.py", "test_smoke_run_goes_from_text_to_table"),
    "python -m lab.ablations": ("tests/test_ablations.py", "test_records_hold_every_case"),
    "python -m lab.ablation_tables": (
        "tests/test_ablations.py",
        "test_tables_and_figures_are_of_the_records_alone",
    ),
    "python -m lab.results": ("tests/test_lab.py", "test_page_tells_what_the_records_say"),
    "python benchmarks/plot_training.py": ("tests/test_docs.py", "test_training_curves_are_drawn"),
}
"""Documented commands that are not run here: where something of the same path is, and a text in that file."""

TINY = {
    "model_type": "qwen3", "vocab_size": 2560, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


def fences(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def documented() -> list[str]:
    """Every command of the pages once, without comments and line breaks."""
    found = []
    for page in (*PAGES, CARD):
        for fence in fences(page, "bash"):
            for line in fence.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    found.append(shlex.join(words))
    return list(dict.fromkeys(found))


COMMANDS = documented()
OURS = [each for each in COMMANDS if each.startswith("tidar ")]
STORY = [each for each in OURS if re.match(r"tidar train |tidar \w+ runs/", each)]
"""Commands that use one another's results: training, then what is done with the new checkpoint."""


def run(command: str, folder: Path, *changes: str) -> str:
    """Runs a documented `tidar` command in `folder`, made cheap; its standard output."""
    words = shlex.split(command)[1:]
    argv = [sys.executable, "-m", "tidar", *words, *CHEAP[words[0]], *changes]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(argv)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory that looks like the repository, where nothing is overwritten."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "docs" / "images").mkdir(parents=True)
    return tmp_path


# --- commands ---


@pytest.mark.parametrize("command", [each for each in OURS if each not in STORY])
def test_command_runs(command: str, folder: Path) -> None:
    assert run(command, folder)
    if "--png" in (words := shlex.split(command)):
        name = words[words.index("--png") + 1]
        assert (folder / name).stat().st_size > 10_000
        assert (ROOT / name).is_file(), "the picture in the repository has another name"


def test_story_of_a_conversion(folder: Path) -> None:
    """The training commands in the order that makes sense, then `verify` and `bench` on their result."""
    (folder / "tiny.json").write_text(json.dumps(TINY))
    lines = [f"def f{i}(x):\n    return x + {i} * {i % 7}\n" for i in range(200)]
    corpus = "".join(json.dumps({"text": 4 * line}) + "\n" for line in lines)
    (folder / "corpus.jsonl").write_text(corpus)
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": lines[0]}) + "\n")
    scratch, converted = [], []
    for command in STORY:
        (scratch if "--arch" in command else converted).append(command)
    assert len(scratch) == 1
    run(scratch[0], folder, "--arch", "tiny.json")
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "runs" / "speed" / "model").rename(folder / "path" / "to" / "checkpoint")
    for command in converted:
        changes = ("--self-data", "4") if "--self-data" in command else ()
        run(command, folder, *changes)
    made = json.loads((folder / "runs/mine/model/config.json").read_text())
    assert made["tidar"]["draft_lens"] == [4, 8, 16]


def test_every_command_is_known() -> None:
    for command in COMMANDS:
        if command in OURS:
            assert command.split()[1] in CHEAP, f"{command}: say how to make it cheap"
            continue
        homes = [where for known, where in ELSEWHERE.items() if command.startswith(known)]
        assert homes, f"{command}: neither run here nor listed in ELSEWHERE"
        for file, text in homes:
            assert text in (ROOT / file).read_text(encoding="utf-8"), (command, file, text)
    for known in ELSEWHERE:
        assert any(each.startswith(known) for each in COMMANDS), f"{known} is documented nowhere"


@pytest.mark.parametrize("page", ["README.md", CARD])
def test_python_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for code in fences(page, "python"):
        exec(compile(code, page, "exec"), {})
        assert capsys.readouterr().out.strip()


def test_training_recipes_are_understood() -> None:
    import yaml

    folder = ROOT / "recipes" / "bundled"
    for name, base in (("ar", None), ("joint", "x"), ("twin", "x")):
        values = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
        config = TrainConfig.from_mapping({**values, "base": base, "data": "d", "out": "o"})
        assert f"{name}.yaml" in (folder / "train.sh").read_text(encoding="utf-8")
        for path in (config.arch, config.tokenizer):
            assert path is None or (ROOT / path).exists()
    subprocess.run(["bash", "-n", folder / "train.sh"], check=True)


def test_training_curves_are_drawn(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "plot_training.py"))
    script["main"].__globals__["PICTURE"] = tmp_path / "curves.png"
    script["main"]()
    assert (tmp_path / "curves.png").stat().st_size > 10_000


# --- tables ---


def own_files() -> list[str]:
    """Files that belong to the project: those git knows or would add; without git, what is on the disk."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0:
            names = sorted({name for name in done.stdout.split("\0") if name})
            return [name for name in names if (ROOT / name).is_file()]
    found = []
    for top in ("src", "tests", "tools", "docs", "recipes", "lab", "benchmarks", ".ci"):
        paths = (path.relative_to(ROOT) for path in (ROOT / top).rglob("*") if path.is_file())
        for path in paths:
            if not any(part == "__pycache__" or part.endswith(".egg-info") for part in path.parts):
                found.append(path.as_posix())
    return sorted([*found, *(path.name for path in ROOT.glob("*.md"))])


def section(page: str, heading: str) -> str:
    """The first plain fence after a heading."""
    text = (ROOT / page).read_text(encoding="utf-8")
    part = text.split(f"\n## {heading}\n", 1)[1]
    found = re.search(r"^```(?:text)?\n(.*?)^```", part, flags=re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def test_file_tree_is_the_disk() -> None:
    tops, files, parents = set(), set(), [""]
    for line in section("README.md", "Files").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        path = "".join(parents[: depth + 1]) + name
        if depth == 0:
            tops.add(name.split("/")[0])
        if name.endswith("/"):
            parents[depth + 1 :] = [name]
        else:
            files.add(path)
    own = own_files()
    assert tops == {name.split("/")[0] for name in own if "/" in name}
    assert files == {name for name in own if name.startswith("src/tidar/")}


def test_layers_are_the_contract() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = contract["tool"]["importlinter"]["contracts"][0]["layers"]
    real = [" | ".join(re.findall(r"\w+", layer)) for layer in layers if "__main__" not in layer]
    told = [
        re.split(r" {2,}", line)[0] for line in section("ARCHITECTURE.md", "Layers").splitlines()
    ]
    assert told == real


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


# Findings become parts of docs/results.md, whose links are checked, and are written for that place.
LINKED = [n for n in own_files() if n.endswith(".md") and not n.startswith("lab/findings/")]


@pytest.mark.parametrize("page", LINKED)
def test_links_resolve(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text("utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in map(slug, headings), f"{page}: {target}"


def test_tests_named_in_tables_exist() -> None:
    for page in ("README.md", "ARCHITECTURE.md"):
        for name in re.findall(r"\btest_\w+\.py", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / "tests" / name).is_file(), f"{page}: {name}"


def test_no_paths_of_one_machine() -> None:
    """Paths that only make sense on a maintainer's machine; third-party text is left out."""
    private = re.compile(r"/(?:work|root|Users|home/\w+)/|\.library\b|\b(?:this|our|my) session\b")
    for name in own_files():
        if name.startswith("recipes/bundled/eval/") or name == "tests/test_docs.py":
            continue
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found = private.search(text)
        assert found is None, f"{name}: {text[max(found.start() - 40, 0) : found.end() + 40]!r}"
