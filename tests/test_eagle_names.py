"""EAGLE-3 by its name: in every command, in evaluation and in the Python API."""

import dataclasses
from pathlib import Path

import pytest
from command import refused, tidar
from contenders import random_head
from lm_eval.api.instance import Instance
from models import BUNDLED, checkpoint

import tidar as package
from tidar.decode.rivals import Target
from tidar.decode.spec import parse_method, parse_methods
from tidar.eagle_files import save_eagle_head
from tidar.errors import TidarError
from tidar.evaluation.harness import TidarLM, engine_options
from tidar.layout import Schedule

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head of random weights for the bundled checkpoint; a colon may be part of the path."""
    path = tmp_path_factory.mktemp("eagle") / "head:1"
    model = checkpoint("bundled")
    save_eagle_head(path, random_head(model, range(100, 300), width=0.02), model.config)
    return path


def test_by_name(folder: Path) -> None:
    specs = parse_methods(f"ar,eagle:{folder}:3,eagle:{folder}:4:tree")
    assert [spec.name for spec in specs] == ["ar", f"eagle:{folder}:3", f"eagle:{folder}:4:tree"]
    assert [spec.schedule for spec in specs[1:]] == [Schedule(4, ()), Schedule(5, ())]
    assert [(s.is_ar, s.is_exact, s.needs_mask) for s in specs[1:]] == [(False, True, False)] * 2
    model = checkpoint("bundled")
    known = Target(model)
    engines = [spec.engine(model, target=known) for spec in specs[1:]]
    assert len({id(engine.method.draft.head) for engine in engines}) == 1  # type: ignore[attr-defined]
    assert [len(engine.method.tree.paths) for engine in engines] == [4, 8]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "text", ["eagle", "eagle:4", "eagle:tree", "eagle:4:tree", "eagle:p:0", "eagle:p:x", "eagle:p:13:tree"]
)  # fmt: skip
def test_names_not_understood(text: str) -> None:
    with pytest.raises(TidarError, match=r"eagle:PATH:K|whole number|12 deep"):
        parse_method(text)


def test_one_flag_away(folder: Path, tmp_path: Path) -> None:
    """The command line and the Python API."""
    fixed = ("generate", "def fib(n):", "-n", 12, "--device", "cpu", "--dtype", "float32", "--json")
    expected = tidar(*fixed, "--method", "ar").json
    name = f"eagle:{folder}:3:tree"
    told = tidar(*fixed, "--method", name).json
    assert (told["ids"], told["lossy"]) == (expected["ids"], False)
    assert int(str(told["draft_forwards"])) > 0
    model = package.load(device="cpu", dtype="float32")
    several = model.generate_batch(["def fib(n):", "class A:"], max_new_tokens=12, method=name)
    assert several[0].ids == expected["ids"]
    assert len(model.target.heads) == 1
    (tmp_path / "p.jsonl").write_text('{"prompt": "def fib(n):"}\n')
    record = tidar("bench", "--prompts", tmp_path / "p.jsonl", "--methods", f"ar,{name}", "--runs", 1,
                   "--max-new-tokens", 12, "--json").json["methods"][name]  # type: ignore[index]  # fmt: skip
    assert record["same_as_ar"]["same"]
    assert 2 <= record["draft_forwards_per_step"] <= 3


def test_eval_reaches_it(folder: Path) -> None:
    """One word for `--methods` there too: the texts are AR's, in fewer steps or as many."""
    spec = parse_method(f"eagle:{folder}:3:tree")
    assert engine_options(spec) == {"method": spec.name}
    texts = {}
    for name in ("ar", spec.name):
        model = TidarLM(str(BUNDLED), name, batch_size=2, device="cpu", dtype="float32")
        asked = ("def fib(n):", {"until": [], "max_gen_toks": 8})
        instance = Instance(request_type="generate_until", doc={}, arguments=asked, idx=0)
        texts[name] = model.generate_until([instance])
        assert model.generated.decode_steps <= 7
    assert texts["ar"] == texts[spec.name]


def test_where_it_does_not_run(folder: Path) -> None:
    name = f"eagle:{folder}:4"
    assert "plain engine" in refused("generate", "x", "--method", name, "--engine", "paged")
    assert "no schedule" in refused("profile", "--methods", name, "--device", "cpu")
    assert "architectures" in refused("generate", "x", "--method", f"eagle:{BUNDLED}:4")
    bidirectional = dataclasses.replace(checkpoint("bundled").config, attention="bidirectional")
    with pytest.raises(TidarError, match="masked-diffusion"):
        parse_method(name).check(bidirectional)
