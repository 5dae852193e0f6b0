"""What a run starts from: a checkpoint or random weights, a tokenizer, and the mask token."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from tidar.errors import TidarError
from tidar.families import FAMILIES, find_family, need_causal
from tidar.families.fields import Json
from tidar.hf_config import (
    TidarMeta,
    config_from_hf,
    config_to_hf,
    find_folder,
    read_config,
    read_json,
    token_ids,
)
from tidar.mask_token import prepare_mask_token
from tidar.model import Transformer
from tidar.tokens import Tokenizer
from tidar.training.data import Encoding
from tidar.weights import Checkpoint, init_model, load_checkpoint

if TYPE_CHECKING:
    from tidar.training.config import TrainConfig
    from tidar.training.objective import Objective


@dataclass(frozen=True, slots=True)
class Start:
    """A model and what belongs to it, before training.

    meta: the `"tidar"` entry that its checkpoint will have; None for a plain autoregressive one, and for a
    head, which has none.
    """

    net: Transformer
    raw_config: Json
    generation_config: Json | None
    tokenizer_folder: Path
    meta: TidarMeta | None
    save_dtype: torch.dtype


def read_as_base(config: "TrainConfig") -> "TrainConfig":
    """The configuration with label_shift and span_attention settled: those of the base, where they were not given.

    Raises TidarError for a base whose config.json cannot be read, and for one read in a way that the other
    options do not allow.
    """
    if config.base is None:
        return config
    folder = find_folder(config.base)
    base, _ = read_config(read_json(folder / "config.json"), {})
    shift = base.label_shift if config.label_shift is None else config.label_shift
    return replace(
        config, label_shift=shift, span_attention=config.span_attention or base.span_attention
    )


def make_start(config: "TrainConfig", objective: "Objective", seed: int) -> Start:
    """The model to train, with a mask token where the objective needs one, float32 on the CPU.

    Raises TidarError for a base, an architecture or a tokenizer that cannot be used.
    """
    if config.base is not None:
        loaded = load_checkpoint(config.base, dtype=torch.float32)
        _check_base(loaded, config.objective)
        net, raw, folder = loaded.model, loaded.raw_config, loaded.folder
        generation = loaded.generation_config
        named = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
        dtype = torch.bfloat16 if named.endswith("bfloat16") else torch.float32
    else:
        assert config.arch is not None
        assert config.tokenizer is not None
        net = init_model(config_from_hf(read_arch(config.arch)), seed)
        folder, generation = config.tokenizer.expanduser(), None
        raw = config_to_hf(net.config)
        raw["eos_token_id"] = end_of_text(Tokenizer.load(folder), config.end_token, folder)
        dtype = torch.float32
    if config.tokenizer is not None:
        folder = config.tokenizer.expanduser()
    if config.save_dtype != "auto":
        dtype = torch.bfloat16 if config.save_dtype == "bfloat16" else torch.float32
    meta = None
    if objective.needs_mask:
        meta = objective.meta(prepare_mask_token(net, raw, Tokenizer.load(folder)))
    if meta is not None:
        net.config = meta.read_by(net.config)
    else:
        net.config = replace(net.config, span_attention="causal")
        if config.objective == "ar":  # no mask row is trained any more: every row of it is a token
            generation = _without_mask(generation, net.config.mask_token_id)
            net.set_mask_token(None)
    return Start(net, raw, generation, folder, meta, dtype)


def _without_mask(generation: Json | None, mask_token_id: int | None) -> Json | None:
    """generation_config.json of a base, without the mask token among what it suppresses."""
    if generation is None or "suppress_tokens" not in generation:
        return generation
    kept = [token for token in token_ids(generation["suppress_tokens"]) if token != mask_token_id]
    rest = {key: value for key, value in generation.items() if key != "suppress_tokens"}
    return rest | ({"suppress_tokens": kept} if kept else {})


def _check_base(base: Checkpoint, objective: str) -> None:
    """Raises TidarError for a base whose rows see what this objective's rows never do."""
    if objective != "masked-diffusion":
        need_causal(base.config, f"Training for objective {objective!r}")
    if find_family(base.raw_config).own_mask:
        raise TidarError(
            f"{base.source} is a {base.config.model_type} checkpoint, which opens for decoding alone; "
            f"train from {', '.join(name for name in FAMILIES if not FAMILIES[name].own_mask)}."
        )


def read_arch(path: Path) -> Json:
    """A config.json, or the same fields as YAML. Raises TidarError if it is neither."""
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml"):
            import yaml

            value = yaml.safe_load(text)
        else:
            value = json.loads(text)
    except OSError as error:
        raise TidarError(f"{path}: cannot be read ({error.strerror}).") from error
    except Exception as error:  # YAML's and JSON's own errors
        raise TidarError(f"{path}: not a readable architecture file ({error}).") from error
    if not isinstance(value, dict):
        raise TidarError(f"{path}: must hold an object with the fields of a config.json.")
    return cast("Json", value)


def end_of_text(tokenizer: Tokenizer, end_token: str | None, folder: Path) -> int:
    """The token that ends a document: the one named, else the lowest of the tokenizer's own."""
    if end_token is not None:
        if end_token not in tokenizer.vocab:
            raise TidarError(f"end_token {end_token!r} is not in the vocabulary of {folder}.")
        return tokenizer.vocab[end_token]
    if not tokenizer.eos_ids:
        raise TidarError(
            f"the tokenizer in {folder} has no end-of-text token; name one: end_token."
        )
    return min(tokenizer.eos_ids)


def make_encoding(net: Transformer, folder: Path, end_token: str | None) -> Encoding:
    """How text becomes tokens of this model. Raises TidarError without an end-of-text token."""
    from tokenizers import Tokenizer as Backend

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise TidarError(f"{folder} has no tokenizer.json, which training needs for its speed.")
    return Encoding(
        tokenizer=Backend.from_file(str(file)),
        end_id=end_of_text(Tokenizer.load(folder), end_token, folder),
        vocab_size=net.config.vocab_size,
        mask_id=net.config.mask_token_id,
    )
