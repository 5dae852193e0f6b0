"""The joint loss: worked by hand, and the laws about rows, randomness and accumulation."""

import dataclasses

import pytest
import torch
from torch import Tensor

from tidar.attention import dense_attend
from tidar.errors import TidarError
from tidar.layout import clean_rows, dense, mask_mod, training_rows
from tidar.model import ModelConfig
from tidar.sampling import uniform
from tidar.training import noise
from tidar.training.chunked import even_chunk
from tidar.training.flex import flex_mask
from tidar.training.objective import TrainingModel
from tidar.training.objectives.ar import ArObjective
from tidar.training.objectives.tidar import TidarObjective, mask_half
from tidar.training.spans import SpanGrid
from tidar.weights import init_model

CONFIG = ModelConfig(
    model_type="qwen3", vocab_size=24, hidden_size=32, intermediate_size=48, num_layers=2,
    num_heads=2, num_kv_heads=1, head_dim=16, qk_norm=True, tie_embeddings=True, mask_token_id=23,
)  # fmt: skip


def batch(documents: list[list[int]], *, index: int = 0, seed: int = 0) -> dict[str, Tensor]:
    document = torch.tensor(documents)
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(0, 20, document.shape, generator=generator),
        "document": document,
        "index": torch.arange(index, index + len(documents)),
        "epoch": torch.zeros(len(documents), dtype=torch.long),
    }


def model(**fields: object) -> TrainingModel:
    objective = dataclasses.replace(TidarObjective(draft_lens=(4,)), **fields)  # type: ignore[arg-type]
    return objective.model(init_model(CONFIG, 0))


def test_loss_equals_one_worked_by_hand() -> None:
    """Two documents, K = 2: each mask row from its own forward over just what it may see."""
    net = init_model(CONFIG, 0)
    inputs = batch([[0, 0, 0, 1, 1]])
    alpha = 0.5
    loss = TidarObjective(draft_lens=(2,), alpha=alpha).model(net)(**inputs)
    ids = inputs["input_ids"][0]
    clean, mask = [], []
    for begin, end in ((0, 3), (3, 5)):
        text = ids[begin:end]
        positions = torch.arange(len(text))[None]
        rows = clean_rows(len(text))
        logits = net.logits(net(text[None], positions, dense_attend(dense(rows, rows))))[0]
        for i in range(len(text) - 1):
            clean.append(-logits[i].log_softmax(-1)[text[i + 1]])
        for anchor in range(0, len(text), 2):
            width = min(2, len(text) - anchor)
            seen = torch.cat((text[:anchor], torch.full((width,), 23)))
            visible = torch.ones(len(seen), len(seen), dtype=torch.bool)
            visible[:anchor] = torch.ones(anchor, len(seen), dtype=torch.bool).tril()
            hidden = net(seen[None], torch.arange(len(seen))[None], dense_attend(visible))
            logits = net.logits(hidden)[0, anchor:]
            for i in range(width):
                if anchor + i:  # a document's first position has no label
                    mask.append(-logits[i].log_softmax(-1)[text[anchor + i]])
    assert len(clean) == len(mask) == 3
    expected = (alpha * torch.stack(clean).mean() + torch.stack(mask).mean()) / (1 + alpha)
    assert loss["loss"].item() == pytest.approx(expected.item(), abs=1e-5)
    assert loss["stats"][0].item() == pytest.approx(sum(clean).item(), abs=1e-5)  # type: ignore[union-attr]
    assert loss["stats"][2].item() == 3


def test_mask_rows_change_no_clean_logit() -> None:
    """Law 2: the clean half of the training layout is the plain causal model."""
    net = init_model(CONFIG, 1)
    ids = torch.randint(0, 20, (1, 16), generator=torch.Generator().manual_seed(0))
    document = torch.zeros(1, 16, dtype=torch.long)
    rows = training_rows(document, torch.tensor([4]), torch.tensor([3]))
    joint = net(
        torch.cat((ids, torch.full_like(ids, 23)), 1),
        rows.position,
        dense_attend(dense(rows, rows)),
    )
    plain = clean_rows(16)
    alone = net(ids, plain.position[None], dense_attend(dense(plain, plain)))
    assert torch.allclose(net.logits(joint[:, :16]), net.logits(alone), atol=1e-5)


@pytest.mark.parametrize("masking", ["full", "random"])
@pytest.mark.parametrize("soft", [(0.0, "causal"), (0.5, "causal"), (0.5, "base")], ids=str)
def test_accumulation_equals_one_large_batch(masking: str, soft: tuple[float, str]) -> None:
    joint = model(
        masking=masking, soft_labels=soft[0], teacher=soft[1], draft_lens=(2, 4), anchors="random"
    )
    whole = batch([[0] * 12, [0] * 5 + [1] * 7, [0] * 12])
    joint(**whole)["loss"].backward()
    expected = {name: p.grad.clone() for name, p in joint.named_parameters() if p.grad is not None}
    joint.zero_grad()
    items = 11 + 10 + 11
    for part in (slice(0, 1), slice(1, 3)):
        piece = {name: value[part] for name, value in whole.items()}
        joint(**piece, num_items_in_batch=torch.tensor(items))["loss"].backward()
    for name, parameter in joint.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected[name], atol=1e-6), name


