"""What steps of the paged engine cost here, by batch and context, for its plan.

Measured on the engine itself while it is idle, at its start. On a GPU the measurements are kept on disk,
by GPU, versions, network and limits, so that the next start is quick.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tidar.decode.costs import StepCosts, step_rows
from tidar.decode.paged_engine import PagedEngine
from tidar.decode.plan import MeasuredPlan
from tidar.decode.step_times import measure_steps, room_needed
from tidar.errors import TidarError
from tidar.layout import AUTOREGRESSIVE, Schedule

CONTEXTS = (512, 4096, 16384)
"""Prefix lengths that are measured, as far as they fit."""

MOST_ROWS = 1024
"""Rows of a step, all sequences together, up to which schedules are measured: some four times the ridge."""

LEARN_EVERY = 512
"""Steps between two looks of the plan for a better span set."""

Table = dict[int, dict[int, StepCosts]]
"""By batch (powers of two), then context."""


@dataclass(frozen=True, slots=True)
class PagedCosts:
    """See `tidar.decode.costs.CostSource`. who: batch and mean context of the requests it is asked for."""

    table: Table
    who: Callable[[Collection[int]], tuple[int, int]] = field(repr=False)

    def at(self, request_ids: Collection[int]) -> StepCosts:
        batch, context = self.who(request_ids)
        by_context = self.table[min(self.table, key=lambda size: (size < batch, abs(size - batch)))]
        # The nearest by ratio: costs grow with the context in proportion, if at all.
        nearest = min(by_context, key=lambda size: max(size, context) / max(1, min(size, context)))
        return by_context[nearest]


def profiled_schedules(max_draft_len: int) -> tuple[Schedule, ...]:
    """Schedules whose rows cover those of the plan's candidates."""
    wanted = [(1, ()), (4, (1,)), (8, (1,)), (8, (1, 2)), (16, (1,)), (16, (1, 2)), (16, (1, 2, 4))]
    wanted += [(16, (1, 2, 4, 8)), (16, (1, 2, 3, 5, 8, 16)), (16, tuple(range(1, 17)))]
    fitting = [Schedule(k, anchors) for k, anchors in wanted if k <= max_draft_len]
    if len(fitting) == 1 and max_draft_len > 1:
        fitting.append(Schedule(max_draft_len, (1,)))
    return tuple(fitting)


def _within(schedules: Sequence[Schedule], batch: int) -> tuple[Schedule, ...]:
    """AR, and the schedules whose rows a GPU could still take for little."""
    return tuple(
        s for s in schedules if not s.drafts or step_rows(s, s.draft_len) * batch <= MOST_ROWS
    )


def batch_sizes(engine: PagedEngine) -> tuple[int, ...]:
    """Powers of two, up to what the engine runs at a time."""
    return tuple(1 << power for power in range(engine.runner.max_batch.bit_length()))


def measure_table(
    engine: PagedEngine,
    *,
    batches: Sequence[int] = (),
    among: Sequence[int] = CONTEXTS,
    repeats: int = 9,
) -> Table:
    """Times steps of the idle engine at the contexts `among` that fit, and at `batches`, by default all."""
    schedules = profiled_schedules(engine.max_draft_len)
    table: Table = {}
    for batch in batches or batch_sizes(engine):
        room = min(engine.limit, engine.pages.usable // batch * engine.pages.page_size)
        fitting = tuple(s for s in schedules if room_needed(1, (s,)) <= room)
        if len(fitting) < min(2, len(schedules)):
            break
        contexts = [size for size in among if room_needed(size, fitting) <= room]
        if not contexts:
            contexts = [max(1, (room - room_needed(0, fitting)) // 2)]
        some = _within(fitting, batch)
        if len(some) == 1:  # even the smallest draft is too much: a single point says so
            some = (*some, *fitting[1:2])
        times = measure_steps(engine, some, contexts, batch, repeats=repeats)
        for context in contexts:
            own = {t.rows: t.seconds for t in times if t.context == context}
            rows = tuple(sorted(own))
            table.setdefault(batch, {})[context] = StepCosts(
                rows, tuple(own[count] for count in rows), fixed_shape=True
            )
    if not table:
        raise TidarError(
            f"The KV cache of {engine.pages.usable * engine.pages.page_size} positions, in a model of "
            f"{engine.limit}, has no room to time a step that drafts: raise cache_tokens, or name a schedule "
            "instead of a measured plan."
        )
    return table


def plan_for(engine: PagedEngine, draft_lens: Sequence[int], *, keep: bool = True) -> MeasuredPlan:
    """A measured plan for this idle engine. keep: read the measurements from disk, and leave them there.

    draft_lens: values of K to choose from, those trained.
    """
    place = _place(engine) if keep and engine.device.type == "cuda" else None
    table = _read(place) if place is not None else None
    if table is None:
        table = measure_table(engine)
        if place is not None:
            _write(place, table)
    return plan_from(engine, table, draft_lens)


def plan_from(engine: PagedEngine, table: Table, draft_lens: Sequence[int]) -> MeasuredPlan:
    """A plan for this engine from measurements of its steps."""

    def who(request_ids: Collection[int]) -> tuple[int, int]:
        found = [engine.sequences[i] for i in request_ids if i in engine.sequences]
        lengths = [len(s.request.prompt) + len(s.emitted) for s in found]
        return max(1, len(lengths)), sum(lengths) // max(1, len(lengths))

    return MeasuredPlan(
        PagedCosts(table, who), draft_lens=draft_lens, lag=engine.behind, learn=LEARN_EVERY
    )


def capture_candidates(
    engine: PagedEngine, plan: MeasuredPlan, batches: Sequence[int] = ()
) -> None:
    """Captures the graphs that the plan may ask for at `batches`, by default all that there are.

    So no text has to wait for one.
    """
    if not engine.runner.graphs:
        return
    for batch in batches or batch_sizes(engine):
        for schedule in _within((AUTOREGRESSIVE, *plan.candidates), batch):
            for step in schedule.steps:
                engine.runner.captured(step, batch)


def _place(engine: PagedEngine) -> Path:
    """The file of the measurements of engines like this one."""
    try:
        own = version("tidar")
    except PackageNotFoundError:  # run from a source tree
        own = ""
    try:
        import triton

        compiler = triton.__version__
    except ImportError:
        compiler = None
    weight = next(engine.model.parameters())
    what = {
        "gpu": torch.cuda.get_device_name(engine.device),
        "versions": [own, torch.__version__, compiler],
        "network": asdict(engine.model.config),
        "dtype": str(weight.dtype),
        "limits": [engine.runner.max_batch, engine.max_draft_len, engine.pages.page_size],
    }
    name = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=12).hexdigest()
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return home / "tidar" / "profiles" / f"{name}.json"


def _read(place: Path) -> Table | None:
    try:
        stored = json.loads(place.read_text(encoding="utf-8"))
        table = {
            int(batch): {
                int(context): StepCosts(tuple(rows), tuple(seconds), fixed_shape=True)
                for context, (rows, seconds) in contexts.items()
            }
            for batch, contexts in stored.items()
        }
        return table if table and all(table.values()) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None  # not there, or not ours: it is measured again


def _write(place: Path, table: Table) -> None:
    stored = {
        batch: {context: [costs.rows, costs.seconds] for context, costs in contexts.items()}
        for batch, contexts in table.items()
    }
    partial = place.with_suffix(f".{os.getpid()}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(stored), encoding="utf-8")
        partial.replace(place)
    except OSError as error:
        warnings.warn(
            f"step times could not be kept in {place} ({error}); the next start measures them again",
            stacklevel=2,
        )
