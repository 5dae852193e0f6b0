"""The page of results is what its script makes of the records, and its commands are understood.

Commands of the README run (`test_docs.py`). Those here are the same with other values, most for a GPU: they
are parsed.
"""

import itertools
import json
import shlex
import sys
from pathlib import Path

import pytest
import typer.main
from models import ROOT

sys.path.append(str(ROOT))  # `lab` is run from the root of the repository

from lab import ablations, figures, page, results, run
from lab.ablation_plan import ablations as ablations_of
from lab.plan import FULL

from tidar.cli import app
from tidar.decode.spec import parse_methods

PAGE = ROOT / "docs" / "results.md"
ABLATIONS = ablations_of(FULL)


def test_page_is_what_the_records_say() -> None:
    made = results.text_of(results.standard_folders(), PAGE)
    assert PAGE.read_text(encoding="utf-8") == made, "rebuild it: python -m lab.results"
    for section in results.sections(page.Shelf(*results.standard_folders())):
        for picture in section.pictures:
            assert f"](images/{picture.name})" in made
            assert (PAGE.parent / "images" / picture.name).is_file()


def test_pictures_are_drawn(tmp_path: Path) -> None:
    sections = results.sections(page.Shelf(*results.standard_folders()))
    page.draw_all(sections, tmp_path)
    names = {picture.name for section in sections for picture in section.pictures}
    assert {"bundled_speed_python.png", "bundled_speed_arithmetic.png"} <= names
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())


def test_figures_of_the_page_are_in_the_records() -> None:
    text = PAGE.read_text(encoding="utf-8")
    record = json.loads((ROOT / "benchmarks/records/gpu_arithmetic_t0.json").read_text())
    told = record["methods"]["tidar:16:1,2,3,5,8,16"]
    over = told["speed_up"]["end_to_end"]
    cell = (
        f"{over['median']:.2f} ({over['min']:.2f} to {over['max']:.2f}) · "
        f"{told['tokens_per_forward']:.2f} · {told['tokens_per_second']['median']:,.0f}"
    )
    assert cell in text
    assert f"commit {record['environment']['git']['commit'][:7]}, NVIDIA H200" in text


def commands() -> list[str]:
    lines, inside = [], False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            inside = line == "```bash"
        elif inside:
            lines.append(line)
    return list(dict.fromkeys(lines))


def test_commands_are_understood() -> None:
    """The laboratory's commands and `tidar bench` take the options; prompts are there and methods have a meaning."""
    bench = typer.main.get_command(app).commands["bench"]  # type: ignore[attr-defined]
    seen = 0
    for line in commands():
        words = shlex.split(line)
        if words[:2] == ["python", "-m"]:
            known = {"lab.run": set(run.ORDER), "lab.ablations": set(ABLATIONS)}
            parser = {
                "lab.run": run.make_parser(),
                "lab.ablations": ablations.make_parser(ABLATIONS),
            }
            # Without stages the laboratory runs all of them.
            asked = vars(parser[words[2]].parse_args(words[3:]))
            assert set(asked.get("names", asked.get("stages"))) <= known[words[2]], line
            continue
        assert words[:2] == ["tidar", "bench"], line
        asked = bench.make_context("bench", words[2:]).params
        assert asked["out"] is None
        assert (ROOT / asked["prompts"]).is_file(), line
        assert parse_methods(asked["methods"])
        seen += 1
    assert seen >= 16


def test_findings_belong_to_sections() -> None:
    """A text whose key no section has would never be shown."""
    keys = {path.stem for path in results.FINDINGS.glob("*.md")}
    lab = {"quality", "likelihoods", "twin", "speed-t0", "speed-t1", "temperatures", "schedules"}
    bundled = {"bundled-acceptance", "bundled-gpu", "bundled-cpu", "bundled-rivals"}
    assert keys
    assert keys <= lab | bundled | {f"ablation-{name}" for name in ABLATIONS}
    text = PAGE.read_text(encoding="utf-8")
    for key in keys & bundled:
        assert (results.FINDINGS / f"{key}.md").read_text(encoding="utf-8").strip() in text


def test_contenders_saw_equally_many_clean_tokens() -> None:
    """By the logs of their trainings; the head of EAGLE learns on top of that, for a frozen model."""
    folder = ROOT / "lab/records/training"

    def clean_tokens(stage: str) -> float:
        return float(
            json.loads((folder / f"{stage}.jsonl").read_text().splitlines()[-1])["clean_tokens"]
        )

    behind_base = ("ar", "tidar", "tidar-again", "block-diffusion", "dream")
    seen = {stage: clean_tokens("base") + clean_tokens(stage) for stage in behind_base}
    seen |= {stage: clean_tokens(stage) for stage in ("llada", "draft")}
    assert {*seen.values()} == {2000 * 131_072}
    variants = {variant for ablation in ABLATIONS.values() for variant in ablation.variants}
    assert {clean_tokens(name) for name in variants} == {300 * 131_072}


def test_contents_lead_to_the_sections() -> None:
    made = results.sections(page.Shelf(*results.standard_folders()))
    text = PAGE.read_text(encoding="utf-8")
    for section in made:
        assert f"\n## {section.title}\n" in text
        assert text.count(f"- [{section.title}](#") == 1


def test_names_keep_apart() -> None:
    heights = figures.apart([0.0, 0.0, 0.0, 0.5, 0.98, 1.0])
    assert all(b - a >= figures.CLEAR - 1e-9 for a, b in itertools.pairwise(heights))
    assert heights[3] == 0.5
    assert (min(heights), max(heights)) == (0.0, 1.0)


def test_every_method_has_a_colour() -> None:
    from lab.contenders import CONTENDERS, PAGED, SCHEDULES

    for name in (*CONTENDERS, *PAGED, *SCHEDULES, "masked-diffusion:32:16", "block-diffusion:16:1"):
        assert figures.colour(name).startswith("#")
    assert figures.colour("tidar-8-paged") == figures.colour("tidar:16:dense")
    with pytest.raises(KeyError):
        figures.colour("unheard-of")


def test_what_is_no_record_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main([str(tmp_path), "--page", str(tmp_path / "page.md")]) == 2
    (tmp_path / "speed_t0.json").write_text("{}")
    assert results.main([str(tmp_path), "--page", str(tmp_path / "page.md")]) == 2
    told = capsys.readouterr().err
    assert "no record that the page tells of" in told
    assert "speed_t0.json is no record of format version" in told
    assert not (tmp_path / "page.md").exists()
