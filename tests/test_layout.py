"""Law 1: every derived form of the visibility rule equals the rule, element by element."""

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tidar.errors import TidarError
from tidar.layout import (
    AUTOREGRESSIVE,
    CLEAN,
    IGNORE,
    Rows,
    Schedule,
    build_tail,
    cached_tail,
    decode_rows,
    dense,
    dense_schedule,
    mask_mod,
    nearest_anchor,
    prefill_rows,
    spans_for,
    training_labels,
    training_rows,
    two_forward,
)


# The oracle: section 3 of the design, in plain Python, sharing nothing with layout.py.
@dataclass(frozen=True)
class Row:
    kind: str  # "clean" or "mask"
    position: int
    document: int
    span: object = None  # of a mask row: anything that names its span
    anchor: int = -1  # of a mask row


def sees(query: Row, key: Row) -> bool:
    if query.document != key.document:
        return False
    if key.kind == "clean" and query.kind == "clean":
        return key.position <= query.position
    if key.kind == "clean" and query.kind == "mask":
        return key.position < query.anchor
    if key.kind == "mask" and query.kind == "mask":
        return key.span == query.span
    return False


def oracle(queries: list[Row], keys: list[Row]) -> list[list[bool]]:
    return [[sees(query, key) for key in keys] for query in queries]


def oracle_span(anchor: int, end: int, document: int, name: object) -> list[Row]:
    return [Row("mask", position, document, name, anchor) for position in range(anchor, end)]


def oracle_training(lengths: list[int], ids: list[int], draft_len: int, offset: int) -> list[Row]:
    """Clean rows of all documents, then their mask rows."""
    clean, masks = [], []
    for length, document in zip(lengths, ids, strict=True):
        clean += [Row("clean", position, document) for position in range(length)]
        starts = sorted({0, *range(offset, length, draft_len)})
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            if start < length:
                masks += oracle_span(start, min(end, length), document, (document, start))
    return clean + masks


def oracle_step(
    prefix: int, drafts: int, anchors: tuple[int, ...], draft_len: int, limit: int | None
) -> list[Row]:
    """Draft rows, then spans; rows past the last position are not there."""
    rows = [Row("clean", prefix + i, 0) for i in range(drafts)]
    for anchor in anchors:
        end = prefix + anchor + draft_len
        rows += oracle_span(
            prefix + anchor, end if limit is None else min(end, limit), 0, f"span {anchor}"
        )
    return rows


def compositions(total: int) -> list[list[int]]:
    """All ways to cut `total` tokens into documents."""
    if total == 0:
        return [[]]
    return [[first, *rest] for first in range(1, total + 1) for rest in compositions(total - first)]


def training_cases(total: int) -> list[tuple[list[int], int, int]]:
    """(document lengths, draft_len, offset), everything there is."""
    return [
        (lengths, draft_len, offset)
        for lengths in compositions(total)
        for draft_len in range(1, 6)
        for offset in range(draft_len)
    ]


def documents(lengths: list[int], ids: list[int]) -> list[int]:
    return [document for length, document in zip(lengths, ids, strict=True) for _ in range(length)]


def training_batch(cases: list[tuple[list[int], int, int]]) -> tuple[Rows, list[list[Row]]]:
    """The rows of layout.py and of the oracle; ids skip numbers, the cases mix draft lengths."""
    ids = [[3 * i + 2 for i in range(len(lengths))] for lengths, _, _ in cases]
    document = torch.tensor(
        [documents(lengths, own) for (lengths, _, _), own in zip(cases, ids, strict=True)]
    )
    rows = training_rows(
        document,
        torch.tensor([draft_len for _, draft_len, _ in cases]),
        torch.tensor([offset for _, _, offset in cases]),
    )
    expected = [
        oracle_training(lengths, own, draft_len, offset)
        for (lengths, draft_len, offset), own in zip(cases, ids, strict=True)
    ]
    return rows, expected


