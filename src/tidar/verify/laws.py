"""The laws, one function each: it checks a `Subject` and fills in a `Finding`.

The numbers are those of CONTRIBUTING.md. Law 4 (rejection sampling, by enumeration) and law 9
(training) are not about one checkpoint, and law 10 about a fast path: those are in the test suite.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tidar.attention import dense_attend
from tidar.cache import KVCache
from tidar.decode.compare import causal_logits
from tidar.decode.reference import generate_reference
from tidar.layout import (
    AUTOREGRESSIVE,
    Rows,
    build_tail,
    decode_rows,
    dense,
    dense_schedule,
    mask_mod,
    training_rows,
)
from tidar.layout import (
    clean_rows as clean_layout,
)
from tidar.methods import Draft, Pending
from tidar.model import Transformer
from tidar.sampling import SamplingParams
from tidar.verify.subject import Finding, Scripted, Subject, decode, request_of


def rule(subject: Subject, finding: Finding) -> None:
    """Law 1: the forms of the visibility rule, and the cached attention against the dense one."""
    forms = 0
    for draft_len in range(1, 6):
        for offset in range(draft_len):
            document = torch.tensor([[0] * 5 + [1] * 7])
            rows = training_rows(document, torch.tensor([draft_len]), torch.tensor([offset]))
            matrix, form = dense(rows, rows)[0], mask_mod(rows)
            size = torch.arange(len(rows))
            zero = torch.zeros((), dtype=torch.int64)
            if not torch.equal(form(zero, zero, size[:, None], size[None, :]), matrix):
                finding.fail(f"FlexAttention form differs at K = {draft_len}, offset {offset}")
            first = rows.apply(lambda attribute: attribute[0])
            late = ~first.is_mask & (first.position >= first.position[:, None])
            if (matrix & late & first.is_mask[:, None]).any():
                finding.fail(f"a mask row sees its own or a later token at K = {draft_len}")
            forms += 1
        for drafts in range(1, draft_len + 1):
            tail = build_tail(drafts, tuple(range(1, drafts + 1)), draft_len)
            behind = decode_rows(3, drafts, range(1, drafts + 1), draft_len)
            if not torch.equal(dense(behind, behind), tail.matrix):
                finding.fail(f"tail matrix differs at K = {draft_len}, {drafts} drafts")
            forms += 1
    finding.checked = f"{forms} layouts, element by element"


def attention(subject: Subject, finding: Finding) -> None:
    """Law 10: attention over the cache against the dense form, prefixes equal and unequal."""
    config, weight = subject.model.config, subject.model.embed.weight
    generator = torch.Generator().manual_seed(0)

    def random(heads: int, count: int) -> Tensor:
        shape = (2, heads, count, config.head_dim)
        return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)

    steps = 0
    for draft_len in (1, 4):
        tail = build_tail(draft_len, tuple(range(1, draft_len + 1)), draft_len)
        for lengths in ([6, 6], [2, 7]):
            cache = KVCache(config, 2, device=weight.device, dtype=weight.dtype)
            total = max(lengths) + len(tail)
            q = random(config.num_heads, len(tail))
            k, v = random(config.num_kv_heads, total), random(config.num_kv_heads, total)
            cache.reserve(total)
            cache.keys[0][:, :, :total], cache.values[0][:, :, :total] = k, v
            cache.lengths = list(lengths)
            places = [slice(n, n + len(tail)) for n in lengths]
            new = [torch.stack([t[b, :, at] for b, at in enumerate(places)]) for t in (k, v)]
            got = cache.attend(0, 2, tail.matrix)(0, q, *new)
            for b, at in enumerate(places):
                mask = tail.matrix.new_zeros(len(tail), total)
                mask[:, : lengths[b]] = True
                mask[:, at] = tail.matrix
                alone = (each[b : b + 1] for each in (q, k, v))
                expected = dense_attend(mask.to(weight.device))(0, *alone)
                finding.floats(got[b : b + 1], expected, subject.tolerance)
                steps += 1
    finding.checked = f"{steps} steps behind a filled cache, alone and ragged"


def clean_rows(subject: Subject, finding: Finding) -> None:
    """Law 2: mask rows change no clean logit, on real text."""
    passes = 0
    for prompt, params in subject.cases():
        ids = [*prompt, *subject.text(prompt, params)][: subject.model.config.max_positions]
        expected = causal_logits(subject.model, ids)
        for draft_len in sorted({s.draft_len for s in subject.schedules}):
            for offset in {0, draft_len - 1}:
                rows = _training(len(ids), draft_len, offset)
                got = _dense_logits(subject, rows, ids)[: len(ids)]
                finding.floats(got, expected, subject.tolerance)
                passes += 1
    finding.checked = f"{passes} training layouts of real and decoded text"


def identity(subject: Subject, finding: Finding) -> None:
    """Law 3: engine against plain AR."""
    texts = 0
    for schedule in subject.schedules:
        engine = subject.engine(schedule)
        for prompt, params in subject.cases():
            [got] = decode(engine, [request_of(subject, prompt, params)])
            what = f"K = {schedule.draft_len}, spans {schedule.half or schedule.span_set}"
            subject.compare(finding, prompt, params, subject.text(prompt, params), got, what)
            texts += 1
    finding.checked = f"{texts} texts, {len(subject.schedules)} schedules, {finding.tokens} tokens"


def scripted(subject: Subject, finding: Finding) -> None:
    """Law 3 with drafts that force every accept count."""
    counts: set[tuple[int, int]] = set()
    for schedule in subject.schedules:
        for prompt, params in subject.cases():
            expected = subject.text(prompt, params)
            engine = subject.engine(schedule)
            vocab = subject.model.config.vocab_size
            engine.method = Scripted(engine.method, [*prompt, *expected], schedule.draft_len, vocab)
            got: list[int] = []
            for event in engine.run([request_of(subject, prompt, params)]):
                got += event.ids
                if not event.prefill:
                    counts.add((schedule.draft_len, event.accepted))
            what = f"scripted, K = {schedule.draft_len}, spans {schedule.half or schedule.span_set}"
            subject.compare(finding, prompt, params, expected, got, what)
    finding.checked = f"{len(counts)} pairs of K and accept count, {finding.tokens} tokens"


def reference(subject: Subject, finding: Finding) -> None:
    """Law 3: engine against the reference decoder, the specification without cache."""
    if subject.model.embed.weight.device.type != "cpu":
        finding.skip("the reference decoder runs on the CPU")
        return
    count = min(12, subject.max_new_tokens)
    for schedule in subject.schedules:
        engine = subject.engine(schedule)
        for prompt, params in subject.cases():
            wanted = generate_reference(
                subject.model, prompt, max_new_tokens=count, schedule=schedule, params=params
            ).ids
            request = replace(request_of(subject, prompt, params), max_new_tokens=count)
            [got] = decode(engine, [request])
            subject.compare(finding, prompt, params, wanted, got, f"K = {schedule.draft_len}")
    finding.checked = f"{finding.tokens} tokens, {len(subject.schedules)} schedules"


def batch(subject: Subject, finding: Finding) -> None:
    """Law 3: a batch writes what each request writes alone."""
    cases = list(subject.cases())
    for schedule in (*subject.schedules[:2], AUTOREGRESSIVE):
        if schedule.drafts and subject.mask is None:
            continue
        for order in (cases, cases[::-1]):
            engine = subject.engine(schedule, max_batch=3)
            texts = decode(engine, [request_of(subject, *case) for case in order])
            for (prompt, params), got in zip(order, texts, strict=True):
                expected = subject.text(prompt, params)
                subject.compare(finding, prompt, params, expected, got, "batch of 3")
    finding.checked = f"{finding.tokens} tokens in ragged batches of 3"


def cache(subject: Subject, finding: Finding) -> None:
    """Law 5: keys and values after decoding are those of a pass from scratch."""
    histories = 0
    for schedule in (*subject.schedules, AUTOREGRESSIVE):
        if schedule.drafts and subject.mask is None:
            continue
        prompt, params = subject.prompts[0], subject.params[0]
        engine, text = subject.engine(schedule), subject.text(prompt, params)
        if schedule.drafts:
            vocab = subject.model.config.vocab_size
            engine.method = Scripted(engine.method, [*prompt, *text], schedule.draft_len, vocab)
        ids = list(prompt)
        kept: tuple[list[int], tuple[Tensor, Tensor]] | None = None
        for event in engine.run([request_of(subject, prompt, params)]):
            ids += event.ids
            if engine.running:
                kept = list(ids[:-1]), engine.cache.entries(0)
        if kept is not None:
            committed, got = kept
            for mine, scratch in zip(got, _keys_values(subject.model, committed), strict=True):
                if mine.shape != scratch.shape:
                    finding.fail(f"the cache holds {mine.shape[2]} tokens, not {len(committed)}")
                else:
                    finding.floats(mine, scratch, subject.tolerance)
            histories += 1
    finding.checked = f"{histories} decoding histories, all layers"


def ar(subject: Subject, finding: Finding) -> None:
    """Law 6: K = 1 is AR."""
    engine = subject.engine(AUTOREGRESSIVE)
    for prompt, params in subject.cases():
        [got] = decode(engine, [request_of(subject, prompt, params)])
        subject.compare(finding, prompt, params, subject.text(prompt, params), got, "K = 1")
    finding.checked = f"{finding.tokens} tokens against a loop without cache"


def parity(subject: Subject, finding: Finding) -> None:
    """Law 7: span logits in training equal those of a decode step."""
    spans = 0
    for prompt, params in subject.cases():
        text = [*prompt, *subject.text(prompt, params)]
        for draft_len in sorted({s.draft_len for s in subject.schedules}):
            for offset in {0, draft_len // 2}:
                # The last whole span of the grid, drafted from every number of accepted tokens.
                anchor = offset + (len(text) - draft_len - offset) // draft_len * draft_len
                if anchor < draft_len + 1 or anchor + draft_len > len(text):
                    continue
                rows = _training(len(text), draft_len, offset)
                training = _dense_logits(subject, rows, text)
                mine = training[rows.is_mask & (rows.anchor == anchor)]
                for accepted in {1, draft_len}:
                    step = _step_logits(subject, text, anchor - accepted, draft_len, accepted)
                    finding.floats(step, mine, subject.tolerance)
                    spans += 1
    finding.checked = f"{spans} spans, training layout against a step behind the cache"


def transformers(subject: Subject, finding: Finding) -> None:
    """Law 8: the folder opens in `transformers` with equal logits."""
    if subject.folder is None:
        finding.skip("no folder")
        return
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        other = AutoModelForCausalLM.from_pretrained(
            str(subject.folder), dtype=subject.model.embed.weight.dtype, trust_remote_code=False
        )
    except ImportError as error:
        finding.skip(f"transformers cannot be used: {error}")
        return
    except Exception as error:  # whatever its loaders raise, the folder did not open
        finding.fail(f"transformers cannot open it: {str(error).splitlines()[0]}")
        return
    network: nn.Module = other.eval()
    network.to(subject.model.embed.weight.device)
    for prompt in subject.prompts:
        tokens = torch.tensor([prompt], device=subject.model.embed.weight.device)
        with torch.inference_mode():
            expected = network(tokens).logits[0]
        got = causal_logits(subject.model, prompt)
        if subject.mask is not None:  # the one logit that decoding never uses
            expected, got = expected.clone(), got.clone()
            expected[:, subject.mask] = got[:, subject.mask] = 0.0
        finding.floats(got, expected, subject.tolerance)
    finding.checked = f"{sum(map(len, subject.prompts))} rows of logits ({type(other).__name__})"


@dataclass(frozen=True, slots=True)
class Law:
    """One law: its number in CONTRIBUTING.md, its claim, and the check of it."""

    number: str
    claim: str
    check: Callable[[Subject, Finding], None]
    needs_mask: bool = False


LAWS = (
    Law("1", "all forms of the attention mask agree, and no mask row sees its own token", rule),
    Law("10", "attention over the cache equals the dense form of the mask", attention),
    Law("2", "adding mask rows changes no logit of the causal model", clean_rows, needs_mask=True),
    Law(
        "3",
        "the text is plain AR's, token for token: greedy and with shared noise",
        identity,
        needs_mask=True,
    ),
    Law(
        "3",
        "the same with drafts that force every accept count from 1 to K",
        scripted,
        needs_mask=True,
    ),
    Law(
        "3",
        "the cached engine writes what the reference decoder writes",
        reference,
        needs_mask=True,
    ),
    Law("3", "in a batch every text is what it is alone, in any order", batch),
    Law("5", "after any accepts the cache is what a pass from scratch gives", cache),
    Law("6", "a draft length of 1 is plain AR decoding", ar),
    Law("7", "mask rows say in decoding what they say in training", parity, needs_mask=True),
    Law("8", "the folder opens in transformers, unmodified, with equal logits", transformers),
)


def run_laws(subject: Subject, on_law: Callable[[str], None] = lambda claim: None) -> list[Finding]:
    """All laws in order; those about drafting are skipped for a model without a mask token."""
    findings = []
    for law in LAWS:
        on_law(law.claim)
        finding = Finding(law.number, law.claim)
        if subject.mask is None and law.needs_mask:
            finding.skip('no "tidar" entry: it decodes as AR only')
        else:
            law.check(subject, finding)
        findings.append(finding)
    return findings


def _training(length: int, draft_len: int, offset: int) -> Rows:
    document = torch.zeros(1, length, dtype=torch.int64)
    rows = training_rows(document, torch.tensor([draft_len]), torch.tensor([offset]))
    return rows.apply(lambda attribute: attribute[0])


@torch.inference_mode()
def _dense_logits(subject: Subject, rows: Rows, clean: Sequence[int]) -> Tensor:
    """Logits of all rows under the dense mask; `clean`: tokens of the clean rows, the first."""
    assert subject.mask is not None
    device = subject.model.embed.weight.device
    ids = torch.tensor([[*clean, *[subject.mask] * (len(rows) - len(clean))]], device=device)
    attend = dense_attend(dense(rows, rows).to(device))
    hidden = subject.model(ids, rows.position.unsqueeze(0).to(device), attend)
    return subject.model.logits(hidden[0])


@torch.inference_mode()
def _step_logits(
    subject: Subject, text: Sequence[int], prefix: int, draft_len: int, accepted: int
) -> Tensor:
    """Logits of the span with anchor prefix + accepted in a decode step behind a filled cache."""
    model = subject.model
    weight = model.embed.weight
    cache = KVCache(model.config, 1, device=weight.device, dtype=weight.dtype)
    tokens = torch.tensor([list(text[:prefix])], device=weight.device)
    causal = dense(clean_layout(prefix), clean_layout(prefix))
    model(tokens, torch.arange(prefix, device=weight.device)[None], cache.attend(0, 1, causal))
    cache.commit(0, prefix)
    draft = Draft(tuple(text[prefix : prefix + draft_len]))
    limit = prefix + 3 * draft_len
    pending = Pending(prefix, draft, limit, SamplingParams(), lambda probs: 0)
    method = subject.make_method(subject.mask or 0)
    step = method.step([pending], dense_schedule(draft_len))
    attend = cache.attend(0, 1, step.visible)
    hidden = model(step.ids.to(weight.device), step.positions.to(weight.device), attend)
    first = step.tail.span_start(accepted)
    return model.logits(hidden[0, first : first + draft_len])


@torch.inference_mode()
def _keys_values(model: Transformer, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Keys and values `[layers, num_kv_heads, N, head_dim]` of a plain causal pass."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    causal = dense_attend(is_causal=True)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor:
        keys.append(k[0])
        values.append(v[0])
        return causal(layer, q, k, v)

    device = model.embed.weight.device
    tokens = torch.tensor([list(ids)], device=device)
    model(tokens, torch.arange(len(ids), device=device)[None], attend)
    return torch.stack(keys), torch.stack(values)
