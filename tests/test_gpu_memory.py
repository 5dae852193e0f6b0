"""GPU memory: what is bounded, and errors that name amount, what is free, and what to lower. By stand-ins."""

import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refused
from contenders import random_head, target
from models import BUNDLED, random_model
from test_paged_engine import assert_returned
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tidar as package
import tidar.decode.shared as shared
from tidar import paged_cache, sampling, weights
from tidar.decode import graphs, prefill, weighed
from tidar.decode.engine import FixedPlan
from tidar.decode.paged_engine import EngineLimits, PagedEngine
from tidar.decode.request import Request
from tidar.decode.rules import draft_probs_bytes
from tidar.eagle_files import load_eagle_head, save_eagle_head
from tidar.eagle_head import EagleHead
from tidar.errors import TidarError
from tidar.layout import Schedule, two_forward
from tidar.model import Transformer
from tidar.paged_cache import SLACK_BYTES, PagedCache, page_bytes
from tidar.sampling import RowParams, SamplingParams, choose_rows
from tidar.weights import init_model, load_checkpoint

CUDA = torch.device("cuda")
FULL = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 40.00 GiB"


class Live(TorchDispatchMode):
    """Mutable: bytes of the tensors that operations have made and that are still alive, and the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(storage) for storage in storages((args, kwargs))}
        for storage in storages(out):
            if id(storage) not in given | self._known:
                self._known.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, known: int, size: int) -> None:
        self._known.discard(known)
        self.now -= size


def storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (each.untyped_storage() for each in tree_leaves(values) if isinstance(each, Tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("filtered", [False, True])
def test_choosing_takes_a_constant_at_most(filtered: bool, dtype: torch.dtype) -> None:
    """As many rows as a step projects at once; what a GPU's sort takes inside is not seen here."""
    rows, vocab = 112, 32_768
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)).to(dtype)
    filters = (torch.full((rows,), 50), torch.full((rows,), 0.9)) if filtered else ()
    params = RowParams(torch.ones(rows), torch.arange(rows), *filters)
    with Live() as live:
        chosen = choose_rows(logits, params, torch.arange(rows))
    assert live.now == chosen.nbytes
    assert 4 * 2**20 < live.peak < sampling.CHOOSING_BYTES
    assert sampling.CHOOSING_BYTES <= SLACK_BYTES // 4  # graphs and logits need theirs
    few = next(params.split(16))
    with Live() as live:
        sampling._choose_at_once(logits[:7], few, torch.arange(7))
    assert live.peak < 7 * vocab * sampling.BYTES_PER_LOGIT


