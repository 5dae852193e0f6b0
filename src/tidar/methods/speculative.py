"""Speculative decoding: a smaller model drafts one token at a time, the model itself verifies all in one pass.

Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318. The rows of a step are the certain token
and the draft, causal; verification is TiDAR's (`tidar.methods.choices`), so what is emitted is exactly AR:
token for token where choices are compared (the drafter sees the same noise), in distribution with
rejection sampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from tidar.cache import KVCache
from tidar.layout import Schedule, clean_rows, dense
from tidar.methods import Draft, Pending, Project, Step, Verdict
from tidar.methods.choices import draft_cells, gather, verify
from tidar.model import Transformer
from tidar.sampling import SamplingParams, choose, probabilities


def causal(width: int) -> Tensor:
    """The rule for `width` clean rows in a line, bool `[width, width]`."""
    return _short_causal(width) if width <= SHORT else _causal(width)


def _causal(width: int) -> Tensor:
    rows = clean_rows(width)
    return dense(rows, rows)


SHORT = 64
"""Rows up to which a mask is kept: those of decode steps. A prompt's would be large."""

_short_causal = lru_cache(maxsize=SHORT)(_causal)


@dataclass(slots=True)
class Place:
    """Mutable: where a running sequence is kept. unseen: committed tokens that the draft model has not read."""

    slot: int
    unseen: tuple[int, ...] = ()


class DraftModel:
    """Mutable: the smaller network, and its keys and values of the running sequences.

    Invariant between steps: what is in the cache of a sequence and its `unseen` are its committed tokens.
    Its vocabulary may have more or fewer rows than the model's own (padding, a mask token); what both have
    is the same.
    """

    def __init__(self, network: Transformer, max_batch: int) -> None:
        weight = network.embed.weight
        self.network, self.device = network, weight.device
        self.limit, self.vocab = network.config.max_positions, network.config.vocab_size
        self.cache = KVCache(network.config, max_batch, device=weight.device, dtype=weight.dtype)
        self.places: dict[int, Place] = {}
        self.free = list(range(max_batch))

    def enter(self, request_id: int, tokens: tuple[int, ...]) -> int:
        """Takes in a sequence from its committed tokens; returns how many passes that took."""
        assert self.free, "more sequences than the draft model has places for"
        place = self.places[request_id] = Place(min(self.free), tokens)
        self.free.remove(place.slot)
        if len(tokens) >= self.limit:
            return 0  # too long for the draft model: the text is decoded without drafts
        self._read({place.slot: tokens})
        place.unseen = ()
        return 1

    def leave(self, request_id: int) -> None:
        place = self.places.pop(request_id, None)
        if place is not None:
            self.cache.release(place.slot)
            self.free.append(place.slot)

    def room(self, prefix_len: int) -> int:
        """Tokens it can draft behind so many committed ones and the certain one."""
        return self.limit - prefix_len

    def next_logits(self, tokens: dict[int, tuple[int, ...]]) -> dict[int, Tensor]:
        """Reads these tokens of sequences, by request id; logits `[1, vocab]` of what follows each."""
        slots = {self.places[request_id].slot: new for request_id, new in tokens.items()}
        hidden = self._read(slots)
        logits = self.network.logits(torch.stack([hidden[slot] for slot in slots]))
        return {request_id: logits[i : i + 1] for i, request_id in enumerate(tokens)}

    def settle(self, request_id: int, prefix_len: int, committed: tuple[int, ...]) -> None:
        """Of the tokens behind `prefix_len` these were committed; the others are taken back."""
        place = self.places[request_id]
        length = self.cache.lengths[place.slot]
        if length < prefix_len:  # nothing was drafted, so nothing was read
            place.unseen += committed
            return
        kept = min(length, prefix_len + len(committed))
        self.cache.lengths[place.slot] = (
            kept  # what lies behind is never visible, as after a rejection
        )
        place.unseen = committed[kept - prefix_len :]

    def _read(self, tokens: dict[int, tuple[int, ...]]) -> dict[int, Tensor]:
        """Runs new tokens of each slot; the last hidden state `[hidden_size]` of each.

        The pass covers all slots between the first and the last, as the cache wants neighbours; rows
        that are nobody's are never committed.
        """
        first, count = min(tokens), max(tokens) - min(tokens) + 1
        width = max(map(len, tokens.values()))
        ids = torch.zeros(count, width, dtype=torch.int64)
        for slot, new in tokens.items():
            ids[slot - first, : len(new)] = torch.tensor(new)
        lengths = torch.tensor(self.cache.lengths[first : first + count])
        positions = lengths.unsqueeze(1) + torch.arange(width)
        attend = self.cache.attend(first, count, causal(width))
        # A token that only the model's own vocabulary has cannot be read; any other stands in for it.
        ids = ids.clamp(max=self.vocab - 1)
        hidden = self.network(ids.to(self.device), positions.to(self.device), attend)
        for slot, new in tokens.items():
            self.cache.commit(slot, len(new))
        return {slot: hidden[slot - first, len(new) - 1] for slot, new in tokens.items()}


