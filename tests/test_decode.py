"""Laws 2, 3, 5 and 6: TiDAR decoding is AR decoding, and its cache holds what it should."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from models import (
    CHECKPOINTS,
    FAMILIES,
    Excuses,
    Run,
    any_model,
    ar_text,
    assert_equal,
    make_engine,
    plain_cache,
    plain_logits,
    random_model,
    random_prompt,
    run_engine,
)
from torch import Tensor

import tidar.decode.reference as reference_module
from tidar.attention import dense_attend
from tidar.decode.engine import Engine
from tidar.decode.reference import ReferenceDecoder, generate_reference
from tidar.decode.request import Request, Stopper
from tidar.layout import (
    AUTOREGRESSIVE,
    Rows,
    Schedule,
    dense,
    dense_schedule,
    training_rows,
    two_forward,
)
from tidar.methods import Draft, Pending, Project, Step, Verdict
from tidar.methods.tidar import Cell, Tidar
from tidar.model import Transformer
from tidar.sampling import SamplingParams

ALL_MODELS = (*FAMILIES, *CHECKPOINTS)

SAMPLED: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 8},
    {"temperature": 1.3, "top_p": 0.9},
)
"""Greedy and shared noise; rejection sampling has its own law (4)."""


def method(model: Transformer, beta: float = 1.0) -> Tidar:
    assert model.config.mask_token_id is not None
    return Tidar(model.config.mask_token_id, beta)


def make_schedule(kind: str, draft_len: int, rng: random.Random) -> Schedule:
    counts = range(1, draft_len + 1)
    if kind == "two-forward":
        return two_forward(draft_len)
    if kind == "random":
        return Schedule(draft_len, tuple(sorted(rng.sample(counts, rng.randint(1, draft_len)))))
    sets = {"dense": tuple(counts), "single": (1,), "empty": (), "last": (draft_len,)}
    return Schedule(draft_len, sets[kind])


Wanted = Callable[[int, int], int]
"""The accept count to force at (seed, position of d[0])."""


def scripted_draft(
    text: Sequence[int], positions: Sequence[int], wanted: int, mask: int, vocab: int
) -> tuple[int, ...]:
    """Draft tokens for `positions`: the first `wanted - 1` are the text's, all others are wrong."""
    tokens = []
    for count, position in enumerate(positions, start=1):
        right = text[position] if position < len(text) else mask
        wrong = (right + 1) % vocab
        if wrong == mask:
            wrong = (wrong + 1) % vocab
        # Past the known text every token is "wrong", but never the mask token.
        tokens.append(right if count < wanted and right != mask else wrong)
    return tuple(tokens)


@dataclass(frozen=True)
class Scripted(Tidar):
    """TiDAR with drafts that know the AR text up to a wanted length; the seed names the text."""

    texts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    wanted: Wanted = lambda seed, position: 1
    vocab: int = 0

    def _propose(
        self, step: Step, cells: list[Cell], hidden: Tensor, project: Project
    ) -> list[Draft]:
        drafts = []
        for index, p in enumerate(step.pending):
            own = [cell.predicts for cell in cells if cell.sequence == index]
            wanted = self.wanted(p.params.seed, own[0] - 1) if own else 1
            tokens = scripted_draft(
                self.texts[p.params.seed], own, wanted, self.mask_token_id, self.vocab
            )
            drafts.append(Draft(tokens))
        return drafts


def scripted(model: Transformer, texts: dict[int, tuple[int, ...]], wanted: Wanted) -> Scripted:
    mask = model.config.mask_token_id
    assert mask is not None
    return Scripted(mask, texts=texts, wanted=wanted, vocab=model.config.vocab_size)


def varied(draft_len: int, salt: int = 0) -> Wanted:
    """Every accept count from 1 to K comes up, without a pattern."""

    def wanted(seed: int, position: int) -> int:
        return random.Random(f"{seed}/{position}/{salt}").randint(1, draft_len)

    return wanted


def always(count: int) -> Wanted:
    return lambda seed, position: count


