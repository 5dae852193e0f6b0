"""The choosing kernel against `tidar.sampling.choose`, token for token.

Without a GPU the kernel runs in Triton's interpreter (conftest.py).
"""

import pytest
import torch
from devices import CUDA, DEVICES  # before triton: it skips this file where there is none

# isort: split
import triton
import triton.language as tl
from models import MARGIN
from torch import Tensor

from tidar.kernels import choose as choose_module
from tidar.kernels.choose import choose_rows, choose_workspace
from tidar.kernels.noise import gumbel
from tidar.sampling import SamplingParams, choose, gumbel_noise, process

VOCAB = 5003  # three tiles, the last one partly filled
MASK = 5000


def run(
    logits: Tensor,
    positions: Tensor,
    seeds: Tensor,
    temperatures: Tensor,
    device: str,
    *,
    mask: int = MASK,
    pdl: bool = False,
) -> Tensor:
    """Twice over one workspace, which the first run must have left as it was."""
    workspace = choose_workspace(len(logits), logits.shape[1], device)
    arguments = (logits.to(device), positions.to(device), seeds.to(device), temperatures.to(device))
    first = choose_rows(*arguments, mask, workspace=workspace, pdl=pdl)
    assert not workspace.counters.any()
    assert torch.equal(choose_rows(*arguments, mask, workspace=workspace, pdl=pdl), first)
    return first.cpu()


