"""The verification maths: processed logits, shared noise, rejection sampling."""

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from models import walk
from torch import Tensor

from tidar import sampling
from tidar.errors import TidarError
from tidar.sampling import (
    RowParams,
    SamplingParams,
    choose,
    choose_rows,
    count_matches,
    gumbel_noise,
    probabilities,
    process,
    reject,
    seeded_draw,
)

INF = math.inf


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": 101.0},
        {"temperature": math.nan},
        {"temperature": INF},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": -1},
        {"seed": -1},
        {"seed": 2**63},
        {"sampling": "nucleus"},
        {"draft": "mean"},
    ],
)
def test_params_refuse(wrong: dict[str, Any]) -> None:
    with pytest.raises(TidarError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_params_modes() -> None:
    assert SamplingParams().greedy
    assert not SamplingParams(sampling="rejection").rejects
    assert SamplingParams(temperature=0.5, sampling="rejection").rejects
    assert not SamplingParams(temperature=0.5).rejects
    assert not SamplingParams(temperature=0.5).greedy


LOGITS = [math.log(p) for p in (0.1, 0.4, 0.05, 0.25, 0.2)]
TIES = [0.0, 1.0, 1.0, 1.0, -1.0]


@pytest.mark.parametrize(
    ("logits", "params", "kept"),
    [
        (LOGITS, {}, {0, 1, 2, 3, 4}),
        (LOGITS, {"top_k": 1}, {1}),
        (LOGITS, {"top_k": 3}, {1, 3, 4}),
        (LOGITS, {"top_k": 5}, {0, 1, 2, 3, 4}),
        (LOGITS, {"top_k": 50}, {0, 1, 2, 3, 4}),
        # Mass before a token, in order: 1: 0, 3: 0.4, 4: 0.65, 0: 0.85, 2: 0.95.
        (LOGITS, {"top_p": 1e-9}, {1}),
        (LOGITS, {"top_p": 0.39}, {1}),
        (LOGITS, {"top_p": 0.41}, {1, 3}),
        (LOGITS, {"top_p": 0.64}, {1, 3}),
        (LOGITS, {"top_p": 0.84}, {1, 3, 4}),
        (LOGITS, {"top_p": 0.94}, {0, 1, 3, 4}),
        (LOGITS, {"top_p": 0.96}, {0, 1, 2, 3, 4}),
        # top-k comes first: within {1, 3}, token 1 has 0.4 / 0.65 = 0.615.
        (LOGITS, {"top_k": 2, "top_p": 0.61}, {1}),
        (LOGITS, {"top_k": 2, "top_p": 0.62}, {1, 3}),
        # Of equal logits at the edge the lower ids stay.
        (TIES, {"top_k": 1}, {1}),
        (TIES, {"top_k": 2}, {1, 2}),
        (TIES, {"top_k": 4}, {0, 1, 2, 3}),
        ([2.0] * 5, {"top_k": 2}, {0, 1}),
        ([2.0] * 5, {"top_p": 0.5}, {0, 1, 2}),
        ([0.0, -INF, -INF, 0.0, -INF], {"top_k": 4}, {0, 3}),
        ([0.0, -INF, -INF, 0.0, -INF], {"top_p": 0.99}, {0, 3}),
    ],
)
def test_process_keeps(logits: list[float], params: dict[str, Any], kept: set[int]) -> None:
    out = process(torch.tensor([logits]), SamplingParams(temperature=1.0, **params))[0]
    assert out.dtype == torch.float32
    assert {i for i, value in enumerate(out.tolist()) if value > -INF} == kept
    for i in kept:
        assert out[i] == torch.tensor(logits[i])


def test_process_temperature_comes_first() -> None:
    """0.4, 0.25, 0.2 at temperature 2 are flatter, so top-p keeps more."""
    cold = process(torch.tensor([LOGITS]), SamplingParams(temperature=0.25, top_p=0.8))[0]
    assert torch.isfinite(cold).nonzero().flatten().tolist() == [1]
    hot = process(torch.tensor([LOGITS]), SamplingParams(temperature=4.0, top_p=0.8))[0]
    assert torch.isfinite(hot).sum() == 4
    torch.testing.assert_close(hot[1], torch.tensor(LOGITS[1] / 4))


def test_process_rows_are_independent() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=0.7, top_k=5, top_p=0.8)
    alone = torch.cat([process(row.unsqueeze(0), params) for row in logits])
    assert torch.equal(process(logits, params), alone)
    torch.testing.assert_close(
        probabilities(logits, params).sum(-1), torch.ones(6, dtype=torch.float64)
    )
    assert probabilities(logits, params).dtype == torch.float64


