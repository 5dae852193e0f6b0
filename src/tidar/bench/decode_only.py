"""Decoding alone, behind prompts that are in the cache before anything is timed.

A cell has one engine for all its methods. Its prompts are run once; their full pages are then held, so
that no later text can push them out, and every pass of every method reuses them: TiDAR and AR leave the
same keys and values. What a prompt has beyond its last full page is run again by each pass, all prompts
in one turn, before the first decode step.

A pass ends with the turn in which its texts have decoded enough tokens together, so all of them decode
in every turn. The first turns are left out of the speeds: the host still has the prompts' results to
take in.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy

from tidar.bench.measure import (
    NEVER,
    Pass,
    Passes,
    Settings,
    draws_of,
    make_request,
    run_pass,
)
from tidar.bench.memory import MemoryMeter, cache_bytes
from tidar.bench.prompts import Prompt
from tidar.decode.engine import FixedPlan, Plan
from tidar.decode.paged_costs import capture_candidates, measure_table, plan_from
from tidar.decode.paged_engine import EngineLimits, PagedEngine
from tidar.decode.plan import MeasuredPlan
from tidar.decode.request import Request
from tidar.decode.spec import UNTRAINED, MethodSpec
from tidar.layout import AUTOREGRESSIVE
from tidar.model import Transformer

SETTLING = 2
"""Turns at the head of a pass that are not in its speeds."""


def most_tokens(settings: Settings) -> int:
    """Tokens that one text may have: the luckiest of many must not end long before the others."""
    longest = max(spec.max_draft_len(settings.draft_lens) for spec in settings.methods)
    return 2 * settings.max_new_tokens + 4 * longest


def run_decode_only(
    model: Transformer,
    prompts: Sequence[Prompt],
    settings: Settings,
    on_pass: Callable[[str], None] = lambda label: None,
    *,
    meter: MemoryMeter,
) -> Passes:
    """All passes; methods take turns within each run. Prompts are of one length, `batch` of them."""
    engine = _engine(model, prompts, settings)
    plans = {spec.name: _plan(engine, spec, prompts, settings) for spec in settings.methods}
    hold_prompts(engine, prompts)

    def decode(spec: MethodSpec, draw: int) -> Pass:
        requests = _requests(prompts, settings, draw)
        with meter.watch(spec.name):
            done = run_pass(engine, requests, enough=len(prompts) * settings.max_new_tokens)
        _check(done, engine.pages.page_size, len(prompts[0].ids))
        for step in done.timing.steps[:SETTLING]:
            step.alone = False
        return done

    for spec in settings.methods:
        on_pass(f"warming up {spec.name}")
        engine.plan = plans[spec.name]
        decode(spec, draw=0)
    passes: Passes = {spec.name: [[] for _ in range(settings.runs)] for spec in settings.methods}
    for run in range(settings.runs):
        for spec in settings.methods:
            engine.plan = _timed(plans[spec.name])
            for draw in draws_of(spec, settings, run, len(prompts)):
                passes[spec.name][run].append(decode(spec, draw))
            on_pass(spec.name)
    for spec in settings.methods:
        meter.caches[spec.name] = cache_bytes(engine)
    return passes


def hold_prompts(engine: PagedEngine, prompts: Sequence[Prompt]) -> None:
    """Runs the prompts and keeps their full pages out of others' reach; ids below 0 are no request's.

    Raises AssertionError where a full page of a prompt is not there to be reused afterwards.
    """
    engine.plan = FixedPlan(AUTOREGRESSIVE)
    for _ in engine.run([Request(prompt=prompt.ids, max_new_tokens=1) for prompt in prompts]):
        pass
    for index, prompt in enumerate(prompts):
        held = engine.pages.open(-1 - index, prompt.ids)
        assert len(prompt.ids) - held == _left_over(engine.pages.page_size, len(prompt.ids)), (
            f"prompt {index}: {held} of {len(prompt.ids)} tokens are in the cache"
        )


def _left_over(page_size: int, length: int) -> int:
    """Tokens of a prompt that are run again: those beyond its full pages, at least the last one."""
    return (length - 1) % page_size + 1


def _engine(model: Transformer, prompts: Sequence[Prompt], settings: Settings) -> PagedEngine:
    """Room for the prompts once, and for a text behind each."""
    batch, length = len(prompts), len(prompts[0].ids)
    longest = max(spec.max_draft_len(settings.draft_lens) for spec in settings.methods)
    limits = EngineLimits()
    pages = -(-(length + most_tokens(settings) + 2 * longest) // limits.page_size)
    limits = EngineLimits(
        max_running=batch,
        max_draft_len=longest,
        # One page each: what admission leaves free.
        cache_tokens=batch * (pages + 1) * limits.page_size,
        chunk_tokens=max(limits.chunk_tokens, batch * _left_over(limits.page_size, length)),
    )
    device = model.embed.weight.device
    replay = settings.replay.replay(device, settings.seed) if settings.replay else None
    return PagedEngine(model, FixedPlan(AUTOREGRESSIVE), limits, replay=replay)


def _plan(
    engine: PagedEngine, spec: MethodSpec, prompts: Sequence[Prompt], settings: Settings
) -> Plan:
    """The plan of one method, its graphs captured; measured at this batch and context alone."""
    batch = len(prompts)
    if spec.schedule is not None:
        if engine.runner.graphs:
            engine.runner.captured(spec.schedule, batch)
        return FixedPlan(spec.schedule)
    table = measure_table(engine, batches=(batch,), among=(len(prompts[0].ids),))
    plan = plan_from(engine, table, settings.draft_lens or UNTRAINED)
    capture_candidates(engine, plan, (batch,))
    plan.learn_at = NEVER  # else a graph is captured in the middle of a text
    return plan


def _timed(plan: Plan) -> Plan:
    """A plan as it was after its warm-up, so that all runs begin alike."""
    if not isinstance(plan, MeasuredPlan):
        return plan
    again = plan.fresh()
    again.experience, again.learn_at = deepcopy(plan.experience), NEVER
    return again


def _requests(prompts: Sequence[Prompt], settings: Settings, draw: int) -> list[Request]:
    asked = (make_request(p, i, settings, frozenset(), draw) for i, p in enumerate(prompts))
    count = most_tokens(settings)
    return [Request(prompt=r.prompt, max_new_tokens=count, params=r.params) for r in asked]


def _check(done: Pass, page_size: int, length: int) -> None:
    """Raises AssertionError where more of a prompt was run than its last rows, or not all decoded."""
    again = {text.prefilled for text in done.texts}
    assert again == {_left_over(page_size, length)}, f"prompts of {length} tokens: {again} run"
    count = {step.sequences for step in done.timing.steps}
    assert count == {len(done.texts)}, f"{count} of {len(done.texts)} texts decoded in a turn"
