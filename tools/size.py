#!/usr/bin/env python3
"""Fail when a file or a function has outgrown its cap, or a reserved word is used bare.

A cap is not a target: the point is less to know per file. Raising one needs a sentence in the
pull request. The reserved word has seven meanings in this field; ARCHITECTURE.md gives each thing
a word of its own.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_CAP = 450
FUNCTION_CAP = 60
KERNEL_CAP = 120

RESERVED = re.compile(r"\bblocks?\b", re.IGNORECASE)
FLEX_API = re.compile(r"BlockMask|create_block_mask|flex_?attention", re.IGNORECASE)
# The method's name, and what LLaDA's published tensors are called.
ALLOWED_PHRASES = re.compile(r"\bblock[- ]diffusion\b|\btransformer\.blocks\b", re.IGNORECASE)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.Module) -> Iterator[Function]:
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def length(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def is_kernel(function: Function) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def findings(path: Path, text: str, tree: ast.Module) -> Iterator[str]:
    """One line per finding, in the form path:line: reason."""
    lines = text.splitlines()
    if len(lines) > FILE_CAP:
        yield f"{path}:1: {len(lines)} lines, the cap is {FILE_CAP}"
    for function in functions(tree):
        cap = KERNEL_CAP if is_kernel(function) else FUNCTION_CAP
        if length(function) > cap:
            size = f"{function.name} has {length(function)} lines"
            yield f"{path}:{function.lineno}: {size}, the cap is {cap}"
    for number, line in enumerate(lines, start=1):
        if RESERVED.search(ALLOWED_PHRASES.sub("", line)) and not FLEX_API.search(line):
            yield f"{path}:{number}: the bare word 'block'; ARCHITECTURE.md lists the words to use"


def table_row(path: Path, text: str, tree: ast.Module) -> tuple[int, int, str]:
    longest = max((length(function) for function in functions(tree)), default=0)
    return len(text.splitlines()), longest, str(path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the sizes and words of the source files.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("src"))
    parser.add_argument("--table", action="store_true", help="print every file, longest first")
    arguments = parser.parse_args()

    problems: list[str] = []
    rows: list[tuple[int, int, str]] = []
    for path in sorted(arguments.folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text, filename=str(path))
        problems += findings(path, text, tree)
        rows.append(table_row(path, text, tree))

    if arguments.table:
        print(f"{'lines':>6} {'longest function':>17}  file")
        for count, longest, name in sorted(rows, reverse=True):
            print(f"{count:>6} {longest:>17}  {name}")
    for problem in problems:
        print(problem, file=sys.stderr)
    total = sum(count for count, _, _ in rows)
    print(f"{len(rows)} files, {total} lines, {len(problems)} over a cap or misnamed")
    return 1 if problems or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
