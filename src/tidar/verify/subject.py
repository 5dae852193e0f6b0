"""What is verified, what is expected of it, and how a finding is written down."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tidar.decode.compare import (
    causal_logits,
    first_difference,
    largest_difference,
    logit_scale,
    near_tie_margin,
    rounding_noise,
)
from tidar.decode.engine import Engine, FixedPlan
from tidar.decode.request import Request
from tidar.layout import Schedule, dense_schedule, two_forward
from tidar.methods import Draft, Method, Pending, Project, Step, Verdict
from tidar.methods.tidar import Tidar
from tidar.model import Transformer
from tidar.sampling import SamplingParams, choose

FLOAT_TOLERANCE = 1e-5
"""Floats are equal within this, times the largest value of the tensor where that is above 1."""

PROMPTS = (
    "Once upon a time, there was a little",
    "def add(a, b):\n    return a + b\n\ndef sub(",
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
)
"""What is decoded where the user gives no prompts."""


@dataclass(slots=True)
class Finding:
    """What checking one law found. worst: largest float difference, relative."""

    law: str
    claim: str
    checked: str = ""
    verdict: Literal["pass", "fail", "skip"] = "pass"
    worst: float | None = None
    tokens: int = 0
    excused: int = 0
    reason: str = ""

    def floats(self, got: Tensor, expected: Tensor, tolerance: float) -> None:
        """Takes in a comparison of floats, relative to the largest finite one (at least 1)."""
        finite = expected[expected.isfinite()].abs()
        scale = max(1.0, float(finite.max()) if finite.numel() else 1.0)
        difference = largest_difference(got, expected) / scale
        self.worst = max(self.worst or 0.0, difference)
        if not difference <= tolerance:  # not `>`: NaN is a failure
            self.fail(f"floats differ by {difference:.1e}, allowed are {tolerance:.1e}")

    def skip(self, reason: str) -> None:
        self.verdict, self.reason = "skip", reason

    def fail(self, reason: str) -> None:
        self.verdict = "fail"
        self.reason = self.reason or reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is verified, and how thoroughly.

    tolerance: of floats, relative; near_tie: margin under which a token difference is excused. Both
    grow with the rounding noise that the plain causal model shows on this machine.
    """

    model: Transformer
    prompts: tuple[tuple[int, ...], ...]
    schedules: tuple[Schedule, ...]
    params: tuple[SamplingParams, ...]
    max_new_tokens: int
    tolerance: float
    near_tie: float
    folder: Path | None = None
    make_method: Callable[[int], Method[Any]] = Tidar
    expected: dict[tuple[Any, ...], list[int]] = field(default_factory=dict)

    @property
    def mask(self) -> int | None:
        return self.model.config.mask_token_id

    def engine(self, schedule: Schedule, max_batch: int = 1) -> Engine:
        method = self.make_method(self.mask or 0)
        return Engine(self.model, method, FixedPlan(schedule), max_batch=max_batch)

    def text(self, prompt: tuple[int, ...], params: SamplingParams) -> list[int]:
        """What AR decoding writes, from plain causal passes; computed once."""
        key = (prompt, params)
        if key not in self.expected:
            self.expected[key] = plain_text(self.model, prompt, self.max_new_tokens, params)
        return self.expected[key]

    def compare(
        self, finding: Finding, prompt: tuple[int, ...], params: SamplingParams,
        expected: Sequence[int], got: Sequence[int], what: str,
    ) -> None:  # fmt: skip
        """Takes a comparison of two texts into `finding`."""
        finding.tokens += len(expected)
        found = first_difference(self.model, prompt, expected, got, params, self.near_tie)
        if found is None:
            return
        if found.excused:
            finding.excused += 1
        else:
            finding.fail(
                f"{what}: token {found.index} is {found.got}, expected {found.expected} "
                f"(margin {found.margin:.1e})"
            )

    def cases(self) -> Iterator[tuple[tuple[int, ...], SamplingParams]]:
        return ((prompt, params) for params in self.params for prompt in self.prompts)


