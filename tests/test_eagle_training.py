"""`tidar train --objective eagle`: unrolled training equals decoding, the loss, and a head that decodes."""

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import make_base, refused, tidar
from contenders import decode, eagle, random_head, target
from models import BUNDLED, assert_equal, checkpoint, plain_logits, random_prompt
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from training_runs import assert_same, log, make_home, run

from tidar.decode.request import Request
from tidar.eagle_files import load_eagle_head
from tidar.layout import IGNORE, dense, document_rows, training_labels
from tidar.methods.eagle import DraftHead, Pairs
from tidar.methods.tree import chain
from tidar.model import flops_per_row
from tidar.training.objectives.eagle import DECAY, EagleModel, EagleObjective
from tidar.weights import load_checkpoint

DRAFTED = tuple(range(3, 33))


def learner(**options: Any) -> EagleModel:
    """A random head for the small target, as the trainer holds it."""
    objective = EagleObjective(draft_vocab_size=len(DRAFTED), **options)
    model = EagleModel(copy.deepcopy(target()), objective, "dense", False)
    model.head.load_state_dict(random_head(target(), DRAFTED).state_dict())
    return model


def packed() -> tuple[Tensor, Tensor]:
    """Two sequences of several documents each, `[2, 24]`."""
    ids = torch.tensor([random_prompt(target(), 24, seed) for seed in (1, 2)])
    document = torch.tensor([[0] * 5 + [1] * 16 + [2] * 3, [0] * 12 + [1] * 1 + [2] * 11])
    return ids, document


def batch(ids: Tensor, document: Tensor) -> dict[str, Tensor]:
    return {
        "input_ids": ids,
        "document": document,
        "index": torch.zeros(2),
        "epoch": torch.zeros(2),
    }


@torch.inference_mode()
def test_training_equals_decoding() -> None:
    """Every row of every step is what the drafter computes there, with its cache, after that prefix alone."""
    model, (ids, document) = learner(ttt_length=4), packed()
    rows = document_rows(document)
    _, tapped = model._read(ids, rows)
    steps = [model.head.draft_logits(each) for each in model.unrolled(ids, rows, tapped)]
    draft, tree, compared = DraftHead(model.head, target(), 1), chain(4), 0
    for sequence, start, end in ((0, 0, 5), (0, 5, 21), (1, 0, 12), (1, 13, 24)):
        text = ids[sequence, start:end].tolist()
        for last in range(len(text) - 1):  # the last true feature
            seen = torch.tensor([text[: last + 1]])
            _, taps = target().forward_with_taps(
                seen, torch.arange(last + 1)[None], causal_attend, model.head.taps
            )
            draft.enter(7)
            draft.learn(7, torch.cat(taps, dim=-1)[0], tuple(text[1 : last + 2]))
            root = outputs = draft.read([7])[7]
            for step, logits in enumerate(steps):
                assert_equal(draft.head.draft_logits(outputs[-1]), logits[sequence, start + last])
                compared += 1
                if last + step + 2 >= len(text):
                    break
                nodes = list(range(1, step + 2))
                features = torch.cat((root, outputs)) if step else root
                tokens = tuple(text[last + 2 : last + 3 + step])
                rows_of = {7: Pairs(tokens, features, tuple(range(step + 1)))}
                outputs = draft.run(rows_of, tree.visible[nodes][:, nodes])[7]
            draft.leave(7)
    assert compared > 100


def causal_attend(layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )


def test_the_loss_by_hand() -> None:
    """Row by row: which rows count, whose distribution they are held to, how steps weigh."""
    model, (ids, document) = learner(ttt_length=3), packed()
    rows = document_rows(document)
    with torch.no_grad():
        sums = model.sums(batch(ids, document))
        _, tapped = model._read(ids, rows)
        outputs = list(model.unrolled(ids, rows, tapped))
        counted, right, by_step = [0, 0, 0], [0, 0, 0], [0.0, 0.0, 0.0]
        for sequence, start, end in ((0, 0, 5), (0, 5, 21), (0, 21, 24), (1, 0, 12), (1, 13, 24)):
            teacher = plain_logits(target(), ids[sequence, start:end].tolist())
            for step in range(3):
                for place in range(
                    end - start - step - 2
                ):  # reads the token behind, predicts the next
                    goal = teacher[place + step + 1]
                    if int(goal.argmax()) not in DRAFTED:
                        continue
                    made = model.head.draft_logits(outputs[step][sequence, start + place])
                    counted[step] += 1
                    wanted = goal[list(DRAFTED)].softmax(-1)
                    by_step[step] -= float((wanted * made.log_softmax(-1)).sum())
                    right[step] += int(made.argmax()) == int(wanted.argmax())
        total = sum(DECAY**step * loss for step, loss in enumerate(by_step))
    assert float(sums.total) == pytest.approx(total, rel=1e-5)
    found = [float(each) for each in sums.losses]
    assert found == pytest.approx([by_step[0], by_step[2], right[0], right[2]], rel=1e-5)
    labels = int((training_labels(ids, document)[1] != IGNORE).sum())
    assert int(sums.labels) == labels
    # What is logged is a mean over the rows that counted, of each step its own.
    assert counted[2] < counted[0] < labels
    with torch.no_grad():
        passed = model(**batch(ids, document))
    assert float(passed["loss"]) == pytest.approx(total / labels, rel=1e-5)
    expected = [by_step[0] / counted[0], by_step[2] / counted[2], right[0] / counted[0],
                right[2] / counted[2]]  # fmt: skip
    means = model.means(2 * passed["stats"])  # as of two batches
    assert dict(zip(model.losses, expected, strict=True)) == pytest.approx(means, rel=1e-5)


