"""Law 4 through the paged engine: rejection-sampled text has exactly the AR distribution, by enumeration.

As `test_exact_distribution.py` for the plain engine: five tokens and the mask token, a network in float64,
every way in which chance can fall. Here chance comes from `Branching`, which stands in for the hash.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from enumeration import EXACT, PROMPT, VOCAB, ar_distribution, distance, rejection, tiny
from models import ar_text, random_model, random_prompt, walk
from test_paged_engine import Irregular, assert_returned, collect
from torch import Tensor

import tidar.decode.weighed as weighed_module
from tidar.decode.engine import FixedPlan
from tidar.decode.paged_engine import EngineLimits, PagedEngine
from tidar.decode.rejection import HashDraws, Purpose
from tidar.decode.request import Request
from tidar.decode.weighed import WeighedStepper
from tidar.layout import Schedule, two_forward
from tidar.model import Transformer
from tidar.sampling import Draw, SamplingParams

SEED = 5
"""Of the request whose chance is walked; others take what is likeliest."""

LIMITS = EngineLimits(max_running=3, page_size=2, chunk_tokens=8, max_draft_len=3)


class Branching:
    """`Draws` of one leaf: asks `draw` whatever can still change the first `count` tokens of request SEED."""

    def __init__(self, count: int) -> None:
        self.count, self.decided = count, 0
        self.draw: Draw = lambda probs: 0
        self.engine: PagedEngine | None = None
        self.accepts: set[int] = set()
        self.shifts: set[int] = set()  # of drafts that chance decided about

    def passes(self, chances: Tensor, seeds: Tensor, places: Tensor) -> Tensor:
        passed = torch.zeros_like(chances, dtype=torch.bool)
        for row in (seeds == SEED).nonzero().flatten().tolist():
            for place, chance in enumerate(chances[row].tolist()):
                if self.decided >= self.count or chance == 0.0:
                    break
                assert self.engine is not None
                self.shifts.add(int(self.engine.slots.shift[next(self._slots())]))
                if self.draw(torch.tensor([1.0 - chance, chance], dtype=torch.float64)) == 0:
                    break
                passed[row, place] = True
                self.decided += 1
            self.accepts.add(1 + int(passed[row].sum()))
        return passed

    def _slots(self) -> Iterator[int]:
        assert self.engine is not None
        for request_id, slot in self.engine.slot_of.items():
            if self.engine.sequences[request_id].request.params.seed == SEED:
                yield slot

    def picks(self, weights: Tensor, seeds: Tensor, places: Tensor, purpose: Purpose) -> Tensor:
        found = weights.argmax(dim=-1)
        for row in (seeds == SEED).nonzero().flatten().tolist():
            for place in range(weights.shape[1]):
                if self.decided < self.count:
                    probs = weights[row, place].double()
                    found[row, place] = self.draw(probs / probs.sum())
                self.decided += purpose == "token"
        return found


def paged_distribution(
    count: int,
    schedule: Schedule,
    params: SamplingParams,
    *,
    model: Transformer | None = None,
    limits: EngineLimits = LIMITS,
    max_new_tokens: int | None = None,
    before: tuple[Request, ...] = (),
    draws: Branching | None = None,
    preempted: Counter[int] | None = None,
) -> Counter[tuple[int, ...]]:
    """The joint distribution of the first `count` tokens, through the real engine.

    before: requests that came first, and run beside it. preempted: counts who had to make room.
    """
    draws = draws or Branching(count)
    engine = PagedEngine(model or tiny(), FixedPlan(schedule), limits, draws=draws)
    draws.engine = engine
    engine.pages.reuse = not before  # what is reused changes who makes room when, from leaf to leaf
    if preempted is not None:
        count_preempted(engine, preempted)
    request = Request(
        prompt=PROMPT,
        max_new_tokens=max_new_tokens or count + 8,
        params=replace(params, seed=SEED),
    )

    def run(draw: Draw) -> tuple[int, ...]:
        draws.draw, draws.decided = draw, 0
        for other in before:
            engine.submit(other)
        own, tokens = engine.submit(request), list[int]()
        events = engine.run()
        for event in events:
            tokens += event.ids if event.request_id == own else ()
            if len(tokens) >= count:
                break
        events.close()  # type: ignore[attr-defined]
        return tuple(tokens[:count])

    joint: Counter[tuple[int, ...]] = Counter()
    for weight, tokens in walk(run):
        joint[tokens] += weight
    assert_returned(engine)
    return joint


def count_preempted(engine: PagedEngine, counts: Counter[int]) -> None:
    inner = engine.scheduler.next

    def counted() -> Any:
        work = inner()
        for request_id in work.preempted:
            counts[engine.sequences[request_id].request.params.seed] += 1
        return work

    engine.scheduler.next = counted  # type: ignore[method-assign]


CASES = [
    # (draft_len, span set, tokens, parameters, turns behind)
    (1, (), 3, {"top_k": 3}, 0),
    (2, (1, 2), 3, {}, 0),
    (2, (1, 2), 4, {"top_k": 3, "temperature": 0.7}, 1),
    (2, (1,), 4, {"top_k": 3, "temperature": 1.6}, 0),
    (2, (2,), 3, {"top_k": 4}, 1),
    (2, (1, 2), 3, {"top_p": 0.8}, 0),
    (3, (1, 2, 3), 3, {"top_k": 3}, 0),
    (3, (1, 2, 3), 5, {"top_k": 2, "temperature": 3.0}, 1),
    (3, (1,), 4, {"top_k": 2, "temperature": 0.9}, 0),
    (3, (2,), 3, {"top_k": 3, "temperature": 1.4}, 1),
    (3, (), 4, {"top_k": 2}, 0),
]
ARGMAX_CASES = [
    (2, (1, 2), 4, {"top_k": 4}, 0),
    (2, (1,), 4, {"top_k": 3}, 1),
    (3, (1, 2, 3), 4, {"top_k": 4}, 1),
    (3, (1,), 4, {"top_k": 4}, 0),
    (3, (2,), 4, {"top_k": 3}, 0),
    (3, (1, 3), 4, {"temperature": 0.6, "top_k": 3}, 1),
    (3, (1, 2), 4, {"top_p": 0.8}, 1),
]


@pytest.mark.parametrize("draft", ["sample", "argmax"])
def test_text_has_the_ar_distribution(draft: str) -> None:
    accepts, shifts = set[int](), set[int]()
    for draft_len, spans, count, values, behind in CASES if draft == "sample" else ARGMAX_CASES:
        params, draws = rejection(draft=draft, **values), Branching(count)
        joint = paged_distribution(
            count,
            Schedule(draft_len, spans),
            params,
            limits=replace(LIMITS, behind=behind),
            draws=draws,
        )
        case = (draft_len, spans, count, values)
        assert distance(joint, ar_distribution(count, params)) < EXACT, case
        assert draft_len == 1 or draws.accepts >= {1, 2}, case
        accepts, shifts = accepts | draws.accepts, shifts | draws.shifts
    assert accepts == {1, 2, 3}
    assert shifts >= {0, 1}  # a shifted draft was verified too


@pytest.mark.parametrize("draft", ["sample", "argmax"])
@pytest.mark.parametrize(("draft_len", "behind"), [(2, 0), (3, 1)])
def test_two_forward(draft_len: int, behind: int, draft: str) -> None:
    """A step that drafts and one that verifies, in turn."""
    params, draws = rejection(draft=draft, top_k=3), Branching(3)
    limits = replace(LIMITS, behind=behind)
    joint = paged_distribution(3, two_forward(draft_len), params, limits=limits, draws=draws)
    assert distance(joint, ar_distribution(3, params)) < EXACT
    assert draws.accepts >= {1, 2}


@pytest.mark.parametrize("draft", ["sample", "argmax"])
def test_drafts_cut_by_max_new_tokens(draft: str) -> None:
    params = rejection(draft=draft, top_k=2)
    joint = paged_distribution(3, Schedule(3, (1, 2, 3)), params, max_new_tokens=3)
    assert distance(joint, ar_distribution(3, params)) < EXACT


def test_at_the_context_end() -> None:
    """Where no span fits any more the engine goes on as AR, with drafts cut to their certain token."""
    params, model = rejection(top_k=3), copy.deepcopy(tiny())
    model.config = replace(model.config, max_positions=len(PROMPT) + 5)
    joint = paged_distribution(4, Schedule(2, (1,)), params, model=model)
    assert distance(joint, ar_distribution(4, params)) < EXACT


GREEDY = Request(prompt=(1, 2), max_new_tokens=7, params=SamplingParams(seed=1))
NOISY = Request(prompt=(2,), max_new_tokens=6, params=SamplingParams(seed=2, temperature=1.0))


@pytest.mark.parametrize(("behind", "at_once"), [(0, 3), (1, 2), (0, 1)])
@pytest.mark.parametrize("draft", ["sample", "argmax"])
def test_in_a_batch(draft: str, behind: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside texts that compare choices, with room for all; `at_once`: so many may be weighed at a time."""
    each = weighed_module.BYTES_PER_WEIGHED_LOGIT * 2 * tiny().config.vocab_size
    monkeypatch.setattr(weighed_module, "CHOOSING_BYTES", at_once * each)
    if at_once == 1:
        monkeypatch.setattr(weighed_module, "PROJECTING_BYTES", 1)
    params = rejection(draft=draft, top_k=3)
    joint = paged_distribution(
        3,
        Schedule(2, (1, 2)),
        params,
        limits=replace(LIMITS, behind=behind),
        before=(GREEDY, NOISY),
    )
    assert distance(joint, ar_distribution(3, params)) < EXACT


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("draft", ["sample", "argmax"])
def test_with_preemption_in_the_middle(draft: str, behind: int) -> None:
    """The older greedy text takes the pages of the walked one, whose draft is lost and which comes back."""
    params, preempted = rejection(draft=draft, top_k=3), Counter[int]()
    limits = replace(LIMITS, max_running=2, cache_tokens=12 + 4 * behind, behind=behind)
    leaves = Branching(4)
    joint = paged_distribution(
        4,
        Schedule(2, (1, 2)),
        params,
        limits=replace(limits, max_draft_len=2),
        before=(GREEDY,),
        max_new_tokens=5,
        draws=leaves,
        preempted=preempted,
    )
    assert preempted[SEED] > 50
    assert leaves.accepts >= {1, 2}
    assert distance(joint, ar_distribution(4, params)) < EXACT


