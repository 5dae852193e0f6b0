"""The network against `transformers`' own four families, and what it promises by itself."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from tidar.attention import dense_attend, flex_attend
from tidar.errors import TidarError
from tidar.hf_config import config_from_hf
from tidar.model import (
    ModelConfig,
    RopeConfig,
    Transformer,
    flops_per_row,
    num_parameters,
    rope_frequencies,
)
from tidar.tensor_files import tensor_slots
from tidar.weights import init_model

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-bias": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-head-dim": ("llama", {"head_dim": 16, "num_key_value_heads": 4}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama-llama3": ("llama", {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral-wide-window": ("mistral", {"sliding_window": 64}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": {"rope_theta": 1e6, **YARN}}),
    "qwen2-yarn-factors": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_theta": 1e4,
                **YARN,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "mscale": 0.7,
                "mscale_all_dim": 1.3,
                "truncate": False,
            }
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-tied-bias": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
}


def hf_model(family: str, changes: dict[str, Any], seed: int = 0) -> Any:
    """A small random model of `transformers`, biases and norms random too."""
    torch.manual_seed(seed)
    classes = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    name = classes[family]
    # Deep copies: `transformers` writes into the dictionaries it is given.
    changes = {k: dict(v) if isinstance(v, dict) else v for k, v in changes.items()}
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def ours_from(model: Any) -> Transformer:
    """The same weights in our network, in memory."""
    ours = init_model(config_from_hf(model.config.to_dict()), 0).eval()
    state = model.state_dict()
    for name, slot in tensor_slots(ours).items():
        slot.copy_(state[name])
    return ours


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def rows(batch: int = 2, length: int = 40, vocab: int = 96) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab, (batch, length), generator=generator)
    return ids, torch.arange(length).expand(batch, length)


def small(**changes: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 56,
        "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "max_positions": 64,
    }  # fmt: skip
    return ModelConfig(**{**base, **changes})


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_transformers(case: str) -> None:
    theirs = hf_model(*CASES[case])
    ours = ours_from(theirs)
    ids, positions = rows()
    expected = theirs(ids).logits
    assert expected.std() > 0.3  # or the comparison says nothing
    actual = ours.logits(ours(ids, positions, causal))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    # Positions with jumps and repeats go through RoPE alone, as in transformers with a 4D mask.
    positions = torch.randint(0, 64, ids.shape, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    expected = theirs(
        ids, position_ids=positions, attention_mask=mask[None, None].expand(2, 1, 40, 40)
    )
    actual = ours.logits(ours(ids, positions, dense_attend(mask)))
    torch.testing.assert_close(actual, expected.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_num_parameters_counts_every_one(case: str) -> None:
    model = ours_from(hf_model(*CASES[case]))
    assert num_parameters(model.config) == sum(p.numel() for p in model.parameters())


@torch.no_grad()
def test_row_order_does_not_matter_only_positions_do() -> None:
    model = init_model(small(qk_norm=True, model_type="qwen3"), 3).eval()
    ids, positions = rows(1, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mask = positions[0, :, None] >= positions[0, None, :]
    plain = model(ids, positions, dense_attend(mask))
    shuffled = model(ids[:, order], positions[:, order], dense_attend(mask[order][:, order]))
    torch.testing.assert_close(shuffled, plain[:, order], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_mask_token_logit_is_minus_infinity_in_every_reading() -> None:
    model = init_model(small(mask_token_id=7), 0).eval()
    ids, positions = rows(1, 5)
    hidden = model(ids, positions, causal)
    logits, raw = model.logits(hidden), model.raw_logits(hidden)
    assert (logits[..., 7] == -math.inf).all()
    assert raw.isfinite().all()
    others = torch.arange(96) != 7
    assert torch.equal(logits[..., others], raw[..., others])
    model.set_mask_token(None)
    assert torch.equal(model.logits(hidden), raw)
    with pytest.raises(TidarError, match="mask_token_id 96 is outside the vocabulary of 96 rows"):
        model.set_mask_token(96)


def test_mask_token_gets_no_gradient_through_the_head() -> None:
    model = init_model(small(mask_token_id=7), 0)
    ids, positions = rows(1, 5, vocab=7)
    F.cross_entropy(model.logits(model(ids, positions, causal))[0], ids[0]).backward()
    assert model.head is not None
    assert model.head.weight.grad is not None
    assert (model.head.weight.grad[7] == 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_frequencies_stay_float32_when_the_model_is_cast_or_moved() -> None:
    model = init_model(small(rope=RopeConfig(theta=1e6)), 0)
    exact = model.rotary.inv_freq.clone()
    model.to(torch.bfloat16).to("meta").to_empty(device="cpu")
    assert model.rotary.inv_freq.dtype == torch.float32
    assert torch.equal(model.rotary.inv_freq, exact)
    assert model.embed.weight.dtype == torch.bfloat16
    assert not any("inv_freq" in name for name in model.state_dict())


@torch.no_grad()
def test_taps_are_the_layer_outputs() -> None:
    model = init_model(small(), 0).eval()
    ids, positions = rows(1, 6)
    hidden, (last, first) = model.forward_with_taps(ids, positions, causal, (2, 0))
    assert torch.equal(hidden, model(ids, positions, causal))
    assert torch.equal(model.norm(last), hidden)
    assert not torch.equal(first, last)
    with pytest.raises(TidarError, match="tap 3 names no layer; allowed: 0 to 2"):
        model.forward_with_taps(ids, positions, causal, (3,))


def test_gradient_checkpointing_changes_memory_not_gradients() -> None:
    ids, positions = rows(1, 6)
    calls: list[int] = []

    def counting(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(layer)
        return causal(layer, q, k, v)

    gradients = []
    for recompute in (False, True):
        model = init_model(small(), 0).train()
        model.gradient_checkpointing = recompute
        model(ids, positions, counting).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert calls == [0, 1, 2, 0, 1, 2, 2, 1, 0]  # the last three are recomputed
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
    calls.clear()
    model.eval()
    model(ids, positions, counting).square().sum().backward()
    assert calls == [0, 1, 2]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_attend_is_given_one_dtype_and_the_promised_shapes(family: Any) -> None:
    model = init_model(small(model_type=family, qk_norm=family == "qwen3"), 0)
    ids, positions = rows(2, 6)
    seen = []

    def look(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((layer, q.dtype, k.dtype, v.dtype, q.shape, k.shape, v.shape))
        return causal(layer, q, k, v)

    model(ids, positions, look)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids, positions, look)
    model.to(torch.bfloat16)(ids, positions, look)
    for index, (layer, *dtypes, q, k, v) in enumerate(seen):
        assert layer == index % 3
        assert set(dtypes) == {torch.float32 if index < 3 else torch.bfloat16}
        assert (q, k, v) == ((2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8))


def test_whole_model_traces_without_graph_breaks() -> None:
    model = init_model(small(qk_norm=True, model_type="qwen3", mask_token_id=3), 0).eval()
    ids, positions = rows(1, 6)

    def step(ids: Tensor, positions: Tensor) -> Tensor:
        return model.logits(model(ids, positions, causal))

    with torch.no_grad():
        traced = torch.compile(step, fullgraph=True, backend="eager")
        torch.testing.assert_close(traced(ids, positions), step(ids, positions))


def test_init_is_a_function_of_the_seed_and_scales_the_residual_outputs() -> None:
    config = small(hidden_size=256, intermediate_size=512, head_dim=64, attention_bias=True)
    torch.manual_seed(1)
    first = init_model(config, 5)
    torch.manual_seed(2)
    second, other = init_model(config, 5), init_model(config, 6)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.embed.weight, other.embed.weight)
    layer: Any = first.layers[0]
    assert layer.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.down.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.05)
    assert layer.o.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.05)
    assert (layer.qkv.bias == 0).all()
    assert (layer.attn_norm.weight == 1).all()


def test_flops_are_twice_the_matrix_weights_plus_attention() -> None:
    config = small(tie_embeddings=True)
    matrices = num_parameters(config) - 7 * 32 - 96 * 32  # without norms and embedding
    assert flops_per_row(config, 0, head=False) == 2 * matrices
    assert flops_per_row(config, 10) == 2 * matrices + 2 * 96 * 32 + 3 * 4 * 4 * 8 * 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; allowed: llama, mistral"),
        ({"num_heads": 5}, r"num_heads \(5\) must be a multiple of num_kv_heads \(2\)"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"hidden_size": 0}, "hidden_size must be a whole number above 0, got 0"),
        ({"num_layers": True}, "num_layers must be a whole number above 0, got True"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a finite number above 0"),
        ({"mask_token_id": -1}, "mask_token_id -1 is outside the vocabulary of 96 rows"),
    ],
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TidarError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "dynamic"}, "rope kind 'dynamic' is not supported; allowed: default, linear"),
        ({"theta": 0.0}, "rope theta must be a finite number above 1"),
        ({"kind": "linear", "factor": 0.0}, "rope factor must be a finite number above 0"),
        ({"kind": "yarn", "factor": 2.0}, "needs original_max_positions"),
        (
            {"kind": "llama3", "original_max_positions": 8, "low_freq_factor": 4.0},
            "needs 0 < low_freq_factor < high_freq_factor",
        ),
    ],
)
def test_rope_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TidarError, match=message):
        RopeConfig(**values)


def test_explicit_yarn_attention_factor_wins() -> None:
    rope = RopeConfig(kind="yarn", factor=4.0, original_max_positions=16)
    assert rope_frequencies(rope, 8)[1] == pytest.approx(0.1 * math.log(4) + 1)
    assert rope_frequencies(dataclasses.replace(rope, attention_factor=1.5), 8)[1] == 1.5


def test_dense_attend_masks_of_every_shape_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, 5, 8, generator=generator).unbind()
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = dense_attend(is_causal=True)(0, q, k, v)
    for form in (mask, mask.expand(2, 5, 5), mask.expand(2, 1, 5, 5)):
        torch.testing.assert_close(dense_attend(form)(0, q, k, v), expected)
    everything = dense_attend(torch.ones_like(mask))(0, q, k, v)
    torch.testing.assert_close(dense_attend()(0, q, k, v), everything)


def test_attention_refuses_what_it_cannot_do() -> None:
    mask = torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(TidarError, match="a mask or is_causal, not both"):
        dense_attend(mask, is_causal=True)
    with pytest.raises(TidarError, match="needs a boolean mask"):
        dense_attend(mask.float())
    with pytest.raises(TidarError, match="2 to 4 dimensions, got 1"):
        dense_attend(mask[0])
    from torch.nn.attention.flex_attention import create_block_mask

    sparse = create_block_mask(lambda b, h, i, j: i >= j, None, None, 128, 128, device="cpu")
    q = torch.zeros(1, 2, 128, 16)
    with pytest.raises(TidarError, match="runs on CUDA only, got tensors on cpu"):
        flex_attend(sparse)(0, q, q, q)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# torch.compile looks at it itself, and hides the warning in a way that fails where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_flex_equals_dense_on_cuda() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    sparse = create_block_mask(lambda b, h, i, j: i >= j, None, None, 200, 200, device="cuda")
    model = init_model(small(head_dim=16, max_positions=256), 0).cuda()
    ids, positions = (t.cuda() for t in rows(2, 200))
    results = []
    for attend in (flex_attend(sparse), dense_attend(is_causal=True)):
        model.zero_grad()
        hidden = model(ids, positions, attend)
        hidden.square().sum().backward()
        results.append((hidden.detach(), model.embed.weight.grad.clone()))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-2, rtol=1e-2)