def test_the_base_as_teacher_keeps_the_causal_head_where_it_is() -> None:
    """With its own distribution as the label, a causal row has its least loss: no gradient."""
    joint = model(teacher="base", soft_labels=1.0, alpha=1e6)  # the mask half as good as absent
    inputs = batch([[0] * 12, [0] * 5 + [1] * 7])
    joint(**inputs)["loss"].backward()
    for name, parameter in joint.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() < 1e-5, name


def test_the_teacher_base_is_the_network_before_training() -> None:
    """Frozen, invisible to optimizers and checkpoints, and not what the network has become."""
    inputs = batch([[0] * 12])
    joint = model(teacher="base", soft_labels=1.0)
    assert set(joint.state_dict()) == set(model().state_dict())
    before = joint(**inputs)["stats"][0].item()
    with torch.no_grad():
        for parameter in joint.parameters():
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            )
    net, base = joint.net, init_model(CONFIG, 0)
    rows = clean_rows(12)
    attend = dense_attend(dense(rows, rows))
    hidden, taught = (n(inputs["input_ids"], rows.position[None], attend) for n in (net, base))
    probs = base.logits(taught)[0, :-1].softmax(-1)
    log_probs = net.logits(hidden)[0, :-1].log_softmax(-1)
    expected = -(probs * log_probs)[:, :-1].sum()  # the mask token, last of all, is impossible
    after = joint(**inputs)["stats"][0].item()
    assert after == pytest.approx(expected.item(), rel=1e-5)
    assert after > before  # cross entropy is least where it began


def test_held_out_losses_are_against_the_tokens() -> None:
    inputs = batch([[0] * 12])
    plain = model()(**inputs)["stats"]
    for teacher in ("causal", "base"):
        joint = model(teacher=teacher, soft_labels=1.0)
        with joint.hard_labels():
            assert torch.allclose(joint(**inputs)["stats"], plain)
        assert not torch.allclose(joint(**inputs)["stats"], plain)


def test_a_base_without_soft_labels_teaches_nothing_and_is_refused() -> None:
    with pytest.raises(TidarError, match="set soft_labels"):
        TidarObjective(teacher="base")


def test_chunks_change_nothing() -> None:
    inputs = batch([[0] * 10, [0] * 10])
    losses = []
    for chunk in (0, 1, 7, 20):
        joint = model(head_chunk=chunk, soft_labels=0.3)
        loss = joint(**inputs)["loss"]
        loss.backward()
        losses.append((loss.item(), joint.net.embed.weight.grad))
    for value, grad in losses[1:]:
        assert value == pytest.approx(losses[0][0], abs=1e-5)
        assert grad is not None
        assert torch.allclose(grad, losses[0][1], atol=1e-6)


def test_even_chunk() -> None:
    assert even_chunk(131072, 4096) == 131072
    assert 16384 % even_chunk(16384, 151936) == 0
    assert even_chunk(16384, 151936) * 151936 <= 1 << 29


def test_random_masking_has_the_right_rows_and_an_unbiased_weight() -> None:
    objective = TidarObjective(masking="random", draft_lens=(4,))
    inputs = batch([[0] * 64] * 512)
    rows = objective.grid.rows(inputs["document"], inputs["epoch"], inputs["index"])
    ids, weights = mask_half(objective, inputs, rows.span[:, 64:], 23)
    assert weights is not None
    masked = ids == 23
    assert torch.equal(masked, weights > 0)
    assert torch.equal(ids[~masked], inputs["input_ids"][~masked])
    # Within a span one ratio: all masked rows of it weigh the same.
    spans = weights.view(512, 16, 4)
    top = spans.amax(-1, keepdim=True).expand_as(spans)
    assert torch.equal(spans[spans > 0], top[spans > 0])
    assert masked.float().mean().item() == pytest.approx(0.5, abs=0.01)
    capped = weights.clamp(max=20)  # 1 / t itself has no finite variance
    assert capped.mean().item() == pytest.approx(1.0 - 0.5 / 20, abs=0.03)


