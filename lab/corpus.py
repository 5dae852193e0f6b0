"""The text: Python, worked arithmetic, word problems, prose; train and held-out splits, and prompts.

Splits are decided by a hash of the content, so they are the same everywhere. A training document that
shares too much with a held-out one of its domain is dropped, by the 13-word spans of the bundled
recipe (`recipes/bundled/corpus.py`); generated problems are held out by their canonical form instead.
"""

import itertools
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import arithmetic
import corpus as bundled
from records import Row, characters, read_rows, write_rows

from tidar.errors import TidarError

PASSAGE = 2000
"""Characters of a passage of prose, about."""

CALCULATIONS = tuple(kind for kind in arithmetic.KINDS if kind != "word")


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Where text comes from.

    shared: a folder with `python_code/`, `stepmath/`, `gsm8k/`, `folktales/` as `lab/README.md`
    describes them; None does without. packages: folders of installed packages. prose: text files,
    or folders of them.
    """

    shared: Path | None = None
    packages: tuple[Path, ...] = ()
    prose: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much: files of packages, generated problems for training, held-out ones and prompts a domain."""

    package_files: int = 25_000
    calculations: int = 400_000
    stories: int = 60_000
    held_out: int = 400
    prompts: int = 64


def divide(texts: Iterable[str]) -> tuple[list[Row], list[Row]]:
    """Training and held-out documents: split by hash, and none of the first is near one of the second."""
    digests = {bundled.content_digest(text): text for text in texts}
    ordered = [digests[digest] for digest in sorted(digests)]
    held_out = [text for text in ordered if bundled.is_held_out(bundled.content_digest(text))]
    pool = bundled.make_pool([bundled.shingles(text) for text in held_out], [])
    kept = [
        text
        for text in ordered
        if not bundled.is_held_out(bundled.content_digest(text))
        and not bundled.resembles(bundled.shingles(text), pool)
    ]
    return [{"text": text} for text in kept], [{"text": text} for text in held_out]


def passages(text: str) -> Iterator[str]:
    """A book in passages of about `PASSAGE` characters, cut between paragraphs."""
    gathered: list[str] = []
    size = 0
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        gathered.append(paragraph)
        size += len(paragraph)
        if size >= PASSAGE:
            yield "\n\n".join(gathered).strip() + "\n"
            gathered, size = [], 0
    if size > PASSAGE // 4:
        yield "\n\n".join(gathered).strip() + "\n"


def python_rows(texts: Texts, sizes: Sizes) -> Iterator[Row]:
    """Candidates: rows of the shared repositories, then files of permissive packages."""
    if texts.shared is not None:
        yield from read_rows(texts.shared / "python_code" / "python_permissive.jsonl.xz")
    found = bundled.package_sources(texts.packages, frozenset(), tests=False)
    files = (source for source in found if isinstance(source, bundled.Source))
    with multiprocessing.Pool(workers()) as processes:
        chosen = itertools.islice(files, sizes.package_files)
        rows = processes.imap(package_row, chosen, chunksize=16)
        yield from (row for row in rows if row is not None)


def workers() -> int:
    """Processes that share the work: as many as this one may use cores, where the system tells."""
    tells = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if tells else os.cpu_count() or 1


def package_row(source: bundled.Source) -> Row | None:
    """The row of a package's file; None for one that is no Python in UTF-8."""
    text = Path(source.path).read_bytes().decode("utf-8", errors="replace")
    if "\ufffd" in text or not bundled.compiles(text):
        return None
    return {"repo": source.origin, "license": source.license, "path": source.path, "text": text}


def python(out: Path, texts: Texts, sizes: Sizes) -> tuple[list[Row], list[Row]]:
    """Python files, filtered and without near-duplicates as in the bundled recipe."""
    candidates = out / ".python_candidates.jsonl"
    write_rows(candidates, python_rows(texts, sizes))
    benchmark = texts.shared and texts.shared / "human_eval" / "HumanEval.jsonl.gz"
    built = bundled.build(candidates, human_eval=benchmark, workers=workers())
    candidates.unlink()
    return built.shared, built.held_out


def problems(kinds: Sequence[str], count: int, sizes: Sizes) -> tuple[list[Row], list[Row]]:
    """Generated problems of these kinds."""
    train = arithmetic.generate(1, count, "train", kinds)
    held_out = arithmetic.generate(1, sizes.held_out, "held_out", kinds)
    return [asdict(problem) for problem in train], [asdict(problem) for problem in held_out]


