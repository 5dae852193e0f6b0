#!/usr/bin/env python3
"""What spans would gain from a likely correction at their head: an estimate, without touching the decoder.

A span of a fused step does not know the resolved token at its anchor. Here a second kind of span stands
behind a clean row with a guess of it: the second choice of the row that drafted the token which may be
rejected there, taken in the step before. The text is known beforehand (it is AR's, whatever is drafted), so
decoding is walked through: what each span drafts comes from a forward with the rows of `layout.py`, what
is accepted from a comparison with the text. "Standard" gives the T/NFE of `tidar bench`, exactly.

    python experiments/informed_spans.py recipes/bundled/eval/python.jsonl --limit 12 --tokens 128
"""

import argparse
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

import tidar
from tidar.attention import dense_attend
from tidar.decode.engine import Engine, FixedPlan
from tidar.decode.request import Request
from tidar.layout import dense, nearest_anchor, prefill_rows, two_forward
from tidar.model import Transformer
from tidar.sampling import SamplingParams, gumbel_noise, process

K = 16
Anchors = tuple[int, ...]


@dataclass(frozen=True)
class Policy:
    """Spans of a step: those of `anchors`, and where a guess is put at the head of one.

    beside: more spans, at the accept counts `informed`, used when their guess is right. instead: every span
    has a guess, right or wrong. known: every guess is right (a bound). commits: a right guess commits, its
    row being causal, and resolves the token behind it.
    """

    anchors: Anchors
    informed: Anchors = ()
    how: Literal["beside", "instead", "known"] = "beside"
    commits: bool = False

    @property
    def rows(self) -> int:
        """Of a step with a full draft: a guess and K - 1 mask rows are as many as K mask rows."""
        return K * (1 + len(self.anchors) + (len(self.informed) if self.how == "beside" else 0))


DENSE = tuple(range(1, K + 1))
POLICIES = (
    Policy((1,)),
    Policy((1,), (1,)),
    Policy((1,), (1,), commits=True),
    Policy((1, 2)),
    Policy((1, 2, 3)),
    Policy((1, 2), (1,), commits=True),
    Policy((1, 2, 3, 4)),
    Policy((1, 2, 4, 8)),
    Policy((1, 2, 3), (1,)),
    Policy((1, 2, 3), (1,), commits=True),
    Policy((1, 2, 3, 5, 8, 16)),
    Policy((1, 2, 4, 8), (1, 2)),
    Policy((1, 2, 4, 8), (1, 2), commits=True),
    Policy(DENSE),
    Policy(DENSE, DENSE, "instead"),
    Policy(DENSE, DENSE, "known"),
    Policy(DENSE, DENSE),
    Policy(DENSE, DENSE, commits=True),
)


@dataclass
class Drafter:
    """What spans draft in one text. Mutable: remembers spans, which policies share."""

    model: Transformer
    text: list[int]
    params: SamplingParams
    memo: dict[tuple[int, int | None], list[list[int]]] = field(default_factory=dict)

    @torch.inference_mode()
    def span(self, anchor: int, guess: int | None = None) -> list[list[int]]:
        """First and second choice `[K][2]` of each row of the span behind `anchor` tokens, and a guess of the next."""
        if (anchor, guess) not in self.memo:
            clean = [*self.text[:anchor], *([] if guess is None else [guess])]
            rows = prefill_rows(len(clean), K)
            ids = torch.tensor([clean + [self.model.config.mask_token_id or 0] * K])
            attend = dense_attend(dense(rows, rows))
            hidden = self.model(ids, rows.position.unsqueeze(0), attend)[0, len(clean) :]
            scores = self.model.logits(hidden)
            if not self.params.greedy:
                places = rows.position[len(clean) :]
                noise = gumbel_noise(self.params.seed, places, scores.shape[-1])
                scores = process(scores, self.params) + noise
            self.memo[anchor, guess] = scores.topk(2).indices.tolist()
        return self.memo[anchor, guess]


def walk(drafter: Drafter, start: int, end: int, policy: Policy, count: Counter[str]) -> None:
    """Decodes the tokens behind d[0] at `start`, up to that at `end`, and counts steps, tokens, rejections."""
    text, position = drafter.text, start
    draft = drafter.span(start)[1:]  # first and second choices for the positions behind d[0]
    while position < end:
        n = 1
        while n <= len(draft) and position + n < end and draft[n - 1][0] == text[position + n]:
            n += 1
        count["steps"] += 1
        count["tokens"] += n
        if position + n >= end:
            return
        correction = text[position + n]
        guess = draft[n - 1][1] if n <= len(draft) else None  # none where all was accepted
        if guess is not None:
            count["rejected"] += 1
            count["guessed"] += guess == correction
        if policy.how == "known":
            guess = correction
        if (
            n in policy.informed
            and guess is not None
            and (guess == correction or policy.how != "beside")
        ):
            draft, commits = (
                drafter.span(position + n, guess)[: K - 1],
                policy.commits and guess == correction,
            )
            if commits:
                draft, position = draft[1:], position + 1
                count["tokens"] += 1
        else:
            anchor = nearest_anchor(policy.anchors, n)
            draft = drafter.span(position + anchor)[1 + n - anchor :]
        position += n


def show(counts: dict[Policy, Counter[str]]) -> None:
    """A line per policy."""
    for policy, count in counts.items():
        spans, informed = (
            "dense" if each == DENSE else ",".join(map(str, each))
            for each in (policy.anchors, policy.informed)
        )
        rate = count["tokens"] / count["steps"]
        told = (
            f"{informed} {policy.how}{', commits' if policy.commits else ''}"
            if informed
            else "standard"
        )
        print(
            f"{policy.rows:4} rows  spans {spans:14} {told:22} T/NFE {rate:.2f}  guess right "
            f"{count['guessed']} of {count['rejected']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prompts", type=Path, help="JSON lines with a prompt each")
    parser.add_argument("--model", help="folder; default: the bundled checkpoint")
    parser.add_argument("--limit", type=int, default=12, help="prompts")
    parser.add_argument("--tokens", type=int, default=128, help="of each text, at most")
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args()
    model = tidar.load(options.model, device="cpu", dtype="float32")
    counts = {policy: Counter[str]() for policy in POLICIES}
    lines = options.prompts.read_text(encoding="utf-8").splitlines()[: options.limit]
    for seed, line in enumerate(lines):
        prompt = model.encode(json.loads(line)["prompt"])
        params = SamplingParams(temperature=options.temperature, seed=seed)
        request = Request(
            prompt=prompt,
            max_new_tokens=options.tokens,
            params=params,
            eos_ids=model.tokenizer.eos_ids,
        )
        engine = Engine(model.network, model.method(), FixedPlan(two_forward(K)), max_batch=1)
        text = [*prompt, *(token for event in engine.run([request]) for token in event.ids)]
        drafter = Drafter(model.network, text, params)
        for policy, count in counts.items():
            walk(drafter, len(prompt), len(text) - 1, policy, count)
    show(counts)


if __name__ == "__main__":
    main()