def make_subject(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    draft_lens: Sequence[int] = (),
    quick: bool = False,
    folder: Path | None = None,
    make_method: Callable[[int], Method[Any]] = Tidar,
) -> Subject:
    """A subject with schedules and seeds that fit the checkpoint; prompts are cut to fit."""
    longest = max(8, min(48, model.config.max_positions // 4))
    cut = tuple(tuple(prompt[:longest]) for prompt in prompts)[: 2 if quick else None]
    room = model.config.max_positions - max(map(len, cut)) - 1
    longest_prompt = max(cut, key=len)
    noise = rounding_noise(model, longest_prompt)
    scale, dtype = logit_scale(model, longest_prompt), model.embed.weight.dtype
    narrow = 0.0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    lens = sorted({2, 4, *(draft_lens or (8,))} if not quick else {2, max(draft_lens, default=4)})
    schedules = [dense_schedule(k) for k in lens]
    if not quick:
        schedules += [Schedule(k, (1,)) for k in lens if k > 2]
        schedules += [Schedule(k, (1, 2, k)) for k in lens if k > 2]
        schedules += [two_forward(max(lens))]
    params = [SamplingParams(), SamplingParams(temperature=0.8, seed=1)]
    if not quick:
        params += [SamplingParams(temperature=1.0, top_p=0.9, top_k=20, seed=2)]
    return Subject(
        model=model,
        prompts=cut,
        schedules=tuple(schedules),
        params=tuple(params),
        max_new_tokens=max(1, min(16 if quick else 32, room)),
        tolerance=max(FLOAT_TOLERANCE, 4 * noise / scale, narrow),
        near_tie=max(near_tie_margin(model, longest_prompt), 4 * noise),
        folder=folder,
        make_method=make_method,
    )


def plain_text(
    model: Transformer, prompt: Sequence[int], count: int, params: SamplingParams
) -> list[int]:
    """AR decoding as its definition: a whole causal pass for every token."""
    ids = list(prompt)
    for _ in range(min(count, model.config.max_positions - len(prompt) + 1)):
        position = torch.tensor([len(ids)], device=model.embed.weight.device)
        ids.append(int(choose(causal_logits(model, ids)[-1:], params, position)))
    return ids[len(prompt) :]


def decode(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """Texts of the requests, in their order."""
    texts: dict[int, list[int]] = {engine.submit(request): [] for request in requests}
    for event in engine.run():
        texts[event.request_id] += event.ids
    return list(texts.values())


def request_of(subject: Subject, prompt: tuple[int, ...], params: SamplingParams) -> Request:
    """The request for one of the subject's cases."""
    return Request(prompt=prompt, max_new_tokens=subject.max_new_tokens, params=params)


@dataclass(slots=True)
class Scripted:
    """Mutable: a method whose drafts follow a known text for a set number of tokens, then leave it.

    A model that drafts badly accepts one token a step; this forces every accept count in turn.
    """

    inner: Method[Any]
    text: Sequence[int]
    draft_len: int
    vocab: int
    counts: Iterator[int] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = cycle(range(1, self.draft_len + 1))

    def check(self, params: SamplingParams, *, forced: bool) -> None:
        self.inner.check(params, forced=forced)

    def release(self, request_id: int) -> None:
        self.inner.release(request_id)

    def step(self, pending: Sequence[Pending], schedule: Schedule) -> Step:
        step: Step = self.inner.step(pending, schedule)
        return step

    def resolve(self, step: Step, hidden: Tensor, project: Project) -> list[Verdict]:
        return [
            replace(verdict, draft=self._script(p.prefix_len + verdict.accepted, verdict.draft))
            for p, verdict in zip(
                step.pending, self.inner.resolve(step, hidden, project), strict=True
            )
        ]

    def _script(self, start: int, draft: Draft) -> Draft:
        right = next(self.counts)
        tokens = [draft.tokens[0]]
        for place in range(1, self.draft_len):
            at = start + place
            token = self.text[at] if at < len(self.text) else 0
            tokens.append(token if place < right else (token + 1) % self.vocab)
        return Draft(tuple(tokens))
