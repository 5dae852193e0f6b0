"""Checkpoints: ordinary Hugging Face folders in, ordinary Hugging Face folders out.

A folder that opens here gives the logits that it gives in `transformers`, or does not open; a
folder written here opens in `transformers` as the plain autoregressive model (law 8 of the design).
LLaDA and Dream are no models of `transformers`: their folders open and are written as their published
code has them.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch

from tidar.errors import TidarError
from tidar.families import FAMILIES
from tidar.families.fields import Json
from tidar.gpu_memory import OutOfMemory, check_fits, gib
from tidar.hf_config import (
    TidarMeta,
    config_to_hf,
    find_folder,
    is_eagle_head,
    read_config,
    read_json,
    read_meta,
    token_ids,
)
from tidar.model import ModelConfig, Transformer
from tidar.tensor_files import (
    DISK_DTYPES,
    fill_model,
    find_weights,
    open_weights,
    write_json,
    write_weights,
)
from tidar.whole_folder import whole_folder

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_LICENCES: Final = ("LICENSE*", "LICENCE*", "NOTICE*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A loaded folder.

    Attributes:
        model: on the device and in the dtype asked for, in evaluation mode.
        config: the model's, mask token included.
        meta: the `"tidar"` entry; None for a checkpoint as it was published.
        raw_config: config.json as read.
        generation_config: generation_config.json as read, empty where there is none.
        source: the path or hub id that was asked for.
        folder: where the files lie.
    """

    model: Transformer
    config: ModelConfig
    meta: TidarMeta | None
    raw_config: Json
    generation_config: Json
    source: str
    folder: Path


def load_checkpoint(
    path_or_hub_id: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Literal["auto"] = torch.float32,
) -> Checkpoint:
    """Open a Hugging Face folder of one of the families, converted or not.

    Args:
        path_or_hub_id: a local folder, or `owner/name` on the hub (fetched into its cache).
        device: where the weights go; they are copied tensor by tensor, never held twice.
        dtype: of the model; "auto" is what config.json names, else what the files hold.

    Raises:
        TidarError: no such folder or repository, an unsupported or quantized model, a draft head, missing,
            unexpected or misshapen tensors, unreadable or pickled weights, a device that has no room for them.
    """
    source = os.fspath(path_or_hub_id)
    folder = find_folder(source)
    raw = read_json(folder / "config.json")
    if is_eagle_head(raw):
        raise TidarError(
            f"{source} is an EAGLE-3 head and no model; with the model that it drafts for, use "
            f"--method eagle:{source}:K"
        )
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    config, meta = read_config(raw, generation)
    files = find_weights(folder)
    model = _empty_model(config, device, _resolve_dtype(dtype, raw, files))
    with _loading(model, device):
        fill_model(model, files)
    return Checkpoint(
        model=model.eval(),
        config=config,
        meta=meta,
        raw_config=raw,
        generation_config=generation,
        source=source,
        folder=folder,
    )


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: Transformer,
    *,
    meta: TidarMeta | None = None,
    raw_config: Mapping[str, Any] | None = None,
    tokenizer_source: Path | None = None,
    generation_config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write an ordinary Hugging Face folder, all of it or nothing.

    The files are written to a hidden folder beside the target, flushed to disk and renamed into
    place, so a crash leaves the old checkpoint or the new one. `transformers` opens the result as a
    plain autoregressive model of its family, and never generates the mask token.

    Args:
        folder: the target. An existing one is replaced if it is empty or a checkpoint without
            sub-folders; anything else is left alone.
        model: whose weights and config to write.
        meta: the `"tidar"` entry; None writes a plain autoregressive checkpoint.
        raw_config: config.json of the base, kept as it is but for what changed (vocabulary size,
            dtype, the `"tidar"` entry, remote code); None for a model made from scratch.
        tokenizer_source: folder to copy tokenizer and licence files from.
        generation_config: of the base; None derives it from `raw_config`.
        dtype: on disk; None keeps the model's.
        max_shard_bytes: weights above this size are split over several files.

    Returns:
        The target folder, absolute.

    Raises:
        TidarError: the parts contradict each other, the target is something else, or writing
            failed.
    """
    target = Path(folder).expanduser().resolve()
    config = model.config
    dtype = dtype or model.embed.weight.dtype
    raw = _config_json(config, raw_config, meta, dtype)
    generation = _generation_json(raw, generation_config, meta)
    read_meta(raw, generation)  # a mask token that is also the end token must not reach the disk
    if tokenizer_source is not None and not tokenizer_source.is_dir():
        raise TidarError(f"no such folder to copy the tokenizer from: {tokenizer_source}")
    with whole_folder(target) as partial:
        write_json(partial / "config.json", raw)
        write_json(partial / "generation_config.json", generation)
        write_weights(partial, model, dtype, max_shard_bytes)
        if tokenizer_source is not None:
            _copy_tokenizer(tokenizer_source, partial)
    return target


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy tokenizer files as they are, and the licence that the weights came under."""
    for pattern in (*_TOKENIZER_FILES, *_LICENCES):
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)


