"""Safetensors files <-> the merged parameters of a `Transformer`.

On disk a projection has the name and shape of its family; in memory q, k, v are one matrix and gate,
up another. `tensor_slots` is the one place that knows both: a dict from the
name on disk to the view of the merged parameter that it fills, used for reading and for writing.

Pickle files can run code when opened and are refused.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tidar.errors import TidarError
from tidar.families import FAMILIES
from tidar.families.names import TRANSFORMERS, TensorNames
from tidar.hf_config import read_json
from tidar.model import Layer, Transformer

DISK_DTYPES: Final = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_WEIGHTS: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def tensor_slots(model: Transformer) -> dict[str, Tensor]:
    """Name on disk -> the part of a parameter of `model` that holds it; views, not copies.

    A tied embedding appears once, under its own name.
    """
    names = FAMILIES[model.config.model_type].names
    slots = {f"{names.embed}.weight": model.embed.weight.detach()}
    for layer in model.layers:
        assert isinstance(layer, Layer)
        for name, tensor in layer_slots(layer, names).items():
            slots[f"{names.layers}{layer.index}.{name}"] = tensor
    slots[f"{names.norm}.weight"] = model.norm.weight.detach()
    if model.head is not None:
        slots[f"{names.head}.weight"] = model.head.weight.detach()
    return slots


def layer_slots(layer: Layer, names: TensorNames = TRANSFORMERS) -> dict[str, Tensor]:
    """`tensor_slots` for one layer, without the prefix."""
    slots = {
        f"{names.attn_norm}.weight": layer.attn_norm.weight.detach(),
        f"{names.mlp_norm}.weight": layer.mlp_norm.weight.detach(),
    }
    if layer.q_norm is not None and layer.k_norm is not None:
        slots[f"{names.q_norm}.weight"] = layer.q_norm.weight.detach()
        slots[f"{names.k_norm}.weight"] = layer.k_norm.weight.detach()
    q_rows, kv_rows = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    half = layer.gate_up.out_features // 2
    merged: list[tuple[nn.Linear, Sequence[str], list[int]]] = [
        (layer.qkv, [names.q, names.k, names.v], [q_rows, kv_rows, kv_rows]),
        (layer.o, [names.o], [layer.o.out_features]),
        (layer.gate_up, [names.gate, names.up], [half, half]),
        (layer.down, [names.down], [layer.down.out_features]),
    ]
    for linear, parts, rows in merged:
        for kind, parameter in (("weight", linear.weight), ("bias", linear.bias)):
            if parameter is not None:
                views = parameter.detach().split(rows)
                slots.update({f"{n}.{kind}": p for n, p in zip(parts, views, strict=True)})
    return slots


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """`safe_open` with errors that a person can act on."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        hint = "corrupt or cut short"
        if path.is_file() and path.read_bytes()[:20].startswith(b"version https://git"):
            hint = "a Git LFS pointer; run `git lfs pull`"
        raise TidarError(f"{path}: not a readable safetensors file ({hint}: {error})") from error


def find_weights(folder: Path) -> dict[str, Path]:
    """Tensor name on disk -> the safetensors file that holds it."""
    promised: dict[str, str] = {}
    if (folder / _WEIGHTS).is_file():
        paths = [folder / _WEIGHTS]
    elif (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise TidarError(f"{folder / _INDEX}: has no weight_map")
        promised = {str(name): str(shard) for name, shard in weight_map.items()}
        names = sorted(set(promised.values()))
        if stray := [name for name in names if name != Path(name).name]:
            raise TidarError(f"{folder / _INDEX}: shard {stray[0]!r} is outside the folder")
        paths = [folder / name for name in names]
        if absent := [path.name for path in paths if not path.is_file()]:
            raise TidarError(f"{folder}: shards missing: {some(absent)}")
    else:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise TidarError(
                f"{folder} has only pickled weights ({some(pickles)}), which can run code when "
                "opened; convert them to safetensors first"
            )
        raise TidarError(f"{folder} has no weights: neither {_WEIGHTS} nor {_INDEX}")
    files: dict[str, Path] = {}
    for path in paths:
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118  (a safetensors file is not iterable)
                if name in files:
                    raise TidarError(f"{folder}: {name} is in {files[name].name} and {path.name}")
                files[name] = path
    if lost := sorted(
        name for name, shard in promised.items() if files.get(name) != folder / shard
    ):
        raise TidarError(f"{folder / _INDEX}: not where the index says: {some(lost)}")
    return files


def fill_model(model: Transformer, files: Mapping[str, Path]) -> None:
    """Copy every tensor into its slot; all names and shapes are checked before any is copied."""
    slots, family = tensor_slots(model), FAMILIES[model.config.model_type]
    embed, head_name = f"{family.names.embed}.weight", f"{family.names.head}.weight"
    # Old Llama exports store the rotary frequencies; they follow from the config.
    present = {name for name in files if not name.endswith(".rotary_emb.inv_freq")}
    tied_copy = model.head is None and head_name in present
    if missing := sorted(set(slots) - present):
        raise TidarError(f"the checkpoint lacks tensors: {some(missing)}")
    if unexpected := sorted(present - set(slots) - ({head_name} if tied_copy else set())):
        raise TidarError(f"the checkpoint has unexpected tensors: {some(unexpected)}")
    by_file: dict[Path, list[str]] = {}
    for name in sorted(present):
        by_file.setdefault(files[name], []).append(name)
    embedding = slots[embed]
    for path, names in by_file.items():
        with open_weights(path) as file:
            for name in names:
                part, target = file.get_slice(name), slots.get(name, embedding)
                if tuple(part.get_shape()) != tuple(target.shape):
                    raise TidarError(
                        f"{name} has shape {list(part.get_shape())}, "
                        f"config.json asks for {list(target.shape)}"
                    )
                if part.get_dtype() not in DISK_DTYPES:
                    raise TidarError(
                        f"{name} has dtype {part.get_dtype()} (a quantized checkpoint?); "
                        f"allowed: {', '.join(DISK_DTYPES)}"
                    )
    for path, names in by_file.items():
        with open_weights(path) as file:
            for name in names:
                if name in slots:
                    slots[name].copy_(file.get_tensor(name))
    if tied_copy:
        with open_weights(files[head_name]) as file:
            head = file.get_tensor(head_name).to(embedding)
        if not torch.equal(head, embedding):
            raise TidarError(
                f"config.json ties the embeddings, but {head_name} differs from {embed}; "
                f"set {family.tied_key} to false"
            )


def write_weights(folder: Path, model: Transformer, dtype: torch.dtype, limit: int) -> None:
    """model.safetensors, or numbered shards and their index; one shard in memory at a time."""
    size = dtype.itemsize
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    slots = tensor_slots(model)
    for name, tensor in slots.items():
        if shards[-1] and filled + tensor.numel() * size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.numel() * size
    names = [_WEIGHTS]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        total = sum(tensor.numel() for tensor in slots.values()) * size
        where = {key: file for file, part in zip(names, shards, strict=True) for key in part}
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    for file, part in zip(names, shards, strict=True):
        tensors = {key: tensor.to("cpu", dtype) for key, tensor in part.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