def make_stop(count: int) -> Callable[[], Stopper]:
    """A stop string that the token number `count` completes."""

    def make() -> Stopper:
        seen = 0

        def stop(token: int) -> bool:
            nonlocal seen
            seen += 1
            return seen == count

        return stop

    return make


# Law 2


@pytest.mark.parametrize("name", ALL_MODELS)
def test_mask_rows_change_no_clean_logit_in_training(name: str) -> None:
    """The clean half of the training layout equals each document's own causal forward."""
    model = any_model(name)
    lengths = [9, 1, 14, 8]
    tokens = [random_prompt(model, length, seed) for seed, length in enumerate(lengths)]
    ids = torch.tensor([[token for own in tokens for token in own]] * 3)
    document = torch.tensor([[i for i, length in enumerate(lengths) for _ in range(length)]] * 3)
    rows = training_rows(document, torch.tensor([1, 4, 16]), torch.tensor([0, 3, 5]))
    masks = torch.full_like(ids, method(model).mask_token_id)
    with torch.inference_mode():
        hidden = model(
            torch.cat([ids, masks], dim=1), rows.position, dense_attend(dense(rows, rows))
        )
        logits = model.logits(hidden[:, : ids.shape[1]])
    expected = torch.cat([plain_logits(model, own) for own in tokens])
    for row in logits:
        assert_equal(row, expected)


@dataclass(frozen=True)
class Recorder(Tidar):
    """Keeps the draft rows' logits of every step."""

    steps: list[tuple[Pending, Tensor]] = field(default_factory=list)

    def resolve(self, step: Step, hidden: Tensor, project: Project) -> list[Verdict]:
        for index, p in enumerate(step.pending):
            self.steps.append((p, project(hidden[index, : p.length])))
        return super().resolve(step, hidden, project)


@pytest.mark.parametrize("name", ALL_MODELS)
@pytest.mark.parametrize("kind", ["dense", "random", "two-forward"])
def test_mask_rows_change_no_clean_logit_in_decoding(name: str, kind: str) -> None:
    """The draft rows of every step equal a causal forward over committed and draft tokens."""
    model = any_model(name)
    draft_len = 5
    schedule = make_schedule(kind, draft_len, random.Random(2))
    recorder = Recorder(method(model).mask_token_id)
    requests = [
        Request(
            prompt=random_prompt(model, length, length),
            max_new_tokens=8,
            params=SamplingParams(seed=length),
        )
        for length in (3, 11, 6)
    ]
    runs = run_engine(make_engine(model, recorder, schedule), requests)
    texts = {
        request.params.seed: [*request.prompt, *run.ids]
        for request, run in zip(requests, runs, strict=True)
    }
    assert len(recorder.steps) > len(requests)
    for p, logits in recorder.steps:
        whole = [*texts[p.params.seed][: p.prefix_len], *p.draft.tokens]
        expected = plain_logits(model, whole)[p.prefix_len :]
        assert_equal(logits, expected)


# Law 3


def check_batch(
    name: str,
    draft_len: int,
    kind: str,
    excuses: Excuses,
    *,
    seed: int,
    force: bool,
    preempt: bool,
    max_batch: int,
) -> list[Run]:
    """A ragged batch in random order equals AR for each of its requests."""
    model = any_model(name)
    rng = random.Random(f"{name}/{draft_len}/{kind}/{seed}")
    requests, texts = [], {}
    for number in range(rng.randint(3, 4)):
        prompt = random_prompt(model, rng.choice([1, 2, 3, 5, 8, 13]), rng.randrange(4))
        tag = rng.choice([0, 10, 20]) + number  # the seed, which also names the request
        params = SamplingParams(seed=tag, **rng.choice(SAMPLED))
        texts[tag] = ar_text(model, prompt, 26, params)
        requests.append(Request(prompt=prompt, max_new_tokens=rng.randint(12, 24), params=params))
    rng.shuffle(requests)
    known = {tag: text.all for tag, text in texts.items()}
    chosen = scripted(model, known, varied(draft_len)) if force else method(model)
    engine = make_engine(model, chosen, make_schedule(kind, draft_len, rng), max_batch=max_batch)

    events = 0

    def interrupt() -> None:
        nonlocal events
        events += 1
        if engine.running and (events == 2 or rng.random() < 0.2):
            engine.preempt(rng.choice(engine.running).request_id)

    runs = run_engine(engine, requests, interrupt if preempt else None)
    for request, run in zip(requests, runs, strict=True):
        text = texts[request.params.seed]
        excuses.check(run.ids, text, text.ids[: request.max_new_tokens])
        assert run.finish == "length"
    if preempt:
        assert sum(run.prefills for run in runs) > len(runs)
    return runs


