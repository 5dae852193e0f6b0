"""Local copies of test sets: where they lie, and their rows as the task files in `tasks/` want them."""

import gzip
import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidar.errors import TidarError

TASKS = Path(__file__).parent / "tasks"
"""One YAML file of lm-evaluation-harness a task."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """A local task. test, train: where its files lie in a data folder, without their ending. row: checks and
    converts a row of a file. needs: its fields, for messages."""

    row: Callable[[Row], Row]
    needs: str
    test: tuple[str, ...] = ()
    train: tuple[str, ...] = ()


def _gsm8k(row: Row) -> Row:
    return {"question": str(row["question"]), "answer": str(row["answer"])}


def _human_eval(row: Row) -> Row:
    return {key: str(row[key]) for key in ("task_id", "prompt", "entry_point", "test")}


def _stepmath(row: Row) -> Row:
    """The prompt ends with a line end, as in training; the answer is `answer`, or the last line of the text."""
    answer = row["answer"] if "answer" in row else str(row["text"]).strip().splitlines()[-1]
    return {"prompt": str(row["prompt"]).rstrip("\n") + "\n", "answer": str(answer).strip()}


def _choices(row: Row) -> Row:
    choices, answer = [str(choice) for choice in row["choices"]], row["answer"]
    right = answer if isinstance(answer, int) else choices.index(str(answer))
    if not 0 <= right < len(choices):
        raise ValueError(f"answer {answer} is none of {len(choices)} choices")
    return {"question": str(row["question"]), "choices": choices, "right": right}


def _text(row: Row) -> Row:
    text = row["text"] if "text" in row else row["prompt"] + row.get("continuation", "")
    if not text:
        raise ValueError("the text is empty")
    return {"text": str(text)}


KINDS: Mapping[str, Kind] = {
    "gsm8k_local": Kind(
        _gsm8k, "question, answer (the number behind ####)", ("gsm8k/test",), ("gsm8k/train",)
    ),
    "humaneval_local": Kind(
        _human_eval, "task_id, prompt, entry_point, test", ("human_eval/HumanEval", "HumanEval")
    ),
    "stepmath_local": Kind(
        _stepmath,
        "prompt, and answer or text",
        ("stepmath/step_by_step_math", "step_by_step_math"),
    ),
    "choices_local": Kind(_choices, "question, choices, answer (its place from 0, or its text)"),
    "text_local": Kind(_text, "text (or prompt and continuation)"),
}

_OPENERS: Mapping[str, Callable[..., Any]] = {
    ".jsonl": open,
    ".jsonl.gz": gzip.open,
    ".jsonl.xz": lzma.open,
}


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a local task; train: for examples in the prompt, None where there is no such file."""

    test: Path
    train: Path | None = None


def find_files(tasks: Sequence[str], places: Sequence[str]) -> dict[str, Files]:
    """Where the local ones among `tasks` find their rows. places: folders, or TASK=FILE.

    Raises TidarError for a task without a file, and for a place that no task uses or that is not there.
    """
    local = [task for task in tasks if task in KINDS]
    folders, named = [], {}
    for place in places:
        name, equals, file = place.partition("=")
        if equals and name in KINDS:
            if name not in local:
                raise TidarError(f"--data {place}: {name} is not among --tasks.")
            named[name] = Path(file)
        elif Path(place).is_dir():
            folders.append(Path(place))
        else:
            raise TidarError(
                f"--data {place} is neither a folder nor TASK=FILE with one of {', '.join(KINDS)}."
            )
    if places and not local:
        raise TidarError(f"--data is for local tasks ({', '.join(KINDS)}), and none was asked for.")
    return {task: _files(task, folders, named.get(task)) for task in local}


def _files(task: str, folders: Sequence[Path], named: Path | None) -> Files:
    kind = KINDS[task]
    if named is not None:
        if not named.is_file():
            raise TidarError(f"--data {task}={named}: there is no such file.")
        return Files(named, _first([named.parent], ["train"]) if kind.train else None)
    test = _first(folders, kind.test)
    if test is None:
        wanted = " or ".join(f"{stem}.jsonl[.gz|.xz]" for stem in kind.test)
        usual = f" (looked for {wanted})" if wanted and folders else ""
        raise TidarError(
            f"{task} needs a file of JSON lines with {kind.needs}{usual}: --data {task}=FILE"
            + (" or --data FOLDER." if kind.test else ".")
        )
    return Files(test, _first(folders, kind.train))


def _first(folders: Sequence[Path], stems: Sequence[str]) -> Path | None:
    """The first file there is."""
    paths = (
        folder / (stem + ending) for folder in folders for stem in stems for ending in _OPENERS
    )
    return next((path for path in paths if path.is_file()), None)


def read_rows(task: str, path: Path) -> list[Row]:
    """The rows of a file, checked. Raises TidarError, with the line, for what cannot be used."""
    ending = next((ending for ending in _OPENERS if path.name.endswith(ending)), ".jsonl")
    rows = []
    number = 0
    try:
        with _OPENERS[ending](path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):  # noqa: B007  # the messages below tell it
                if line.strip():
                    rows.append(KINDS[task].row(json.loads(line)))
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise TidarError(f"{path} cannot be read: {error}") from error
    except KeyError as error:
        raise TidarError(
            f"{path}, line {number}: no field {error}; {task} needs {KINDS[task].needs}."
        ) from error
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise TidarError(
            f"{path}, line {number}: {error}; {task} needs JSON lines with {KINDS[task].needs}."
        ) from error
    if not rows:
        raise TidarError(f"{path} has no rows.")
    return rows


def load(task: str, test: str, train: str | None = None, **_: object) -> dict[str, Any]:
    """The splits of a local task as data sets of `datasets`; named in the task files, called by the harness.

    Without a file to take examples from, that split is empty.
    """
    from datasets import Dataset

    examples = read_rows(task, Path(train)) if train is not None else []
    return {
        "test": Dataset.from_list(read_rows(task, Path(test))),
        "train": Dataset.from_list(examples),
    }
