"""Block diffusion and masked diffusion against their definitions, written out here pass by pass without a cache.

LLaDA: arXiv 2502.09992, section 2.4, and the sampler of its repository (ML-GSAI/LLaDA, generate.py). Dream: the
options `alg` of its sampler (DreamLM/Dream, generation_utils.py). Block diffusion: arXiv 2503.09573, the grid
of SDAR's sampler (arXiv 2510.06303) and the threshold rule of arXiv 2505.22618.
"""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Ran, tidar
from contenders import decode
from models import checkpoint, random_model, random_prompt
from torch import Tensor

import tidar as package
from tidar.attention import dense_attend
from tidar.decode.engine import Engine, FixedPlan
from tidar.decode.request import Request
from tidar.decode.spec import parse_method, parse_methods
from tidar.errors import TidarError
from tidar.layout import Schedule
from tidar.methods.block_diffusion import BlockDiffusion, Quota, QuotaOrder, who_sees
from tidar.methods.denoise import noise_of_pass, propose
from tidar.methods.masked_diffusion import (
    ORDERS,
    MaskedDiffusion,
    dream_share,
    llada_count,
    settle,
    uniform,
)
from tidar.model import Transformer
from tidar.sampling import SamplingParams, gumbel_noise

MODEL = random_model("llama")
MASK = MODEL.config.mask_token_id
assert MASK is not None


def text_of(method: Any, size: int, request: Request, model: Transformer = MODEL) -> list[int]:
    engine = Engine(model, method, FixedPlan(Schedule(size, (1,))), max_batch=1)
    (told,) = decode(engine, [request])
    return told.ids


@torch.inference_mode()
def logits_of(ids: list[int], visible: Tensor | None = None, model: Transformer = MODEL) -> Tensor:
    """Logits `[N, V]` of one pass over all rows; without a mask everything sees everything."""
    positions = torch.arange(len(ids)).unsqueeze(0)
    return model.logits(model(torch.tensor([ids]), positions, dense_attend(visible))[0])


def drawn(logits: Tensor, position: int, passes: int, params: SamplingParams) -> int:
    """The token proposed for a position: arg-max, or drawn with the noise of this pass."""
    if params.greedy:
        return int(logits.argmax())
    seed = noise_of_pass(params, passes).seed
    noise = gumbel_noise(seed, torch.tensor([position]), len(logits))[0]
    return int((filtered(logits, params) + noise).argmax())


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """Temperature, then top-p: tokens stay while the mass before them is under it."""
    logits = logits / params.temperature if params.temperature > 0 else logits
    order = logits.argsort(descending=True)
    before = 0.0
    kept = torch.full_like(logits, -math.inf)
    for token in order.tolist():
        if before >= params.top_p:
            break
        kept[token] = logits[token]
        before += float(logits.softmax(dim=-1)[token])
    return kept


# --- LLaDA ---


def llada(
    prompt: tuple[int, ...], length: int, span: int, steps: int, params: SamplingParams
) -> list[int]:
    """The sampler with low-confidence remasking: spans from left to right, `steps` passes each."""
    x = [*prompt, *[MASK] * length]
    for number in range(length // span):
        start = len(prompt) + number * span
        counts = [span // steps + (1 if i < span % steps else 0) for i in range(steps)]
        for i in range(steps):
            logits = logits_of(x)
            x0 = [drawn(logits[p], p, i, params) for p in range(len(x))]
            sure = {
                p: float(logits[p].double().softmax(dim=-1)[x0[p]])
                for p in range(start, start + span)
                if x[p] == MASK
            }
            for p in sorted(sure, key=lambda p: -sure[p])[: counts[i]]:
                x[p] = x0[p]
    return x[len(prompt) :]


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 3}], ids=str)
@pytest.mark.parametrize(("span", "steps"), [(8, 8), (8, 3), (8, 1), (4, 2), (24, 7), (12, 5)])
def test_low_confidence_is_lladas(span: int, steps: int, params: dict[str, Any]) -> None:
    sampling = SamplingParams(**params)
    for seed in range(2):
        prompt = random_prompt(MODEL, 6, seed)
        request = Request(prompt=prompt, max_new_tokens=24, params=sampling)
        got = text_of(MaskedDiffusion(MASK, steps), span, request)
        assert got == llada(prompt, 24, span, steps, sampling)