def test_no_row_of_random_masking_weighs_above_1000(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest share that can be drawn is 2^-24."""
    draws = iter((torch.tensor(1.0 - 2.0**-24), torch.linspace(0.0, 0.002, 8)))
    monkeypatch.setattr(noise, "uniform", lambda *_: next(draws))
    inputs = batch([[0] * 8])
    ids, weights = mask_half(TidarObjective(masking="random"), inputs, torch.zeros(1, 8), 23)
    assert weights is not None
    # Rows are drawn by the bounded share too: those below 0.001, four of the eight.
    assert (ids[0] == 23).tolist() == [True] * 4 + [False] * 4
    assert weights.flatten().tolist() == pytest.approx([1000.0] * 4 + [0.0] * 4)


def test_full_masking_hides_every_token() -> None:
    batch = {"input_ids": torch.ones(1, 8, dtype=torch.long)}
    ids, weights = mask_half(TidarObjective(), batch, torch.zeros(1, 8), 23)
    assert weights is None
    assert (ids == 23).all()


def test_randomness_depends_on_the_sequence_only() -> None:
    """A sequence gets one layout in any batch, so world size and order do not matter."""
    objective = TidarObjective(draft_lens=(2, 4, 8), anchors="random", masking="random", seed=5)
    inputs = batch([[0] * 32] * 8, index=100)
    whole = objective.grid.rows(inputs["document"], inputs["epoch"], inputs["index"])
    ids, _ = mask_half(objective, inputs, whole.span[:, 32:], 23)
    for i in (0, 3, 7):
        one = {name: value[i : i + 1] for name, value in inputs.items()}
        rows = objective.grid.rows(one["document"], one["epoch"], one["index"])
        assert torch.equal(rows.anchor[0], whole.anchor[i])
        alone, _ = mask_half(objective, one, rows.span[:, 32:], 23)
        assert torch.equal(alone[0], ids[i])
    later = objective.grid.rows(inputs["document"], inputs["epoch"] + 1, inputs["index"])
    assert not torch.equal(later.anchor, whole.anchor)


def test_uniform_is_uniform() -> None:
    values = uniform(3, torch.arange(20000))
    assert 0.0 <= values.min().item() < values.max().item() < 1.0
    assert values.mean().item() == pytest.approx(0.5, abs=0.01)
    assert (values < 0.25).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert not torch.equal(values, uniform(4, torch.arange(20000)))


def test_autoregressive_objective_is_the_clean_half() -> None:
    inputs = batch([[0] * 6 + [1] * 6])
    tidar, ar = model()(**inputs), ArObjective().model(init_model(CONFIG, 0))(**inputs)
    assert ar["stats"][0].item() == pytest.approx(tidar["stats"][0].item(), abs=1e-4)
    assert ar["stats"][1].item() == 10
    assert ar["loss"].item() == pytest.approx(ar["stats"][0].item() / 10, abs=1e-5)


def test_visible_keys_are_counted() -> None:
    """Exactly where all spans are whole; within a few percent where lengths, offsets and ends differ."""
    even = batch([[0] * 8 + [1] * 16])
    rows = SpanGrid((4,), "grid", 0).rows(even["document"], even["epoch"], even["index"])
    assert SpanGrid((4,), "grid", 0).visible(rows).item() == dense(rows, rows).sum().item()
    ragged, grid = batch([[0] * 57 + [1] * 71 for _ in range(32)]), SpanGrid((2, 4, 8), "random", 0)
    rows = grid.rows(ragged["document"], ragged["epoch"], ragged["index"])
    counted = dense(rows, rows).sum().item()
    assert grid.visible(rows).item() == pytest.approx(counted, rel=0.05)
    spans_alone = counted - rows.anchor.sum().item()  # what the mean length stands for
    assert grid.visible(rows).item() - rows.anchor.sum().item() == pytest.approx(
        spans_alone, rel=0.2
    )


def test_flex_mask_equals_create_block_mask() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    document = torch.zeros(2, 256, dtype=torch.long)
    document[0, 100:], document[1, 130:] = 1, 1
    rows = training_rows(document, torch.tensor([8, 16]), torch.tensor([3, 0]))
    ours = flex_mask(rows, fast=False)
    theirs = create_block_mask(mask_mod(rows), 2, None, 512, 512, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert ours.full_kv_num_blocks is not None
    assert theirs.full_kv_num_blocks is not None
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks)
    with pytest.raises(TidarError, match="multiple of 128"):
        flex_mask(training_rows(document[:, :100], torch.tensor([8, 8]), torch.tensor([0, 0])))


def test_impossible_objectives_are_refused() -> None:
    for fields in ({"draft_lens": ()}, {"draft_lens": (8, 4)}, {"alpha": -1.0}, {"anchors": "x"}):
        with pytest.raises(TidarError):
            TidarObjective(**fields)  # type: ignore[arg-type]
    plain = init_model(dataclasses.replace(CONFIG, mask_token_id=None), 0)
    with pytest.raises(TidarError, match="mask token"):
        TidarObjective().model(plain)
