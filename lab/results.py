"""The page of results, from records alone: nothing is run, and a section without records is not written.

    python -m lab.results [--page PAGE] [RECORDS ...]

RECORDS are folders; by default benchmarks/records, and lab/records with its ablations if they are there.
What is said about a section stands in lab/findings/KEY.md, written by hand; its numbers are in the tables beside it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lab import ROOT, ablation_tables, bundled_tables, table
from lab.command import exit_code
from lab.page import Section, Shelf, contents, draw_all, render
from tidar.errors import TidarError

FINDINGS: Final = ROOT / "lab" / "findings"
PAGE: Final = ROOT / "docs" / "results.md"

HEAD: Final = """# Results

Tables and figures are written by `python -m lab.results` from records alone, what is said about them by hand. Each
section has the command that repeats it, and says where its records were taken. Words:
[ARCHITECTURE](../ARCHITECTURE.md#words); how the laboratory works: [lab](../lab/README.md).
"""


def standard_folders() -> list[Path]:
    """The repository's folders of records that are there."""
    own = ROOT / "lab" / "records"
    folders = (ROOT / "benchmarks" / "records", own, own / "ablations")
    return [folder for folder in folders if folder.is_dir()]


def sections(shelf: Shelf) -> list[Section]:
    """All sections of the page whose records are there. Raises TidarError where none is."""
    made = [
        *table.sections(shelf), *ablation_tables.sections(shelf), *bundled_tables.sections(shelf),
    ]  # fmt: skip
    if not made:
        raise TidarError("these folders have no record that the page tells of.")
    return made


def text_of(folders: Sequence[Path], page: Path) -> str:
    """The text of a page at this place; pictures are in `images` beside it. Raises TidarError without records."""
    shelf = Shelf(*folders)
    made = sections(shelf)
    told = render(made, shelf, page, page.parent / "images", FINDINGS)
    return f"{HEAD}\n{contents(made)}\n\n{told}"


def write(folders: Sequence[Path], page: Path) -> None:
    """Write the page and its pictures. Raises TidarError without records or matplotlib."""
    text = text_of(folders, page)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    draw_all(sections(Shelf(*folders)), page.parent / "images")
    print(f"wrote {page} and its pictures")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", nargs="*", type=Path, metavar="RECORDS", help="folders")
    parser.add_argument("--page", type=Path, default=PAGE, help="what is written")
    options = parser.parse_args(arguments)
    folders: list[Path] = options.records or standard_folders()
    return exit_code(
        lambda: write([folder.resolve() for folder in folders], options.page.resolve())
    )


if __name__ == "__main__":
    sys.exit(main())
