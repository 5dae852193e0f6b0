"""Small folders with exactly the names and keys of published LLaDA and Dream checkpoints. Not a test itself.

Only the format is tested: the published weights were never run here. The forward pass is written out from their
modelling files (modeling_llada.py of GSAI-ML/LLaDA-8B-Base, modeling_dream.py of Dream-org/Dream-v0-Base-7B) and uses
no part of the package.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

Json = dict[str, Any]
Tensors = dict[str, Tensor]

LLADA: Json = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 32,
    "embedding_dropout": 0.0, "embedding_size": 264, "eos_token_id": 257, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
    "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "mask_token_id": 258, "max_sequence_length": 96, "mlp_hidden_size": 48,
    "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": 4, "n_kv_heads": 4,
    "n_layers": 2, "pad_token_id": 257, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05,
    "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False,
    "torch_dtype": "float32", "transformers_version": "4.46.3", "use_cache": False, "vocab_size": 264,
    "weight_tying": False,
}  # fmt: skip
DREAM: Json = {
    "architectures": ["DreamModel"], "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 256, "eos_token_id": 256, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
    "intermediate_size": 48, "mask_token_id": 258, "max_position_embeddings": 96, "max_window_layers": 28,
    "model_type": "Dream", "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "pad_token_id": 256, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "float32",
    "transformers_version": "4.46.2", "use_cache": False, "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 264,
}  # fmt: skip
MASK = 258


def llada_tensors(config: Json, seed: int = 0) -> Tensors:
    """Random weights under LLaDA's names."""
    dim, wide = config["d_model"], config["mlp_hidden_size"]
    kv = dim // config["n_heads"] * config["n_kv_heads"]
    rows = (config["embedding_size"], dim)
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": rows, "ln_f.weight": (dim,)}
    if not config["weight_tying"]:
        shapes["ff_out.weight"] = rows
    for i in range(config["n_layers"]):
        parts = {"q_proj": (dim, dim), "k_proj": (kv, dim), "v_proj": (kv, dim), "attn_out": (dim, dim),
                 "ff_proj": (wide, dim), "up_proj": (wide, dim), "ff_out": (dim, wide),
                 "attn_norm": (dim,), "ff_norm": (dim,)}  # fmt: skip
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in parts.items()}
        if config["include_qkv_bias"]:
            shapes |= {f"blocks.{i}.{n}_proj.bias": (parts[f"{n}_proj"][0],) for n in "qkv"}
    return _random({f"model.transformer.{name}": shape for name, shape in shapes.items()}, seed)


def dream_tensors(config: Json, seed: int = 0) -> Tensors:
    """Random weights under Dream's names, which are Qwen2's."""
    dim, wide = config["hidden_size"], config["intermediate_size"]
    kv = dim // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], dim),
        "model.norm.weight": (dim,),
        "lm_head.weight": (config["vocab_size"], dim),
    }
    for i in range(config["num_hidden_layers"]):
        parts = {"self_attn.q_proj": (dim, dim), "self_attn.k_proj": (kv, dim), "self_attn.v_proj": (kv, dim),
                 "self_attn.o_proj": (dim, dim), "mlp.gate_proj": (wide, dim), "mlp.up_proj": (wide, dim),
                 "mlp.down_proj": (dim, wide), "input_layernorm": (dim,),
                 "post_attention_layernorm": (dim,)}  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in parts.items()}
        attn = f"model.layers.{i}.self_attn"
        shapes |= {f"{attn}.q_proj.bias": (dim,)}
        shapes |= {f"{attn}.{n}_proj.bias": (kv,) for n in "kv"}
    return _random(shapes, seed)


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) * 0.25 for name, shape in shapes.items()}
    return {n: t + 1 if n.endswith(("norm.weight", "ln_f.weight")) else t for n, t in made.items()}


