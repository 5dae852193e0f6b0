"""Entries of a config.json, each checked as it is read; what any family refuses."""

from collections.abc import Mapping
from typing import Any, cast

from tidar.errors import TidarError

Json = dict[str, Any]
RawConfig = Mapping[str, Any]
"""A config.json, or a part of it."""


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole_number(raw: RawConfig, key: str, default: int | None = None) -> int:
    """An entry that must be there unless it has a default. Raises TidarError for anything but a whole number."""
    value = raw.get(key, default)
    if value is None:
        raise TidarError(f"config.json lacks {key}")
    if not is_int(value):
        raise TidarError(f"config.json: {key} must be a whole number, got {value!r}")
    return cast(int, value)


def number(raw: RawConfig, key: str, default: float) -> float:
    """An entry that is `default` where config.json is silent. Raises TidarError for anything but a number."""
    value = raw.get(key, default)
    if not is_number(value):
        raise TidarError(f"config.json: {key} must be a number, got {value!r}")
    return float(value)


def optional_whole_number(raw: RawConfig, key: str) -> int | None:
    """An entry that may be absent or null. Raises TidarError for anything else but a whole number."""
    return None if raw.get(key) is None else whole_number(raw, key)


def optional_number(raw: RawConfig, key: str) -> float | None:
    """An entry that may be absent or null, as it is. Raises TidarError for anything else but a number."""
    value = raw.get(key)
    if value is not None and not is_number(value):
        raise TidarError(f"config.json: {key} must be a number, got {value!r}")
    return cast("float | None", value)


def flag(raw: RawConfig, key: str, default: bool = False) -> bool:
    """An entry that is `default` where config.json is silent. Raises TidarError for anything but true or false."""
    value = raw.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise TidarError(f"config.json: {key} must be true or false, got {value!r}")
    return bool(value)


def refuse_quantized(raw: RawConfig) -> None:
    """Raises TidarError for a checkpoint whose weights are not plain numbers."""
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            method = raw[key].get("quant_method") if isinstance(raw[key], dict) else raw[key]
            raise TidarError(
                f"the checkpoint is quantized ({key}: {method or 'unknown method'}); "
                "only float32, bfloat16 and float16 weights are supported"
            )


def refuse_other_classes(raw: RawConfig, allowed: str) -> None:
    """Raises TidarError where `architectures` names a class of the same model_type that computes something else."""
    named = raw.get("architectures") or [allowed]
    if named != [allowed]:
        raise TidarError(
            f"config.json: architectures is {named!r}; of model_type {raw.get('model_type')!r} only "
            f"{allowed!r} is supported"
        )
