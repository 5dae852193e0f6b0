"""The specification: TiDAR decoding of one sequence, with no cache and a dense mask.

Written to be read beside arXiv 2511.08923, section 3.2. Every step runs the model over all committed
tokens, the draft and the spans, with the mask straight from the visibility rule. The engine must emit the
same tokens (law 3). Slow by design.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tidar.attention import dense_attend
from tidar.layout import Rows, Schedule, decode_rows, dense, nearest_anchor, prefill_rows
from tidar.model import Transformer
from tidar.sampling import (
    Draw,
    SamplingParams,
    choose,
    count_matches,
    probabilities,
    reject,
    seeded_draw,
)


@dataclass(slots=True)
class ReferenceOutput:
    """ids: the new tokens. accepts: how many tokens each decode step committed."""

    ids: list[int] = field(default_factory=list)
    accepts: list[int] = field(default_factory=list)


class ReferenceDecoder:
    """One sequence being decoded; `generate_reference` drives it."""

    def __init__(
        self,
        model: Transformer,
        schedule: Schedule,
        params: SamplingParams,
        draw: Draw,
        beta: float,
    ) -> None:
        mask = model.config.mask_token_id
        assert mask is not None
        self.model, self.schedule, self.params, self.draw = model, schedule, params, draw
        self.beta, self.mask, self.limit = beta, mask, model.config.max_positions

    def logits(self, rows: Rows, clean: Sequence[int]) -> Tensor:
        """Logits `[N, V]` of all rows; `clean` holds the tokens of the clean rows, which come first."""
        ids = list(clean) + [self.mask] * (len(rows) - len(clean))
        attend = dense_attend(dense(rows, rows))
        hidden = self.model(torch.tensor([ids]), rows.position.unsqueeze(0), attend)
        return self.model.logits(hidden[0])

    def verify(
        self, rows: Rows, logits: Tensor, start: int, draft: Sequence[int], probs: Tensor | None
    ) -> tuple[int, int]:
        """How many tokens of a draft that starts at row `start` commit, and the token after them."""
        causal = logits[start : start + len(draft)].clone()
        if self.beta != 1.0:
            for i in range(len(draft)):
                at = (rows.position == start + i + 1) & rows.is_mask
                if (
                    at.any()
                ):  # of the spans that cover the position, the one with the nearest anchor
                    nearest = int(torch.where(at, rows.anchor, -1).argmax())
                    causal[i] = self.beta * causal[i] + (1 - self.beta) * logits[nearest]
                    causal[i, self.mask] = -torch.inf
        if self.params.rejects:
            return reject(draft, probs, probabilities(causal, self.params), self.draw)
        positions = torch.arange(start + 1, start + len(draft) + 1)
        choices = choose(causal, self.params, positions).tolist()
        accepted = count_matches(draft, choices)
        return accepted, choices[accepted - 1]

    def propose(
        self, rows: Rows, logits: Tensor, anchor: int, first: int
    ) -> tuple[list[int], Tensor | None]:
        """Draft tokens for positions `first`, ... from the span with this anchor."""
        chosen = rows.is_mask & (rows.anchor == anchor) & (rows.position >= first)
        positions, logits = rows.position[chosen], logits[chosen]
        if self.params.rejects and self.params.draft == "sample":
            probs = probabilities(logits, self.params)
            return [self.draw(row) for row in probs], probs
        if self.params.rejects:
            return logits.argmax(dim=-1).tolist(), None
        return choose(logits, self.params, positions).tolist(), None


@torch.inference_mode()
def generate_reference(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    schedule: Schedule,
    params: SamplingParams,
    eos_ids: frozenset[int] = frozenset(),
    beta: float = 1.0,
    draw: Draw | None = None,
) -> ReferenceOutput:
    """Decodes one prompt. Stops after an end-of-text token, `max_new_tokens`, or the context's end."""
    decoder = ReferenceDecoder(model, schedule, params, draw or seeded_draw(params.seed), beta)
    out, clean = ReferenceOutput(), list(prompt)

    def emit(tokens: Sequence[int]) -> bool:
        for token in tokens:
            out.ids.append(token)
            if token in eos_ids or len(out.ids) == max_new_tokens:
                return True
        return False

    # Prefill: the prompt and one span with its anchor at the prompt's end.
    span_len = schedule.draft_len if schedule.drafts else 0
    rows = prefill_rows(len(clean), span_len, limit=decoder.limit)
    logits = decoder.logits(rows, clean)
    _, token = decoder.verify(rows, logits, len(clean) - 1, clean[-1:], None)
    later, probs = decoder.propose(rows, logits, len(clean), len(clean) + 1)
    draft, done = [token, *later], emit([token])

    schedule = schedule.after(None)  # that was a prefill
    while not done and len(clean) < decoder.limit:
        schedule = schedule.after(schedule)
        length = min(schedule.draft_rows, decoder.limit - len(clean), max_new_tokens - len(out.ids))
        draft = draft[:length]
        anchors = schedule.anchors(len(draft))
        prefix = prefill_rows(len(clean), 0)
        step = decode_rows(len(clean), len(draft), anchors, schedule.draft_len, limit=decoder.limit)
        rows = prefix.join(step)
        logits = decoder.logits(rows, clean + draft)
        n, token = decoder.verify(rows, logits, len(clean), draft, probs)
        done = emit([*draft[1:n], token])
        out.accepts.append(n)
        anchor = nearest_anchor(anchors, n)
        start = len(clean)
        clean += draft[:n]
        later, probs = [], None
        if anchor:
            later, probs = decoder.propose(rows, logits, start + anchor, len(clean) + 1)
        draft = [token, *later]
    return out
