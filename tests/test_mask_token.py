"""The choice of the mask token and its row."""

from pathlib import Path

import pytest
import torch
from test_model import rows, small
from test_tokens import byte_level
from test_weights import META, logits_of

from tidar.hf_config import TidarMeta, config_to_hf
from tidar.mask_token import add_mask_row, choose_mask_token, prepare_mask_token
from tidar.model import ModelConfig
from tidar.tokens import Tokenizer
from tidar.weights import init_model, load_checkpoint, save_checkpoint


def vocabulary(*extra: str) -> Tokenizer:
    backend = byte_level()._backend
    backend.add_special_tokens({"additional_special_tokens": list(extra)} if extra else {})
    return Tokenizer(backend)


def test_choose_mask_token() -> None:
    plain = vocabulary()
    size = plain.max_id + 1
    assert choose_mask_token({"vocab_size": size + 5}, plain) == (size, False)
    assert choose_mask_token({"vocab_size": size}, plain) == (size, True)
    meta = {"tidar": META.to_json(), "vocab_size": size + 5}
    assert choose_mask_token(meta, plain) == (90, False)
    for tokens, best in (
        (["<|reserved_special_token_9|>", "<|reserved_special_token_10|>", "<x>"], 1),
        (["[control_8]", "[control_30]"], 1),
        (["<unused1>", "<unused0>"], 0),
        (["<|extra_2|>"], 0),
    ):
        kept = vocabulary(*tokens)
        raw = {"vocab_size": kept.max_id + 1}
        assert choose_mask_token(raw, kept) == (kept.vocab[tokens[best]], False)
        taken = {**raw, "pad_token_id": kept.vocab[tokens[best]]}
        assert choose_mask_token(taken, kept)[0] != kept.vocab[tokens[best]]


@pytest.mark.parametrize("tied", [True, False])
def test_add_mask_row_changes_no_other_logit(tied: bool, tmp_path: Path) -> None:
    config = small(tie_embeddings=tied)
    model = init_model(config, 0)
    ids, _ = rows()
    before = logits_of(model, ids)
    mean = model.embed.weight.mean(dim=0)
    assert add_mask_row(model) == 96
    after = logits_of(model, ids)
    assert torch.equal(after[..., :96], before)
    torch.testing.assert_close(model.embed.weight[96], mean)
    torch.testing.assert_close(after[..., 96], before.mean(-1), atol=1e-5, rtol=1e-5)
    assert (model.config.vocab_size, model.config.mask_token_id) == (97, 96)
    meta = TidarMeta(draft_lens=(4,), mask_token_id=96, masking="random")
    out = save_checkpoint(tmp_path / "out", model, meta=meta, raw_config=config_to_hf(config))
    assert torch.equal(logits_of(load_checkpoint(out).model, ids), after)


def test_prepare_mask_token_keeps_a_trained_row() -> None:
    tokenizer = vocabulary()
    rows_ = tokenizer.max_id + 4
    config: ModelConfig = small(vocab_size=rows_)
    model = init_model(config, 0)
    raw = config_to_hf(config)
    before = model.embed.weight.detach().clone()
    mask = prepare_mask_token(model, raw, tokenizer)
    assert mask == model.config.mask_token_id == tokenizer.max_id + 1
    others = torch.arange(rows_) != mask
    torch.testing.assert_close(model.embed.weight[mask], before[others].mean(dim=0))
    assert torch.equal(model.embed.weight[others], before[others])
    trained = model.embed.weight.detach().clone()
    meta = TidarMeta(draft_lens=(4,), mask_token_id=mask)
    assert prepare_mask_token(model, {**raw, "tidar": meta.to_json()}, tokenizer) == mask
    assert torch.equal(model.embed.weight, trained)
