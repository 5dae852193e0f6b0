"""Steps that look at probabilities and not only at choices: rejection sampling, beta, teacher forcing.

Sequences of one step may differ: each is verified by its own rule. It is the step of `tidar.decode.slots`
with another verdict and another draft, in PyTorch on every device; like that one it can be captured.
"""

from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from tidar.decode.rejection import chances, distributions, one_hot, residual
from tidar.decode.rules import COMPARING, FREE, Rule, SlotRules
from tidar.decode.slots import Stepper, count_passed, gather_rows
from tidar.sampling import BYTES_PER_LOGIT, CHOOSING_BYTES, RowParams, choose_rows, process_rows

BYTES_PER_WEIGHED_LOGIT = BYTES_PER_LOGIT + 16
"""What a step holds for a logit at a time: it chooses, and keeps the distributions of both sides."""

PROJECTING_BYTES = 128 << 20
"""Memory that logits take at most, or what those of one sequence need where that is more."""


def mixture(causal: Tensor, masked: Tensor, betas: Tensor, covered: Tensor) -> Tensor:
    """beta * causal + (1 - beta) * mask logits `[B, N, V]` where a span covers the row (`covered` `[B, N]`).

    betas: `[B]`. The mask token stays at -inf, which 0 times it would not be.
    """
    weight = betas.to(causal.dtype).view(-1, 1, 1)
    mixed = weight * causal + (1 - weight) * masked
    mixes = covered & (betas != 1.0).unsqueeze(1)
    return torch.where(mixes.unsqueeze(-1) & ~causal.isneginf(), mixed, causal)


