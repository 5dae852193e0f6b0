"""`tidar eval` by every method: texts of the rivals, and the bounds that diffusion methods give as likelihoods."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from command import make_base, make_world, refused, tidar
from published import dream_folder, llada_folder
from test_eval_model import ask

import tidar as package
from tidar.errors import TidarError
from tidar.evaluation.bound import SAMPLES, score_bound
from tidar.evaluation.harness import TidarLM
from tidar.evaluation.readings import SpanReading, WholeReading

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*decodes as AR only"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that drafts, one without a mask token, LLaDA, Dream, and a file for each kind of task."""
    folder = tmp_path_factory.mktemp("methods")
    make_world(folder)
    make_base(folder / "drafts", folder / "tokenizer", mask_token_id=319)
    llada_folder(folder / "llada")
    dream_folder(folder / "dream")
    rows: dict[str, list[dict[str, object]]] = {
        "text": [{"text": "one two three"}, {"prompt": "four ", "continuation": "beta"}],
        "choices": [{"question": "one two", "choices": [" three", " a"], "answer": 0}],
        "stepmath": [{"prompt": "one two three ", "answer": "4"}],
    }
    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}_local.jsonl").write_text(text)
    return folder


def options(home: Path, *tasks: str) -> list[object]:
    names = [f"{task}_local" for task in tasks]
    data = [part for name in names for part in ("--data", f"{name}={home / name}.jsonl")]
    return ["--tasks", ",".join(names), *data, "--device", "cpu", "--dtype", "float32"]


def figures(record: dict[str, object], task: str) -> dict[str, Any]:
    return record["tasks"][f"{task}_local"]["methods"]  # type: ignore[index, no-any-return]


# --- texts ---


def test_every_method_generates(home: Path) -> None:
    """By its name, as in `generate` and `bench`, and with the same texts."""
    drafts = home / "drafts"
    names = ["ar", f"speculative:{drafts}:3", "block-diffusion:4:0.5", "masked-diffusion:8:4"]
    samples = home / "samples.jsonl"
    record = tidar(
        "eval", drafts, *options(home, "stepmath"), "--methods", ",".join(names), "--max-gen-toks", 8,
        "--samples", samples, "--json",
    ).json  # fmt: skip
    told = figures(record, "stepmath")
    assert list(told) == names
    assert told[names[1]]["texts_other_than_ar"] == 0
    for name in names[2:]:  # another model's text, which is not compared
        assert "texts_other_than_ar" not in told[name]
    assert told[names[3]]["generation"]["tokens_per_forward"] == 2.0
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    model = package.load(drafts, device="cpu", dtype="float32")
    for name, row in zip(names, rows, strict=True):
        out = model.generate(row["arguments"][0][0], method=name, max_new_tokens=8)
        assert row["method"] == name
        assert row["resps"][0][0].strip() == out.text.strip()


def test_speculative_by_one_flag(home: Path) -> None:
    """generate and bench; the diffusions are in test_unmasking.py."""
    name = f"speculative:{home / 'drafts'}:3"
    common = (
        "--model",
        home / "drafts",
        "-n",
        12,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--json",
    )
    plain = tidar("generate", "one two", *common, "--method", "ar").json
    mine = tidar("generate", "one two", *common, "--method", name).json
    assert (mine["ids"], mine["lossy"]) == (plain["ids"], False)
    (home / "p.jsonl").write_text('{"prompt": "one two"}\n')
    record = tidar("bench", home / "drafts", "--prompts", home / "p.jsonl", "--methods", f"ar,{name}",
                   "--runs", 1, "--max-new-tokens", 12, "--json").json  # fmt: skip
    assert record["methods"][name]["same_as_ar"]  # type: ignore[index]


# --- likelihoods ---


