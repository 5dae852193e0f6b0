"""Texts sampled from a model itself, many at once: training text for those who own no corpus."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tidar.cache import KVCache
from tidar.model import Transformer

COMPACT_EVERY = 16
"""Steps between two removals of finished texts from the batch."""


@torch.inference_mode()
def sample_texts(
    model: Transformer,
    start: tuple[int, ...],
    *,
    eos_ids: frozenset[int],
    max_len: int,
    batch: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[list[int]]:
    """Endless texts drawn from the model after `start`, each without `start` and without its end-of-text.

    Plain ancestral sampling, a batch at a time; a text that reaches `max_len` tokens, `start` included,
    is cut there. Texts come in the order in which they end, so a consumer that stops early would favour
    short ones: whole batches are finished before the next begins.
    """
    weight = next(model.parameters())
    generator = torch.Generator(weight.device).manual_seed(seed)
    ends = torch.tensor(sorted(eos_ids), device=weight.device)
    while True:
        cache = KVCache(model.config, batch, device=weight.device, dtype=weight.dtype)
        cache.reserve(max_len)
        texts: list[list[int]] = [[] for _ in range(batch)]
        live = list(range(batch))
        done = torch.zeros(batch, dtype=torch.bool, device=weight.device)
        step = torch.tensor([start], device=weight.device).expand(batch, -1)
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
            token = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
            drawn.append(token)
            done[: len(live)] |= torch.isin(token[:, 0], ends)
            step = token
            full = cache.lengths[0] + 1 >= max_len
            if full or len(drawn) == COMPACT_EVERY:
                columns = torch.cat(drawn, dim=1).tolist()
                for index, row in zip(live, columns, strict=True):
                    texts[index] += row
                drawn = []
                keep = [] if full else (~done[: len(live)]).nonzero()[:, 0].tolist()
                _compact(cache, keep)
                live = [live[slot] for slot in keep]
                step = step[keep]
                done = torch.zeros(batch, dtype=torch.bool, device=weight.device)
        for text in texts:
            end = next((i for i, token in enumerate(text) if token in eos_ids), len(text))
            if end:
                yield text[:end]


def _compact(cache: KVCache, keep: list[int]) -> None:
    """Moves the kept slots to the front, in order; the others are free."""
    for target, source in enumerate(keep):
        if source != target:
            cache.move(source, target)
    for slot in range(len(keep), len(cache.lengths)):
        cache.release(slot)
