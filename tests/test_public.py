"""What the package shows to a program: names, a light import, and the bundled checkpoint."""

import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from command import make_base, tidar
from models import BUNDLED

import tidar as package
from tidar.errors import TidarError
from tidar.hf_config import read_json

PROMPTS = ("Compute 78417 + 5691.\n", "def fib(n):", "Multiply 613 by 41.\n", "class Stack:\n")


@pytest.fixture(scope="module")
def bundled() -> package.LanguageModel:
    return package.load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that was never trained to draft."""
    home = tmp_path_factory.mktemp("public")
    (home / "data.txt").write_text("alpha beta gamma delta one two three " * 20)
    tidar("train-tokenizer", "--data", home / "data.txt", "--vocab-size", 270, "--out",
          home / "tokenizer")  # fmt: skip
    make_base(home / "base", home / "tokenizer")
    return home / "base"


# --- names and import ---


def test_names() -> None:
    assert sorted(dir(package)) == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
    star: dict[str, object] = {}
    exec("from tidar import *", star)
    assert set(package.__all__) <= set(star)
    with pytest.raises(AttributeError, match=r"tidar.*'train'"):
        package.train  # noqa: B018
    assert package.load.__module__ == "tidar.api"


def test_import_is_light_and_changes_nothing(tmp_path: Path) -> None:
    """In a process of its own: no framework, no environment variable, no file, nothing on the screen."""
    program = (
        "import os, sys, time, threading, warnings, signal\n"
        "before = dict(os.environ), list(warnings.filters), signal.getsignal(signal.SIGINT)\n"
        "path = list(sys.path)\n"
        "start = time.perf_counter()\n"
        "import tidar\n"
        "took = time.perf_counter() - start\n"
        "after = dict(os.environ), list(warnings.filters), signal.getsignal(signal.SIGINT)\n"
        "assert before == after and path == sys.path\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'safetensors', 'numpy', 'typer', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert threading.active_count() == 1\n"
        "tidar.__version__, tidar.TidarError, dir(tidar)\n"
        "assert 'torch' not in sys.modules\n"
        "print(took)\n"
    )
    (tmp_path / "home").mkdir()
    environment = {"HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    seconds = []
    for _ in range(2):  # the second has the compiled files
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        seconds.append(float(done.stdout))
    assert min(seconds) < 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert not list((tmp_path / "home").iterdir())


# --- the bundled checkpoint ---


def test_bundled_sizes(bundled: package.LanguageModel) -> None:
    parameters = sum(p.numel() for p in bundled.network.parameters())
    assert 1_000_000 < parameters <= 12_000_000
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) < 24_000_000
    assert bundled.draft_len == 16
    assert bundled.meta is not None
    assert bundled.meta.draft_lens == (4, 8, 16)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 4}], ids=str)
def test_generate_stream_and_batch_agree(
    bundled: package.LanguageModel, options: dict[str, float]
) -> None:
    fixed = {"draft_len": 8, "span_set": "1,2,4", "max_new_tokens": 40, **options}
    alone = [bundled.generate(prompt, **fixed) for prompt in PROMPTS]
    for prompt, out in zip(PROMPTS, alone, strict=True):
        events = list(bundled.stream(prompt, **fixed))  # type: ignore[arg-type]
        assert "".join(event.text for event in events) == out.text
        assert [token for event in events for token in event.ids] == out.ids
        steps = [event for event in events if not event.prefill]
        assert [event.prefill for event in events] == [True] + [False] * len(steps)
        assert [event.accepted for event in steps] == out.accepts
        assert len(steps) == out.forwards
        assert all(1 <= event.accepted <= event.drafted <= 8 for event in steps)
        assert out.tokens_per_forward == pytest.approx(
            sum(len(event.ids) for event in steps) / out.forwards
        )
        assert events[-1].finish == out.finish
        assert all(event.finish is None for event in events[:-1])
        kept = out.ids[:-1] if out.finish == "end-of-text" else out.ids
        prompt_ids = bundled.tokenizer.encode(prompt)
        whole = bundled.tokenizer.decode([*prompt_ids, *kept])
        assert whole == bundled.tokenizer.decode(prompt_ids) + out.text
        ar = bundled.generate(prompt, method="ar", max_new_tokens=40, **options)
        assert (ar.ids, ar.text, ar.finish) == (out.ids, out.text, out.finish)
        assert ar.tokens_per_forward == 1.0
        assert bundled.generate(prompt_ids, **fixed).ids == out.ids  # ids are taken as they are
    assert sum(out.forwards for out in alone) < sum(len(out.ids) for out in alone) / 1.3
    for max_batch in (1, 3):
        batch = bundled.generate_batch(PROMPTS, max_batch=max_batch, **fixed)  # type: ignore[arg-type]
        assert [(out.ids, out.text, out.accepts) for out in batch] == [
            (out.ids, out.text, out.accepts) for out in alone
        ]


def test_planned_output_is_ar(bundled: package.LanguageModel) -> None:
    ar = [bundled.generate(prompt, method="ar", max_new_tokens=60).ids for prompt in PROMPTS]
    assert [bundled.generate(prompt, max_new_tokens=60).ids for prompt in PROMPTS] == ar
    assert [out.ids for out in bundled.generate_batch(PROMPTS, max_new_tokens=60)] == ar
    assert bundled.generate_batch([]) == []


def test_mistakes_are_told_by_the_call_itself(bundled: package.LanguageModel) -> None:
    """Not at the first event, and before anything is measured."""
    for options in ({"temperature": -1.0}, {"beta": 2.0}, {"draft_len": 0}, {"max_new_tokens": 0},
                    {"method": "medusa"}, {"span_set": "99"}, {"stop": [""]}):  # fmt: skip
        with pytest.raises(TidarError):
            bundled.stream("x", **options)  # type: ignore[arg-type]
    fresh = package.load(device="cpu", dtype="float32")
    with pytest.raises(TidarError, match="prompt is empty"):
        fresh.stream("")
    assert not fresh._plans


# --- warnings ---


def test_untrained_draft_len_warns_once(bundled: package.LanguageModel) -> None:
    options = {"draft_len": 5, "span_set": "single", "max_new_tokens": 4}
    with pytest.warns(UserWarning, match=r"5 was never trained \(trained: 4, 8, 16\)") as seen:
        first = bundled.generate(PROMPTS[0], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bundled.generate(PROMPTS[0], **options).ids == first.ids
    assert len(seen) == 1
    assert bundled.generate(PROMPTS[0], method="ar", max_new_tokens=4).ids == first.ids
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bundled.generate(PROMPTS[0], draft_len=8, span_set="single", max_new_tokens=4)


def test_plain_folder_decodes_as_ar_only(plain: Path) -> None:
    with pytest.warns(UserWarning, match=r"no 'tidar' entry.*AR only") as seen:
        model = package.load(plain)
    assert len(seen) == 1
    assert model.draft_len == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model.generate("alpha", max_new_tokens=6, ignore_eos=True)
    assert out.tokens_per_forward == 1.0
    assert out.forwards == 5
    with pytest.raises(TidarError, match=r"never trained to draft.*tidar train --base"):
        model.generate("alpha", method="tidar")


# --- transformers ---


def test_bundled_folder_is_an_ordinary_checkpoint(bundled: package.LanguageModel) -> None:
    """Law 8 for what is shipped: plain Qwen3 in `transformers`, equal logits, equal greedy text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert read_json(BUNDLED / "config.json")["model_type"] == "qwen3"
    theirs = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    for prompt in PROMPTS:
        ids = bundled.tokenizer.encode(prompt)
        assert tokenizer(prompt)["input_ids"] == ids
        with torch.inference_mode():
            logits = theirs(torch.tensor([ids])).logits[0]
            positions = torch.arange(len(ids)).unsqueeze(0)
            from tidar.attention import dense_attend

            hidden = bundled.network(torch.tensor([ids]), positions, dense_attend(is_causal=True))
            ours = bundled.network.logits(hidden[0])
            mask = bundled.network.config.mask_token_id
            assert mask is not None
            assert torch.isneginf(ours[:, mask]).all()
            kept = torch.arange(ours.shape[-1]) != mask
            scale = max(1.0, float(ours[:, kept].square().mean().sqrt()))
            assert float((ours - logits)[:, kept].abs().max()) <= 1e-5 * scale
            found = theirs.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=32, do_sample=False, pad_token_id=0,
            )  # fmt: skip
        expected = found[0, len(ids) :].tolist()
        for options in ({"method": "ar"}, {"draft_len": 16, "span_set": "dense"}):
            assert bundled.generate(prompt, max_new_tokens=32, **options).ids == expected


def test_loading_is_quick() -> None:
    start = time.perf_counter()
    package.load(device="cpu", dtype="float32")
    assert time.perf_counter() - start < 5


def test_one_model_serves_many_texts_and_interleaved_streams(
    bundled: package.LanguageModel,
) -> None:
    """The measured plan is shared between calls: no length, order or abandoned stream may upset it."""
    prompts = ("def f(x):", "Compute 12 + 34.\n", "class A:")
    expected = {p: bundled.generate(p, method="ar", max_new_tokens=60).ids for p in prompts}
    for length in (2, 3, 7, 19, 40, 60):
        for prompt in prompts:
            assert bundled.generate(prompt, max_new_tokens=length).ids == expected[prompt][:length]
    streams = [bundled.stream(prompt, max_new_tokens=60) for prompt in prompts]
    ids: list[list[int]] = [[] for _ in prompts]
    next(streams[2])  # abandoned
    for _ in range(60):
        for index in (0, 1):
            event = next(streams[index], None)
            ids[index] += event.ids if event else ()
    assert ids[:2] == [expected[prompt] for prompt in prompts[:2]]
