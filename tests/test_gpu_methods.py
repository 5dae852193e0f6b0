"""What runs on any device, on a GPU: every method against AR, every objective's masks against the dense ones."""

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from contenders import (
    OTHERS,
    decode,
    eagle,
    fitted_head,
    near_copy,
    speculative,
    target,
)
from models import Excuses, ar_text, random_prompt

from tidar.decode.engine import Engine, FixedPlan
from tidar.decode.request import Request
from tidar.layout import Schedule
from tidar.methods.tree import chain, spread
from tidar.model import ModelConfig, Transformer
from tidar.sampling import SamplingParams
from tidar.training.objective import Objective
from tidar.training.objectives.ar import ArObjective
from tidar.training.objectives.block_diffusion import BlockDiffusionObjective
from tidar.training.objectives.eagle import EagleModel, EagleObjective
from tidar.training.objectives.masked_diffusion import MaskedDiffusionObjective
from tidar.training.objectives.tidar import TidarObjective
from tidar.weights import init_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@cache
def on_gpu() -> Transformer:
    return copy.deepcopy(target()).cuda()


def _speculative() -> Engine:
    draft = speculative(on_gpu(), copy.deepcopy(near_copy()).cuda(), 3)
    return Engine(on_gpu(), draft, FixedPlan(Schedule(5, ())), max_batch=3)


EXACT: dict[str, Callable[[], Engine]] = {
    "speculative": _speculative,
    "eagle, a chain": lambda: eagle(on_gpu(), copy.deepcopy(fitted_head()).cuda(), chain(4), 3),
    "eagle, a tree": lambda: eagle(on_gpu(), copy.deepcopy(fitted_head()).cuda(), spread(4), 3),
}


def requests(params: SamplingParams) -> list[Request]:
    prompts = [random_prompt(target(), length, length) for length in (3, 9, 5)]
    return [Request(prompt=prompt, max_new_tokens=24, params=params) for prompt in prompts]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, seed=3)])
@pytest.mark.parametrize("name", EXACT)
def test_texts_are_those_of_ar_on_a_cpu(
    name: str, params: SamplingParams, excuses: Excuses
) -> None:
    asked = requests(params)
    for request, told in zip(asked, decode(EXACT[name](), asked), strict=True):
        excuses.check(told.ids, ar_text(target(), request.prompt, 24, params))


@pytest.mark.parametrize("name", EXACT)
def test_rejection_sampling_comes_to_an_end(name: str) -> None:
    asked = requests(SamplingParams(temperature=1.0, seed=3, sampling="rejection"))
    for told in decode(EXACT[name](), asked):
        assert len(told.ids) == 24


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_write_what_they_write_on_a_cpu(name: str) -> None:
    asked = requests(SamplingParams())
    here, there = (decode(OTHERS[name](model, 3), asked) for model in (on_gpu(), target()))
    same = sum(a.ids == b.ids for a, b in zip(here, there, strict=True))
    assert same >= len(asked) - 1  # one text may part at a near-tie


OBJECTIVES: dict[str, Objective] = {
    "ar": ArObjective(),
    "tidar": TidarObjective(draft_lens=(4, 8), anchors="random"),
    "block-diffusion": BlockDiffusionObjective(draft_lens=(8,)),
    "block-diffusion, full": BlockDiffusionObjective(draft_lens=(8,), span_attention="full"),
    "masked-diffusion": MaskedDiffusionObjective(),
    "masked-diffusion, shifted": MaskedDiffusionObjective(label_shift=True),
}


def batch() -> dict[str, torch.Tensor]:
    """Two packed sequences of 256 tokens."""
    generator = torch.Generator().manual_seed(0)
    document = torch.zeros(2, 256, dtype=torch.long)
    document[0, 100:], document[1, 130:] = 1, 1
    inputs = {
        "input_ids": torch.randint(0, 36, document.shape, generator=generator),
        "document": document,
        "index": torch.arange(2),
        "epoch": torch.zeros(2, dtype=torch.long),
    }
    return {name: tensor.cuda() for name, tensor in inputs.items()}


def learnt() -> Transformer:
    """FlexAttention takes heads of 16 numbers at least."""
    config = ModelConfig(
        model_type="qwen3", vocab_size=40, hidden_size=64, intermediate_size=96, num_layers=3,
        num_heads=4, num_kv_heads=2, head_dim=16, max_positions=256, tie_embeddings=True,
        qk_norm=True, mask_token_id=39,
    )  # fmt: skip
    return init_model(config, 0, device="cuda")


# Two remarks of torch.compile: about its own look at inputs, and about products in full float32, as asked.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_by_flex_attention_are_those_of_dense_masks(name: str) -> None:
    """Float32, forward and backward, as `tidar train` runs them on a GPU."""
    gradients, losses = [], []
    for flex in (False, True):
        net = learnt()
        learner = OBJECTIVES[name].model(net, attention="flex" if flex else "dense", fast=flex)
        loss = learner(**batch())["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append(
            torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    away = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert float(away) < 2e-2  # FlexAttention's products are TF32


def test_a_draft_head_learns_on_a_gpu() -> None:
    net = learnt()
    learner = EagleObjective(ttt_length=3, draft_vocab_size=30).model(net)
    assert isinstance(learner, EagleModel)
    learner.head.set_vocabulary(range(30))
    learner.head.init_weights(net, torch.Generator().manual_seed(0))
    learner.cuda()
    optimizer = torch.optim.AdamW(learner.head.parameters(), 3e-3)
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", torch.bfloat16):
            loss = learner(**batch())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
