"""Every decoding method on one small model, each in an engine of its own. Not a test itself."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from models import random_model
from scripted import method

from tidar.attention import dense_attend
from tidar.decode.engine import Engine, FixedPlan
from tidar.decode.request import FinishReason, Request, StepEvent
from tidar.eagle_head import EagleConfig, EagleHead
from tidar.layout import AUTOREGRESSIVE, Schedule, dense_schedule, two_forward
from tidar.methods import Method
from tidar.methods.block_diffusion import BlockDiffusion
from tidar.methods.eagle import DraftHead, Eagle
from tidar.methods.masked_diffusion import MaskedDiffusion
from tidar.methods.speculative import DraftModel, Speculative
from tidar.methods.tree import Tree, chain, spread
from tidar.model import Transformer

FAMILY = "llama"


def target(limit: int = 96) -> Transformer:
    return random_model(FAMILY, limit=limit)


@cache
def near_copy(limit: int = 96, noise: float = 0.02) -> Transformer:
    """The target with weights that are a little off: its guesses are often, not always, right."""
    model = copy.deepcopy(target(limit))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return model


def speculative(model: Transformer, draft: Transformer, max_batch: int) -> Speculative:
    config = model.config
    return Speculative(
        DraftModel(draft, max_batch),
        vocab_size=config.vocab_size,
        mask_token_id=config.mask_token_id,
    )


def random_head(
    model: Transformer, draft_vocab: Sequence[int], *, seed: int = 0, width: float = 0.25
) -> EagleHead:
    """A head of random weights that drafts these tokens. It is in evaluation mode."""
    head = EagleHead(EagleConfig.for_model(model.config, len(draft_vocab)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.normal_(0.0, width, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    head.set_vocabulary(draft_vocab)
    return head.to(model.embed.weight).eval()


@cache
def fitted_head(limit: int = 96) -> EagleHead:
    """A head whose first guesses are often, not always, the target's choices: fitted to texts of it."""
    model = target(limit)
    head = random_head(model, range(model.config.vocab_size - 3), width=0.05)
    size = 24
    prompts = torch.randint(0, 36, (96, 2), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(size).expand(len(prompts), -1)
    ids, causal = prompts, dense_attend(is_causal=True)
    with torch.no_grad():
        while ids.shape[1] < size + 1:
            hidden = model(ids, positions[:, : ids.shape[1]], causal)
            ids = torch.cat((ids, model.logits(hidden[:, -1:]).argmax(-1)), dim=1)
        _, tapped = model.forward_with_taps(ids[:, :size], positions, causal, head.taps)
        labels = ids[:, 2:].clamp(max=head.draft_vocab_size - 1)
        embedded = model.embed(ids[:, 1:])
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(120):
        output = head(embedded, head.fuse(torch.cat(tapped, dim=-1)), positions, causal)
        logits = head.draft_logits(output[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.requires_grad_(False).eval()


def eagle(model: Transformer, head: EagleHead, tree: Tree, max_batch: int) -> Engine:
    method = Eagle(DraftHead(head, model, max_batch), tree)
    return Engine(model, method, FixedPlan(Schedule(tree.depth + 1, ())), max_batch=max_batch)


def _eagle(head: Callable[[int], EagleHead], tree: Tree) -> "Make":
    return lambda model, size: eagle(model, head(model.config.max_positions), tree, size)


Make = Callable[[Transformer, int], Engine]


def _tidar(schedule: Schedule) -> Make:
    return lambda model, size: Engine(model, method(model), FixedPlan(schedule), max_batch=size)


def _speculative(draft: Callable[[int], Transformer], count: int) -> Make:
    def make(model: Transformer, size: int) -> Engine:
        chosen = speculative(model, draft(model.config.max_positions), size)
        return Engine(model, chosen, FixedPlan(Schedule(count + 1, ())), max_batch=size)

    return make


EXACT: dict[str, Make] = {
    "ar": _tidar(AUTOREGRESSIVE),
    "tidar": _tidar(dense_schedule(4)),
    "tidar, few spans": _tidar(Schedule(5, (2,))),
    "two-forward": _tidar(two_forward(4)),
    "speculative, a near copy": _speculative(near_copy, 4),
    "speculative, itself": _speculative(target, 3),
    "speculative, a stranger": _speculative(
        lambda limit: random_model("qwen3", seed=5, layers=1, limit=limit), 2
    ),
    "speculative, fewer positions": _speculative(lambda limit: near_copy(16), 4),
    "speculative, fewer tokens": _speculative(
        lambda limit: random_model("qwen2", vocab=30, limit=limit), 3
    ),
    "speculative, more tokens": _speculative(
        lambda limit: random_model("qwen2", vocab=50, limit=limit), 3
    ),
    "eagle, a chain": _eagle(fitted_head, chain(4)),
    "eagle, a tree": _eagle(fitted_head, spread(4)),
    "eagle, a stranger of few tokens": _eagle(
        lambda limit: random_head(target(limit), (1, 5, 30)), spread(5)
    ),
}
"""Methods whose text is AR's."""


def _method(make_method: Callable[[int], Method[Any]], size: int) -> Make:
    def make(model: Transformer, max_batch: int) -> Engine:
        mask = model.config.mask_token_id
        assert mask is not None
        plan = FixedPlan(Schedule(size, (1,)))
        return Engine(model, make_method(mask), plan, max_batch=max_batch)

    return make


OTHERS: dict[str, Make] = {
    "block-diffusion": _method(lambda mask: BlockDiffusion(mask, 0.2), 4),
    "block-diffusion, one a pass": _method(lambda mask: BlockDiffusion(mask, 1.0), 5),
    "block-diffusion, all at once": _method(lambda mask: BlockDiffusion(mask, 0.0), 3),
    "block-diffusion, full": _method(lambda mask: BlockDiffusion(mask, 0.2, "full"), 4),
    "masked-diffusion": _method(lambda mask: MaskedDiffusion(mask, 3), 8),
    "masked-diffusion, random": _method(lambda mask: MaskedDiffusion(mask, 2, "random"), 5),
    "masked-diffusion, origin": _method(lambda mask: MaskedDiffusion(mask, 4, "origin"), 8),
    "masked-diffusion, one span": _method(
        lambda mask: MaskedDiffusion(mask, 6, "entropy", shift=True), 500
    ),
    "masked-diffusion, margin": _method(lambda mask: MaskedDiffusion(mask, 5, "topk_margin"), 6),
    "masked-diffusion, maskgit": _method(lambda mask: MaskedDiffusion(mask, 1, "maskgit_plus"), 4),
}
"""Methods whose text is another model's."""

ALL = {**EXACT, **OTHERS}


@dataclass
class Told:
    """All that was told of one request."""

    ids: list[int] = field(default_factory=list)
    steps: list[StepEvent] = field(default_factory=list)
    finish: FinishReason | None = None


def decode(
    engine: Engine, requests: Sequence[Request], after: Callable[[], None] | None = None
) -> list[Told]:
    """Runs all requests to their end; `after` is called after each event."""
    told: dict[int, Told] = {}
    for event in engine.run(requests):
        mine = told.setdefault(event.request_id, Told())
        assert mine.finish is None, "an event after the last one"
        mine.ids += event.ids
        mine.finish = event.finish
        assert event.rows >= 1
        assert event.draft_forwards >= 0
        if not event.prefill:
            assert 0 <= event.accepted <= event.drafted
            mine.steps.append(event)
        if after is not None:
            after()
    assert all(each.finish is not None for each in told.values())
    assert not engine.running
    assert set(engine.cache.lengths) == {0}
    return [told[request_id] for request_id in sorted(told)]
