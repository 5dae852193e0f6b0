"""Masked diffusion: the whole text at once, some masks settled in each of a fixed number of passes.

LLaDA (Nie et al., arXiv 2502.09992, section 2.4 and appendix A.3; low-confidence remasking, spans from left to
right) and Dream (Ye et al., arXiv 2508.15487; the options `alg` of its `diffusion_generate`). Every row sees
every row, prompt, text and the masks that are still to come, so no key or value outlives a pass: each one
runs everything, and the length of the text is fixed in advance.

Not AR's text. Any checkpoint with a mask token runs; how good the text is depends on what it was trained for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from tidar.errors import TidarError
from tidar.layout import Schedule
from tidar.methods import Draft, Pending, Project, Step, Verdict
from tidar.methods.choices import Cell, gather
from tidar.methods.denoise import check_unverified, noise_of_pass, probability_of, propose
from tidar.sampling import SamplingParams, gumbel_noise, process

Order = Literal["low-confidence", "random", "origin", "maskgit_plus", "topk_margin", "entropy"]
"""Which open rows settle first. LLaDA's `remasking`, then Dream's `alg`, by their own names."""

ORDERS: tuple[Order, ...] = get_args(Order)
LLADA: tuple[Order, ...] = ("low-confidence", "random")

EPS = 1e-3
"""Where Dream's time ends, the default of its `eps`."""


def llada_count(length: int, steps: int, done: int) -> int:
    """How many rows of a span of `length` settle in pass `done`: an even share, the first passes one more."""
    return length // steps + (done < length % steps)


def dream_share(steps: int, done: int) -> float:
    """The share of open rows that settle in pass `done`: 1 - s/t, t and s neighbours of an even walk from 1 to EPS."""
    if done >= steps - 1:
        return 1.0
    t, s = (1 - (1 - EPS) * number / steps for number in (done, done + 1))
    return 1 - s / t


def uniform(params: SamplingParams, positions: Sequence[int], passes: int) -> Tensor:
    """A number of [0, 1) for each position in this pass, float32 `[M]`; not the noise that tokens get."""
    other = noise_of_pass(noise_of_pass(params, passes), passes)
    noise = gumbel_noise(other.seed, torch.tensor(positions), 1).squeeze(-1)
    return torch.exp(-torch.exp(-noise))  # Gumbel's distribution function


def confidence(order: Order, logits: Tensor, tokens: Tensor, params: SamplingParams) -> Tensor:
    """How sure each open row is of its token, float32 `[M]`: the highest settle first.

    LLaDA looks at the model's own distribution, Dream at the one that tokens are drawn from (temperature,
    top-k and top-p in it).
    """
    if order == "low-confidence":
        return probability_of(tokens, logits)
    logits = process(logits, replace(params, temperature=params.temperature or 1.0))
    if order == "maskgit_plus":
        return probability_of(tokens, logits)
    probs = logits.softmax(dim=-1)
    if order == "topk_margin":
        best = probs.topk(2, dim=-1).values
        return best[:, 0] - best[:, 1]
    assert order == "entropy"
    return (probs * (probs + 1e-10).log()).sum(dim=-1)


def settle(
    order: Order,
    logits: Tensor,
    tokens: Tensor,
    params: SamplingParams,
    positions: Sequence[int],
    *,
    length: int,
    steps: int,
    done: int,
) -> Tensor:
    """Which of the open rows keep their token in pass `done` of `steps` over a span, bool `[M]`.

    logits `[M, V]`, tokens and positions `[M]`: of the open rows. length: rows of the span, open at first.
    """
    count = len(positions)
    if order == "origin":
        share = dream_share(steps, done)
        return (uniform(params, positions, done) < share) | (share == 1.0)
    if order in LLADA:
        number = llada_count(length, steps, done)
    else:
        number = int(count * dream_share(steps, done))
    if order == "random":
        rank = uniform(params, positions, done)
    else:
        rank = confidence(order, logits, tokens, params).cpu()
    keep = torch.zeros(count, dtype=torch.bool)
    keep[rank.argsort(descending=True, stable=True)[:number]] = True
    return keep


