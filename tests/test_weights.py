"""Checkpoints in both directions, and everything that is refused (law 8 of the design)."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import random_checkpoint
from safetensors.torch import load_file, save_file
from test_model import CASES, causal, hf_model, rows, small
from test_tokens import STORIES
from torch import Tensor

import tidar.weights as weights_module
from tidar.errors import TidarError
from tidar.hf_config import TidarMeta, config_from_hf, config_to_hf
from tidar.mask_token import prepare_mask_token
from tidar.model import RopeConfig, Transformer
from tidar.tokens import Tokenizer
from tidar.weights import (
    Checkpoint,
    init_model,
    load_checkpoint,
    save_checkpoint,
)

META = TidarMeta(draft_lens=(4, 8), mask_token_id=90)


def logits_of(model: Transformer, ids: Tensor) -> Tensor:
    """Causal logits, the mask token's included, as plain `transformers` gives them."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        return model.raw_logits(model(ids, positions, causal))


def open_plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The folder in `transformers`, unmodified, with nothing missing and nothing left over."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def hf_folder(tmp_path: Path, case: str = "llama", **save: Any) -> Path:
    hf_model(*CASES[case]).save_pretrained(tmp_path / "base", **save)
    return tmp_path / "base"


def edit(folder: Path, name: str = "config.json", **changes: Any) -> Path:
    """Change entries of a JSON file; None as `...` removes one."""
    path = folder / name
    raw = json.loads(path.read_text()) if path.exists() else {}
    raw.update(changes)
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_law_8_both_directions(case: str, tmp_path: Path) -> None:
    theirs = hf_model(*CASES[case])
    theirs.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    assert (tmp_path / "base" / "model.safetensors.index.json").exists()
    loaded = load_checkpoint(tmp_path / "base")
    ids, _ = rows()
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(logits_of(loaded.model, ids), expected, atol=1e-5, rtol=1e-5)
    assert loaded.meta is None

    loaded.model.set_mask_token(META.mask_token_id)
    out = save_checkpoint(
        tmp_path / "out",
        loaded.model,
        meta=META,
        raw_config=loaded.raw_config,
        generation_config=loaded.generation_config,
        max_shard_bytes=20_000,
    )
    with torch.no_grad():
        again = open_plain(out)(ids).logits
    assert torch.equal(again, expected)  # not close: the very same weights in the same code
    ours = load_checkpoint(out)
    assert ours.meta == META
    assert ours.config == loaded.model.config
    assert torch.equal(logits_of(ours.model, ids), logits_of(loaded.model, ids))
    base, saved = (shard_tensors(folder) for folder in (tmp_path / "base", out))
    assert base.keys() == saved.keys()
    assert all(torch.equal(base[name], saved[name]) for name in base)


def shard_tensors(folder: Path) -> dict[str, Tensor]:
    parts = sorted(folder.glob("*.safetensors"))
    assert len(parts) > 1
    return {name: tensor for part in parts for name, tensor in load_file(part).items()}


SCRATCH = {
    "llama": small(attention_bias=True, output_bias=True, mlp_bias=True),
    "llama-yarn": small(
        rope=RopeConfig(kind="yarn", factor=4.0, original_max_positions=16, mscale=0.7)
    ),
    "llama-llama3": small(rope=RopeConfig(kind="llama3", factor=8.0, original_max_positions=16)),
    "mistral": small(model_type="mistral", tie_embeddings=True),
    "qwen2": small(
        model_type="qwen2", attention_bias=True, rope=RopeConfig(kind="linear", factor=2.0)
    ),
    "qwen3": small(model_type="qwen3", qk_norm=True, head_dim=16, tie_embeddings=True),
}


