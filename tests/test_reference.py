"""The engine equals its specification, `tidar.decode.reference`: tokens and accept counts, whatever the sampling."""

import random
from typing import Any

import pytest
from models import (
    FAMILIES,
    Excuses,
    any_model,
    ar_text,
    make_engine,
    random_model,
    random_prompt,
    run_engine,
)
from scripted import ALL_MODELS, SAMPLED, make_schedule, method, scripted, scripted_draft, varied
from torch import Tensor

import tidar.decode.reference as reference_module
from tidar.decode.reference import ReferenceDecoder, generate_reference
from tidar.decode.request import Request
from tidar.layout import Rows, Schedule, dense_schedule, two_forward
from tidar.model import Transformer
from tidar.sampling import SamplingParams


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
