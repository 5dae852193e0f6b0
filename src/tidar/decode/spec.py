"""Decoding methods by name: `ar`, `tidar:16:dense`, `tidar:4:1,2`, `tidar:two-forward`, `tidar:plan`.

The others are in `tidar.decode.rivals`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from tidar.decode.engine import Engine, FixedPlan, Plan
from tidar.decode.paged_costs import capture_candidates, plan_for
from tidar.decode.paged_engine import EngineLimits, PagedEngine
from tidar.decode.plan import MeasuredPlan
from tidar.decode.rivals import FORMS, MaskedDiffusionRival, Rival, Target, parse_rival
from tidar.decode.slots import Replay
from tidar.errors import TidarError
from tidar.families import need_causal
from tidar.layout import AUTOREGRESSIVE, Schedule, dense_schedule
from tidar.methods.tidar import Tidar
from tidar.model import ModelConfig, Transformer

UNTRAINED = (4, 8, 16)
"""Values of K that a plan weighs where the checkpoint names none."""

_KNOWN = (
    "ar, tidar:plan, tidar:K (dense), tidar:K:SPANSET such as tidar:16:1,2,4,8, tidar:K:two-forward, "
    f"tidar:two-forward (K = 16), or {FORMS}"
)

PLAIN_ONLY = "Method {} runs in the plain engine only: ask for that one (engine 'plain')."


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """A parsed method. schedule: None where steps are planned from measurements (`tidar:plan`).

    rival: a method other than TiDAR and AR; only the plain engine runs it.
    """

    name: str
    schedule: Schedule | None
    rival: Rival | None = None

    @property
    def is_ar(self) -> bool:
        return self.rival is None and self.schedule is not None and not self.schedule.drafts

    @property
    def is_exact(self) -> bool:
        """Whether its text is AR's; else it is that of another model made of the same weights."""
        return self.rival is None or self.rival.exact

    @property
    def needs_mask(self) -> bool:
        return not self.is_ar if self.rival is None else self.rival.needs_mask

    @property
    def is_causal(self) -> bool:
        """Whether some of its rows see only what stands before them; so not in masked diffusion alone."""
        return not isinstance(self.rival, MaskedDiffusionRival)

    def check(self, config: ModelConfig) -> None:
        """Raises TidarError for a checkpoint whose weights this method cannot read."""
        if self.is_causal:
            need_causal(config, f"Method {self.name}")
        if self.needs_mask and config.mask_token_id is None:
            raise TidarError(
                f"Method {self.name} reads mask rows, and this checkpoint has no mask token "
                '(no "tidar" entry in config.json). Convert it with `tidar train`, or use ar.'
            )

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
        self,
        model: Transformer,
        *,
        max_batch: int = 1,
        draft_lens: Sequence[int] = (),
        target: Target | None = None,
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
        target: Target | None = None,
        limits: EngineLimits | None = None,
        replay: Replay | None = None,
    ) -> Engine | PagedEngine:
        """An engine that decodes this way: the plain one, or with `limits` the paged one.

        target: keeps draft models from one engine to the next. replay: acceptance that is made up, on the
        model's device. Raises TidarError for what `check` refuses, for limits below this method's K, and for a
        method that the paged engine does not run.
        """
        self.check(model.config)
        mask = model.config.mask_token_id
        if self.rival is not None:
            return self._rival(self.rival, target or Target(model), max_batch, limits)
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

    def _rival(
        self, rival: Rival, target: Target, max_batch: int, limits: EngineLimits | None
    ) -> Engine:
        assert self.schedule is not None
        if limits is not None:
            raise TidarError(PLAIN_ONLY.format(self.name))
        method = rival.method(target, max_batch)
        return Engine(target.model, method, FixedPlan(self.schedule), max_batch=max_batch)

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
    if (found := parse_rival(text)) is not None:
        return MethodSpec(*found)
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


def parse_rival_only(text: str, *, paged: bool, given: Sequence[str]) -> MethodSpec:
    """One method that is neither TiDAR nor AR, for the Python API, where those have options instead.

    paged: the paged engine was asked for. given: TiDAR's options that were set. Raises TidarError for any
    of these, and for other methods.
    """
    found = parse_rival(text)
    if found is None:
        raise TidarError(
            f"method is {text!r}; it must be 'tidar' or 'ar', or {FORMS}. TiDAR's K and spans are options of "
            "their own."
        )
    spec = MethodSpec(*found)
    if given:
        raise TidarError(f"Method {spec.name} has no {' and no '.join(given)}: these are TiDAR's.")
    if paged:
        raise TidarError(PLAIN_ONLY.format(spec.name))
    return spec


def parse_methods(text: str) -> tuple[MethodSpec, ...]:
    """Several methods, separated by commas; a comma before a digit belongs to a span set."""
    found = tuple(parse_method(part) for part in re.split(r",(?!\s*\d)", text))
    names = [spec.name for spec in found]
    if len(set(names)) < len(names):
        raise TidarError(f"methods {text!r} name one method twice.")
    return found
