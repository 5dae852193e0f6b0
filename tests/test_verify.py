"""`tidar verify`: passes on sound checkpoints, and fails, law by law, on broken ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from models import random_model, random_prompt
from typer.testing import CliRunner

from tidar.cache import KVCache
from tidar.cli.verify import verify
from tidar.hf_config import TidarMeta
from tidar.methods import Draft, Verdict
from tidar.methods.tidar import Tidar
from tidar.model import Transformer
from tidar.verify.laws import LAWS, run_laws
from tidar.verify.subject import Finding, Subject, make_subject
from tidar.weights import save_checkpoint

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(verify)


def folder_of(path: Path, family: str = "llama", *, converted: bool = True) -> Path:
    model = random_model(family)
    meta = TidarMeta(draft_lens=(4,), mask_token_id=model.config.mask_token_id)
    if converted:
        return save_checkpoint(path / "model", model, meta=meta)
    plain = Transformer(model.config)
    plain.load_state_dict(model.state_dict())
    plain.set_mask_token(None)
    return save_checkpoint(path / "model", plain)


def quick_subject(model: Transformer, **changes) -> Subject:
    prompts = [random_prompt(model, 9, 0), random_prompt(model, 6, 1)]
    return make_subject(model, prompts, draft_lens=(4,), quick=True, **changes)


def failed(findings: list[Finding]) -> set[str]:
    return {finding.law for finding in findings if finding.verdict == "fail"}


class GreedyAccepter(Tidar):
    """Accepts every draft token."""

    def resolve(self, step, hidden, project):
        verdicts = super().resolve(step, hidden, project)
        return [
            Verdict(p.length, Draft((verdict.draft.tokens[0],)))
            for p, verdict in zip(step.pending, verdicts, strict=True)
        ]


class CausalSpans(Tidar):
    """Mask rows that see only the span rows before them."""

    def step(self, pending, schedule):
        step = super().step(pending, schedule)
        return replace(step, visible=step.visible.tril())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sound_model_passes(family: str) -> None:
    findings = run_laws(quick_subject(random_model(family)))
    assert {f.verdict for f in findings if f.law != "8"} == {"pass"}
    assert all(finding.checked for finding in findings if finding.verdict == "pass")
    assert {"1", "2", "3", "5", "6", "7"} <= {finding.law for finding in findings}


def test_scripted_drafts_force_every_accept_count() -> None:
    findings = run_laws(quick_subject(random_model("llama")))
    scripted = next(f for f in findings if "force every accept count" in f.claim)
    assert scripted.checked.startswith("6 pairs")  # K = 2: 1..2, K = 4: 1..4


def test_broken_verification_fails_law_3() -> None:
    assert "3" in failed(run_laws(quick_subject(random_model("llama"), make_method=GreedyAccepter)))


def test_broken_mask_fails_law_7() -> None:
    assert failed(run_laws(quick_subject(random_model("llama"), make_method=CausalSpans))) == {"7"}


def test_broken_cache_fails_law_5(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = KVCache.commit

    def commit(self: KVCache, slot: int, count: int) -> None:
        honest(self, slot, count)
        self.keys[0][slot, :, 0] += 0.01  # what is committed does not stay as it was

    monkeypatch.setattr(KVCache, "commit", commit)
    assert "5" in failed(run_laws(quick_subject(random_model("llama"))))


def test_leaking_mask_rows_fail_law_2(monkeypatch: pytest.MonkeyPatch) -> None:
    import tidar.verify.laws as laws

    honest = laws.dense
    monkeypatch.setattr(laws, "dense", lambda q, k: honest(q, k) | ~honest(q, k))
    assert {"1", "2"} <= failed(run_laws(quick_subject(random_model("llama"))))


def test_nan_is_a_failure() -> None:
    finding = Finding("2", "")
    finding.floats(torch.tensor([float("nan")]), torch.tensor([1.0]), 1e-5)
    assert finding.verdict == "fail"


def test_command_passes_and_gives_json(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    result = CliRunner().invoke(app, [str(folder), "--quick", "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["passed"]
    assert len(report["laws"]) == len(LAWS)
    [transformers] = [law for law in report["laws"] if law["law"] == "8"]
    assert transformers["verdict"] == "pass", transformers


def test_command_fails_with_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Tidar, "_verify", lambda self, step, hidden, project: [(p.length, 1) for p in step.pending]
    )
    result = CliRunner().invoke(app, [str(folder_of(tmp_path)), "--quick"], catch_exceptions=False)
    assert result.exit_code == 1, result.output
    assert "FAILED: law 3" in result.stdout


def test_plain_checkpoint_is_verified_as_ar(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, converted=False)
    result = CliRunner().invoke(app, [str(folder), "--quick"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "decodes as AR only" in result.stdout
    assert "SKIP" in result.stdout


def test_prompts_from_a_file(tmp_path: Path) -> None:
    from models import STORIES

    if not STORIES.is_dir():
        pytest.skip("stories260k is not there")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('Once upon a time\n{"prompt": "Tom had a dog."}\n', encoding="utf-8")
    arguments = [str(STORIES), "--quick", "--json", "--prompts", str(prompts)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
