"""EAGLE-3: a head of one layer drafts from the model's own hidden states, the model verifies a chain or a tree.

Li et al., arXiv 2503.01840, section 3; SafeAILab/EAGLE, `eagle/model/cnets.py` (`topK_genrate`). A step's
rows are the certain token and the draft, each of which sees its ancestors. The pass that verifies also
gives the features of what it commits, so the head always reads true features behind committed tokens and
its own outputs behind drafts only. The tree is fixed (theirs is grown by confidence).

What is emitted is exactly AR: where choices are compared, token for token, since the model's choice is
what decides; with rejection sampling in distribution, by `tidar.sampling.reject_siblings`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tidar.cache import KVCache
from tidar.eagle_head import EagleHead
from tidar.layout import Schedule
from tidar.methods import Draft, Pending, Project, Step, Verdict
from tidar.methods.choices import Cell, decisions, draft_cells, gather, verify
from tidar.methods.speculative import causal
from tidar.methods.tree import Siblings, Tree, follow, follow_rejecting
from tidar.model import Transformer
from tidar.sampling import SamplingParams, probabilities, scores


@dataclass(slots=True)
class Place:
    """Mutable: where a running sequence is kept, and the pairs that the head has not read.

    features: `[pairs, hidden_size]`, fused, of the last committed positions. tokens: what follows each.
    """

    slot: int
    features: Tensor
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Pairs:
    """Rows of one sequence for one pass of the head: a feature, and the token behind it.

    features: `[rows, hidden_size]`. offsets: positions, counted from those that its cache holds.
    """

    tokens: tuple[int, ...]
    features: Tensor
    offsets: tuple[int, ...]


class DraftHead:
    """Mutable: the head, and its keys and values of the running sequences.

    Invariant between steps: what is in the cache of a sequence and its unread pairs are its committed
    positions, all with true features. Pairs of drafts are written behind them and never kept.
    """

    def __init__(self, head: EagleHead, target: Transformer, max_batch: int) -> None:
        weight = head.fc.weight
        self.head, self.embed, self.device = head, head.embedding(target), weight.device
        self.vocab_size = target.config.vocab_size
        self.mask_token_id = target.config.mask_token_id
        self.cache = KVCache(head.config, max_batch, device=weight.device, dtype=weight.dtype)
        self.places: dict[int, Place] = {}
        self.free = list(range(max_batch))

    def enter(self, request_id: int) -> None:
        assert self.free, "more sequences than the head has places for"
        nothing = self.head.fc.weight.new_empty(0, self.head.config.hidden_size)
        self.places[request_id] = place = Place(min(self.free), nothing)
        self.free.remove(place.slot)

    def leave(self, request_id: int) -> None:
        place = self.places.pop(request_id, None)
        if place is not None:
            self.cache.release(place.slot)
            self.free.append(place.slot)

    def learn(self, request_id: int, tapped: Tensor, tokens: tuple[int, ...]) -> None:
        """Takes in committed positions: what the model's taps gave `[n, 3 * hidden_size]`, and what follows each."""
        place = self.places[request_id]
        place.features = torch.cat((place.features, self.head.fuse(tapped)))
        place.tokens += tokens

    def read(self, request_ids: Sequence[int]) -> dict[int, Tensor]:
        """Reads the unread pairs of these sequences; the last output `[1, hidden_size]` of each."""
        rows = {}
        for request_id in request_ids:
            place = self.places[request_id]
            size = len(place.tokens)
            rows[request_id] = Pairs(place.tokens, place.features, tuple(range(size)))
        width = max(len(each.tokens) for each in rows.values())
        outputs = self.run(rows, causal(width))
        for request_id in request_ids:
            place = self.places[request_id]
            self.cache.commit(place.slot, len(place.tokens))
            place.features, place.tokens = place.features[:0], ()
        return {request_id: output[-1:] for request_id, output in outputs.items()}

    def run(self, rows: Mapping[int, Pairs], visible: Tensor) -> dict[int, Tensor]:
        """One pass over rows of sequences, by request id; outputs `[rows, hidden_size]` of each.

        visible: bool `[W, W]`, for the longest. The pass covers all slots between the first and the last,
        as the cache wants neighbours; rows that are nobody's come to nothing.
        """
        slots = {self.places[request_id].slot: each for request_id, each in rows.items()}
        first, count, width = min(slots), max(slots) - min(slots) + 1, visible.shape[-1]
        ids = torch.zeros(count, width, dtype=torch.int64)
        positions = torch.zeros(count, width, dtype=torch.int64)
        features = self.head.fc.weight.new_zeros(count, width, self.head.config.hidden_size)
        for slot, each in slots.items():
            own = len(each.tokens)
            ids[slot - first, :own] = torch.tensor(each.tokens)
            positions[slot - first, :own] = torch.tensor(each.offsets) + self.cache.lengths[slot]
            features[slot - first, :own] = each.features
        embedded = self.embed(ids.to(self.device))
        attend = self.cache.attend(first, count, visible)
        outputs = self.head(embedded, features, positions.to(self.device), attend)
        return {
            request_id: outputs[self.places[request_id].slot - first, : len(each.tokens)]
            for request_id, each in rows.items()
        }

    def logits(self, outputs: Tensor) -> Tensor:
        """`[N, hidden_size]` -> `[N, vocab_size]`, over the model's own tokens."""
        return self.head.logits(outputs, self.vocab_size, self.mask_token_id)


