"""Which installed files may be trained on: permissive distributions, and whose file is whose."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

PERMISSIVE_IDS = frozenset(
    {
        "0BSD",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "BSL-1.0",
        "CC0-1.0",
        "CNRI-Python",
        "HPND",
        "ISC",
        "MIT",
        "MIT-0",
        "MIT-CMU",
        "PSF-2.0",
        "Python-2.0",
        "Unlicense",
        "Zlib",
        "Apache-2.0_WITH_LLVM-exception",
    }
)
_CLASSIFIER = re.compile(
    r"^(MIT|BSD|Apache|Python Software Foundation|ISC|Historical Permission|Zero-Clause BSD|"
    r"The Unlicense|zlib)"
)
_FIELD = re.compile(
    r"^(the )?(mit|(new |modified |simplified )?bsd|([23]|two|three)-clause bsd|apache|psf|isc|"
    r"hpnd|0bsd|unlicense|python software foundation)\b",
    re.IGNORECASE,
)
_TEXTS = (
    ("MIT", "Permission is hereby granted, free of charge"),
    ("BSD", "Redistribution and use in source and binary forms"),
    ("ISC", "Permission to use, copy, modify, and/or distribute this software for any purpose"),
    ("Apache-2.0", "Apache License"),
)
_REFUSED = re.compile(
    r"\b(A|L)?GPL|General Public|\bMPL|Mozilla|propriet|nvidia|commercial", re.IGNORECASE
)


@dataclass(frozen=True)
class Package:
    """A permissively licensed distribution and its Python files."""

    name: str
    version: str
    license: str
    files: tuple[Path, ...]


def permissive_expression(expression: str) -> bool:
    """Whether an SPDX expression is permissive: every part joined by AND, one of those by OR."""
    flat = expression.strip().replace(" WITH ", "_WITH_")
    if "(" in flat and " OR " in flat:
        return False
    flat = flat.replace("(", " ").replace(")", " ")
    return all(
        any(choice.strip() in PERMISSIVE_IDS for choice in part.split(" OR "))
        for part in flat.split(" AND ")
    )


def _field(package: Distribution, name: str) -> str:
    """A field of the metadata; empty if it is not there."""
    metadata = package.metadata
    return str(metadata[name]).strip() if name in metadata else ""


def permissive_license(package: Distribution) -> str | None:
    """The licence as the metadata states it, if permissive; None for any other or unknown one."""
    expression = _field(package, "License-Expression")
    if expression:
        return expression if permissive_expression(expression) else None
    classifiers = [
        line.split(" :: ")[-1]
        for line in package.metadata.get_all("Classifier") or []
        if line.startswith("License ::") and line != "License :: OSI Approved"
    ]
    if classifiers:
        return " AND ".join(classifiers) if all(map(_CLASSIFIER.match, classifiers)) else None
    field = _field(package, "License")
    if len(field) <= 100:
        good = _FIELD.match(field) and not _REFUSED.search(field)
        return field if good else None
    start = " ".join(field[:2000].split())
    if _REFUSED.search(start):
        return None
    return next((name for name, text in _TEXTS if text in start), None)


def permissive_packages(folder: Path, only: frozenset[str] = frozenset()) -> Iterator[Package]:
    """The permissive distributions installed in `folder`, by name, with the files they own.

    A file belongs to the distribution whose RECORD lists it; a file in no RECORD is not used.
    `only` restricts to distributions of these (lower-case) names.
    """
    found = sorted(
        (_field(package, "Name"), package.version, index, package)
        for index, package in enumerate(distributions(path=[str(folder)]))
    )
    for name, version, _, package in found:
        license_name = permissive_license(package)
        if not license_name or (only and name.lower() not in only):
            continue
        files = sorted(
            Path(str(package.locate_file(entry)))
            for entry in package.files or []
            if entry.suffix == ".py"
        )
        yield Package(name, version, license_name, tuple(files))
