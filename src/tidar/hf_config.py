"""`config.json` of a Hugging Face folder <-> `ModelConfig`, and the `"tidar"` entry in it.

The keys are each family's own (`tidar.families`). What this network does not compute is refused by name: a
checkpoint that opens here gives the logits that it gives in `transformers`, or in the code it was published with.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

from tidar.errors import TidarError
from tidar.families import FAMILIES, find_family
from tidar.families.fields import Json, is_int, is_number, whole_number
from tidar.model import Attention, ModelConfig, SpanAttention

Masking = Literal["full", "random"]
Trained = Literal["tidar", "block-diffusion", "masked-diffusion"]

FORMAT_VERSION: Final = 1
_HUB_FILES: Final = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
]
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class TidarMeta:
    """The `"tidar"` entry of `config.json`: how the mask rows were trained.

    Attributes:
        draft_lens: values of K (mask rows per span) in training, ascending; none where there were no spans,
            which is so with bidirectional attention.
        mask_token_id: the token id that fills mask rows.
        alpha: weight of the causal loss, `(alpha * causal + mask) / (1 + alpha)`.
        masking: every row of a span masked, or some of them real tokens.
        objective: what was learned.
        attention, label_shift, span_attention: see `ModelConfig`; masked diffusion is trained with
            bidirectional attention.
        format_version: of this entry.
    """

    draft_lens: tuple[int, ...]
    mask_token_id: int
    alpha: float = 1.0
    masking: Masking = "full"
    objective: Trained = "tidar"
    attention: Attention = "causal"
    label_shift: bool = False
    span_attention: SpanAttention = "causal"
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Refuse values that no training run can have had."""
        if self.format_version != FORMAT_VERSION:
            raise TidarError(
                f'"tidar" entry has format_version {self.format_version!r}; '
                f"this version of tidar reads {FORMAT_VERSION}"
            )
        lens = self.draft_lens
        if (
            (not lens and self.attention == "causal")
            or any(not is_int(k) or k < 1 for k in lens)
            or list(lens) != sorted(set(lens))
        ):
            raise TidarError(
                '"tidar" entry: draft_lens must be whole numbers above 0, ascending, '
                f"each once; got {list(lens)}"
            )
        if not is_int(self.mask_token_id) or self.mask_token_id < 0:
            raise TidarError(
                f'"tidar" entry: mask_token_id must be a token id, got {self.mask_token_id!r}'
            )
        if not is_number(self.alpha) or not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise TidarError(f'"tidar" entry: alpha must be 0 or more, got {self.alpha!r}')
        choices = {"masking": Masking, "objective": Trained}
        choices |= {"attention": Attention, "span_attention": SpanAttention}
        for name, kind in choices.items():
            if (value := getattr(self, name)) not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise TidarError(f'"tidar" entry: {name} {value!r} is unknown; allowed: {allowed}')
        if not isinstance(self.label_shift, bool):
            raise TidarError(
                f'"tidar" entry: label_shift must be true or false, got {self.label_shift!r}'
            )
        if self.label_shift and self.attention == "causal":
            raise TidarError('"tidar" entry: label_shift goes with bidirectional attention alone')

    def to_json(self) -> Json:
        """The entry as JSON values; earlier versions read that of a TiDAR checkpoint."""
        plain = ("format_version", "draft_lens", "mask_token_id", "alpha", "masking")
        usual = (self.objective, self.attention) == ("tidar", "causal")
        names = plain if usual else self.__dataclass_fields__
        return {n: getattr(self, n) for n in names} | {"draft_lens": list(self.draft_lens)}

    def read_by(self, config: ModelConfig) -> ModelConfig:
        """The network, with how its rows were read in this training."""
        return replace(
            config,
            attention=self.attention,
            label_shift=self.label_shift,
            span_attention=self.span_attention,
        )

    @classmethod
    def from_json(cls, entry: object) -> "TidarMeta":
        """Read an entry. Raises TidarError for unknown versions and keys, and for bad values."""
        if not isinstance(entry, dict):
            raise TidarError(f'"tidar" entry must be an object, got {type(entry).__name__}')
        # Version first: a newer entry may have any keys, and its version is the real complaint.
        version = entry.get("format_version")
        if version != FORMAT_VERSION:
            raise TidarError(
                f'"tidar" entry has format_version {version!r}; '
                f"this version of tidar reads {FORMAT_VERSION}"
            )
        known = set(cls.__dataclass_fields__)
        if unknown := sorted(set(entry) - known):
            raise TidarError(
                f'"tidar" entry has unknown keys: {", ".join(unknown)}; '
                f"allowed: {', '.join(sorted(known))}"
            )
        if missing := sorted({"draft_lens", "mask_token_id"} - set(entry)):
            raise TidarError(f'"tidar" entry lacks {", ".join(missing)}')
        if not isinstance(entry["draft_lens"], list):
            raise TidarError('"tidar" entry: draft_lens must be a list of whole numbers')
        return cls(**{**entry, "draft_lens": tuple(entry["draft_lens"])})