@pytest.mark.parametrize("name", SCRATCH)
def test_model_from_scratch_opens_in_transformers(name: str, tmp_path: Path) -> None:
    config = SCRATCH[name]
    assert config_from_hf(config_to_hf(config)) == config
    made = random_checkpoint(tmp_path / "new", config, seed=3)
    ids, _ = rows()
    with torch.no_grad():
        expected = open_plain(tmp_path / "new")(ids).logits
    torch.testing.assert_close(logits_of(made.model, ids), expected, atol=1e-5, rtol=1e-5)
    assert made.config == config
    assert torch.equal(made.model.embed.weight, init_model(config, 3).embed.weight)


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs shared/base/stories260k")
def test_stories260k_converted_opens_in_transformers(tmp_path: Path) -> None:
    base = load_checkpoint(STORIES)
    tokenizer = Tokenizer.load(STORIES)
    ids = torch.tensor([tokenizer.encode("Once upon a time, there was a little girl named Lily.")])
    plain = open_plain(STORIES)
    with torch.no_grad():
        expected = plain(ids).logits
    torch.testing.assert_close(logits_of(base.model, ids), expected, atol=1e-5, rtol=1e-5)

    assert prepare_mask_token(base.model, base.raw_config, tokenizer) == 512
    out = save_checkpoint(
        tmp_path / "out",
        base.model,
        meta=TidarMeta(draft_lens=(8,), mask_token_id=512),
        raw_config=base.raw_config,
        tokenizer_source=STORIES,
        generation_config=base.generation_config,
    )
    converted = open_plain(out)
    with torch.no_grad():
        logits = converted(ids).logits
    assert logits.shape[-1] == 513
    torch.testing.assert_close(logits[..., :512], expected, atol=1e-5, rtol=1e-5)
    options: Any = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 2}
    attention = torch.ones_like(ids)
    one = plain.generate(ids, attention_mask=attention, **options)
    two = converted.generate(ids, attention_mask=attention, **options)
    assert torch.equal(one, two)
    assert (out / "LICENSE").read_bytes() == (STORIES / "LICENSE").read_bytes()
    assert Tokenizer.load(out).eos_ids == tokenizer.eos_ids
    assert Tokenizer.load(out).encode("Once upon") == tokenizer.encode("Once upon")


def test_plain_transformers_never_generates_the_mask_token(tmp_path: Path) -> None:
    model = init_model(small(mask_token_id=90, tie_embeddings=True), 0)
    # Every hidden state scores the mask token highest: its row points where all others do.
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.weight[0] = 1.0
        model.embed.weight[:, 0] = 1.0
        model.embed.weight[90, 0] = 50.0
    out = save_checkpoint(tmp_path / "out", model, meta=META)
    plain = open_plain(out)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert plain(ids).logits[0, -1].argmax() == 90
    new = plain.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
    )
    assert new.shape == (1, 8)
    assert 90 not in new[0].tolist()


def test_generation_config_keeps_the_bases_end_tokens(tmp_path: Path) -> None:
    model = init_model(small(mask_token_id=90), 0)
    raw = {**config_to_hf(small()), "eos_token_id": [2, 3], "bos_token_id": 1}
    out = save_checkpoint(tmp_path / "a", model, meta=META, raw_config=raw)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 3], "suppress_tokens": [90]}
    given = {"eos_token_id": 5, "suppress_tokens": [7], "temperature": 0.6, "do_sample": True}
    out = save_checkpoint(tmp_path / "b", model, meta=META, raw_config=raw, generation_config=given)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {**given, "suppress_tokens": [7, 90]}


def test_dtype_on_disk(tmp_path: Path) -> None:
    model = init_model(small(), 0)
    out = save_checkpoint(tmp_path / "out", model, dtype=torch.bfloat16)
    assert load_file(out / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_checkpoint(out, dtype="auto").model.embed.weight.dtype == torch.bfloat16
    assert open_plain(out, dtype="auto").dtype == torch.bfloat16  # type: ignore[arg-type]
    with pytest.raises(TidarError, match="dtype float64 is not supported"):
        save_checkpoint(tmp_path / "no", model, dtype=torch.float64)


def change_tensors(folder: Path, **changes: Tensor | None) -> Path:
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)
    return folder