def test_likelihoods_are_the_causal_models_unless_a_diffusion_is_asked(home: Path) -> None:
    exact = f"ar,tidar:4:dense,speculative:{home / 'drafts'}:3"
    diffusions = "masked-diffusion:32:16,masked-diffusion:8:8,block-diffusion:4:0.9"
    record = tidar("eval", home / "drafts", *options(home, "text", "choices"), "--methods",
                   f"{exact},{diffusions}", "--mc-samples", 6, "--json").json  # fmt: skip
    assert record["settings"]["mc_samples"] == 6  # type: ignore[index]
    for task in ("text", "choices"):
        told = figures(record, task)
        assert list(told) == ["likelihood", "masked-diffusion, bound", "block-diffusion:4, bound"]
        plain = told["likelihood"]["likelihood"]
        assert (plain["is_bound"], plain["mc_samples"]) == (False, None)
        for name in list(told)[1:]:
            cost = told[name]["likelihood"]
            assert (cost["is_bound"], cost["mc_samples"]) == (True, 6)
            assert all(math.isfinite(score["value"]) for score in told[name]["scores"])
    alone = tidar("eval", home / "drafts", *options(home, "text"), "--json").json
    assert list(figures(alone, "text")) == ["likelihood"]
    mine, same = (figures(each, "text")["likelihood"]["scores"] for each in (alone, record))
    assert mine == same
    assert alone["settings"]["mc_samples"] == SAMPLES == 128  # type: ignore[index]


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_bidirectional_checkpoints_are_scored_by_their_bound(family: str, home: Path) -> None:
    fixed = ("eval", home / family, *options(home, "text", "choices"), "--mc-samples", 5)
    record = tidar(*fixed, "--json").json
    name = "masked-diffusion, bound" if family == "llada" else "masked-diffusion:shift, bound"
    shown = " ".join(tidar(*fixed).out.split())
    assert f"{name}: Monte Carlo, 5 samples of each text" in shown
    model = package.load(home / family, device="cpu", dtype="float32")
    reading, lm = WholeReading(shift=family == "dream"), TidarLM(model, mc_samples=5)
    assert lm.likelihood == name
    texts = ["one two three", "four beta"]
    pairs = [((lm.prefix_token_id,), tuple(lm.tok_encode(text))) for text in texts]
    expected = [each.logprob for each in score_bound(model.network, reading, pairs, samples=5)]
    assert lm.loglikelihood_rolling([ask("x", text) for text in texts]) == pytest.approx(expected)
    bits = -sum(expected) / math.log(2) / sum(map(len, texts))
    told = {score["metric"]: score["value"] for score in figures(record, "text")[name]["scores"]}
    assert told["bits_per_byte"] == pytest.approx(bits)
    for wrong in ("ar", "tidar:4:dense", "block-diffusion:4:0.9"):
        says = refused("eval", home / family, *options(home, "text"), "--methods", wrong)
        assert "trained with every row seeing every other" in says
    with pytest.raises(TidarError, match="Method 'ar' reads causally"):
        TidarLM(model, "ar")


def test_windows_fit_and_seeds_count(home: Path) -> None:
    """A text of many windows: each row of a pass has a position; the same again for the same seed."""
    model = package.load(home / "drafts", device="cpu", dtype="float32")
    text = [ask("x", "one two three four " * 40)]
    sums = [
        TidarLM(model, "block-diffusion:8:0.9", mc_samples=2, seed=seed, batch_size=batch)
        for seed, batch in ((0, 8), (0, 3), (1, 8))
    ]
    first, again, other = (lm.loglikelihood_rolling(text)[0] for lm in sums)
    assert sums[0].scored.work.truncated == 0
    assert sums[0].scored.requests == 1
    assert again == pytest.approx(first, rel=1e-5)
    assert abs(other - first) > 1e-3
    assert sums[0].reading == SpanReading(8)


def test_greedy_answers_are_told(home: Path) -> None:
    """For tasks that ask whether the answer is what the method would write."""
    model = package.load(home / "llada", device="cpu", dtype="float32")
    lm = TidarLM(model, "masked-diffusion:6:6", mc_samples=2)
    ids = model.generate(
        "one", method="masked-diffusion:6:6", max_new_tokens=6, ignore_eos=True
    ).ids
    context = tuple(model.encode("one"))
    asked = [(None, context, ids), (None, context, [*ids[:-1], (ids[-1] + 1) % 250])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(asked)] == [True, False]


def test_mistakes(home: Path) -> None:
    says = refused(
        "eval", home / "base", *options(home, "text"), "--methods", "masked-diffusion:8:4"
    )
    assert "has no mask token" in says
    says = refused("eval", home / "drafts", *options(home, "text"), "--methods", "masked-diffusion:8:4",
                   "--engine", "paged")  # fmt: skip
    assert "plain engine only" in says
    says = refused(
        "eval", home / "drafts", *options(home, "text"), "--methods", "speculative:nowhere:3"
    )
    assert "nowhere" in says
    for task in ("text", "stepmath"):
        says = refused("eval", home / "drafts", *options(home, task), "--seed", 1 << 63)
        assert "seed is 9223372036854775808" in says
    assert "mc-samples" in refused(
        "eval", home / "drafts", *options(home, "text"), "--mc-samples", 0
    )
    with pytest.raises(TidarError, match="mc_samples is 'many'; it must be a whole number"):
        TidarLM(str(home / "drafts"), mc_samples="many", device="cpu")