@pytest.mark.parametrize("top_k", [0, 50])
@pytest.mark.parametrize("schedule", [Schedule(8, (1, 3)), two_forward(8)], ids=str)
def test_weighing_takes_a_constant_at_most(
    schedule: Schedule, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejection sampling, and beta, of eight at once: beside what the slots keep, a few at a time are weighed."""
    vocab, room = 5_000, sampling.CHOOSING_BYTES // 8
    model = random_model("llama", vocab=vocab)
    params = SamplingParams(temperature=1.0, sampling="rejection", top_k=top_k)
    requests = [Request(prompt=(1, 2, 3), max_new_tokens=8, params=params)] * 8
    peaks, texts = [], []
    # Two at a time are weighed, of four that are projected; then all.
    assert room // (weighed.BYTES_PER_WEIGHED_LOGIT * 8 * vocab) == 2
    for most, projected in ((room, 4 * 2 * 8 * vocab * 4), (1 << 40, 1 << 40)):
        monkeypatch.setattr(weighed, "CHOOSING_BYTES", most)
        monkeypatch.setattr(weighed, "PROJECTING_BYTES", projected)
        limits = EngineLimits(max_running=8, cache_tokens=512, page_size=16, max_draft_len=8)
        engine = PagedEngine(model, FixedPlan(schedule), limits)
        with Live() as live:
            for index, request in enumerate(requests):
                engine.submit(request, beta=0.5 if index % 2 else 1.0)
            texts.append([(event.request_id, event.ids) for event in engine.run()])
        peaks.append(live.peak - draft_probs_bytes(model.config, 8, 8, 4))
    assert texts[0] == texts[1]
    # A CPU sorts in little more than half the room that a GPU does.
    assert peaks[0] < room / 2 < room < peaks[1]


def gpu(
    monkeypatch: pytest.MonkeyPatch, free: int, *, total: int = 40 << 30, kept: int = 0
) -> None:
    """A GPU with so much memory, of which PyTorch keeps `kept` bytes for later until it is asked to give them back."""
    keeps = [kept]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free - sum(keeps), total))
    monkeypatch.setattr(torch.cuda, "empty_cache", keeps.clear)


def test_weights_that_do_not_fit_are_refused_before_they_are_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the API and the command line: bytes by shape and dtype, what is free, what to lower."""
    model = load_checkpoint(BUNDLED).model
    count = sum(weight.numel() for weight in model.parameters())
    monkeypatch.setattr(Transformer, "to_empty", lambda self, device: pytest.fail("moved"))
    for name, advice in (("float32", "Load them in bfloat16"), ("bfloat16", "Load a smaller")):
        size = count * getattr(torch, name).itemsize
        gpu(monkeypatch, free=size - 1)
        said = (
            f"{size / 2**30:.2f} GiB are needed for the weights ({count:,} parameters in {name}), and "
            f"{(size - 1) / 2**30:.2f} GiB of the GPU's 40.00 GiB are free for that. {advice}"
        )
        with pytest.raises(TidarError, match=re.escape(said)):
            package.load(BUNDLED, device="cuda", dtype=name)
        with pytest.raises(TidarError, match=re.escape(said)):
            init_model(model.config, 0, device="cuda", dtype=getattr(torch, name))
        options = ("--model", BUNDLED, "--device", "cuda", "--dtype", name)
        assert said in " ".join(refused("generate", "x", *options).split())


def test_what_pytorch_keeps_for_later_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that was loaded before, say: weights are not refused where they would fit."""
    gpu(monkeypatch, free=1 << 30, kept=1 << 30)
    monkeypatch.setattr(Transformer, "to_empty", lambda self, device: self)
    monkeypatch.setattr(weights, "fill_model", lambda model, files: None)
    assert load_checkpoint(BUNDLED, device="cuda").model.embed.weight.is_meta


@pytest.mark.parametrize("at", ["to_empty", "fill_model"])
def test_memory_that_runs_out_while_weights_are_loaded(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There seemed to be room: another program took it, or it was in pieces."""

    def full(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError(FULL)

    gpu(monkeypatch, free=3 << 30)
    monkeypatch.setattr(Transformer, "to_empty", lambda self, device: self)
    monkeypatch.setattr(Transformer if at == "to_empty" else weights, at, full)
    with pytest.raises(TidarError) as told:
        load_checkpoint(BUNDLED, device="cuda")
    assert re.fullmatch(
        r"CUDA out of memory\. Tried to allocate 2\.50 GiB\. That was while loading the weights "
        r"\([\d,]+ parameters in float32, 0\.\d\d GiB\), with 3\.00 GiB of the GPU's 40\.00 GiB free\. "
        r"Load them in bfloat16 \(dtype\), or load a smaller model, or use another device\.",
        str(told.value),
    )


def test_a_cache_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of positions that it advises fits, and not a page more."""
    config, size = random_model("llama").config, 64
    per_page = page_bytes(config, size, torch.float32)
    gpu(monkeypatch, free=SLACK_BYTES + (5 << 20))

    def make(pages: int) -> PagedCache:
        return PagedCache(config, pages, size, device=CUDA, dtype=torch.float32)

    pages = (5 << 30) // per_page
    with pytest.raises(TidarError, match=r"GiB are needed .* Lower cache_tokens") as told:
        make(pages)
    said = str(told.value)
    assert f"5.00 GiB are needed for the KV cache of {(pages - 1) * size:,} positions" in said
    assert "0.00 GiB of the GPU's 40.00 GiB are free for that (0.50 GiB are left alone" in said
    found = re.search(r"Lower cache_tokens to ([\d,]+) or less", said)
    assert found is not None
    advised = int(found[1].replace(",", "")) // size
    monkeypatch.setattr(torch, "zeros", lambda shape, device, dtype: torch.empty(0))
    assert make(advised + 1).num_pages == advised + 1  # one more is nobody's
    with pytest.raises(TidarError, match="Lower cache_tokens"):
        make(advised + 2)
    gpu(monkeypatch, free=SLACK_BYTES - 1)
    with pytest.raises(TidarError, match=r"0\.00 GiB of .* Not one page fits: load a smaller"):
        make(2)

    def full(*args: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError(FULL)

    gpu(monkeypatch, free=3 << 30)
    monkeypatch.setattr(paged_cache.torch, "zeros", full)
    with pytest.raises(TidarError, match=r"2\.50 GiB.*making the KV cache .*Lower cache_tokens"):
        make(2)


@pytest.mark.parametrize("module", [graphs, prefill], ids=["step", "prefill"])
def test_memory_that_runs_out_in_a_turn(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures say which it was (test_graphs.py); what else a turn needs, the first steps too, says this."""
    limits = EngineLimits(max_running=2, cache_tokens=64, page_size=8, max_draft_len=4)
    engine = PagedEngine(random_model("llama"), FixedPlan(Schedule(4, (1, 3))), limits)
    told: list[str] = []

    def full(run: Any, pool: Any, what: str) -> Any:
        told.append(what)
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(module, "capture", full)
    (engine.runner if module is graphs else engine.prefill).graphs = True
    requests = [Request(prompt=(1, 2, 3), max_new_tokens=9)] * 2
    advice = r"2\.50 GiB\. .* turn of the engine\. Lower max_running .*max_draft_len.*cache_tokens"
    with pytest.raises(TidarError, match=advice):
        list(engine.run(requests))
    expected = "a step of 2 sequences of 12 rows (K = 4, spans at [1, 3])"
    assert told == [expected if module is graphs else "a prefill chunk of 20 rows"]
    assert_returned(engine)


def test_memory_that_runs_out_for_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rejection keeps of its drafts, and the tokens of a forced text: refused when the request comes."""

    def full(*args: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError(FULL)

    limits = EngineLimits(max_running=2, cache_tokens=64, page_size=8, max_draft_len=4)
    engine = PagedEngine(random_model("llama"), FixedPlan(Schedule(4, (1, 3))), limits)
    rejecting = SamplingParams(temperature=1.0, sampling="rejection")
    for name, told, request in (
        (
            "full",
            r"tokens of teacher forcing\. Lower max_",
            Request(prompt=(1, 2), max_new_tokens=9, forced=(1, 2, 3)),
        ),
        (
            "zeros",
            r"draft distributions .* Use shared noise, or",
            Request(prompt=(1, 2), max_new_tokens=9, params=rejecting),
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(torch, name, full)
            with pytest.raises(TidarError, match=rf"2\.50 GiB\. That was while .* {told}"):
                engine.submit(request)
        assert_returned(engine)
        list(engine.run([request]))


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [(torch.float32, "Load model and head in bfloat16"), (torch.bfloat16, "Load a smaller head")],
)
def test_memory_that_runs_out_for_a_head(
    dtype: torch.dtype, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> EagleHead:
        raise torch.OutOfMemoryError(FULL)

    head = random_head(target(), range(20))
    folder = save_eagle_head(tmp_path / "head", head, target().config)
    monkeypatch.setattr(EagleHead, "to", full)
    with pytest.raises(
        TidarError, match=rf"2\.50 GiB\. That was while loading the head\. {advice}"
    ):
        load_eagle_head(folder, target().config, dtype=dtype)


def test_what_never_fits_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By API and command line, with the limit named: pages of the cache, or positions of the model."""
    model = package.load(BUNDLED, device="cpu", dtype="float32")
    config = model.network.config
    monkeypatch.setattr(shared, "CPU_CACHE_BYTES", 2 * page_bytes(config, 64, torch.float32))
    options: dict[str, Any] = {"engine": "paged", "draft_len": 8, "span_set": "1,4"}
    with pytest.raises(TidarError, match=r"KV cache has 2 pages of 64 .* lower max_new_tokens"):
        model.stream("def f(", max_new_tokens=200, **options)
    assert model.generate("def f(", max_new_tokens=4, **options).ids
    long = tmp_path / "long.txt"
    long.write_text("word " * 2 * config.max_positions)
    for engine in ("plain", "paged"):
        command = ("generate", "--file", long, "--device", "cpu", "--engine", engine)
        assert f"the model {config.max_positions} positions" in " ".join(refused(*command).split())
