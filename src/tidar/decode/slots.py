"""The running sequences as tensors, and one decode step over them that never asks the host.

A step reads each sequence's draft from its slot, runs the rows, verifies, picks the span that carries
on, and leaves the next draft in the slot: the rule of `tidar.methods.tidar`, whole batches at a time and
with no value read back. So it can be captured in a CUDA graph; on a CPU it is ordinary PyTorch, and the
laws are tested there. Verification is by comparing choices (greedy, or shared noise); `tidar.decode.weighed`
has the step for batches in which some sequence needs more.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from tidar.decode.rejection import BY_HASH, Draws
from tidar.decode.rules import SlotRules
from tidar.layout import Schedule, Tail, build_tail, nearest_anchor
from tidar.paged_cache import PagedRows
from tidar.sampling import RowParams, mix

MEMORY_BOUND_ROWS = 160
"""Rows up to which a projection to the vocabulary costs about as much as one row's: a read of its weights."""

NOBODY = 0
"""The slot of no sequence: it fills up batches, and its pages are page 0."""


class Backend(Protocol):
    """What runs the network: plain PyTorch on any device, or fused kernels."""

    def forward(self, ids: Tensor, positions: Tensor, rows: PagedRows) -> Tensor:
        """Hidden states `[B, W, hidden_size]` of rows `[B, W]`, in the form that `choose` takes."""
        ...

    def choose(self, hidden: Tensor, params: RowParams, positions: Tensor) -> Tensor:
        """The choices `[N]` of rows `[N, hidden_size]` for the positions `[N]` they predict."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[N, V]` of rows `[N, hidden_size]` that the last `forward` made."""
        ...


