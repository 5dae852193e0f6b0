"""The public face: `tidar.load`, then `generate`, `generate_batch` or `stream`.

Everything here is a thin arrangement of checkpoint, tokenizer and engine; the decoding itself is in
`tidar.decode` and `tidar.methods`.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch

from tidar.decode.engine import Engine, FixedPlan, Plan, check_request
from tidar.decode.plan import MAX_DRAFT_LEN, MeasuredPlan
from tidar.decode.request import FinishReason, Request, StepEvent, tokens_per_forward
from tidar.decode.rivals import Target, default_method, warn_of_causal_reading
from tidar.decode.shared import Job, PlanSpec, SharedEngine
from tidar.decode.spec import MethodSpec, parse_rival_only
from tidar.errors import TidarError
from tidar.families import need_causal
from tidar.layout import AUTOREGRESSIVE, Schedule
from tidar.methods.tidar import Tidar
from tidar.sampling import SamplingParams
from tidar.tokens import TextOf, Tokenizer
from tidar.weights import Checkpoint, load_checkpoint

MethodName = str
"""`tidar`, `ar`, or another method by its name in `tidar.decode.rivals`, such as `speculative:PATH:4`."""

EngineName = Literal["auto", "plain", "paged"]
Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Output:
    """A finished text.

    text: the new text, cut before a stop string and without end-of-text. ids: the new tokens, up to and
    including the one that ended it. forwards: decode steps (the prefill is not one). tokens_per_forward:
    tokens of decode steps per decode step; nan if there was no step. accepts: tokens committed per step.
    seconds: prefill and decoding. draft_forwards: passes of a draft model beside the decode steps.
    """

    text: str
    ids: list[int]
    finish: FinishReason
    forwards: int
    tokens_per_forward: float
    accepts: list[int]
    seconds: float
    draft_forwards: int = 0


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """What one forward pass added: committed text and tokens, with how many were drafted and accepted."""

    text: str
    ids: tuple[int, ...]
    prefill: bool
    drafted: int
    accepted: int
    rows: int
    seconds: float
    finish: FinishReason | None
    draft_forwards: int = 0


class LanguageModel:
    """A loaded checkpoint, ready to decode. Made by `load`; not for use by several threads at once."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.network = checkpoint.model
        self.meta = checkpoint.meta
        self.shared = SharedEngine(checkpoint.model)
        self.target = Target(checkpoint.model, tokenizer)
        self._plans: dict[tuple[int, int], MeasuredPlan] = {}
        self._warned: set[int] = set()

    @property
    def draft_len(self) -> int:
        """The longest draft the checkpoint was trained for; 1 for one that was never trained to draft."""
        return max(self.meta.draft_lens, default=1) if self.meta else 1

    @property
    def default_method(self) -> MethodName:
        """The best that the checkpoint can do: what decodes where no method is named."""
        return default_method(self.network.config, self.meta)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt; ids are taken as they are."""
        return tuple(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)

    def plan(
        self,
        method: MethodName | None = None,
        draft_len: int | None = None,
        span_set: str = "plan",
        *,
        batch: int = 1,
        repeatable: bool = False,
    ) -> Plan:
        """The plan that `generate` would use for these arguments, for one engine.

        Of the plain engine; the paged one measures itself. repeatable: see `plan_spec`. Raises TidarError for
        impossible arguments.
        """
        spec = self.plan_spec(method, draft_len, span_set, repeatable=repeatable)
        if spec.schedule is not None:
            return FixedPlan(spec.schedule)
        key = (spec.longest, batch)
        if key not in self._plans:
            self._plans[key] = MeasuredPlan.measure(
                self.network, self.method(), batch=batch, draft_lens=spec.draft_lens
            )
        return self._plans[key].fresh()

    def plan_spec(
        self,
        method: MethodName | None = None,
        draft_len: int | None = None,
        span_set: str = "plan",
        *,
        repeatable: bool = False,
    ) -> PlanSpec:
        """What these arguments ask for: one schedule, or a plan measured over some draft lengths.

        repeatable: the text must not depend on timings, as it would with rejection sampling or beta below
        1 under a measured plan; "plan" then means all spans. Raises TidarError for impossible arguments.
        """
        method = method or self.default_method
        need_causal(self.network.config, f"Method {method!r}")
        if method not in ("tidar", "ar"):
            raise TidarError(f"method is {method!r}; here it must be 'tidar' or 'ar'.")
        if method == "ar":
            return PlanSpec(AUTOREGRESSIVE)
        if self.meta is None:
            raise TidarError(
                f"{self.checkpoint.source} has no 'tidar' entry in its config.json: it was never trained "
                "to draft and decodes as AR only (method 'ar'). Convert it with 'tidar train --base'."
            )
        draft_len = self._check_draft_len(draft_len)
        if span_set != "plan" or repeatable:
            return PlanSpec(Schedule.parse(draft_len, "dense" if span_set == "plan" else span_set))
        if draft_len > MAX_DRAFT_LEN:
            raise TidarError(
                f"draft_len is {draft_len}; span set 'plan' weighs K up to {MAX_DRAFT_LEN}. Name a span set, "
                "such as dense, single, two-forward or 1,2,4."
            )
        trained = [k for k in self.meta.draft_lens if 1 < k <= draft_len]
        lens = tuple(sorted({*trained, draft_len})) if draft_len > 1 else ()
        return PlanSpec(None, lens) if lens else PlanSpec(AUTOREGRESSIVE)

    def pick_engine(self, engine: str = "auto") -> Literal["plain", "paged"]:
        """`auto` is the paged engine on CUDA and the plain one elsewhere. Raises TidarError for other names."""
        if engine == "auto":
            return "paged" if self.network.embed.weight.device.type == "cuda" else "plain"
        if engine not in ("plain", "paged"):
            raise TidarError(f"engine is {engine!r}; it must be 'auto', 'plain' or 'paged'.")
        return "plain" if engine == "plain" else "paged"

    def rival(self, method: MethodName | None, engine: str, **tidar: object) -> MethodSpec | None:
        """The method of this name where it is neither TiDAR nor AR; None where it is.

        tidar: options that only TiDAR has. Warns where it reads causally what was not trained so. Raises TidarError
        for what is not known or cannot go together.
        """
        method = method or self.default_method
        spec = None
        if method not in ("tidar", "ar"):
            paged = engine != "auto" and self.pick_engine(engine) == "paged"
            given = [name for name, value in tidar.items() if value not in (None, "plan", 1.0)]
            spec = parse_rival_only(method, paged=paged, given=given)
        if spec is None or spec.is_exact:
            warn_of_causal_reading(self.checkpoint)
        return spec

    def method(self, beta: float = 1.0) -> Tidar:
        """The decoding method; beta below 1 is lossy. Raises TidarError outside 0..1."""
        if not 0.0 <= beta <= 1.0:
            raise TidarError(f"beta is {beta}; it must be from 0 to 1, and only 1 is exact.")
        mask = self.network.config.mask_token_id
        return Tidar(0 if mask is None else mask, beta)  # without a mask token no row needs one

    def _check_draft_len(self, draft_len: int | None) -> int:
        assert self.meta is not None
        if draft_len is None:
            return self.draft_len
        limit = self.network.config.max_positions
        if not 1 <= draft_len <= limit // 2:
            raise TidarError(
                f"draft_len is {draft_len}; it must be from 1 to {limit // 2}, half of the model's "
                f"{limit} positions."
            )
        trained = self.meta.draft_lens
        if draft_len not in (1, *trained) and draft_len not in self._warned:
            self._warned.add(draft_len)
            warnings.warn(
                f"draft_len {draft_len} was never trained (trained: {', '.join(map(str, trained))}); "
                "the text stays exact, the acceptance may suffer",
                stacklevel=4,
            )
        return draft_len

    def request(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        sampling: Literal["shared-noise", "rejection"] = "shared-noise",
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> tuple[Request, TextOf]:
        """The engine's form of a request and the text that follows its tokens; TidarError if it cannot run."""
        ids = self.encode(prompt)
        text = TextOf(self.tokenizer, ids, stop)
        params = SamplingParams(
            temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, sampling=sampling
        )
        eos_ids = frozenset() if ignore_eos else self.tokenizer.eos_ids
        request = Request(
            prompt=ids,
            max_new_tokens=max_new_tokens,
            params=params,
            eos_ids=eos_ids,
            make_stopper=lambda: text.push,
        )
        check_request(request, self.network.config)
        return request, text

    def stream(
        self,
        prompt: Prompt,
        *,
        method: MethodName | None = None,
        draft_len: int | None = None,
        span_set: str = "plan",
        beta: float = 1.0,
        engine: EngineName = "auto",
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        sampling: Literal["shared-noise", "rejection"] = "shared-noise",
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Iterator[StreamEvent]:
        """Decodes one prompt, an event per forward pass; only committed text is shown.

        prompt: text, or token ids. method: "tidar", "ar", or another one such as "speculative:PATH:4" (see
        `tidar.decode.rivals`; plain engine only, and not all write AR's text); by default what the checkpoint can do.
        draft_len: K; by default the longest trained. span_set: "plan" (measured here), "dense", "single",
        "two-forward" or numbers such as "1,2,4". engine: "auto", "plain" or "paged" (see `pick_engine`); with rejection
        sampling, and with beta below 1, one seed may give another text on the other engine. sampling: see
        `tidar.sampling`. Raises TidarError for bad values. Closing the iterator early gives all back.
        """
        request, text = self.request(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            sampling=sampling,
            stop=stop,
            ignore_eos=ignore_eos,
        )
        how, repeatable = self.method(beta), request.params.rejects or beta != 1.0
        rival = self.rival(method, draft_len=draft_len, span_set=span_set, beta=beta, engine=engine)
        if rival is not None:
            plain = rival.engine(self.network, target=self.target)
        elif self.pick_engine(engine) == "paged":
            spec = self.plan_spec(method, draft_len, span_set, repeatable=repeatable)
            jobs = [Job(request, partial(_stream_event, text=text), beta)]
            return _second(self.shared.run(jobs, spec))
        else:
            plan = self.plan(method, draft_len, span_set, repeatable=repeatable)
            plain = Engine(self.network, how, plan, max_batch=1)
        plain.submit(request)
        # From here on a generator: mistakes in the arguments are told by the call itself.
        return (_stream_event(event, text) for event in plain.run())

    def generate(self, prompt: Prompt, **options: object) -> Output:
        """Decodes one prompt to its end; the options are those of `stream`."""
        return _collect(self.stream(prompt, **options))  # type: ignore[arg-type]

    def stream_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        method: MethodName | None = None,
        draft_len: int | None = None,
        span_set: str = "plan",
        beta: float = 1.0,
        engine: EngineName = "auto",
        max_batch: int = 8,
        seeds: Sequence[int] | None = None,
        **options: object,
    ) -> Iterator[tuple[int, StreamEvent]]:
        """Decodes several prompts, up to `max_batch` at a time; yields (which prompt, event) as they come.

        seeds: one for each prompt, instead of `seed` for all. The other options are those of `stream`, and each
        prompt's events are those that `stream` yields for it alone. Raises TidarError for bad values.
        """
        each = [{"seed": seed} for seed in seeds] if seeds is not None else [{}] * len(prompts)
        made = [
            self.request(prompt, **{**options, **own})  # type: ignore[arg-type]
            for prompt, own in zip(prompts, each, strict=True)
        ]
        how, size = self.method(beta), min(max_batch, max(len(prompts), 1))
        repeatable = beta != 1.0 or any(request.params.rejects for request, _ in made)
        rival = self.rival(method, draft_len=draft_len, span_set=span_set, beta=beta, engine=engine)
        if rival is None and self.pick_engine(engine) == "paged":
            spec = self.plan_spec(method, draft_len, span_set, repeatable=repeatable)
            jobs = [Job(r, partial(_stream_event, text=text), beta) for r, text in made]
            return self.shared.run(jobs, spec, max_running=size)
        if rival is not None:
            plain = rival.engine(self.network, max_batch=max_batch, target=self.target)
        else:
            plan = self.plan(method, draft_len, span_set, batch=size, repeatable=repeatable)
            plain = Engine(self.network, how, plan, max_batch=max_batch)
        return (
            (event.request_id, _stream_event(event, made[event.request_id][1]))
            for event in plain.run(request for request, _ in made)
        )

    def generate_batch(self, prompts: Sequence[Prompt], **options: object) -> list[Output]:
        """Decodes several prompts to their ends; the options are those of `stream_batch`, the tokens `generate`'s."""
        events: list[list[StreamEvent]] = [[] for _ in prompts]
        for index, event in self.stream_batch(prompts, **options):  # type: ignore[arg-type]
            events[index].append(event)
        return [_collect(iter(each)) for each in events]


