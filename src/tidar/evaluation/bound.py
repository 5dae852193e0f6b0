"""How likely a diffusion method finds given continuations: a Monte Carlo bound, for no single pass says it.

Of a span of L tokens l are hidden, l uniform in 1..L and the places drawn without replacement; the log-probabilities
of the hidden ones, times L / l, are an unbiased estimate of a lower bound of the span's log-likelihood.

- Masked diffusion: the continuation is one span, and all rows see each other (LLaDA, arXiv 2502.09992, equation 6 and
  appendix B.5; `get_log_likelihood.py` of ML-GSAI/LLaDA, 128 samples).
- Block diffusion: the bounds of its spans add up, each given what stands before it (BD3-LM, arXiv 2503.09573,
  section 3.1). BD3-LM hides each token with chance t and divides by t; with t integrated out that is the same sum.

As in LLaDA's program the numbers of hidden tokens are spread evenly over the samples, from a start that is drawn. All
draws are a hash of (seed, text, sample, place), so the batch and the other texts change nothing.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from tidar.attention import dense_attend
from tidar.errors import TidarError
from tidar.evaluation.likelihood import LOGITS_AT_ONCE, Pair, Score, Work
from tidar.evaluation.readings import Reading, Sheet
from tidar.model import Transformer
from tidar.sampling import uniform

SAMPLES = 128
"""Of each text, as LLaDA takes."""

Hidden = tuple[bool, ...]
"""Which tokens of a continuation are hidden."""


@dataclass(slots=True)
class _Text:
    """Mutable: a context and its answers, which the same passes score: several where they are of one token.

    users: indices of the pairs that ask for it. sums, sure: so far, by answer.
    """

    context: tuple[int, ...]
    answers: list[tuple[int, ...]]
    sheet: Sheet
    users: list[int]
    sums: Tensor = field(init=False)
    sure: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(len(self.answers), dtype=torch.float64)
        self.sure = [True] * len(self.answers)

    def ids(self, hidden: Hidden, mask: int) -> list[int]:
        """Token ids of the rows."""
        whole = (*self.context, *self.answers[0])
        made = [whole[position] for position in self.sheet.positions.tolist()]
        for row, is_hidden in zip(self.sheet.holds, hidden, strict=True):
            if is_hidden:
                made[row] = mask
        return made


def draws(seed: int, text: Sequence[int], spans: Sequence[range], samples: int) -> Counter[Hidden]:
    """What the samples of a text hide, and how many of them hide the same.

    text: token ids, whose hash keeps texts apart. spans: ranges that cover the continuation, in order.
    """
    digest = hashlib.blake2b(repr(tuple(text)).encode(), digest_size=7).digest()
    key, number = int.from_bytes(digest), torch.arange(samples)
    start = uniform(seed, key, 0, torch.arange(len(spans))).double()
    noise = uniform(seed, key, 1, number.unsqueeze(1), torch.arange(spans[-1].stop))
    hidden = torch.zeros(noise.shape, dtype=torch.bool)
    for span, first in zip(spans, start, strict=True):
        share = (first + number / samples) % 1.0
        count = (1 + (share * len(span)).long()).clamp(max=len(span))
        rank = noise[:, span.start : span.stop].argsort(stable=True).argsort()
        hidden[:, span.start : span.stop] = rank < count.unsqueeze(1)
    return Counter(map(tuple, hidden.tolist()))


def weights(hidden: Hidden, spans: Iterable[range]) -> Tensor:
    """L / l of each hidden token's span, float64, in order of the hidden tokens."""
    made: list[float] = []
    for span in spans:
        count = sum(hidden[span.start : span.stop])
        made += [len(span) / max(count, 1)] * count
    return torch.tensor(made, dtype=torch.float64)