@dataclass(slots=True)
class Guess:
    """Mutable: a tree being written, up to `depth`.

    tokens: of the nodes that have one; where few tokens are possible some nodes stay empty. outputs: of
    the head, `[1, hidden_size]`, by node: what the children's rows read.
    """

    pending: Pending
    depth: int
    tokens: dict[int, int] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    siblings: dict[int, Siblings] = field(default_factory=dict)

    def take(self, node: int, depth: int, children: tuple[int, ...], logits: Tensor) -> None:
        """Writes the children of a node, from logits `[1, V]` for the position behind it."""
        params = self.pending.params
        probs, count = None, min(len(children), logits.shape[-1])
        if not params.rejects or params.draft == "argmax":
            # The noise of (seed, position) is the verifier's own: a good guess is then often its choice.
            places = torch.tensor([self.pending.prefix_len + depth + 1], device=logits.device)
            ranked = logits if params.rejects else scores(logits, params, places)
            best = ranked[0].topk(count)
            tokens = best.indices[best.values > -torch.inf].tolist()
        else:
            probs = probabilities(logits, params)[0]
            tokens = self._draw(probs, count)
        nodes = children[: len(tokens)]
        self.siblings[node] = Siblings(nodes, tuple(tokens), probs)
        self.tokens.update(zip(nodes, tokens, strict=True))

    def _draw(self, probs: Tensor, count: int) -> list[int]:
        """Up to `count` tokens, one by one without replacement."""
        rest, tokens = probs.clone(), list[int]()
        while len(tokens) < count and float(rest.sum()) > 0:
            tokens.append(self.pending.draw(rest / rest.sum()))
            rest[tokens[-1]] = 0.0
        return tokens

    def result(self, size: int) -> Pending:
        """What is verified: a token for each of the first `size` nodes. Empty ones hold any, and never pass."""
        (certain,) = self.pending.draft.tokens
        tokens = (certain, *(self.tokens.get(node, 0) for node in range(1, size)))
        return replace(self.pending, draft=Draft(tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class EagleStep(Step):
    """guesses: the tree of each sequence; none in a prefill."""

    guesses: tuple[Guess, ...]


class Eagle:
    """The method; the schedule is the certain token and as many as the tree is deep."""

    def __init__(self, draft: DraftHead, tree: Tree) -> None:
        self.draft, self.tree = draft, tree

    def check(self, params: SamplingParams, *, forced: bool) -> None:
        """See `Method`. Everything goes."""

    def release(self, request_id: int) -> None:
        """See `Method`."""
        self.draft.leave(request_id)

    def step(self, pending: Sequence[Pending], schedule: Schedule) -> EagleStep:
        """See `Method`. Drafts first: a pass of the head for each depth, over all sequences."""
        if any(p.fresh for p in pending):
            return self._prefill(pending)
        guesses, passes = self._draft(pending, min(schedule.draft_len - 1, self.tree.depth))
        sizes = [self.tree.size(guess.depth) for guess in guesses]
        width = max(sizes)
        ready = tuple(guess.result(size) for guess, size in zip(guesses, sizes, strict=True))
        ids = torch.zeros(len(ready), width, dtype=torch.int64)
        for row, p in zip(ids, ready, strict=True):
            row[: p.length] = torch.tensor(p.draft.tokens)
        offsets = torch.tensor(self.tree.depths[:width])
        return EagleStep(
            pending=ready,
            ids=ids,
            positions=torch.tensor([[p.prefix_len] for p in ready]) + offsets,
            visible=self.tree.visible[:width, :width],
            rows=tuple(sizes),
            draft_forwards=passes,
            taps=self.draft.head.taps,
            guesses=guesses,
        )

    def _prefill(self, pending: Sequence[Pending]) -> EagleStep:
        """The text goes in; the head reads it with the first draft."""
        for p in pending:
            self.draft.enter(p.request_id)
        width = max(p.length for p in pending)
        ids = torch.zeros(len(pending), width, dtype=torch.int64)
        for row, p in zip(ids, pending, strict=True):
            row[: p.length] = torch.tensor(p.draft.tokens)
        return EagleStep(
            pending=tuple(pending),
            ids=ids,
            positions=torch.tensor([[p.prefix_len] for p in pending]) + torch.arange(width),
            visible=causal(width),
            rows=tuple(p.length for p in pending),
            prefill=True,
            taps=self.draft.head.taps,
            guesses=(),
        )

    def _draft(self, pending: Sequence[Pending], wanted: int) -> tuple[tuple[Guess, ...], int]:
        """A tree for each sequence, and how many passes that took."""
        guesses = tuple(
            Guess(p, max(0, min(wanted, p.left - 1, p.limit - p.prefix_len - 1))) for p in pending
        )
        level, writing = 0, [guess for guess in guesses if guess.depth > 0]
        while writing:
            if level == 0:
                outputs = self.draft.read([guess.pending.request_id for guess in writing])
                for guess in writing:
                    guess.outputs[0] = outputs[guess.pending.request_id]
            else:
                self._run(writing, self.tree.internal(level))
            for guess in writing:
                self._take(guess, level)
            level += 1
            writing = [guess for guess in writing if guess.depth > level]
        return guesses, level

    def _run(self, writing: Sequence[Guess], nodes: list[int]) -> None:
        """The outputs of these nodes. Those of earlier levels run again: that costs less than keeping them apart."""
        depths = tuple(self.tree.depths[node] - 1 for node in nodes)
        rows = {
            guess.pending.request_id: Pairs(
                tuple(guess.tokens.get(node, 0) for node in nodes),
                torch.cat([guess.outputs[self.tree.parents[node]] for node in nodes]),
                depths,
            )
            for guess in writing
        }
        outputs = self.draft.run(rows, self.tree.visible[nodes][:, nodes])
        for guess in writing:
            mine = outputs[guess.pending.request_id]
            guess.outputs.update({node: mine[i : i + 1] for i, node in enumerate(nodes)})

    def _take(self, guess: Guess, level: int) -> None:
        """Writes the nodes behind those of one level."""
        parents = [
            node
            for node, depth in enumerate(self.tree.depths)
            if depth == level and self.tree.children[node] and (node == 0 or node in guess.tokens)
        ]
        if not parents:
            return
        logits = self.draft.logits(torch.cat([guess.outputs[node] for node in parents]))
        for i, node in enumerate(parents):
            guess.take(node, level, self.tree.children[node], logits[i : i + 1])

    def resolve(self, step: EagleStep, hidden: Tensor, project: Project) -> list[Verdict]:
        """See `Method`."""
        size = self.draft.head.config.hidden_size
        final, tapped = hidden[..., :size], hidden[..., size:]
        verdicts = []
        for index, (path, token) in enumerate(self._verify(step, final, project)):
            p = step.pending[index]
            follows = (*(p.draft.tokens[row] for row in path[1:]), token)
            self.draft.learn(p.request_id, tapped[index, list(path)], follows)
            tried = None if step.prefill else step.guesses[index].depth + 1
            verdicts.append(Verdict(len(path), Draft((token,)), tried=tried, rows=path))
        return verdicts

    def _verify(
        self, step: EagleStep, hidden: Tensor, project: Project
    ) -> list[tuple[tuple[int, ...], int]]:
        """For each sequence the rows that commit and which token the causal model chooses next."""
        if step.prefill:
            cells = draft_cells(step.pending)
            outcomes = verify(step.pending, cells, project(gather(hidden, cells)))
            return [(tuple(range(accepted)), token) for accepted, token in outcomes]
        cells = [
            Cell(index, node, p.prefix_len + self.tree.depths[node] + 1)
            for index, p in enumerate(step.pending)
            for node in range(p.length)
        ]
        logits = project(gather(hidden, cells))
        chosen = decisions(step.pending, cells, logits)
        results, start = [], 0
        for p, guess in zip(step.pending, step.guesses, strict=True):
            rows = slice(start, start + p.length)
            start += p.length
            if p.params.rejects and p.forced is None:
                target = probabilities(logits[rows], p.params)
                results.append(follow_rejecting(guess.siblings, target, p.draw))
            else:
                results.append(follow(guess.siblings, chosen[rows]))
        return results
