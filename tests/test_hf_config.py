"""config.json of the four families: what is read, and every refusal by its message."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_model import SIZES, rows, small
from test_weights import META, edit, hf_folder, logits_of, open_plain

from tidar.errors import TidarError
from tidar.hf_config import config_from_hf, config_to_hf
from tidar.weights import load_checkpoint


def test_transformers_4_config_and_dtype_auto(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, "llama-llama3")
    raw = json.loads((folder / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw.pop("dtype", None)
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    old = {**raw, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(old))
    loaded = load_checkpoint(folder, dtype="auto")
    new = {**raw, "rope_scaling": None}
    new["rope_parameters"] = {**rope, "rope_type": "llama3", "rope_theta": 5e5}
    assert loaded.config == config_from_hf(new)
    assert loaded.model.embed.weight.dtype == torch.bfloat16
    (folder / "config.json").write_text(json.dumps(raw))
    assert load_checkpoint(folder, dtype="auto").model.embed.weight.dtype == torch.float32
    assert load_checkpoint(folder, dtype=torch.float16).model.norm.weight.dtype == torch.float16
    with pytest.raises(TidarError, match=r"dtype must be a torch.dtype or \"auto\", got 'bf16'"):
        load_checkpoint(folder, dtype="bf16")  # type: ignore[arg-type]
    with pytest.raises(TidarError, match="dtype int8 is not supported; allowed: float32"):
        load_checkpoint(folder, dtype=torch.int8)
    ids, _ = rows()
    with torch.no_grad():
        expected = open_plain(folder)(ids).logits
    mine = logits_of(load_checkpoint(folder).model, ids)
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


CONFIG_REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "family": ("llama", {"model_type": "gemma3"}, "model_type 'gemma3' is not supported; allowed:"),
    "remote code": (
        "llama",
        {"model_type": "phi9", "auto_map": {"AutoModel": "x.Y"}},
        r"'phi9' is not supported \(its remote code, auto_map, is never run\)",
    ),
    "quantized": (
        "llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        r"is quantized \(quantization_config: gptq\)",
    ),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    "dynamic rope": (
        "llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "RoPE type 'dynamic' is not supported; allowed: default, linear, yarn, llama3",
    ),
    "longrope, old style": (
        "llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}},
        "RoPE type 'longrope' is not supported",
    ),
    "partial rope": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "mrope": (
        "qwen2-tied", {"rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}},
        "mrope_section",
    ),
    "rope by layer": (
        "qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "differ by layer type",
    ),
    "rope factor": (
        "llama", {"rope_parameters": {"rope_type": "linear"}},
        "RoPE type 'linear' needs a number factor, got None",
    ),
    "mistral window": ("mistral", {"sliding_window": 32}, "sliding_window 32 is shorter than"),
    "mistral default window": (
        "mistral", {"sliding_window": ..., "max_position_embeddings": 8192},
        "sliding_window 4096 is shorter than the context of 8192",
    ),
    "qwen2 window": (
        "qwen2-tied",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
         "layer_types": ...},
        "sliding_window 8 is shorter than the context of 64",
    ),
    "qwen3 layer types": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8,
         "layer_types": ["full_attention", "sliding_attention"]},
        "sliding_window 8 is shorter",
    ),
    "qwen3 layer types without window": (
        "qwen3", {"layer_types": ["full_attention", "sliding_attention"]},
        "no sliding_window is in use",
    ),
    "other layer types": (
        "qwen3", {"layer_types": ["full_attention", "linear_attention"]},
        "layer_types linear_attention are not supported",
    ),
    "no vocabulary size": ("llama", {"vocab_size": ...}, "config.json lacks vocab_size"),
    "bad number": (
        "llama", {"hidden_size": "32"}, "hidden_size must be a whole number, got '32'",
    ),
    "half a head": (
        "llama", {"num_key_value_heads": 2.5}, "num_key_value_heads must be a whole number, got 2.5",
    ),
    "heads as text": (
        "llama", {"num_key_value_heads": "2"}, "num_key_value_heads must be a whole number, got '2'",
    ),
    "heads as a flag": (
        "qwen3", {"num_key_value_heads": True}, "num_key_value_heads must be a whole number, got True",
    ),
    "theta as text": (
        "llama", {"rope_parameters": {"rope_theta": "x"}}, "rope_theta must be a number, got 'x'",
    ),
    "theta as text, old style": (
        "llama", {"rope_parameters": ..., "rope_theta": "x"}, "rope_theta must be a number, got 'x'",
    ),
    "yarn with a text": (
        "llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}},
        "beta_fast must be a number, got 'x'",
    ),
    "window as text": ("mistral", {"sliding_window": "8"}, "sliding_window must be a whole number"),
    "window layers as text": (
        "qwen2-tied",
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": "a",
         "layer_types": ...},
        "max_window_layers must be a whole number, got 'a'",
    ),
    "layer types as a number": ("qwen3", {"layer_types": 5}, "layer_types must be a list of texts"),
    "bad flag": (
        "llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false",
    ),
    "dtype": ("llama", {"dtype": "float64"}, "dtype float64 is not supported"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """config.json of some cases, as `transformers` writes it."""
    made = {}
    for case in ("llama", "mistral", "qwen2-tied", "qwen3"):
        folder = hf_folder(tmp_path_factory.mktemp("base"), case)
        made[case] = json.loads((folder / "config.json").read_text())
    return made


@pytest.mark.parametrize("name", CONFIG_REFUSALS)
def test_config_refusals(name: str, bases: dict[str, Any], tmp_path: Path) -> None:
    case, changes, message = CONFIG_REFUSALS[name]
    (tmp_path / "config.json").write_text(json.dumps(bases[case]))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    edit(tmp_path, **changes)
    with pytest.raises(TidarError, match=message):
        load_checkpoint(tmp_path, dtype="auto")


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("mistral", {"sliding_window": 64}),
        ("mistral", {"sliding_window": None, "max_position_embeddings": 32768}),
        ("qwen2-tied", {"use_sliding_window": False, "sliding_window": 8}),
        (
            "qwen2-tied",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2,
             "layer_types": ...},
        ),
        ("llama", {"auto_map": {"AutoModel": "code.Model"}, "sliding_window": 8}),
    ],
)  # fmt: skip
def test_harmless_entries_are_read(
    case: str, changes: dict[str, Any], bases: dict[str, Any]
) -> None:
    raw = {k: v for k, v in {**bases[case], **changes}.items() if v is not ...}
    assert config_from_hf(raw).vocab_size == SIZES["vocab_size"]


META_REFUSALS: list[tuple[Any, str]] = [
    ({**META.to_json(), "format_version": 2, "new": 1}, "format_version 2; this .* reads 1"),
    ({"draft_lens": [4], "mask_token_id": 90}, "format_version None"),
    ({**META.to_json(), "extra": {}}, "unknown keys: extra; allowed: alpha, attention, draft_lens"),
    ({"format_version": 1, "draft_lens": [4]}, "lacks mask_token_id"),
    ([], "must be an object, got list"),
    ({**META.to_json(), "draft_lens": []}, "draft_lens must be whole numbers above 0, ascending"),
    ({**META.to_json(), "draft_lens": [8, 4]}, r"ascending, each once; got \[8, 4\]"),
    ({**META.to_json(), "draft_lens": 4}, "draft_lens must be a list"),
    ({**META.to_json(), "mask_token_id": 96}, "96 is outside the vocabulary of 96 rows"),
    ({**META.to_json(), "mask_token_id": "90"}, "mask_token_id must be a token id, got '90'"),
    ({**META.to_json(), "mask_token_id": 5}, r"5 is also the eos_token_id of config.json"),
    ({**META.to_json(), "mask_token_id": 6}, r"6 is also the eos_token_id of generation_config"),
    ({**META.to_json(), "alpha": -1}, "alpha must be 0 or more, got -1"),
    ({**META.to_json(), "masking": "some"}, "masking 'some' is unknown; allowed: full, random"),
]


@pytest.mark.parametrize(("entry", "message"), META_REFUSALS)
def test_meta_refusals(entry: Any, message: str, tmp_path: Path) -> None:
    edit(tmp_path, **{**config_to_hf(small()), "eos_token_id": 5, "tidar": entry})
    edit(tmp_path, "generation_config.json", eos_token_id=[6, 7])
    with pytest.raises(TidarError, match=message):
        load_checkpoint(tmp_path)
