"""The laboratory's ablations: what varies, what is measured, and some of all of it, tiny, on the CPU."""

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ROOT

sys.path.append(str(ROOT))  # `lab` is run from the root of the repository

from lab import ablation_measure, ablation_tables, ablations, run
from lab.ablation_plan import DOMAINS, TIDAR, VARIANT, VARIANTS, Ablation, Case, trained
from lab.ablation_plan import ablations as planned
from lab.plan import COMMON, FULL, OWN_STEPS, SMOKE, STAGES
from records import read_rows

from tidar.attention import dense_attend
from tidar.bench.record import read_record
from tidar.decode.spec import parse_method
from tidar.layout import clean_rows, dense, span_rows
from tidar.methods.tidar import Tidar
from tidar.tokens import Tokenizer
from tidar.training.config import TrainConfig
from tidar.weights import load_checkpoint

SOME = ("strategies", "labels", "tokens", "two-forward")
VOCABULARY = math.log(SMOKE.arch["vocab_size"])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("ablations") / "out"
    assert ablations.main(["--smoke", "--out", str(folder), *SOME]) == 0
    yield folder
    ablation_measure._open.cache_clear()


def record(out: Path, name: str) -> dict[str, Any]:
    return read_record(out / "ablations" / "records" / f"{name}.json")


# --- the plan ---


def test_variants_differ_in_one_thing() -> None:
    known = planned(FULL)
    used = {variant for each in known.values() for variant in each.variants}
    assert used == set(VARIANTS)
    mix = VARIANT["draft_lens"], VARIANT["max_steps"]
    assert mix == (STAGES["tidar"].values["draft_lens"], 300)
    for name, changes in VARIANTS.items():
        told = set(changes) - {"teacher"}
        assert len(told) == {"mix": 0}.get(name, 1) or told == {"draft_lens", "masking"}, name
        values = {**COMMON, **VARIANT, **changes, "base": "b", "data": "d", "out": "o"}
        config = TrainConfig.from_mapping(values)
        assert config.arguments["max_steps"] * COMMON["seq_len"] * 128 == 39_321_600
        for key, value in changes.items():
            assert getattr(config, key) == value


def test_every_case_can_be_told_apart_and_run() -> None:
    models = {trained(name) for name in VARIANTS} | {TIDAR}
    models |= {f"tidar/model-{step}" for step in FULL.kept_steps}
    for name, each in planned(FULL).items():
        assert {case.model for case in each.cases} <= models
        assert len({tuple(case.labels.values()) for case in each.cases}) == len(each.cases)
        assert len({frozenset(case.labels) for case in each.cases}) == 1
        for case in each.cases:
            assert parse_method(case.method).name == case.method, name
    tokens = [case.labels["clean tokens, M"] for case in planned(FULL)["tokens"].cases[:5]]
    assert tokens == [step * 0.131072 for step in (75, 150, 300, 600, OWN_STEPS)]
    used = {(c.labels["trained"], c.labels["K"]) for c in planned(FULL)["draft-lens"].cases}
    assert used == {(t, k) for t in ("4", "8", "16", "32", "4, 8, 16") for k in (4, 8, 16, 32)}


def test_variants_are_trained_once_and_before_they_are_measured(tmp_path: Path) -> None:
    parts = ablations.parts_of(["two-forward", "labels", "spans", "anchors"], planned(FULL))
    *others, last = parts
    assert others == ["train-mix", "train-grid", "train-soft", "anchors", "labels", "spans"]
    assert (last, parts[last]) == ("two-forward", set(others)), "nothing runs beside what is timed"
    assert parts["anchors"] == {"train-grid", "train-mix"}
    assert parts["spans"] == parts["train-mix"] == frozenset()
    jobs = ablations.part_jobs(parts, tmp_path, smoke=False)
    assert [job.after or job.behind for job in jobs] == list(parts.values())
    assert [job.name for job in jobs if job.light] == ["anchors", "labels", "spans"]
    assert not jobs[-1].after, "what is timed runs even if another part failed"
    assert jobs[0].command[1:] == (
        "-m",
        "lab.ablations",
        "--part",
        f"--out={tmp_path}",
        "train-mix",
    )


# --- tiny runs ---