def score_bound(
    network: Transformer,
    reading: Reading,
    pairs: Sequence[Pair],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    batch: int = 8,
    greedy: bool = True,
    work: Work | None = None,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[Score]:
    """Bounds of continuations, `batch` rows a forward pass, in float64 sums.

    samples: of each text; those that hide the same share a pass, so one pass gives the exact value of a continuation
    of one token. greedy: also tell whether the method would write the continuation, one token a pass, the surest
    first; else that is False for longer ones. Texts that are too long lose their beginning. on_done: told how many
    pairs are settled. Raises TidarError for an empty context or continuation, for a continuation that leaves no
    position for a context, and for a network without a mask token.
    """
    work = work if work is not None else Work()
    mask, limit = network.config.mask_token_id, network.config.max_positions
    if mask is None or samples < 1:
        raise TidarError(f"a bound needs a mask token (here {mask}) and samples (here {samples}).")
    users: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not context or not 1 <= len(continuation) < limit:
            raise TidarError(
                f"text {index} has {len(context)} tokens of context and {len(continuation)} of continuation; it needs "
                f"at least 1 of each, and at most {limit - 1} of the second."
            )
        room = limit - len(continuation)
        work.truncated += len(context) > room
        asked = tuple(continuation) if len(continuation) > 1 else (mask,)
        users.setdefault((tuple(context[-room:]), asked), []).append(index)
    texts = []
    for (context, asked), members in users.items():
        answers = list(dict.fromkeys(tuple(pairs[i][1]) for i in members))
        sheet = reading.sheet(len(context), len(asked))
        texts.append(_Text(tuple(context), answers, sheet, members))
    texts.sort(key=lambda text: -len(text.sheet.positions))
    jobs = _jobs(texts, seed, samples)
    while some := list(islice(jobs, batch)):
        states = _forward(network, mask, [(job.text, job.hidden) for job in some], work)
        for job, state in zip(some, states, strict=True):
            _add(network, job, state)
            on_done(len(job.text.users) if job.is_last else 0)
    long = [text for text in texts if len(text.answers[0]) > 1]
    if greedy:
        _follow(network, mask, long, batch, work)
    else:
        for text in long:
            text.sure = [False]
    found: list[Score | None] = [None] * len(pairs)
    for text in texts:
        for i in text.users:
            place = text.answers.index(tuple(pairs[i][1]))
            found[i] = Score(float(text.sums[place]), text.sure[place])
    return [each for each in found if each is not None]


@dataclass(frozen=True, slots=True)
class _Job:
    """One row of a pass: a text with some tokens hidden, and the share of its samples that hide these."""

    text: _Text
    hidden: Hidden
    share: float
    is_last: bool


def _jobs(texts: Iterable[_Text], seed: int, samples: int) -> Iterator[_Job]:
    for text in texts:
        found = draws(seed, (*text.context, *text.answers[0]), text.sheet.spans, samples)
        for number, (hidden, count) in enumerate(found.items(), start=1):
            yield _Job(text, hidden, count / samples, number == len(found))


@torch.inference_mode()
def _forward(
    network: Transformer, mask: int, some: Sequence[tuple[_Text, Hidden]], work: Work
) -> Tensor:
    """Hidden states `[len(some), widest, hidden_size]`."""
    device = network.embed.weight.device
    sheets = [text.sheet for text, _ in some]
    sizes = [len(sheet.positions) for sheet in sheets]
    width = max(sizes)
    ids = torch.full((len(some), width), mask)
    positions = torch.zeros(len(some), width, dtype=torch.int64)
    for i, ((text, hidden), sheet, size) in enumerate(zip(some, sheets, sizes, strict=True)):
        ids[i, :size] = torch.tensor(text.ids(hidden, mask))
        positions[i, :size] = sheet.positions
    visible: Tensor | None = None
    if any(
        sheet is not sheets[0] for sheet in sheets
    ):  # rows behind a shorter text see themselves alone
        visible = torch.eye(width, dtype=torch.bool).repeat(len(some), 1, 1)
        for i, (sheet, size) in enumerate(zip(sheets, sizes, strict=True)):
            visible[i, :size, :size] = True if sheet.visible is None else sheet.visible
    elif sheets[0].visible is not None:
        visible = sheets[0].visible
    work.forwards += 1
    work.tokens += sum(sizes)
    attend = dense_attend(None if visible is None else visible.to(device))
    return network(ids.to(device), positions.to(device), attend)


@torch.inference_mode()
def _add(network: Transformer, job: _Job, state: Tensor) -> None:
    """Adds what a pass says of a text, from its hidden states `[N, hidden_size]`."""
    text, places = job.text, [i for i, is_hidden in enumerate(job.hidden) if is_hidden]
    rows = [text.sheet.predicts[i] for i in places]
    answers = torch.tensor([[answer[i] for answer in text.answers] for i in places])
    scale = job.share * weights(job.hidden, text.sheet.spans)
    step = max(1, LOGITS_AT_ONCE // network.config.vocab_size)
    for begin in range(0, len(rows), step):
        scores = network.logits(state[rows[begin : begin + step]]).float().log_softmax(-1)
        asked = answers[begin : begin + step]
        picked = scores.gather(1, asked.to(scores.device)).double().cpu()
        text.sums += scale[begin : begin + step] @ picked
        if len(job.hidden) == 1:
            text.sure = (scores.argmax(-1).cpu() == asked[0]).tolist()


def _follow(
    network: Transformer, mask: int, texts: Iterable[_Text], batch: int, work: Work
) -> None:
    """Tells of each text whether the method, one token a pass and the surest first, span by span, would write it."""
    under_way = [(text, [True] * len(text.answers[0])) for text in texts]
    while under_way:
        left = []
        for begin in range(0, len(under_way), batch):
            some = under_way[begin : begin + batch]
            states = _forward(network, mask, [(text, tuple(hidden)) for text, hidden in some], work)
            for (text, hidden), state in zip(some, states, strict=True):
                place, token = _surest(network, text, hidden, state)
                hidden[place] = False
                text.sure = [text.answers[0][place] == token]
                if text.sure[0] and any(hidden):
                    left.append((text, hidden))
        under_way = left


@torch.inference_mode()
def _surest(
    network: Transformer, text: _Text, hidden: Sequence[bool], state: Tensor
) -> tuple[int, int]:
    """Of the first span with hidden tokens, the place that the network is surest of, and its token there."""
    span = next(span for span in text.sheet.spans if any(hidden[i] for i in span))
    places = [i for i in span if hidden[i]]
    logits = network.logits(state[[text.sheet.predicts[i] for i in places]]).float()
    best = logits.softmax(-1).max(-1)
    row = int(best.values.argmax())
    return places[row], int(best.indices[row])
