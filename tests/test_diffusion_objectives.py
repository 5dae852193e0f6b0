"""The losses of masked and block diffusion: by hand, in expectation over all masks, and what is drawn."""

import itertools
import math

import pytest
import torch
from models import random_model
from torch import Tensor

from tidar.attention import dense_attend
from tidar.errors import TidarError
from tidar.layout import Rows, dense
from tidar.model import Transformer
from tidar.sampling import uniform
from tidar.training.flex import flex_mask
from tidar.training.noise import SMALLEST_SHARE, hide, linear_shares
from tidar.training.objective import Objective, TrainingModel
from tidar.training.objectives.block_diffusion import BlockDiffusionObjective, noised_rows
from tidar.training.objectives.masked_diffusion import MaskedDiffusionObjective, whole_rows

NET = random_model("qwen3", vocab=24)
MASK = 23


def batch(documents: list[list[int]], *, index: int = 0) -> dict[str, Tensor]:
    document = torch.tensor(documents)
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(0, 20, document.shape, generator=generator),
        "document": document,
        "index": torch.arange(index, index + len(documents)),
        "epoch": torch.zeros(len(documents), dtype=torch.long),
    }


class Watched(torch.nn.Module):
    """Keeps the token ids that a model is given."""

    def __init__(self, learner: TrainingModel) -> None:
        super().__init__()
        self.net, self.seen = learner.net, torch.empty(0)
        learner.net = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)

    def forward(self, ids: Tensor, *rest: object) -> Tensor:
        self.seen = ids
        return self.net(ids, *rest)  # type: ignore[no-any-return]