@pytest.mark.parametrize("total", range(1, 7))
def test_training_forms_equal_the_rule(total: int) -> None:
    """Dense form and mask_mod, for all packings, draft lengths and offsets, mixed in one batch."""
    cases = training_cases(total)
    rows, expected = training_batch(cases)
    matrices = torch.tensor([oracle(own, own) for own in expected])
    assert torch.equal(dense(rows, rows), matrices)
    assert rows.position.tolist() == [[row.position for row in own] for own in expected]
    assert rows.document.tolist() == [[row.document for row in own] for own in expected]
    assert rows.is_mask.tolist() == [[row.kind == "mask" for row in own] for own in expected]
    anchors = [[row.anchor for row in own[total:]] for own in expected]
    assert rows.anchor[:, total:].tolist() == anchors
    modifier = mask_mod(rows)
    batch, query, key = torch.meshgrid(
        torch.arange(len(cases)), torch.arange(2 * total), torch.arange(2 * total), indexing="ij"
    )
    assert torch.equal(modifier(batch, torch.tensor(0), query, key), matrices)


def test_mask_mod_one_element_at_a_time() -> None:
    """As FlexAttention calls it: scalars."""
    cases = [([3, 4], 2, 1), ([7], 4, 3), ([1, 1, 5], 3, 0)]
    rows, expected = training_batch(cases)
    modifier = mask_mod(rows)
    for case, own in enumerate(expected):
        for q, k in itertools.product(range(14), repeat=2):
            index = [torch.tensor(value) for value in (case, 0, q, k)]
            assert bool(modifier(*index)) == sees(own[q], own[k]), (case, q, k)


