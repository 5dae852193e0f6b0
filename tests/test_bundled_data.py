"""The data of the bundled checkpoint: arithmetic, corpus filters, tokenizer, prompt files."""

import importlib
import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

RECIPE = Path(__file__).parent.parent / "recipes" / "bundled"


def recipe(name: str) -> ModuleType:
    """A module of the recipe; its folder is importable only while it is imported."""
    sys.path.insert(0, str(RECIPE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(RECIPE))


arithmetic = recipe("arithmetic")
corpus = recipe("corpus")
licences = recipe("licences")
records = recipe("records")


# ------------------------------------------------------------------------------- arithmetic


def expected(problem) -> str:
    """The answer, computed from the prompt's numbers alone."""
    numbers = [int(number) for number in re.findall(r"\d+", problem.prompt)]
    prompt = problem.prompt
    if problem.kind == "sum" or "more from" in prompt:
        return str(sum(numbers))
    if problem.kind == "difference":
        return str(numbers[1] - numbers[0] if "Subtract" in prompt else numbers[0] - numbers[1])
    if problem.kind == "product":
        return str(numbers[0] * numbers[1])
    if problem.kind == "compare":
        if prompt.startswith("Which"):
            return str((max if "larger" in prompt else min)(numbers))
        left, right = numbers
        return "yes" if (left < right if "<" in prompt else left > right) else "no"
    if problem.kind == "division" or "shares" in prompt:
        return "{} remainder {}".format(*divmod(numbers[0], numbers[1]))
    if "gave" in prompt:
        return str(numbers[0] - numbers[1])
    sign = 1 if "packs" in prompt else -1
    return str(numbers[0] * numbers[1] + sign * numbers[2])


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("kind", arithmetic.KINDS)
def test_answers_are_right(kind, split):
    problems = list(arithmetic.generate(3, 150, split, [kind]))
    for problem in problems:
        assert problem.answer == expected(problem), problem.prompt
        assert problem.text.endswith(f"\nAnswer: {problem.answer}\n")
        assert arithmetic.check(problem, problem.text)


def test_every_written_equation_holds():
    steps = 0
    for problem in arithmetic.generate(4, 500):
        for left, sign, right, result in re.findall(
            r"(-?\d+) ([-+*]) (-?\d+) = (-?\d+)", problem.text
        ):
            terms = {"+": int(right), "-": -int(right), "*": int(left) * (int(right) - 1)}
            assert int(left) + terms[sign] == int(result), problem.text
            steps += 1
    assert steps > 2000


def test_checker_rejects_wrong_answers():
    for problem in arithmetic.generate(5, 200):
        assert not arithmetic.check(problem, problem.text.replace("Answer: ", "Answer: 1"))
        assert not arithmetic.check(problem, problem.text.partition("Answer:")[0])
        assert not arithmetic.check(problem, "Answer: none\n" + problem.text)
    assert arithmetic.final_answer("x\nFinal Answer:\n-47\n```\n") == "-47"


def test_splits_are_disjoint_and_word_problems_hold_no_held_out_part():
    train = list(arithmetic.generate(6, 5000, "train"))
    held_out = list(arithmetic.generate(6, 500, "held_out"))
    forms = {problem.canonical for problem in held_out}
    assert len(forms) == 500
    assert not forms & {problem.canonical for problem in train}
    for problem in train:
        assert not any(
            map(arithmetic.is_held_out, problem.canonical.removeprefix("word:").split(";"))
        )
    assert arithmetic.canonical("sum", 12, 7) == arithmetic.canonical("sum", 7, 12)
    assert arithmetic.canonical("difference", 12, 7) != arithmetic.canonical("difference", 7, 12)


def test_same_seed_same_problems(tmp_path):
    assert list(arithmetic.generate(7, 100)) == list(arithmetic.generate(7, 100))
    assert list(arithmetic.generate(7, 100)) != list(arithmetic.generate(8, 100))
    arithmetic.write(tmp_path / "one.jsonl", 7, 6000, workers=1)
    arithmetic.write(tmp_path / "two.jsonl", 7, 6000, workers=2)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


# ------------------------------------------------------------------------------- corpus


def source_text(seed: int, functions: int = 12) -> str:
    """A Python file whose words are random, so that two of them share no span of 13 words."""
    rng = random.Random(seed)
    parts = []
    for index in range(functions):
        words = ["".join(rng.choices("abcdefghij", k=7)) for _ in range(8)]
        names = ", ".join(words)
        parts.append(f"def f{index}_{words[0]}({names}):\n    return {' + '.join(words)}\n")
    return "\n\n".join(parts)


def install(site: Path, name: str, metadata: str, files: dict[str, str]) -> None:
    """Put a distribution with a RECORD into a site-packages folder."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{metadata}\n"
    )
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))


def held_out_text() -> str:
    """A random file that the hash puts into the held-out split."""
    return next(
        text
        for text in map(source_text, range(1000, 2000))
        if corpus.is_held_out(corpus.content_digest(text))
    )


def test_corpus_keeps_permissive_new_files_only(tmp_path):
    held_out, fresh = held_out_text(), source_text(1)
    rows = tmp_path / "rows.jsonl.gz"
    texts = [
        held_out,
        next(
            text
            for text in map(source_text, range(2, 99))
            if not corpus.is_held_out(corpus.content_digest(text))
        ),
    ]
    records.write_rows(
        rows, ({"repo": "a/b", "license": "MIT", "path": "x.py", "text": text} for text in texts)
    )
    site = tmp_path / "site"
    copied = held_out.replace("f0_", "renamed_") + "\n\nextra = 1\n"
    mit = "Classifier: License :: OSI Approved :: MIT License"
    install(
        site,
        "good",
        mit,
        {
            "good/fresh.py": fresh,
            "good/again.py": fresh.replace("f1_", "g1_"),
            "good/near.py": copied,
            "good/part.py": source_text(200, 40) + "\n\n" + held_out[: len(held_out) // 2],
            "good/broken.py": source_text(201) + "\ndef (:\n",
            "good/_vendor/other.py": source_text(202),
            "good/tests/test_it.py": source_text(203),
            "good/table.py": "rows = [\n" + "    1234567890, 1234567890,\n" * 50 + "]\n",
        },
    )
    gpl = "Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)"
    install(site, "bad", gpl, {"bad/a.py": source_text(204)})
    install(site, "unknown", "License: see file", {"unknown/a.py": source_text(205)})
    built = corpus.build(rows, [site], workers=1)
    assert [row["text"] for row in built.held_out] == [held_out]
    assert [row["text"] for row in built.shared] == texts[1:]
    kept = [row["text"] for row in built.packages]
    assert len(kept) == 1
    assert kept[0] in (fresh, fresh.replace("f1_", "g1_"))
    assert built.packages[0]["origin"] == "good==1.0"
    assert built.reasons["packages"] == {
        "kept": 1,
        "near duplicate": 1,
        "near held-out": 2,
        "does not compile": 1,
        "vendored": 1,
        "test": 1,
        "digits": 1,
    }


def test_benchmark_overlap_is_dropped(tmp_path):
    text = source_text(3)
    rows = tmp_path / "rows.jsonl"
    row = {"repo": "a/b", "license": "MIT", "path": "x.py", "text": text}
    records.write_rows(rows, [row])
    human_eval = tmp_path / "HumanEval.jsonl"
    problem = {"prompt": text[200:600], "canonical_solution": "", "test": ""}
    records.write_rows(human_eval, [problem])
    built = corpus.build(rows, human_eval=human_eval)
    assert not built.shared
    assert not built.held_out


@pytest.mark.parametrize(
    ("expression", "good"),
    [
        ("MIT", True),
        ("Apache-2.0 OR BSD-2-Clause", True),
        ("GPL-2.0-only OR MIT", True),
        ("BSD-3-Clause AND 0BSD AND (MIT)", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("MPL-2.0 AND MIT", False),
        ("LGPL-3.0-or-later", False),
        ("LicenseRef-Proprietary", False),
    ],
)
def test_license_expressions(expression, good):
    assert licences.permissive_expression(expression) is good


def test_stepmath_split_is_disjoint(tmp_path):
    path = tmp_path / "rows.jsonl"
    records.write_rows(path, ({"prompt": f"q{i}?", "text": f"a{i}"} for i in range(400)))
    train, held_out = corpus.split_rows(path)
    assert held_out
    assert len(train) + len(held_out) == 400
    assert all(row["prompt"].endswith("?\n") for row in train)


# ------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(RECIPE / "tokenizer" / "tokenizer.json"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "def f(x):\n\n\treturn  x  # tab\r\n\n",
        "naïve 日本語 🙂\u200d 1234567890 ٣",
        "trailing   \n   ",
        "\0\x7f<|endoftext|> <|mask|>",
        Path(__file__).read_text(),
    ],
)
def test_decode_inverts_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_vocabulary(tokenizer):
    assert tokenizer.get_vocab_size() == 2560
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert tokenizer.token_to_id("<|mask|>") == 1
    with_digits = [piece for piece in tokenizer.get_vocab() if re.search(r"\d", piece)]
    assert sorted(with_digits) == list("0123456789")
    assert (RECIPE / "tokenizer" / "tokenizer.json").stat().st_size < 330_000


def test_transformers_opens_the_tokenizer(tokenizer):
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(str(RECIPE / "tokenizer"))
    text = "class A:\n    def f(self):\n        return 12 + 345\n"
    ids = auto(text)["input_ids"]
    assert ids == tokenizer.encode(text).ids
    assert auto.decode(ids) == text
    assert (auto.eos_token_id, auto.mask_token_id, len(auto)) == (0, 1, 2560)
    assert auto.bos_token_id is None


# ------------------------------------------------------------------------------- prompt files


@pytest.mark.parametrize(
    ("name", "count"), [("python", 100), ("arithmetic", 200), ("stepmath", 100)]
)
def test_prompt_files(tokenizer, name, count):
    path = RECIPE / "eval" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == len({row["id"] for row in rows}) == count
    for row in rows:
        prompt = tokenizer.encode(row["prompt"]).ids
        both = tokenizer.encode(row["prompt"] + row["continuation"]).ids
        assert both[: len(prompt)] == prompt
        if name == "python":
            assert (len(prompt), len(both)) == (256, 512)
        else:
            assert arithmetic.final_answer(row["continuation"]) == row["answer"]


def test_places_are_those_of_every_repetition() -> None:
    theirs = np.sort(np.array([3, 5, 5, 5, 8, 9, 9, 12], np.uint64))
    for mine in ([5, 9], [3], [12], [3, 5, 8, 9, 12]):
        values = np.array(mine, np.uint64)
        there = np.flatnonzero(np.isin(theirs, values))
        assert corpus._places(values, theirs).tolist() == there.tolist()