@pytest.mark.parametrize("draft_len", range(1, 17))
@pytest.mark.parametrize("name", FAMILIES)
def test_output_is_ar(name: str, draft_len: int, excuses: Excuses) -> None:
    """Every K, span set, batch size and order; drafts natural and forced; some runs preempted."""
    kinds = ["dense", "single", "random", "two-forward", "empty", "last"]
    shift = draft_len + FAMILIES.index(name)
    for turn in range(3):
        check_batch(
            name,
            draft_len,
            kinds[(shift + turn) % 6],
            excuses,
            seed=turn,
            force=turn > 0,
            preempt=(shift + turn) % 2 == 0,
            max_batch=1 + (shift + turn) % 4,
        )


@pytest.mark.parametrize("draft_len", [2, 4, 7, 16])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_output_of_trained_checkpoints_is_ar(name: str, draft_len: int, excuses: Excuses) -> None:
    any_model(name)
    for turn, kind in enumerate(("dense", "random", "empty", "two-forward")):
        check_batch(
            name,
            draft_len,
            kind,
            excuses,
            seed=turn,
            force=turn > 0,
            preempt=turn == 1,
            max_batch=3,
        )


@pytest.mark.parametrize("params", SAMPLED)
@pytest.mark.parametrize("draft_len", [2, 3, 5, 8])
def test_every_accept_count(draft_len: int, params: dict[str, Any], excuses: Excuses) -> None:
    """Drafts that are right for exactly n tokens commit exactly n, at every n in 1..K."""
    model = random_model("llama")
    prompt = random_prompt(model, 4, 1)
    text = ar_text(model, prompt, 40, SamplingParams(seed=3, **params))
    for count in range(1, draft_len + 1):
        engine = make_engine(
            model, scripted(model, {3: text.all}, always(count)), dense_schedule(draft_len)
        )
        request = Request(prompt=prompt, max_new_tokens=25, params=SamplingParams(seed=3, **params))
        (run,) = run_engine(engine, [request])
        excuses.check(run.ids, text, text.ids[:25])
        expected = [min(count, drafted) for drafted in run.drafted]
        assert run.accepts == expected
        assert set(expected[:-1]) == {count}
        assert run.drafted[0] == draft_len


@pytest.mark.parametrize("spans", [(1,), (1, 3), (2,), (3,), (4, 6), (), (1, 2, 4)])
def test_shifted_drafts(spans: tuple[int, ...], excuses: Excuses) -> None:
    """Where an accept count has no span the draft is shorter by the distance, never lost."""
    model, draft_len = random_model("qwen3"), 6
    prompt = random_prompt(model, 3, 2)
    text = ar_text(model, prompt, 40, SamplingParams())
    for count in range(1, draft_len + 1):
        engine = make_engine(
            model, scripted(model, {0: text.all}, always(count)), Schedule(draft_len, spans)
        )
        (run,) = run_engine(engine, [Request(prompt=prompt, max_new_tokens=30)])
        excuses.check(run.ids, text, text.ids[:30])
        left = 29
        expected = draft_len
        for drafted, accepted in zip(run.drafted, run.accepts, strict=True):
            assert drafted == min(expected, left)
            assert accepted == min(count, drafted)
            left -= accepted
            anchors = [n for n in spans if n <= drafted] or [1]
            nearest = max((n for n in anchors if n <= accepted), default=None)
            # Where all anchors lie past the accept count only d[0] is known.
            expected = 1 if nearest is None else max(1, draft_len - (accepted - nearest))