def _config_json(
    config: ModelConfig, base: Mapping[str, Any] | None, meta: TidarMeta | None, dtype: torch.dtype
) -> Json:
    """config.json for `config`, from that of the base where there is one."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise TidarError(f"dtype {name} is not supported; allowed: {', '.join(DTYPES)}")
    if meta is not None and meta.mask_token_id != config.mask_token_id:
        raise TidarError(
            f"meta has mask_token_id {meta.mask_token_id}, the model has {config.mask_token_id}"
        )
    raw = config_to_hf(config) if base is None else dict(base)
    # Code of the base is not copied along, and what `tidar` and `torch_dtype` said is said anew.
    for key in ("tidar", "auto_map", "torch_dtype"):
        raw.pop(key, None)
    family = FAMILIES[config.model_type]
    raw.update({family.rows_key: config.vocab_size, "dtype": name})
    raw.setdefault("architectures", [family.architecture])
    if meta is not None:
        raw["tidar"] = meta.to_json()
    described, _ = read_config(raw, {})
    if meta is None and not family.own_mask:  # nothing in config.json names the mask token
        described = replace(described, mask_token_id=config.mask_token_id)
    if described != config:
        raise TidarError("raw_config describes another network than the model that is to be saved")
    return raw


def _generation_json(
    raw: Mapping[str, Any], base: Mapping[str, Any] | None, meta: TidarMeta | None
) -> Json:
    """generation_config.json that suppresses the mask token in plain `transformers`."""
    # Without the file `transformers` takes these ids from config.json; with it, only from the file.
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {key: raw[key] for key in keys if raw.get(key) is not None}
    if base:
        generation = dict(base)
    if meta is not None:
        suppressed = {*token_ids(generation.get("suppress_tokens")), meta.mask_token_id}
        generation["suppress_tokens"] = sorted(suppressed)
    return generation


def init_model(
    config: ModelConfig,
    seed: int,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """A model with random weights, a function of the arguments alone.

    They are drawn in place, in their own dtype: 8B parameters take seconds on a GPU. Raises TidarError
    for a device that is not there, or has no room.
    """
    model = _empty_model(config, device, dtype)
    with _loading(model, device):
        model.init_weights(torch.Generator(device).manual_seed(seed))
    return model


def _empty_model(
    config: ModelConfig, device: str | torch.device, dtype: torch.dtype
) -> Transformer:
    """A model with uninitialised weights on `device`, made without a copy anywhere else."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    try:
        what, needed, advice = _weights(model)
        check_fits(f"the weights ({what})", needed, torch.device(device), lambda room: advice)
        with _loading(model, device):
            return model.to_empty(device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # An unknown device, and a build without CUDA (AssertionError), end here.
        raise TidarError(f"cannot place the model on device {str(device)!r}: {error}") from error


def _loading(model: Transformer, device: str | torch.device) -> OutOfMemory:
    """Raises TidarError where the device's memory runs out."""
    what, needed, advice = _weights(model)
    doing = f"loading the weights ({what}, {gib(needed)})"
    return OutOfMemory(doing, torch.device(device), advice)


def _weights(model: Transformer) -> tuple[str, int, str]:
    """What the weights are, how many bytes they take, and which setting lowers that."""
    count = sum(weight.numel() for weight in model.parameters())
    dtype = model.embed.weight.dtype
    what = f"{count:,} parameters in {str(dtype).removeprefix('torch.')}"
    half = "Load them in bfloat16 (dtype), or load" if dtype.itemsize > 2 else "Load"
    return what, count * dtype.itemsize, f"{half} a smaller model, or use another device."


def _resolve_dtype(
    dtype: torch.dtype | Literal["auto"], raw: Mapping[str, Any], files: Mapping[str, Path]
) -> torch.dtype:
    """The dtype to load into; "auto" looks at config.json, then at the first tensor."""
    if isinstance(dtype, torch.dtype):
        name = str(dtype).removeprefix("torch.")
    elif dtype != "auto":
        raise TidarError(f'dtype must be a torch.dtype or "auto", got {dtype!r}')
    elif raw.get("dtype") or raw.get("torch_dtype"):
        name = str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")
    else:
        first = min(files)
        with open_weights(files[first]) as file:
            disk = file.get_slice(first).get_dtype()
        name = DISK_DTYPES.get(disk, disk)
    if name not in DTYPES:
        raise TidarError(f"dtype {name} is not supported; allowed: {', '.join(DTYPES)}")
    return DTYPES[name]