def test_tensor_refusals(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path)
    q = "model.layers.1.self_attn.q_proj.weight"
    original = load_file(folder / "model.safetensors")[q]
    for value, message in (
        (None, f"lacks tensors: {q}$"),
        (torch.zeros(32, 31), rf"{q} has shape \[32, 31\], config.json asks for \[32, 32\]"),
        (original.to(torch.int8), f"{q} has dtype I8 .a quantized checkpoint"),
        (original.double(), f"{q} has dtype F64"),
    ):
        with pytest.raises(TidarError, match=message):
            load_checkpoint(change_tensors(folder, **{q: value}))
    change_tensors(folder, **{q: original, "model.layers.1.self_attn.q_proj.bias": torch.zeros(32)})
    with pytest.raises(
        TidarError, match=r"unexpected tensors: model.layers.1.self_attn.q_proj.bias"
    ):
        load_checkpoint(folder)
    change_tensors(folder, **{"model.layers.1.self_attn.q_proj.bias": None, "lm_head.weight": None})
    with pytest.raises(TidarError, match=r"lacks tensors: lm_head.weight"):
        load_checkpoint(folder)
    for i in range(8):
        change_tensors(folder, **{f"extra.{i}": torch.zeros(1)})
    change_tensors(folder, **{"lm_head.weight": torch.zeros(96, 32)})
    with pytest.raises(TidarError, match=r"extra.4 and 3 more"):
        load_checkpoint(folder)