@dataclass(slots=True)
class Guess:
    """Mutable: a draft being written. wanted: its tokens in the end. probs: what each was drawn from."""

    pending: Pending
    wanted: int
    tokens: list[int] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)

    def take(self, logits: Tensor) -> None:
        """Writes the next token, from logits `[1, V]` for its position."""
        p = self.pending
        position = p.prefix_len + p.length + len(self.tokens)
        if not p.params.rejects:
            # The noise of (seed, position) is the verifier's own: a good draft is then often its choice.
            places = torch.tensor([position], device=logits.device)
            self.tokens.append(int(choose(logits, p.params, places)))
        elif p.params.draft == "argmax":
            self.tokens.append(int(logits.argmax()))
        else:
            probs = probabilities(logits, p.params)[0]
            self.tokens.append(p.draw(probs))
            self.probs.append(probs)

    def result(self) -> Pending:
        draft = self.pending.draft
        probs = torch.stack(self.probs) if self.probs else None
        return replace(
            self.pending, draft=Draft((*draft.tokens, *self.tokens), draft.certain, probs)
        )


class Speculative:
    """The method; `schedule.draft_len` is the certain token and the K that the draft model adds.

    vocab_size, mask_token_id: the model's own. What both can say is drafted, the mask token never.
    """

    def __init__(
        self, draft: DraftModel, *, vocab_size: int, mask_token_id: int | None = None
    ) -> None:
        self.draft, self.vocab_size, self.mask_token_id = draft, vocab_size, mask_token_id

    def check(self, params: SamplingParams, *, forced: bool) -> None:
        """See `Method`. Everything goes."""

    def release(self, request_id: int) -> None:
        """See `Method`."""
        self.draft.leave(request_id)

    def step(self, pending: Sequence[Pending], schedule: Schedule) -> Step:
        """See `Method`. Drafts first: as many tokens as fit, each a pass of the draft model over all sequences."""
        fresh = any(p.fresh for p in pending)
        if fresh:
            passes = sum(self.draft.enter(p.request_id, p.draft.tokens) for p in pending)
            ready = tuple(pending)
        else:
            ready, passes = self._draft(pending, schedule.draft_len - 1)
        width = max(p.length for p in ready)
        ids = torch.zeros(len(ready), width, dtype=torch.int64)
        for row, p in zip(ids, ready, strict=True):
            row[: p.length] = torch.tensor(p.draft.tokens)
        return Step(
            pending=ready,
            ids=ids,
            positions=torch.tensor([[p.prefix_len] for p in ready]) + torch.arange(width),
            visible=causal(width),
            rows=tuple(p.length for p in ready),
            prefill=fresh,
            draft_forwards=passes,
        )

    def _draft(self, pending: Sequence[Pending], wanted: int) -> tuple[tuple[Pending, ...], int]:
        guesses = {
            p.request_id: Guess(
                p,
                min(
                    wanted,
                    p.left - 1,  # the certain token's row gives one more
                    p.limit - p.prefix_len - 1,
                    self.draft.room(p.prefix_len),
                ),
            )
            for p in pending
        }
        new = {
            request_id: (*self.draft.places[request_id].unseen, *guess.pending.draft.tokens)
            for request_id, guess in guesses.items()
            if guess.wanted > 0
        }
        passes = 0
        while new:
            for request_id, logits in self.draft.next_logits(new).items():
                guesses[request_id].take(self._fit(logits))
            passes += 1
            new = {
                request_id: (guesses[request_id].tokens[-1],)
                for request_id in new
                if len(guesses[request_id].tokens) < guesses[request_id].wanted
            }
        return tuple(guess.result() for guess in guesses.values()), passes

    def _fit(self, logits: Tensor) -> Tensor:
        """The draft model's logits `[1, V]` over the model's own vocabulary, without its mask token."""
        missing = max(self.vocab_size - logits.shape[-1], 0)
        fit = torch.nn.functional.pad(logits[:, : self.vocab_size], (0, missing), value=-torch.inf)
        if self.mask_token_id is not None:
            fit[:, self.mask_token_id] = -torch.inf
        return fit

    def resolve(self, step: Step, hidden: Tensor, project: Project) -> list[Verdict]:
        """See `Method`."""
        cells = draft_cells(step.pending)
        outcomes = verify(step.pending, cells, project(gather(hidden, cells)))
        verdicts = []
        for p, (accepted, token) in zip(step.pending, outcomes, strict=True):
            self.draft.settle(p.request_id, p.prefix_len, p.draft.tokens[:accepted])
            verdicts.append(Verdict(accepted, Draft((token,))))
        return verdicts
