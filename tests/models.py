"""Small models and plain oracles that the law tests share. Not a test itself.

The oracles here use no part of the decoder: `ar_text` runs a full causal forward for every token,
and `walk` goes through every branch of a computation that draws.
"""

import dataclasses
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar, cast

import pytest
import torch
from torch import Tensor

from tidar.attention import dense_attend
from tidar.decode.engine import Engine, FixedPlan
from tidar.decode.paged_engine import PagedEngine
from tidar.decode.request import FinishReason, Request
from tidar.hf_config import TidarMeta
from tidar.layout import Schedule
from tidar.methods import Method
from tidar.model import ModelConfig, ModelType, Transformer
from tidar.sampling import Draw, SamplingParams, gumbel_noise, process
from tidar.weights import Checkpoint, init_model, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent
BUNDLED = ROOT / "src" / "tidar" / "bundled"
STORIES = ROOT.parent / "shared" / "base" / "stories260k"

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CHECKPOINTS = ("stories260k", "bundled")

TRITON_REQUIRED = platform.system() == "Linux" and platform.machine() == "x86_64"
"""Triton can be installed here: without it the kernels' tests fail, elsewhere they are skipped."""

TOLERANCE = 1e-5
"""Floats that the laws call equal."""

MARGIN = 1e-4
"""A token may differ only where the best two scores are closer than this."""

T = TypeVar("T")


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Floats within `TOLERANCE`, in units of the largest expected value where that is above 1.

    A logit is a sum of hundreds of products, whose rounding goes with the size of the sum's terms: two
    orders of summation of the bundled model's logits (up to about 20) differ by 2e-5 here and there.
    """
    finite = expected[torch.isfinite(expected)]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=TOLERANCE * scale)


def random_checkpoint(
    folder: Path, config: ModelConfig, *, seed: int, meta: TidarMeta | None = None
) -> Checkpoint:
    """Random weights, written to `folder` and opened from there."""
    save_checkpoint(folder, init_model(config, seed), meta=meta)
    return load_checkpoint(folder)


@cache
def random_model(
    family: str,
    *,
    seed: int = 0,
    limit: int = 96,
    vocab: int = 40,
    layers: int = 2,
    width: int = 32,
) -> Transformer:
    """A random model with varied outputs: wide weights, random biases and norms. Do not change it.

    The mask token is the last id.
    """
    heads, kv_heads = (4, 2) if width >= 32 else (2, 1)
    config = ModelConfig(
        model_type=cast(ModelType, family),
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=width + 16,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=8,
        max_positions=limit,
        tie_embeddings=family == "qwen3",
        attention_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        mask_token_id=vocab - 1,
    )
    model = init_model(config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.25, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return model.eval()


@cache
def checkpoint(name: str) -> Transformer:
    """A trained checkpoint in float32, with a mask row; skips the test where it is absent."""
    folder = STORIES if name == "stories260k" else BUNDLED
    if not (folder / "config.json").is_file():
        pytest.skip(f"{name} is not there ({folder})")
    loaded = load_checkpoint(folder)
    if loaded.meta is None:
        from tidar.mask_token import prepare_mask_token
        from tidar.tokens import Tokenizer

        prepare_mask_token(loaded.model, loaded.raw_config, Tokenizer.load(folder))
    model = loaded.model
    assert model.config.mask_token_id is not None
    return model


def any_model(name: str) -> Transformer:
    """A random model by its family, or a checkpoint by its name."""
    return random_model(name) if name in FAMILIES else checkpoint(name)


def random_prompt(model: Transformer, length: int, seed: int) -> tuple[int, ...]:
    """Random tokens, never the mask token."""
    mask = model.config.mask_token_id
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size - 1, (length,), generator=generator).tolist()
    return tuple(token + (mask is not None and token >= mask) for token in ids)


@torch.inference_mode()
def plain_logits(model: Transformer, tokens: Sequence[int]) -> Tensor:
    """Logits `[N, V]` of an ordinary causal forward: no cache, no mask rows."""
    hidden = model(
        torch.tensor([tokens]), torch.arange(len(tokens)).unsqueeze(0), dense_attend(is_causal=True)
    )
    return model.logits(hidden[0])


@torch.inference_mode()
def plain_cache(model: Transformer, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Keys and values of an ordinary causal forward, each `[layers, num_kv_heads, N, head_dim]`."""
    causal, keys, values = dense_attend(is_causal=True), [], []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor:
        keys.append(k[0])
        values.append(v[0])
        return causal(layer, q, k, v)

    model(torch.tensor([tokens]), torch.arange(len(tokens)).unsqueeze(0), attend)
    return torch.stack(keys), torch.stack(values)


