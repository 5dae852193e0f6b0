"""The commands, as a user types them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command import (
    Ran,
    assert_same_weights,
    make_world,
    refused,
    scratch_options,
    tidar,
    train_options,
)
from models import BUNDLED

from tidar.training.sources import Source, documents

PROMPT = "Compute 78417 + 5691.\n"
FIXED = ("--draft-len", 8, "--span-set", "dense", "-n", 24)
"""A schedule that needs no measuring."""

COMMANDS = (
    "generate", "demo", "train", "train-tokenizer", "inspect", "verify", "bench", "eval", "profile",
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    make_world(folder)
    return folder


def log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# --- generate ---


def test_prompt_from_argument_file_and_stdin(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    texts = [
        tidar("generate", PROMPT, *FIXED).out,
        tidar("generate", "--file", tmp_path / "prompt.txt", *FIXED).out,
        tidar("generate", "-", *FIXED, stdin=PROMPT).out,
    ]
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0].strip()) > 10
    assert texts[0] != tidar("generate", "def fib(n):", *FIXED).out


def test_json_says_what_was_done() -> None:
    record = tidar("generate", PROMPT, *FIXED, "--json").json
    assert set(record) == {
        "text", "ids", "tokens", "forwards", "tokens_per_forward", "decode_tokens_per_second",
        "prefill_seconds", "decode_seconds", "draft_forwards", "accepts", "finish", "lossy",
    }  # fmt: skip
    assert record["tokens"] == len(record["ids"]) == 24
    assert len(record["accepts"]) == record["forwards"]
    assert record["tokens_per_forward"] == pytest.approx(23 / record["forwards"])
    assert record["tokens_per_forward"] > 2  # arithmetic is what the bundled model drafts best
    assert record["finish"] == "length"
    assert record["lossy"] is False
    assert record["text"] + "\n" == tidar("generate", PROMPT, *FIXED).out
    lossy = tidar("generate", PROMPT, *FIXED, "--beta", 0.5, "--json").json
    assert lossy["lossy"] is True
    assert "lossy" in tidar("generate", PROMPT, *FIXED, "--beta", 0.5).err


def test_methods_and_plans_give_one_text() -> None:
    ar = tidar("generate", PROMPT, "--method", "ar", "-n", 24, "--json").json
    assert ar["tokens_per_forward"] == 1.0
    assert ar["forwards"] == 23
    for more in (FIXED, ("-n", 24), ("-K", 4, "--span-set", "single", "-n", 24)):
        record = tidar("generate", PROMPT, *more, "--json").json
        assert record["ids"] == ar["ids"]


def test_sampling_follows_the_seed() -> None:
    def ids(*more: object) -> object:
        return tidar("generate", "def f", "-t", 1, *more, "--json").json["ids"]

    assert ids(*FIXED, "--seed", 5) == ids(*FIXED, "--seed", 5)
    assert ids(*FIXED, "--seed", 5) != ids(*FIXED, "--seed", 6)
    assert ids(*FIXED, "--seed", 5) == ids("--method", "ar", "-n", 24, "--seed", 5)
    rejection = ("--sampling", "rejection", "--top-p", 0.9, "--top-k", 20)
    assert ids(*FIXED, *rejection) == ids(*FIXED, *rejection)


def test_stop_strings_are_cut() -> None:
    whole = str(tidar("generate", PROMPT, *FIXED, "--json").json["text"])
    stop = whole[8:11]
    record = tidar("generate", PROMPT, *FIXED, "--stop", "never!", "--stop", stop, "--json").json
    assert record["finish"] == "stop"
    assert record["text"] == whole[: whole.index(stop)]


def test_ignore_eos_goes_on(home: Path, tmp_path: Path) -> None:
    options = ("generate", "Multiply 613 by 41.\n", "-K", 16, "--span-set", "dense", "-n", 400)
    ended = tidar(*options, "--json").json
    assert ended["finish"] == "end-of-text"
    ids = ended["ids"]
    assert isinstance(ids, list)
    assert ids[-1] == 0
    on = tidar(*options[:-1], len(ids) + 9, "--ignore-eos", "--json").json
    assert on["tokens"] == len(ids) + 9
    assert on["ids"][: len(ids)] == ids  # type: ignore[index]
    assert on["finish"] == "length"


def test_show_steps_counts_forward_passes() -> None:
    ran = tidar("generate", PROMPT, *FIXED, "--show-steps")
    record = tidar("generate", PROMPT, *FIXED, "--json").json
    assert f"24 tokens, {record['forwards']} forward passes after the prefill" in ran.err
    assert f"{record['tokens_per_forward']:.2f} tokens per forward" in ran.err
    assert (
        ran.out == tidar("generate", PROMPT, *FIXED).out
    )  # colours only where there is a terminal


# --- train ---


def test_from_scratch_then_convert_with_own_text(home: Path, tmp_path: Path) -> None:
    """An AR model from scratch, converted with text that it samples itself; each command resumes."""
    tidar(*scratch_options(home, tmp_path / "ar", spans=False), "--objective", "ar")
    base = tmp_path / "ar" / "model"
    assert "tidar" not in json.loads((base / "config.json").read_text())
    convert = [*train_options(home, tmp_path / "own"), "--base", base, "--self-data", 40,
               "--eval-every", 3, "--eval-prompts", 2]  # fmt: skip
    record = tidar(*convert, "--json").json
    assert record["steps"] == 6
    assert record["clean_tokens"] == 6 * 4 * 32
    assert record["model"] == str(tmp_path / "own" / "model")
    own = tmp_path / "own" / "self-data.jsonl"
    assert len(list(documents(Source(str(own)), "text"))) == 40
    held_out = [row for row in log(tmp_path / "own") if "eval/base_samples/mask_loss" in row]
    assert [row["step"] for row in held_out] == [0, 3, 6]
    meta = json.loads((tmp_path / "own" / "model" / "config.json").read_text())["tidar"]
    assert meta["draft_lens"] == [2, 4]
    write = ("generate", "alpha", "-m", tmp_path / "own" / "model", "-n", 12, "--json")
    assert tidar(*write).json["ids"] == tidar(*write, "--method", "ar").json["ids"]


def test_own_text_never_holds_the_row_that_becomes_the_mask_token(
    home: Path, tmp_path: Path
) -> None:
    """The random base draws each of its 320 rows; row 280 is the first past the tokenizer's."""
    tidar(*train_options(home, tmp_path / "run"), "--base", home / "base", "--self-data", 60)
    meta = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["tidar"]
    found = documents(Source(str(tmp_path / "run" / "self-data.jsonl")), "text")
    drawn = {token for document in found for token in document}
    assert meta["mask_token_id"] == 280
    assert 280 not in drawn
    assert {279, 281} <= drawn


