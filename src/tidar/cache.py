"""The KV cache of the plain PyTorch decoder: one contiguous row of key and value slots per sequence.

Invariant: the first `length` entries of a sequence are the keys and values of its committed tokens, in
order. A step writes its rows behind them and `commit` moves the length over those that stay: draft rows
come first in a tail, so committing n of them copies nothing, and what lies beyond the length is never
visible. Only the accepted path of a tree of drafts has gaps, which `commit_rows` closes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tidar.attention import Attend, attention
from tidar.model import ModelConfig


class KVCache:
    """Mutable. Sequences live in slots `0..num_slots-1`; a step runs over a range of neighbouring slots."""

    def __init__(
        self, config: ModelConfig, num_slots: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.lengths = [0] * num_slots
        self.capacity = 0
        self._shape = (num_slots, config.num_kv_heads, config.head_dim)
        self._device = device
        empty = torch.empty(num_slots, config.num_kv_heads, 0, config.head_dim, dtype=dtype)
        self.keys = [empty.to(device) for _ in range(config.num_layers)]
        self.values = [empty.to(device) for _ in range(config.num_layers)]

    def reserve(self, capacity: int) -> None:
        """Makes room for `capacity` entries per slot, keeping what is there; grows by half at least."""
        if capacity <= self.capacity:
            return
        grown = max(capacity, self.capacity * 3 // 2)
        for stored in (self.keys, self.values):
            for layer, old in enumerate(stored):
                # Zeros, not empty: a masked entry still multiplies by 0, and 0 * NaN would be NaN.
                new = old.new_zeros(old.shape[0], old.shape[1], grown, old.shape[3])
                new[:, :, : self.capacity] = old
                stored[layer] = new
        self.capacity = grown

    def attend(self, first: int, count: int, visible: Tensor) -> Attend:
        """The attend closure of one step over slots `first .. first + count - 1`.

        visible: bool `[W, W]` or `[count, W, W]`, what each tail row sees of the tail; each also sees
        its sequence's whole prefix. The closure writes the step's keys and values behind the prefix.
        """
        width = visible.shape[-1]
        lengths = self.lengths[first : first + count]
        self.reserve(max(lengths) + width)
        if len(set(lengths)) == 1:
            return self._attend_even(first, count, lengths[0], visible)
        return self._attend_ragged(first, count, lengths, visible)

    def _attend_even(self, first: int, count: int, length: int, visible: Tensor) -> Attend:
        """All prefixes equally long (one sequence above all): slices, no index arithmetic."""
        width = visible.shape[-1]
        last, end = first + count, length + width
        mask = None
        if width > 1:
            prefix = visible.new_ones(*visible.shape[:-1], length)
            mask = torch.cat([prefix, visible], dim=-1).to(self._device)
            mask = mask if mask.dim() == 2 else mask.unsqueeze(1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[first:last, :, length:end] = k
            values[first:last, :, length:end] = v
            return attention(q, keys[first:last, :, :end], values[first:last, :, :end], mask)

        return attend

    def _attend_ragged(self, first: int, count: int, lengths: list[int], visible: Tensor) -> Attend:
        width = visible.shape[-1]
        last, end = first + count, max(lengths) + width
        start = torch.tensor(lengths, device=self._device)
        slots = torch.arange(first, last, device=self._device).unsqueeze(1)
        places = start.unsqueeze(1) + torch.arange(width, device=self._device)
        # Column c of sequence b is prefix where c < start, tail row c - start next, stale behind that.
        relative = torch.arange(end, device=self._device) - start.unsqueeze(1)
        in_tail = ((relative >= 0) & (relative < width)).unsqueeze(1)
        tail = visible.to(self._device).expand(count, width, width)
        columns = relative.clamp(0, width - 1).unsqueeze(1).expand(count, width, end)
        mask = (relative < 0).unsqueeze(1) | (in_tail & tail.gather(2, columns))
        mask = mask.unsqueeze(1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[slots, :, places] = k.transpose(1, 2)
            values[slots, :, places] = v.transpose(1, 2)
            return attention(q, keys[first:last, :, :end], values[first:last, :, :end], mask)

        return attend

    def commit(self, slot: int, count: int) -> None:
        """Keeps the first `count` rows of the last step in `slot`; its other rows are gone."""
        self.lengths[slot] += count

    def commit_rows(self, slot: int, rows: Sequence[int]) -> None:
        """Keeps these rows of the last step, rising, and moves them together; its other rows are gone."""
        start, count = self.lengths[slot], len(rows)
        if list(rows) != list(range(count)):
            taken = torch.tensor(rows, device=self._device) + start
            for stored in (self.keys, self.values):
                for layer in stored:
                    layer[slot, :, start : start + count] = layer[slot, :, taken]
        self.commit(slot, count)

    def move(self, source: int, target: int) -> None:
        """The sequence of slot `source` now lives in `target`, whose own is dropped."""
        length = self.lengths[source]
        for stored in (self.keys, self.values):
            for layer in stored:
                layer[target, :, :length] = layer[source, :, :length]
        self.lengths[target] = length
        self.release(source)

    def release(self, slot: int) -> None:
        """Forgets the sequence in `slot`."""
        self.lengths[slot] = 0

    def entries(self, slot: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the committed tokens of a slot, each `[layers, num_kv_heads, length, head_dim]`."""
        length = self.lengths[slot]
        return (
            torch.stack([layer[slot, :, :length] for layer in self.keys]),
            torch.stack([layer[slot, :, :length] for layer in self.values]),
        )