def read_meta(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> TidarMeta | None:
    """The `"tidar"` entry of a config.json, checked against the rest of the folder.

    Args:
        raw: config.json.
        generation: generation_config.json, or an empty mapping.

    Returns:
        None where there is no entry: the checkpoint is plain autoregressive.

    Raises:
        TidarError: the entry is malformed, or its mask token is outside the vocabulary or is a
            token that the model has to emit (end of text).
    """
    if "tidar" not in raw:
        return None
    meta = TidarMeta.from_json(raw["tidar"])
    if find_family(raw).own_mask:
        raise TidarError(
            f"a checkpoint of model_type {raw['model_type']!r} has no 'tidar' entry: its config.json "
            "names the mask token itself"
        )
    vocab_size = whole_number(raw, "vocab_size")
    if meta.mask_token_id >= vocab_size:
        raise TidarError(
            f'"tidar" entry: mask_token_id {meta.mask_token_id} is outside the vocabulary '
            f"of {vocab_size} rows"
        )
    _refuse_mask_in_use('"tidar" entry', meta.mask_token_id, raw, generation)
    return meta


def is_eagle_head(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an EAGLE-3 head (`tidar.eagle_files`), which otherwise looks like a model's."""
    named = raw.get("architectures")
    named = named if isinstance(named, list) else [named]
    return "draft_vocab_size" in raw or any("Eagle3" in str(name) for name in named)


def read_config(
    raw: Mapping[str, Any], generation: Mapping[str, Any]
) -> tuple[ModelConfig, TidarMeta | None]:
    """The network that a folder's config.json describes, mask token and attention included, and its "tidar" entry.

    Args and errors are those of `read_meta` and `config_from_hf`.
    """
    meta = read_meta(raw, generation)
    config = config_from_hf(raw, mask_token_id=meta.mask_token_id if meta else None)
    if meta is not None:
        return meta.read_by(config), meta
    if config.mask_token_id is not None:
        _refuse_mask_in_use("config.json", config.mask_token_id, raw, generation)
    return config, None


def _refuse_mask_in_use(
    who: str, mask_token_id: int, raw: Mapping[str, Any], generation: Mapping[str, Any]
) -> None:
    for where, config in (("config.json", raw), ("generation_config.json", generation)):
        for key in ("bos_token_id", "eos_token_id"):
            if mask_token_id in token_ids(config.get(key)):
                raise TidarError(
                    f"{who}: mask_token_id {mask_token_id} is also the {key} "
                    f"of {where}; the mask token is never emitted and cannot serve as another"
                )


def token_ids(value: object) -> tuple[int, ...]:
    """A token id entry of a config as a tuple: it may be absent, one id or a list of ids."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool))


def find_folder(source: str, *, also: tuple[str, ...] = ()) -> Path:
    """The local folder of a path or hub id, with a config.json in it; also: more files to fetch of a hub id."""
    folder = Path(source).expanduser()
    if folder.is_file():
        raise TidarError(f"{source} is a file; give the folder that holds config.json")
    if not folder.is_dir():
        if source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source):
            raise TidarError(f"no such folder: {source}; give a checkpoint folder, or a hub id")
        folder = _download(source, also)
    if not (folder / "config.json").is_file():
        raise TidarError(f"{source} is no Hugging Face checkpoint: it has no config.json")
    return folder


def _download(hub_id: str, also: tuple[str, ...]) -> Path:
    """Fetch what a checkpoint needs, and no code or pickles, into the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        wanted = [*_HUB_FILES, *also]
        return Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except (OSError, HFValidationError) as error:  # every hub and network error is an OSError
        reason = str(error).strip().split("\n")[0]
        raise TidarError(
            f"{hub_id!r} is no local folder, and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason}). Check the path, or the id and the connection."
        ) from error


def read_json(path: Path) -> Json:
    """A JSON file that holds an object. Raises TidarError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TidarError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise TidarError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def config_from_hf(raw: Mapping[str, Any], *, mask_token_id: int | None = None) -> ModelConfig:
    """Read config.json of one of the families, its "tidar" entry left out.

    Args:
        raw: config.json as a mapping.
        mask_token_id: goes into the result as it is, but for a family whose config.json names one.

    Raises:
        TidarError: another family, or anything that this network does not compute.
    """
    return find_family(raw).read(raw, mask_token_id)


def config_to_hf(config: ModelConfig) -> Json:
    """config.json for a model made from scratch, without a dtype.

    Raises:
        TidarError: the family's published class cannot express these biases, norms or masks.
    """
    return FAMILIES[config.model_type].write(config)