@pytest.mark.parametrize("draft_len", [2, 5])
def test_two_forward_alternates(draft_len: int, excuses: Excuses) -> None:
    """Forced to n: n tokens from a step without spans, then one from a step with a span; prompts of all kinds."""
    model = random_model("qwen2")
    for length in (1, 4):
        prompt = random_prompt(model, length, 6)
        text = ar_text(model, prompt, 40, SamplingParams())
        for count in range(1, draft_len + 1):
            engine = make_engine(
                model, scripted(model, {0: text.all}, always(count)), two_forward(draft_len)
            )
            request = Request(prompt=prompt, max_new_tokens=26)
            for _ in range(
                2
            ):  # a second text starts in the right phase, wherever the first one ended
                steps = [event for event in engine.run([request]) if not event.prefill]
                pairs = list(zip(steps[::2], steps[1::2], strict=False))
                assert len(pairs) >= 4
                for verify, draft in pairs[:-1]:  # the last may have fewer tokens left
                    assert (verify.accepted, draft.accepted) == (count, 1)
                    assert (verify.drafted, draft.drafted) == (draft_len, 1)
                    assert (verify.rows, draft.rows) == (draft_len, 1 + draft_len)
                assert sum(len(event.ids) for event in steps) == 25
            (run,) = run_engine(engine, [request])
            excuses.check(run.ids, text, text.ids[:26])


@pytest.mark.parametrize("kind", ["dense", "two-forward"])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_ends_inside_a_run(count: int, params: dict[str, Any], kind: str, excuses: Excuses) -> None:
    """End-of-text, stop and max_new_tokens at every offset: the text is cut at the right token."""
    model, draft_len = random_model("mistral"), 4
    sampling = SamplingParams(seed=5, **params)
    prompt = random_prompt(model, 5, 3)
    text = ar_text(model, prompt, 30, sampling)
    engine = make_engine(
        model,
        scripted(model, {5: text.all}, always(count)),
        make_schedule(kind, draft_len, random.Random(0)),
    )
    ends = []
    for end in range(1, 14):
        token = text.ids[end - 1]
        cases = [
            ("length", Request(prompt=prompt, max_new_tokens=end, params=sampling)),
            (
                "stop",
                Request(
                    prompt=prompt, max_new_tokens=30, params=sampling, make_stopper=make_stop(end)
                ),
            ),
        ]
        if token not in text.ids[: end - 1]:
            eos = frozenset({token})
            cases.append(
                (
                    "end-of-text",
                    Request(prompt=prompt, max_new_tokens=30, params=sampling, eos_ids=eos),
                )
            )
            ends.append(end)
        if token not in prompt:  # an end-of-text token in the prompt ends nothing
            cases.append(
                (
                    "length",
                    Request(
                        prompt=prompt,
                        max_new_tokens=end,
                        params=sampling,
                        eos_ids=frozenset(prompt) - set(text.ids),
                    ),
                )
            )
        for finish, request in cases:
            (run,) = run_engine(engine, [request])
            excuses.check(run.ids, text, text.ids[:end])
            assert run.finish == finish
            assert sum(run.kept) == end - 1  # the first token is the prefill's
            assert all(kept >= 1 for kept in run.kept)
    assert len(ends) >= 6


def test_no_more_is_drafted_than_is_left(excuses: Excuses) -> None:
    model, draft_len = random_model("llama"), 8
    prompt = random_prompt(model, 5, 3)
    text = ar_text(model, prompt, 30, SamplingParams())
    engine = make_engine(
        model, scripted(model, {0: text.all}, always(8)), dense_schedule(draft_len)
    )
    for count in range(1, 12):
        (run,) = run_engine(engine, [Request(prompt=prompt, max_new_tokens=count)])
        excuses.check(run.ids, text, text.ids[:count])
        left = count - 1
        for drafted in run.drafted:
            assert drafted <= left
            left -= drafted
        assert left == 0