def test_lladas_counts() -> None:
    for length in range(1, 20):
        for steps in range(1, length + 1):
            counts = [llada_count(length, steps, i) for i in range(steps)]
            assert sum(counts) == length
            assert min(counts) >= 1
            assert max(counts) - min(counts) <= 1
            assert counts == sorted(counts, reverse=True)


# --- Dream ---


def dream(
    prompt: tuple[int, ...], length: int, steps: int, alg: str, params: SamplingParams, shift: bool
) -> list[int]:
    """The sampler: the whole text is one span, and time walks from 1 to eps."""
    x = [*prompt, *[MASK] * length]
    timesteps = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64).tolist()
    for i in range(steps):
        logits = logits_of(x)
        if shift:
            logits = torch.cat([logits[:1], logits[:-1]])
        t, s = timesteps[i], timesteps[i + 1]
        places = [p for p in range(len(x)) if x[p] == MASK]
        if not places:  # a random share may be all of them
            break
        if alg == "origin":
            p_transfer = 1 - s / t if i < steps - 1 else 1.0
            chance = uniform(params, places, i).tolist()
            for p, u in zip(places, chance, strict=True):
                if u < p_transfer:
                    x[p] = drawn(logits[p], p, i, params)
            continue
        sure, x0 = {}, {}
        for p in places:
            x0[p] = drawn(logits[p], p, i, params)
            probs = filtered(logits[p], params).softmax(dim=-1)
            if alg == "maskgit_plus":
                sure[p] = float(probs[x0[p]])
            elif alg == "topk_margin":
                best = probs.sort(descending=True).values
                sure[p] = float(best[0] - best[1])
            else:
                sure[p] = float((probs * torch.log(probs + 1e-10)).sum())
        number = int(len(places) * (1 - s / t)) if i < steps - 1 else len(places)
        for p in sorted(sure, key=lambda p: -sure[p])[:number]:
            x[p] = x0[p]
    return x[len(prompt) :]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    "params",
    [{}, {"top_p": 0.6}, {"temperature": 0.7, "top_p": 0.9, "seed": 5}],
    ids=str,
)
@pytest.mark.parametrize("alg", ["origin", "maskgit_plus", "topk_margin", "entropy"])
def test_orders_are_dreams(alg: str, params: dict[str, Any], shift: bool) -> None:
    sampling = SamplingParams(**params)
    texts = []
    for steps in (1, 4, 7, 20):
        prompt = random_prompt(MODEL, 5, steps)
        request = Request(prompt=prompt, max_new_tokens=20, params=sampling)
        method = MaskedDiffusion(MASK, steps, alg, shift)  # type: ignore[arg-type]
        texts.append(text_of(method, 20, request))
        assert texts[-1] == dream(prompt, 20, steps, alg, sampling, shift)
    assert all(len(text) == 20 and MASK not in text for text in texts)


def test_orders_differ() -> None:
    """Each is one of its own: the same logits, other rows first."""
    logits = 3 * torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    params, places = SamplingParams(temperature=1.5, top_k=6), range(40)
    tokens = propose(logits, params, places, 0)
    kept = {
        tuple(settle(order, logits, tokens, params, places, length=40, steps=4, done=0).tolist())
        for order in ORDERS
    }
    assert len(kept) == len(ORDERS)


