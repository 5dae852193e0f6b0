"""Law 7 for block and masked diffusion: a pass of decoding reads what a pass of training reads."""

from dataclasses import dataclass, field

import pytest
import torch
from contenders import decode
from models import assert_equal, make_engine, random_model, random_prompt
from torch import Tensor

from tidar.attention import dense_attend
from tidar.decode.request import Request
from tidar.layout import Rows, Schedule, dense
from tidar.methods import Project, Verdict
from tidar.methods.block_diffusion import BlockDiffusion, SpanStep
from tidar.methods.masked_diffusion import MaskedDiffusion, WholeStep
from tidar.model import SpanAttention, Transformer
from tidar.sampling import SamplingParams
from tidar.training.objectives.block_diffusion import noised_rows
from tidar.training.objectives.masked_diffusion import whole_rows


@dataclass(frozen=True)
class SpanPasses(BlockDiffusion):
    """Keeps each pass over a span: seed of the request, anchor, token ids of its rows, their hidden states."""

    passes: list[tuple[int, int, tuple[int, ...], Tensor]] = field(default_factory=list)

    def resolve(self, step: SpanStep, hidden: Tensor, project: Project) -> list[Verdict]:
        for index, (p, span, clean) in enumerate(
            zip(step.pending, step.spans, step.clean, strict=True)
        ):
            if span is not None:
                rows = hidden[index, clean : clean + len(span.tokens)]
                anchor = p.prefix_len + clean
                self.passes.append((p.params.seed, anchor, span.tokens, rows))
        return super().resolve(step, hidden, project)


@dataclass(frozen=True)
class WholePasses(MaskedDiffusion):
    """Keeps the token ids and the hidden states of each pass over a text."""

    passes: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def resolve(self, step: WholeStep, hidden: Tensor, project: Project) -> list[Verdict]:
        for index, count in enumerate(step.rows):
            self.passes.append((step.ids[index, :count], hidden[index, :count]))
        return super().resolve(step, hidden, project)


def run(
    model: Transformer, method: object, size: int, lengths: tuple[int, ...]
) -> dict[int, list[int]]:
    """Decodes random prompts of these lengths side by side; prompt and text by the length."""
    requests = [
        Request(
            prompt=random_prompt(model, length, length),
            max_new_tokens=13,
            params=SamplingParams(temperature=1.0, seed=length),
        )
        for length in lengths
    ]
    told = decode(make_engine(model, method, Schedule(size, (1,)), max_batch=3), requests)  # type: ignore[arg-type]
    return {
        request.params.seed: [*request.prompt, *text.ids]
        for request, text in zip(requests, told, strict=True)
    }


@torch.inference_mode()
def hidden_of(model: Transformer, ids: list[int], rows: Rows) -> Tensor:
    return model(torch.tensor([ids]), rows.position, dense_attend(dense(rows, rows)))[0]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("attention", ["causal", "full"])
@pytest.mark.parametrize("size", [3, 8])
def test_spans_of_block_diffusion(family: str, attention: SpanAttention, size: int) -> None:
    """Every pass over every span, half-settled ones too, from the rows of training: packed, noised around it."""
    model = random_model(family)
    mask = model.config.mask_token_id
    assert mask is not None
    recorder = SpanPasses(mask, 0.06, attention)
    texts = run(model, recorder, size, (1, 5, 8, 14))
    half_settled = 0
    for seed, anchor, span, hidden in recorder.passes:
        half_settled += mask in span and len(set(span)) > 1
        length = anchor + len(span) + 2
        # Clean tokens at and behind the anchor, and noise outside of the span, must not matter.
        clean = [*texts[seed][:anchor], *random_prompt(model, length - anchor, anchor)]
        noised = [mask if place % 3 else 1 for place in range(length)]
        noised[anchor : anchor + len(span)] = span
        before, after = list(random_prompt(model, 3, 1)), list(random_prompt(model, 4, 2))
        document = torch.tensor([[0] * 3 + [1] * length + [2] * 4])
        offset = torch.tensor([anchor % size])
        assert attention == "causal" or offset == 0
        rows = noised_rows(document, torch.tensor([size]), offset, attention)
        ids = [*before, *clean, *after, *[mask] * 3, *noised, *[mask] * 4]
        first = length + 7 + 3 + anchor
        assert_equal(hidden, hidden_of(model, ids, rows)[first : first + len(span)])
    assert len(recorder.passes) > 20
    assert half_settled > 5


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_texts_of_masked_diffusion(family: str) -> None:
    """Every row of every pass, from a document packed between two others."""
    model = random_model(family)
    mask = model.config.mask_token_id
    assert mask is not None
    recorder = WholePasses(mask, 3)
    run(model, recorder, 6, (1, 5, 8, 14))
    for ids, hidden in recorder.passes:
        before, after = random_prompt(model, 3, 1), random_prompt(model, 4, 2)
        rows, _ = whole_rows(torch.tensor([[0] * 3 + [1] * len(ids) + [2] * 4]))
        packed = hidden_of(model, [*before, *ids.tolist(), *after], rows)
        assert_equal(hidden, packed[3 : 3 + len(ids)])
    assert len(recorder.passes) == 4 * (2 * 3 + 1)
