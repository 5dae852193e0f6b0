"""Choose the committed evaluation prompts from held-out text: by order of hash, never by hand."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import arithmetic
from corpus import content_digest
from records import Row, read_rows, write_rows
from tokenizers import Tokenizer

PROMPT_TOKENS = 256
PYTHON_PROMPTS, STEPMATH_PROMPTS = 100, 100
ARITHMETIC_PROMPTS = {"sum": 60, "product": 60, "compare": 40, "word": 40}
ARITHMETIC_SEED = 20
REPOSITORIES = {
    "sympy/sympy": "sympy.txt",
    "networkx/networkx": "networkx.txt",
    "TheAlgorithms/Python": "TheAlgorithms-Python.txt",
    "keon/algorithms": "keon-algorithms.txt",
    "kamyu104/LeetCode-Solutions": "kamyu104-LeetCode-Solutions.txt",
    "erikhyrkas/snakes": "snakes.txt",
}


def python_prompts(rows: Iterator[Row], tokenizer: Tokenizer) -> Iterator[Row]:
    """Files cut after 256 and 512 tokens, where both cuts encode to the same tokens again."""
    for row in sorted(rows, key=lambda row: content_digest(row["text"])):
        ids = tokenizer.encode(row["text"]).ids[: 2 * PROMPT_TOKENS]
        prompt = tokenizer.decode(ids[:PROMPT_TOKENS], skip_special_tokens=False)
        both = tokenizer.decode(ids, skip_special_tokens=False)
        if (
            len(ids) < 2 * PROMPT_TOKENS
            or tokenizer.encode(prompt).ids != ids[:PROMPT_TOKENS]
            or tokenizer.encode(both).ids != ids
            or not row["text"].startswith(both)
        ):
            continue
        yield {
            "id": content_digest(row["text"])[:16],
            "license": row["license"],
            "repo": row["origin"],
            "path": row["path"],
            "prompt": prompt,
            "continuation": both.removeprefix(prompt),
        }


def _large_enough(problem: arithmetic.Problem) -> bool:
    """Sums of two numbers to 5 digits, products of 3 by 2 digits and larger; any other kind."""
    operands = problem.canonical.partition(":")[2].split(",")
    if problem.kind == "sum":
        return len(operands) == 2 and max(map(len, operands)) <= 5
    if problem.kind == "product":
        return sum(map(len, operands)) >= 5 and min(map(len, operands)) >= 2
    return True


def arithmetic_prompts() -> Iterator[Row]:
    """Held-out problems of the four kinds, the first that are large enough."""
    for kind, count in ARITHMETIC_PROMPTS.items():
        problems = arithmetic.generate(ARITHMETIC_SEED, 20 * count, "held_out", [kind])
        large = [problem for problem in problems if _large_enough(problem)][:count]
        for problem in large:
            yield {
                "id": content_digest(problem.canonical)[:16],
                "kind": kind,
                "prompt": problem.prompt,
                "continuation": problem.text,
                "answer": problem.answer,
            }


def stepmath_prompts(rows: Iterator[Row]) -> Iterator[Row]:
    """Held-out rows in order of their digest."""
    for row in sorted(rows, key=lambda row: content_digest(row["prompt"] + row["text"])):
        yield {
            "id": content_digest(row["prompt"] + row["text"])[:16],
            "prompt": row["prompt"],
            "continuation": row["text"],
            "answer": arithmetic.final_answer(row["text"]),
        }


def notice(licenses: Path) -> str:
    """Origins and the licence texts of everything in the folder."""
    parts = [
        "# Origins and licences of the evaluation prompts\n\n"
        "`python.jsonl`: beginnings of files of the repositories below; the repository, path and\n"
        "licence are in each row. `stepmath.jsonl`: rows of erikhyrkas/snakes (MIT).\n"
        "`arithmetic.jsonl`: made by `arithmetic.py`, under this project's own licence.\n"
    ]
    for repository, name in REPOSITORIES.items():
        text = (licenses / name).read_text().strip()
        parts.append(f"\n## {repository}\n\n```text\n{text}\n```\n")
    return "".join(parts)


def main() -> None:
    """Write the prompt files; every cut is checked to be between the same tokens."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--tokenizer", type=Path, default=here / "tokenizer" / "tokenizer.json")
    parser.add_argument("--licenses", type=Path, required=True, help="folder of licence texts")
    parser.add_argument("--out", type=Path, default=here / "eval")
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    chosen = {
        "python": list(
            python_prompts(read_rows(options.data / "python_held_out.jsonl"), tokenizer)
        )[:PYTHON_PROMPTS],
        "arithmetic": list(arithmetic_prompts()),
        "stepmath": list(stepmath_prompts(read_rows(options.data / "stepmath_held_out.jsonl")))[
            :STEPMATH_PROMPTS
        ],
    }
    for name, rows in chosen.items():
        for row in rows:
            prompt = tokenizer.encode(row["prompt"]).ids
            whole = tokenizer.encode(row["prompt"] + row["continuation"]).ids
            assert whole[: len(prompt)] == prompt, (name, row["id"])
        print(f"{name}: {write_rows(options.out / f'{name}.jsonl', rows)} prompts")
    (options.out / "NOTICE.md").write_text(notice(options.licenses))


if __name__ == "__main__":
    main()