@dataclass(frozen=True, slots=True)
class Writing:
    """The span under way: its tokens, the mask token where it is open, and how many passes it has had."""

    tokens: tuple[int, ...]
    passes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeStep(Step):
    """spans: the span of each sequence; it stands behind the certain tokens. More masks stand behind it."""

    spans: tuple[Writing, ...]


@dataclass(frozen=True, slots=True)
class MaskedDiffusion:
    """The method; `schedule.draft_len` is the length of a span, and one that covers the text is Dream's way.

    steps: passes over a span; at most one for each row. order: see `Order`. shift: the row before a
    position predicts it, as in an autoregressive model (Dream was trained so, LLaDA was not).
    """

    mask_token_id: int
    steps: int
    order: Order = "low-confidence"
    shift: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise TidarError(f"steps is {self.steps}; it must be at least 1.")
        if self.order not in ORDERS:
            raise TidarError(f"order is {self.order!r}; it must be one of {', '.join(ORDERS)}.")

    def check(self, params: SamplingParams, *, forced: bool) -> None:
        """See `Method`."""
        check_unverified("masked-diffusion", params, forced=forced)

    def release(self, request_id: int) -> None:
        """See `Method`. Nothing is kept."""

    def step(self, pending: Sequence[Pending], schedule: Schedule) -> WholeStep:
        """See `Method`. Nothing ever commits, so a draft is the whole text so far, and no pass is a prefill."""
        assert all(p.prefix_len == 0 for p in pending)
        sizes = [min(p.draft.certain + p.left, p.limit) for p in pending]
        spans = tuple(
            self._span(p, size, schedule.draft_len) for p, size in zip(pending, sizes, strict=True)
        )
        width = max(sizes)
        ids = torch.full((len(pending), width), self.mask_token_id)
        for row, p, span in zip(ids, pending, spans, strict=True):
            known = (*p.draft.tokens, *span.tokens)
            row[: len(known)] = torch.tensor(known)
        visible = torch.ones(width, width, dtype=torch.bool)
        if min(sizes) < width:  # rows behind a shorter text see themselves alone
            inside = torch.arange(width) < torch.tensor(sizes).unsqueeze(1)
            visible = (inside.unsqueeze(2) & inside.unsqueeze(1)) | torch.eye(width).bool()
        return WholeStep(
            pending=tuple(pending),
            ids=ids,
            positions=torch.arange(width).expand(len(pending), width),
            visible=visible,
            rows=tuple(sizes),
            spans=spans,
        )

    def _span(self, p: Pending, size: int, length: int) -> Writing:
        if isinstance(p.draft.working, Writing):
            return p.draft.working
        return Writing((self.mask_token_id,) * min(length, size - p.draft.certain))

    def resolve(self, step: WholeStep, hidden: Tensor, project: Project) -> list[Verdict]:
        """See `Method`. Projects the open rows of the spans alone."""
        return [self._verdict(step, index, hidden, project) for index in range(len(step.spans))]

    def _verdict(self, step: WholeStep, index: int, hidden: Tensor, project: Project) -> Verdict:
        p, span = step.pending[index], step.spans[index]
        first = p.draft.certain
        places = [
            first + row for row, token in enumerate(span.tokens) if token == self.mask_token_id
        ]
        cells = [Cell(index, place - self.shift, place) for place in places]
        logits = project(gather(hidden, cells))
        tokens = propose(logits, p.params, places, span.passes)
        length = len(span.tokens)
        steps = min(self.steps, length)
        keep = settle(
            self.order, logits, tokens, p.params, places,
            length=length, steps=steps, done=span.passes,
        )  # fmt: skip
        written = list(span.tokens)
        for place, token, kept in zip(places, tokens.tolist(), keep.tolist(), strict=True):
            if kept:
                written[place - first] = token
        done = tuple(written)
        count = int(keep.sum())
        if self.mask_token_id in done:
            after = replace(p.draft, working=Writing(done, span.passes + 1))
            return Verdict(0, after, tried=len(places), settled=count)
        text = (*p.draft.tokens, *done)
        ended = len(text) >= p.limit
        return Verdict(0, Draft(text, len(text)), tried=len(places), settled=count, ended=ended)
