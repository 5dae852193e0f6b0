"""One flat configuration of a run: our own fields, and any `TrainingArguments` field by name."""

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

from tidar.errors import TidarError
from tidar.hf_config import Masking
from tidar.model import SpanAttention
from tidar.training.objective import Objective
from tidar.training.objectives import OBJECTIVES, ObjectiveName
from tidar.training.sources import Source
from tidar.training.spans import Anchors, Documents, SpanObjective

# Set by us from other fields; giving them as well would leave two truths.
_TAKEN: Final = {
    "output_dir": "out",
    "overwrite_output_dir": "out",
    "resume_from_checkpoint": "resume",
    "eval_steps": "eval_every",
    "eval_strategy": "eval_every",
    "remove_unused_columns": "",
    "label_names": "",
    "do_train": "",
    "do_eval": "",
    "load_best_model_at_end": "",
    "train_sampling_strategy": "",
    "logging_nan_inf_filter": "",
    "torch_compile": "compile",
    "auto_find_batch_size": "",
    "deepspeed": "",
    "full_determinism": "",
    "save_only_model": "",
}
_REASONS: Final = {
    "save_only_model": "without the optimizer's state no checkpoint could be resumed from",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A run. Values of `arguments` go to `transformers.TrainingArguments` over our defaults.

    out: run folder: `log.jsonl`, `checkpoint-N` (to resume), and at the end `model` (the
    checkpoint). base: folder or hub id to start from; else arch and tokenizer make a model from
    scratch. arch: JSON or YAML file with the fields of a Hugging Face config.json. data, eval_data:
    what to learn; held-out data by name. seq_len: clean tokens per sequence. A multiple of 128 on a
    GPU. compile, attention: "auto" is compiled FlexAttention on a GPU and plain dense attention on
    a CPU. objective: what to learn; alpha to documents are options of objectives, each of which takes
    those of its fields (`tidar.training.objectives`). label_shift, span_attention: None is as the base
    is read, or the objective's default (`read_as_base`). min_lr_ratio: final over highest learning rate
    of the default schedule (cosine after a warm-up). eval_every: steps between held-out losses and
    calls of `on_interval`; 0 is never. eval_sequences: sequences of each held-out set that are used.
    keep_models: steps after which the model alone is kept as well, in `OUT/model-STEP`. save_dtype: of
    these and the final model; "auto" is the base's, or float32 from scratch. peak_tflops: of one
    device, for the model FLOPs utilisation; 0 looks the device up. resume: carry on from the last
    whole checkpoint in `out`.
    """

    out: Path
    data: tuple[Source, ...]
    base: str | None = None
    arch: Path | None = None
    tokenizer: Path | None = None
    eval_data: tuple[tuple[str, Source], ...] = ()
    text_field: str = "text"
    end_token: str | None = None
    seq_len: int = 1024
    cache_dir: Path | None = None
    objective: ObjectiveName = "tidar"
    alpha: float = 1.0
    draft_lens: tuple[int, ...] = (16,)
    masking: Masking = "full"
    anchors: Anchors = "grid"
    soft_labels: float = 0.0
    teacher: Literal["causal", "base"] = "causal"
    draft_vocab_size: int = 0
    ttt_length: int = 7
    label_shift: bool | None = None
    span_attention: SpanAttention | None = None
    documents: Documents = "apart"
    head_chunk: int = 0
    optimizer: Literal["adamw", "muon"] = "adamw"
    min_lr_ratio: float = 0.1
    gradient_checkpointing: bool = False
    compile: Literal["auto", "on", "off"] = "auto"
    attention: Literal["auto", "dense", "flex"] = "auto"
    eval_every: int = 0
    eval_sequences: int = 256
    keep_models: tuple[int, ...] = ()
    save_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    peak_tflops: float = 0.0
    resume: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(TrainConfig).items():
            kind, value = _kind(hint), getattr(self, name)
            if value is None or typing.get_origin(kind) is not Literal:
                continue
            if value not in kind.__args__:
                allowed = ", ".join(map(str, kind.__args__))
                raise TidarError(f"{name} is {value!r}; it must be one of {allowed}.")
        if self.base is None and (self.arch is None or self.tokenizer is None):
            raise TidarError(
                "nothing to train: give base (a checkpoint), or arch and tokenizer (from scratch)."
            )
        if self.base is not None and self.arch is not None:
            raise TidarError("give base (continue a checkpoint) or arch (from scratch), not both.")
        for name in ("eval_every", "eval_sequences", "peak_tflops"):
            if getattr(self, name) < 0:
                raise TidarError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        if any(step < 1 for step in self.keep_models):
            raise TidarError(
                f"keep_models is {self.keep_models}; give steps from 1, such as 500,1000."
            )
        if not 0.0 <= self.min_lr_ratio <= 1.0:
            raise TidarError(f"min_lr_ratio is {self.min_lr_ratio}; it must be from 0 to 1.")
        for name in self.arguments:
            _check_argument(name)
        if self.optimizer == "muon" and "optim" in self.arguments:
            raise TidarError(
                f"optim ({self.arguments['optim']}) and optimizer muon are two optimizers; give one: "
                "optimizer muon, or optim with optimizer adamw."
            )
        self.objective_with(seed=0)
        spans = issubclass(OBJECTIVES[self.objective], SpanObjective)
        if spans and max(self.draft_lens) > self.seq_len:
            raise TidarError(
                f"draft_lens has {max(self.draft_lens)}, which does not fit seq_len {self.seq_len}; "
                "a span must fit a sequence."
            )
        if self.objective == "eagle":
            self._check_eagle()

    def _check_eagle(self) -> None:
        if self.base is None:
            raise TidarError("objective 'eagle' trains a head for a checkpoint: give base.")
        if self.ttt_length > self.seq_len - 2:
            raise TidarError(
                f"ttt_length is {self.ttt_length}, which does not fit seq_len {self.seq_len}: the last step "
                "would predict nothing."
            )

    def objective_with(self, seed: int) -> Objective:
        """The objective of this run. Raises TidarError for impossible values."""
        given: dict[str, Any] = {
            name: getattr(self, name) for name in objective_options(self.objective)
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        return OBJECTIVES[self.objective](seed=seed, **chosen)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """From a recipe or a command line: our fields and `TrainingArguments` fields side by side.

        `data` is one source or a list of them, `eval_data` a mapping or a list of `name=path`.
        Texts are converted to the field's type. Raises TidarError for an unknown key, with the
        nearest one, and for an option that another objective has and this one lacks.
        """
        own: dict[str, Any] = {}
        arguments: dict[str, Any] = dict(values.get("arguments") or {})
        kinds = typing.get_type_hints(cls)
        for key, value in values.items():
            name = key.replace("-", "_")
            if name == "arguments" or value is None:
                continue
            if name in kinds:
                own[name] = _converted(name, value, kinds[name])
            else:
                _check_argument(name)
                arguments[name] = value
        for needed in ("out", "data"):
            if needed not in own:
                raise TidarError(f"the configuration lacks {needed!r}.")
        config = cls(**own, arguments=arguments)
        for name in own:
            _check_option(name, config.objective)
        return config

    def to_json(self) -> dict[str, Any]:
        """Plain values for the record of a run."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["data"] = [f"{source.name}={source.weight:g}" for source in self.data]
        values["eval_data"] = {name: source.name for name, source in self.eval_data}
        values["arguments"] = dict(self.arguments)
        return typing.cast("dict[str, Any]", json.loads(json.dumps(values, default=str)))


def objective_options(objective: ObjectiveName) -> set[str]:
    """Names of the fields of `TrainConfig` that this objective takes."""
    return {option.name for option in dataclasses.fields(OBJECTIVES[objective])} - {"seed"}


def _check_option(name: str, objective: ObjectiveName) -> None:
    """Raises TidarError for an option of other objectives."""
    others = [other for other in OBJECTIVES if name in objective_options(other)]
    if others and objective not in others:
        raise TidarError(
            f"{name} is no option of objective {objective!r}; leave it out, or train for one that has it: "
            f"{', '.join(others)}."
        )


@cache
def argument_types() -> dict[str, Any]:
    """Names of `transformers.TrainingArguments` fields, and the type of each as declared."""
    from transformers import TrainingArguments

    return {f.name: f.type for f in dataclasses.fields(TrainingArguments) if f.init}


def parse_argument(name: str, value: Any) -> Any:
    """A text from a command line as what this field of `TrainingArguments` takes. Raises TidarError if it is not."""
    kind = argument_types()[name]
    if not isinstance(value, str) or "str" in str(kind):
        return value
    text = {"true": "true", "false": "false", "none": "null"}.get(value.lower(), value)
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = value
    taken = re.findall(r"\b(?:bool|int|float|dict|list)\b", str(kind))
    if isinstance(parsed, float) and parsed.is_integer() and "float" not in taken:
        parsed = int(parsed)  # 1e4 steps
    plain = isinstance(parsed, str) or (isinstance(parsed, float) and "float" not in taken)
    if plain and taken:
        raise TidarError(f"{name} is {value!r}; it must be {' or '.join(dict.fromkeys(taken))}.")
    return parsed


def _check_argument(name: str) -> None:
    if name in _TAKEN:
        instead = f"; use {_TAKEN[name]!r}" if _TAKEN[name] else ""
        reason = _REASONS.get(name, "the run decides it")
        raise TidarError(f"{name!r} cannot be set: {reason}{instead}.")
    known = argument_types()
    if name not in known:
        own = [f.name for f in dataclasses.fields(TrainConfig)]
        near = difflib.get_close_matches(name, [*own, *known], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TidarError(f"unknown training option {name!r}.{hint}")


def _converted(name: str, value: Any, kind: Any) -> Any:
    """A value from YAML or a command line as the type of the field."""
    if name == "data":
        given: list[Any] = [value] if isinstance(value, str | Source) else list(value)
        return tuple(i if isinstance(i, Source) else Source.parse(str(i)) for i in given)
    if name == "eval_data":
        return _eval_data(value)
    if name in ("draft_lens", "keep_models"):
        numbers: Any = value.split(",") if isinstance(value, str) else value
        try:
            return tuple(int(item) for item in ([numbers] if isinstance(numbers, int) else numbers))
        except (TypeError, ValueError):
            raise TidarError(f"{name} is {value!r}; give numbers such as 8,16.") from None
    kind = _kind(kind)
    try:
        if kind is bool:
            return value if isinstance(value, bool) else _BOOLS[str(value).lower()]
        if name in ("compile", "attention") and isinstance(value, bool):
            return "on" if value else "off"
        return kind(value) if kind in (int, float, str, Path) else value
    except (TypeError, ValueError, KeyError):
        raise TidarError(f"{name} is {value!r}; it must be {kind.__name__}.") from None


def _kind(hint: Any) -> Any:
    """The type of a field, without the None that it may be."""
    parts = typing.get_args(hint)
    return next(k for k in parts if k is not type(None)) if type(None) in parts else hint


_BOOLS: Final = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _eval_data(value: Mapping[str, Any] | Sequence[Any] | str) -> tuple[tuple[str, Source], ...]:
    if isinstance(value, Mapping):
        return tuple((str(name), Source(str(path))) for name, path in value.items())
    found: list[tuple[str, Source]] = []
    for item in [value] if isinstance(value, str) else value:
        if isinstance(item, tuple | list):
            name, source = item
            found.append((name, source if isinstance(source, Source) else Source(str(source))))
            continue
        name, _, path = str(item).partition("=")
        found.append(
            (name, Source(path)) if path else (Path(name).name.split(".")[0], Source(name))
        )
    if len({name for name, _ in found}) < len(found):
        raise TidarError("two sets of eval_data have one name; write name=path.")
    return tuple(found)