def test_noise_is_a_function_of_seed_position_and_token() -> None:
    positions = torch.tensor([0, 1, 2, 500, 2**31, 7])
    noise = gumbel_noise(3, positions, 50)
    assert noise.shape == (6, 50)
    assert noise.dtype == torch.float32
    assert torch.isfinite(noise).all()
    assert torch.equal(noise, gumbel_noise(3, positions, 50))
    for row in (5, 0, 3):  # alone, in another order, with another vocabulary
        assert torch.equal(gumbel_noise(3, positions[row : row + 1], 50)[0], noise[row])
    assert torch.equal(gumbel_noise(3, positions.flip(0), 50).flip(0), noise)
    assert torch.equal(gumbel_noise(3, positions, 20), noise[:, :20])
    assert torch.equal(gumbel_noise(3, positions, 80)[:, :50], noise)
    # Neither seed nor position nor token may be traded for another.
    assert noise.unique().numel() == noise.numel()
    assert not (gumbel_noise(4, positions, 50) == noise).any()
    assert torch.isfinite(gumbel_noise(2**63 - 1, positions, 50)).all()


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63 - 1])
def test_noise_is_gumbel(seed: int) -> None:
    """Kolmogorov-Smirnov against exp(-exp(-x)), mean and variance."""
    values = gumbel_noise(seed, torch.arange(400), 500).flatten().double().sort().values
    n = len(values)
    expected = torch.exp(-torch.exp(-values))
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max(float((expected - steps[:-1]).max()), float((steps[1:] - expected).max()))
    assert distance < 1.95 / math.sqrt(n)  # exceeded once in 1000
    assert abs(float(values.mean()) - 0.5772156649) < 4 * 1.2825 / math.sqrt(n)
    assert abs(float(values.var()) - math.pi**2 / 6) < 0.03


def test_noise_tail_is_fine() -> None:
    """The upper tail decides who wins: it must not end early or come in steps."""
    values = torch.cat([gumbel_noise(s, torch.arange(2000), 1000).flatten() for s in range(4)])
    n = values.numel()
    for level in (8.0, 11.0):
        expected = n * -math.expm1(-math.exp(-level))
        count = int((values > level).sum())
        assert abs(count - expected) < 4.5 * math.sqrt(expected), level
    top = values[values > 9.0]
    assert top.unique().numel() > 0.99 * top.numel()


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_noise_is_uncorrelated() -> None:
    """Between seeds, neighbouring positions and neighbouring tokens."""
    positions = torch.arange(300)
    noise = gumbel_noise(0, positions, 300)
    bound = 4.5 / math.sqrt(noise.numel() - 300)
    for seed in (1, 2, 3, 2**32, 2**62):
        assert abs(_correlation(noise, gumbel_noise(seed, positions, 300))) < bound
        shifted = gumbel_noise(seed, positions + 1, 300)
        assert abs(_correlation(noise, shifted)) < bound
    assert abs(_correlation(noise[1:], noise[:-1])) < bound
    assert abs(_correlation(noise[:, 1:], noise[:, :-1])) < bound
    assert abs(_correlation(noise[:-1, 1:], noise[1:, :-1])) < bound


@pytest.mark.parametrize(
    ("params", "dof"),
    [
        (SamplingParams(temperature=1.0, seed=5), 6),
        (SamplingParams(temperature=0.6, seed=6), 6),
        (SamplingParams(temperature=1.5, top_k=4, seed=7), 3),
        (SamplingParams(temperature=1.0, top_p=0.8, seed=8), 3),
    ],
)
def test_shared_noise_samples_the_softmax(params: SamplingParams, dof: int) -> None:
    """Chi-square of the choices at many positions, one seed: this is the AR sampler itself."""
    logits = torch.tensor([0.3, 1.2, -0.5, 0.9, 0.0, -1.0, 1.4])
    probs = probabilities(logits.unsqueeze(0), params)[0]
    assert int((probs > 0).sum()) == dof + 1
    count = 40_000
    chosen = choose(logits.expand(count, 7), params, torch.arange(count))
    seen = torch.bincount(chosen, minlength=7).double()
    assert (seen[probs == 0] == 0).all()
    expected = probs[probs > 0] * count
    chi_square = float(((seen[probs > 0] - expected) ** 2 / expected).sum())
    assert chi_square < dof + 4 * math.sqrt(2 * dof) + 4


