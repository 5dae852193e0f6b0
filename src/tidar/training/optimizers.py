"""Optimizers: AdamW, or Muon for the matrices of the layers with AdamW for everything else."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Groups = list[dict[str, Any]]


def decay_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> Groups:
    """Parameter groups with weight decay on matrices only (not on norms and biases)."""
    trained = [parameter for _, parameter in named if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    others = [parameter for parameter in trained if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """Fused AdamW."""
    return torch.optim.AdamW(
        decay_groups(named, weight_decay), lr=lr, betas=betas, eps=eps, fused=True
    )


class MuonAdamW(torch.optim.Optimizer):
    """Muon (arXiv 2502.16982's update scale) for the layers' matrices, AdamW for the rest.

    One optimizer to the outside: `param_groups` are those of both, and `state_dict` holds both, so
    schedules and resuming work. Merged projections (q, k, v; gate, up) are orthogonalised whole.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        trained = [(name, p) for name, p in named if p.requires_grad]
        inner = [p for name, p in trained if ".layer" in name and p.dim() == 2]  # a head has one
        chosen = {id(p) for p in inner}
        # Not through Optimizer.__init__: this object holds no parameters or state of its own.
        self.muon = torch.optim.Muon(
            inner, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = adamw(
            [(name, p) for name, p in trained if id(p) not in chosen],
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )
        self.defaults = {"lr": lr}

    @property
    def param_groups(self) -> Groups:  # type: ignore[override]
        return [*self.muon.param_groups, *self.adamw.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        return {**self.muon.state, **self.adamw.state}

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> Tensor | None:  # type: ignore[override]
        assert closure is None
        self.muon.step()
        self.adamw.step()
        return None

    def __repr__(self) -> str:
        return f"MuonAdamW({self.muon!r}, {self.adamw!r})"
