"""How likely the causal model finds given continuations: one plain forward pass, no cache, no mask rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.attention import dense_attend
from tidar.errors import TidarError
from tidar.model import Transformer

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context (at least one) and of what continues it (at least one)."""

LOGITS_AT_ONCE = 1 << 26
"""Numbers in one tensor of logits, at most: 256 MiB in float32."""


@dataclass(frozen=True, slots=True)
class Score:
    """logprob: natural logarithm of the continuation's probability. greedy: each token is the arg-max."""

    logprob: float
    greedy: bool


@dataclass(slots=True)
class Work:
    """Mutable: what scoring took. tokens: those the network read, padding left out."""

    forwards: int = 0
    tokens: int = 0
    truncated: int = 0


def score(
    network: Transformer,
    pairs: Sequence[Pair],
    *,
    batch: int = 8,
    work: Work | None = None,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[Score]:
    """Scores continuations under the causal reading, `batch` texts a forward pass, texts of like length together.

    Texts that are too long lose their beginning. Pairs whose network input is the same (the choices of a question
    with answers of one token) share a row. The mask token has no probability in any reading (DESIGN: -inf).
    on_done: told how many pairs each forward pass has settled. Raises TidarError for an empty context or
    continuation, and for a continuation that is longer than the model's positions.
    """
    work = work if work is not None else Work()
    limit = network.config.max_positions
    users: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not context or not 1 <= len(continuation) <= limit:
            raise TidarError(
                f"text {index} has {len(context)} tokens of context and {len(continuation)} of continuation; it needs "
                f"at least 1 of each, and at most the model's {limit} of the second."
            )
        whole = (*context, *continuation)
        work.truncated += len(whole) > limit + 1
        users.setdefault(whole[-(limit + 1) :][:-1], []).append(index)
    found: list[Score | None] = [None] * len(pairs)
    texts = sorted(users, key=len, reverse=True)
    for start in range(0, len(texts), batch):
        rows = texts[start : start + batch]
        hidden = _forward(network, rows)
        done = 0
        for index, row in enumerate(rows):
            asked = [pairs[i][1] for i in users[row]]
            behind = hidden[index, len(row) - max(map(len, asked)) : len(row)]
            for i, scored in zip(users[row], _read(network, behind, asked), strict=True):
                found[i] = scored
            done += len(asked)
        work.forwards += 1
        work.tokens += sum(map(len, rows))
        on_done(done)
    return [each for each in found if each is not None]


@torch.inference_mode()
def _forward(network: Transformer, rows: Sequence[tuple[int, ...]]) -> Tensor:
    """Hidden states `[len(rows), longest, hidden_size]` of the texts under plain causal attention."""
    device, width = network.embed.weight.device, max(map(len, rows))
    # Padding stands behind the texts, where no causal row of theirs sees it.
    ids = torch.tensor([(*row, *([row[0]] * (width - len(row)))) for row in rows], device=device)
    positions = torch.arange(width, device=device).expand(len(rows), width)
    return network(ids, positions, dense_attend(is_causal=True))


@torch.inference_mode()
def _read(network: Transformer, hidden: Tensor, asked: Sequence[Sequence[int]]) -> list[Score]:
    """Scores of continuations that all end with the token behind the last of `hidden`, `[N, hidden_size]`."""
    count, step = len(hidden), max(1, LOGITS_AT_ONCE // network.config.vocab_size)
    sums, greedy = [0.0] * len(asked), [True] * len(asked)
    for start in range(0, count, step):
        scores = network.logits(hidden[start : start + step]).float().log_softmax(-1)
        best, end = scores.argmax(-1), start + len(scores)
        for i, tokens in enumerate(asked):
            first = count - len(tokens)  # the place that predicts its first token
            begin = max(start, first)
            if begin < end:
                here = torch.tensor(list(tokens[begin - first : end - first]), device=scores.device)
                picked = scores[begin - start :].gather(1, here[:, None])
                # In float64, so that the order of summation does not matter.
                sums[i] += float(picked.double().sum())
                greedy[i] &= bool((best[begin - start :] == here).all())
    return [Score(*each) for each in zip(sums, greedy, strict=True)]
