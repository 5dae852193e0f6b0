"""EAGLE-3: what the head reads and drafts, every path of a tree, caches from scratch, law 4."""

import copy
import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from contenders import decode, eagle, fitted_head, random_head, target
from enumeration import (
    EXACT,
    Enough,
    ar_distribution,
    distance,
    joint_distribution,
    rejection,
    tiny,
)
from models import Excuses, ar_text, assert_equal, random_prompt, walk
from test_decode_cache import check_cache
from torch import Tensor

from tidar.attention import dense_attend
from tidar.cache import KVCache
from tidar.decode.engine import Engine, FixedPlan
from tidar.decode.request import Request
from tidar.eagle_head import EagleHead
from tidar.errors import TidarError
from tidar.layout import Schedule
from tidar.methods import Draft, Pending, Project, Verdict
from tidar.methods.eagle import DraftHead, Eagle, EagleStep, Guess
from tidar.methods.tree import Siblings, Tree, chain, spread
from tidar.sampling import Draw, SamplingParams, probabilities, reject_siblings

BUSHY = Tree([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1)])
"""Paths with gaps between their rows, and nodes without children before nodes with some."""


# --- the tree ---


def test_topology() -> None:
    assert [BUSHY.size(depth) for depth in range(5)] == [1, 4, 8, 11, 11]
    for node, path in enumerate(BUSHY.paths):
        seen = {path[:length] for length in range(len(path) + 1)}
        assert {BUSHY.paths[i] for i in BUSHY.visible[node].nonzero().flatten().tolist()} == seen
        assert [BUSHY.paths[i] for i in BUSHY.children[node]] == sorted(
            other for other in BUSHY.paths if other and other[:-1] == path
        )
    assert torch.equal(chain(4).visible, torch.ones(5, 5, dtype=torch.bool).tril())


def test_the_default_tree() -> None:
    """All paths whose ranks r and length together cost no more than the depth: 1 + 2 r a step."""
    for depth in range(1, 8):
        tree = spread(depth)
        assert tree.depth == depth
        assert all(sum(1 + 2 * r for r in path) <= depth for path in tree.paths)
        more = [(*path, r) for path in tree.paths for r in range(depth)]
        assert all(sum(1 + 2 * r for r in path) > depth for path in more if path not in tree.paths)
    assert len(spread(6).paths) - 1 == 20


@pytest.mark.parametrize("paths", [[(1,)], [(0, 0)], [(0,), (0, 1)], []])
def test_paths_that_make_no_tree(paths: list[tuple[int, ...]]) -> None:
    with pytest.raises(TidarError, match="tree of drafts"):
        Tree(paths)


@pytest.mark.parametrize("size", [4, 5])
def test_commit_rows_closes_gaps(size: int) -> None:
    """Any rows of any slot; what other slots hold stays."""
    model = target()
    cache = KVCache(model.config, 2, device=torch.device("cpu"), dtype=torch.float32)
    cache.reserve(12)
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(tensor.shape))
    cache.lengths[:] = [3, 2]
    before, keys = cache.entries(1), [layer.clone() for layer in cache.keys]
    rows = random.Random(size).sample(range(8), size)
    cache.commit_rows(0, sorted(rows))
    assert cache.lengths == [3 + size, 2]
    kept = [0, 1, 2, *(3 + row for row in sorted(rows))]
    assert torch.equal(cache.entries(0)[0], torch.stack([layer[0, :, kept] for layer in keys]))
    assert torch.equal(torch.stack(cache.entries(1)), torch.stack(before))


# --- drafts that know the text ---


class Knowing(Eagle):
    """Drafts the text up to a wanted depth, at any rank of its siblings; the seed names the text."""

    def __init__(self, draft: DraftHead, tree: Tree, texts: dict[int, tuple[int, ...]]) -> None:
        super().__init__(draft, tree)
        self.texts, self.rng = texts, random.Random(0)
        self.paths: set[tuple[int, ...]] = set()

    def _take(self, guess: Guess, level: int) -> None:
        super()._take(guess, level)
        p, place = guess.pending, guess.pending.prefix_len + level + 1
        text, vocab = self.texts[p.params.seed], target().config.vocab_size
        right = text[place] if place < len(text) else -1
        for node, group in list(guess.siblings.items()):
            if self.tree.depths[node] == level:
                tokens = [(right + 1 + i) % (vocab - 1) for i in range(len(group.nodes))]
                if self.rng.random() < 0.8 and right >= 0:
                    tokens[self.rng.randrange(len(tokens))] = right
                guess.siblings[node] = Siblings(group.nodes, tuple(tokens))
                guess.tokens.update(zip(group.nodes, tokens, strict=True))

    def resolve(self, step: EagleStep, hidden: Tensor, project: Project) -> list[Verdict]:
        verdicts = super().resolve(step, hidden, project)
        if not step.prefill:
            self.paths |= {self.tree.paths[verdict.kept[-1]] for verdict in verdicts}
        return verdicts


