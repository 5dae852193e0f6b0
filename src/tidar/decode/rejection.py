"""Rejection sampling as tensor arithmetic: `tidar.sampling.reject` for whole batches, asking the host nothing.

A draft token d, drawn from q, passes with chance min(1, p(d) / q(d)); after the first that does not, the
token comes from max(p - q, 0); where all passed, from the next row's p. An arg-max draft was drawn from a
one-hot q. Randomness is an argument (`Draws`), so that a test can walk every branch.

Shapes: B sequences, N tokens of each, V vocabulary entries. Probabilities are float32; float64 where the
network is, which is how the law is tested.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tidar.sampling import gumbel_noise, mix

Purpose = Literal["draft", "token"]
"""What a number is drawn for: a draft token, or the token that the causal model has the last word on."""

_ACCEPT_SALT = 0x6A09E667F3BCC909
_DRAFT_SALT = 0x3C6EF372FE94F82B
_PLACE = 0x9E3779B97F4A7C15 - 2**64  # as the signed integer that torch stores


class Draws(Protocol):
    """Where chance comes from. seeds: int64 `[B]`; places: int64 `[B, N]`, the positions decided about."""

    def passes(self, chances: Tensor, seeds: Tensor, places: Tensor) -> Tensor:
        """Whether draft tokens pass, bool `[B, N]`, each with its chance `[B, N]`.

        Those behind the first that does not pass are of no use, and need no answer.
        """
        ...

    def picks(self, weights: Tensor, seeds: Tensor, places: Tensor, purpose: Purpose) -> Tensor:
        """Tokens `[B, N]` drawn in proportion to `weights` `[B, N, V]`."""
        ...


@dataclass(frozen=True, slots=True)
class HashDraws:
    """Numbers that are a fixed function of (seed, position, purpose): nothing to keep, nothing to restore.

    One number for each is enough. A position is decided once, by one test and at most one token drawn
    behind it; a position may be drafted several times, but all drafts of it but the last were dropped
    unseen, with nothing depending on them. Tokens share the noise of shared-noise sampling, so at K = 1
    both ways to sample write one text.
    """

    def passes(self, chances: Tensor, seeds: Tensor, places: Tensor) -> Tensor:
        own = mix(seeds ^ _ACCEPT_SALT).unsqueeze(1)
        bits = mix(mix(own + places * _PLACE))
        return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53 < chances

    def picks(self, weights: Tensor, seeds: Tensor, places: Tensor, purpose: Purpose) -> Tensor:
        own = seeds if purpose == "token" else mix(seeds ^ _DRAFT_SALT)
        each = own.unsqueeze(1).expand_as(places).flatten()
        noise = gumbel_noise(each, places.flatten(), weights.shape[-1])
        return (weights.log() + noise.view(weights.shape)).argmax(dim=-1)


BY_HASH = HashDraws()


def distributions(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    """Probabilities of processed logits `[..., V]`; dtype: of the logits before they were processed."""
    return scaled.softmax(dim=-1, dtype=torch.promote_types(dtype, torch.float32))


def one_hot(tokens: Tensor, like: Tensor) -> Tensor:
    """The distributions `[..., V]` of tokens `[...]` that were not drawn; like: gives V, dtype and device."""
    return torch.zeros_like(like).scatter(-1, tokens.unsqueeze(-1), 1.0)


def chances(target: Tensor, draft_probs: Tensor, tokens: Tensor) -> Tensor:
    """min(1, p / q) of draft tokens `[B, N]`, float64; p and q `[B, N, V]`."""
    index = tokens.unsqueeze(-1)
    p, q = (probs.gather(-1, index).squeeze(-1).double() for probs in (target, draft_probs))
    # A token that was drawn has q > 0; behind a draft's end anything may stand, but no NaN.
    return (p / q.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)


def residual(target: Tensor, draft_probs: Tensor) -> Tensor:
    """Weights `[B, V]`, max(p - q, 0), of the token in place of one that did not pass.

    Where p and q are equal but for rounding nothing would be left: then p itself.
    """
    rest = (target - draft_probs).clamp(min=0.0)
    return torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, target)