@dataclass(frozen=True)
class WeighedStepper(Stepper):
    """`Stepper` for batches in which some do more than compare. rule: what all of them need together.

    For each sequence it holds several `[K, V]`, in float32 and int64, which the choosing kernels of the fast path
    never need. With a large vocabulary those of a whole batch would be gigabytes, so a few are weighed at a time.
    Logits, which are small beside that, are made for as many as possible: each time reads all of the vocabulary.
    """

    rule: Rule = COMPARING

    def projects_all(self, batch: int) -> bool:
        """Never: logits of rows that are not asked for would have to be kept, not only their choices."""
        return False

    @property
    def rules(self) -> SlotRules:
        assert self.slots.rules is not None, "made when the request was submitted"
        return self.slots.rules

    def _verify(
        self, hidden: Tensor, chosen: Tensor, prefix: Tensor, drafts: Tensor, lens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Stepper`."""
        shape, real = self.shape, self.shape.tail.num_drafts
        found = []
        both = self.rule.mixes and bool(shape.anchors)
        for group in self._groups(len(chosen), real, copies=2 if both else 1):
            logits = self.logits(hidden[group, :real])
            masked = covered = None
            if both:
                ends = shape.counting[:real] + 1
                anchors = shape.choice_of_anchor[lens[group].unsqueeze(1), ends]
                twins = shape.first_row[anchors] + ends - anchors
                # Rows behind a draft's end have no anchor either, and are never asked.
                twins = twins.clamp(max=len(shape.tail) - 1)
                masked, covered = self.logits(gather_rows(hidden[group], twins)), anchors > 0
            for inner, part in self._parts(group, real):
                some = logits[inner]
                if masked is not None and covered is not None:
                    betas = self.rules.betas[chosen[part]]
                    some = mixture(some, masked[inner], betas, covered[inner])
                given = prefix[part].long(), drafts[part, :real], lens[part]
                found.append(self.judge(some, chosen[part], *given))
        verdicts, accepted = zip(*found, strict=True)
        return torch.cat(verdicts), torch.cat(accepted)

    def _groups(self, batch: int, rows: int, *, copies: int = 1) -> list[slice]:
        """The sequences, `rows` rows of each, as many at a time as may have their logits at once.

        Reckoned in float32; copies: of logits, clean and masked.
        """
        one = copies * self.rules.dtype.itemsize * rows * self.rules.config.vocab_size
        return _even(0, batch, PROJECTING_BYTES // one)

    def _parts(self, group: slice, rows: int) -> list[tuple[slice, slice]]:
        """The sequences of a group, as many at a time as may be weighed at once: within it, and of all."""
        one = BYTES_PER_WEIGHED_LOGIT * rows * self.rules.config.vocab_size
        first, last = group.start, group.stop
        parts = _even(first, last, CHOOSING_BYTES // one)
        return [(slice(part.start - first, part.stop - first), part) for part in parts]

    def judge(
        self, logits: Tensor, chosen: Tensor, prefix: Tensor, drafts: Tensor, lens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What `_verify` returns, from the draft rows' logits `[B, N, V]` for positions `prefix + 1 ..`."""
        count = logits.shape[1]
        places = prefix.unsqueeze(1) + 1 + torch.arange(count, device=logits.device)
        params = self.slots.params(chosen, count, filtered=self.filtered)
        verdicts = drafts
        if self.rule.compares:
            flat = logits.flatten(0, 1)
            verdicts = choose_rows(flat, params, places.flatten()).view(-1, count)
        if self.rule.forced:
            assert self.rules.forced is not None
            known = places.clamp(max=self.rules.forced.shape[1] - 1)
            given = self.rules.forced[chosen].gather(1, known)
            verdicts = torch.where(given == FREE, verdicts, given)
        same = drafts[:, 1:] == verdicts[:, :-1]
        if not self.rule.rejects:
            inside = torch.arange(1, count, device=lens.device) < lens.unsqueeze(1)
            return verdicts, count_passed(same, inside)
        return self._reject(logits, params, chosen, places, drafts, lens, verdicts, same)

    def _reject(
        self,
        logits: Tensor,
        params: RowParams,
        chosen: Tensor,
        places: Tensor,
        drafts: Tensor,
        lens: Tensor,
        verdicts: Tensor,
        same: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`judge` where some sequences reject; those that do not keep their `verdicts` and `same`."""
        count, seeds = logits.shape[1], self.slots.seeds[chosen]
        scaled = process_rows(logits.flatten(0, 1), params)
        target = distributions(scaled, logits.dtype).view(logits.shape)
        rejects = self.rules.rejects[chosen].unsqueeze(1)
        accepted = torch.ones_like(lens)
        if count > 1:
            assert self.rules.probs is not None
            probs = self.rules.probs[chosen, : count - 1]
            inside = torch.arange(1, count, device=lens.device) < lens.unsqueeze(1)
            chance = chances(target[:, :-1], probs, drafts[:, 1:])
            chance = torch.where(inside & rejects, chance, 0.0)
            passed = self.draws.passes(chance, seeds, places[:, :-1])
            accepted = count_passed(torch.where(rejects, passed, same), inside)
        # Only the row at which the draft ends has a token to give.
        last = accepted.unsqueeze(1) - 1
        weights = _row(target, last)
        if count > 1:
            rest = residual(weights, _row(probs, last.clamp(max=count - 2)))
            weights = torch.where((accepted < lens).unsqueeze(1), rest, weights)
        token = self.draws.picks(weights.unsqueeze(1), seeds, places.gather(1, last), "token")
        token = torch.where(rejects, token, verdicts.gather(1, last))
        return verdicts.scatter(1, last, token), accepted

    def _draft(
        self,
        hidden: Tensor,
        verdicts: Tensor,
        chosen: Tensor,
        prefix: Tensor,
        anchor: Tensor,
        shift: Tensor,
    ) -> Tensor:
        """See `Stepper`."""
        if not self.rule.rejects or self.shape.schedule.draft_len == 1:
            return Stepper._draft(self, hidden, verdicts, chosen, prefix, anchor, shift)
        rows, predicts = self._drafting_rows(anchor, shift)
        places, drafting = prefix.long().unsqueeze(1) + predicts, gather_rows(hidden, rows)
        found = []
        for group in self._groups(len(chosen), rows.shape[1]):
            logits = self.logits(drafting[group])
            found += [
                self.propose(logits[inner], chosen[part], places[part])
                for inner, part in self._parts(group, rows.shape[1])
            ]
        return torch.cat(found)

    def propose(self, logits: Tensor, chosen: Tensor, places: Tensor) -> Tensor:
        """Draft tokens `[B, N]` from a span's logits `[B, N, V]`; leaves what they were drawn from in the slots."""
        assert self.rules.probs is not None
        count, flat = logits.shape[1], logits.flatten(0, 1)
        params = self.slots.params(chosen, count, filtered=self.filtered)
        probs = distributions(process_rows(flat, params), logits.dtype).view(logits.shape)
        samples = self.rules.samples[chosen].view(-1, 1, 1)
        probs = torch.where(samples, probs, one_hot(logits.argmax(dim=-1), probs))
        self.rules.probs[chosen, :count] = probs
        drawn = self.draws.picks(probs, self.slots.seeds[chosen], places, "draft")
        if not self.rule.compares:
            return drawn
        own = choose_rows(flat, params, places.flatten()).view(-1, count)
        return torch.where(self.rules.rejects[chosen].unsqueeze(1), drawn, own)

    def logits(self, hidden: Tensor) -> Tensor:
        """Of rows `[B, N, hidden_size]`, `[B, N, V]`."""
        return self.backend.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


def _row(values: Tensor, index: Tensor) -> Tensor:
    """Row `index` `[B, 1]` of each of `values` `[B, N, V]`, `[B, V]`."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1])).squeeze(1)


def _even(first: int, last: int, most: int) -> list[slice]:
    """first .. last - 1 in slices of up to `most`, or of one, whose sizes differ by one at most."""
    count = -(-(last - first) // max(1, most))
    ends = [first + (last - first) * part // count for part in range(count + 1)]
    return [slice(*each) for each in pairwise(ends)]


def weighed(stepper: Stepper, rule: Rule) -> WeighedStepper:
    """The same step, fused or not, for sequences that need this rule."""
    values = {each.name: getattr(stepper, each.name) for each in fields(Stepper)}
    return WeighedStepper(**values, rule=rule)


def first_draft(
    step: WeighedStepper, hidden: Tensor, twin: Tensor | None, slot: Tensor, places: Tensor
) -> Tensor:
    """The draft `[N]` that a prefill leaves: the token behind the prompt, then those of the span's rows.

    hidden: `[1, N, hidden_size]`, the last prompt row, then the span's rows 1 ..; twin: `[1, 1, hidden_size]`,
    its row 0, which beta mixes in; None where there is no span. slot: `[1]`. places: `[N]`, what they predict.
    """
    logits = step.logits(hidden)
    head = logits[:, :1]
    if step.rule.mixes and twin is not None:
        covered = torch.ones_like(slot, dtype=torch.bool).unsqueeze(1)
        head = mixture(head, step.logits(twin), step.rules.betas[slot], covered)
    nothing, one = torch.zeros_like(slot).unsqueeze(1), torch.ones_like(slot)
    first, _ = step.judge(head, slot, places[:1] - 1, nothing, one)
    if len(places) == 1:
        return first[0]
    if step.rule.rejects:
        later = step.propose(logits[:, 1:], slot, places[1:].unsqueeze(0))
    else:
        params = step.slots.params(slot, len(places) - 1, filtered=step.filtered)
        later = choose_rows(logits[0, 1:], params, places[1:]).unsqueeze(0)
    return torch.cat((first, later), dim=1)[0]
