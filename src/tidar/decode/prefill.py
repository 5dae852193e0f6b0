"""Prefill chunks of one sequence: prompt rows, and with the last chunk the span that drafts first.

All that a chunk needs goes to the device as one buffer of integers. On a GPU the chunk is filled up to a
power of two and run as a captured graph, as launching a short prompt kernel by kernel would take longer
than running it. Rows that fill up stand behind the real ones: no real row sees them, and what they store
lies beyond the prefix.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tidar.decode.graphs import capture
from tidar.decode.rules import COMPARING, Rule
from tidar.decode.slots import Slots, Stepper
from tidar.decode.weighed import first_draft, weighed
from tidar.layout import CLEAN, Schedule
from tidar.paged_cache import PagedRows

SMALLEST = 16
"""Rows of the smallest captured chunk."""


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """Rows of a chunk: `clean` prompt rows, then `masks` rows of a span; `choices` tokens are chosen."""

    clean: int
    masks: int
    choices: int

    @property
    def width(self) -> int:
        return self.clean + self.masks


@dataclass(frozen=True, slots=True)
class Entry:
    """What a chunk does to its slot. left: tokens that may be emitted after the first one, d[0]."""

    slot: int
    start: int
    end: int
    left: int


class Prefill:
    """Mutable: the chunk graphs captured so far. capturing: seconds that captures have taken."""

    def __init__(self, stepper: Stepper, *, graphs: bool, most: int) -> None:
        self.stepper, self.graphs, self.most = stepper, graphs, most
        self._captured: dict[ChunkShape, tuple[torch.cuda.CUDAGraph, Tensor, Tensor | None]] = {}
        self._pool: Any = None  # the handle of a graph memory pool
        self.capturing = 0.0

    def __call__(
        self,
        tokens: Sequence[int],
        entry: Entry,
        schedule: Schedule | None,
        *,
        filtered: bool,
        rule: Rule = COMPARING,
    ) -> Tensor | None:
        """Runs the tokens of a chunk, which stand at `entry.start ..`.

        schedule: with the last chunk, how drafting begins. The slot then holds the first draft, and the
        result is d[0], `[1]` on the device. filtered: whether the request uses top-k or top-p. rule: how it
        verifies.
        """
        masks = schedule.draft_len if schedule is not None and schedule.drafts else 0
        choices = 0 if schedule is None else max(1, masks)
        if not self.graphs or filtered or rule != COMPARING:
            shape = ChunkShape(len(tokens), masks, choices)
            buffer = self._pack(shape, tokens, entry).to(self._device)
            return self._run(shape, buffer, filtered, rule)
        clean = min(max(SMALLEST, 1 << (len(tokens) - 1).bit_length()), max(self.most, len(tokens)))
        shape = ChunkShape(clean, masks, choices)
        if shape not in self._captured:
            began = time.perf_counter()
            self._captured[shape] = self._capture(shape)
            self.capturing += time.perf_counter() - began
        graph, buffer, first = self._captured[shape]
        buffer.copy_(self._pack(shape, tokens, entry).pin_memory(), non_blocking=True)
        graph.replay()
        return first

    @property
    def _slots(self) -> Slots:
        return self.stepper.slots

    @property
    def _device(self) -> torch.device:
        return self._slots.prefix.device

    def _pack(self, shape: ChunkShape, tokens: Sequence[int], entry: Entry) -> Tensor:
        """Ids, positions, the rows' attributes, rows to choose from, places they predict, the slot's news."""
        size, width, limit = len(tokens), shape.width, self.stepper.limit
        offsets = torch.cat((torch.arange(shape.clean), size + torch.arange(shape.masks)))
        ids = torch.full((width,), self.stepper.mask_token_id)
        ids[:size] = torch.tensor(tokens)
        span = torch.full((width,), CLEAN)
        span[shape.clean :] = 0
        anchor = offsets + 1
        anchor[shape.clean :] = size
        # The last prompt row chooses d[0]; row 0 of the span would only choose it once more.
        later = torch.arange(max(shape.choices - 1, 0))
        pick = torch.cat((torch.tensor([size - 1]), shape.clean + 1 + later))[: shape.choices]
        places = entry.end + torch.arange(shape.choices)
        length = min(shape.choices, max(entry.left, 1))
        news = torch.tensor([entry.slot, entry.start, entry.end, length, entry.left])
        positions = (entry.start + offsets).clamp(max=limit - 1)
        return torch.cat((ids, positions, offsets, span, anchor, pick, places, news))

    @torch.inference_mode()
    def _run(
        self, shape: ChunkShape, buffer: Tensor, filtered: bool = False, rule: Rule = COMPARING
    ) -> Tensor | None:
        """The chunk as tensor arithmetic; asks nothing of the host."""
        state, backend, width = self._slots, self.stepper.backend, shape.width
        sizes = [width, width, 3 * width, shape.choices, shape.choices, 1, 1, 1, 1, 1]
        ids, positions, rows, pick, places, slot, start, end, length, left = buffer.split(sizes)
        attributes = rows.view(3, width).int()
        paged = PagedRows(state.page_table[slot], start.int(), attributes, shape.clean)
        hidden = backend.forward(ids.view(1, -1), positions.view(1, -1), paged)
        if not shape.choices:
            return None
        if rule == COMPARING:
            params = state.params(slot, shape.choices, filtered=filtered)
            draft = backend.choose(hidden[0, pick], params, places)
        else:
            step = weighed(replace(self.stepper, filtered=filtered), rule)
            span = hidden[:, shape.clean : shape.clean + 1] if shape.masks else None
            draft = first_draft(step, hidden[:, pick], span, slot, places)
        state.drafts[slot, : shape.choices] = draft
        state.prefix[slot] = end.int()
        state.lens[slot] = length
        state.left[slot] = left
        state.shift[slot] = torch.zeros_like(left)
        return draft[:1]

    @torch.inference_mode()
    def _capture(self, shape: ChunkShape) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor | None]:
        """Nobody's slot serves for the runs that compile kernels: what they write is never read."""
        nobody = Entry(slot=0, start=0, end=0, left=1)
        buffer = self._pack(shape, [0] * shape.clean, nobody).to(self._device)
        what = f"a prefill chunk of {shape.width} rows"
        graph, first = capture(lambda: self._run(shape, buffer), self._pool, what)
        self._pool = graph.pool()
        return graph, buffer, first