def loss_of(objective: Objective, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """What the objective says of a batch, and the token ids that it gave the network."""
    learner = objective.model(NET)
    watched = Watched(learner)
    with torch.no_grad():
        return learner(**inputs), watched.seen


@torch.inference_mode()
def nats(net: Transformer, ids: Tensor, visible: Tensor, shift: bool) -> Tensor:
    """Cross entropy `[N, V]` of every token at every place of one text; `visible` bool `[N, N]`."""
    positions = torch.arange(len(ids)).unsqueeze(0)
    logits = net.logits(net(ids.unsqueeze(0), positions, dense_attend(visible)))[0]
    return -logits.roll(int(shift), dims=0).log_softmax(-1)


def everything(count: int) -> Tensor:
    return torch.ones(count, count, dtype=torch.bool)


def share(seed: int, group: int, index: int = 0) -> float:
    """t of LLaDA's `forward_process`, from the number that is drawn."""
    drawn = 1.0 - uniform(seed, 3, torch.tensor(0), torch.tensor(index), torch.tensor(group)).item()
    return (1 - 1e-3) * drawn + 1e-3


# --- by hand ---


@pytest.mark.parametrize("shift", [False, True])
def test_masked_diffusion_by_hand(shift: bool) -> None:
    """Two documents of a sequence: each alone, with its own t; its first token is given."""
    inputs = batch([[0, 0, 0, 0, 0, 1, 1, 1]])
    objective = MaskedDiffusionObjective(label_shift=shift, seed=5)
    got, noised = loss_of(objective, inputs)
    ids, expected, count = inputs["input_ids"][0], 0.0, 0
    for group, (begin, end) in enumerate(((0, 5), (5, 8))):
        text, seen = ids[begin:end], noised[0, begin:end]
        loss = nats(NET, seen, everything(len(text)), shift)
        hidden = [i for i in range(len(text)) if seen[i] == MASK]
        count += len(hidden)
        assert 0 not in hidden
        assert all(seen[i] == text[i] for i in range(len(text)) if i not in hidden)
        expected += sum(loss[i, text[i]].item() for i in hidden) / share(5, group)
    assert count > 2
    assert got["loss"].item() == pytest.approx(expected / 6, rel=1e-5)
    assert got["stats"].tolist() == pytest.approx([expected, 6, 5 * 5 + 3 * 3], rel=1e-5)


def test_joined_documents_are_one_text() -> None:
    inputs = batch([[0, 0, 0, 0, 0, 1, 1, 1]])
    got, noised = loss_of(MaskedDiffusionObjective(documents="joined", seed=5), inputs)
    loss = nats(NET, noised[0], everything(8), False)
    hidden = (noised[0] == MASK).nonzero().flatten().tolist()
    assert len(hidden) > 1
    assert not {0, 5} & set(hidden)
    expected = sum(loss[i, inputs["input_ids"][0, i]].item() for i in hidden) / share(5, 0)
    assert got["loss"].item() == pytest.approx(expected / 6, rel=1e-5)


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_block_diffusion_by_hand(attention: str) -> None:
    """K = 2 over documents of 5 and 3 tokens: each span from a pass over what it may see alone."""
    inputs = batch([[0, 0, 0, 0, 0, 1, 1, 1]])
    objective = BlockDiffusionObjective(draft_lens=(2,), span_attention=attention, seed=2)  # type: ignore[arg-type]
    got, given = loss_of(objective, inputs)
    ids, noised = inputs["input_ids"][0], given[0, 8:]
    assert torch.equal(given[0, :8], ids)
    expected, count = 0.0, 0
    spans = [(0, 0, 2), (0, 2, 4), (0, 4, 5), (5, 5, 7), (5, 7, 8)]
    for group, (start, begin, end) in enumerate(spans):
        seen = torch.cat((ids[start:begin], noised[begin:end]))
        clean = begin - start
        visible = everything(len(seen))
        visible[:clean] = False
        for i in range(clean):
            last = i if attention == "causal" else i // 2 * 2 + 1
            visible[i, : last + 1] = True
        loss = nats(NET, seen, visible, False)
        for i in range(begin, end):
            assert noised[i] in (MASK, ids[i])
            if noised[i] == MASK:
                assert i != start
                expected += loss[i - start, ids[i]].item() / share(2, group)
                count += 1
    assert count > 2
    assert got["loss"].item() == pytest.approx(expected / 6, rel=1e-5)


def test_full_and_causal_clean_rows() -> None:
    """The dense form of both, over a document of 3 behind one of 2, K = 2: clean half then noised half."""
    document = torch.tensor([[0, 0, 1, 1, 1]])
    lens, offset = torch.tensor([2]), torch.tensor([0])
    causal, full = (
        dense(rows, rows)[0]
        for rows in (noised_rows(document, lens, offset, kind) for kind in ("causal", "full"))  # type: ignore[arg-type]
    )
    assert full[:5, :5].tolist() == [
        [True, True, False, False, False], [True, True, False, False, False],
        [False, False, True, True, False], [False, False, True, True, False],
        [False, False, True, True, True],
    ]  # fmt: skip
    assert torch.equal(causal[:5, :5], full[:5, :5].tril())
    assert torch.equal(causal[5:], full[5:])
    assert not full[:5, 5:].any()


def test_flex_masks_are_the_dense_ones() -> None:
    """What a GPU trains with: tiles that are visible in part or in full, and the rule inside of them."""
    document = torch.zeros(2, 256, dtype=torch.long)
    document[0, 100:], document[1, 130:] = 1, 1
    offset = torch.zeros(2).long()
    for rows in (
        noised_rows(document, torch.tensor([8, 16]), offset, "full"),
        whole_rows(document)[0],
        whole_rows(torch.zeros_like(document))[0],
    ):
        mask, seen = flex_mask(rows, fast=False), dense(rows, rows)
        tiles = seen.unflatten(2, (-1, 128)).unflatten(1, (-1, 128)).any(4).any(2)
        assert torch.equal(mask.to_dense()[:, 0].bool(), tiles)
        b, q, k = torch.meshgrid(*(torch.arange(size) for size in seen.shape), indexing="ij")
        assert torch.equal(mask.mask_mod(b, torch.tensor(0), q, k), seen)


def test_full_spans_lie_on_the_grid() -> None:
    with pytest.raises(TidarError, match=r"'full' needs anchors 'grid'.*on a grid"):
        BlockDiffusionObjective(span_attention="full", anchors="random")


# --- in expectation ---


def order_bound(text: Tensor, shift: bool) -> float:
    """Mean over all orders of -log p of a text whose tokens are settled one after another.

    The expected loss of masked diffusion is this (Ou et al., arXiv 2406.03736); no t occurs in it.
    """
    total, orders = 0.0, list(itertools.permutations(range(1, len(text))))
    for order in orders:
        seen = text.clone()
        seen[1:] = MASK
        for place in order:
            loss = nats(NET, seen, everything(len(text)), shift)
            total += loss[place, text[place]].item()
            seen[place] = text[place]
    return total / len(orders)


@pytest.mark.parametrize("shift", [False, True])
def test_the_expected_loss_of_masked_diffusion_is_the_mean_over_orders(shift: bool) -> None:
    """Exact in the masks (all of them, weighed by the integral over t), then by the draws of training."""
    text = torch.tensor([3, 7, 11, 2])
    bound = order_bound(text, shift)
    objective = MaskedDiffusionObjective(label_shift=shift)
    losses = {}
    for hidden in itertools.product((False, True), repeat=3):
        seen = torch.where(torch.tensor([False, *hidden]), MASK, text)
        loss = nats(NET, seen, everything(4), shift)
        losses[hidden] = sum(loss[i, text[i]].item() for i in range(1, 4) if hidden[i - 1])
    # The integral of t^k (1 - t)^(3 - k) / t over (0, 1].
    exact = sum(
        loss * math.factorial(sum(hidden) - 1) * math.factorial(3 - sum(hidden)) / 6
        for hidden, loss in losses.items()
        if any(hidden)
    )
    assert exact == pytest.approx(bound, rel=1e-5)
    many = 40_000
    inputs = {
        "input_ids": text.expand(many, 4),
        "document": torch.zeros(many, 4, dtype=torch.long),
        "index": torch.arange(many),
        "epoch": torch.zeros(many, dtype=torch.long),
    }
    _, number = whole_rows(inputs["document"])
    shares = linear_shares(objective.seed, inputs, number)
    ids, weights = hide(objective.seed, inputs, shares, MASK, torch.arange(4) > 0)
    values = torch.tensor(
        [losses[tuple(row)] for row in (ids[:, 1:] == MASK).tolist()]
    ) * weights.amax(1)
    error = values.std().item() / math.sqrt(many)
    assert values.mean().item() == pytest.approx(exact, abs=4 * error)
    assert error < 0.02 * exact


def test_a_hidden_token_counts_one_in_expectation() -> None:
    inputs = batch([[0] * 32] * 4096)
    rows = noised_rows(inputs["document"], torch.full((4096,), 4), torch.zeros(4096).long(), "full")
    shares = linear_shares(1, inputs, rows.span[:, 32:])
    assert shares.min().item() >= SMALLEST_SHARE
    assert torch.equal(shares.view(-1, 4).amin(1), shares.view(-1, 4).amax(1))
    spread = shares.view(-1, 4)[:, 0]
    assert torch.allclose(
        spread.quantile(torch.tensor([0.25, 0.5, 0.75])), torch.tensor([0.25, 0.5, 0.75]), atol=0.01
    )
    ids, weights = hide(1, inputs, shares, MASK)
    assert torch.equal(ids == MASK, weights > 0)
    assert torch.equal(ids[ids != MASK], inputs["input_ids"][ids != MASK])
    capped = weights.clamp(max=20)  # 1 / t itself has no finite variance
    assert capped.mean().item() == pytest.approx(1.0 - 0.5 / 20, abs=0.02)


# --- what is drawn ---


@pytest.mark.parametrize(
    "objective",
    [
        MaskedDiffusionObjective(seed=4, label_shift=True),
        BlockDiffusionObjective(seed=4, draft_lens=(2, 4), anchors="random"),
    ],
    ids=("masked", "block"),
)
def test_noise_depends_on_the_sequence_and_the_epoch_only(objective: Objective) -> None:
    inputs = batch([[0] * 9 + [1] * 7] * 6, index=40)
    _, whole = loss_of(objective, inputs)
    for i in (0, 3, 5):
        one = {name: value[i : i + 1] for name, value in inputs.items()}
        assert torch.equal(loss_of(objective, one)[1][0], whole[i])
    assert not torch.equal(whole[0] == MASK, whole[1] == MASK)
    later = {**inputs, "epoch": inputs["epoch"] + 1}
    assert not torch.equal(loss_of(objective, later)[1], whole)
    assert torch.equal(loss_of(objective, inputs)[1], whole)


@pytest.mark.parametrize("kind", [MaskedDiffusionObjective, BlockDiffusionObjective])
def test_accumulation_equals_one_large_batch(kind: type[Objective]) -> None:
    inputs = batch([[0] * 12, [0] * 5 + [1] * 7, [0] * 12])
    learner = kind().model(random_model("llama", vocab=24, seed=3))
    learner(**inputs)["loss"].backward()
    expected = {
        name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None
    }
    learner.zero_grad()
    for part in (slice(0, 1), slice(1, 3)):
        piece = {name: value[part] for name, value in inputs.items()}
        learner(**piece, num_items_in_batch=torch.tensor(11 + 10 + 11))["loss"].backward()
    for name, parameter in learner.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected[name], atol=1e-5), name
    learner.zero_grad()


def test_rows_of_a_text_see_all_of_it_and_nothing_else() -> None:
    rows, number = whole_rows(torch.tensor([[4, 4, 4, 6, 6, 9]]))
    assert number.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert isinstance(rows, Rows)
    assert rows.position.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert torch.equal(dense(rows, rows)[0], number.view(-1, 1) == number.view(1, -1))
