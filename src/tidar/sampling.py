"""Choosing tokens from logits, and verifying drafts: pure functions, randomness always an argument.

Two exact ways to sample (README, "Exactness"):

- shared noise (default): the token at position p is the arg-max of processed logits plus Gumbel noise
  drawn from (seed, p). The drafter uses the same noise, and a draft token is accepted iff it is the
  causal model's own choice. The text equals plain AR with the same seed, token for token.
- rejection: min(1, p/q) with residual max(p - q, 0) (Leviathan et al., arXiv 2211.17192), exact in
  distribution; here q is the distribution the draft token was really drawn from.

Shapes: N rows, V vocabulary entries.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tidar.errors import TidarError

Draw = Callable[[Tensor], int]
"""Draws an index from a probability vector; tests pass one that walks every branch."""

MIN_TEMPERATURE = 1e-5
"""Logits divided by less would overflow float32, and several of them become one infinity."""

CHOOSING_BYTES = 64 << 20
"""Memory that `choose_rows` takes beside the logits at most, or what one row needs where that is more."""

BYTES_PER_LOGIT = 64
"""What choosing holds for a logit at a time, rounded up: 48 bytes inside a GPU's stable sort, 31 elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen from the causal logits.

    temperature: 0 is greedy. top_k: 0 keeps all. top_p: 1.0 keeps all. seed: of the noise or the draws.
    sampling: "shared-noise" or "rejection" (differ only at temperature > 0).
    draft: with rejection, whether draft tokens are drawn ("sample") or the arg-max ("argmax", one-hot q).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    sampling: Literal["shared-noise", "rejection"] = "shared-noise"
    draft: Literal["sample", "argmax"] = "sample"

    def __post_init__(self) -> None:
        if self.temperature != 0.0 and not MIN_TEMPERATURE <= self.temperature <= 100.0:
            raise TidarError(
                f"temperature is {self.temperature}; it must be 0 (greedy), or from "
                f"{MIN_TEMPERATURE} to 100."
            )
        if not 0.0 < self.top_p <= 1.0:
            raise TidarError(
                f"top_p is {self.top_p}; it must be above 0 and at most 1 (keeps all)."
            )
        if self.top_k < 0:
            raise TidarError(f"top_k is {self.top_k}; it must be 0 (keeps all) or more.")
        if not 0 <= self.seed < 2**63:
            raise TidarError(f"seed is {self.seed}; it must be from 0 to 2**63 - 1.")
        if self.sampling not in ("shared-noise", "rejection"):
            raise TidarError(
                f"sampling is {self.sampling!r}; it must be 'shared-noise' or 'rejection'."
            )
        if self.draft not in ("sample", "argmax"):
            raise TidarError(f"draft is {self.draft!r}; it must be 'sample' or 'argmax'.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def rejects(self) -> bool:
        """Whether verification is by rejection sampling rather than by comparing choices."""
        return self.sampling == "rejection" and not self.greedy


def process(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits after temperature, top-k and top-p, float32 `[N, V]`; dropped entries are -inf.

    For temperature > 0 only. Of equal logits at the edge of top-k or top-p the lower token ids stay.
    """
    scaled = logits.float() / params.temperature
    if params.top_k == 0 and params.top_p == 1.0:
        return scaled
    return _filtered(scaled, params.top_k, params.top_p)


def _filtered(scaled: Tensor, top_k: int | Tensor, top_p: float | Tensor) -> Tensor:
    """`scaled` `[N, V]` with what top-k (0 keeps all) and top-p drop at -inf; numbers, or tensors `[N, 1]`."""
    ordered, order = torch.sort(scaled, dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[-1], device=scaled.device)
    drop = (rank >= top_k) & (torch.as_tensor(top_k, device=scaled.device) > 0)
    probs = ordered.masked_fill(drop, -torch.inf).softmax(dim=-1)
    # A token stays while the mass before it is under top_p; the first one always does.
    beyond = probs.cumsum(dim=-1) - probs >= top_p
    drop = drop | (beyond & (torch.as_tensor(top_p, device=scaled.device) < 1.0))
    drop = drop & (rank > 0)
    return scaled.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)


def _signed(value: int) -> int:
    """A 64-bit pattern as the signed integer torch stores it in."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def mix(state: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on int64 bit patterns; multiplication wraps."""
    state = (state ^ ((state >> 30) & (2**34 - 1))) * _MIX_1
    state = (state ^ ((state >> 27) & (2**37 - 1))) * _MIX_2
    return state ^ ((state >> 31) & (2**33 - 1))


def uniform(*counters: Tensor | int) -> Tensor:
    """A uniform number in [0, 1), float32: a hash of the counters, which broadcast.

    The same on every device. Each counter is mixed in separately, so that none trades for another.
    """
    state: Tensor = torch.zeros((), dtype=torch.int64)
    for counter in counters:
        if isinstance(counter, Tensor) and state.dim() == 0:
            state = state.to(counter.device)
        state = mix(state + counter + 0x5851F42D4C957F2D)
    return ((state >> 40) & (2**24 - 1)).float() * 2.0**-24


def gumbel_noise(seed: int | Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise, float32 `[N, V]`: a fixed function of (seed, position, token id).

    Counter-based, so it does not depend on batch, device, order of calls or how a token came to be
    drafted: that is what lets drafter and verifier share it. positions: int64 `[N]`; seed: a number, or
    int64 `[N]`.
    """
    tokens = torch.arange(vocab_size, device=positions.device)
    # Seed and position are mixed separately first, so that neither can be traded for the other.
    if isinstance(seed, Tensor):
        start = seed * _GOLDEN + 1
    else:
        start = torch.tensor(_signed(seed * 0x9E3779B97F4A7C15 + 1), device=positions.device)
    rows = mix(mix(start) + positions * _MIX_1)
    bits = mix(rows.unsqueeze(-1) + (tokens + 1) * _GOLDEN)
    # u is uniform in [0, 1) with fine steps near 0; the noise is -log(-log(1 - u)), so that its upper
    # tail, which decides who wins, is the part with full resolution.
    uniform = ((bits >> 11) & (2**53 - 1)).float() * 2.0**-53
    exponential = -torch.log1p(-uniform.clamp(2.0**-53, 1 - 2.0**-24))
    return -exponential.log()


def choose(
    logits: Tensor, params: SamplingParams, positions: Tensor, seeds: Tensor | None = None
) -> Tensor:
    """The model's choice for each row, int64 `[N]`: arg-max, with shared noise at temperature > 0.

    logits: `[N, V]`; positions: int64 `[N]`, of the tokens that are chosen; seeds: int64 `[N]`, instead of that
    of `params`.
    """
    return scores(logits, params, positions, seeds).argmax(dim=-1)


def scores(
    logits: Tensor, params: SamplingParams, positions: Tensor, seeds: Tensor | None = None
) -> Tensor:
    """What `choose` takes the best of, `[N, V]`: the first w of a row are w tokens drawn without replacement."""
    if params.greedy:
        return logits
    seed = params.seed if seeds is None else seeds
    return process(logits, params) + gumbel_noise(seed, positions, logits.shape[-1])


@dataclass(frozen=True, slots=True)
class RowParams:
    """`SamplingParams` of N rows side by side, tensors `[N]` on the device of the logits.

    temperatures: float32, 0 is greedy. seeds: int64. top_k, top_p: int64 and float32, or None where no
    row drops any token.
    """

    temperatures: Tensor
    seeds: Tensor
    top_k: Tensor | None = None
    top_p: Tensor | None = None

    def split(self, count: int) -> "Iterator[RowParams]":
        """The same rows in `count` parts, of sizes that differ by one at most."""
        each = (
            [None] * count if values is None else values.tensor_split(count)
            for values in (self.top_k, self.top_p)
        )
        always = (values.tensor_split(count) for values in (self.temperatures, self.seeds))
        return (RowParams(*part) for part in zip(*always, *each, strict=True))


def process_rows(logits: Tensor, params: RowParams) -> Tensor:
    """`process` for rows `[N, V]` of different requests; what greedy rows hold is of no use."""
    greedy = params.temperatures == 0.0
    scaled = logits.float() / torch.where(greedy, 1.0, params.temperatures).unsqueeze(-1)
    if params.top_k is not None and params.top_p is not None:
        return _filtered(scaled, params.top_k.unsqueeze(-1), params.top_p.unsqueeze(-1))
    return scaled


def choose_rows(logits: Tensor, params: RowParams, positions: Tensor) -> Tensor:
    """`choose` for rows of different requests, int64 `[N]`, without a look at any value.

    logits: `[N, V]`; positions: int64 `[N]`, of the tokens that are chosen. So many rows are taken at a time as
    `CHOOSING_BYTES` are enough for; how many that is follows from the shape, so a CUDA graph can hold it.
    """
    most = max(1, CHOOSING_BYTES // (BYTES_PER_LOGIT * logits.shape[-1]))
    # Parts of even sizes: a GPU adds up a row that is left alone in another order, and rounds otherwise.
    count = -(-len(logits) // most)
    if count <= 1:
        return _choose_at_once(logits, params, positions)
    parts = zip(
        logits.tensor_split(count), params.split(count), positions.tensor_split(count), strict=True
    )
    return torch.cat([_choose_at_once(*part) for part in parts])


def _choose_at_once(logits: Tensor, params: RowParams, positions: Tensor) -> Tensor:
    """`choose_rows` where there is memory for all rows."""
    scaled = process_rows(logits, params)
    drawn = (scaled + gumbel_noise(params.seeds, positions, logits.shape[-1])).argmax(dim=-1)
    return torch.where(params.temperatures == 0.0, logits.argmax(dim=-1), drawn)


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution the parameters define over processed logits, float64 `[N, V]` on the CPU."""
    return process(logits, params).double().softmax(dim=-1).cpu()


def count_matches(draft: Sequence[int], choices: Sequence[int]) -> int:
    """How many tokens of the draft commit when a token is accepted iff it is the model's own choice.

    draft: d[0..L-1], d[0] certain. choices: the choice after each draft row; choices[i] is for the
    position of d[i + 1]. Returns n in 1..L.
    """
    accepted = 1
    while accepted < len(draft) and draft[accepted] == choices[accepted - 1]:
        accepted += 1
    return accepted


def reject(
    draft: Sequence[int], draft_probs: Tensor | None, target_probs: Tensor, draw: Draw
) -> tuple[int, int]:
    """Rejection sampling of a draft: returns (n, the token after the n committed ones).

    draft: d[0..L-1], d[0] certain.
    draft_probs: float64 `[L - 1, V]`, row i the distribution d[i + 1] was drawn from; None when each was
        an arg-max (then q is one-hot: accept with probability p(d), residual p without d).
    target_probs: float64 `[L, V]`, row i the causal distribution after d[i].
    """
    for i in range(1, len(draft)):
        probs = None if draft_probs is None else draft_probs[i - 1]
        passed, token = reject_siblings(draft[i : i + 1], probs, target_probs[i - 1], draw)
        if passed is None:
            return i, token
    return len(draft), draw(target_probs[len(draft) - 1])


def reject_siblings(
    tokens: Sequence[int], draft_probs: Tensor | None, target_probs: Tensor, draw: Draw
) -> tuple[int | None, int]:
    """Rejection sampling of several drafts for one position: which of them passed, and the token there.

    Each in turn is tested as if alone, against what the earlier ones have left of the target: after a
    rejection p becomes max(p - q, 0), scaled up, and q loses the token, since the next one was drawn
    without replacement. So the token has the target's distribution however many there are (SpecInfer,
    arXiv 2305.09781, algorithm 2; without replacement: arXiv 2402.14160).

    tokens: drawn one after the other from `draft_probs`, float64 `[V]`, without replacement; where that
        is None each was fixed beforehand (then q is one-hot).
    target_probs: float64 `[V]`, the causal distribution. None of `tokens` passed: the first of the result
        is None.
    """
    target, rest = target_probs, draft_probs
    for i, token in enumerate(tokens):
        if rest is None:
            chosen = torch.zeros_like(target)
            chosen[token] = 1.0
        else:
            chosen = rest / rest.sum()
            rest = rest.index_fill(0, torch.tensor([token]), 0.0)
        accept = min(1.0, float(target[token] / chosen[token]))
        if draw(torch.tensor([1.0 - accept, accept], dtype=torch.float64)) == 1:
            return i, token
        left = (target - chosen).clamp(min=0)
        # Where p and q are equal but for rounding nothing would be left.
        target = left / left.sum() if float(left.sum()) > 0 else target
    return None, draw(target)


def seeded_draw(seed: int) -> Draw:
    """A `Draw` of its own random stream, by inverting the cumulative distribution."""
    generator = torch.Generator().manual_seed(seed)

    def draw(probs: Tensor) -> int:
        uniform = torch.rand((), dtype=torch.float64, generator=generator)
        # `right` and the clamp: an entry of probability 0 is never drawn, whatever the rounding.
        index = int(torch.searchsorted(probs.cumsum(0), uniform * probs.sum(), right=True))
        return min(index, int(probs.nonzero()[-1]))

    return draw