def test_shared_noise_is_independent_from_position_to_position() -> None:
    """Pairs of neighbouring choices have the product distribution."""
    logits, count = torch.tensor([0.0, 0.7, -0.4]), 60_000
    params = SamplingParams(temperature=1.0, seed=11)
    probs = probabilities(logits.unsqueeze(0), params)[0]
    chosen = choose(logits.expand(count, 3), params, torch.arange(count))
    pairs = torch.bincount(chosen[:-1] * 3 + chosen[1:], minlength=9).double()
    expected = torch.outer(probs, probs).flatten() * (count - 1)
    assert float(((pairs - expected) ** 2 / expected).sum()) < 8 + 4 * 4 + 4


def test_choose() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, -INF, 1.0]])
    assert choose(logits, SamplingParams(), torch.tensor([4, 9])).tolist() == [1, 0]
    params = SamplingParams(temperature=1.0, seed=1)
    both = choose(logits, params, torch.tensor([4, 9])).tolist()
    alone = [
        int(choose(logits[i : i + 1], params, torch.tensor([position]))[0])
        for i, position in enumerate((4, 9))
    ]
    assert both == alone
    # The noise is that of the position: by hand.
    noise = gumbel_noise(1, torch.tensor([4]), 3)[0]
    assert both[0] == int((logits[0] + noise).argmax())


@pytest.mark.parametrize(
    ("draft", "choices", "accepted"),
    [
        ([7], [1], 1),
        ([7, 1], [1, 2], 2),
        ([7, 1], [2, 1], 1),
        ([7, 1, 2], [1, 3, 2], 2),
        ([7, 1, 2], [0, 2, 9], 1),
        ([7, 1, 2, 3], [1, 2, 3, 4], 4),
        ([7, 7, 7], [7, 7, 7], 3),
    ],
)
def test_count_matches(draft: list[int], choices: list[int], accepted: int) -> None:
    assert count_matches(draft, choices) == accepted


def random_probs(rows: int, seed: int, *, holes: bool) -> Tensor:
    """`[rows, 5]`, with impossible tokens when `holes`."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(rows, 5, dtype=torch.float64, generator=generator) ** 2
    if holes:
        weights *= torch.rand(rows, 5, generator=generator) > 0.4
        weights[:, seed % 5] += 0.1
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_reject_is_exact(seed: int, length: int, holes: bool) -> None:
    """Whatever q is, the first emitted token has the distribution p, and so has the next given it.

    Here p depends on the position only, so the joint distribution of what is emitted is a product.
    """
    target = random_probs(length, seed, holes=holes)
    proposal = random_probs(length - 1, seed + 100, holes=holes)
    joint: Counter[tuple[int, ...]] = Counter()

    def run(draw: Any) -> tuple[int, ...]:
        draft = [4, *(draw(row) for row in proposal)]
        n, token = reject(draft, proposal, target, draw)
        assert 1 <= n <= length
        emitted = [*draft[1:n], token]
        while len(emitted) < length:  # AR goes on where the draft was left
            emitted.append(draw(target[len(emitted)]))
        return tuple(emitted)

    for weight, emitted in walk(run):
        joint[emitted] += weight
    for tokens in itertools.product(range(5), repeat=length):
        expected = math.prod(float(target[i, token]) for i, token in enumerate(tokens))
        assert joint[tokens] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_reject_one_hot_is_exact(seed: int) -> None:
    """A draft that was not drawn at all: accepted with p(d), else drawn from p without d."""
    target = random_probs(3, seed, holes=seed > 0)
    for draft in itertools.product([2], range(5), range(5)):
        joint: Counter[tuple[int, ...]] = Counter()

        def run(draw: Any, draft: tuple[int, ...] = draft) -> tuple[int, ...]:
            n, token = reject(draft, None, target, draw)
            emitted = [*draft[1:n], token]
            while len(emitted) < 3:
                emitted.append(draw(target[len(emitted)]))
            return tuple(emitted)

        for weight, emitted in walk(run):
            joint[emitted] += weight
        for tokens in itertools.product(range(5), repeat=3):
            expected = math.prod(float(target[i, token]) for i, token in enumerate(tokens))
            assert joint[tokens] == pytest.approx(expected, abs=1e-12)


def test_reject_accepts_as_often_as_can_be() -> None:
    """The acceptance rate is the overlap of p and q, which no exact rule exceeds."""
    target, proposal = random_probs(2, 1, holes=False), random_probs(1, 2, holes=False)

    def run(draw: Any) -> int:
        return reject([0, draw(proposal[0])], proposal, target, draw)[0]

    rate = sum(weight for weight, n in walk(run) if n == 2)
    assert rate == pytest.approx(float(torch.minimum(target[0], proposal[0]).sum()), abs=1e-12)


def test_reject_accepts_its_own_distribution() -> None:
    target = random_probs(2, 3, holes=True)

    def run(draw: Any) -> int:
        return reject([0, draw(target[0])], target[:1], target, draw)[0]

    assert {n for _, n in walk(run)} == {2}


def test_seeded_draw() -> None:
    probs = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0], dtype=torch.float64)
    draw, again, other = seeded_draw(3), seeded_draw(3), seeded_draw(4)
    drawn = [draw(probs) for _ in range(5000)]
    assert drawn == [again(probs) for _ in range(5000)]
    assert drawn != [other(probs) for _ in range(5000)]
    counts = Counter(drawn)
    assert set(counts) == {1, 3, 4}
    chi_square = sum((counts[i] - 5000 * float(probs[i])) ** 2 / (5000 * probs[i]) for i in counts)
    assert float(chi_square) < 15


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.2, 0.7, 1.0 - 2.0**-53])
def test_seeded_draw_never_gives_the_impossible(
    uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even at the very ends of the unit interval, or where the sum is rounded."""
    value = torch.tensor(uniform, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: value)
    draw = seeded_draw(0)
    thirds = torch.tensor([0.0, *[1 / 7] * 7, 0.0, 0.0], dtype=torch.float64)
    for probs in (
        thirds,
        torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0], dtype=torch.float64),
        torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64),
        torch.tensor([1.0, 0.0], dtype=torch.float64),
        torch.tensor([0.1] * 10 + [0.0], dtype=torch.float64),
    ):
        assert float(probs[draw(probs)]) > 0.0


