"""Pages made of records: sections with a table, pictures, the command that repeats them and where they were taken."""

import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidar.bench.record import read_record

Record = Mapping[str, Any]


class Shelf:
    """Records by the names of their files without suffix, from folders; what is not there is None."""

    def __init__(self, *folders: Path) -> None:
        self._folders = folders
        self._read: dict[str, dict[str, Any] | None] = {}

    def path(self, name: str) -> Path | None:
        """The file of a record, in the first folder that has it."""
        paths = (folder / f"{name}.json" for folder in self._folders)
        return next((path for path in paths if path.is_file()), None)

    def get(self, name: str) -> dict[str, Any] | None:
        """The record. Raises TidarError for a file that is none."""
        if name not in self._read:
            path = self.path(name)
            self._read[name] = read_record(path) if path else None
        return self._read[name]

    def present(self, names: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
        """Those of these records that are there, in this order."""
        return [(name, record) for name in names if (record := self.get(name)) is not None]


@dataclass(frozen=True, slots=True)
class Picture:
    """name: of the PNG. alt: what it shows, in words. draw: writes it."""

    name: str
    alt: str
    draw: Callable[[Path], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a page. key: names the file of its findings. records: what it was made of, by name."""

    key: str
    title: str
    body: str
    records: Sequence[str]
    commands: Sequence[str]
    pictures: Sequence[Picture] = field(default=())


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of GitHub's markdown; columns that are empty in every row are left out."""
    body = list(rows)
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] for row in body)]
    lines = [[row[i] for i in kept] for row in (head, ["---"] * len(head), *body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, form: str = ".2f") -> str:
    """A figure as text, nothing for None."""
    return "" if value is None else format(value, form)


def joined(*parts: str) -> str:
    """Figures that share a cell; nothing where none is known."""
    return " · ".join(part or "-" for part in parts) if any(parts) else ""


def reach(over: Mapping[str, float] | None) -> str:
    """A median with the least and the most."""
    return f"{over['median']:.2f} ({over['min']:.2f} to {over['max']:.2f})" if over else ""


def command_of(record: Record) -> str:
    """What took a record of `tidar bench`, without where it was written to."""
    words = iter(record["command"][1:])
    kept = ["tidar"]
    for word in words:
        if word == "--out":
            next(words)
        else:
            kept.append(word)
    return shlex.join(kept)


def origin(record: Record) -> str:
    """Commit, hardware, software and number format of a record."""
    where, git = record["environment"], record["environment"]["git"] or {}
    commit = f"commit {git['commit'][:7]}" if "commit" in git else "commit not known"
    changed = " with changes" if git.get("dirty") else ""
    cpu = f"{where['torch_threads']} threads of {where['cpu']} ({where['cpu_count']} CPUs)"
    parts = [commit + changed, where["gpu"] or cpu, f"torch {where['packages']['torch']}",
             record["settings"]["dtype"]]  # fmt: skip
    return ", ".join(parts)


def _origins(section: Section, shelf: Shelf, page: Path) -> Iterator[str]:
    """Lines of where a section's records were taken, those from one place together."""
    places: dict[str, list[str]] = {}
    for name, record in shelf.present(section.records):
        path = shelf.path(name)
        assert path is not None
        link = f"[{name}]({Path(os.path.relpath(path, page.parent)).as_posix()})"
        places.setdefault(origin(record), []).append(link)
    for place, links in places.items():
        yield f"Records: {', '.join(links)} ({place})."


def contents(sections: Sequence[Section]) -> str:
    """A list of links to the sections, as GitHub makes their anchors."""

    def anchor(title: str) -> str:
        return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")

    return "\n".join(f"- [{each.title}](#{anchor(each.title)})" for each in sections)


def render(
    sections: Sequence[Section], shelf: Shelf, page: Path, pictures: Path, findings: Path | None
) -> str:
    """The sections as markdown for a file `page`; pictures: their folder. findings: of texts KEY.md to include."""
    parts = []
    for section in sections:
        lines = [f"## {section.title}", section.body]
        for picture in section.pictures:
            target = Path(os.path.relpath(pictures / picture.name, page.parent)).as_posix()
            lines.append(f"![{picture.alt}]({target})")
        told = findings / f"{section.key}.md" if findings else None
        if told and told.is_file():
            lines.append(told.read_text(encoding="utf-8").strip())
        lines.append("\n".join(["```bash", *section.commands, "```"]))
        lines.append("  \n".join(_origins(section, shelf, page)))
        parts.append("\n\n".join(lines))
    return "\n\n".join(parts) + "\n"


def draw_all(sections: Sequence[Section], pictures: Path) -> None:
    """Writes the pictures of the sections. Raises TidarError without matplotlib."""
    for section in sections:
        for picture in section.pictures:
            pictures.mkdir(parents=True, exist_ok=True)
            picture.draw(pictures / picture.name)


def write_page(sections: Sequence[Section], shelf: Shelf, page: Path) -> None:
    """Writes a page without findings, and its pictures beside it. Raises TidarError without matplotlib."""
    page.write_text(render(sections, shelf, page, page.parent, None), encoding="utf-8")
    draw_all(sections, page.parent)
    print(f"wrote {page} and its pictures")