def check_head(engine: Engine, method: Eagle) -> int:
    """What the head has read of every sequence, and what it has not, against a pass over the whole text."""
    draft = method.draft
    for slot, sequence in enumerate(engine.running):
        text = [*sequence.request.prompt, *sequence.emitted]
        place, size = draft.places[sequence.request_id], engine.cache.lengths[slot]
        read = draft.cache.lengths[place.slot]
        assert read + len(place.tokens) == size
        features, _, (keys, values) = from_scratch(draft.head, text[: size + 1])
        assert place.tokens == tuple(text[read + 1 : size + 1])
        assert_equal(place.features, features[read:])
        assert_equal(draft.cache.entries(place.slot)[0], keys[:, :, :read])
        assert_equal(draft.cache.entries(place.slot)[1], values[:, :, :read])
    return len(engine.running)


@torch.inference_mode()
def from_scratch(
    head: EagleHead, text: Sequence[int], drafts: Sequence[int] = ()
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The head over a text and a chain of drafts behind it, without a cache: one pass for each draft.

    Features `[N - 1, hidden_size]` of all tokens of the text but the last, outputs `[N - 1 + drafts, ...]`
    of all rows, and their keys and values.
    """
    model, causal, stored = target(), dense_attend(is_causal=True), []
    ids = torch.tensor([[*text, *drafts]])
    places = torch.arange(ids.shape[1] - 1).unsqueeze(0)
    count = len(text) - 1
    _, tapped = model.forward_with_taps(ids[:, :count], places[:, :count], causal, head.taps)
    features = truth = head.fuse(torch.cat(tapped, dim=-1))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor:
        stored[:] = [k, v]
        return causal(layer, q, k, v)

    for rows in range(count, count + len(drafts) + 1):
        outputs = head(model.embed(ids[:, 1 : rows + 1]), features, places[:, :rows], attend)
        features = torch.cat((features, outputs[:, -1:]), dim=1)
    return truth[0], outputs[0], (stored[0], stored[1])


@pytest.mark.parametrize("tree", [chain(4), spread(5), BUSHY], ids=["chain", "spread", "bushy"])
def test_every_path_and_both_caches(tree: Tree, excuses: Excuses) -> None:
    """A ragged batch with preemption; after every event both caches are ones from scratch."""
    requests, texts = [], {}
    for seed, length in enumerate((1, 4, 9, 6, 2)):
        params = SamplingParams(seed=seed, temperature=float(seed % 2))
        prompt = random_prompt(target(), length, seed)
        requests.append(Request(prompt=prompt, max_new_tokens=40, params=params))
        texts[seed] = ar_text(target(), prompt, 40, params)
    method = Knowing(
        DraftHead(fitted_head(), target(), 3), tree, {s: text.all for s, text in texts.items()}
    )
    engine = Engine(target(), method, FixedPlan(Schedule(tree.depth + 1, ())), max_batch=3)
    rng, checked = random.Random(0), 0

    def after() -> None:
        nonlocal checked
        assert check_cache(engine) == check_head(engine, method)
        checked += len(engine.running)
        if engine.running and rng.random() < 0.15:
            engine.preempt(rng.choice(engine.running).request_id)

    for request, told in zip(requests, decode(engine, requests, after), strict=True):
        excuses.check(told.ids, texts[request.params.seed])
    assert checked > 60
    deep = {path for path in tree.paths if len(path) == tree.depth}
    assert method.paths & deep
    assert len(method.paths) > len(tree.paths) / 2


# --- what is drafted ---


class Recorder(Eagle):
    """Keeps every tree."""

    def __init__(self, draft: DraftHead, tree: Tree) -> None:
        super().__init__(draft, tree)
        self.trees: list[Guess] = []

    def resolve(self, step: EagleStep, hidden: Tensor, project: Project) -> list[Verdict]:
        self.trees += step.guesses
        return super().resolve(step, hidden, project)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9}], ids=str)
def test_drafts_are_those_of_the_definition(params: dict[str, float]) -> None:
    """Every node of every tree of a ragged batch against the head run over its path alone, without a cache."""
    head = fitted_head()
    method = Recorder(DraftHead(head, target(), 2), BUSHY)
    engine = Engine(target(), method, FixedPlan(Schedule(BUSHY.depth + 1, ())), max_batch=2)
    requests = [
        Request(
            prompt=random_prompt(target(), 3 + 5 * seed, seed),
            max_new_tokens=14,
            params=SamplingParams(seed=seed, **params),
        )
        for seed in range(2)
    ]
    texts = {
        request.params.seed: (*request.prompt, *told.ids)
        for request, told in zip(requests, decode(engine, requests), strict=True)
    }
    compared = 0
    for guess in method.trees:
        p = guess.pending
        text = texts[p.params.seed][: p.prefix_len + 1]
        for node, output in guess.outputs.items():
            path = [guess.tokens[BUSHY.paths.index(BUSHY.paths[node][: i + 1])]
                    for i in range(BUSHY.depths[node])]  # fmt: skip
            _, outputs, _ = from_scratch(head, text, path)
            assert_equal(output[0], outputs[-1])
            logits = head.logits(outputs[-1:], 40, 39)
            if not params:
                best = logits[0].topk(len(BUSHY.children[node])).indices.tolist()
                assert guess.siblings[node].tokens == tuple(best)
            compared += 1
    assert compared > 50


@pytest.mark.parametrize("values", [{"top_k": 2, "temperature": 0.8}, {}], ids=["top_k", "few"])
def test_tokens_that_cannot_be_are_not_drafted(values: dict[str, float]) -> None:
    """Two are possible, by top_k or by the head's vocabulary: of three siblings one stays empty."""
    draft = Draft((0,))
    pending = Pending(4, draft, 99, SamplingParams(**values), draw=lambda probs: 0)  # type: ignore[arg-type]
    logits = torch.tensor([[0.5, 3.0, -1.0, 2.0, 1.0]])
    if not values:
        logits[0, [0, 2, 4]] = -torch.inf
    guess = Guess(pending, 1)
    guess.take(0, 0, (1, 2, 3), logits)
    assert guess.siblings[0].nodes == (1, 2)
    assert set(guess.siblings[0].tokens) == {1, 3}
    assert set(guess.tokens) == {1, 2}


def test_no_more_is_drafted_than_is_left() -> None:
    for count in range(1, 9):
        request = Request(prompt=random_prompt(target(), 6, 1), max_new_tokens=count)
        (told,) = decode(eagle(target(), fitted_head(), spread(4), 1), [request])
        left = count - 1
        for step in told.steps:
            depth = min(4, left - 1)
            assert (step.drafted, step.rows) == (depth + 1, spread(4).size(depth))
            assert step.draft_forwards == depth
            left -= step.accepted
        assert left == 0


def test_a_good_head_saves_steps() -> None:
    """And a tree saves more than a chain of its depth."""
    steps = {}
    for name, tree in (("chain", chain(4)), ("tree", spread(4))):
        requests = [
            Request(prompt=random_prompt(target(), 6, seed), max_new_tokens=40, params=params)
            for seed in range(4)
            for params in [SamplingParams(seed=seed, temperature=1.0)]
        ]
        told = decode(eagle(target(), fitted_head(), tree, 4), requests)
        steps[name] = sum(len(each.steps) for each in told)
    assert steps["tree"] < steps["chain"] < 4 * 39


def test_teacher_forced() -> None:
    """The model is made to write a text; drafts are measured on it."""
    prompt = random_prompt(target(), 5, 2)
    real = random_prompt(target(), 20, 9)
    for params in (SamplingParams(), rejection()):
        forced = Request(prompt=prompt, max_new_tokens=20, forced=(*prompt, *real), params=params)
        (told,) = decode(eagle(target(), fitted_head(), spread(3), 1), [forced])
        assert told.ids == list(real)


# --- law 4 ---


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("drawn", [True, False])
def test_siblings_leave_the_target_as_it_is(count: int, drawn: bool) -> None:
    """By enumeration of all draws: whatever was drafted, the token has the target's distribution."""
    generator = torch.Generator().manual_seed(count)
    for zeros in (0, 1, 2):
        p, q = (torch.rand(4, dtype=torch.float64, generator=generator) for _ in range(2))
        q[:zeros] = 0.0
        p[-1] = 0.0
        p, q = p / p.sum(), q / q.sum()

        def run(draw: Draw, p: Tensor = p, q: Tensor = q) -> int:
            rest, tokens = q.clone(), []
            while len(tokens) < count and float(rest.sum()) > 0:
                tokens.append(draw(rest / rest.sum()) if drawn else int(rest.argmax()))
                rest[tokens[-1]] = 0.0
            passed, token = reject_siblings(tokens, q if drawn else None, p, draw)
            assert passed is None or tokens[passed] == token
            return token

        made: Counter[int] = Counter()
        for weight, token in walk(run):
            made[token] += weight
        assert all(math.isclose(made[i], float(p[i]), abs_tol=EXACT) for i in range(4))


class Watched(Eagle):
    """Left once `count` tokens are chosen: saves the branches of a draft nobody verifies."""

    def __init__(self, head: EagleHead, tree: Tree, count: int) -> None:
        super().__init__(DraftHead(head, tiny(), 1), tree)
        self.count, self.paths = count, set[tuple[int, ...]]()
        self.engine: Engine | None = None

    def resolve(self, step: EagleStep, hidden: Tensor, project: Project) -> list[Verdict]:
        (verdict,) = super().resolve(step, hidden, project)
        assert self.engine is not None
        draft, path = step.pending[0].draft, verdict.kept
        new = (*(draft.tokens[row] for row in path[draft.certain :]), *verdict.draft.tokens)
        tokens = (*self.engine.running[0].emitted, *new)
        if not step.prefill:
            self.paths.add(self.tree.paths[path[-1]])
        if len(tokens) >= self.count:
            raise Enough(tokens[: self.count])
        return [verdict]


def text_distribution(
    method: Watched, params: SamplingParams, max_new_tokens: int | None = None
) -> Counter[tuple[int, ...]]:
    """The joint distribution of the first `method.count` tokens."""
    plan = FixedPlan(Schedule(method.tree.depth + 1, ()))
    method.engine = Engine(tiny(), method, plan, max_batch=1)
    return joint_distribution(method.engine, method.count, params, max_new_tokens)


def tiny_head(*tokens: int) -> EagleHead:
    return copy.deepcopy(random_head(tiny(), tokens, seed=4))


PAIR, TWIG = Tree([(0,), (1,)]), Tree([(0,), (1,), (1, 0), (1, 1)])


@pytest.mark.parametrize(
    ("tree", "head", "count", "values", "all_paths"),
    [
        (chain(1), (0, 1, 2, 3, 4), 3, {}, True),
        (chain(2), (0, 4), 3, {"top_k": 3}, True),
        (chain(2), (0, 2, 3), 3, {"top_p": 0.8, "temperature": 0.7}, False),
        (chain(3), (0, 1, 2, 3, 4), 4, {"draft": "argmax", "top_k": 3}, True),
        (PAIR, (0, 1, 2, 3, 4), 2, {}, True),
        (PAIR, (1, 2, 4), 3, {"top_k": 3}, True),
        (PAIR, (3,), 3, {}, False),
        (TWIG, (1, 2, 4), 2, {}, True),
        (TWIG, (1, 2), 3, {"top_p": 0.8}, False),
        (TWIG, (0, 1, 2, 3, 4), 3, {"draft": "argmax"}, True),
        (spread(4), (0, 1, 2, 3), 3, {"draft": "argmax", "top_k": 4}, False),
    ],
)
def test_rejection_sampling_is_ar_in_distribution(
    tree: Tree, head: tuple[int, ...], count: int, values: dict[str, float], all_paths: bool
) -> None:
    """The whole run enumerated: drafting, siblings, paths, several steps jointly.

    all_paths: whether every path of the tree can pass; filters and small vocabularies leave some empty.
    """
    params = rejection(**values)
    method = Watched(tiny_head(*head), tree, count)
    assert distance(text_distribution(method, params), ar_distribution(count, params)) < EXACT
    assert method.paths >= (set(tree.paths) if all_paths else {(), (0,)})


def test_rejection_sampling_at_the_end_of_a_text() -> None:
    """Where the tree is cut."""
    params = rejection(top_k=2)
    method = Watched(tiny_head(0, 1, 2, 3, 4), TWIG, 3)
    joint = text_distribution(method, params, max_new_tokens=3)
    assert distance(joint, ar_distribution(3, params)) < EXACT


@pytest.mark.parametrize("wrong", ["with replacement", "tested out of order", "wrong q"])
def test_wrong_siblings_are_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls."""
    take = Guess.take

    def taken(
        guess: Guess, node: int, depth: int, children: tuple[int, ...], logits: Tensor
    ) -> None:
        take(guess, node, depth, children, 0.4 * logits if wrong == "wrong q" else logits)
        group = guess.siblings[node]
        tokens, probs = group.tokens, group.probs
        if wrong == "wrong q":
            probs = probabilities(logits, guess.pending.params)[0]
        elif wrong == "tested out of order" and len(tokens) > 1:
            tokens = tuple(sorted(tokens))
        elif wrong == "with replacement":
            assert probs is not None
            tokens = (tokens[0], guess.pending.draw(probs))
        guess.siblings[node] = Siblings(group.nodes, tokens, probs)
        guess.tokens.update(zip(group.nodes, tokens, strict=True))

    monkeypatch.setattr(Guess, "take", taken)
    params = rejection()
    joint = text_distribution(Watched(tiny_head(0, 1, 2), PAIR, 2), params)
    assert math.isclose(sum(joint.values()), 1.0)
    assert distance(joint, ar_distribution(2, params)) > 1e-3