def test_operations_are_those_counted() -> None:
    """Products of matrices by torch's own counter, keys from the masks; a backward pass is twice a forward one."""
    steps, (ids, document) = 3, packed()
    model, rows = learner(ttt_length=steps), document_rows(document)
    tokens, visible = ids.numel(), dense(rows, rows).sum().item()

    def products(run: Callable[[], object]) -> float:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        return float(counter.get_flop_counts()["Global"][torch.ops.aten.mm])

    def read() -> None:
        model.net.logits(model._read(ids, rows)[0])

    whole, of_model = products(lambda: model.sums(batch(ids, document))), products(read)
    keys = sum(visible + step * tokens for step in range(steps))
    seen = 4 * model.head.config.num_heads * model.head.config.head_dim * keys
    seen_by_model = flops_per_row(model.net.config, visible / tokens) * tokens - of_model
    expected = of_model + seen_by_model + 3 * (whole - of_model + seen)
    assert seen_by_model > 0
    assert model.flops(tokens, visible) == pytest.approx(expected, rel=1e-9)


def test_a_head_begins_with_the_models_own_rows() -> None:
    """Its vocabulary projection and final norm; matrices are drawn, other norms are 1."""
    head, model = copy.deepcopy(random_head(target(), DRAFTED)), target()
    head.init_weights(model, torch.Generator().manual_seed(0))
    assert torch.equal(head.lm_head.weight, model.head_weight[list(DRAFTED)])
    assert torch.equal(head.norm.weight, model.norm.weight)
    assert bool((head.hidden_norm.weight == 1).all())
    assert bool((head.layer.attn_norm.weight == 1).all())
    assert float(head.fc.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_documents_never_meet() -> None:
    """What stands in one document changes nothing in another, in any step."""
    model, (ids, document) = learner(ttt_length=4), packed()
    rows = document_rows(document)
    other = torch.where(document == 1, (ids + 1) % 38, ids)
    place = torch.arange(ids.shape[1])
    with torch.no_grad():
        for step, (left, right) in enumerate(
            zip(
                *(model.unrolled(each, rows, model._read(each, rows)[1]) for each in (ids, other)),
                strict=True,
            ),
            start=1,
        ):
            changed = ~torch.isclose(left, right, atol=1e-6).all(dim=-1)
            assert not bool((changed & (document == 2)).any())
            assert bool(changed[document == 1].any())
            # The row reads the token `step` places on: of document 0 as long as that is in it.
            inside = (document == 0) & (place + step < (document == 0).sum(dim=1, keepdim=True))
            assert bool(inside.any())
            assert not bool((changed & inside).any())


def test_chunks_and_autocast() -> None:
    """A chunk of logits at a time is the whole; gradients reach all of the head and nothing of the model."""
    ids, document = packed()
    found = []
    for chunk in (0, 7):
        model = learner(ttt_length=3, head_chunk=chunk)
        sums = model.sums(batch(ids, document))
        sums.total.backward()
        assert not any("net" in name for name, _ in model.named_parameters())
        found.append([parameter.grad for parameter in model.parameters()])
        assert all(grad is not None and bool(grad.any()) for grad in found[-1])
    for left, right in zip(*found, strict=True):
        assert left is not None
        assert right is not None
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
        assert all(parameter.grad is None for parameter in model.net.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        rough = learner(ttt_length=3).sums(batch(ids, document)).total.detach()
    assert float(rough) == pytest.approx(float(sums.total.detach()), rel=0.05)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_home(tmp_path_factory.mktemp("eagle"))
    make_base(folder / "base", folder / "tokenizer")
    return folder


def short(home: Path, out: Path, **changes: Any) -> Any:
    """A short run for a random base; every third step leaves a checkpoint."""
    return run(home, out, objective="eagle", base=str(home / "base"), arch=None, tokenizer=None,
               draft_vocab_size=64, ttt_length=3, **changes)  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_is_uninterrupted(home: Path, tmp_path: Path, optimizer: str) -> None:
    """Law 9, and what a checkpoint holds: the head alone. The draft vocabulary is the most frequent tokens."""
    changes = {"optimizer": optimizer, "learning_rate": 1e-2}
    short(home, tmp_path / "whole", **changes)
    short(home, tmp_path / "cut", **changes)
    for gone in ("model/model.safetensors", "checkpoint-8/optimizer.pt"):
        (tmp_path / "cut" / gone).unlink()
    saved = load_file(tmp_path / "cut" / "checkpoint-6" / "model.safetensors")
    assert {name.split(".")[0] for name in saved} == {"head"}
    short(home, tmp_path / "cut", **changes, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    rows = log(tmp_path / "whole")
    assert rows[-1]["first_draft_loss"] < rows[0]["first_draft_loss"]
    ids = load_eagle_head(
        tmp_path / "whole" / "model", load_checkpoint(home / "base").config
    ).target_ids
    assert ids.tolist() == most_frequent(home, 64)


def most_frequent(home: Path, count: int) -> list[int]:
    """Straight from the text."""
    tokenizer, found = (
        Tokenizer.from_file(str(home / "tokenizer" / "tokenizer.json")),
        Counter[int](),
    )
    for line in (home / "data.jsonl").read_text().splitlines():
        found.update([*tokenizer.encode(json.loads(line)["text"]).ids, 0])
    size = sum(found.values())
    found[0] += -size % 32  # the last sequence is filled up
    ranked = sorted(range(320), key=lambda token: (-found[token], token))
    return sorted(ranked[:count])


def test_a_trained_head_decodes(tmp_path: Path) -> None:
    """A few steps on the bundled checkpoint, by the command line; the loss falls, and the head drafts."""
    fixed = (
        "generate",
        "def add(a, b):",
        "-n",
        40,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--json",
    )
    plain = tidar(*fixed, "--method", "ar").json
    text = f"def add(a, b):{plain['text']}"
    (tmp_path / "data.jsonl").write_text((json.dumps({"text": text}) + "\n") * 60)
    (tmp_path / "held.jsonl").write_text((json.dumps({"text": text * 3}) + "\n") * 8)
    ran = tidar(
        "train", "--objective", "eagle", "--base", BUNDLED, "--data", tmp_path / "data.jsonl", "--out",
        tmp_path / "run", "--cache-dir", tmp_path / "cache", "--seq-len", 48, "--ttt-length", 4,
        "--draft-vocab-size", 500, "--max-steps", 30, "--learning-rate", "3e-3", "--logging-steps", 5,
        "--per-device-train-batch-size", 4, "--report-to", "none", "--use-cpu", "true", "--json",
        "--eval-data", f"held={tmp_path / 'held.jsonl'}", "--eval-every", 30, "--eval-sequences", 4,
        "--eval-prompts", 2,
    ).json  # fmt: skip
    rows = [row for row in log(tmp_path / "run") if "loss" in row]
    assert rows[-1]["first_draft_loss"] < 0.5 * rows[0]["first_draft_loss"]
    assert rows[-1]["last_draft_accuracy"] > rows[0]["last_draft_accuracy"]
    held = [row for row in log(tmp_path / "run") if "eval/held/first_draft_loss" in row]
    assert held[-1]["eval/held/first_draft_loss"] < held[0]["eval/held/first_draft_loss"]
    # The decoder drafts with the head as it is at that step.
    rate = "decode/held/t0/eagle:4/tokens_per_forward"
    assert held[-1][rate] > 1.2 * held[0][rate] >= 1.2
    model = checkpoint("bundled")
    head = load_eagle_head(str(ran["model"]), model.config)
    assert (head.draft_vocab_size, head.taps) == (500, (0, 3, 6))
    assert ran["methods"] == [f"eagle:{ran['model']}:4"]
    told = tidar(*fixed, "--method", f"eagle:{ran['model']}:4").json
    assert told["ids"] == plain["ids"]
    assert int(str(told["forwards"])) < 0.7 * int(str(plain["forwards"]))
    request = Request(prompt=tuple(range(40, 50)), max_new_tokens=8)
    assert decode(eagle(model, head, chain(3), 1), [request])[0].finish == "length"


def test_what_cannot_be_trained_is_refused(home: Path, tmp_path: Path) -> None:
    fixed = (
        "train",
        "--objective",
        "eagle",
        "--data",
        home / "data.jsonl",
        "--out",
        tmp_path / "x",
    )
    scratch = ("--arch", home / "arch.json", "--tokenizer", home / "tokenizer")
    assert "give base" in refused(*fixed, *scratch)
    based = (*fixed, "--base", home / "base", "--cache-dir", home / "cache", "--use-cpu", "true")
    assert "ttt_length" in refused(*based, "--ttt-length", 40, "--seq-len", 32)
    assert "ttt_length" in refused(*based, "--ttt-length", 0)
    assert "draft_vocab_size" in refused(*based, "--draft-vocab-size", 9999, "--seq-len", 32)
