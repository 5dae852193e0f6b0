"""The two kernels at the ends of a decode step against `tidar.decode.slots.Stepper`, number for number.

The network between them is a stub: `Script` returns choices that were drawn beforehand. Without a GPU
the kernels run in Triton's interpreter (conftest.py).
"""

from dataclasses import dataclass, fields

import pytest
import torch
from devices import CUDA, DEVICES
from torch import Tensor

from tidar.decode.slots import NOBODY, Replay, Slots, Stepper, StepShape
from tidar.kernels.turn import TurnRows, TurnState, prepare_rows, settle_rows
from tidar.layout import AUTOREGRESSIVE, Schedule, dense_schedule, two_forward
from tidar.paged_cache import PagedRows
from tidar.sampling import RowParams, mix

MASK = 40
LIMIT = 90
SLOTS = 7
PAGES = 300  # more than one tile of the copy
MAX_DRAFT = 18  # more than any K here

SCHEDULES = {
    "ar": AUTOREGRESSIVE,
    "dense-4": dense_schedule(4),
    "8": Schedule(8, (1, 3)),
    "6-without-1": Schedule(6, (4,)),
    "16": Schedule(16, (1, 2, 3, 5, 8, 16)),
    "8-verify": two_forward(8),
    "8-draft": two_forward(8).after(None),
}


@dataclass
class Script:
    """A backend that chooses what it was told to, and remembers what it was asked. choices: `[B, W]`."""

    choices: Tensor
    asked: TurnRows | None = None
    rows: PagedRows | None = None
    ids: Tensor | None = None
    positions: Tensor | None = None

    def forward(self, ids: Tensor, positions: Tensor, rows: PagedRows) -> Tensor:
        self.ids, self.positions, self.rows = ids, positions, rows
        return self.choices.unsqueeze(-1)

    def choose(self, hidden: Tensor, params: RowParams, positions: Tensor) -> Tensor:
        assert self.ids is not None
        assert self.positions is not None
        assert self.rows is not None
        size = self.ids.shape
        self.asked = TurnRows(
            ids=self.ids,
            positions=self.positions,
            places=positions.view(size),
            seeds=params.seeds.view(size),
            temperatures=params.temperatures.view(size),
            prefix_lens=self.rows.prefix_lens,
            page_table=self.rows.page_table,
        )
        return hidden.squeeze(-1)


def assert_same(actual: object, expected: object) -> None:
    """Field by field, types and shapes included."""
    for field in fields(expected):  # type: ignore[arg-type]
        mine, other = getattr(actual, field.name), getattr(expected, field.name)
        assert mine.dtype == other.dtype, field.name
        assert torch.equal(mine, other), (field.name, mine, other)


def state_of(slots: Slots, *, copy: bool = False) -> TurnState:
    values = {field.name: getattr(slots, field.name) for field in fields(TurnState)}
    return TurnState(**{name: value.clone() if copy else value for name, value in values.items()})


