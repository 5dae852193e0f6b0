"""Timed passes over prompts: what each forward cost, and what came out.

The clock of a pass is split into prefill, decode and host (all that is not a forward pass and its
verdict: scheduling, bookkeeping). The three are measured apart and must add up to the wall clock. The
paged engine runs prompt rows of some texts beside decode steps of others: such a turn counts as decode,
and its seconds are told apart as mixed, so that speeds of decoding alone leave them out.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch

from tidar.bench.acceptance import Acceptance
from tidar.bench.memory import MemoryMeter, cache_bytes
from tidar.bench.prompts import Prompt
from tidar.decode.engine import Engine
from tidar.decode.paged_engine import EngineLimits, PagedEngine
from tidar.decode.plan import MeasuredPlan
from tidar.decode.rates import next_shift
from tidar.decode.request import FinishReason, Request, StepEvent
from tidar.decode.rivals import Target
from tidar.decode.spec import PLAIN_ONLY, MethodSpec
from tidar.errors import TidarError
from tidar.model import Transformer
from tidar.sampling import SamplingParams

WARM_UP_TOKENS = 16
"""Tokens of the untimed pass that each method makes before anything is timed."""

REPLAY_ERROR = 0.01
"""Standard error of T/NFE, as a share of it, down to which replays are repeated."""

MOST_REPLAYS = 64
"""Texts of one prompt in a run, at most."""

SEEDS_APART = 1 << 20
"""From the seeds of one replay to those of the next: more than there are prompts."""

NEVER = 1 << 62
"""A step that no plan reaches."""

EngineName = Literal["plain", "paged"]
AnyEngine = Engine | PagedEngine


@dataclass(slots=True)
class StepClock:
    """Seconds of one decode step, and what it did: sequences that it ran, tokens that they emitted.

    alone: no prompt rows ran in the same turn.
    """

    seconds: float
    alone: bool
    sequences: int = 0
    tokens: int = 0


@dataclass(slots=True)
class Timing:
    """Seconds of one pass by bucket. forwards: decode steps of the network, whatever the batch."""

    prefill: float = 0.0
    decode: float = 0.0
    host: float = 0.0
    wall: float = 0.0
    forwards: int = 0
    steps: list[StepClock] = field(default_factory=list)

    @property
    def mixed(self) -> float:
        """Seconds of decode in turns that ran prompt rows as well."""
        return sum(step.seconds for step in self.steps if not step.alone)

    @property
    def mixed_tokens(self) -> int:
        """Tokens that decode steps emitted in those turns."""
        return sum(step.tokens for step in self.steps if not step.alone)

    def check(self) -> None:
        """Raises AssertionError where the buckets miss the wall clock by more than 1%."""
        total = self.prefill + self.decode + self.host
        slack = 0.01 * self.wall + 1e-4
        assert abs(total - self.wall) <= slack, (
            f"buckets add up to {total}, the clock to {self.wall}"
        )
        assert self.host >= -slack, f"forward passes took longer than the pass: host {self.host}"

    def add(self, other: "Timing") -> None:
        self.prefill += other.prefill
        self.decode += other.decode
        self.host += other.host
        self.wall += other.wall
        self.forwards += other.forwards
        self.steps += other.steps


@dataclass(slots=True)
class Text:
    """What became of one prompt in one pass.

    decoded: tokens that decode steps emitted (prefill's first one is not among them). steps: decode
    steps. accepts: how often a step committed so many tokens. rows: rows of its decode steps, all
    together. drafts: how often a step verified a draft of this shift and length. prefilled: rows of
    the prompt's last chunk. draft_forwards: passes of a draft model beside its decode steps.
    """

    ids: list[int] = field(default_factory=list)
    decoded: int = 0
    steps: int = 0
    rows: int = 0
    accepts: Counter[int] = field(default_factory=Counter)
    schedules: Counter[str] = field(default_factory=Counter)
    drafts: Counter[tuple[int, int]] = field(default_factory=Counter)
    prefilled: int = 0
    draft_forwards: int = 0
    finish: FinishReason | None = None
    _shift: int = 0

    def take(self, event: StepEvent) -> None:
        self.ids += event.ids
        self.finish = event.finish
        if event.prefill:
            self._shift, self.prefilled = 0, event.accepted
        else:
            self.drafts[self._shift, event.drafted] += 1
            self._shift = next_shift(event.schedule, event.drafted, event.accepted)
            self.decoded += len(event.ids)
            self.steps += 1
            self.draft_forwards += event.draft_forwards
            self.rows += event.rows
            self.accepts[event.accepted] += 1
            spans = event.schedule.half or ",".join(map(str, event.schedule.span_set))
            self.schedules[f"{event.schedule.draft_len}:{spans}"] += 1


@dataclass(frozen=True, slots=True)
class Pass:
    """One timed run of an engine: its clock, and the texts in the order of the requests."""

    timing: Timing
    texts: tuple[Text, ...]


def run_pass(
    engine: AnyEngine,
    requests: Sequence[Request],
    clock: Callable[[], float] = time.perf_counter,
    *,
    enough: int | None = None,
) -> Pass:
    """Decodes the requests, timed: to their end, or until `enough` tokens were decoded or one text ended.

    The turn that reaches the last is counted whole; what was launched behind it is dropped.
    """
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    timing = Timing()
    began = mark = clock()
    texts = {engine.submit(request): Text() for request in requests}
    unbegun = set(texts)
    # Both engines' are generators: closing one aborts what is unfinished.
    events = cast("Generator[StepEvent, None, None]", engine.run())
    members: set[int] = set()  # requests that the current decode step has reported
    while True:
        event = next(events, None)
        now = clock()
        spent, mark = now - mark, now
        if event is None:
            timing.host += spent
            break
        unbegun.discard(event.request_id)
        # A decode step over several sequences gives one event each, all with the step's seconds.
        if event.prefill:
            timing.prefill += event.seconds
            spent -= event.seconds
            members.clear()
        else:
            known = bool(members) and event.request_id not in members
            if not known or event.seconds != timing.steps[-1].seconds:
                if enough is not None and _is_enough(timing.steps, texts.values(), enough):
                    timing.host += spent
                    break
                timing.steps.append(StepClock(event.seconds, alone=not unbegun))
                timing.decode += event.seconds
                timing.forwards += 1
                spent -= event.seconds
                members.clear()
            members.add(event.request_id)
            timing.steps[-1].sequences += 1
            timing.steps[-1].tokens += len(event.ids)
        timing.host += spent
        texts[event.request_id].take(event)
    events.close()
    end = clock()
    timing.host += end - mark
    timing.wall = end - began
    timing.check()
    for step in timing.steps:  # where all places decode, the texts that have not begun are waiting
        step.alone = step.alone or step.sequences == places(engine)
    return Pass(timing, tuple(texts.values()))


def _is_enough(steps: Sequence[StepClock], texts: Iterable[Text], tokens: int) -> bool:
    done = sum(step.tokens for step in steps) >= tokens
    return done or any(text.finish is not None for text in texts)


def places(engine: AnyEngine) -> int:
    """Sequences that the engine runs at a time."""
    return engine.max_batch if isinstance(engine, Engine) else engine.runner.max_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured. batch: sequences at a time; at 1 every prompt is timed alone.

    ignore_eos: decode past end-of-text, so that all texts are equally long. teacher_forced: the
    model is made to write each prompt's real continuation, so that acceptance is measured on real
    text. draft_lens: values of K that the checkpoint was trained with, for measured plans. engine: the
    plain or the paged one. replay: acceptance that is made up, for the paged engine only. replays:
    texts of each prompt in a run, each with a seed of its own; None is as many as T/NFE takes to
    settle (`replays_of`). decode_only: see `tidar.bench.decode_only`.
    """

    methods: tuple[MethodSpec, ...]
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    runs: int = 5
    batch: int = 1
    ignore_eos: bool = False
    teacher_forced: bool = False
    draft_lens: tuple[int, ...] = ()
    engine: EngineName = "plain"
    replay: Acceptance | None = None
    replays: int | None = None
    decode_only: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "runs", "batch", "replays"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TidarError(f"{name} is {value}; it must be at least 1.")
        if self.engine == "plain" and self.replay is not None:
            raise TidarError("Only the paged engine can replay an acceptance (--engine paged).")
        if self.engine == "plain" and self.decode_only:
            raise TidarError("Only the paged engine can measure decoding alone (--engine paged).")
        if self.replay is None and self.replays is not None:
            raise TidarError("Only an acceptance that is made up is replayed: it needs one.")
        for spec in self.methods:
            if spec.rival is not None and self.engine == "paged":
                raise TidarError(PLAIN_ONLY.format(spec.name))
            if not spec.is_exact and self.teacher_forced:
                raise TidarError(
                    f"Method {spec.name} verifies nothing that could be teacher forced."
                )


def pick_engine(
    name: str, device: torch.device, *, plain_only: bool = False, replayed: bool = False
) -> EngineName:
    """`auto` is the paged engine on CUDA and where an acceptance is replayed, else the plain one.

    plain_only: some method is one that the paged engine does not run.
    Raises TidarError for a name that is not known.
    """
    if name == "auto":
        paged = replayed or (device.type == "cuda" and not plain_only)
        return "paged" if paged else "plain"
    if name not in ("plain", "paged"):
        raise TidarError(f"engine {name!r} is not known: give auto, plain or paged.")
    return "plain" if name == "plain" else "paged"


def replays_of(spec: MethodSpec, settings: Settings, prompts: int) -> int:
    """Texts of each prompt in a run of this method.

    One, but for replays: what passes is drawn, so they are repeated under other seeds until the standard
    error of T/NFE over all runs should be `REPLAY_ERROR` of it. AR always commits one token.
    """
    if settings.replay is None or spec.is_ar:
        return 1
    if settings.replays is not None:
        return settings.replays
    steps = settings.runs * prompts * settings.max_new_tokens / settings.replay.mean
    wanted = math.ceil(settings.replay.steps_for(REPLAY_ERROR) / steps)
    return min(max(1, wanted), MOST_REPLAYS)


def make_request(
    prompt: Prompt, index: int, settings: Settings, eos_ids: frozenset[int], draw: int = 0
) -> Request:
    """The request of one prompt; each prompt has its own seed, the same in every run and method.

    draw: gives replays other seeds. What passes is a hash of the request's seed; that of the replay
    itself is a constant of captured graphs.
    """
    seed = settings.seed + index + draw * SEEDS_APART
    params = SamplingParams(temperature=settings.temperature, seed=seed)
    if not settings.teacher_forced:
        return Request(
            prompt=prompt.ids,
            max_new_tokens=settings.max_new_tokens,
            params=params,
            eos_ids=frozenset() if settings.ignore_eos else eos_ids,
        )
    if not prompt.real:
        raise TidarError(f"prompt {prompt.name} has no continuation, which teacher forcing needs.")
    return Request(
        prompt=prompt.ids,
        max_new_tokens=min(settings.max_new_tokens, len(prompt.real)),
        params=params,
        forced=prompt.ids + prompt.real,
    )


Passes = dict[str, list[list[Pass]]]
"""By method, then run: its passes (one per prompt at batch 1, else one over all prompts)."""


def make_engine(
    spec: MethodSpec,
    model: Transformer,
    requests: Sequence[Request],
    settings: Settings,
    target: Target | None = None,
) -> AnyEngine:
    """The engine of one method, with room for the longest of the requests in every place.

    The paged one reuses no prefixes: runs repeat their prompts, and all but the first would be free.
    """
    batch, lens = min(settings.batch, len(requests)), settings.draft_lens
    if settings.engine == "plain":
        return spec.engine(model, max_batch=batch, draft_lens=lens, target=target)
    longest = spec.max_draft_len(lens)
    limits = EngineLimits(max_running=batch, max_draft_len=longest)
    wanted = max(len(each.prompt) + each.max_new_tokens for each in requests) + 2 * longest
    pages = -(-min(wanted, model.config.max_positions) // limits.page_size)
    room = batch * (pages + 1) * limits.page_size  # one page each: what admission leaves free
    device = model.embed.weight.device
    replay = settings.replay.replay(device, settings.seed) if settings.replay else None
    engine = spec.engine(
        model, limits=replace(limits, cache_tokens=room), draft_lens=lens, replay=replay
    )
    engine.pages.reuse = False
    return engine


def warm_up(
    engine: AnyEngine, spec: MethodSpec, units: Sequence[Sequence[Request]], batch: int
) -> None:
    """Runs what the timed passes will run, untimed; on a GPU every kernel and graph is made here."""
    if isinstance(engine, Engine):
        units = units[:1]
    elif engine.runner.graphs and spec.schedule is not None:
        for size in range(1, batch + 1):
            for step in spec.schedule.steps:
                engine.runner.captured(step, size)
    for unit in units:
        run_pass(engine, [_short(request) for request in unit])


def run_bench(
    model: Transformer,
    prompts: Sequence[Prompt],
    settings: Settings,
    eos_ids: frozenset[int],
    on_pass: Callable[[str], None] = lambda label: None,
    *,
    meter: MemoryMeter | None = None,
    target: Target | None = None,
) -> Passes:
    """All passes. Methods take turns on each prompt, so that a disturbance hits all alike.

    target: the model with its tokenizer, for draft models.
    """
    requests = [make_request(p, i, settings, eos_ids) for i, p in enumerate(prompts)]
    batch = min(settings.batch, len(prompts))
    units = [[i] for i in range(len(prompts))] if settings.batch == 1 else [[*range(len(prompts))]]
    meter = meter or MemoryMeter(model)
    engines: dict[str, AnyEngine] = {}
    for spec in settings.methods:
        on_pass(f"warming up {spec.name}")
        with meter.watch(spec.name):
            engine = engines[spec.name] = make_engine(spec, model, requests, settings, target)
            warm_up(engine, spec, [[requests[i] for i in unit] for unit in units], batch)
    passes: Passes = {name: [[] for _ in range(settings.runs)] for name in engines}
    for run in range(settings.runs):
        for engine in engines.values():
            if isinstance(engine.plan, MeasuredPlan):
                # A run must not profit from what the one before learned of the same prompts.
                engine.plan = engine.plan.fresh(experienced=False)
                if settings.replay is not None:
                    engine.plan.learn_at = NEVER  # else a graph is captured in one text of few
        for unit in units:
            for spec in settings.methods:
                for draw in draws_of(spec, settings, run, len(prompts)):
                    asked = [make_request(prompts[i], i, settings, eos_ids, draw) for i in unit]
                    with meter.watch(spec.name):
                        passes[spec.name][run].append(run_pass(engines[spec.name], asked))
                on_pass(spec.name)
    for name, engine in engines.items():
        meter.caches[name] = cache_bytes(engine)
    return passes


def draws_of(spec: MethodSpec, settings: Settings, run: int, prompts: int) -> range:
    """What `make_request` takes as `draw`, for the texts of each prompt in a run; 0 is the warm-up's.

    Without a replay it is 0 in every run, as texts are compared from one run to the next.
    """
    if settings.replay is None:
        return range(1)
    count = replays_of(spec, settings, prompts)
    return range(1 + run * count, 1 + (run + 1) * count)


def count_passes(settings: Settings, prompts: int) -> int:
    """How often `run_bench` calls `on_pass`."""
    units = 1 if settings.batch > 1 else prompts
    return len(settings.methods) * (settings.runs * units + 1)


def _short(request: Request) -> Request:
    return Request(
        prompt=request.prompt,
        max_new_tokens=min(WARM_UP_TOKENS, request.max_new_tokens),
        params=request.params,
        forced=request.forced,
    )