def write_folder(folder: Path, config: Json, tensors: Tensors) -> Path:
    """config.json, two shards with their index, and the tokenizer files that such a folder has."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, half = sorted(tensors), len(tensors) // 2
    shard = "model-0000{}-of-00002.safetensors"
    parts = {shard.format(1): names[:half], shard.format(2): names[half:]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
    where = {name: file for file, own in parts.items() for name in own}
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (_llada_tokenizer if config["model_type"] == "llada" else _dream_tokenizer)(folder)
    return folder


def llada_folder(folder: Path, **changes: Any) -> Path:
    config = {**LLADA, **changes}
    return write_folder(folder, config, llada_tensors(config))


def dream_folder(folder: Path, **changes: Any) -> Path:
    config = {**DREAM, **changes}
    return write_folder(folder, config, dream_tensors(config))


def tensors_of(folder: Path) -> Tensors:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}  # fmt: skip


def change_tensors(folder: Path, **changes: Tensor | None) -> Path:
    """The folder with tensors replaced, added, or (None) removed: one file, no index."""
    tensors = {**tensors_of(folder), **changes}
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink(missing_ok=True)
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")
    return folder


def _bytes() -> dict[str, int]:
    """The byte-level alphabet, a token for each byte."""
    return {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def _llada_tokenizer(folder: Path) -> None:
    """tokenizer.json and its config, as LLaDA has them: no mask token is named, it is just a special one."""
    tokenizer = Tokenizer(models.BPE(vocab=_bytes(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "add_bos_token": False, "add_eos_token": False, "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": False, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast", "trust_remote_code": True,
    }))  # fmt: skip


def _dream_tokenizer(folder: Path) -> None:
    """vocab.json, merges.txt and a config that names remote code, as Dream has them."""
    special = {"content": "", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
               "special": True}  # fmt: skip
    (folder / "vocab.json").write_text(json.dumps(_bytes()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "added_tokens_decoder": {str(i): {**special, "content": content} for i, content in (
            (256, "<|endoftext|>"), (257, "<|im_end|>"), (MASK, "<|mask|>"))},
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}, "bos_token": None,
        "eos_token": "<|endoftext|>", "mask_token": "<|mask|>", "pad_token": "<|endoftext|>",
        "tokenizer_class": "DreamTokenizer", "unk_token": None,
    }))  # fmt: skip


# --- the published forward pass ---


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _rope(x: Tensor, theta: float) -> Tensor:
    """`[heads, N, dim]`, halves rotated against each other."""
    _, rows, dim = x.shape
    angle = torch.arange(rows)[:, None] / theta ** (torch.arange(0, dim, 2) / dim)
    first, second = x[..., : dim // 2], x[..., dim // 2 :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _layer(x: Tensor, get: Callable[[str], Tensor], n: Json) -> Tensor:
    """One layer; everybody sees everybody."""
    normed = _rms(x, get(n["attn_norm"] + ".weight"), n["eps"])
    q, k, v = (
        (normed @ get(f"{n[part]}.weight").T + (get(f"{n[part]}.bias") if n["bias"] else 0))
        .view(len(x), -1, n["dim"])
        .transpose(0, 1)
        for part in "qkv"
    )
    k, v = (each.repeat_interleave(len(q) // len(each), dim=0) for each in (k, v))
    scores = _rope(q, n["theta"]) @ _rope(k, n["theta"]).transpose(1, 2) / n["dim"] ** 0.5
    seen = (scores.softmax(dim=-1) @ v).transpose(0, 1).reshape(len(x), -1)
    x = x + seen @ get(n["o"] + ".weight").T
    normed = _rms(x, get(n["mlp_norm"] + ".weight"), n["eps"])
    gate, up = (normed @ get(f"{n[part]}.weight").T for part in ("gate", "up"))
    return x + (gate * gate.sigmoid() * up) @ get(n["down"] + ".weight").T


def reference_logits(folder: Path, ids: Sequence[int]) -> Tensor:
    """Logits `[N, rows of the head]` of one bidirectional pass over the folder's own tensors."""
    config, tensors = json.loads((folder / "config.json").read_text()), tensors_of(folder)
    if config["model_type"] == "llada":
        embed, norm, head = (f"model.transformer.{n}.weight" for n in ("wte", "ln_f", "ff_out"))
        head = embed if config["weight_tying"] else head
        prefix, layers = "model.transformer.blocks.", config["n_layers"]
        names = {"attn_norm": "attn_norm", "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "attn_out",
                 "mlp_norm": "ff_norm", "gate": "ff_proj", "up": "up_proj", "down": "ff_out",
                 "bias": config["include_qkv_bias"], "dim": config["d_model"] // config["n_heads"]}  # fmt: skip
    else:
        embed, norm, head = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
        prefix, layers = "model.layers.", config["num_hidden_layers"]
        names = {"attn_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
                 "v": "self_attn.v_proj", "o": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm",
                 "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj", "bias": True,
                 "dim": config["hidden_size"] // config["num_attention_heads"]}  # fmt: skip
    names |= {"eps": config["rms_norm_eps"], "theta": config["rope_theta"]}
    x = tensors[embed][torch.tensor(ids)]
    for i in range(layers):
        x = _layer(x, lambda part, i=i: tensors[f"{prefix}{i}.{part}"], names)  # type: ignore[misc]
    return _rms(x, tensors[norm], names["eps"]) @ tensors[head].T


def decode_greedily(folder: Path, prompt: Sequence[int], new: int, span: int, steps: int) -> list[int]:  # fmt: skip
    """What the published samplers write at temperature 0: LLaDA's by confidence, Dream's by entropy and shifted."""
    dream = json.loads((folder / "config.json").read_text())["model_type"] == "Dream"
    x = [*prompt, *[MASK] * new]
    for start in range(len(prompt), len(x), span):
        stop = min(start + span, len(x))
        passes = min(steps, stop - start)
        for done in range(passes):
            places = [p for p in range(start, stop) if x[p] == MASK]
            logits = reference_logits(folder, x)
            logits[:, MASK] = -torch.inf
            probs = logits[[p - dream for p in places]].softmax(dim=-1)
            sure = (probs * (probs + 1e-10).log()).sum(-1) if dream else probs.max(dim=-1).values
            if dream:  # what is left of time: from 1 to 1e-3, evenly
                t, s = (1 - (1 - 1e-3) * i / passes for i in (done, done + 1))
                count = len(places) if done == passes - 1 else int(len(places) * (1 - s / t))
            else:
                count = (stop - start) // passes + (done < (stop - start) % passes)
            for row in sure.argsort(descending=True)[:count].tolist():
                x[places[row]] = int(probs[row].argmax())
    return x[len(prompt) :]