def _second(pairs: Iterator[tuple[int, StreamEvent]]) -> Iterator[StreamEvent]:
    """The events of an only job; closing it closes `pairs`."""
    try:
        for _, event in pairs:
            yield event
    finally:
        pairs.close()  # type: ignore[attr-defined]


def _stream_event(event: StepEvent, text: TextOf) -> StreamEvent:
    return StreamEvent(
        text.take(last=event.finish is not None),
        event.ids,
        event.prefill,
        event.drafted,
        event.accepted,
        event.rows,
        event.seconds,
        event.finish,
        event.draft_forwards,
    )


def _collect(events: Iterator[StreamEvent]) -> Output:
    done = list(events)
    steps = [event for event in done if not event.prefill]
    finish = done[-1].finish
    assert finish is not None
    rate = tokens_per_forward(sum(len(event.ids) for event in steps), len(steps))
    return Output(
        text="".join(event.text for event in done),
        ids=[token for event in done for token in event.ids],
        finish=finish,
        forwards=len(steps),
        tokens_per_forward=float("nan") if rate is None else rate,
        accepts=[event.accepted for event in steps],
        seconds=sum(event.seconds for event in done),
        draft_forwards=sum(event.draft_forwards for event in steps),
    )


def bundled_folder() -> Path:
    """The folder of the checkpoint that comes with the package. Raises TidarError when it is missing."""
    folder = Path(str(files("tidar") / "bundled"))
    if not (folder / "config.json").is_file():
        raise TidarError(f"The bundled checkpoint is missing: there is no config.json in {folder}.")
    return folder