def test_flex_attention_equals_dense_attention() -> None:
    """mask_mod run by FlexAttention (eager, CPU) against SDPA under the oracle's matrix."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    cases = [([20], 4, 0), ([7, 9, 4], 3, 2), ([1, 1, 18], 16, 5), ([5] * 4, 8, 7)]
    rows, expected = training_batch(cases)
    size = 40
    mask = create_block_mask(mask_mod(rows), len(cases), None, size, size, device="cpu")
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(len(cases), 4, size, 16, generator=generator)
    k, v = (torch.randn(len(cases), 2, size, 16, generator=generator) for _ in range(2))
    with torch.no_grad():
        flex = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        matrix = torch.tensor([oracle(own, own) for own in expected]).unsqueeze(1)
        plain = F.scaled_dot_product_attention(q, k, v, attn_mask=matrix, enable_gqa=True)
    torch.testing.assert_close(flex, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("draft_len", range(5))
def test_prefill_rows(draft_len: int) -> None:
    for prompt, limit in itertools.product(range(1, 7), (None, 3, 6, 7, 8, 20)):
        if limit is not None and limit < prompt:
            continue
        expected = [Row("clean", position, 0) for position in range(prompt)]
        end = prompt + draft_len
        expected += oracle_span(prompt, end if limit is None else min(end, limit), 0, "span")
        rows = prefill_rows(prompt, draft_len, limit=limit)
        assert dense(rows, rows).tolist() == oracle(expected, expected)
        assert rows.position.tolist() == [row.position for row in expected]
        # A prefill is also a decode step behind an empty prefix.
        anchors = (prompt,) if draft_len else ()
        tail = build_tail(prompt, anchors, draft_len)
        whole = oracle_step(0, prompt, anchors, draft_len, None)
        assert tail.matrix.tolist() == oracle(whole, whole)


def subsets(count: int) -> list[tuple[int, ...]]:
    return [
        chosen
        for size in range(count + 1)
        for chosen in itertools.combinations(range(1, count + 1), size)
    ]


def tail_rows_inside(prefix: int, tail_offsets: Tensor, limit: int | None) -> list[int]:
    return [
        i
        for i, offset in enumerate(tail_offsets.tolist())
        if limit is None or prefix + offset < limit
    ]


@pytest.mark.parametrize("drafts", range(1, 5))
@pytest.mark.parametrize("draft_len", range(1, 5))
def test_decode_forms(drafts: int, draft_len: int) -> None:
    """Dense rows, and "the whole prefix, then the tail matrix"; any anchors, any context end."""
    for prefix, anchors in itertools.product(range(4), subsets(drafts)):
        tail = build_tail(drafts, anchors, draft_len)
        assert len(tail) == len(tail.offsets) == drafts + len(anchors) * draft_len
        for number, anchor in enumerate(anchors):
            assert tail.span_start(anchor) == drafts + number * draft_len
        for limit in (None, *range(prefix + drafts, prefix + drafts + draft_len + 1)):
            history = [Row("clean", position, 0) for position in range(prefix)]
            step = oracle_step(prefix, drafts, anchors, draft_len, limit)
            expected = oracle(history + step, history + step)
            rows = prefill_rows(prefix, 0).join(
                decode_rows(prefix, drafts, anchors, draft_len, limit=limit)
            )
            assert dense(rows, rows).tolist() == expected
            inside = tail_rows_inside(prefix, tail.offsets, limit)
            matrix = tail.matrix if limit is None else tail.within(limit - prefix)
            assert (tail.offsets + prefix)[inside].tolist() == [row.position for row in step]
            # Every row of the tail sees the whole prefix, no row of the prefix sees the tail.
            assert all(all(line[:prefix]) for line in expected[prefix:])
            assert not any(any(line[prefix:]) for line in expected[:prefix])
            assert matrix[inside][:, inside].tolist() == [
                line[prefix:] for line in expected[prefix:]
            ]
            # Rows past the end: nobody sees them, and they see themselves, so no softmax is empty.
            outside = sorted(set(range(len(tail))) - set(inside))
            assert not matrix[inside][:, outside].any()
            assert torch.equal(
                matrix[outside][:, outside], torch.eye(len(outside), dtype=torch.bool)
            )


def test_tail_is_shared_and_checked() -> None:
    assert cached_tail(3, (1, 2), 4) is cached_tail(3, (1, 2), 4)
    for wrong in ((0,), (4,), (1, 5)):
        with pytest.raises(AssertionError):
            build_tail(3, wrong, 4)


packings = st.tuples(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 10), st.integers(0, 9)
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(packings)
def test_no_mask_row_sees_its_own_or_a_later_token(
    packing: tuple[list[int], int, int],
) -> None:
    """The leak that would make training pointless; and spans stay inside their document."""
    lengths, draft_len, offset = packing
    offset %= draft_len
    document = torch.tensor([documents(lengths, list(range(len(lengths))))])
    rows = training_rows(document, torch.tensor([draft_len]), torch.tensor([offset]))
    matrix = dense(rows, rows)[0]
    position, span = rows.position[0], rows.span[0]
    total = sum(lengths)
    for query in range(total, 2 * total):
        keys = matrix[query].nonzero().flatten()
        clean = keys[keys < total]
        assert (position[clean] < position[query]).all()
        assert (rows.document[0][keys] == rows.document[0][query]).all()
        assert matrix[query, query]
    assert not matrix[:total, total:].any()
    for name in span[total:].unique():
        own = (span == name).nonzero().flatten()
        assert rows.document[0][own].unique().numel() == 1
        assert len(own) <= draft_len
        assert rows.anchor[0][own].unique().tolist() == [int(position[own].min())]
        assert position[own].tolist() == list(
            range(int(position[own[0]]), int(position[own[0]]) + len(own))
        )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 6), st.integers(1, 6), st.integers(1, 6), st.data())
def test_no_span_of_a_step_sees_its_own_or_a_later_token(
    prefix: int, drafts: int, draft_len: int, data: st.DataObject
) -> None:
    anchors = data.draw(st.sampled_from(subsets(drafts)))
    rows = prefill_rows(prefix, 0).join(decode_rows(prefix, drafts, anchors, draft_len))
    matrix = dense(rows, rows)
    clean = (~rows.is_mask).nonzero().flatten()
    for query in rows.is_mask.nonzero().flatten():
        seen = clean[matrix[query, clean]]
        assert (rows.position[seen] < rows.position[query]).all()
        assert len(seen) == rows.anchor[query]


@pytest.mark.parametrize("lengths", [[1], [5], [1, 1, 1], [3, 1, 4], [2, 6]])
def test_labels(lengths: list[int]) -> None:
    """Clean rows: the next token. Mask rows: their own. None where the document has none."""
    total = sum(lengths)
    ids = torch.arange(100, 100 + total)
    document = torch.tensor(documents(lengths, [7 + 2 * i for i in range(len(lengths))]))
    clean, mask = training_labels(ids.unsqueeze(0), document.unsqueeze(0))
    expected_clean, expected_mask = [], []
    index = 0
    for length in lengths:
        for position in range(length):
            last, first = position == length - 1, position == 0
            expected_clean.append(-100 if last else int(ids[index + 1]))
            expected_mask.append(-100 if first else int(ids[index]))
            index += 1
    assert clean.tolist() == [expected_clean]
    assert mask.tolist() == [expected_mask]
    assert IGNORE == -100
    assert (clean != IGNORE).sum() == (mask != IGNORE).sum() == total - len(lengths)


def test_labels_of_a_batch_are_those_of_its_rows() -> None:
    ids = torch.randint(0, 50, (3, 8), generator=torch.Generator().manual_seed(0))
    document = torch.tensor([[0] * 8, [0, 0, 1, 1, 1, 2, 2, 2], [4, 5, 5, 5, 5, 5, 5, 9]])
    both = training_labels(ids, document)
    for row in range(3):
        alone = training_labels(ids[row : row + 1], document[row : row + 1])
        for whole, own in zip(both, alone, strict=True):
            assert torch.equal(whole[row : row + 1], own)


def test_schedule() -> None:
    assert Schedule(1, ()) == AUTOREGRESSIVE
    assert not AUTOREGRESSIVE.drafts
    assert Schedule(2, ()).drafts
    assert dense_schedule(4) == Schedule(4, (1, 2, 3, 4)) == Schedule.parse(4, "dense")
    assert Schedule.parse(8, "single") == Schedule(8, (1,))
    assert Schedule.parse(8, "none") == Schedule(8, ())
    assert Schedule.parse(8, "4, 1,2,8") == Schedule(8, (1, 2, 4, 8))


def test_two_forward() -> None:
    """Halves take turns; whatever left spans' drafts is followed by the half that verifies."""
    assert Schedule.parse(1, "two-forward") == two_forward(1) == AUTOREGRESSIVE
    both = Schedule.parse(4, "two-forward")
    verify, draft = both.steps
    assert both == verify == two_forward(4)
    assert both.drafts
    assert [verify.draft_rows, draft.draft_rows] == [4, 1]
    assert [verify.anchors(n) for n in (1, 4)] == [(), ()]
    assert draft.anchors(1) == (1,)
    for each in (verify, draft):
        assert each.steps == (verify, draft)
        assert each.after(None) == draft  # a prefill drafts
        assert each.after(draft) == each.after(dense_schedule(8)) == verify
        assert each.after(verify) == each.after(AUTOREGRESSIVE) == draft
    for other in (AUTOREGRESSIVE, dense_schedule(4), Schedule(4, ())):
        assert other.steps == (other,)
        assert other.draft_rows == other.draft_len
        for last in (None, verify, draft):
            assert other.after(last) == other
    tail = build_tail(draft.draft_rows, draft.anchors(1), 4)
    assert tail.offsets.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("draft_len", "span_set"),
    [(0, ()), (-3, ()), (4, (0,)), (4, (5,)), (4, (2, 1)), (4, (1, 1)), (1, (2,))],
)
def test_schedule_refuses(draft_len: int, span_set: tuple[int, ...]) -> None:
    with pytest.raises(TidarError, match=r"draft_len|span set"):
        Schedule(draft_len, span_set)


@pytest.mark.parametrize("text", ["", "all", "1;2", "1,x", "0,1", "1,9"])
def test_schedule_parse_refuses(text: str) -> None:
    with pytest.raises(TidarError, match="span set"):
        Schedule.parse(8, text)


def test_which_spans_run_and_serve() -> None:
    """A ∩ 1..L, or {1} where that is empty; then the nearest anchor up to the accept count."""
    assert spans_for((1, 2, 4, 8), 8) == (1, 2, 4, 8)
    assert spans_for((1, 2, 4, 8), 3) == (1, 2)
    assert spans_for((), 5) == (1,)
    assert spans_for((4, 6), 3) == (1,)
    assert [nearest_anchor((1, 2, 4), n) for n in range(1, 7)] == [1, 2, 2, 4, 4, 4]
    assert [nearest_anchor((3,), n) for n in range(1, 5)] == [0, 0, 3, 3]
    assert nearest_anchor((), 3) == 0


def test_clean_id() -> None:
    assert CLEAN == -1
