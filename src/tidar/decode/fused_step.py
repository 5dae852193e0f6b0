"""A decode step whose two ends are kernels as well: see `tidar.kernels.turn`."""

from dataclasses import dataclass

from torch import Tensor

from tidar.decode.slots import NOBODY, Stepper
from tidar.kernels.turn import TurnState, prepare_rows, settle_rows
from tidar.paged_cache import PagedRows
from tidar.sampling import RowParams


@dataclass(frozen=True)
class FusedStepper(Stepper):
    """Equals `Stepper`. Steps that filter, or project twice, are PyTorch's at both ends.

    pdl: programmatic dependent launch; CUDA on Hopper or later only.
    """

    pdl: bool = False

    def __call__(self, chosen: Tensor) -> Tensor:
        """See `Stepper`."""
        if self.filtered or not self.projects_all(len(chosen)):
            return Stepper.__call__(self, chosen)
        slots, shape = self.slots, self.shape
        state = TurnState(
            slots.prefix,
            slots.drafts,
            slots.lens,
            slots.left,
            slots.shift,
            slots.seeds,
            slots.temperatures,
            slots.page_table,
        )
        size, width, real = shape.schedule.draft_len, len(shape.tail), shape.tail.num_drafts
        if real < size:  # `settle_rows` knows one K, of what it reads and of what it writes
            slots.lens[chosen] = slots.lens[chosen].clamp(max=real)
        turn = prepare_rows(
            state,
            chosen,
            shape.offsets,
            shape.predicts,
            drafts=real,
            mask_token_id=self.mask_token_id,
            limit=self.limit,
            pdl=self.pdl,
        )
        rows = PagedRows(turn.page_table, turn.prefix_lens, shape.attributes, real)
        hidden = self.backend.forward(turn.ids, turn.positions, rows)
        params = RowParams(turn.temperatures.flatten(), turn.seeds.flatten())
        choices = self.backend.choose(hidden.flatten(0, 1), params, turn.places.flatten())
        return settle_rows(
            state,
            chosen,
            choices.view(-1, width),
            shape.choice_of_anchor,
            shape.first_row,
            drafts=size,
            nobody=NOBODY,
            survival=None if self.replay is None else self.replay.survival,
            replay_seed=0 if self.replay is None else self.replay.seed,
            pdl=self.pdl,
        )