def pick_device(device: str) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU. Raises TidarError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise TidarError(
            f"device {device!r} is not known: use auto, cpu, cuda or cuda:N."
        ) from None
    if chosen.type not in ("cpu", "cuda"):
        raise TidarError(f"device {device!r} is not supported: use auto, cpu, cuda or cuda:N.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count() or "no"
        raise TidarError(
            f"device {device!r} was asked for, but PyTorch sees {seen} CUDA GPU here; use cpu or auto."
        )
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 elsewhere. Raises TidarError for an unknown name."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in names:
        raise TidarError(f"dtype {dtype!r} is not known: use auto, {' or '.join(names)}.")
    return names[dtype]


def load(
    path_or_hub_id: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
) -> LanguageModel:
    """Opens a checkpoint: a Hugging Face folder or hub id; without one, the bundled checkpoint.

    device: "auto", "cpu", "cuda", ... dtype: "auto", "float32" or "bfloat16". A causal checkpoint without a "tidar"
    entry opens with a warning and decodes as AR only. Raises TidarError for what cannot be opened.
    """
    where = pick_device(device)
    source = bundled_folder() if path_or_hub_id is None else path_or_hub_id
    checkpoint = load_checkpoint(source, device=where, dtype=pick_dtype(dtype, where))
    if checkpoint.meta is None and checkpoint.config.attention == "causal":
        warnings.warn(
            f"{checkpoint.source} has no 'tidar' entry in its config.json: it decodes as AR only. "
            "'tidar train --base' converts it.",
            stacklevel=2,
        )
    return LanguageModel(checkpoint, Tokenizer.load(checkpoint.folder))