class Slots:
    """Mutable device state of up to `count` running sequences; slot 0 is nobody's.

    prefix: committed tokens. drafts, lens: the draft awaiting verification, and its length L. left:
    tokens that may be emitted after d[0]. shift: how far the draft was shifted (for replays). rules: None
    until a request comes that does more than compare choices.
    """

    def __init__(
        self, count: int, max_draft_len: int, max_pages: int, device: torch.device
    ) -> None:
        size = count + 1
        self.prefix = torch.zeros(size, dtype=torch.int32, device=device)
        self.drafts = torch.zeros(size, max_draft_len, dtype=torch.int64, device=device)
        self.lens = torch.ones(size, dtype=torch.int64, device=device)
        self.left = torch.ones(size, dtype=torch.int64, device=device)
        self.shift = torch.zeros(size, dtype=torch.int64, device=device)
        self.seeds = torch.zeros(size, dtype=torch.int64, device=device)
        self.temperatures = torch.zeros(size, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(size, dtype=torch.int64, device=device)
        self.top_p = torch.ones(size, dtype=torch.float32, device=device)
        self.page_table = torch.zeros(size, max_pages, dtype=torch.int32, device=device)
        self.rules: SlotRules | None = None

    def params(self, slots: Tensor, rows: int, *, filtered: bool) -> RowParams:
        """Sampling parameters of `rows` rows for each of these slots, in that order."""

        def each(values: Tensor) -> Tensor:
            return values[slots].repeat_interleave(rows)

        top_k, top_p = (each(self.top_k), each(self.top_p)) if filtered else (None, None)
        return RowParams(each(self.temperatures), each(self.seeds), top_k, top_p)


@dataclass(frozen=True)
class StepShape:
    """A schedule as constants on a device: everything about a step that is the same for all drafts."""

    schedule: Schedule
    device: torch.device

    @cached_property
    def tail(self) -> Tail:
        """The rows of a step with a full draft, and a span wherever one may be asked for."""
        return build_tail(self.schedule.draft_rows, self.anchors, self.schedule.draft_len)

    @cached_property
    def anchors(self) -> tuple[int, ...]:
        """The span set, and {1} where a short draft has no other; none where steps have no spans."""
        lengths = range(1, self.schedule.draft_rows + 1)
        return tuple(sorted({a for n in lengths for a in self.schedule.anchors(n)}))

    @cached_property
    def attributes(self) -> Tensor:
        return self.tail.attributes.to(self.device)

    @cached_property
    def offsets(self) -> Tensor:
        return self.tail.offsets.to(self.device)

    @cached_property
    def predicts(self) -> Tensor:
        """`[W]`: the position that each row predicts, minus the prefix length."""
        clean = torch.arange(len(self.tail)) < self.tail.num_drafts
        return (self.tail.offsets + clean).to(self.device)

    @cached_property
    def choice_of_anchor(self) -> Tensor:
        """`[K + 1, K + 1]`: the anchor used after n of L tokens, at [L, n]; 0 for none."""
        size = self.schedule.draft_len
        table = torch.zeros(size + 1, size + 1, dtype=torch.int64)
        for length in range(1, self.schedule.draft_rows + 1):
            for accepted in range(1, length + 1):
                table[length, accepted] = nearest_anchor(self.schedule.anchors(length), accepted)
        return table.to(self.device)

    @cached_property
    def first_row(self) -> Tensor:
        """`[K + 1]`: the first row of the span with this anchor; 0 where there is none."""
        rows = torch.zeros(self.schedule.draft_len + 1, dtype=torch.int64)
        for anchor in self.anchors:
            rows[anchor] = self.tail.span_start(anchor)
        return rows.to(self.device)

    @cached_property
    def counting(self) -> Tensor:
        """0 .. K - 1."""
        return torch.arange(self.schedule.draft_len, device=self.device)


@dataclass(frozen=True, slots=True)
class Replay:
    """Acceptance that is made up: draft tokens of span row r pass with probability survival[r].

    For measuring speed at a given acceptance on weights that have none. survival: float32 `[K]` or more.
    """

    survival: Tensor
    seed: int = 0

    def passes(self, prefix: Tensor, shift: Tensor, seeds: Tensor, counting: Tensor) -> Tensor:
        """Whether draft tokens d[1..] pass, bool `[B, K - 1]`: a hash of seeds and position decides."""
        places = prefix.long().unsqueeze(1) + counting[1:]
        own = mix(seeds + self.seed).unsqueeze(1)
        noise = ((mix(places * 0x9E3779B1 + own) >> 40) & (2**24 - 1)).float() * 2.0**-24
        depth = (shift.unsqueeze(1) + counting[1:]).clamp(max=len(self.survival) - 1)
        return noise < self.survival[depth]


@dataclass(frozen=True, slots=True)
class Stepper:
    """One decode step over some slots.

    limit: positions of the model. filtered: whether any sequence uses top-k or top-p. all_rows: project
    every row at once; else the draft rows, then the chosen spans (one pass over the vocabulary's weights
    against two, of fewer rows); None decides by the number of rows. draws: where the chance of steps that
    look at probabilities comes from.
    """

    slots: Slots
    backend: Backend
    shape: StepShape
    mask_token_id: int
    limit: int
    filtered: bool = False
    all_rows: bool | None = None
    replay: Replay | None = None
    draws: Draws = BY_HASH

    def __call__(self, chosen: Tensor) -> Tensor:
        """Runs the step for the slots `chosen`, int64 `[B]`.

        Returns int64 `[B, 2 + K]`: L, n, and the n tokens that the step emits.
        """
        state, shape = self.slots, self.shape
        size, width, real = shape.schedule.draft_len, len(shape.tail), shape.tail.num_drafts
        prefix = state.prefix[chosen]
        lens = state.lens[chosen].clamp(max=real)
        drafts = state.drafts[chosen, :size]
        filled = shape.counting[:real] < lens.unsqueeze(1)
        ids = torch.full((len(chosen), width), self.mask_token_id, device=drafts.device)
        ids[:, :real] = torch.where(filled, drafts[:, :real], self.mask_token_id)
        positions = prefix.unsqueeze(1) + shape.offsets
        rows = PagedRows(state.page_table[chosen], prefix, shape.attributes, real)
        hidden = self.backend.forward(ids, positions.clamp(max=self.limit - 1), rows)
        verdicts, accepted = self._verify(hidden, chosen, prefix, drafts, lens)
        token = verdicts.gather(1, accepted.unsqueeze(1) - 1)
        emitted = torch.cat((drafts[:, 1:], token), dim=1)
        emitted = torch.where(shape.counting == accepted.unsqueeze(1) - 1, token, emitted)
        anchor = shape.choice_of_anchor[lens, accepted]
        shift = torch.where(anchor > 0, accepted - anchor, size - 1)
        left = state.left[chosen] - accepted
        later = self._draft(hidden, verdicts, chosen, prefix, anchor, shift)
        state.drafts[chosen, :size] = torch.cat((token, later), dim=1)
        state.lens[chosen] = torch.minimum(size - shift, left.clamp(min=1))
        state.left[chosen] = left
        state.shift[chosen] = shift
        # Nobody stays where it is: a growing prefix would make its rows ever dearer.
        state.prefix[chosen] = torch.where(chosen == NOBODY, 0, prefix + accepted.int())
        return torch.cat((lens.unsqueeze(1), accepted.unsqueeze(1), emitted), dim=1)

    def projects_all(self, batch: int) -> bool:
        """Whether a step over so many sequences projects all of its rows."""
        if not self.shape.anchors:
            return True  # there are no others
        if self.all_rows is None:
            return batch * len(self.shape.tail) <= MEMORY_BOUND_ROWS
        return self.all_rows

    def _verify(
        self, hidden: Tensor, chosen: Tensor, prefix: Tensor, drafts: Tensor, lens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Choices `[B, draft rows or W]` of the rows, and how many draft tokens commit, `[B]`.

        The choice of row n - 1 is the token that comes after n committed ones.
        """
        shape, real = self.shape, self.shape.tail.num_drafts
        wide = len(shape.tail) if self.projects_all(len(chosen)) else real
        verdicts = self._choose(hidden[:, :wide], chosen, prefix, shape.predicts[:wide])
        same = drafts[:, 1:real] == verdicts[:, : real - 1]
        counting = shape.counting[:real]
        if self.replay is not None:
            shift = self.slots.shift[chosen]
            same = self.replay.passes(prefix, shift, self.slots.seeds[chosen], counting)
        return verdicts, count_passed(same, counting[1:] < lens.unsqueeze(1))

    def _choose(self, hidden: Tensor, chosen: Tensor, prefix: Tensor, predicts: Tensor) -> Tensor:
        """Choices `[B, N]` of rows `[B, N, hidden_size]`, for positions `prefix + predicts`."""
        count = hidden.shape[1]
        params = self.slots.params(chosen, count, filtered=self.filtered)
        positions = (prefix.long().unsqueeze(1) + predicts).flatten()
        return self.backend.choose(hidden.flatten(0, 1), params, positions).view(-1, count)

    def _draft(
        self,
        hidden: Tensor,
        verdicts: Tensor,
        chosen: Tensor,
        prefix: Tensor,
        anchor: Tensor,
        shift: Tensor,
    ) -> Tensor:
        """The next d[1..], `[B, K - 1]`, from the later rows of each sequence's chosen span."""
        if self.shape.schedule.draft_len == 1:
            return verdicts[:, :0]
        rows, predicts = self._drafting_rows(anchor, shift)
        if self.projects_all(len(chosen)):
            return verdicts.gather(1, rows)
        return self._choose(gather_rows(hidden, rows), chosen, prefix, predicts)

    def _drafting_rows(self, anchor: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the step that draft d[1..], and the positions they predict, minus the prefix length.

        Both `[B, K - 1]`. Behind the span's end anything may stand: the draft is shorter than that.
        """
        shape = self.shape
        inner = (shift.unsqueeze(1) + shape.counting[1:]).clamp(max=shape.schedule.draft_len - 1)
        return shape.first_row[anchor].unsqueeze(1) + inner, anchor.unsqueeze(1) + inner


def count_passed(passed: Tensor, inside: Tensor) -> Tensor:
    """How many draft tokens commit, `[B]`, d[0] among them: up to the first that does not pass.

    passed, inside: bool `[B, K - 1]`, of d[1..]; inside: whether there is such a token.
    """
    return 1 + (passed & inside).long().cumprod(dim=1).sum(dim=1)


def gather_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """Rows `[B, N]` of hidden states `[B, W, hidden_size]`, `[B, N, hidden_size]`."""
    return hidden.gather(1, rows.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
