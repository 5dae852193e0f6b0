"""LLaDA and Dream folders, by their published names and keys: what opens, what is written back, what is refused.

Format alone: the folders are small and random (`published.py`), the published weights were never run here.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refused, tidar
from models import BUNDLED, random_checkpoint, random_model
from published import (
    MASK,
    change_tensors,
    decode_greedily,
    dream_folder,
    llada_folder,
    reference_logits,
    tensors_of,
)
from torch import Tensor

import tidar as package
from tidar.attention import dense_attend
from tidar.decode.engine import FixedPlan
from tidar.decode.paged_engine import PagedEngine
from tidar.decode.spec import parse_method
from tidar.errors import TidarError
from tidar.hf_config import TidarMeta, config_from_hf, config_to_hf
from tidar.layout import AUTOREGRESSIVE
from tidar.methods.masked_diffusion import MaskedDiffusion
from tidar.model import Transformer
from tidar.tokens import Tokenizer
from tidar.weights import load_checkpoint, save_checkpoint

Make = Callable[..., Path]
FAMILIES: dict[str, Make] = {"llada": llada_folder, "dream": dream_folder}
VARIANTS: dict[str, tuple[Make, dict[str, Any]]] = {
    "llada": (llada_folder, {}),
    "llada, grouped heads, biases, tied": (
        llada_folder, {"n_kv_heads": 2, "include_qkv_bias": True, "weight_tying": True},
    ),
    "llada, padded embedding": (llada_folder, {"vocab_size": 261}),
    "dream": (dream_folder, {}),
    "dream, one key head": (dream_folder, {"num_key_value_heads": 1}),
}  # fmt: skip
IDS = [3, 77, MASK, 9, MASK, MASK, 200]


def logits_of(model: Transformer, ids: list[int]) -> Tensor:
    """Logits `[N, V]` of one pass in which every row sees every other."""
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None], dense_attend(None))
    return model.raw_logits(hidden[0])


# --- opening, and writing back ---


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_the_published_codes(name: str, tmp_path: Path) -> None:
    make, changes = VARIANTS[name]
    folder = make(tmp_path / "model", **changes)
    loaded = load_checkpoint(folder)
    expected = reference_logits(folder, IDS)
    torch.testing.assert_close(logits_of(loaded.model, IDS), expected, atol=1e-5, rtol=1e-5)
    assert loaded.config.attention == "bidirectional"
    assert loaded.config.label_shift == name.startswith("dream")
    assert loaded.config.mask_token_id == MASK


@pytest.mark.parametrize("name", VARIANTS)
def test_written_back_under_the_same_names_and_keys(name: str, tmp_path: Path) -> None:
    make, changes = VARIANTS[name]
    folder = make(tmp_path / "model", **changes)
    loaded = load_checkpoint(folder)
    out = save_checkpoint(
        tmp_path / "out", loaded.model, raw_config=loaded.raw_config, tokenizer_source=folder
    )
    before, after = tensors_of(folder), tensors_of(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    raw = json.loads((out / "config.json").read_text())
    gone = {"auto_map", "torch_dtype"}
    assert raw == {**{k: v for k, v in loaded.raw_config.items() if k not in gone}, "dtype": "float32"}  # fmt: skip
    assert load_checkpoint(out).config == loaded.config
    assert Tokenizer.load(out).encode("a b") == Tokenizer.load(folder).encode("a b")


@pytest.mark.parametrize("family", FAMILIES)
def test_from_scratch(family: str, tmp_path: Path) -> None:
    config = load_checkpoint(FAMILIES[family](tmp_path / "model")).config
    assert config_from_hf(config_to_hf(config)) == config
    made = random_checkpoint(tmp_path / "new", config, seed=2)
    expected = reference_logits(tmp_path / "new", IDS)
    torch.testing.assert_close(logits_of(made.model, IDS), expected, atol=1e-5, rtol=1e-5)


def test_another_mask_token_is_not_written(tmp_path: Path) -> None:
    loaded = load_checkpoint(llada_folder(tmp_path / "model"))
    loaded.model.set_mask_token(7)
    with pytest.raises(TidarError, match="another network than the model"):
        save_checkpoint(tmp_path / "out", loaded.model, raw_config=loaded.raw_config)
    meta = TidarMeta(draft_lens=(4,), mask_token_id=7)
    with pytest.raises(TidarError, match="model_type 'llada' has no 'tidar' entry"):
        save_checkpoint(tmp_path / "out", loaded.model, raw_config=loaded.raw_config, meta=meta)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.load(FAMILIES[family](tmp_path / "model"))
    ids = tokenizer.encode("def f(x):\n\treturn 'é'")
    assert len(ids) == len("def f(x):\n\treturn 'é'".encode())
    assert tokenizer.decode([*ids, MASK]) == "def f(x):\n\treturn 'é'"
    assert tokenizer.eos_ids == {257 if family == "llada" else 256}
    assert not caplog.records


# --- what is refused ---


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llada", {"block_type": "sequential"}, "block_type is 'sequential'; .* only 'llama'"),
    ("llada", {"block_type": ...}, "block_type is 'sequential', as it is where absent"),
    ("llada", {"block_group_size": 2}, "block_group_size is 2; .* only 1"),
    ("llada", {"activation_type": "swiglu"}, "activation_type is 'swiglu'; .* only 'silu'"),
    ("llada", {"alibi": True}, "alibi is True"),
    ("llada", {"rope": False}, "rope is False"),
    ("llada", {"include_bias": True}, "include_bias is True"),
    ("llada", {"bias_for_layer_norm": True}, "bias_for_layer_norm is True; .* only None and False"),
    ("llada", {"layer_norm_type": "default"}, "layer_norm_type is 'default'; .* only 'rms'"),
    ("llada", {"attention_layer_norm": True}, "attention_layer_norm is True"),
    ("llada", {"multi_query_attention": True}, "multi_query_attention is True"),
    ("llada", {"input_emb_norm": True}, "input_emb_norm is True"),
    ("llada", {"scale_logits": True}, "scale_logits is True"),
    ("llada", {"embedding_size": 200}, "embedding_size 200 is below vocab_size 264"),
    ("llada", {"d_model": 34}, r"d_model \(34\) must be a multiple of n_heads \(4\)"),
    ("llada", {"mask_token_id": ...}, "lacks mask_token_id"),
    ("llada", {"mask_token_id": 300}, "300 is outside the vocabulary"),
    ("llada", {"mask_token_id": 257}, "257 is also the eos_token_id of config.json"),
    ("llada", {"rope_theta": "big"}, "rope_theta must be a number, got 'big'"),
    ("llada", {"architectures": ["LLaDAMoEModelLM"], "num_experts": 64},
     r"\['LLaDAMoEModelLM'\]; of model_type 'llada' only 'LLaDAModelLM'"),
    ("llada", {"quantization_config": {"quant_method": "gptq"}}, "quantized .*gptq"),
    ("llada", {"tidar": {"format_version": 1, "draft_lens": [4], "mask_token_id": 258}},
     "model_type 'llada' has no 'tidar' entry"),
    ("dream", {"architectures": ["DreamForCausalLM"], "block_size": 32},
     r"\['DreamForCausalLM'\]; of model_type 'Dream' only 'DreamModel'"),
    ("dream", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ("dream", {"use_mrope": True}, "use_mrope is true"),
    ("dream", {"mlp_bias": True}, "mlp_bias is true"),
    ("dream", {"head_dim": 16}, "head_dim is 16; .* = 8 is supported"),
    ("dream", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic'"),
    ("dream", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
     "sliding_window 8 is shorter"),
    ("dream", {"mask_token_id": ...}, "lacks mask_token_id"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("published")
    return {family: make(home / family) for family, make in FAMILIES.items()}


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_configs_that_say_something_else(
    family: str, changes: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    raw = {**json.loads((folders[family] / "config.json").read_text()), **changes}
    raw = {k: v for k, v in raw.items() if v is not ...}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for file in folders[family].glob("model*"):
        (tmp_path / file.name).symlink_to(file)
    with pytest.raises(TidarError, match=message):
        load_checkpoint(tmp_path)


NAMED = {
    "llada": ("model.transformer.blocks.1.ff_proj.weight", "model.transformer.ff_out.weight"),
    "dream": ("model.layers.1.self_attn.k_proj.bias", "lm_head.weight"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_broken_tensors_are_told_by_their_published_names(family: str, tmp_path: Path) -> None:
    def says(number: int, message: str, **changes: Tensor | None) -> None:
        folder = FAMILIES[family](tmp_path / str(number))
        with pytest.raises(TidarError, match=message):
            load_checkpoint(change_tensors(folder, **changes))

    name, head = NAMED[family]
    whole = tensors_of(FAMILIES[family](tmp_path / "model"))
    says(0, f"lacks tensors: {name}$", **{name: None})
    says(1, rf"{name} has shape .* config.json asks for", **{name: whole[name][:-1].clone()})
    says(2, f"{name} has dtype I8", **{name: whole[name].to(torch.int8)})
    says(3, "unexpected tensors: model.extra.weight", **{"model.extra.weight": torch.zeros(2)})
    says(4, f"lacks tensors: {head}$", **{head: None})  # as a tied checkpoint would have it
    folder = FAMILIES[family](tmp_path / "tied")
    raw = json.loads((folder / "config.json").read_text())
    key = "weight_tying" if family == "llada" else "tie_word_embeddings"
    (folder / "config.json").write_text(json.dumps({**raw, key: True}))
    with pytest.raises(TidarError, match=f"ties the embeddings, but {head} differs .* set {key}"):
        load_checkpoint(folder)
    folder = FAMILIES[family](tmp_path / "short")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(TidarError, match=rf"{shard.name}: not a readable .* cut short"):
        load_checkpoint(folder)
    shard.unlink()
    with pytest.raises(TidarError, match=f"shards missing: {shard.name}"):
        load_checkpoint(folder)


def test_names_of_another_family_are_unexpected(tmp_path: Path) -> None:
    folder = llada_folder(tmp_path / "model")
    raw = json.loads((BUNDLED / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "tidar"}))
    with pytest.raises(TidarError, match=r"lacks tensors: model.embed_tokens.weight"):
        load_checkpoint(folder)


# --- decoding ---


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_writes_what_the_published_sampler_writes(
    family: str, folders: dict[str, Path]
) -> None:
    """End to end by the command line: tokenizer, weights, defaults of the family, decoding."""
    folder, prompt = folders[family], "def f(x):"
    ids = Tokenizer.load(folder).encode(prompt)
    fixed = ("generate", prompt, "--model", folder, "-n", 20, "--device", "cpu", "--dtype",
             "float32", "--ignore-eos", "--json")  # fmt: skip
    for name, span, steps in (("masked-diffusion:8:3", 8, 3), ("masked-diffusion:20:7", 20, 7)):
        ran = tidar(*fixed, "--method", name)
        assert ran.json["ids"] == decode_greedily(folder, ids, 20, span, steps)
        assert ran.json["lossy"]
    span = 32 if family == "llada" else 512
    assert tidar(*fixed).json["ids"] == decode_greedily(folder, ids, 20, span, 20)


def test_what_a_name_leaves_out_is_the_checkpoints(folders: dict[str, Path]) -> None:
    short = parse_method("masked-diffusion:16:8")
    llada, dream = (load_checkpoint(folders[family]).model for family in ("llada", "dream"))
    assert short.engine(llada).method == MaskedDiffusion(MASK, 8, "low-confidence", False)
    assert short.engine(dream).method == MaskedDiffusion(MASK, 8, "entropy", True)
    named = parse_method("masked-diffusion:16:8:low-confidence")
    assert named.engine(dream).method == MaskedDiffusion(MASK, 8, "low-confidence", True)
    assert named.name == "masked-diffusion:16:8:low-confidence"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["ar", "tidar", "block-diffusion:8:0.9", f"speculative:{BUNDLED}:2"])  # fmt: skip
def test_causal_methods_are_refused(family: str, method: str, folders: dict[str, Path]) -> None:
    says = refused("generate", "x", "--model", folders[family], "--method", method)
    assert "trained with every row seeing every other" in says
    assert "masked-diffusion:32:32" in says


def test_so_is_all_else_that_reads_causally(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["llada"]
    model = load_checkpoint(folder).model
    with pytest.raises(TidarError, match=r"The paged engine reads causally"):
        PagedEngine(model, FixedPlan(AUTOREGRESSIVE))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "d.jsonl").write_text('{"text": "abc"}\n')
    for command, who in (
        (("bench", folder, "--prompts", tmp_path / "p.jsonl", "--methods", "ar"), "Method ar"),
        (("verify", folder, "--quick"), "`tidar verify`"),
        (("profile", folder, "--device", "cpu", "--context", 8), "The paged engine"),
        (("train", "--base", folder, "--data", tmp_path / "d.jsonl", "--out", tmp_path / "out",
          "--use-cpu", "true"), "Training for objective 'tidar'"),
        (("train", "--base", folder, "--self-data", 4, "--out", tmp_path / "out", "--use-cpu", "true"),
         "Sampling from the base (--self-data)"),
        (("generate", "x", "--method", f"speculative:{folder}:2"), "A draft model"),
    ):  # fmt: skip
        assert f"{who} reads causally" in refused(*command).replace(f" ({folder})", "")


def test_bench_runs_them(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a b c"}\n')
    record = tidar(
        "bench", folders["dream"], "--prompts", tmp_path / "p.jsonl", "--methods", "masked-diffusion:8:4",
        "--runs", 1, "--max-new-tokens", 16, "--ignore-eos", "--json",
    ).json  # fmt: skip
    figures = record["methods"]["masked-diffusion:8:4"]  # type: ignore[index]
    assert figures["tokens_per_forward"] == 2.0


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect(family: str, folders: dict[str, Path]) -> None:
    shown = tidar("inspect", "model", folders[family]).out
    assert "every row sees every other" in shown
    assert "mask token 258" in shown
    predicts = "its own position" if family == "llada" else "the next position (label shift)"
    assert predicts in shown
    facts: dict[str, Any] = tidar("inspect", "model", folders[family], "--json").json
    assert facts["method"] == f"masked-diffusion:{'32:32' if family == 'llada' else '512:512'}"
    assert facts["parameters"] == sum(t.numel() for t in tensors_of(folders[family]).values())
    assert facts["tokenizer"]["end_of_text"] == [257 if family == "llada" else 256]


# --- checkpoints trained here ---


@pytest.mark.parametrize("shift", [False, True])
def test_a_tidar_entry_says_it_too(shift: bool, tmp_path: Path) -> None:
    """What masked diffusion trained here writes: an ordinary folder whose entry names the attention."""
    model = random_model("qwen3")
    mask = model.config.mask_token_id
    assert mask is not None
    meta = TidarMeta(draft_lens=(), mask_token_id=mask, attention="bidirectional", label_shift=shift)  # fmt: skip
    assert TidarMeta.from_json(meta.to_json()) == meta
    with pytest.raises(TidarError, match="another network"):
        save_checkpoint(tmp_path / "out", model, meta=meta)  # these weights are read causally
    both = Transformer(dataclasses.replace(model.config, attention="bidirectional", label_shift=shift))  # fmt: skip
    both.load_state_dict(model.state_dict())
    with pytest.raises(TidarError, match="another network"):
        save_checkpoint(tmp_path / "out", both)  # nothing in the folder would say so
    out = save_checkpoint(tmp_path / "out", both, meta=meta, tokenizer_source=BUNDLED)
    loaded = load_checkpoint(out)
    assert (loaded.meta, loaded.config) == (meta, both.config)
    with pytest.raises(TidarError, match="Method ar reads causally"):
        parse_method("ar").engine(loaded.model)
    opened = package.load(out, device="cpu")  # no warning that it decodes as AR
    assert opened.default_method == f"masked-diffusion:{'512:512' if shift else '32:32'}"
    assert opened.generate([1, 2, 3], max_new_tokens=8).forwards == 8
    assert "trained for masked diffusion" in tidar("inspect", "model", out).out


def test_entries_that_contradict_themselves() -> None:
    for wrong, message in (
        ({"attention": "sideways"}, "attention 'sideways' is unknown; allowed: causal, bidirectional"),
        ({"label_shift": True}, "goes with bidirectional attention alone"),
        ({"label_shift": 1, "attention": "bidirectional"}, "must be true or false, got 1"),
        ({"draft_lens": []}, "ascending"),
    ):  # fmt: skip
        entry = {"format_version": 1, "draft_lens": [4], "mask_token_id": 5, **wrong}
        with pytest.raises(TidarError, match=message):
            TidarMeta.from_json(entry)