def test_random_orders_are_even() -> None:
    """Every place is as likely as any other, in every pass anew; an even share on average."""
    places, firsts, origin = range(7, 17), Counter[int](), Counter[int]()
    logits, tokens = torch.zeros(10, 4), torch.zeros(10, dtype=torch.int64)
    for seed in range(2000):
        params = SamplingParams(temperature=1.0, seed=seed)
        kept = settle("random", logits, tokens, params, places, length=10, steps=10, done=3)
        firsts.update(kept.nonzero().flatten().tolist())
        kept = settle("origin", logits, tokens, params, places, length=10, steps=4, done=1)
        origin.update(kept.nonzero().flatten().tolist())
    assert sum(firsts.values()) == 2000
    share = dream_share(4, 1)
    assert share == pytest.approx(1 / 3, abs=1e-3)
    for place in range(10):
        assert firsts[place] == pytest.approx(200, abs=5 * math.sqrt(180))
        assert origin[place] == pytest.approx(2000 * share, abs=5 * math.sqrt(2000 * share))
    params = SamplingParams(seed=1)
    assert uniform(params, places, 0).tolist() != uniform(params, places, 1).tolist()


def test_a_token_that_stayed_open_is_drawn_anew() -> None:
    logits = torch.zeros(1, 50)
    params = SamplingParams(temperature=1.0)
    drawn_tokens = [int(propose(logits, params, [9], passes)) for passes in range(400)]
    assert len(set(drawn_tokens)) > 45
    assert propose(logits, params, [9], 7) == propose(logits, params, [9], 7)


def test_every_pass_is_counted() -> None:
    """T/NFE of a fixed number of passes: nothing is a prefill, nothing is cached."""
    request = Request(prompt=random_prompt(MODEL, 6, 1), max_new_tokens=24)
    plan = FixedPlan(Schedule(8, (1,)))
    engine = Engine(MODEL, MaskedDiffusion(MASK, 4), plan, max_batch=1)
    (told,) = decode(engine, [request])
    assert [step.accepted for step in told.steps] == [2] * 12
    assert [len(step.ids) for step in told.steps] == [0, 0, 0, 8] * 3
    assert {step.rows for step in told.steps} == {30}


# --- block diffusion ---


def spans_from_scratch(
    prompt: tuple[int, ...],
    length: int,
    size: int,
    threshold: float,
    attention: str,
    params: SamplingParams,
) -> list[int]:
    """One pass over everything for each denoising step, under the mask that the method means."""
    clean, out = list(prompt), len(prompt) + length
    while len(clean) < out:
        start = len(clean) if attention == "causal" else len(clean) // size * size
        x = [*clean, *[MASK] * (start + size - len(clean))]
        place = torch.arange(len(x))
        if attention == "full":  # cells see themselves and all cells before them
            visible = (place // size).unsqueeze(1) >= place // size
        else:
            in_span = place >= start
            visible = (place.unsqueeze(1) >= place) | (in_span.unsqueeze(1) & in_span)
        passes = 0
        while MASK in x:
            logits = logits_of(x, visible)
            chosen = {p: drawn(logits[p], p, passes, params) for p in range(len(x)) if x[p] == MASK}
            sure = {p: float(logits[p].softmax(dim=-1)[token]) for p, token in chosen.items()}
            best = max(sure, key=lambda p: sure[p])
            for p, token in chosen.items():
                if sure[p] > threshold or p == best:
                    x[p] = token
            passes += 1
        clean = x
    return clean[len(prompt) : out]


@pytest.mark.parametrize("params", [{}, {"temperature": 0.8, "seed": 2}], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.15, 0.3, 1.0])
@pytest.mark.parametrize("attention", ["causal", "full"])
def test_spans_are_those_from_scratch(
    attention: str, threshold: float, params: dict[str, Any]
) -> None:
    """With a cache, clean rows that ride along, and every place of the prompt's end on the grid."""
    sampling = SamplingParams(**params)
    for size, length in ((4, 1), (4, 3), (4, 8), (5, 7), (1, 4), (8, 13)):
        prompt = random_prompt(MODEL, length, size)
        request = Request(prompt=prompt, max_new_tokens=18, params=sampling)
        method = BlockDiffusion(MASK, threshold, attention)  # type: ignore[arg-type]
        got = text_of(method, size, request)
        assert got == spans_from_scratch(prompt, 18, size, threshold, attention, sampling)


