"""Text sampled from a model itself, many streams at once: training text for those who own no corpus."""

import torch

from tidar.cache import KVCache
from tidar.model import Transformer


@torch.inference_mode()
def sample_streams(
    model: Transformer,
    start: tuple[int, ...],
    *,
    count: int,
    length: int,
    seed: int,
    temperature: float = 1.0,
) -> list[list[int]]:
    """`count` streams of exactly `length` tokens drawn from the model after `start`, which they include.

    Plain ancestral sampling, all streams side by side. A stream does not stop at an end-of-text token: what
    the model puts behind it is the next text, as in its own packed training data. So every stream fills
    one training sequence and none is cut. The result is a function of the arguments alone.
    """
    weight = next(model.parameters())
    generator = torch.Generator(weight.device).manual_seed(seed)
    cache = KVCache(model.config, count, device=weight.device, dtype=weight.dtype)
    cache.reserve(length)
    streams = torch.tensor([start], device=weight.device).expand(count, -1)
    step = streams
    while streams.shape[1] < length:
        done, width = cache.lengths[0], step.shape[1]
        positions = torch.arange(done, done + width, device=weight.device).expand(count, -1)
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        hidden = model(step, positions, cache.attend(0, count, causal))
        for slot in range(count):
            cache.commit(slot, width)
        logits = model.logits(hidden[:, -1]).float() / temperature
        step = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
        streams = torch.cat([streams, step], dim=1)
    return streams.tolist()
