"""Speculative decoding: how many tokens pass, what is counted, law 4, and which draft models are refused."""

import copy
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from command import refused, tidar
from contenders import decode, near_copy, speculative, target
from enumeration import (
    EXACT,
    Enough,
    ar_distribution,
    distance,
    joint_distribution,
    rejection,
    tiny,
)
from models import BUNDLED, make_engine, plain_cache, random_model, random_prompt
from torch import Tensor

import tidar as package
from tidar.decode.engine import Engine
from tidar.decode.paged_engine import EngineLimits
from tidar.decode.request import Request
from tidar.decode.rivals import Target, check_same_tokens
from tidar.decode.spec import parse_method, parse_methods
from tidar.errors import TidarError
from tidar.layout import Schedule
from tidar.methods import Project, Step, Verdict
from tidar.methods.speculative import DraftModel, Guess, Speculative
from tidar.model import Transformer
from tidar.sampling import SamplingParams, probabilities
from tidar.weights import save_checkpoint


def engine_of(draft: Transformer, count: int, max_batch: int = 1) -> Engine:
    schedule = Schedule(count + 1, ())
    return make_engine(
        target(), speculative(target(), draft, max_batch), schedule, max_batch=max_batch
    )


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}])
def test_a_perfect_draft_model_passes_whole_drafts(params: dict[str, float]) -> None:
    """K + 1 tokens a step; K passes of the draft model, the first of which reads what it has not seen."""
    request = Request(
        prompt=random_prompt(target(), 6, 1), max_new_tokens=26, params=SamplingParams(**params)
    )
    (told,) = decode(engine_of(target(), 4), [request])
    assert [step.accepted for step in told.steps] == [5, 5, 5, 5, 5]
    assert [step.drafted for step in told.steps] == [5, 5, 5, 5, 5]
    assert [step.rows for step in told.steps] == [5, 5, 5, 5, 5]
    assert [step.draft_forwards for step in told.steps] == [4, 4, 4, 4, 4]


def test_no_more_is_drafted_than_is_left() -> None:
    for count in range(1, 12):
        request = Request(prompt=random_prompt(target(), 6, 1), max_new_tokens=count)
        (told,) = decode(engine_of(target(), 4), [request])
        left = count - 1
        for step in told.steps:
            assert step.drafted == min(5, left)
            assert step.draft_forwards == step.drafted - 1
            left -= step.accepted
        assert left == 0


def test_every_accept_count_comes_up() -> None:
    accepts: Counter[int] = Counter()
    for seed in range(6):
        request = Request(prompt=random_prompt(target(), 6, seed), max_new_tokens=50)
        (told,) = decode(engine_of(near_copy(), 4), [request])
        accepts.update(step.accepted for step in told.steps)
    assert set(accepts) == {1, 2, 3, 4, 5}


def test_the_draft_models_cache_is_one_from_scratch() -> None:
    """After every step: what it has read are committed tokens, and their keys and values are right."""
    engine = engine_of(near_copy(), 4, max_batch=3)
    assert isinstance(engine.method, Speculative)
    draft, seen = engine.method.draft, 0

    def after() -> None:
        nonlocal seen
        for slot, sequence in enumerate(engine.running):
            place = draft.places[sequence.request_id]
            text = (*sequence.request.prompt, *sequence.emitted)[: engine.cache.lengths[slot]]
            read = draft.cache.lengths[place.slot]
            assert text[read:] == place.unseen
            keys, values = draft.cache.entries(place.slot)
            expected_keys, expected_values = plain_cache(near_copy(), text[:read])
            torch.testing.assert_close(keys, expected_keys, rtol=0, atol=1e-5)
            torch.testing.assert_close(values, expected_values, rtol=0, atol=1e-5)
            seen += bool(place.unseen)

    requests = [
        Request(prompt=random_prompt(target(), 3 + 4 * seed, seed), max_new_tokens=20)
        for seed in range(5)
    ]
    decode(engine, requests, after)
    assert seen > 3  # after wholly accepted drafts


def test_a_batch_shares_the_draft_models_passes() -> None:
    requests = [
        Request(prompt=random_prompt(target(), 5, seed), max_new_tokens=20) for seed in range(3)
    ]
    for told in decode(engine_of(near_copy(), 4, max_batch=3), requests):
        assert max(step.draft_forwards for step in told.steps) == 4


