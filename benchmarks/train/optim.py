"""Optimizers of the proof, with parameter groups as the Trainer makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

BETAS = (0.9, 0.95)
DECAY = 0.1
#: the name of an optimizer -> how torch's Muon sizes its updates
MUON = {"muon": "match_rms_adamw", "muon-original": "original"}


class MuonAndAdamW(Optimizer):
    """Muon on the matrices inside the blocks, AdamW on everything else, as one optimizer.

    Groups carry ``kind``; state is that of the two optimizers.
    """

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})
        self._parts = [_part(group) for group in self.param_groups]
        self._share()

    def _share(self) -> None:
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups[0] = group
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, and hand the loaded groups and state to both parts."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of each part."""
        assert closure is None
        for part in self._parts:
            part.step()


def _part(group: dict[str, Any]) -> Optimizer:
    options = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
    part: Optimizer
    if group["kind"] == "muon":
        part = Muon(group["params"], adjust_lr_fn=group["adjust_lr_fn"], **options)
    else:
        part = AdamW(group["params"], betas=group["betas"], **options)
    for key, value in part.param_groups[0].items():
        group.setdefault(key, value)
    return part


def decay_names(model: nn.Module) -> set[str]:
    """Parameters with weight decay: all but norms and biases, as the Trainer groups them."""
    return {name for name, p in model.named_parameters() if p.ndim > 1}


def make(
    name: str, model: nn.Module, lr: float, beta2: float = BETAS[1], weight_decay: float = DECAY
) -> Optimizer:
    """``adamw``, ``soap``, or one of ``MUON``, over the model's parameters in the Trainer's groups.

    Raises:
        ImportError: SOAP is that of ``pytorch_optimizer``, which is not among the project's requirements.
    """
    decay = decay_names(model)
    named = list(model.named_parameters())
    betas = (BETAS[0], beta2)
    if name in ("adamw", "soap"):
        groups = [
            {"params": [p for n, p in named if n in decay], "weight_decay": weight_decay},
            {"params": [p for n, p in named if n not in decay], "weight_decay": 0.0},
        ]
        if name == "adamw":
            return AdamW(groups, lr=lr, betas=betas, fused=True)
        from pytorch_optimizer import SOAP

        soap: Optimizer = SOAP(groups, lr=lr, betas=betas)
        return soap
    inner = {n for n in decay if ".layers." in n and dict(named)[n].ndim == 2 and "mlp.gate.weight" not in n}
    muon, adam = {"kind": "muon", "adjust_lr_fn": MUON[name]}, {"kind": "adamw", "betas": betas}
    return MuonAndAdamW(
        [
            {"params": [(n, p) for n, p in named if n in inner], "weight_decay": weight_decay, **muon},
            {
                "params": [(n, p) for n, p in named if n in decay - inner],
                "weight_decay": weight_decay,
                **adam,
            },
            {"params": [(n, p) for n, p in named if n not in decay], "weight_decay": 0.0, **adam},
        ],
        lr=lr,
    )