def test_rows_of_different_requests_choose_as_each_would_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    every = [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=7),
        SamplingParams(temperature=0.7, seed=2**62 + 5, top_k=4),
        SamplingParams(temperature=1.3, seed=7, top_p=0.6),
        SamplingParams(temperature=0.9, seed=1, top_k=6, top_p=0.8),
    ]
    logits = 3 * torch.randn(40 * len(every), 31, generator=generator)
    logits[:, 4] = -torch.inf
    logits[:, 9] = logits[:, 8]  # ties
    rows = [every[i % len(every)] for i in range(len(logits))]
    positions = torch.arange(len(logits)) * 5 + 2
    expected = torch.cat(
        [choose(logits[i : i + 1], p, positions[i : i + 1]) for i, p in enumerate(rows)]
    )
    params = RowParams(
        torch.tensor([p.temperature for p in rows]),
        torch.tensor([p.seed for p in rows]),
        torch.tensor([p.top_k for p in rows]),
        torch.tensor([p.top_p for p in rows]),
    )
    assert torch.equal(choose_rows(logits, params, positions), expected)
    plain = [i for i, p in enumerate(rows) if p.top_k == 0 and p.top_p == 1.0]
    params = RowParams(params.temperatures[plain], params.seeds[plain])
    assert torch.equal(choose_rows(logits[plain], params, positions[plain]), expected[plain])


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 6, 7, 8, 13, 31])
def test_rows_are_chosen_a_few_at_a_time(
    count: int, filtered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of up to six rows, one row, or all at once: the same tokens, each by its own parameters."""
    generator = torch.Generator().manual_seed(count)
    logits = (3 * torch.randn(count, 60, generator=generator)).bfloat16()
    rows = torch.arange(count)
    positions = torch.randint(0, 2**40, (count,), generator=generator)
    params = RowParams(rows % 4 * 0.5, positions.flip(0))
    if filtered:
        params = RowParams(
            params.temperatures, params.seeds, rows % 3 * 7, 1.0 - (rows % 5).float() * 0.2
        )
    expected = sampling._choose_at_once(logits, params, positions)
    seen: list[int] = []
    choose_at_once = sampling._choose_at_once

    def counted(some: Tensor, *rest: Any) -> Tensor:
        seen.append(len(some))
        return choose_at_once(some, *rest)

    monkeypatch.setattr(sampling, "_choose_at_once", counted)
    for most in (6, 1, 1000):
        seen.clear()
        monkeypatch.setattr(sampling, "CHOOSING_BYTES", most * 60 * sampling.BYTES_PER_LOGIT + 1)
        assert torch.equal(choose_rows(logits, params, positions), expected)
        assert sum(seen) == count
        assert len(seen) == max(1, -(-count // most))
        assert max(seen) - min(seen) <= 1
    monkeypatch.setattr(sampling, "CHOOSING_BYTES", 1)  # less than a row needs
    assert torch.equal(choose_rows(logits, params, positions), expected)