# --- law 4 ---


def tiny_draft() -> Transformer:
    """Another model of the same six tokens, in float64."""
    draft = random_model("llama", vocab=6, layers=1, width=16, seed=4, limit=16)
    return copy.deepcopy(draft).double()


class Watched(Speculative):
    """Left once `count` tokens are chosen: saves the branches of a draft nobody verifies."""

    def __init__(self, draft: Transformer, count: int) -> None:
        super().__init__(DraftModel(draft, 1), vocab_size=6, mask_token_id=5)
        self.count, self.accepts = count, set[int]()
        self.engine: Engine | None = None

    def resolve(self, step: Step, hidden: Tensor, project: Project) -> list[Verdict]:
        verdicts = super().resolve(step, hidden, project)
        draft, (verdict,) = step.pending[0].draft, verdicts
        assert self.engine is not None
        new = (*draft.tokens[draft.certain : verdict.accepted], *verdict.draft.tokens)
        tokens = (*self.engine.running[0].emitted, *new)
        if not step.prefill:
            self.accepts.add(verdict.accepted)
        if len(tokens) >= self.count:
            raise Enough(tokens[: self.count])
        return verdicts


def text_distribution(
    method: Watched, draft_count: int, params: SamplingParams, max_new_tokens: int | None = None
) -> Counter[tuple[int, ...]]:
    """The joint distribution of the first `method.count` tokens."""
    method.engine = make_engine(tiny(), method, Schedule(draft_count + 1, ()), max_batch=1)
    return joint_distribution(method.engine, method.count, params, max_new_tokens)


@pytest.mark.parametrize(
    ("drafted", "count", "values"),
    [
        (1, 3, {}),
        (1, 4, {"top_k": 3}),
        (2, 3, {"top_k": 3}),
        (2, 3, {"top_p": 0.8, "temperature": 0.7}),
        (2, 4, {"top_k": 2, "temperature": 1.4}),
        (3, 4, {"top_k": 2}),
        (2, 4, {"draft": "argmax"}),
        (3, 4, {"draft": "argmax", "top_k": 3}),
    ],
)
def test_rejection_sampling_is_ar_in_distribution(
    drafted: int, count: int, values: dict[str, float]
) -> None:
    params = rejection(**values)
    method = Watched(tiny_draft(), count)
    joint = text_distribution(method, drafted, params)
    assert distance(joint, ar_distribution(count, params)) < EXACT
    assert method.accepts >= {1, 2}


def test_rejection_sampling_at_the_end_of_a_text() -> None:
    """Where fewer tokens are drafted than usual."""
    params = rejection(top_k=3)
    joint = text_distribution(Watched(tiny_draft(), 3), 3, params, max_new_tokens=3)
    assert distance(joint, ar_distribution(3, params)) < EXACT


