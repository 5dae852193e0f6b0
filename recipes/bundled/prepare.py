"""Make all training and held-out text of the bundled checkpoint with one command."""

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import arithmetic
import corpus
from records import Row, characters, write_rows

ARITHMETIC_SEED = 1
HELD_OUT_PROBLEMS = 4000


def write_arithmetic(out: Path, size: int, workers: int) -> tuple[int, int]:
    """Write about `size` characters of training problems, and held-out ones; how many of each."""
    first = itertools.islice(arithmetic.generate(ARITHMETIC_SEED, 4000), 4000)
    mean = sum(len(problem.prompt) + len(problem.text) for problem in first) / 4000
    count = math.ceil(size / mean)
    arithmetic.write(out / "arithmetic.jsonl", ARITHMETIC_SEED, count, "train", workers)
    arithmetic.write(
        out / "arithmetic_held_out.jsonl", ARITHMETIC_SEED, HELD_OUT_PROBLEMS, "held_out"
    )
    return count, HELD_OUT_PROBLEMS


def main() -> None:
    """Write the training files, the held-out files (`*_held_out.jsonl`) and `manifest.json`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder of the shared data")
    parser.add_argument("--site-packages", type=Path, nargs="*", default=[])
    parser.add_argument("--only", nargs="*", default=[], help="names of packages")
    parser.add_argument("--tests", action="store_true", help="packages' tests as well")
    parser.add_argument("--arithmetic-chars", type=int, default=120_000_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    start, out = time.perf_counter(), options.out
    python = corpus.build(
        options.shared / "python_code" / "python_permissive.jsonl.xz",
        options.site_packages,
        human_eval=options.shared / "human_eval" / "HumanEval.jsonl.gz",
        only=frozenset(name.lower() for name in options.only),
        tests=options.tests,
        workers=options.workers,
    )
    train, held_out = corpus.split_rows(options.shared / "stepmath" / "step_by_step_math.jsonl.xz")
    files: dict[str, list[Row]] = {
        "python_shared": python.shared,
        "python_packages": python.packages,
        "python_held_out": python.held_out,
        "stepmath": train,
        "stepmath_held_out": held_out,
    }
    table = corpus.manifest(python)
    for name, rows in files.items():
        write_rows(out / f"{name}.jsonl", rows)
        print(f"{name}: {len(rows)} documents, {characters(rows):,} characters")
    problems = write_arithmetic(out, options.arithmetic_chars, options.workers)
    table["arithmetic"] = {"train": problems[0], "held_out": problems[1]}
    table["stepmath"] = {"train": len(train), "held_out": len(held_out)}
    (out / "manifest.json").write_text(json.dumps(table, indent=1) + "\n")
    print(f"arithmetic: {problems[0]} and {problems[1]} held-out problems")
    print(f"seconds: {time.perf_counter() - start:.1f}")


if __name__ == "__main__":
    main()