@pytest.mark.parametrize("draft_len", [1, 2, 4, 7])
@pytest.mark.parametrize("kind", ["dense", "empty", "random", "two-forward"])
def test_context_end(draft_len: int, kind: str, excuses: Excuses) -> None:
    """Up to the model's last position and no further, alone and in a batch of unequal sequences."""
    model = random_model("qwen2", limit=24)
    schedule = make_schedule(kind, draft_len, random.Random(draft_len))
    requests, texts = [], {}
    for tag, length in enumerate([23, 22, 20, 15, 9]):
        prompt = random_prompt(model, length, tag)
        params = SamplingParams(seed=tag, temperature=float(tag % 2))
        texts[tag] = ar_text(model, prompt, 100, params)
        assert len(texts[tag].all) == 25  # the last position still predicts one token
        requests.append(Request(prompt=prompt, max_new_tokens=100, params=params))
    known = {tag: text.all for tag, text in texts.items()}
    for chosen in (method(model), scripted(model, known, varied(draft_len))):
        for group in ([request] for request in requests), [requests]:
            for batch in group:
                runs = run_engine(make_engine(model, chosen, schedule), batch)
                for request, run in zip(batch, runs, strict=True):
                    excuses.check(run.ids, texts[request.params.seed])
                    assert run.finish == "context"


def test_batch_order_changes_nothing(excuses: Excuses) -> None:
    """The same requests in any order and batch size: the same tokens and the same accept counts."""
    model, draft_len = random_model("llama"), 6
    texts, requests = {}, []
    for tag, length in enumerate([4, 9, 1, 6, 2]):
        prompt = random_prompt(model, length, tag)
        params = SamplingParams(seed=tag, **SAMPLED[tag % 4])
        texts[tag] = ar_text(model, prompt, 30, params)
        requests.append(Request(prompt=prompt, max_new_tokens=8 + 3 * tag, params=params))
    chosen = scripted(model, {tag: text.all for tag, text in texts.items()}, varied(draft_len))
    schedule = Schedule(draft_len, (1, 2, 4))
    alone = {
        request.params.seed: run_engine(make_engine(model, chosen, schedule), [request])[0]
        for request in requests
    }
    rng = random.Random(0)
    for max_batch in (1, 2, 3, 5):
        rng.shuffle(requests)
        runs = run_engine(make_engine(model, chosen, schedule, max_batch=max_batch), requests)
        for request, run in zip(requests, runs, strict=True):
            tag = request.params.seed
            excuses.check(run.ids, texts[tag], texts[tag].ids[: request.max_new_tokens])
            assert run == alone[tag]


# Engine and specification


def reference_runs(
    model: Transformer, request: Request, schedule: Schedule, beta: float
) -> tuple[list[int], list[int]]:
    out = generate_reference(
        model,
        request.prompt,
        max_new_tokens=request.max_new_tokens,
        schedule=schedule,
        params=request.params,
        eos_ids=request.eos_ids,
        beta=beta,
    )
    return out.ids, out.accepts


@pytest.mark.parametrize("name", ALL_MODELS)
@pytest.mark.parametrize("draft_len", [1, 3, 6, 16])
def test_engine_equals_reference(name: str, draft_len: int, excuses: Excuses) -> None:
    """Tokens and accept counts, drafts as the model makes them."""
    model = any_model(name)
    rng = random.Random(f"{name}/{draft_len}")
    for kind in ("dense", "random", "empty", "two-forward"):
        schedule = make_schedule(kind, draft_len, rng)
        prompt = random_prompt(model, rng.randint(1, 9), rng.randrange(100))
        params = SamplingParams(seed=rng.randrange(100), **rng.choice(SAMPLED))
        text = ar_text(model, prompt, 14, params)
        request = Request(
            prompt=prompt, max_new_tokens=14, params=params, eos_ids=frozenset({text.ids[-3]})
        )
        (run,) = run_engine(make_engine(model, method(model), schedule), [request])
        assert (run.ids, run.accepts) == reference_runs(model, request, schedule, 1.0)
        excuses.check(run.ids, text, text.ids[: len(run.ids)])