@dataclass(frozen=True)
class Text:
    """What plain AR decoding makes of a prompt, and how clear each choice was."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    margins: tuple[float, ...]

    @property
    def all(self) -> tuple[int, ...]:
        return self.prompt + self.ids


_texts: dict[tuple[int, tuple[int, ...], SamplingParams], Text] = {}


def ar_text(
    model: Transformer, prompt: tuple[int, ...], count: int, params: SamplingParams
) -> Text:
    """`count` tokens of plain autoregressive decoding, fewer where the context ends.

    The last one comes from the model's last position, so prompt and text have at most one token
    more than the model has positions.
    """
    if params.greedy:
        params = SamplingParams()  # the seed does not matter
    key = (id(model), prompt, params)
    ids, margins = [], []
    if key in _texts:
        ids, margins = list(_texts[key].ids), list(_texts[key].margins)
    while len(ids) < count and len(prompt) + len(ids) <= model.config.max_positions:
        position = len(prompt) + len(ids)
        scores = plain_logits(model, [*prompt, *ids])[-1:]
        if not params.greedy:
            noise = gumbel_noise(params.seed, torch.tensor([position]), scores.shape[-1])
            scores = process(scores, params) + noise
        best = scores[0].topk(2)
        ids.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
    _texts[key] = text = Text(prompt, tuple(ids), tuple(margins))
    return dataclasses.replace(text, ids=text.ids[:count], margins=text.margins[:count])


@dataclass
class Excuses:
    """Token differences that a margin under `MARGIN` excuses; conftest.py prints how many."""

    compared: int = 0
    excused: int = 0

    def check(self, ids: Sequence[int], text: Text, expected: Sequence[int] | None = None) -> None:
        """Fails unless `ids` is `expected` (by default all of the text), token for token."""
        wanted = tuple(text.ids if expected is None else expected)
        self.compared += len(wanted)
        for place, (token, right) in enumerate(zip(ids, wanted, strict=False)):
            if token != right:
                assert text.margins[place] < MARGIN, (
                    f"token {place} is {token}, AR chooses {right} by {text.margins[place]}: "
                    f"{list(ids)} against {list(wanted)}"
                )
                self.excused += 1
                return  # behind it the two are different texts
        assert len(ids) == len(wanted), (list(ids), list(wanted))


@dataclass
class Run:
    """What the engine made of one request: decode steps only, but for `ids`."""

    ids: list[int] = dataclasses.field(default_factory=list)
    accepts: list[int] = dataclasses.field(default_factory=list)
    drafted: list[int] = dataclasses.field(default_factory=list)
    kept: list[int] = dataclasses.field(default_factory=list)
    prefills: int = 0
    finish: FinishReason | None = None


def make_engine(
    model: Transformer, method: Method, schedule: Schedule, *, max_batch: int = 8
) -> Engine:
    return Engine(model, method, FixedPlan(schedule), max_batch=max_batch)


def run_engine(
    engine: Engine | PagedEngine,
    requests: Sequence[Request],
    after: Callable[[], None] | None = None,
) -> list[Run]:
    """Runs all requests to their end; `after` is called after each event."""
    runs: dict[int, Run] = {}
    for event in engine.run(requests):
        run = runs.setdefault(event.request_id, Run())
        assert run.finish is None, "an event after the last one"
        run.ids += event.ids
        run.finish = event.finish
        if event.prefill:
            run.prefills += 1
            assert event.drafted == 0
        else:
            run.accepts.append(event.accepted)
            run.drafted.append(event.drafted)
            run.kept.append(len(event.ids))
            assert 1 <= event.accepted <= event.drafted <= event.schedule.draft_len
        if after is not None:
            after()
    assert all(run.finish is not None for run in runs.values())
    if isinstance(engine, Engine):
        assert not engine.running
        assert not engine.waiting
    return [runs[request_id] for request_id in sorted(runs)]


def walk(run: Callable[[Draw], T]) -> Iterator[tuple[float, T]]:
    """Every outcome that `run(draw)` can have, with its probability: depth first over all draws.

    `run` is called once per leaf, with a `draw` that replays one script of choices.
    """
    scripts: list[tuple[int, ...]] = [()]
    while scripts:
        script = scripts.pop()
        taken: list[int] = []
        weight = 1.0

        # The defaults bind this leaf's state.
        def draw(probs: Tensor, script: tuple[int, ...] = script, taken: list[int] = taken) -> int:
            nonlocal weight
            values = probs.tolist()
            assert min(values) >= 0.0
            assert abs(sum(values) - 1.0) < 1e-9, values
            if len(taken) < len(script):
                index = script[len(taken)]
            else:
                index, *others = (i for i, value in enumerate(values) if value > 0.0)
                scripts.extend((*taken, other) for other in others)
            taken.append(index)
            weight *= values[index]
            return index

        result = run(draw)
        yield weight, result