def test_a_wrong_q_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: drafts are drawn from the distribution at another temperature than is claimed."""

    def take(guess: Guess, logits: Tensor) -> None:
        guess.tokens.append(
            guess.pending.draw(probabilities(0.5 * logits, guess.pending.params)[0])
        )
        guess.probs.append(probabilities(logits, guess.pending.params)[0])

    monkeypatch.setattr(Guess, "take", take)
    params = rejection(top_k=3)
    joint = text_distribution(Watched(tiny_draft(), 3), 2, params)
    assert math.isclose(sum(joint.values()), 1.0)
    assert distance(joint, ar_distribution(3, params)) > 1e-3


# --- by name ---


def test_by_name(tmp_path: Path) -> None:
    """A colon may be part of the path; the draft model is loaded once."""
    folder = tmp_path / "small:1"
    save_checkpoint(folder, near_copy())
    (spec,) = parse_methods(f"speculative:{folder}:3")
    assert (spec.name, spec.schedule) == (f"speculative:{folder}:3", Schedule(4, ()))
    assert (spec.is_ar, spec.is_exact, spec.needs_mask) == (False, True, False)
    known = Target(target())
    engines = [spec.engine(target(), max_batch=size, target=known) for size in (1, 2)]
    models = [engine.method.draft.network for engine in engines]  # type: ignore[attr-defined]
    assert models[0] is models[1]
    request = Request(prompt=random_prompt(target(), 6, 1), max_new_tokens=12)
    assert [t.ids for t in decode(engines[0], [request])] == [
        t.ids for t in decode(parse_method("ar").engine(target()), [request])
    ]


@pytest.mark.parametrize(
    "text", ["speculative", "speculative:4", "speculative:p:0", "speculative:p:x"]
)
def test_names_not_understood(text: str) -> None:
    with pytest.raises(TidarError, match=r"speculative|whole number"):
        parse_method(text)


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other", random_model("llama", vocab=30))
    with pytest.raises(TidarError, match="30 tokens and the model 40"):
        parse_method(f"speculative:{tmp_path / 'other'}:3").engine(target())
    same, more, changed = (Vocabulary(text) for text in ("abc", "abcd", "abx"))
    check_same_tokens(same, more, "p")  # type: ignore[arg-type]
    check_same_tokens(more, same, "p")  # type: ignore[arg-type]
    with pytest.raises(TidarError, match="token 2 is 'x'"):
        check_same_tokens(same, changed, "p")  # type: ignore[arg-type]


class Vocabulary:
    """What `check_same_tokens` reads of a tokenizer: a token per letter."""

    def __init__(self, letters: str) -> None:
        self.vocab = {letter: number for number, letter in enumerate(letters)}


def test_one_flag_away(tmp_path: Path) -> None:
    """The command line and the Python API, with the bundled checkpoint drafting for itself."""
    name = f"speculative:{BUNDLED}:4"
    fixed = ("generate", "def fib(n):", "-n", 16, "--device", "cpu", "--dtype", "float32", "--json")
    expected = tidar(*fixed, "--method", "ar").json
    told = tidar(*fixed, "--method", name).json
    assert told["ids"] == expected["ids"]
    assert (told["forwards"], told["draft_forwards"], told["lossy"]) == (3, 12, False)
    model = package.load(device="cpu", dtype="float32")
    out = model.generate("def fib(n):", max_new_tokens=16, method=name)
    assert (out.ids, out.forwards, out.draft_forwards) == (expected["ids"], 3, 12)
    several = model.generate_batch(["def fib(n):", "class A:"], max_new_tokens=16, method=name)
    assert several[0].ids == out.ids
    assert len(model.target.drafts) == 1
    (tmp_path / "p.jsonl").write_text('{"prompt": "def fib(n):"}\n')
    record = tidar(
        "bench",
        "--prompts",
        tmp_path / "p.jsonl",
        "--methods",
        f"ar,{name}",
        "--runs",
        1,
        "--max-new-tokens",
        16,
        "--json",
    ).json["methods"][name]  # type: ignore[index]
    assert record["same_as_ar"]["same"]
    assert record["draft_forwards_per_step"] == 4
    assert record["tokens_per_forward"] == 5


def test_where_it_does_not_run() -> None:
    name = f"speculative:{BUNDLED}:4"
    model = package.load(device="cpu", dtype="float32")
    for options, words in (
        ({"engine": "paged"}, "plain engine only"),
        ({"draft_len": 4}, "draft_len"),
        ({"beta": 0.5, "span_set": "dense"}, "span_set and no beta"),
    ):
        with pytest.raises(TidarError, match=words):
            model.generate("x", method=name, **options)
    with pytest.raises(TidarError, match="plain engine only"):
        parse_method(name).engine(model.network, limits=EngineLimits())
    assert "plain engine" in refused("generate", "x", "--method", name, "--engine", "paged")
    assert "no schedule" in refused("profile", "--methods", name, "--device", "cpu")
    shaped = ("bench", "--shape", BUNDLED / "config.json", "--random-weights", "--engine", "paged")
    assert "plain engine" in refused(*shaped, "--methods", name, "--replay-acceptance", 2)


def test_teacher_forced() -> None:
    """The model is made to write a text; drafts are measured on it."""
    prompt = random_prompt(target(), 5, 2)
    (natural,) = decode(engine_of(target(), 3), [Request(prompt=prompt, max_new_tokens=20)])
    for real, steps in (
        (natural.ids, range(5, 6)),
        (random_prompt(target(), 20, 9), range(10, 20)),
    ):
        forced = Request(prompt=prompt, max_new_tokens=20, forced=(*prompt, *real))
        (told,) = decode(engine_of(target(), 3), [forced])
        assert told.ids == list(real)
        assert len(told.steps) in steps