# Negative controls


def _target_for_residual(target: Tensor, draft_probs: Tensor) -> Tensor:
    return target


def _chances_of_another_q(target: Tensor, draft_probs: Tensor, tokens: Tensor) -> Tensor:
    flat = torch.full_like(draft_probs, 1 / VOCAB)
    return weighed_module_chances(target, flat, tokens)


weighed_module_chances = weighed_module.chances


@pytest.mark.parametrize("draft", ["sample", "argmax"])
@pytest.mark.parametrize(
    ("name", "wrong"),
    [("residual", _target_for_residual), ("chances", _chances_of_another_q)],
)
def test_a_wrong_rule_is_noticed(
    name: str, wrong: Callable[..., Tensor], draft: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weighed_module, name, wrong)
    params = rejection(draft=draft, top_k=3)
    joint = paged_distribution(3, Schedule(2, (1, 2)), params)
    assert distance(joint, ar_distribution(3, params)) > 1e-3


@pytest.mark.parametrize("schedule", [Schedule(2, (1, 2)), Schedule(2, (1,))])
@pytest.mark.parametrize("fault", ["length", "argmax", "row"])
def test_a_wrong_draft_is_noticed(
    fault: str, schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A length that depends on the drafted value; an arg-max verified as if drawn; another row's q."""
    propose = WeighedStepper.propose

    def wrong(self: WeighedStepper, logits: Tensor, chosen: Tensor, places: Tensor) -> Tensor:
        tokens = propose(self, logits, chosen, places)
        assert self.rules.probs is not None
        kept = self.rules.probs[chosen, : logits.shape[1]]
        if fault == "argmax":
            return kept.argmax(dim=-1)
        if fault == "row":
            self.rules.probs[chosen, : logits.shape[1]] = 0.1 * kept + 0.9 * kept.roll(1, dims=-1)
        return tokens

    call = WeighedStepper.__call__

    def shorter(self: WeighedStepper, chosen: Tensor) -> Tensor:
        state = self.slots
        state.lens[chosen] = torch.where(state.drafts[chosen, 1] == 2, 1, state.lens[chosen])
        return call(self, chosen)

    monkeypatch.setattr(WeighedStepper, "propose", wrong)
    if fault == "length":
        monkeypatch.setattr(WeighedStepper, "__call__", shorter)
    joint = paged_distribution(2, schedule, rejection())
    assert distance(joint, ar_distribution(2, rejection())) > 1e-3


# The hash


def test_one_draft_row_is_ar() -> None:
    """Law 6: at K = 1 nothing is drafted, and tokens take the noise of shared-noise sampling."""
    model = random_model("qwen3")
    params = SamplingParams(temperature=1.0, seed=3)
    prompt = random_prompt(model, 6, 3)
    request = Request(
        prompt=prompt, max_new_tokens=30, params=replace(params, sampling="rejection")
    )
    engine = PagedEngine(model, FixedPlan(Schedule(1, ())), LIMITS)
    (run,) = collect(engine, [request])
    assert tuple(run.ids) == ar_text(model, prompt, 30, params).ids
    assert set(run.accepts) == {1}


def test_hashed_draws_have_their_chances() -> None:
    """Frequencies over many seeds, and no two purposes, positions or seeds that go together."""
    count = 20_000
    seeds, places = torch.arange(count), torch.tensor([[3, 4]]).expand(count, 2)
    chances = torch.tensor([[0.3, 0.8]], dtype=torch.float64).expand(count, 2)
    weights = torch.tensor([[[0.5, 0.0, 1.5, 2.0], [3.0, 1.0, 0.0, 0.0]]]).expand(count, 2, 4)
    draws = HashDraws()
    passed = draws.passes(chances, seeds, places)
    drawn = draws.picks(weights, seeds, places, "draft")
    chosen = draws.picks(weights, seeds, places, "token")
    flags = [passed[:, 0], passed[:, 1]]
    for picked in (drawn, chosen):
        for place, expected in enumerate(([0.125, 0.0, 0.375, 0.5], [0.75, 0.25, 0.0, 0.0])):
            found = torch.bincount(picked[:, place], minlength=4) / count
            assert float((found - torch.tensor(expected)).abs().max()) < 4.5 * 0.5 / count**0.5
            flags.append(picked[:, place] == (2 if place == 0 else 0))
    values = torch.stack(flags).double()
    correlations = torch.corrcoef(values) - torch.eye(len(flags))
    assert float(correlations.abs().max()) < 4.5 / count**0.5


@pytest.mark.parametrize("draft", ["sample", "argmax"])
def test_text_of_many_seeds_by_hash(draft: str) -> None:
    """The whole engine with the draws that users get, in float32: frequencies of two tokens over 3000 seeds."""
    model, params, count = copy.deepcopy(tiny()).float(), rejection(draft=draft), 3000
    limits = EngineLimits(max_running=100, cache_tokens=3200, page_size=8, max_draft_len=3)
    engine = PagedEngine(model, FixedPlan(Schedule(3, (1, 2))), limits)
    requests = [
        Request(prompt=PROMPT, max_new_tokens=3, params=replace(params, seed=seed))
        for seed in range(count)
    ]
    found: Counter[tuple[int, ...]] = Counter(
        tuple(run.ids[:2]) for run in collect(engine, requests)
    )
    for tokens, chance in ar_distribution(2, params).items():
        spread = math.sqrt(chance * (1 - chance) / count)
        assert abs(found[tokens] / count - chance) < 4.5 * spread, tokens


# Side by side


@pytest.fixture
def mixed_requests() -> list[Request]:
    model = random_model("llama")
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "sampling": "rejection"},
        {"temperature": 1.0},
        {"temperature": 0.8, "sampling": "rejection", "top_k": 7, "draft": "argmax"},
        {"temperature": 0.8, "top_p": 0.9},
    ]
    return [
        Request(
            prompt=random_prompt(model, 4 + 5 * tag, tag),
            max_new_tokens=16 + 3 * tag,
            params=SamplingParams(seed=tag, **kind),
        )
        for tag, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("behind", [0, 1])
def test_texts_that_compare_are_ar_beside_others(
    behind: int, mixed_requests: list[Request]
) -> None:
    """Law 3 in a batch with rejection, with preemptions; and slots that pass from one kind to another."""
    model, preempted = random_model("llama"), Counter[int]()
    limits = EngineLimits(
        max_running=3, cache_tokens=96, page_size=8, chunk_tokens=7, max_draft_len=6, behind=behind
    )
    engine = PagedEngine(model, Irregular(behind, 6), limits)
    count_preempted(engine, preempted)
    runs = collect(engine, [*mixed_requests, *reversed(mixed_requests)])
    for request, run in zip([*mixed_requests, *reversed(mixed_requests)], runs, strict=True):
        assert len(run.ids) == request.max_new_tokens
        if not request.params.rejects:
            expected = ar_text(model, request.prompt, request.max_new_tokens, request.params)
            assert tuple(run.ids) == expected.ids
    assert preempted


def test_rounding_leaves_a_token_and_no_nan() -> None:
    """p equal to q leaves nothing to draw from but p; what was never drawn has no chance of 0 / 0."""
    p = torch.tensor([[0.25, 0.75, 0.0]])
    assert torch.equal(weighed_module.residual(p, p), p)
    q = torch.tensor([[0.5, 0.5, 0.0]])
    assert torch.equal(weighed_module.residual(p, q), torch.tensor([[0.0, 0.25, 0.0]]))
    tokens = torch.tensor([[0, 1, 2]])
    chances = weighed_module.chances(p.expand(1, 3, 3), q.expand(1, 3, 3), tokens)
    assert chances.tolist() == [[0.5, 1.0, 0.0]]
