"""The Monte Carlo bound of diffusion methods, against its definition: every mask, each in a pass of its own."""

import copy
import dataclasses
import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import pytest
import torch
from models import random_model, random_prompt
from torch import Tensor

from tidar.attention import dense_attend
from tidar.decode.engine import Engine, FixedPlan
from tidar.decode.request import Request
from tidar.decode.spec import parse_method
from tidar.errors import TidarError
from tidar.evaluation import bound
from tidar.evaluation.bound import draws, score_bound, weights
from tidar.evaluation.likelihood import Pair, Work
from tidar.evaluation.readings import Reading, SpanReading, WholeReading, reading_of
from tidar.layout import Schedule
from tidar.methods import Method
from tidar.methods.block_diffusion import BlockDiffusion
from tidar.methods.masked_diffusion import MaskedDiffusion
from tidar.model import Transformer

MODEL = random_model("llama")
MASK = MODEL.config.mask_token_id
assert MASK is not None
LENGTH = 4
EVERY = 12 * LENGTH
"""Samples that hide each set of 4 tokens as often as is its due."""

READINGS: dict[str, Reading] = {
    "whole": WholeReading(),
    "shifted": WholeReading(shift=True),
    "spans of 3": SpanReading(3),
    "spans of 4": SpanReading(4),
    "spans of 9": SpanReading(9),
    "spans of 1": SpanReading(1),
    "grid of 4": SpanReading(4, "full"),
    "grid of 3": SpanReading(3, "full"),
}


def pair(context: int = 6, continuation: int = LENGTH, seed: int = 0) -> Pair:
    ids = random_prompt(MODEL, context + continuation, seed)
    return ids[:context], ids[context:]


@torch.inference_mode()
def log_probs(ids: Sequence[int], visible: Tensor | None, model: Transformer = MODEL) -> Tensor:
    hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None], dense_attend(visible))
    return model.logits(hidden[0]).log_softmax(-1)


def spans_of(reading: Reading, context: int, end: int) -> list[tuple[int, int]]:
    """First and last place but one of the spans, in positions of the text; tokens of the context left out."""
    if isinstance(reading, WholeReading):
        return [(context, end)]
    assert isinstance(reading, SpanReading)
    start = context if reading.attention == "causal" else context // reading.size * reading.size
    cuts = range(start, end, reading.size)
    return [(max(cut, context), min(cut + reading.size, end)) for cut in cuts]