def test_variants_are_trained_as_planned(out: Path) -> None:
    trained_here = {path.parent.parent.name for path in out.glob("ablations/*/model/config.json")}
    assert trained_here == {"mix", "soft"}
    mix, soft = (load_checkpoint(out / trained(name)) for name in ("mix", "soft"))
    assert mix.meta is not None
    assert mix.meta.draft_lens == (4, 8, 16)
    assert not torch.equal(mix.model.embed.weight, soft.model.embed.weight)
    settings = [
        TrainConfig.from_mapping({**COMMON, **VARIANT, "base": "b", "data": "d", "out": "o"})
    ]
    settings.append(ablations.variant_config("soft", out, SMOKE))
    assert [each.soft_labels for each in settings] == [0.0, 0.5]
    assert settings[1].base == str(out / "base" / "model")
    # The stage tidar keeps its models where the ablation looks for them.
    steps = [path.name for path in sorted((out / "tidar").glob("model*"))]
    assert steps == ["model", "model-1", "model-2"]


def test_records_hold_every_case(out: Path) -> None:
    for name in SOME[:3]:
        told, plan = record(out, name), planned(SMOKE)[name]
        assert told["question"] == plan.question
        digests = [each["weights_sha256"] for each in told["models"].values()]
        assert len({*digests}) == len(digests) == len({case["model"] for case in told["cases"]})
        assert told["command"][1:] == ["-m", "lab.ablations", "--out", "OUT", "--smoke", name]
        assert [case["labels"] for case in told["cases"]] == [dict(c.labels) for c in plan.cases]
        for case, asked in zip(told["cases"], plan.cases, strict=True):
            spec = parse_method(case["method"])
            assert spec.schedule is not None
            for domain in ("python", "arithmetic"):
                forced, free = (case["domains"][domain][which] for which in ("forced", "free"))
                assert (forced is not None) == spec.is_exact
                assert (free is not None) == asked.writes
                for figures in filter(None, (forced, free)):
                    assert 1 <= figures["tokens_per_forward"] <= spec.schedule.draft_len
                if free is not None:
                    assert (free["exact_match"] is None) == (domain == "python")
                    assert (free["valid_python"] is None) == (domain == "arithmetic")
        assert set(told["losses"]) == {case["model"] for case in told["cases"]}
        for each in told["losses"].values():
            for losses in each.values():
                assert list(losses["mask_loss"]) == ["4", "8", "16"]
                # Three steps from random weights: about the vocabulary's logarithm a token still.
                assert all(0.8 < loss / VOCABULARY < 1.2 for loss in losses["mask_loss"].values())


def test_strategies_settle_as_many_as_they_say(out: Path) -> None:
    told = {c["labels"]["strategy"]: c["domains"] for c in record(out, "strategies")["cases"]}
    for order in ("most confident", "left to right"):
        for count in (1, 2):
            for domain in told[f"{order}, {count} a pass"].values():
                assert domain["free"]["tokens_per_forward"] == pytest.approx(count, rel=0.15)
    passes = [told[f"confidence > {t}"]["python"]["free"]["decode_steps"] for t in (0.9, 0.6)]
    assert passes[0] >= passes[1]


def test_speeds_are_told_by_batch(out: Path) -> None:
    told = record(out, "two-forward")
    for case in told["cases"]:
        for batches in case["domains"].values():
            assert list(batches) == ["1", "4", "16"]
            assert all(each["tokens_per_second"]["median"] > 0 for each in batches.values())
    assert told["settings"]["engine"] == "plain"
    base = told["cases"][0]
    assert ablation_tables.over_ar(told, base, "python", 4) == 1.0


@pytest.mark.parametrize("name", SOME)
def test_tables_and_figures_are_of_the_records_alone(name: str, out: Path, tmp_path: Path) -> None:
    told = record(out, name)
    assert ablation_tables.main([str(out / "ablations" / "records"), str(tmp_path)]) == 0
    text = (tmp_path / "ablations.md").read_text()
    assert f"](ablation_{name}.png)" in text
    assert f"python -m lab.ablations --out runs/lab {name}\n" in text
    assert told["question"] in text
    shown = ablation_tables.tables(told)
    for each in shown:
        assert f"{each.caption}:\n" in text
        assert all(f"| {' | '.join(row)} |" in text for row in (each.head, *each.rows))
    assert (tmp_path / f"ablation_{name}.png").stat().st_size > 10_000