class Dice:
    """Random states and choices from one seed."""

    def __init__(self, device: str, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        self.agreed = seed

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def slots(self) -> Slots:
        """Drafts of all lengths, some sequences that end soon, some near the limit of positions."""
        slots = Slots(SLOTS, MAX_DRAFT, PAGES, torch.device(self.device))
        size = SLOTS + 1
        slots.prefix.copy_(self.integers(1, 60, size))
        slots.prefix[5:] = self.integers(LIMIT - 8, LIMIT, size - 5)
        slots.drafts.copy_(self.integers(0, MASK, size, MAX_DRAFT))
        slots.lens.copy_(self.integers(1, MAX_DRAFT + 1, size))
        slots.lens[1] = MAX_DRAFT
        slots.left.copy_(self.integers(1, 40, size))
        slots.left[2:4] = self.integers(1, 4, 2)
        slots.shift.copy_(self.integers(0, MAX_DRAFT, size))
        slots.seeds.copy_(self.integers(0, 2**62, size))
        slots.seeds[3] = 2**63 - 1
        slots.temperatures.copy_(torch.rand(size, generator=self.generator))
        slots.temperatures[4] = 0.0
        slots.page_table.copy_(self.integers(0, 2**31 - 1, size, PAGES))
        slots.prefix[NOBODY] = 0
        slots.page_table[NOBODY] = 0
        return slots

    def choices(self, slots: Slots, chosen: Tensor, draft_len: int, width: int) -> Tensor:
        """Random, of few tokens, and equal to the draft up to a place where they differ, another each time."""
        choices = self.integers(0, 3, len(chosen), width)
        for row, slot in zip(choices, chosen.tolist(), strict=True):
            draft = slots.drafts[slot, :draft_len]
            length = min(draft_len, int(slots.lens[slot]))
            agreed = self.agreed % length
            self.agreed += 5
            if agreed + 1 < length:
                row[:agreed] = draft[1 : agreed + 1]
                row[agreed] = (draft[agreed + 1] + 1) % MASK
            else:  # also with what an older draft left behind this one's end
                row[: draft_len - 1] = draft[1:]
        return choices

    def replay(self, draft_len: int) -> Replay:
        """Depths beyond the survival table take its last entry."""
        survival = 0.5 + 0.5 * torch.rand(draft_len, generator=self.generator)
        return Replay(survival.to(self.device), seed=int(self.integers(0, 2**40, 1)))


def check_step(
    slots: Slots,
    shape: StepShape,
    chosen: Tensor,
    choices: Tensor,
    *,
    replay: Replay | None = None,
    pdl: bool = False,
) -> list[int]:
    """One step both ways from one state, which it leaves in `slots`; returns each accept count n."""
    size, real = shape.schedule.draft_len, shape.tail.num_drafts
    state = state_of(slots, copy=True)
    if real < size:
        state.lens[chosen] = state.lens[chosen].clamp(max=real)
    rows = prepare_rows(
        state,
        chosen,
        shape.offsets,
        shape.predicts,
        drafts=real,
        mask_token_id=MASK,
        limit=LIMIT,
        pdl=pdl,
    )
    results = settle_rows(
        state,
        chosen,
        choices,
        shape.choice_of_anchor,
        shape.first_row,
        drafts=size,
        nobody=NOBODY,
        survival=None if replay is None else replay.survival,
        replay_seed=0 if replay is None else replay.seed,
        pdl=pdl,
    )
    script = Script(choices)
    step = Stepper(slots, script, shape, MASK, LIMIT, all_rows=True, replay=replay)
    expected = step(chosen)
    assert script.asked is not None
    assert_same(rows, script.asked)
    assert results.dtype == expected.dtype
    assert results.shape == expected.shape
    accepted = []
    for slot, mine, other in zip(chosen.tolist(), results, expected, strict=True):
        # Nobody's places in a batch share a slot, and nobody reads what they did.
        if slot != NOBODY:
            emitted = slice(2 + int(other[1]))
            assert torch.equal(mine[emitted], other[emitted]), (slot, mine, other)
            accepted.append(int(other[1]))
    reference = state_of(slots)
    assert int(state.prefix[NOBODY]) == 0
    assert 1 <= int(state.lens[NOBODY]) <= max(size, int(reference.lens[NOBODY]))
    for field in fields(TurnState):
        getattr(reference, field.name)[NOBODY] = getattr(state, field.name)[NOBODY]
    assert_same(state, reference)
    return accepted


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("replayed", [False, True], ids=["compared", "replayed"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_equals_the_stepper(device: str, name: str, replayed: bool) -> None:
    """Steps in a row, each from where the one before ended; in the first of them slot 1 accepts seed + 1."""
    shape = StepShape(SCHEDULES[name], torch.device(device))
    size, seen = shape.schedule.draft_len, set()
    for seed in range(4 if replayed else max(4, size)):
        dice = Dice(device, seed)
        slots = dice.slots()
        replay = dice.replay(size) if replayed else None
        for chosen in ([1, 2, 3, 4, 5, 6], [7, NOBODY, 1, NOBODY], [5]):
            batch = torch.tensor(chosen, device=device)
            choices = dice.choices(slots, batch, size, len(shape.tail))
            seen.update(check_step(slots, shape, batch, choices, replay=replay))
    most = shape.schedule.draft_rows
    assert replayed or seen == set(range(1, most + 1)), "an accept count never came up"


@pytest.mark.parametrize("device", DEVICES)
def test_schedules_change_between_steps(device: str) -> None:
    """A slot's draft may be longer or shorter than the K of the step that verifies it."""
    dice = Dice(device, 9)
    slots = dice.slots()
    batch = torch.tensor([3, 1, 4, 2], device=device)
    for name in ("16", "dense-4", "ar", "8", "6-without-1"):
        shape = StepShape(SCHEDULES[name], torch.device(device))
        choices = dice.choices(slots, batch, shape.schedule.draft_len, len(shape.tail))
        check_step(slots, shape, batch, choices)
    assert bool((slots.left[1:5] < 1).any()), "no sequence ran out"


@pytest.mark.parametrize("device", DEVICES)
def test_replays_use_the_same_noise(device: str) -> None:
    """A survival equal to the noise fails, the next number above it passes: so the noise is the same."""
    dice = Dice(device, 3)
    shape = StepShape(dense_schedule(16), torch.device(device))
    slots = dice.slots()
    batch = torch.arange(1, SLOTS + 1, device=device)
    slots.lens.fill_(2)
    slots.shift[1:] = torch.arange(SLOTS, device=device)  # each sequence reads its own survival
    slots.prefix[1] = 2**31 - 20  # the product with the position wraps
    for seed in (0, 1, 2**40 + 5, 2**63 - 1):
        own = mix(slots.seeds[1:] + seed)
        bits = mix((slots.prefix[1:].long() + 1) * 0x9E3779B1 + own) >> 40
        noise = (bits & (2**24 - 1)).float() * 2.0**-24
        above = torch.nextafter(noise, torch.full_like(noise, 2.0))
        for survival, verdict in ((noise, 1), (above, 2)):
            table = torch.cat((torch.zeros(1, device=device), survival))
            fresh = dice.slots()
            for name in ("prefix", "lens", "shift", "seeds"):
                getattr(fresh, name).copy_(getattr(slots, name))
            choices = dice.choices(fresh, batch, 16, len(shape.tail))
            accepted = check_step(fresh, shape, batch, choices, replay=Replay(table, seed))
            assert accepted == [verdict] * SLOTS


@pytest.mark.gpu
@pytest.mark.skipif(
    not CUDA or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU or later"
)
def test_dependent_launches_wait_on_cuda() -> None:
    """Each kernel starts while the one before it runs, and `settle_rows` writes what it reads."""
    dice = Dice("cuda", 5)
    shape = StepShape(SCHEDULES["16"], torch.device("cuda"))
    slots = dice.slots()
    batch = torch.arange(1, SLOTS + 1, device="cuda")
    for _ in range(20):
        choices = dice.choices(slots, batch, 16, len(shape.tail))
        check_step(slots, shape, batch, choices, pdl=True)