def calculations(texts: Texts, sizes: Sizes) -> tuple[list[Row], list[Row]]:
    """Sums, products and the like, written out; the shared expressions with them."""
    train, held_out = problems(CALCULATIONS, sizes.calculations, sizes)
    if texts.shared is not None:
        path = texts.shared / "stepmath" / "step_by_step_math.jsonl.xz"
        more, _ = bundled.split_rows(path)
        train += more
    return train, held_out


def stories(texts: Texts, sizes: Sizes) -> tuple[list[Row], list[Row]]:
    """Word problems: the shared ones, and generated ones, which alone are prompts."""
    train, held_out = problems(("word",), sizes.stories, sizes)
    if texts.shared is None:
        return train, held_out
    shared: dict[str, list[Row]] = {"train": [], "test": []}
    for name, rows in shared.items():
        for row in read_rows(texts.shared / "gsm8k" / f"{name}.jsonl.gz"):
            worked, _, answer = row["answer"].partition("#### ")
            text = f"{worked.strip()}\nAnswer: {answer.strip()}\n"
            rows.append({"prompt": row["question"].strip() + "\n", "text": text})
    # First what people wrote: the first held-out documents are the ones that are scored.
    return [*shared["train"], *train], [*shared["test"], *held_out]


def prose(texts: Texts) -> tuple[list[Row], list[Row]]:
    """Passages of the shared books and of the files that were given; nothing without either."""
    books: list[str] = []
    if texts.shared is not None:
        rows = read_rows(texts.shared / "folktales" / "folktales_gutenberg.jsonl.xz")
        books += [row["text"] for row in rows]
    for path in texts.prose:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        books += [f.read_text("utf-8") for f in files if f.suffix in (".txt", ".md")]
    return divide(passage for book in books for passage in passages(book))


def beginning(text: str) -> tuple[str, str] | None:
    """A document cut at a line's end behind 500 characters, and the next 1000; None where it is too short."""
    cut = text.find("\n", 500) + 1
    return (text[:cut], text[cut : cut + 1000]) if cut and len(text) >= cut + 500 else None


def prompts(domain: str, held_out: Sequence[Row], count: int) -> list[Row]:
    """What is decoded: problems with their answers, or the beginnings of documents."""
    made: list[Row] = []
    for row in held_out:
        if len(made) == count:
            break
        number = f"{domain}-{len(made)}"
        if "answer" in row:
            made.append({"id": number, "prompt": row["prompt"], "continuation": row["text"],
                         "answer": row["answer"]})  # fmt: skip
        elif "prompt" not in row and (parts := beginning(row["text"])):
            made.append({"id": number, "prompt": parts[0], "continuation": parts[1]})
    return made


def build(out: Path, texts: Texts, sizes: Sizes) -> None:
    """Write `DOMAIN.jsonl`, `DOMAIN_held_out.jsonl`, `DOMAIN_prompts.jsonl` and `manifest.json`.

    A domain without text is left out. Raises TidarError where none is left.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = {
        "python": python(out, texts, sizes),
        "arithmetic": calculations(texts, sizes),
        "words": stories(texts, sizes),
        "prose": prose(texts),
    }
    table: dict[str, dict[str, int]] = {}
    for domain, (train, held_out) in found.items():
        asked = prompts(domain, held_out, sizes.prompts)
        if not (train and held_out and asked):
            print(f"{domain}: no text; left out")
            continue
        for name, rows in (("", train), ("_held_out", held_out), ("_prompts", asked)):
            write_rows(out / f"{domain}{name}.jsonl", rows)
        table[domain] = {
            "documents": len(train), "characters": characters(train), "held_out": len(held_out),
            "held_out_characters": characters(held_out), "prompts": len(asked),
        }  # fmt: skip
        print(f"{domain}: {table[domain]}")
    if not table:
        raise TidarError("no domain has text: give --shared, --prose, or a folder with packages.")
    (out / "manifest.json").write_text(json.dumps(table, indent=1) + "\n")


def domains(data: Path) -> list[str]:
    """The domains of a corpus folder. Raises TidarError where there is none."""
    manifest = data / "manifest.json"
    if not manifest.is_file():
        raise TidarError(f"{data} has no manifest.json: build the corpus first (stage corpus).")
    return list(json.loads(manifest.read_text()))
