"""Law 7: a span means the same in training, in a prefill and in a decode step."""

import random
from dataclasses import dataclass, field

import pytest
import torch
from models import (
    CHECKPOINTS,
    FAMILIES,
    any_model,
    assert_equal,
    make_engine,
    random_model,
    random_prompt,
    run_engine,
)
from torch import Tensor

from tidar.attention import dense_attend
from tidar.decode.request import Request
from tidar.layout import Schedule, dense, dense_schedule, training_rows, two_forward
from tidar.methods import Pending, Project, Verdict
from tidar.methods.tidar import Tidar, TidarStep
from tidar.model import Transformer
from tidar.sampling import SamplingParams


@dataclass(frozen=True)
class SpanRecorder(Tidar):
    """Keeps the logits of every span of every step, all of them, the unchosen ones too."""

    spans: list[tuple[Pending, int, Tensor]] = field(default_factory=list)

    def resolve(self, step: TidarStep, hidden: Tensor, project: Project) -> list[Verdict]:
        draft_len = step.tail.draft_len
        for index, p in enumerate(step.pending):
            for anchor in step.anchors[index]:
                start = step.tail.span_start(anchor)
                rows = hidden[index, start : start + draft_len]
                self.spans.append((p, anchor, project(rows)))
        return super().resolve(step, hidden, project)


@torch.inference_mode()
def training_logits(
    model: Transformer, clean: list[int], anchor: int, draft_len: int, length: int
) -> Tensor:
    """Logits of the span at `anchor` from the training layout.

    `clean` is cut at the anchor and filled to `length` tokens. The document is packed between two
    others, beside a row with another draft length.
    """
    mask = model.config.mask_token_id
    assert mask is not None
    # What stands at and behind the anchor must not matter.
    filler = random_prompt(model, length, anchor)
    own = [*clean[:anchor], *filler[anchor:]]
    before, after = random_prompt(model, 3, 1), random_prompt(model, 4, 2)
    ids = torch.tensor([[*before, *own, *after]] * 2)
    document = torch.tensor([[0] * 3 + [1] * length + [2] * 4, [5] * (length + 7)])
    rows = training_rows(
        document, torch.tensor([draft_len, 5]), torch.tensor([anchor % draft_len, 2])
    )
    # The second row is longer than the model's context, which matters to nobody here.
    hidden = model(
        torch.cat([ids, torch.full_like(ids, mask)], dim=1),
        rows.position,
        dense_attend(dense(rows, rows)),
    )
    first = ids.shape[1] + len(before) + anchor
    return model.logits(hidden[0, first : first + min(draft_len, length - anchor)])


def check_parity(name: str, limit: int | None, schedule: Schedule, temperature: float) -> set[int]:
    """All spans of a ragged batch against the training layout; returns the anchor offsets seen."""
    model = any_model(name) if limit is None else random_model(name, limit=limit)
    end = model.config.max_positions
    mask = model.config.mask_token_id
    assert mask is not None
    recorder = SpanRecorder(mask)
    lengths: tuple[int, ...]
    if limit is None:
        lengths, count = (2, 9, 1, 14), 6
    else:
        lengths, count = (limit - 1, limit - 3, limit - 8), 50
    requests = [
        Request(
            prompt=random_prompt(model, length, length),
            max_new_tokens=count,
            params=SamplingParams(seed=length, temperature=temperature),
        )
        for length in lengths
    ]
    runs = run_engine(make_engine(model, recorder, schedule, max_batch=3), requests)
    texts = {
        request.params.seed: [*request.prompt, *run.ids]
        for request, run in zip(requests, runs, strict=True)
    }
    offsets = set()
    short = 0
    for p, offset, logits in recorder.spans:
        anchor = p.prefix_len + offset
        clean = [*texts[p.params.seed][: p.prefix_len], *p.draft.tokens]
        # A document that ends where the model does, or well behind the span.
        length = min(anchor + schedule.draft_len + 2, end)
        inside = min(schedule.draft_len, end - anchor)
        short += inside < schedule.draft_len
        if inside == 0:
            continue
        expected = training_logits(model, clean, anchor, schedule.draft_len, length)
        assert len(expected) == inside
        assert_equal(logits[:inside], expected)
        if p.draft.certain == 1:
            offsets.add(offset)
    assert limit is None or short > 5
    return offsets


@pytest.mark.parametrize("name", [*FAMILIES, *CHECKPOINTS])
@pytest.mark.parametrize(
    "schedule",
    [
        dense_schedule(4),
        Schedule(3, (2,)),
        Schedule(8, (1, 3, 6)),
        Schedule(2, ()),
        Schedule(16, (1, 2)),
        two_forward(8),
    ],
    ids=str,
)
def test_spans_equal_training(name: str, schedule: Schedule) -> None:
    """Through the cached engine, every span of a step, several draft lengths of one model."""
    offsets = check_parity(name, None, schedule, 1.0)
    assert offsets >= {n for n in schedule.span_set or (1,) if n <= 2}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("draft_len", "spans"), [(4, (1, 2, 3, 4)), (7, (1, 4))])
def test_spans_equal_training_near_the_end(
    name: str, draft_len: int, spans: tuple[int, ...]
) -> None:
    """A span that the document's end cuts short equals one that the context's end cuts short."""
    check_parity(name, 20, Schedule(draft_len, spans), 0.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_equals_decode(name: str) -> None:
    """The span of a prefill equals that of a decode step with the same anchor."""
    model = random_model(name)
    mask = model.config.mask_token_id
    assert mask is not None
    schedule = Schedule(5, (1, 2, 3, 4, 5))
    recorder = SpanRecorder(mask)
    prompt = random_prompt(model, 6, 0)
    request = Request(prompt=prompt, max_new_tokens=6)
    (run,) = run_engine(make_engine(model, recorder, schedule), [request])
    steps = [(p, offset, logits) for p, offset, logits in recorder.spans if p.prefix_len]
    assert steps
    for p, offset, logits in random.Random(0).sample(steps, 8):
        clean = (*prompt, *run.ids)[: p.prefix_len] + p.draft.tokens[:offset]
        other = SpanRecorder(mask)
        run_engine(make_engine(model, other, schedule), [Request(prompt=clean, max_new_tokens=1)])
        ((_, anchor, expected),) = other.spans
        assert anchor == len(clean)
        assert_equal(logits, expected)