def test_who_sees_whom() -> None:
    """Row by row: five clean rows and a span of two, K = 2 with the full attention."""
    seen = who_sees(4, 2, 2, "full").int().tolist()
    assert seen == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
    ]
    causal = who_sees(4, 2, 2, "causal").int().tolist()
    assert [row[:4] for row in causal[:4]] == torch.ones(4, 4).tril().int().tolist()
    assert causal[4:] == seen[4:]


def test_what_a_span_costs() -> None:
    """The prompt alone; then passes over the span, the first of which stores the span before."""
    request = Request(prompt=random_prompt(MODEL, 6, 1), max_new_tokens=12)
    plan = FixedPlan(Schedule(4, (1,)))
    engine = Engine(MODEL, BlockDiffusion(MASK, 1.0), plan, max_batch=1)
    events = list(engine.run([request]))
    assert [event.prefill for event in events] == [True] + [False] * 12
    assert [event.rows for event in events] == [6, 4, 4, 4, 4, 8, 4, 4, 4, 8, 4, 4, 4]
    assert [len(event.ids) for event in events] == [0, *[0, 0, 0, 4] * 3]
    assert [event.drafted for event in events[1:]] == [4, 3, 2, 1] * 3
    assert {event.accepted for event in events[1:]} == {1}
    at_once = Engine(MODEL, BlockDiffusion(MASK, 0.0), plan, max_batch=1)
    (told,) = decode(at_once, [request])
    assert [(step.accepted, len(step.ids)) for step in told.steps] == [(4, 4)] * 3