def test_stored_frequencies_and_equal_tied_heads_are_accepted(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, "llama-tied-bias")
    before = load_checkpoint(folder)
    embedding = before.model.embed.weight.detach().clone()
    change_tensors(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    change_tensors(folder, **{"lm_head.weight": embedding})
    assert torch.equal(load_checkpoint(folder).model.embed.weight, embedding)
    change_tensors(folder, **{"lm_head.weight": embedding + 1})
    with pytest.raises(TidarError, match=r"ties the embeddings, but lm_head.weight differs"):
        load_checkpoint(folder)


def test_corrupt_files(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-100], "corrupt or cut short"),
        (whole[:20], "corrupt or cut short"),
        (b"", "corrupt or cut short"),
        (b"\xff" * 64, "corrupt or cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    ):
        path.write_bytes(content)
        with pytest.raises(TidarError, match=f"not a readable safetensors file .{message}"):
            load_checkpoint(folder)
    path.write_bytes(whole)
    for text, message in (
        ("{", "not readable as JSON"),
        ("[]", "must hold a JSON object, got list"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(TidarError, match=message):
            load_checkpoint(folder)


def test_shard_refusals(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, max_shard_size="30KB")
    index = "model.safetensors.index.json"
    where = json.loads((folder / index).read_text())["weight_map"]
    first, *_, last = sorted(set(where.values()))
    edit(folder, index, weight_map={**where, "model.norm.weight": "../evil.safetensors"})
    with pytest.raises(TidarError, match=r"shard '../evil.safetensors' is outside the folder"):
        load_checkpoint(folder)
    wrong = first if where["model.norm.weight"] == last else last
    edit(folder, index, weight_map={**where, "model.norm.weight": wrong})
    with pytest.raises(TidarError, match=r"not where the index says: model.norm.weight"):
        load_checkpoint(folder)
    edit(folder, index, weight_map=where)
    tensors = load_file(folder / last)
    save_file({**tensors, "lm_head.weight": torch.zeros(96, 32),
               "model.embed_tokens.weight": torch.zeros(96, 32)}, folder / last)  # fmt: skip
    with pytest.raises(TidarError, match=f"is in model-.* and {last}"):
        load_checkpoint(folder)
    (folder / last).unlink()
    with pytest.raises(TidarError, match=f"shards missing: {last}"):
        load_checkpoint(folder)
    edit(folder, index, weight_map={})
    with pytest.raises(TidarError, match="has no weight_map"):
        load_checkpoint(folder)


def test_pickles_and_wrong_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TidarError, match=r"is no Hugging Face checkpoint: it has no config.json"):
        load_checkpoint(tmp_path)
    folder = edit(tmp_path, **config_to_hf(small()))
    with pytest.raises(TidarError, match=r"has no weights: neither model.safetensors nor"):
        load_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(TidarError, match=r"only pickled weights \(pytorch_model.bin\)"):
        load_checkpoint(folder)
    with pytest.raises(TidarError, match=r"config.json is a file; give the folder"):
        load_checkpoint(folder / "config.json")
    with pytest.raises(TidarError, match=r"no such folder: ./nowhere"):
        load_checkpoint("./nowhere")
    with pytest.raises(TidarError, match="no such folder: a/b/c"):
        load_checkpoint("a/b/c")


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    seen: dict[str, Any] = {}
    folder = tmp_path / "snapshot"
    save_checkpoint(folder, init_model(small(), 0))

    def fetch(repo: str, **options: Any) -> str:
        seen.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    loaded = load_checkpoint("owner/name")
    assert (loaded.source, loaded.folder, seen["repo"]) == ("owner/name", folder, "owner/name")
    assert not any(p.endswith((".py", ".bin", ".pt")) for p in seen["allow_patterns"])

    def offline(repo: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("offline mode is on\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        TidarError,
        match=r"'owner/name' is no local folder, and could not be fetched .*offline mode",
    ):
        load_checkpoint("owner/name")


def test_bad_device(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "new", small(), seed=0)
    for device in ("gpu", "cuda:99"):
        with pytest.raises(TidarError, match=f"cannot place the model on device '{device}'"):
            load_checkpoint(tmp_path / "new", device=device)


def test_saving_replaces_a_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first, second = init_model(small(), 0), init_model(small(), 1)
    out.mkdir()
    save_checkpoint(out, first)
    (out / "old-shard.safetensors").write_bytes(b"")
    save_checkpoint(out, second)
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    assert torch.equal(load_checkpoint(out).model.embed.weight, second.embed.weight)

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(weights_module, "write_weights", full)
    with pytest.raises(TidarError, match=r"could not write the checkpoint .*no space left"):
        save_checkpoint(out, first)
    monkeypatch.undo()
    assert torch.equal(load_checkpoint(out).model.embed.weight, second.embed.weight)

    real = os.rename

    def crash(self: Path, target: Path) -> None:
        if self.name.endswith(".partial"):
            raise OSError("crashed between the renames")
        real(self, target)

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(TidarError, match="crashed between"):
        save_checkpoint(out, first)
    monkeypatch.undo()
    assert torch.equal(load_checkpoint(out).model.embed.weight, second.embed.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing left behind

    (out / "notes").mkdir()
    with pytest.raises(TidarError, match=r"is not just a checkpoint; .* would delete config.json"):
        save_checkpoint(out, first)
    (tmp_path / "file").write_text("")
    with pytest.raises(TidarError, match="exists and is no folder"):
        save_checkpoint(tmp_path / "file", first)


def test_save_refuses_contradictions(tmp_path: Path) -> None:
    model = init_model(small(), 0)
    with pytest.raises(TidarError, match="meta has mask_token_id 90, the model has None"):
        save_checkpoint(tmp_path / "out", model, meta=META)
    raw = {**config_to_hf(small()), "num_hidden_layers": 2}
    with pytest.raises(TidarError, match="raw_config describes another network"):
        save_checkpoint(tmp_path / "out", model, raw_config=raw)
    with pytest.raises(TidarError, match="no such folder to copy the tokenizer from"):
        save_checkpoint(tmp_path / "out", model, tokenizer_source=tmp_path / "none")
    model.set_mask_token(90)
    with pytest.raises(TidarError, match="90 is also the eos_token_id of generation_config"):
        save_checkpoint(tmp_path / "out", model, meta=META, generation_config={"eos_token_id": 90})
    biased = init_model(small(model_type="mistral", attention_bias=True), 0)
    with pytest.raises(TidarError, match="a mistral checkpoint needs attention_bias=False"):
        save_checkpoint(tmp_path / "out", biased)
    assert not (tmp_path / "out").exists()


def test_checkpoint_fields(tmp_path: Path) -> None:
    made = random_checkpoint(tmp_path / "new", small(mask_token_id=90), seed=0, meta=META)
    assert isinstance(made, Checkpoint)
    assert made.config == small(mask_token_id=90)
    assert made.raw_config["tidar"] == META.to_json()
    assert made.generation_config["suppress_tokens"] == [90]
    assert not made.model.training