def invented(name: str, ablation: Ablation) -> dict[str, Any]:
    """A record of the full size whose numbers are all different."""
    numbers = itertools.count(1)

    def texts(case: Case) -> dict[str, Any]:
        figures = {"tokens_per_forward": next(numbers) / 8, "rows_per_step": next(numbers)}
        is_exact = parse_method(case.method).is_exact and case.beta == 1.0
        share = {"valid_python": 0.5, "exact_match": None}
        return {
            "forced": figures if is_exact else None,
            "free": {**figures, **share, "tokens_per_forward": next(numbers) / 8}
            if case.writes
            else None,
        }

    def loss() -> dict[str, Any]:
        return {"bits_per_byte": next(numbers) / 8, "mask_loss": {"4": 1.0, "8": 2.0, "16": 3.0}}

    return {
        "ablation": name, "question": ablation.question,
        "settings": {"engine": "plain", "held_out": 200},
        "prompts": {domain: {"count": 64} for domain in DOMAINS},
        "cases": [
            {"labels": dict(c.labels), "model": c.model, "method": c.method, "domains": {d: texts(c) for d in DOMAINS}}
            for c in ablation.cases
        ],
        "losses": {case.model: {domain: loss() for domain in DOMAINS} for case in ablation.cases},
    }  # fmt: skip


BY_LEN = ("draft-lens", "anchors", "labels", "tokens")
"""Ablations whose models are used at several K: a row for each model."""


@pytest.mark.parametrize("name", [n for n, each in planned(FULL).items() if not each.batches])
def test_every_number_is_in_the_tables(name: str) -> None:
    told = invented(name, planned(FULL)[name])
    of_cases, *others = ablation_tables.tables(told)
    assert len(of_cases.rows) == len(told["losses"] if name in BY_LEN else told["cases"])
    cells = [part for row in of_cases.rows for cell in row for part in cell.split(" / ")]
    for case in told["cases"]:
        for texts in case["domains"].values():
            for which in filter(None, texts.values()):
                assert f"{which['tokens_per_forward']:.2f}" in cells
        row = of_cases.rows[0 if name in BY_LEN else told["cases"].index(case)]
        if name not in BY_LEN:
            shown = [
                format(v, ".3g") if isinstance(v, float) else str(v)
                for v in case["labels"].values()
            ]
            assert list(row[: len(shown)]) == shown
    assert len(others) == (len(told["losses"]) > 1)
    for table in others:
        assert len(table.rows) == len(told["losses"])
        bits = [
            each["bits_per_byte"]
            for each in (losses["python"] for losses in told["losses"].values())
        ]
        at = table.head.index("python: bits per byte")
        assert [row[at] for row in table.rows] == [f"{value:.3f}" for value in bits]


def test_a_row_for_each_model_names_the_spans() -> None:
    """K = 32 has six spans, and the text is that of K = 16."""
    told = invented("draft-lens", planned(FULL)["draft-lens"])
    of_cases, _ = ablation_tables.tables(told)
    assert "python: real text, K = 4 / 8 / 16 / 32 {1,2,4,8,16,32}" in of_cases.head
    row = dict(zip(of_cases.head, of_cases.rows[1], strict=True))
    cases = [case for case in told["cases"] if case["labels"]["trained"] == "8"]
    assert row["trained"] == "8"
    figures = [case["domains"]["python"]["forced"]["tokens_per_forward"] for case in cases]
    assert row[of_cases.head[1]] == " / ".join(f"{value:.2f}" for value in figures)
    written = cases[2]["domains"]["python"]["free"]["tokens_per_forward"]
    assert row["python: own text, K = 16"] == f"{written:.2f}"


def test_given_again_it_finds_everything_there(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "train", None)
    monkeypatch.setattr(ablations, "ablation_record", None)
    assert ablations.main(["--smoke", "--out", str(out), *SOME]) == 0


def test_several_gpus_measure_the_same(out: Path) -> None:
    """A process of its own, as `--gpus 2` starts it, against the same ablation in this one."""
    assert ablations.main(["--smoke", "--out", str(out), "--gpus", "2", "spans"]) == 0
    told = record(out, "spans")
    here = ablation_measure.ablation_record("spans", planned(SMOKE)["spans"], out, SMOKE)
    assert told["cases"] == here["cases"]
    assert told["losses"] == here["losses"]
    assert "wrote" in (out / "ablations" / "spans.log").read_text()


# --- what is measured ---


