"""Worked arithmetic: problems whose solutions are written out in fixed templates.

A solution is a function of its problem alone, and every written token follows from a few earlier
ones (one table look-up, or a copy), so a very small transformer can learn it, and text with so
little entropy shows how far drafts reach. A problem is held out when the hash of its canonical form
says so; a training problem never contains a held-out one, word problems included.
"""

import argparse
import hashlib
import json
import multiprocessing
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

Split = Literal["train", "held_out"]
HELD_OUT_ONE_IN = 50


@dataclass(frozen=True)
class Problem:
    """`prompt + text` is the document; `text` ends with the line `Answer: {answer}`."""

    kind: str
    canonical: str
    prompt: str
    text: str
    answer: str


class Worked(NamedTuple):
    """Solution lines without the answer line, the result, and canonical forms of its parts."""

    lines: list[str]
    result: str
    parts: tuple[str, ...] = ()


# ------------------------------------------------------------------------------- identity


def canonical(operation: str, *operands: int) -> str:
    """The identity of a problem; the operands' order counts only where it changes the result."""
    ordered = sorted(operands) if operation in {"sum", "product", "compare"} else operands
    return f"{operation}:" + ",".join(map(str, ordered))


def is_held_out(form: str) -> bool:
    """Whether the problem of this canonical form belongs to the held-out split."""
    digest = hashlib.sha256(form.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


# ------------------------------------------------------------------------------- solutions


def _digits(number: int, width: int) -> list[int]:
    """Digits from the right, zero-padded to `width`."""
    return [int(digit) for digit in reversed(str(number).zfill(width))]


def add(numbers: Sequence[int]) -> Worked:
    """Add column by column from the right; each column is a chain of two-term sums."""
    width = max(len(str(number)) for number in numbers)
    columns = zip(*(_digits(number, width) for number in numbers), strict=True)
    lines = ["Line up: " + " + ".join(str(number).zfill(width) for number in numbers)]
    carry, done = 0, ""
    for column in columns:
        total, chain = column[0], []
        for digit in (*column[1:], carry):
            chain.append(f"{total} + {digit} = {total + digit}")
            total += digit
        carry, digit = divmod(total, 10)
        done = f"{digit}{done}"
        lines.append(f"{', '.join(chain)}, write {digit} carry {carry}: {done}")
    if carry:
        done = f"{carry}{done}"
    lines.append(f"Sum: {done}")
    return Worked(lines, str(int(done)), (canonical("sum", *numbers),))


def subtract(left: int, right: int) -> Worked:
    """Subtract column by column from the right; a negative result is the swapped difference."""
    big, small = max(left, right), min(left, right)
    width = len(str(big))
    sign = "-" if left < right else ""
    lines = [f"{right} is larger, so swap and negate."] if sign else []
    lines.append(f"Line up: {big} - {str(small).zfill(width)}")
    borrow, done = 0, ""
    for top, bottom in zip(_digits(big, width), _digits(small, width), strict=True):
        first = top - bottom
        second = first - borrow
        step = f"{top} - {bottom} = {first}, {first} - {borrow} = {second}"
        borrow = int(second < 0)
        digit = second + 10 * borrow
        done = f"{digit}{done}"
        lines.append(f"{step}, write {digit} borrow {borrow}: {done}")
    result = sign + str(int(done)) if int(done) else "0"
    lines.append(f"Difference: {result}")
    return Worked(lines, result, (canonical("difference", left, right),))


def multiply(left: int, right: int) -> Worked:
    """Long multiplication: one partial product for each digit of `right`, then their sum."""
    lines, partials = [], []
    for place, factor in enumerate(_digits(right, 1)):
        lines.append(f"{left} * {factor}:")
        carry, done = 0, ""
        for digit in _digits(left, 1):
            product = digit * factor
            total = product + carry
            step = f"{digit} * {factor} = {product}, {product} + {carry} = {total}"
            carry, low = divmod(total, 10)
            done = f"{low}{done}"
            lines.append(f"{step}, write {low} carry {carry}: {done}")
        done = f"{carry}{done}" if carry else done
        partials.append(int(done) * 10**place)
        lines.append(f"Partial: {partials[-1]}")
    total_lines = add(partials).lines if len(partials) > 1 else []
    result = str(left * right)
    return Worked(
        [*lines, *total_lines, f"Product: {result}"], result, (canonical("product", left, right),)
    )


def divide(left: int, right: int) -> Worked:
    """Long division by one digit; the result reads `quotient remainder rest`."""
    lines, rest, done = [], 0, ""
    for digit in str(left):
        part = rest * 10 + int(digit)
        quotient = part // right
        rest = part - quotient * right
        done += str(quotient)
        lines.append(
            f"Bring down {digit}: {part}, {quotient} * {right} = {quotient * right}, "
            f"{part} - {quotient * right} = {rest}, write {quotient}: {done}"
        )
    lines.append(f"Quotient: {int(done)}")
    lines.append(f"Remainder: {rest}")
    result = f"{int(done)} remainder {rest}"
    return Worked(lines, result, (canonical("division", left, right),))


def compare(left: int, right: int) -> Worked:
    """Compare digit by digit from the left; the result is `<` or `>`; the two must differ."""
    width = max(len(str(left)), len(str(right)))
    one, two = str(left).zfill(width), str(right).zfill(width)
    lines = [f"Line up: {one} and {two}"]
    sign = "="
    for mine, theirs in zip(one, two, strict=True):
        sign = "=" if mine == theirs else "<" if mine < theirs else ">"
        lines.append(f"{mine} {sign} {theirs}")
        if sign != "=":
            break
    lines.append(f"So {left} {sign} {right}")
    return Worked(lines, sign, (canonical("compare", left, right),))


# ------------------------------------------------------------------------------- problems


def _number(rng: random.Random, low: int, high: int) -> int:
    """A number of `low` to `high` digits, each count of digits equally likely."""
    width = rng.randint(low, high)
    return rng.randrange(10 ** (width - 1), 10**width)


def _problem(
    kind: str, form: str, prompt: str, worked: Worked, answer: str | None = None
) -> Problem:
    answer = worked.result if answer is None else answer
    text = "\n".join(worked.lines) + f"\nAnswer: {answer}\n"
    return Problem(kind, form, prompt + "\n", text, answer)


def _sum(rng: random.Random) -> Problem:
    many = rng.random() < 0.25
    numbers = [_number(rng, 2, 5 if many else 6) for _ in range(rng.randint(3, 4) if many else 2)]
    plus = " + ".join(map(str, numbers))
    listed = ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
    prompt = rng.choice(
        [f"What is {plus}?", f"Compute {plus}.", f"Add {listed}.", f"Find the sum of {listed}."]
    )
    return _problem("sum", canonical("sum", *numbers), prompt, add(numbers))


def _difference(rng: random.Random) -> Problem:
    left, right = _number(rng, 2, 6), _number(rng, 2, 6)
    if left < right and rng.random() < 0.8:
        left, right = right, left
    prompt = rng.choice(
        [
            f"What is {left} - {right}?",
            f"Compute {left} - {right}.",
            f"Subtract {right} from {left}.",
            f"Find the difference {left} - {right}.",
        ]
    )
    form = canonical("difference", left, right)
    return _problem("difference", form, prompt, subtract(left, right))


_PRODUCT_SHAPES = ((2, 1), (3, 1), (2, 2), (3, 2), (3, 2), (4, 2), (3, 3))


def _product(rng: random.Random) -> Problem:
    shape = rng.choice(_PRODUCT_SHAPES)
    left, right = (_number(rng, width, width) for width in shape)
    prompt = rng.choice(
        [
            f"What is {left} * {right}?",
            f"Compute {left} * {right}.",
            f"Multiply {left} by {right}.",
            f"Find the product of {left} and {right}.",
        ]
    )
    return _problem("product", canonical("product", left, right), prompt, multiply(left, right))


def _division(rng: random.Random) -> Problem:
    left, right = _number(rng, 2, 5), rng.randint(2, 9)
    prompt = rng.choice(
        [
            f"What is {left} / {right} with remainder?",
            f"Divide {left} by {right} with remainder.",
            f"Find the quotient and remainder of {left} / {right}.",
        ]
    )
    return _problem("division", canonical("division", left, right), prompt, divide(left, right))


def _compare(rng: random.Random) -> Problem:
    left, right = _number(rng, 2, 6), _number(rng, 2, 6)
    if rng.random() < 0.7:  # a shared beginning, so that the first digits do not decide
        one, keep = str(left), rng.randint(1, len(str(left)) - 1)
        right = int(one[:keep] + str(rng.randrange(10 ** (len(one) - keep))).zfill(len(one) - keep))
    if left == right:
        right += 1
    worked, form = compare(left, right), canonical("compare", left, right)
    asked = rng.randrange(4)
    if asked == 0:
        answer = str(max(left, right))
        return _problem("compare", form, f"Which is larger, {left} or {right}?", worked, answer)
    if asked == 1:
        answer = str(min(left, right))
        return _problem("compare", form, f"Which is smaller, {left} or {right}?", worked, answer)
    sign = "<" if asked == 2 else ">"
    answer = "yes" if worked.result == sign else "no"
    return _problem("compare", form, f"Is {left} {sign} {right}?", worked, answer)


# ------------------------------------------------------------------------------- word problems

_NAMES = ("Ada", "Ben", "Chloe", "Dan", "Eva", "Finn", "Grace", "Hugo", "Iris", "Jack", "Kira")
_ITEMS = ("apples", "books", "cards", "coins", "marbles", "nails", "pencils", "shells", "stamps")
_HOLDERS = ("bags", "boxes", "crates", "jars", "trays")


class _Story(NamedTuple):
    """The words of one word problem."""

    name: str
    other: str
    items: str
    holders: str


def _chain(*steps: tuple[str, Worked]) -> Worked:
    """Several worked parts after one another, each under its title; the last one's result."""
    lines = [line for title, worked in steps for line in (title, *worked.lines)]
    parts = tuple(part for _, worked in steps for part in worked.parts)
    return Worked(lines, steps[-1][1].result, parts)


def _gain(rng: random.Random, words: _Story) -> tuple[str, Worked]:
    have, more = _number(rng, 2, 5), _number(rng, 2, 5)
    story = (
        f"{words.name} has {have} {words.items} and gets {more} more from {words.other}. "
        f"How many {words.items} does {words.name} have now?"
    )
    return story, _chain((f"Add: {have} + {more}", add([have, more])))


def _loss(rng: random.Random, words: _Story) -> tuple[str, Worked]:
    low, high = sorted((_number(rng, 2, 5), _number(rng, 2, 5)))
    story = (
        f"{words.name} had {high} {words.items} and gave {low} of them to {words.other}. "
        f"How many {words.items} are left?"
    )
    return story, _chain((f"Subtract: {high} - {low}", subtract(high, low)))


def _packed(rng: random.Random, words: _Story) -> tuple[str, Worked]:
    each, count, extra = _number(rng, 2, 3), _number(rng, 1, 2), _number(rng, 2, 4)
    story = (
        f"{words.name} packs {count} {words.holders} with {each} {words.items} each "
        f"and has {extra} {words.items} left over. How many {words.items} are there in all?"
    )
    first = multiply(each, count)
    product = int(first.result)
    second = add([product, extra])
    return story, _chain(
        (f"Multiply: {each} * {count}", first), (f"Add: {product} + {extra}", second)
    )


def _sold(rng: random.Random, words: _Story) -> tuple[str, Worked]:
    each, count = _number(rng, 2, 3), _number(rng, 1, 2)
    product = each * count
    sold = rng.randint(1, product - 1)
    story = (
        f"A shop has {count} {words.holders} of {each} {words.items} and sells {sold} "
        f"{words.items} to {words.name}. How many {words.items} does the shop still have?"
    )
    return story, _chain(
        (f"Multiply: {each} * {count}", multiply(each, count)),
        (f"Subtract: {product} - {sold}", subtract(product, sold)),
    )


def _shared(rng: random.Random, words: _Story) -> tuple[str, Worked]:
    total, people = _number(rng, 2, 4), rng.randint(2, 9)
    story = (
        f"{words.name} shares {total} {words.items} equally among {people} friends. "
        f"How many {words.items} does each friend get, and how many remain?"
    )
    return story, _chain((f"Divide: {total} / {people}", divide(total, people)))


_STORIES = (_gain, _loss, _packed, _sold, _shared)


def _word(rng: random.Random) -> Problem:
    name, other = rng.sample(_NAMES, 2)
    words = _Story(name, other, rng.choice(_ITEMS), rng.choice(_HOLDERS))
    story, worked = rng.choice(_STORIES)(rng, words)
    return _problem("word", "word:" + ";".join(worked.parts), story, worked)


_KINDS: dict[str, tuple[Callable[[random.Random], Problem], float]] = {
    "sum": (_sum, 0.28),
    "difference": (_difference, 0.14),
    "product": (_product, 0.26),
    "compare": (_compare, 0.10),
    "division": (_division, 0.08),
    "word": (_word, 0.14),
}
KINDS = tuple(_KINDS)


def _split_of(problem: Problem) -> Split | None:
    """The split; None for a word problem to be trained on with a held-out problem as a part."""
    if is_held_out(problem.canonical):
        return "held_out"
    if problem.kind == "word":
        parts = problem.canonical.removeprefix("word:").split(";")
        if any(is_held_out(part) for part in parts):
            return None
    return "train"


def generate(
    seed: int, count: int, split: Split = "train", kinds: Sequence[str] | None = None
) -> Iterator[Problem]:
    """`count` problems of `split`, the same for the same arguments; held-out ones never repeat.

    `kinds` restricts the kinds of problem (see `KINDS`). Training problems may repeat, small ones
    do. Do not ask for more distinct held-out problems than a kind has.
    """
    chosen = KINDS if kinds is None else tuple(kinds)
    weights = [_KINDS[kind][1] for kind in chosen]
    rng = random.Random(f"{seed}/{split}/{','.join(chosen)}")
    seen: set[str] = set()
    made = 0
    while made < count:
        problem = _KINDS[rng.choices(chosen, weights)[0]][0](rng)
        if _split_of(problem) != split or problem.canonical in seen:
            continue
        if split == "held_out":
            seen.add(problem.canonical)
        made += 1
        yield problem


# ------------------------------------------------------------------------------- checking

_ANSWER = re.compile(r"^(?:Answer:[ \t]*|Final Answer:[ \t]*\n)(.+?)[ \t]*$", re.MULTILINE)


def final_answer(completion: str) -> str | None:
    """What the first answer line says (`Answer: x`, or `Final Answer:` and x below), or None."""
    found = _ANSWER.search(completion)
    return found.group(1) if found else None


def check(sample: Problem, completion: str) -> bool:
    """Whether `completion` (a worked solution without the prompt) ends in the right answer."""
    return final_answer(completion) == sample.answer


# ------------------------------------------------------------------------------- command line


def _lines(job: tuple[int, int], split: Split) -> str:
    """The JSON lines of `count` problems of one seed."""
    seed, count = job
    rows = (asdict(problem) for problem in generate(seed, count, split))
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, seed: int, count: int, split: Split = "train", workers: int = 1) -> None:
    """Write `count` problems as JSON lines; the file does not depend on `workers`."""
    size = 5000
    jobs = [
        (seed * 1_000_000 + index, min(size, count - start))
        for index, start in enumerate(range(0, count, size))
    ]
    if split == "held_out":  # one stream, so that no problem repeats
        jobs = [(seed, count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream, multiprocessing.Pool(workers) as pool:
        for chunk in pool.imap(partial(_lines, split=split), jobs):
            stream.write(chunk)


def main() -> None:
    """Write problems to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--split", choices=("train", "held_out"), default="train")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write(options.out, options.seed, options.count, options.split, options.workers)


if __name__ == "__main__":
    main()
