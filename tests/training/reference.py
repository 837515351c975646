"""An independent reference: old and new entries as separate parameters in separate optimizer groups.

The model under test is a small gated MLP whose tensors cover rectangles, an L, an interleaved region and
a stacked, per-expert one. Both sides are trained in float64 on the same data.

Shape legend: B batch, H hidden, F ffn, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sparkling_cli.layout.file import from_dict
from sparkling_cli.schedule.curves import Curve
from sparkling_cli.schedule.rewarmup import BiasCorrection, Rewarmup, add_stage
from sparkling_cli.training import History
from sparkling_cli.widening.geometry import Growth

H0, H, F0, F, E, V = 5, 8, 6, 12, 2, 7
BASE = Curve("cosine", 3e-3, 3e-5, 0.0, 5, 300)
TE = 30

LAYOUT: dict[str, Any] = {
    "format": 1,
    "name": "tiny gated MLP",
    "axes": {"hidden": {"size": H}, "ffn": {"size": F}, "experts": {"size": E}, "vocab": {"size": V}},
    "tensors": {
        "embed.weight": "vocab -> hidden",
        "up.weight": "ffn <- hidden",
        "up.bias": "bias ffn",
        "mixed.weight": "(ffn gate_up) <- hidden",
        "down.weight": "hidden <- ffn",
        "experts": "experts | (gate_up ffn) <- hidden",
        "norm": "scale hidden",
        "inner.weight": "vocab <- vocab",
    },
}


class Tiny(nn.Module):
    """(B,) token ids -> a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.up = nn.Linear(H, F)
        self.mixed = nn.Linear(H, 2 * F, bias=False)
        self.down = nn.Linear(F, H, bias=False)
        self.experts = nn.Parameter(torch.empty(E, 2 * F, H).normal_(std=0.3))
        self.norm = nn.Parameter(torch.ones(H))
        self.inner = nn.Linear(V, V, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy of a made-up task."""
        x = self.embed(ids) * self.norm
        gate, up = self.mixed(x).view(*x.shape[:-1], F, 2).unbind(-1)
        x = x + self.down(torch.tanh(gate) * up + torch.sin(self.up(x)))
        for expert in self.experts:
            gate, up = (x @ expert.T).chunk(2, dim=-1)
            x = x + self.down(torch.sigmoid(gate) * up)
        logits = self.inner(x @ self.embed.weight.T)
        return nn.functional.cross_entropy(logits, (ids * 3 + 1) % V)


def model(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tiny:
    """A freshly initialized model; the same every time."""
    torch.manual_seed(seed)
    return Tiny().to(dtype)


def data(step: int) -> Tensor:
    """The batch of a step."""
    return torch.randint(V, (16,), generator=torch.Generator().manual_seed(step))


def new_masks() -> dict[str, Tensor]:
    """New entries of every parameter, by plain index arithmetic."""
    hidden, ffn = torch.arange(H) >= H0, torch.arange(F) >= F0
    inner = ffn.repeat_interleave(2)  # (ffn gate_up)
    blocks = ffn.repeat(2)  # (gate_up ffn)
    return {
        "embed.weight": hidden.expand(V, H),
        "up.weight": ffn[:, None] | hidden,
        "up.bias": ffn,
        "mixed.weight": inner[:, None] | hidden,
        "down.weight": hidden[:, None] | ffn,
        "experts": (blocks[:, None] | hidden).expand(E, 2 * F, H),
        "norm": hidden,
        "inner.weight": torch.zeros(V, V, dtype=torch.bool),
    }


def history(
    *, te: int = TE, rho: float = 1.3, tau: int = 20, bias_correction: BiasCorrection = "inherit"
) -> History:
    """One joint expansion of hidden and ffn at step ``te``."""
    rewarmup = add_stage(
        None, BASE, te, rho=rho, steps=tau, bias_correction=bias_correction, betas=(0.9, 0.999)
    )
    return history_of(rewarmup)


def history_of(rewarmup: Rewarmup) -> History:
    """A history with the births of one joint expansion."""
    births = {"hidden": [[0, H0, 0], [H0, H, 1]], "ffn": [[0, F0, 0], [F0, F, 1]]}
    growth = {"hidden": Growth(H0, H), "ffn": Growth(F0, F)}
    return History(from_dict(LAYOUT, "test"), births, rewarmup, growth)


def eta_new(step: int, *, te: int = TE, rho: float = 1.3, tau: int = 20) -> float:
    """Eq. 27-28, written out again."""
    from math import cos, pi

    eta_e, t = BASE(te), step - te
    if t < tau:
        return eta_e + (rho - 1) * eta_e * t / tau
    return BASE.minimum + (rho * eta_e - BASE.minimum) * (1 + cos(pi * (t - tau) / (300 - te - tau))) / 2


def scheduler(optimizer: Optimizer, start: int) -> LambdaLR:
    """The baseline on every group (whose ``lr`` is the peak), at ``start`` steps done."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].clone()
        group["initial_lr"] = BASE.peak
    return LambdaLR(optimizer, lambda t: BASE(t) / BASE.peak, last_epoch=start - 1)


def steps(net: nn.Module, optimizer: Optimizer, sched: LambdaLR, start: int, stop: int) -> Iterator[int]:
    """Train; yields after every step."""
    for step in range(start, stop):
        optimizer.zero_grad()
        sign = -1 if optimizer.defaults.get("maximize") else 1  # an ascent of the loss would diverge
        (sign * net(data(step))).backward()
        optimizer.step()
        sched.step()
        yield step


MakeOptimizer = Callable[[Any], Optimizer]


def expanded(make: MakeOptimizer, dtype: torch.dtype = torch.float64) -> tuple[Tiny, Optimizer, LambdaLR]:
    """A model at step TE, as an expansion leaves it: old entries have state, new ones have zeros."""
    net = model(dtype=dtype)
    optimizer = make(net.parameters())
    sched = scheduler(optimizer, 0)
    for _ in steps(net, optimizer, sched, 0, TE):
        pass
    masks = new_masks()
    for name, p in net.named_parameters():
        for value in optimizer.state[p].values():
            if isinstance(value, Tensor) and value.shape == p.shape:
                value[masks[name]] = 0
    return net, optimizer, sched


class Split(nn.Module):
    """The same model with two parameters for every tensor: old entries of one are used, new of the other."""

    def __init__(self, net: Tiny) -> None:
        super().__init__()
        self.net = [net]  # not a submodule: its parameters are not ours
        self.masks = new_masks()
        self.old = nn.ParameterDict(
            {n.replace(".", "/"): p.detach().clone() for n, p in net.named_parameters()}
        )
        self.new = nn.ParameterDict(
            {n.replace(".", "/"): p.detach().clone() for n, p in net.named_parameters()}
        )

    def whole(self) -> dict[str, Tensor]:
        """The tensors put together."""
        return {
            name: torch.where(mask, self.new[name.replace(".", "/")], self.old[name.replace(".", "/")])
            for name, mask in self.masks.items()
        }

    def forward(self, ids: Tensor) -> Tensor:
        """The loss of the whole."""
        return torch.func.functional_call(self.net[0], self.whole(), (ids,))  # type: ignore[no-any-return]


def split_reference(
    net: Tiny, optimizer: Optimizer, make: MakeOptimizer, rates: Callable[[int], float] = eta_new
) -> tuple[Split, Optimizer, LambdaLR]:
    """The reference in the same state: two groups, the second on ``rates``, with the same step counters."""
    split = Split(net)
    reference = make([{"params": list(split.old.values())}, {"params": list(split.new.values())}])
    for half in (split.old, split.new):
        for name, p in net.named_parameters():
            state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[p].items()}
            reference.state[half[name.replace(".", "/")]] = state
    for group in reference.param_groups:
        group["initial_lr"] = 1.0
        if isinstance(group["lr"], Tensor):  # groups share a tensor that was given once
            group["lr"] = group["lr"].clone()
    return split, reference, LambdaLR(reference, [BASE, rates], last_epoch=TE - 1)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest relative difference of a tensor (2-norm)."""
    return max(((a[n] - b[n]).norm() / b[n].norm()).item() for n in b)


def parameters(net: nn.Module) -> dict[str, Tensor]:
    """Detached copies by name."""
    return {n: p.detach().clone() for n, p in net.named_parameters()}