def draw(rows: int, dtype: torch.dtype, vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with the mask token far ahead, positions and seeds from the ends of their ranges too."""
    generator = torch.Generator().manual_seed(rows)
    logits = 2 * torch.randn(rows, vocab, generator=generator)
    logits[:, MASK] = 50.0
    positions = torch.randint(0, 200_000, (rows,), generator=generator)
    seeds = torch.randint(0, 2**62, (rows,), generator=generator)
    positions[0], seeds[0] = 0, 0
    positions[-1], seeds[-1] = 2**40, 2**63 - 1
    return logits.to(dtype), positions, seeds


def check(
    chosen: Tensor, logits: Tensor, positions: Tensor, seeds: Tensor, temperatures: Tensor
) -> int:
    """Every token is the one `tidar.sampling.choose` takes; returns how many a tiny margin excused."""
    logits = logits.clone()
    logits[:, MASK] = -torch.inf
    excused = 0
    for row, token in enumerate(chosen.tolist()):
        params = SamplingParams(temperature=float(temperatures[row]), seed=int(seeds[row]))
        place = slice(row, row + 1)
        if token == int(choose(logits[place], params, positions[place])):
            continue
        assert not params.greedy, row
        noise = gumbel_noise(params.seed, positions[place], logits.shape[1])
        best = (process(logits[place], params) + noise)[0].topk(2)
        assert token == int(best.indices[1]), row
        assert float(best.values[0] - best.values[1]) < MARGIN, (row, best)
        excused += 1
    return excused


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("programs", [choose_module.PROGRAMS, 250])
def test_equals_the_sampler(
    device: str, dtype: torch.dtype, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy rows and rows of several temperatures side by side; with several tiles a program too."""
    monkeypatch.setattr(choose_module, "PROGRAMS", programs)
    logits, positions, seeds = draw(120, dtype)
    temperatures = torch.tensor([0.0, 0.1, 0.7, 1.0, 2.5]).repeat(24)
    chosen = run(logits, positions, seeds, temperatures, device)
    assert check(chosen, logits, positions, seeds, temperatures) <= 1


@triton.jit
def _noise_kernel(
    seed: tl.tensor, position: tl.tensor, out: tl.tensor, COUNT: tl.constexpr
) -> None:
    token = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(out + token, gumbel(tl.load(seed), tl.load(position), token))


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_that_of_the_sampler(device: str) -> None:
    """Each number, both tails included, to the rounding of the two logarithms."""
    count = 1 << 16
    for seed, position in ((0, 0), (2**63 - 1, 2**40), (12345, 17)):
        out = torch.zeros(count, device=device)
        at = torch.tensor([position], device=device)
        seeds = torch.tensor([seed], device=device)
        _noise_kernel[(count // 1024,)](seeds, at, out, COUNT=1024)
        expected = gumbel_noise(seed, torch.tensor([position]), count)[0]
        error = (out.cpu() - expected).abs() / expected.abs().clamp(min=1.0)
        assert float(error.max()) < 2e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [5, 2048, 5003])
def test_of_equal_logits_the_lowest_wins(device: str, vocab: int) -> None:
    """Within a tile, across tiles, with the mask token among them, and in a row of nothing but ties."""
    logits = torch.zeros(3, vocab)
    logits[1, [vocab - 1, vocab // 2, vocab - 2]] = 1.0
    logits[2] = -torch.inf
    logits[2, vocab - 3 :] = -5.0
    zeros = torch.zeros(3, dtype=torch.int64)
    chosen = run(logits, zeros, zeros, torch.zeros(3), device, mask=0)
    assert chosen.tolist() == [1, vocab // 2, vocab - 3]
    chosen = run(logits, zeros, zeros, torch.zeros(3), device, mask=-1)
    assert chosen.tolist() == [0, vocab // 2, vocab - 3]


@pytest.mark.parametrize("device", DEVICES)
def test_dropped_entries_are_never_chosen(device: str) -> None:
    """All but one entry at -inf: no noise lifts them, and the mask token neither."""
    logits = torch.full((8, VOCAB), -torch.inf)
    logits[:, MASK] = 0.0
    kept = torch.arange(8) * 600
    logits[torch.arange(8), kept] = -80.0
    steps = torch.arange(8)
    chosen = run(logits, steps, steps, torch.full((8,), 1.0), device)
    assert torch.equal(chosen, kept)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_wider_tensor(device: str) -> None:
    logits, positions, seeds = draw(5, torch.float32)
    wide = torch.cat([torch.full((5, 8), 99.0), logits, torch.full((5, 8), 99.0)], dim=1).to(device)
    workspace = choose_workspace(5, VOCAB, device)
    temperatures = torch.full((5,), 0.8)
    out = torch.zeros(5, dtype=torch.int64, device=device)
    arguments = (positions.to(device), seeds.to(device), temperatures.to(device))
    rows = wide[:, 8 : 8 + VOCAB]
    assert choose_rows(rows, *arguments, MASK, workspace=workspace, out=out) is out
    assert check(out.cpu(), logits, positions, seeds, temperatures) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_shape_errors(device: str) -> None:
    logits, positions, seeds = (tensor.to(device) for tensor in draw(4, torch.float32))
    temperatures = torch.zeros(4, device=device)
    workspace = choose_workspace(4, VOCAB, device)
    small = choose_workspace(3, VOCAB, device)
    for arguments, room in (
        ((logits, positions[:3], seeds, temperatures), workspace),
        ((logits, positions.int(), seeds, temperatures), workspace),
        ((logits, positions, seeds, temperatures.double()), workspace),
        ((logits, positions, seeds, temperatures), small),
        ((logits[:, ::2], positions, seeds, temperatures), workspace),
    ):
        with pytest.raises(AssertionError):
            choose_rows(*arguments, MASK, workspace=room)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("pdl", [False, True], ids=["plain", "pdl"])
@pytest.mark.parametrize("rows", [1, 16, 128])
def test_large_vocabulary_on_cuda(rows: int, pdl: bool) -> None:
    logits, positions, seeds = draw(max(rows, 2), torch.bfloat16, vocab=151936)
    logits, positions, seeds = logits[:rows], positions[:rows], seeds[:rows]
    temperatures = torch.tensor([0.7, 0.0, 1.0]).repeat(43)[:rows]
    chosen = run(logits, positions, seeds, temperatures, "cuda", pdl=pdl)
    assert check(chosen, logits, positions, seeds, temperatures) <= 1