@pytest.mark.parametrize("order", ["best", "left"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_quota_settles_so_many_a_pass(count: int, order: QuotaOrder) -> None:
    """The most confident ones or the leftmost, as one pass over everything for each step says."""
    prompt, size = random_prompt(MODEL, 5, 3), 5
    quota = Quota(count, order)
    request = Request(prompt=prompt, max_new_tokens=2 * size)
    method = BlockDiffusion(MASK, 0.0, quota=quota)
    (told,) = decode(Engine(MODEL, method, FixedPlan(Schedule(size, (1,))), max_batch=1), [request])
    passes = [min(count, size - done) for done in range(0, size, count)]
    assert [step.accepted for step in told.steps] == 2 * passes
    x = [*prompt, *[MASK] * size]
    place = torch.arange(len(x))
    in_span = place >= len(prompt)
    visible = (place.unsqueeze(1) >= place) | (in_span.unsqueeze(1) & in_span)
    for number in range(len(passes)):
        logits = logits_of(x, visible)
        still = [p for p in range(len(x)) if x[p] == MASK]
        chosen = {p: drawn(logits[p], p, number, request.params) for p in still}
        if order == "best":
            still.sort(key=lambda p: -float(logits[p].softmax(dim=-1)[chosen[p]]))
        for p in still[:count]:
            x[p] = chosen[p]
    assert told.ids[:size] == x[len(prompt) :]
    if count == 1:
        confident = text_of(BlockDiffusion(MASK, 1.0), size, request)
        assert (told.ids == confident) == (order == "best")


def test_with_a_checkpoint_that_was_trained_to_draft() -> None:
    """What a threshold is for: a trained model settles several rows a pass, fewer the higher it is."""
    checkpoint("bundled")
    model = package.load(device="cpu", dtype="float32")
    texts, passes = [], []
    for threshold in (0.5, 0.9, 1.0):
        out = model.generate(
            "Compute 78417 + 5691.\n", max_new_tokens=48, method=f"block-diffusion:8:{threshold}"
        )
        texts.append(out.text)
        passes.append(out.forwards)
    assert passes[0] <= passes[1] <= 12
    assert passes[2] == 48
    assert "78417 + 05691\n7 + 1 = 8" in texts[1]


# --- by name ---


def test_by_name() -> None:
    texts = (
        "ar,block-diffusion:16:0.9,block-diffusion:4:0.5:full,masked-diffusion:32:16,"
        "masked-diffusion:256:64:entropy:shift,masked-diffusion:8:8:shift"
    )
    ar, first, full, llada_way, dream_way, shifted = parse_methods(texts)
    assert ar.is_exact
    assert not any(spec.is_exact or spec.is_ar for spec in (first, full, llada_way, dream_way))
    assert first.engine(MODEL).method == BlockDiffusion(MASK, 0.9)
    assert full.engine(MODEL).method == BlockDiffusion(MASK, 0.5, "full")
    assert llada_way.engine(MODEL).method == MaskedDiffusion(MASK, 16)
    assert dream_way.engine(MODEL).method == MaskedDiffusion(MASK, 64, "entropy", True)
    quota = parse_method("block-diffusion:8:left02:causal")
    assert quota.name == "block-diffusion:8:left2:causal"
    assert quota.engine(MODEL).method == BlockDiffusion(MASK, 1.0, "causal", Quota(2, "left"))
    assert shifted.name == "masked-diffusion:8:8:shift"
    assert (first.schedule, dream_way.schedule) == (Schedule(16, (1,)), Schedule(256, (1,)))
    assert not parse_method("block-diffusion:1:0.9").is_ar
    plain = dataclasses.replace(MODEL.config, mask_token_id=None)
    without = Transformer(plain)
    for spec in (first, llada_way):
        with pytest.raises(TidarError, match="no mask token"):
            spec.engine(without)


@pytest.mark.parametrize(
    "text",
    ["block-diffusion", "block-diffusion:8", "block-diffusion:8:2", "block-diffusion:8:x",
     "block-diffusion:8:best", "block-diffusion:8:left0", "block-diffusion:8:first2",
     "block-diffusion:0:0.9", "block-diffusion:8:0.9:half", "masked-diffusion:8",
     "masked-diffusion:8:9", "masked-diffusion:8:0", "masked-diffusion:8:4:best",
     "masked-diffusion:8:4:shift:entropy"],
)  # fmt: skip
def test_names_not_understood(text: str) -> None:
    with pytest.raises(TidarError, match=r"-diffusion:"):
        parse_method(text)


@pytest.mark.parametrize("name", ["block-diffusion:8:0.9", "masked-diffusion:16:8"])
def test_another_models_text_is_called_so(name: str, tmp_path: Path) -> None:
    """Wherever it is shown; and no likeness to AR's text is claimed."""
    fixed = ("generate", "def fib(n):", "-n", 16, "--device", "cpu", "--dtype", "float32")
    shown = Ran((*fixed, "--method", name))
    assert "another model's text" in shown.err
    record = tidar(*fixed, "--method", name, "--json").json
    assert record["lossy"]
    assert len(record["ids"]) == 16  # type: ignore[arg-type]
    model = package.load(device="cpu", dtype="float32")
    assert model.generate("def fib(n):", max_new_tokens=16, method=name).ids == record["ids"]
    with pytest.raises(TidarError, match="rejection"):
        model.generate("x", method=name, temperature=1.0, sampling="rejection")
    (tmp_path / "p.jsonl").write_text('{"prompt": "def fib(n):", "continuation": " return"}\n')
    bench = ("bench", "--prompts", tmp_path / "p.jsonl", "--methods", f"ar,{name}", "--runs", 1,
             "--max-new-tokens", 16)  # fmt: skip
    assert "another" in tidar(*bench).out
    methods = tidar(*bench, "--json").json["methods"]
    figures = methods[name]  # type: ignore[index]
    assert not figures["is_exact"]
    assert "same_as_ar" not in figures
    assert figures["decode_steps"] >= 2
    assert "forced" in Ran((*bench, "--teacher-forced")).err