@pytest.mark.parametrize("draft_len", [2, 5, 9])
@pytest.mark.parametrize("kind", ["dense", "random", "single", "last", "two-forward"])
def test_engine_equals_reference_when_much_is_accepted(
    draft_len: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripted drafts on both sides: the specification commits and stops in the same places."""
    model = random_model("qwen2", limit=40)
    mask, vocab = method(model).mask_token_id, model.config.vocab_size
    params = SamplingParams(temperature=0.8, seed=9)
    prompt = random_prompt(model, 6, 9)
    text = ar_text(model, prompt, 60, params).all
    wanted = varied(draft_len)

    class ScriptedReference(ReferenceDecoder):
        def propose(
            self, rows: Rows, logits: Tensor, anchor: int, first: int
        ) -> tuple[list[int], Tensor | None]:
            length = len(super().propose(rows, logits, anchor, first)[0])
            positions = range(first, first + length)
            wish = wanted(9, first - 1)
            return list(scripted_draft(text, positions, wish, mask, vocab)), None

    monkeypatch.setattr(reference_module, "ReferenceDecoder", ScriptedReference)
    schedule = make_schedule(kind, draft_len, random.Random(kind))
    chosen = scripted(model, {9: text}, wanted)
    for eos_ids in (frozenset[int](), frozenset({text[len(prompt) + 12]})):
        for count in (1, 11, 60):
            request = Request(prompt=prompt, max_new_tokens=count, params=params, eos_ids=eos_ids)
            (run,) = run_engine(make_engine(model, chosen, schedule), [request])
            ids, accepts = reference_runs(model, request, schedule, 1.0)
            assert (run.ids, run.accepts) == (ids, accepts)
            assert count == 1 or draft_len == 2 or max(accepts) > 2


@pytest.mark.parametrize("draft", ["sample", "argmax"])
@pytest.mark.parametrize("name", FAMILIES)
def test_engine_equals_reference_under_rejection_sampling(name: str, draft: str) -> None:
    """The same stream of draws, used in the same order."""
    model = random_model(name)
    params: dict[str, Any] = {"sampling": "rejection", "draft": draft}
    for schedule in (dense_schedule(4), Schedule(6, (1, 3)), Schedule(5, ()), two_forward(5)):
        draft_len = schedule.draft_len
        request = Request(
            prompt=random_prompt(model, 5, draft_len),
            max_new_tokens=20,
            params=SamplingParams(temperature=1.2, top_k=20, seed=draft_len, **params),
        )
        (run,) = run_engine(make_engine(model, method(model), schedule), [request])
        assert (run.ids, run.accepts) == reference_runs(model, request, schedule, 1.0)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("name", FAMILIES)
def test_beta_equals_reference(name: str, beta: float) -> None:
    """The lossy mixture: greedy, all span sets, to the end of the context; and in a batch."""
    model = random_model(name, limit=32)
    rng = random.Random(f"{name}/{beta}")
    differs = 0
    for kind in ("dense", "random", "empty", "last", "two-forward"):
        draft_len = rng.choice([2, 4, 7])
        schedule = make_schedule(kind, draft_len, rng)
        requests = [
            Request(prompt=random_prompt(model, length, length), max_new_tokens=count)
            for length, count in ((31, 40), (22, 40), (4, 15), (1, 12))
        ]
        expected = [reference_runs(model, request, schedule, beta) for request in requests]
        alone = [
            run_engine(make_engine(model, method(model, beta), schedule), [request])[0]
            for request in requests
        ]
        assert [(run.ids, run.accepts) for run in alone] == expected
        # In a batch a shorter draft may stand beside longer ones; what it emits is the same.
        together = run_engine(make_engine(model, method(model, beta), schedule), requests)
        assert [(run.ids, run.accepts) for run in together] == expected
        differs += sum(
            tuple(ids) != ar_text(model, request.prompt, len(ids), SamplingParams()).ids
            for request, (ids, _) in zip(requests, expected, strict=True)
        )
    assert differs > 0  # or the mixture is not there at all


# Law 5


def check_cache(engine: Engine) -> int:
    """Every running slot holds what a forward from scratch over its committed tokens gives."""
    for slot, sequence in enumerate(engine.running):
        committed = [*sequence.request.prompt, *sequence.emitted][:-1]
        assert engine.cache.lengths[slot] == len(committed)
        keys, values = engine.cache.entries(slot)
        plain_keys, plain_values = plain_cache(engine.model, committed)
        assert_equal(keys, plain_keys)
        assert_equal(values, plain_values)
    for slot in range(len(engine.running), engine.max_batch):
        assert engine.cache.lengths[slot] == 0
    return len(engine.running)


@pytest.mark.parametrize("name", ALL_MODELS)
@pytest.mark.parametrize("force", [True, False])
def test_cache_equals_one_from_scratch(name: str, force: bool) -> None:
    """After every event, with sequences that finish, move to other slots and come back."""
    model = any_model(name)
    rng = random.Random(f"{name}/{force}")
    draft_len = 5
    for kind, preempt in (("dense", False), ("random", True), ("two-forward", True)):
        texts, requests = {}, []
        for tag in range(5):
            prompt = random_prompt(model, rng.randint(1, 12), tag)
            params = SamplingParams(seed=tag, temperature=float(tag % 2))
            texts[tag] = ar_text(model, prompt, 24, params).all
            requests.append(
                Request(prompt=prompt, max_new_tokens=rng.randint(2, 16), params=params)
            )
        chosen = scripted(model, texts, varied(draft_len)) if force else method(model)
        schedule = make_schedule(kind, draft_len, rng)
        engine = make_engine(model, chosen, schedule, max_batch=3)
        checked = 0

        def after(engine: Engine = engine, preempt: bool = preempt) -> None:
            nonlocal checked
            checked += check_cache(engine)
            if preempt and engine.running and rng.random() < 0.15:
                engine.preempt(rng.choice(engine.running).request_id)
                check_cache(engine)

        runs = run_engine(engine, requests, after)
        assert checked > 10
        assert not force or max(n for run in runs for n in run.accepts) >= 4


def test_leaving_a_run_early_leaves_nothing_behind(excuses: Excuses) -> None:
    """An engine whose iterator was dropped goes on as if it were new."""
    model = random_model("llama")
    engine = make_engine(model, method(model), dense_schedule(4), max_batch=2)
    requests = [
        Request(prompt=random_prompt(model, length, length), max_new_tokens=12)
        for length in (9, 3, 5)
    ]
    events = engine.run(requests)
    for _ in range(5):
        next(events)
    events.close()
    assert not engine.running
    assert not engine.waiting
    assert set(engine.cache.lengths) == {0}
    runs = run_engine(engine, requests, lambda: check_cache(engine) and None)
    for request, run in zip(requests, runs, strict=True):
        excuses.check(run.ids, ar_text(model, request.prompt, 12, SamplingParams()))


# Law 6


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("schedule", [AUTOREGRESSIVE, Schedule(1, (1,))])
@pytest.mark.parametrize("name", ALL_MODELS)
def test_one_draft_row_is_ar(name: str, schedule: Schedule, beta: float, excuses: Excuses) -> None:
    """K = 1: no spans, one token a step, exactly; so there is no mask row for beta to mix in."""
    model = any_model(name)
    requests, texts = [], []
    for tag, (length, params) in enumerate(zip((1, 7, 4, 12), SAMPLED, strict=True)):
        prompt = random_prompt(model, length, tag)
        sampling = SamplingParams(seed=tag, **params)
        texts.append(ar_text(model, prompt, 10, sampling))
        requests.append(Request(prompt=prompt, max_new_tokens=10, params=sampling))
    engine = make_engine(model, method(model, beta), schedule, max_batch=3)
    rows = [event.rows for event in engine.run(requests) if not event.prefill]
    assert set(rows) == {1}
    runs = run_engine(engine, requests)
    for run, text in zip(runs, texts, strict=True):
        excuses.check(run.ids, text)
        assert sum(run.kept) / len(run.kept) == 1.0
        assert set(run.accepts) == set(run.drafted) == {1}
        assert len(run.kept) == 9
