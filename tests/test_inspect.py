"""Pictures of the masks: they are the rule's own, labelled, and drawn."""

import json
import sys
from pathlib import Path

import pytest
import torch
import typer
from models import random_model
from typer.testing import CliRunner

from tidar.cli.inspect import inspect
from tidar.errors import TidarError
from tidar.hf_config import TidarMeta
from tidar.layout import Schedule, dense_schedule
from tidar.picture import (
    Relation,
    decode_picture,
    draw_text,
    prefill_picture,
    save_png,
    training_picture,
)
from tidar.weights import save_checkpoint

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(inspect)


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_prefill_by_hand() -> None:
    picture = prefill_picture(2, 2)
    assert picture.relations.tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [2, 2, 3, 3],
        [2, 2, 3, 3],
    ]


@pytest.mark.parametrize(
    "picture",
    [
        training_picture([5, 7], 4, 1),
        training_picture([9], 3),
        prefill_picture(6, 4),
        decode_picture(30, Schedule(4, (1, 2, 4))),
        decode_picture(0, dense_schedule(3), drafts=2),
        decode_picture(4, Schedule(1, ())),
    ],
    ids=lambda picture: picture.title,
)
def test_pictures_say_what_the_rule_says(picture) -> None:
    assert torch.equal(picture.relations != Relation.HIDDEN, picture.matrix)
    assert sum(count for _, count in picture.groups) == len(picture.rows)
    lines = draw_text(picture).splitlines()
    drawn = [line for line in lines if line.startswith(("clean ", "mask "))]
    drawn = [line for line in drawn if "row sees" not in line]
    assert len(drawn) == len(picture.rows)
    for line, row, mask in zip(
        drawn, picture.relations.tolist(), picture.rows.is_mask.tolist(), strict=True
    ):
        assert line.startswith("mask") == mask
        cells = [glyph for glyph in line if glyph in "·■▣●"]
        assert cells == ["·■▣●"[relation] for relation in row]


def test_png(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    pytest.importorskip("matplotlib")
    save_png(decode_picture(6, Schedule(4, (1, 2, 4))), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(TidarError, match="cannot write"):
        save_png(prefill_picture(3, 2), tmp_path / "absent" / "mask.png")


def test_png_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TidarError, match=r"tidar\[plot\]"):
        save_png(prefill_picture(3, 2), tmp_path / "mask.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: training_picture([4], 3, 3), "offset"),
        (lambda: training_picture([0], 3), "document lengths"),
        (lambda: prefill_picture(0, 2), "prompt length"),
        (lambda: decode_picture(3, dense_schedule(3), drafts=4), "drafts"),
        (lambda: decode_picture(3, dense_schedule(40)), "at least|the most"),
    ],
)
def test_impossible_pictures(make, message: str) -> None:
    with pytest.raises(TidarError, match=message):
        make()


def test_command_draws_and_gives_json() -> None:
    assert "n = 4" in call("decode", "--draft-len", "4", "--span-set", "1,4")
    assert "text 1" in call("training", "--documents", "3,4", "--draft-len", "2")
    facts = json.loads(call("prefill", "--prompt-len", "2", "--draft-len", "2", "--json"))
    assert facts["visible"] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert [row["kind"] for row in facts["rows"]] == ["clean", "clean", "mask", "mask"]


def test_command_describes_a_model(tmp_path: Path) -> None:
    model = random_model("qwen3")
    meta = TidarMeta(draft_lens=(4,), mask_token_id=model.config.mask_token_id)
    save_checkpoint(tmp_path / "model", model, meta=meta)
    facts = json.loads(call("model", str(tmp_path / "model"), "--json"))
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["tidar"]["draft_lens"] == [4]
    assert facts["weight_bytes"] == 4 * facts["parameters"]
    assert "mask token 39" in call("model", str(tmp_path / "model"))
