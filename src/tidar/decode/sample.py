"""Texts sampled from a model itself, many at once: training text for those who own no corpus."""

import torch
from torch import Tensor

from tidar.cache import KVCache
from tidar.model import Transformer

COMPACT_EVERY = 16
"""Steps between two removals of finished texts from the batch."""


@torch.inference_mode()
def sample_batch(
    model: Transformer,
    start: tuple[int, ...],
    *,
    count: int,
    eos_ids: frozenset[int],
    max_len: int,
    seed: int,
    temperature: float = 1.0,
) -> list[list[int]]:
    """`count` texts drawn from the model after `start`, each with `start` and without its end-of-text.

    Plain ancestral sampling of all texts side by side; a text of `max_len` tokens is cut there. The
    result is a function of the arguments alone.
    """
    weight = next(model.parameters())
    generator = torch.Generator(weight.device).manual_seed(seed)
    ends = torch.tensor(sorted(eos_ids), device=weight.device)
    cache = KVCache(model.config, count, device=weight.device, dtype=weight.dtype)
    cache.reserve(max_len)
    texts = [list(start) for _ in range(count)]
    live = list(range(count))
    done = torch.zeros(count, dtype=torch.bool, device=weight.device)
    step = torch.tensor([start], device=weight.device).expand(count, -1)
    drawn: list[Tensor] = []
    while live:
        length = cache.lengths[0]
        positions = torch.arange(length, length + step.shape[1], device=weight.device)
        causal = torch.ones(step.shape[1], step.shape[1], dtype=torch.bool).tril()
        attend = cache.attend(0, len(live), causal)
        hidden = model(step, positions.expand(step.shape), attend)
        for slot in range(len(live)):
            cache.commit(slot, step.shape[1])
        logits = model.logits(hidden[:, -1]).float() / temperature
        step = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
        drawn.append(step)
        done |= torch.isin(step[:, 0], ends)
        full = cache.lengths[0] + 1 >= max_len
        if not full and len(drawn) < COMPACT_EVERY and not bool(done.all()):
            continue
        for index, row in zip(live, torch.cat(drawn, dim=1).tolist(), strict=True):
            texts[index] += row
        drawn = []
        keep = [] if full else (~done).nonzero()[:, 0].tolist()
        for target, source in enumerate(keep):
            if source != target:
                cache.move(source, target)
        for slot in range(len(keep), len(live)):
            cache.release(slot)
        live = [live[slot] for slot in keep]
        step, done = step[keep], done[keep]
    return [_cut(text, len(start), eos_ids) for text in texts]


def _cut(text: list[int], begin: int, eos_ids: frozenset[int]) -> list[int]:
    """`text` up to its first end-of-text behind `begin`, without it."""
    end = next((i for i in range(begin, len(text)) if text[i] in eos_ids), len(text))
    return text[:end]