def value(reading: Reading, text: Sequence[int], span: tuple[int, int], hidden: Sequence[int]) -> float:  # fmt: skip
    """What hiding these places of a span says: one pass over what the span sees, and no more."""
    first, last = span
    if isinstance(reading, WholeReading):
        x = [MASK if p in hidden else token for p, token in enumerate(text)]
        visible, shift = None, int(reading.shift)
    else:
        assert isinstance(reading, SpanReading)
        x = [MASK if p in hidden else token for p, token in enumerate(text[:last])]
        place, shift = torch.arange(last), 0
        if reading.attention == "full":
            visible = (place // reading.size).unsqueeze(1) >= place // reading.size
        else:
            in_span = place >= first
            visible = (place.unsqueeze(1) >= place) | (in_span.unsqueeze(1) & in_span)
    scores = log_probs(x, visible)  # type: ignore[arg-type]
    found = sum(float(scores[p - shift, text[p]]) for p in hidden)
    return (last - first) / len(hidden) * found


def expected(reading: Reading, asked: Pair) -> tuple[float, float]:
    """The bound by all masks of every span: its value, and the variance of one sample."""
    text, mean, variance = (*asked[0], *asked[1]), 0.0, 0.0
    for first, last in spans_of(reading, len(asked[0]), len(text)):
        size, square, own = last - first, 0.0, 0.0
        for count in range(1, size + 1):
            chance = 1 / size / math.comb(size, count)
            for hidden in combinations(range(first, last), count):
                said = value(reading, text, (first, last), hidden)
                own, square = own + chance * said, square + chance * said**2
        mean, variance = mean + own, variance + square - own**2
    return mean, variance


def every_mask(*_: object) -> Counter[tuple[bool, ...]]:
    """`draws` for one span of 4 tokens, with every mask at its due."""
    return Counter({
        tuple(place in hidden for place in range(LENGTH)): EVERY // LENGTH // math.comb(LENGTH, count)
        for count in range(1, LENGTH + 1)
        for hidden in combinations(range(LENGTH), count)
    })  # fmt: skip


# --- its value ---


@pytest.mark.parametrize("name", ["whole", "shifted", "spans of 4", "spans of 9"])
def test_all_masks_give_the_value_of_the_definition(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bound, "draws", every_mask)
    monkeypatch.setattr(bound, "LOGITS_AT_ONCE", 80)  # two rows of logits at a time
    reading = READINGS[name]
    for seed, context in ((0, 6), (1, 1), (2, 9)):
        asked = pair(context, LENGTH, seed)
        (found,) = score_bound(MODEL, reading, [asked], samples=EVERY, greedy=False)
        assert found.logprob == pytest.approx(expected(reading, asked)[0], abs=1e-4)


@pytest.mark.parametrize("name", READINGS)
def test_the_estimate_is_within_its_budget(name: str) -> None:
    """Five standard errors of independent samples; ours are spread evenly, which does no worse."""
    reading, asked, samples = READINGS[name], pair(), 600
    exact, variance = expected(reading, asked)
    (found,) = score_bound(MODEL, reading, [asked], samples=samples, seed=3, greedy=False)
    assert found.logprob == pytest.approx(exact, abs=5 * math.sqrt(variance / samples) + 1e-4)
    if name == "spans of 1":  # nothing is left to chance: tokens one after the other
        assert variance == pytest.approx(0.0, abs=1e-3)


def test_a_model_that_ignores_its_context_is_bounded_by_what_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blind = copy.deepcopy(MODEL)
    with torch.no_grad():
        for layer in blind.layers:
            layer.o.weight.zero_()  # type: ignore[union-attr, operator]
    asked = pair()
    says = log_probs([MASK], None, blind)[0]  # type: ignore[list-item]
    total = sum(float(says[token]) for token in asked[1])
    monkeypatch.setattr(bound, "draws", every_mask)
    for reading in (WholeReading(), SpanReading(4)):
        (found,) = score_bound(blind, reading, [asked], samples=EVERY, greedy=False)
        assert found.logprob == pytest.approx(total, abs=1e-4)
    monkeypatch.undo()
    with torch.no_grad():
        blind.head.weight.zero_()  # type: ignore[union-attr]
    even = -LENGTH * math.log(MODEL.config.vocab_size - 1)
    for reading in READINGS.values():  # every sample says the same
        (found,) = score_bound(blind, reading, [asked], samples=3, seed=9, greedy=False)
        assert found.logprob == pytest.approx(even, abs=1e-4)


def test_one_token_is_exact_and_choices_share_a_pass() -> None:
    (context, _), work = pair(), Work()
    scores = log_probs([*context, MASK], None)[-1]  # type: ignore[list-item]
    best = int(scores.argmax())
    choices = [*random_prompt(MODEL, 3, 8), best]
    found = score_bound(MODEL, WholeReading(), [(context, (c,)) for c in choices], work=work)
    assert [each.logprob for each in found] == pytest.approx([float(scores[c]) for c in choices], abs=1e-4)  # fmt: skip
    assert [each.greedy for each in found] == [c == best for c in choices]
    assert (work.forwards, work.tokens) == (1, len(context) + 1)


# --- what is drawn ---


def test_draws_are_even() -> None:
    """Every number of hidden tokens as often as any other, every place as often as any other of the same number."""
    spans, samples = (range(5), range(5, 8)), 3000
    found = draws(0, (1, 2, 3), spans, samples)
    assert found.total() == samples
    for span in spans:
        counts, places = Counter[int](), Counter[int]()
        for hidden, often in found.items():
            mine = [place for place in span if hidden[place]]
            counts[len(mine)] += often
            if len(mine) == 1:
                places[mine[0]] += often
        assert sorted(counts) == list(range(1, len(span) + 1))
        # Spread over the samples, not drawn: each number comes up samples / L times, one more or less.
        assert all(abs(often - samples / len(span)) <= 1 for often in counts.values())
        share = samples / len(span) ** 2
        assert all(abs(places[place] - share) < 5 * math.sqrt(share) for place in span)
    assert found != draws(1, (1, 2, 3), spans, samples)
    assert found != draws(0, (1, 2, 4), spans, samples)
    assert found == draws(0, (1, 2, 3), spans, samples)


def test_the_first_number_is_drawn_too() -> None:
    """A single sample hides any number with the same chance: so few samples are no less fair."""
    counts = Counter(
        sum(hidden) for seed in range(1500) for hidden in draws(seed, (7,), (range(5),), 1)
    )
    assert all(abs(counts[number] - 300) < 5 * math.sqrt(300) for number in range(1, 6))


def test_weights() -> None:
    spans = (range(3), range(3, 5))
    assert weights((True, False, False, True, True), spans).tolist() == [3.0, 1.0, 1.0]
    assert weights((True, True, False, False, True), spans).tolist() == [1.5, 1.5, 2.0]


# --- what it does not depend on ---


@pytest.mark.parametrize("name", ["whole", "shifted", "spans of 3", "grid of 4"])
def test_batch_and_order_change_nothing(name: str) -> None:
    reading = READINGS[name]
    pairs = [pair(3 + seed, 1 + seed % 4, seed) for seed in range(7)] * 2
    alone = [score_bound(MODEL, reading, [each], samples=5, batch=1)[0] for each in pairs]
    rng = random.Random(0)
    for batch in (1, 3, 50):
        order = rng.sample(range(len(pairs)), len(pairs))
        work, done = Work(), list[int]()
        found = score_bound(MODEL, reading, [pairs[i] for i in order], samples=5, batch=batch, work=work,
                            on_done=done.append)  # fmt: skip
        for i, each in zip(order, found, strict=True):
            assert each.logprob == pytest.approx(alone[i].logprob, abs=1e-4)
            assert each.greedy == alone[i].greedy
        assert sum(done) == len(pairs)
        assert work.forwards >= 1
    other = score_bound(MODEL, reading, pairs, samples=5, seed=1)
    assert [each.logprob for each in other] != [each.logprob for each in alone]


def test_long_texts_lose_their_beginning() -> None:
    limit, work = MODEL.config.max_positions, Work()
    context, continuation = pair(120, 3)
    (found,) = score_bound(MODEL, WholeReading(), [(context, continuation)], samples=4, work=work)
    (cut,) = score_bound(MODEL, WholeReading(), [(context[-limit + 3 :], continuation)], samples=4)
    assert found == cut
    assert work.truncated == 1


def test_impossible_pairs() -> None:
    too_long = random_prompt(MODEL, MODEL.config.max_positions, 0)
    for wrong in (((), (1,)), ((1,), ()), ((1,), too_long)):
        with pytest.raises(TidarError, match="text 0 has"):
            score_bound(MODEL, WholeReading(), [wrong])
    with pytest.raises(TidarError, match=r"samples \(here 0\)"):
        score_bound(MODEL, WholeReading(), [pair()], samples=0)
    assert score_bound(MODEL, WholeReading(), []) == []


# --- what the method would write ---


@pytest.mark.parametrize("name", ["whole", "shifted", "spans of 3", "spans of 4", "grid of 4"])
def test_greedy_is_what_decoding_writes(name: str) -> None:
    reading, size = READINGS[name], LENGTH
    method: Method
    assert MASK is not None
    if isinstance(reading, WholeReading):
        method = MaskedDiffusion(MASK, LENGTH, shift=reading.shift)
    else:
        assert isinstance(reading, SpanReading)
        method, size = BlockDiffusion(MASK, 1.0, reading.attention), reading.size
    # Decoding fills its last span up with masks; the likelihood ends where the text ends.
    context = 8 if size == 4 else 6
    new = LENGTH if size == 4 else 3
    prompt, _ = pair(context)
    engine = Engine(MODEL, method, FixedPlan(Schedule(size, (1,))), max_batch=1)
    request = Request(prompt=tuple(prompt), max_new_tokens=new)
    text = [token for event in engine.run([request]) for token in event.ids]
    assert len(text) == new
    pairs: list[Pair] = [(prompt, text)]
    pairs += [(prompt, [*text[:i], (text[i] + 1) % 38, *text[i + 1 :]]) for i in range(new)]
    found = score_bound(MODEL, reading, pairs, samples=2, batch=3)
    assert [each.greedy for each in found] == [True, *[False] * new]
    assert not score_bound(MODEL, reading, pairs[:1], samples=2, greedy=False)[0].greedy


def test_readings_of_methods() -> None:
    config = MODEL.config
    full = dataclasses.replace(config, span_attention="full")
    assert reading_of(parse_method("block-diffusion:8:0.5"), full) == SpanReading(8, "full")
    assert reading_of(parse_method("block-diffusion:8:0.5:causal"), full) == SpanReading(8)
    for name, reading in (
        ("ar", None),
        ("tidar:4:dense", None),
        ("speculative:somewhere:2", None),
        ("masked-diffusion:32:16", WholeReading()),
        ("masked-diffusion:32:16:entropy:shift", WholeReading(shift=True)),
        ("block-diffusion:16:0.9", SpanReading(16)),
        ("block-diffusion:8:0.5:full", SpanReading(8, "full")),
    ):
        assert reading_of(parse_method(name), config) == reading