def test_held_out_losses_are_what_the_model_says(out: Path) -> None:
    """Clean rows by a plain causal pass; mask rows span by span, each with the tokens before it."""
    checkpoint = load_checkpoint(out / "tidar" / "model")
    tokenizer, net = Tokenizer.load(checkpoint.folder), checkpoint.model
    assert net.config.mask_token_id is not None
    scale = replace(SMOKE, held_out=2)
    told = ablation_measure.held_out_losses(checkpoint, out, "arithmetic", scale)
    rows = list(read_rows(out / "data" / "arithmetic_held_out.jsonl"))[:2]
    clean = size = 0.0
    masks, labels = 0.0, 0
    for row in rows:
        text = row["prompt"] + row["text"]
        ids = [*tokenizer.encode(text), min(tokenizer.eos_ids)][: net.config.max_positions]
        size += len(tokenizer.decode(ids[1:]).encode())
        clean -= _log_probs(net, ids[:-1], clean_rows(len(ids) - 1), range(len(ids) - 1), ids[1:])
        for anchor in range(0, len(ids), 8):
            length = min(8, len(ids) - anchor)
            layout = clean_rows(anchor).join(span_rows(anchor, length, span=0))
            seen = [*ids[:anchor], *[net.config.mask_token_id] * length]
            places = range(
                anchor + (anchor == 0), anchor + length
            )  # nothing comes before the first token
            masks -= _log_probs(net, seen, layout, places, ids[places.start : places.stop])
            labels += len(places)
    assert told["bits_per_byte"] == pytest.approx(clean / math.log(2) / size, rel=1e-5)
    assert told["bytes"] == size
    assert told["mask_loss"]["8"] == pytest.approx(masks / labels, rel=1e-5)
    assert told["mask_loss"]["4"] != told["mask_loss"]["8"]


def test_bits_are_those_of_the_laboratory(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One part of its measurements, taken alone, says the same of the same weights."""
    assert run.main(["--smoke", "--out", str(out), "bits-tidar", "measure-ar"]) == 0
    assert "ar_t0.7: a checkpoint is missing; left out" in capsys.readouterr().out
    told = read_record(out / "records" / "bits_tidar.json")["bits_per_byte"]
    for domain, losses in record(out, "tokens")["losses"][TIDAR].items():
        assert losses["bits_per_byte"] == pytest.approx(told[domain]["value"], rel=1e-5)
        assert losses["bytes"] == told[domain]["bytes"]


@torch.no_grad()
def _log_probs(net: Any, ids: list[int], layout: Any, places: range, tokens: list[int]) -> float:
    """Summed log probabilities of `tokens` at the rows `places`."""
    hidden = net(
        torch.tensor([ids]), layout.position.unsqueeze(0), dense_attend(dense(layout, layout))
    )
    scores = net.logits(hidden[0, list(places)]).log_softmax(-1)
    return float(scores.gather(1, torch.tensor(tokens).unsqueeze(1)).sum())


def test_beta_is_the_cases_own(out: Path) -> None:
    checkpoint = load_checkpoint(out / "tidar" / "model")
    spec = parse_method("tidar:16:dense")
    case = replace(planned(SMOKE)["weights"].cases[1], model=TIDAR)
    assert case.beta == 0.25
    engine = ablation_measure.make_engine(checkpoint, case, spec, 2)
    assert isinstance(engine.method, Tidar)
    assert engine.method.beta == 0.25
    told = ablation_measure.case_figures(case, out, "arithmetic", SMOKE)
    assert told["forced"] is None, "real text would hide what beta does"
    assert told["free"]["tokens_per_forward"] >= 1


def test_what_cannot_be_run_is_refused(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablations.main(["--out", str(tmp_path), "alphas"]) == 2
    assert ablations.main(["--out", str(tmp_path), "all"]) == 2
    assert ablations.main(["--smoke", "--out", str(out), "--gpus", "0", "spans"]) == 2
    assert ablations.main(["--smoke", "--part", "--out", str(out), "anchors"]) == 2
    (tmp_path / "note.json").write_text('{"format_version": 1}')
    assert ablation_tables.main([str(tmp_path), str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "ablation 'alphas' is not known; allowed: all, masking, strategies" in told
    assert (
        "no checkpoint of base and tidar, which ablations start from: run python -m lab.run" in told
    )
    assert "--gpus is 0" in told
    assert "ablation anchors needs the checkpoint" in told
    assert "has no records of ablations" in told
