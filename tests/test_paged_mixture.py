"""beta and teacher forcing through the paged engine: what the plain engine makes of them, alone and in batches."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from models import Run, ar_text, make_engine, random_model, random_prompt, run_engine
from test_paged_engine import assert_returned, collect

from tidar.decode.backend import fused_stepper
from tidar.decode.engine import FixedPlan
from tidar.decode.paged_engine import EngineLimits, PagedEngine
from tidar.decode.request import Request
from tidar.decode.weighed import mixture
from tidar.layout import Schedule
from tidar.methods.tidar import Tidar
from tidar.model import Transformer
from tidar.sampling import SamplingParams

SCHEDULES = [Schedule(4, (1, 2, 3, 4)), Schedule(6, (1, 3)), Schedule(5, (2,)), Schedule(3, ())]


def paged(
    model: Transformer, schedule: Schedule, requests: Sequence[tuple[Request, float]], behind: int
) -> list[Run]:
    limits = EngineLimits(
        max_running=3, cache_tokens=160, page_size=8, chunk_tokens=7, max_draft_len=6, behind=behind
    )
    engine = PagedEngine(model, FixedPlan(schedule), limits)
    runs = {engine.submit(request, beta=beta): Run() for request, beta in requests}
    for event in engine.run():
        run = runs[event.request_id]
        run.ids += event.ids
        run.finish = event.finish
        if not event.prefill:
            run.accepts.append(event.accepted)
            run.drafted.append(event.drafted)
    assert_returned(engine)
    return list(runs.values())


def plain(model: Transformer, schedule: Schedule, request: Request, beta: float = 1.0) -> Run:
    mask = model.config.mask_token_id
    assert mask is not None
    (run,) = run_engine(make_engine(model, Tidar(mask, beta), schedule), [request])
    return run


def requests_of(model: Transformer, **values: float) -> list[Request]:
    """Short enough that all spans fit into the model's positions."""
    return [
        Request(
            prompt=random_prompt(model, length, length),
            max_new_tokens=count,
            params=SamplingParams(seed=length, **values),  # type: ignore[arg-type]
        )
        for length, count in ((22, 30), (4, 25), (1, 12))
    ]


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("values", [{}, {"temperature": 0.9}], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7])
def test_beta_is_that_of_the_plain_engine(
    beta: float, values: dict[str, float], behind: int
) -> None:
    model = random_model("qwen3")
    requests, differs = requests_of(model, **values), 0
    for schedule in SCHEDULES:
        expected = [plain(model, schedule, request, beta) for request in requests]
        # Beside them the same texts with beta = 1, which stay exact.
        both = [pair for request in requests for pair in ((request, beta), (request, 1.0))]
        found = paged(model, schedule, both, behind)
        for request, lossy, exact, right in zip(
            requests, found[::2], found[1::2], expected, strict=True
        ):
            assert (lossy.ids, lossy.accepts) == (right.ids, right.accepts)
            text = ar_text(model, request.prompt, request.max_new_tokens, request.params)
            assert tuple(exact.ids) == text.ids
            differs += lossy.ids != exact.ids
    assert differs > 0  # or the mixture is not there at all


def test_mixture_by_hand() -> None:
    """Row by row, with the mask token left out and rows without a span left alone."""
    causal, masked = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    causal[..., 3] = masked[..., 3] = -torch.inf
    covered = torch.tensor([[True, False, True], [True, True, True]])
    found = mixture(causal, masked, torch.tensor([0.0, 1.0]), covered)
    assert torch.equal(
        found[0, ::2], torch.where(masked[0, ::2].isneginf(), -torch.inf, masked[0, ::2])
    )
    assert torch.equal(found[0, 1], causal[0, 1])
    assert torch.equal(found[1], causal[1])
    assert not found.isnan().any()


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("values", [{}, {"temperature": 1.0}], ids=str)
def test_forced_texts_and_their_acceptance(values: dict[str, float], behind: int) -> None:
    """The forced text is written, drafts pass as in the plain engine, and neighbours do not notice."""
    model = random_model("llama")
    free = requests_of(model, **values)
    forced = []
    for request in free:
        given = random_prompt(model, request.max_new_tokens, 99)
        # Half of it is what the model would have written, so that drafts pass now and then.
        text = ar_text(model, request.prompt, request.max_new_tokens, request.params).ids
        half = len(text) // 2
        forced.append(replace(request, forced=(*request.prompt, *text[:half], *given[half:])))
    passed = 0
    for schedule in SCHEDULES:
        expected = [plain(model, schedule, request) for request in forced]
        both = [(each, 1.0) for pair in zip(forced, free, strict=True) for each in pair]
        found = paged(model, schedule, both, behind)
        for request, run, other, right in zip(
            forced, found[::2], found[1::2], expected, strict=True
        ):
            assert request.forced is not None
            assert tuple(run.ids) == request.forced[len(request.prompt) :]
            assert (run.ids, run.accepts) == (right.ids, right.accepts)
            text = ar_text(model, request.prompt, request.max_new_tokens, request.params)
            assert tuple(other.ids) == text.ids
            passed += sum(run.accepts) - len(run.accepts)
    assert passed > 0


def test_rejection_with_beta_runs_beside_everything() -> None:
    model = random_model("mistral")
    params = SamplingParams(temperature=1.0, sampling="rejection", seed=1)
    requests = [(replace(r, params=params), 0.5) for r in requests_of(model)]
    for run, (request, _) in zip(paged(model, SCHEDULES[0], requests, 0), requests, strict=True):
        assert len(run.ids) == request.max_new_tokens
        assert model.config.mask_token_id not in run.ids


def test_the_fused_step_weighs_the_same_logits() -> None:
    """Rejection in kernels (here interpreted) and in plain PyTorch: one text, one row of accept counts."""
    model = random_model("qwen3", layers=1, width=16)
    limits = EngineLimits(
        max_running=2, cache_tokens=96, page_size=16, chunk_tokens=8, max_draft_len=4, behind=1
    )
    params = SamplingParams(temperature=1.0, sampling="rejection")
    requests = [
        Request(prompt=(3, 4, 5), max_new_tokens=6, params=params),
        Request(prompt=(7,), max_new_tokens=4),
    ]
    found = []
    for fused in (False, True):
        engine = PagedEngine(model, FixedPlan(Schedule(4, (1, 3))), limits)
        if fused:
            pytest.importorskip("triton")
            engine.runner.stepper = fused_stepper(engine.runner.stepper, model, engine.cache)
            engine.prefill.stepper = engine.runner.stepper
        found.append([(run.ids, run.accepts) for run in collect(engine, requests)])
    assert found[0] == found[1]