def test_resumed_run_with_own_text_ends_in_the_same_weights(home: Path, tmp_path: Path) -> None:
    def convert(out: Path, *more: object) -> Ran:
        return tidar(
            *train_options(home, out), "--base", home / "base", "--self-data", 40, "--json", *more
        )

    convert(tmp_path / "whole")
    convert(tmp_path / "cut", "--max-steps", 6)
    sampled = (tmp_path / "cut" / "self-data.jsonl").stat()
    for gone in ("checkpoint-6", "model"):
        for path in (tmp_path / "cut" / gone).iterdir():
            path.unlink()
        (tmp_path / "cut" / gone).rmdir()
    resumed = convert(tmp_path / "cut", "--resume")
    assert "Resuming from" in resumed.err
    assert "checkpoint-4" in resumed.err
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    after = (tmp_path / "cut" / "self-data.jsonl").stat()
    assert after.st_mtime_ns == sampled.st_mtime_ns  # neither sampled nor tokenised anew


def test_recipe_and_command_line(home: Path, tmp_path: Path) -> None:
    """Options come from a recipe; the command line wins, with 0 as a value of its own."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"arch: {home / 'arch.json'}\ntokenizer: {home / 'tokenizer'}\ndata: {home / 'data.jsonl'}\n"
        f"out: {tmp_path / 'run'}\ncache-dir: {home / 'cache'}\nseq_len: 32\nalpha: 3.0\n"
        "draft_lens: [2, 4]\nmax_steps: 2\nuse_cpu: true\nreport_to: none\neval_every: 1\n"
    )
    ran = tidar("train", "--config", recipe, "--alpha", 0, "--eval-every", 0, "--seed=9")
    assert f"Checkpoint: {tmp_path / 'run' / 'model'}" in ran.out
    assert "2 steps" in ran.out
    config = json.loads((tmp_path / "run" / "run.json").read_text())
    assert config["alpha"] == 0
    assert config["eval_every"] == 0
    assert config["arguments"]["max_steps"] == 2
    assert config["arguments"]["seed"] == "9"


def test_unknown_training_option_names_the_nearest(home: Path, tmp_path: Path) -> None:
    given = [*scratch_options(home, tmp_path / "run")]
    assert "learning_rate" in refused(*given, "--learning-rat", "1e-3")
    assert "draft_lens" in refused(*given, "--draft-len", 4)
    assert "needs a value" in refused(*given, "--group-by-length")
    assert "eval_every" in refused(*given, "--eval-steps", 4)
    assert "'surplus'" in refused(*given, "surplus")
    assert not (tmp_path / "run").exists()


# --- other commands ---


def test_train_tokenizer(home: Path, tmp_path: Path) -> None:
    from tidar.tokens import Tokenizer

    ran = tidar("train-tokenizer", "--data", home / "data.jsonl", "--vocab-size", 300,
                "--out", tmp_path / "new")  # fmt: skip
    assert str(tmp_path / "new") in ran.out
    tokenizer = Tokenizer.load(tmp_path / "new")
    assert tokenizer.max_id < 300
    assert tokenizer.decode(tokenizer.encode("alpha 12 two")) == "alpha 12 two"


def test_inspect() -> None:
    facts = tidar("inspect", "model", BUNDLED, "--json").json
    assert facts["tidar"]["draft_lens"] == [4, 8, 16]  # type: ignore[index]
    assert "n = 2" in tidar("inspect", "decode", "--draft-len", 2, "--span-set", "1,2").out


def test_exit_codes(home: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "alpha beta"}\n')
    common = ("--methods", "ar", "--runs", 1, "--max-new-tokens", 4)
    assert Ran(("bench", home / "base", "--prompts", tmp_path / "p.jsonl", *common)).code == 0
    assert Ran(("bench", home / "base", "--prompts", tmp_path / "none.jsonl", *common)).code == 2
    assert Ran(("nothing",)).code == 2
    assert Ran(("generate", "x", "--no-such-option")).code == 2


def test_verify_fails_with_exit_code_1(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that is wrong somewhere is told by the exit code too."""
    from tidar.verify import laws

    ran = Ran(("verify", home / "base", "--quick", "--json"))
    assert ran.code == 0, ran.out
    assert ran.json["passed"] is True
    finding = laws.run_laws

    def broken(*args: object, **kwargs: object) -> object:
        from dataclasses import replace

        found = finding(*args, **kwargs)  # type: ignore[arg-type]
        return [replace(found[0], verdict="fail"), *found[1:]]

    monkeypatch.setattr(laws, "run_laws", broken)
    ran = Ran(("verify", home / "base", "--quick", "--json"))
    assert ran.code == 1
    assert ran.json["passed"] is False


def test_help_is_quick_and_loads_no_framework() -> None:
    """Help for every command, in one process without this one's imports."""
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from tidar.cli import app\n"
        "for name in sys.argv[1:]:\n"
        "    arguments = name.split() + ['--help']\n"
        "    result = CliRunner().invoke(app, arguments)\n"
        "    assert result.exit_code == 0, name\n"
        "    print(f'== {name}')\n"
        "    print(result.stdout)\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'safetensors', 'numpy', 'datasets'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))\n"
    )
    inspects = [f"inspect {name}" for name in ("model", "decode", "training", "prefill")]
    command = [sys.executable, "-c", program, "", *COMMANDS, *inspects]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stdout
    pages = done.stdout.split("== ")[1:]
    assert len(pages) == 1 + len(COMMANDS) + len(inspects)
    for page in pages[1:]:
        name = page.splitlines()[0]
        assert "Usage:" in page, name
        if name not in ("demo", "inspect"):
            assert "tidar " + name.split()[0] in page.split("Usage:")[1], name  # an example
    for name in COMMANDS:
        assert name in pages[0]
