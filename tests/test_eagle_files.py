"""EAGLE-3 folders: the published names and keys, both ways; what is broken is refused by name.

Published weights were never run here: these are small folders of random weights with exactly their format.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command import refused
from contenders import random_head, target
from models import assert_equal
from safetensors.torch import load_file, save_file
from torch import Tensor

from tidar.attention import dense_attend
from tidar.eagle_files import load_eagle_head, save_eagle_head
from tidar.eagle_head import published_taps
from tidar.errors import TidarError

# The keys of the authors' heads (config.json of EAGLE3-LLaMA3.1-Instruct-8B) and of SpecForge's and
# AngelSlim's (`configs/qwen3-4b-eagle3.json`), with small sizes.
AUTHORS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 40, "max_position_embeddings": 20,
    "model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1,
    "pad_token_id": 0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.28.1", "use_cache": True, "vocab_size": 40, "draft_vocab_size": 12,
}  # fmt: skip
SPECFORGE: dict[str, Any] = {
    **AUTHORS, "architectures": ["LlamaForCausalLMEagle3"], "attention_bias": False,
    "attention_dropout": 0.0, "head_dim": 10, "max_window_layers": 36, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_sliding_window": False,
}  # fmt: skip
DRAFTED = (0, 3, 4, 9, 10, 11, 17, 20, 25, 31, 36, 38)


def published_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """The names and shapes of a state_dict of `Model` in SafeAILab/EAGLE, `eagle/model/cnets.py`."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    dim = config.get("head_dim", hidden // config["num_attention_heads"])
    heads, kv_heads = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes = {
        "midlayer.self_attn.q_proj.weight": (heads, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (kv_heads, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (kv_heads, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, heads),
        "midlayer.mlp.gate_proj.weight": (inner, hidden),
        "midlayer.mlp.up_proj.weight": (inner, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, inner),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "norm.weight": (hidden,),
        "fc.weight": (hidden, 3 * hidden),
        "lm_head.weight": (config["draft_vocab_size"], hidden),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    ids = torch.tensor(DRAFTED)
    tensors["d2t"] = ids - torch.arange(len(ids))
    tensors["t2d"] = torch.zeros(config["vocab_size"], dtype=torch.bool)
    tensors["t2d"][ids] = True
    return tensors


def write(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], *, pickled: bool = False
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def reference(
    config: dict[str, Any], w: dict[str, Tensor], embedded: Tensor, tapped: Tensor
) -> tuple[Tensor, Tensor]:
    """The published network in plain arithmetic, rows at positions 0, 1, ...: outputs and draft logits.

    `LlamaDecoderLayeremb` and `Model.forward` of `eagle/model/cnets.py`, from the formulas.
    """
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim", config["hidden_size"] // heads)
    rows = len(embedded)

    def norm(x: Tensor, name: str) -> Tensor:
        scale = x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]
        return x / scale.sqrt() * w[name]

    def rotate(x: Tensor) -> Tensor:
        theta = config.get("rope_theta", 10000.0)
        angle = torch.arange(rows)[:, None] / theta ** (torch.arange(0, dim, 2) / dim)
        first, second = x[..., : dim // 2], x[..., dim // 2 :]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    x = tapped @ w["fc.weight"].T
    fed = torch.cat(
        (norm(embedded, "midlayer.input_layernorm.weight"), norm(x, "midlayer.hidden_norm.weight")),
        -1,
    )
    q, k, v = (
        (fed @ w[f"midlayer.self_attn.{name}_proj.weight"].T).view(rows, -1, dim) for name in "qkv"
    )
    k, v = (each.repeat_interleave(heads // kv_heads, dim=1) for each in (rotate(k), v))
    weights = torch.einsum("qhd,khd->hqk", rotate(q), k) / math.sqrt(dim)
    weights = weights.masked_fill(~torch.ones(rows, rows, dtype=torch.bool).tril(), -torch.inf)
    seen = torch.einsum("hqk,khd->qhd", weights.softmax(-1), v).reshape(rows, heads * dim)
    x = x + seen @ w["midlayer.self_attn.o_proj.weight"].T
    inner = norm(x, "midlayer.post_attention_layernorm.weight")
    gate, up = (inner @ w[f"midlayer.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    x = x + (F.silu(gate) * up) @ w["midlayer.mlp.down_proj.weight"].T
    return x, norm(x, "norm.weight") @ w["lm_head.weight"].T


@pytest.mark.parametrize("pickled", [True, False], ids=["bin", "safetensors"])
@pytest.mark.parametrize("config", [AUTHORS, SPECFORGE], ids=["authors", "specforge"])
def test_a_published_folder_opens(config: dict[str, Any], pickled: bool, tmp_path: Path) -> None:
    """And computes what the published network computes; draft ids become the model's by d2t."""
    tensors = published_tensors(config)
    head = load_eagle_head(
        write(tmp_path / "head", config, tensors, pickled=pickled), target().config
    )
    assert head.embedding(target()) is target().embed
    assert head.target_ids.tolist() == list(DRAFTED)
    generator = torch.Generator().manual_seed(1)
    embedded, tapped = (torch.randn(1, 9, size, generator=generator) for size in (32, 96))
    with torch.inference_mode():
        outputs = head(
            embedded, head.fuse(tapped), torch.arange(9)[None], dense_attend(is_causal=True)
        )
        expected, logits = reference(config, tensors, embedded[0], tapped[0])
        assert_equal(outputs[0], expected)
        assert_equal(head.draft_logits(outputs[0]), logits)
        wide = head.logits(outputs[0], 40, 38)
    assert_equal(wide[:, list(DRAFTED[:-1])], logits[:, :-1])
    others = [
        token for token in range(40) if token not in DRAFTED[:-1]
    ]  # 38 is the mask token here
    assert bool((wide[:, others] == -torch.inf).all())


def test_an_embedding_of_its_own(tmp_path: Path) -> None:
    tensors = published_tensors(AUTHORS) | {"embed_tokens.weight": torch.randn(40, 32)}
    head = load_eagle_head(write(tmp_path / "head", AUTHORS, tensors), target().config)
    assert torch.equal(head.embedding(target()).weight, tensors["embed_tokens.weight"])
    back = load_file(
        save_eagle_head(tmp_path / "again", head, target().config) / "model.safetensors"
    )
    assert torch.equal(back["embed_tokens.weight"], tensors["embed_tokens.weight"])


def test_an_embedding_must_know_all_tokens_of_the_model(tmp_path: Path) -> None:
    """One that the model shares does; a head that shares it may name fewer, and drafts from those."""
    config = {**AUTHORS, "vocab_size": 39}
    tensors = published_tensors(config)
    shared = load_eagle_head(write(tmp_path / "shared", config, tensors), target().config)
    assert shared.target_ids.tolist() == list(DRAFTED)
    tensors["embed_tokens.weight"] = torch.randn(39, 32)
    folder = write(tmp_path / "own", config, tensors)
    with pytest.raises(TidarError, match="of its own, of 39 tokens, and the model has 40"):
        load_eagle_head(folder, target().config)


def test_one_map_is_enough(tmp_path: Path) -> None:
    """NVIDIA ModelOpt exports d2t alone; the other follows."""
    tensors = published_tensors(AUTHORS)
    t2d = tensors.pop("t2d")
    head = load_eagle_head(write(tmp_path / "head", AUTHORS, tensors), target().config)
    assert head.target_ids.tolist() == list(DRAFTED)
    assert torch.equal(head.t2d, t2d)


def test_a_head_is_no_model(tmp_path: Path) -> None:
    for name, changes in (
        ("authors", {}),
        ("all tokens", {"architectures": ["Eagle3LlamaForCausalLM"], "draft_vocab_size": None}),
    ):
        config = {key: value for key, value in {**AUTHORS, **changes}.items() if value is not None}
        folder = write(tmp_path / name, config, {})
        for args in (
            ("inspect", "model", folder),
            ("generate", "x", "--model", folder, "--device", "cpu"),
            ("generate", "x", "--method", f"speculative:{folder}:2", "--device", "cpu"),
        ):
            told = refused(*args)
            assert f"{folder} is an EAGLE-3 head and no model" in told
            assert f"--method eagle:{folder}:K" in told


def test_both_ways(tmp_path: Path) -> None:
    """What is saved has the published names, shapes and keys, and opens as it was."""
    head = random_head(target(), DRAFTED)
    folder = save_eagle_head(tmp_path / "head", head, target().config)
    tensors = load_file(folder / "model.safetensors")
    saved = json.loads((folder / "config.json").read_text())
    expected = published_tensors({**saved})
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items()
    }
    assert torch.equal(tensors["d2t"], expected["d2t"])
    assert torch.equal(tensors["t2d"], expected["t2d"])
    needed = set(AUTHORS) - {"transformers_version", "use_cache", "initializer_range"}
    assert needed <= set(saved)
    assert saved["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (saved["rope_theta"], saved["rope_scaling"]) == (10000.0, None)
    again = load_eagle_head(folder, target().config)
    assert again.taps == head.taps
    assert {n: t.tolist() for n, t in again.state_dict().items()} == {
        n: t.tolist() for n, t in head.state_dict().items()
    }
    with pytest.raises(TidarError, match="delete"):
        save_eagle_head(Path(__file__).parent, head, target().config)


def test_the_whole_vocabulary_needs_no_maps(tmp_path: Path) -> None:
    """As in the source, where both maps then stay at zero."""
    config = {**AUTHORS, "draft_vocab_size": 40}
    tensors = published_tensors(config)
    zeros = {"d2t": torch.zeros(40, dtype=torch.int64), "t2d": torch.zeros(40, dtype=torch.bool)}
    bare = {name: tensor for name, tensor in tensors.items() if name not in zeros}
    for number, each in enumerate((bare, bare | zeros)):
        head = load_eagle_head(write(tmp_path / str(number), config, each), target().config)
        assert head.target_ids.tolist() == list(range(40))


Break = Callable[[dict[str, Tensor]], object]


def setting(name: str, index: int, value: int) -> Break:
    return lambda tensors: tensors[name].__setitem__(index, value)


BROKEN: dict[str, tuple[Break, str]] = {
    "fc missing": (lambda t: t.pop("fc.weight"), r"lacks tensors: fc\.weight"),
    "d2t missing": (lambda t: t.pop("d2t"), "lacks tensors: d2t"),
    "norm missing": (
        lambda t: t.pop("midlayer.hidden_norm.weight"), r"lacks tensors: midlayer\.hidden_norm"),
    "beyond float16": (setting("norm.weight", 3, 70000), "norm.weight holds .* no numbers in float16"),
    "an embedding of fewer": (
        lambda t: t.update({"embed_tokens.weight": torch.ones(39, 32)}), r"embed_tokens\.weight has shape \[39"),
    "a second layer": (
        lambda t: t.update({"midlayer2.norm": torch.ones(1)}), r"unexpected tensors: midlayer2\.norm"),
    "a bias": (
        lambda t: t.update({"midlayer.self_attn.q_proj.bias": torch.ones(32)}), r"q_proj\.bias"),
    "an EAGLE-1 projection": (
        lambda t: t.update({"midlayer.self_attn.q_proj.weight": torch.ones(32, 32)}),
        r"q_proj\.weight has shape \[32, 32\]; .* \[32, 64\]"),
    "fused of two": (lambda t: t.update({"fc.weight": torch.ones(32, 64)}), r"fc\.weight has shape"),
    "head too small": (lambda t: t.update({"lm_head.weight": torch.ones(9, 32)}), r"lm_head\.weight has"),
    "quantized": (
        lambda t: t.update({"fc.weight": torch.ones(32, 96, dtype=torch.int8)}), r"fc\.weight has dtype int8"),
    "not a number": (setting("norm.weight", 3, math.nan), r"norm\.weight holds values that are no"),  # type: ignore[arg-type]
    "d2t too far": (setting("d2t", -1, 29), "d2t: draft id 11 goes to token 40"),
    "d2t negative": (setting("d2t", 0, -1), "d2t: draft id 0 goes to token -1"),
    "d2t twice": (setting("d2t", 3, 1), "d2t: draft id 3 goes to token 4"),
    "d2t of floats": (lambda t: t.update(d2t=t["d2t"].float()), "d2t has dtype float32"),
    "t2d of another": (setting("t2d", 5, True), "t2d: says True of token 5"),
    "t2d too short": (lambda t: t.update(t2d=t["t2d"][:-1]), r"t2d has shape \[39\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_tensor_is_refused_by_name(name: str, tmp_path: Path) -> None:
    change, message = BROKEN[name]
    tensors = published_tensors(AUTHORS)
    change(tensors)
    folder, dtype = write(tmp_path / "head", AUTHORS, tensors), torch.float32
    if "float16" in message:  # a number until it is cast
        load_eagle_head(folder, target().config)
        dtype = torch.float16
    with pytest.raises(TidarError, match=f"^EAGLE-3 head {folder}: .*{message}"):
        load_eagle_head(folder, target().config, dtype=dtype)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another width": ({"hidden_size": 48}, "hidden_size is 48; for this model it must be 32"),
    "another model's width": ({"target_hidden_size": 64}, "target_hidden_size is 64"),
    "two layers": ({"num_hidden_layers": 2}, "num_hidden_layers is 2"),
    "biases": ({"attention_bias": True}, "attention_bias is True"),
    "norm before": ({"norm_before_residual": True}, "norm_before_residual is True"),
    "more tokens": ({"vocab_size": 50}, "vocab_size is 50; the model has 40"),
    "architectures no list": (
        {"architectures": "LlamaForCausalLMEagle3"},
        "must be a list, such as",
    ),
    "drafts too many": ({"draft_vocab_size": 41}, "from 1 to vocab_size, 40"),
    "drafts a text": ({"draft_vocab_size": "12"}, "whole number, got '12'"),
    "a model": ({"architectures": ["Qwen3ForCausalLM"]}, "architectures is .'Qwen3ForCausalLM'"),
    "layers that are not there": ({"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}, "from 1 to 2"),
    "two layers tapped": ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, "must be three layers"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_head_of_another_kind_is_refused_by_key(name: str, tmp_path: Path) -> None:
    changes, message = CONFIGS[name]
    folder = write(tmp_path / "head", {**AUTHORS, **changes}, published_tensors(AUTHORS))
    with pytest.raises(TidarError, match=f"^EAGLE-3 head {folder}: .*{message}"):
        load_eagle_head(folder, target().config)


def test_unreadable_weights_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "head", AUTHORS, published_tensors(AUTHORS), pickled=True)
    for content in (
        b"version https://git-lfs",
        b"hello world\n",
        b"",
    ):  # the second is a KeyError in torch
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(TidarError, match=r"pytorch_model\.bin: not a readable file"):
            load_eagle_head(folder, target().config)
    (folder / "model.safetensors").write_bytes(b"xx")
    with pytest.raises(TidarError, match=r"model\.safetensors: not a readable file"):
        load_eagle_head(folder, target().config)
    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / name).unlink()
    with pytest.raises(TidarError, match="no weights"):
        load_eagle_head(folder, target().config)


class Sneaky:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_a_pickle_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "head", AUTHORS, {}, pickled=True)
    torch.save({"fc.weight": Sneaky()}, folder / "pytorch_model.bin")
    with pytest.raises(TidarError, match=r"pytorch_model\.bin: not a readable file"):
        load_eagle_head(folder, target().config)
    assert not (tmp_path / "ran").exists()


def test_which_layers_are_read(tmp_path: Path) -> None:
    """The published ones: what goes into layers 2, n // 2 and n - 3. Or those that config.json names."""
    assert [published_taps(n) for n in (32, 36, 28, 12)] == [
        (1, 15, 28), (1, 17, 32), (1, 13, 24), (1, 5, 8),
    ]  # fmt: skip
    assert [published_taps(n) for n in (1, 2, 3, 7, 11)] == [
        (0, 0, 0), (0, 0, 1), (0, 1, 2), (0, 3, 6), (0, 5, 10),
    ]  # fmt: skip
    key = "eagle_aux_hidden_state_layer_ids"
    for number, (extra, taps) in enumerate(
        (
            ({}, (0, 0, 1)),
            ({key: [1, 2, 2]}, (0, 1, 1)),
            ({"eagle_config": {key: [0, 1, 1]}}, (0, 1, 1)),
        )
    ):
        folder = write(tmp_path / str(number), {**AUTHORS, **extra}, published_tensors(AUTHORS))
        head = load_eagle_head(folder, target().config)
        assert head.taps == taps
        again = load_eagle_head(
            save_eagle_head(tmp_path / f"{number}b", head, target().config), target().config
        )
        assert again.taps == taps
