"""EAGLE-3 heads on the disk, in the published format: config.json and one file of tensors.

Names and keys: SafeAILab/EAGLE, `eagle/model/cnets.py` (the module tree) and `eagle/model/ea_model.py` (the
files: pytorch_model.bin, else model.safetensors); sgl-project/SpecForge, `configs/*-eagle3.json`; vLLM,
`vllm/model_executor/models/llama_eagle3.py` (the readers of both; it skips t2d, which some heads lack and d2t
says already). No published weights were ever run here:
the format is tested on small folders with exactly these names and keys.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tidar.eagle_head import EagleConfig, EagleHead, published_taps
from tidar.errors import TidarError
from tidar.families.fields import Json
from tidar.gpu_memory import OutOfMemory
from tidar.hf_config import config_from_hf, config_to_hf, find_folder, read_json
from tidar.model import ModelConfig
from tidar.tensor_files import layer_slots, some, write_json
from tidar.whole_folder import whole_folder

ARCHITECTURES: Final = ("LlamaForCausalLMEagle3", "LlamaForCausalLM", "Eagle3LlamaForCausalLM")
"""What heads of this network call themselves: SpecForge's and AngelSlim's, the authors', vLLM's."""

WEIGHTS: Final = ("model.safetensors", "pytorch_model.bin")
_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS: Final = (torch.int64, torch.int32)
_LAYER_IDS: Final = "eagle_aux_hidden_state_layer_ids"


def load_eagle_head(
    path_or_hub_id: str | os.PathLike[str],
    target: ModelConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> EagleHead:
    """Opens a head that drafts for a model of this config, in evaluation mode.

    A pytorch_model.bin is read without running code (`torch.load`, weights only). Raises TidarError for a
    folder that is no head of this network or belongs to another model, and for a tensor that is missing,
    unexpected, misshapen or out of range (of `dtype` as well), each by its published name.
    """
    folder = find_folder(os.fspath(path_or_hub_id), also=("pytorch_model.bin",))
    raw, tensors = read_json(folder / "config.json"), _read_tensors(folder)
    with _errors_name(folder):
        config = read_config(raw, target)
        own = "embed_tokens.weight" in tensors
        if own and config.layer.vocab_size != target.vocab_size:
            raise TidarError(
                f"it has an embedding of its own, of {config.layer.vocab_size} tokens, and the model has "
                f"{target.vocab_size}; these must be equal"
            )
        head = EagleHead(config, own_embedding=own)
        _fill(head, tensors)
        half = (
            "Load model and head in bfloat16 (dtype)"
            if dtype.itemsize > 2
            else "Load a smaller head"
        )
        advice = f"{half}, or use another device."
        with OutOfMemory("loading the head", torch.device(device), advice):
            head = head.to(device=device, dtype=dtype)
        for name, slot in head_slots(head).items():
            if not bool(torch.isfinite(slot).all()):
                kind = str(dtype).removeprefix("torch.")
                raise TidarError(f"{name} holds values that are no numbers in {kind}")
    return head.eval()


@contextmanager
def _errors_name(folder: Path) -> Iterator[None]:
    """Puts the folder before what is said of the head in it."""
    try:
        yield
    except TidarError as error:
        raise TidarError(f"EAGLE-3 head {folder}: {error}") from error


def save_eagle_head(folder: str | os.PathLike[str], head: EagleHead, target: ModelConfig) -> Path:
    """Writes a head for a model of this config in the published format, whole or not at all.

    Tensors are as the head holds them, in model.safetensors. Returns the folder, absolute. Raises
    TidarError where `folder` holds anything but a checkpoint, or cannot be written.
    """
    where = Path(folder).expanduser().resolve()
    tensors = {**head_slots(head), "d2t": head.d2t, "t2d": head.t2d}
    with whole_folder(where) as partial:
        write_json(partial / "config.json", config_json(head, target))
        on_disk = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_disk, partial / "model.safetensors", metadata={"format": "pt"})
    return where


def head_slots(head: EagleHead) -> dict[str, Tensor]:
    """Published name -> the part of a parameter that holds it; views, not copies."""
    slots = {f"midlayer.{name}": tensor for name, tensor in layer_slots(head.layer).items()}
    slots["midlayer.hidden_norm.weight"] = head.hidden_norm.weight.detach()
    slots["fc.weight"] = head.fc.weight.detach()
    slots["norm.weight"] = head.norm.weight.detach()
    slots["lm_head.weight"] = head.lm_head.weight.detach()
    if head.embed is not None:
        slots["embed_tokens.weight"] = head.embed.weight.detach()
    return slots


def read_config(raw: Mapping[str, Any], target: ModelConfig) -> EagleConfig:
    """A head's config.json. Raises TidarError for what this network does not compute, by key.

    max_position_embeddings is the length it was trained on (2048 in the authors' heads), no limit. Without
    draft_vocab_size it drafts the whole vocabulary, as in vLLM.
    """
    named = raw.get("architectures") or list(ARCHITECTURES[:1])
    if not isinstance(named, list):
        raise TidarError(f"architectures is {named!r}; it must be a list, such as [{named!r}]")
    if named[0] not in ARCHITECTURES:
        raise TidarError(
            f"architectures is {named!r}; an EAGLE-3 head is one of {', '.join(ARCHITECTURES)}"
        )
    fixed: dict[str, tuple[object, ...]] = {
        "model_type": ("llama",),
        "num_hidden_layers": (1,),
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "norm_before_residual": (None, False),
        "target_hidden_size": (None, target.hidden_size),
        "hidden_size": (target.hidden_size,),
    }
    for key, allowed in fixed.items():
        if raw.get(key) not in allowed:
            raise TidarError(
                f"{key} is {raw.get(key)!r}; for this model it must be {allowed[-1]!r}"
            )
    layer = config_from_hf(raw)
    if layer.vocab_size > target.vocab_size:
        raise TidarError(
            f"vocab_size is {layer.vocab_size}; the model has {target.vocab_size} tokens"
        )
    size = raw.get("draft_vocab_size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
        raise TidarError(f"draft_vocab_size must be a whole number, got {size!r}")
    return EagleConfig(
        layer=layer,
        draft_vocab_size=layer.vocab_size if size is None else size,
        taps=_taps(raw, target.num_layers),
    )


def _taps(raw: Mapping[str, Any], num_layers: int) -> tuple[int, int, int]:
    """The layers that are read: the published ones where config.json names none.

    The key means two things. At the top, as vLLM reads it, an id is the layer that the hidden state goes
    into; within `eagle_config`, as SGLang reads it, the layer that it comes out of.
    """
    nested = raw.get("eagle_config")
    inside = nested.get(_LAYER_IDS) if isinstance(nested, dict) else None
    ids, shift = (inside, 0) if raw.get(_LAYER_IDS) is None else (raw[_LAYER_IDS], 1)
    if ids is None:
        return published_taps(num_layers)
    whole = isinstance(ids, list) and all(type(each) is int for each in ids)
    if not whole or len(ids) != 3 or not all(0 <= each - shift < num_layers for each in ids):
        raise TidarError(
            f"{_LAYER_IDS} is {ids!r}; it must be three layers from {shift} to {num_layers - 1 + shift}"
        )
    low, middle, high = (each - shift for each in ids)
    return low, middle, high


def config_json(head: EagleHead, target: ModelConfig) -> Json:
    """config.json of a head, keys as published; the layers read are named only where they are not the usual."""
    raw = config_to_hf(head.config)
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    raw["architectures"] = [ARCHITECTURES[0]]
    raw["draft_vocab_size"] = head.draft_vocab_size
    raw["torch_dtype"] = str(head.fc.weight.dtype).removeprefix("torch.")
    rule = (1, target.num_layers // 2 - 1, target.num_layers - 4)
    if head.taps != rule:  # other programs know that rule alone
        raw[_LAYER_IDS] = [tap + 1 for tap in head.taps]
    return raw


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's file of weights, by name."""
    present = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not present:
        raise TidarError(f"{folder} has no weights: neither {' nor '.join(WEIGHTS)}")
    path = present[0]
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of safetensors, and anything at all of a pickle that is none
        reason = str(error).strip().split("\n")[0]
        raise TidarError(
            f"{path}: not a readable file of weights ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise TidarError(f"{path}: must hold tensors by name, as a state_dict does")
    return {str(name): tensor for name, tensor in loaded.items()}


def _fill(head: EagleHead, tensors: Mapping[str, Tensor]) -> None:
    """Copies every tensor into its place; all names, shapes and values are checked before any is copied."""
    slots = head_slots(head)
    whole = head.draft_vocab_size == head.config.vocab_size
    maps = {"d2t": head.d2t, "t2d": head.t2d}
    needed = set(slots) if whole else {*slots, "d2t"}
    if missing := sorted(needed - set(tensors)):
        raise TidarError(f"it lacks tensors: {some(missing)}")
    if unexpected := sorted(set(tensors) - set(slots) - set(maps)):
        raise TidarError(f"it has unexpected tensors: {some(unexpected)}")
    for name, slot in {**slots, **maps}.items():
        if name in tensors:
            _check(name, tensors[name], slot)
    if whole:  # the source then reads neither map, and leaves them at zero
        head.set_vocabulary(range(head.draft_vocab_size))
    else:
        _fill_maps(head, tensors["d2t"].long(), tensors.get("t2d"))
    for name, slot in slots.items():
        slot.copy_(tensors[name])


def _check(name: str, tensor: Tensor, slot: Tensor) -> None:
    if tensor.shape != slot.shape:
        raise TidarError(
            f"{name} has shape {list(tensor.shape)}; config.json and the model ask for {list(slot.shape)}"
        )
    kinds = {"d2t": _INTEGERS, "t2d": (torch.bool,)}.get(name, _FLOATS)
    if tensor.dtype not in kinds:
        raise TidarError(
            f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}; allowed: "
            f"{', '.join(str(kind).removeprefix('torch.') for kind in kinds)}"
        )


def _fill_maps(head: EagleHead, d2t: Tensor, t2d: Tensor | None) -> None:
    """The draft vocabulary, by d2t; t2d must agree where it is there. Raises TidarError that names the wrong one."""
    ids = d2t + torch.arange(len(d2t))
    wrong = (ids < 0) | (ids >= head.config.vocab_size)
    wrong[1:] |= ids[1:] <= ids[:-1]
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise TidarError(
            f"d2t: draft id {at} goes to token {int(ids[at])}; targets must rise and lie from 0 to "
            f"{head.config.vocab_size - 1}"
        )
    head.set_vocabulary(ids.tolist())
    if t2d is not None and not torch.equal(t2d, head.t2d):
        at = int((t2d != head.t2d).nonzero()[0])
        raise TidarError(f"t2d: says {bool(t2d[at])} of token {at}, and d2t the contrary")
