"""Decoding methods by name: `ar`, `tidar:16:dense`, `tidar:4:1,2`, `tidar:two-forward`, `tidar:plan`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from tidar.decode.engine import Engine, FixedPlan, Plan
from tidar.decode.paged_costs import capture_candidates, plan_for
from tidar.decode.paged_engine import EngineLimits, PagedEngine
from tidar.decode.plan import MeasuredPlan
from tidar.decode.slots import Replay
from tidar.errors import TidarError
from tidar.layout import AUTOREGRESSIVE, Schedule, dense_schedule
from tidar.methods.tidar import Tidar
from tidar.model import Transformer

UNTRAINED = (4, 8, 16)
"""Values of K that a plan weighs where the checkpoint names none."""

_KNOWN = (
    "ar, tidar:plan, tidar:K (dense), tidar:K:SPANSET such as tidar:16:1,2,4,8, tidar:K:two-forward, or "
    "tidar:two-forward (K = 16)"
)


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """A parsed method. schedule: None where steps are planned from measurements (`tidar:plan`)."""

    name: str
    schedule: Schedule | None

    @property
    def is_ar(self) -> bool:
        return self.schedule is not None and not self.schedule.drafts

    def plan(
        self, model: Transformer, method: Tidar, *, batch: int = 1, draft_lens: Sequence[int] = ()
    ) -> Plan:
        """The plan that paces an engine; measures the machine where that is asked for.

        draft_lens: values of K in training, which a measured plan keeps to.
        """
        if self.schedule is not None:
            return FixedPlan(self.schedule)
        lens = tuple(draft_lens) or UNTRAINED
        return MeasuredPlan.measure(model, method, batch=batch, draft_lens=lens)

    def max_draft_len(self, draft_lens: Sequence[int] = ()) -> int:
        """The largest K that this method may ask for; draft_lens as for `plan`."""
        if self.schedule is not None:
            return self.schedule.draft_len
        return max(tuple(draft_lens) or UNTRAINED)

    @overload
    def engine(
        self, model: Transformer, *, max_batch: int = 1, draft_lens: Sequence[int] = ()
    ) -> Engine: ...

    @overload
    def engine(
        self,
        model: Transformer,
        *,
        limits: EngineLimits,
        draft_lens: Sequence[int] = (),
        replay: Replay | None = None,
    ) -> PagedEngine: ...

    def engine(
        self,
        model: Transformer,
        *,
        max_batch: int = 1,
        draft_lens: Sequence[int] = (),
        limits: EngineLimits | None = None,
        replay: Replay | None = None,
    ) -> Engine | PagedEngine:
        """An engine that decodes this way: the plain one, or with `limits` the paged one.

        replay: acceptance that is made up, on the model's device. Raises TidarError for a model without
        a mask token, and for limits below this method's K.
        """
        mask = model.config.mask_token_id
        if mask is None and not self.is_ar:
            raise TidarError(
                f"Method {self.name} drafts with mask rows, and this checkpoint has no mask token "
                '(no "tidar" entry in config.json). Convert it with `tidar train`, or use ar.'
            )
        longest = self.max_draft_len(draft_lens)
        if limits is not None and longest > limits.max_draft_len:
            raise TidarError(
                f"Method {self.name} drafts K = {longest} tokens, and the engine's max_draft_len is "
                f"{limits.max_draft_len}; raise it."
            )
        if limits is not None:
            return self._paged(model, limits, tuple(draft_lens) or UNTRAINED, replay)
        method = Tidar(0 if mask is None else mask)  # AR has no mask rows: the id is never read
        plan = self.plan(model, method, batch=max_batch, draft_lens=draft_lens)
        return Engine(model, method, plan, max_batch=max_batch)

    def _paged(
        self,
        model: Transformer,
        limits: EngineLimits,
        draft_lens: Sequence[int],
        replay: Replay | None,
    ) -> PagedEngine:
        if self.schedule is not None:
            return PagedEngine(model, FixedPlan(self.schedule), limits, replay=replay)
        engine = PagedEngine(model, FixedPlan(AUTOREGRESSIVE), limits, replay=replay)
        plan = plan_for(engine, draft_lens)
        capture_candidates(engine, plan)
        engine.plan = plan
        return engine


def parse_method(text: str) -> MethodSpec:
    """One method. Raises TidarError for anything else."""
    name, *rest = text.strip().split(":")
    if name == "ar" and not rest:
        return MethodSpec("ar", AUTOREGRESSIVE)
    if name == "tidar" and rest == ["plan"]:
        return MethodSpec("tidar:plan", None)
    if rest == ["two-forward"]:
        rest = [str(max(UNTRAINED)), *rest]
    if name == "tidar" and len(rest) in (1, 2) and rest[0].isdecimal():
        draft_len = int(rest[0])
        dense = len(rest) == 1 or rest[1] == "dense"
        schedule = dense_schedule(draft_len) if dense else Schedule.parse(draft_len, rest[1])
        return MethodSpec(f"tidar:{draft_len}:{rest[1] if rest[1:] else 'dense'}", schedule)
    raise TidarError(f"method {text!r} is not understood: give {_KNOWN}.")


def parse_methods(text: str) -> tuple[MethodSpec, ...]:
    """Several methods, separated by commas; a comma before a digit belongs to a span set."""
    found = tuple(parse_method(part) for part in re.split(r",(?!\s*\d)", text))
    names = [spec.name for spec in found]
    if len(set(names)) < len(names):
        raise TidarError(f"methods {text!r} name one method twice.")
    return found
