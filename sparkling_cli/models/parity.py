"""Logit parity: a tiny random model, widened under a hypothesis, must give the logits that it gave before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.expr import TensorLayout
from sparkling_cli.layout.model import Compensation
from sparkling_cli.models.axes import TinyAxes
from sparkling_cli.models.shrink import forward, run, tokens
from sparkling_cli.models.skeleton import ModelFactory, build_model, words_of
from sparkling_cli.widening.reference import Rules, Wanted, widened_array

#: Largest relative error of logits that counts as unchanged. A wrong hypothesis is off by far more: all
#: parameters are random. Many classes compute norms, routers or softmax in float32 whatever the dtype.
TOLERANCE = 2e-5
#: Widened models that are kept.
_KEPT = 2


class LogitParity:
    """One tiny random model and its widened models; build once, then call ``error`` any number of times.

    Attributes:
        raised: why the error of a widened model was infinite last.
    """

    def __init__(self, found: TinyAxes, *, factory: ModelFactory | None = None, seed: int = 0) -> None:
        self.found = found
        self.factory = factory
        self.ids = tokens(found.config)
        self.raised = ""
        self._wide: dict[tuple[tuple[str, int], ...], nn.Module] = {}
        self._held: dict[tuple[tuple[str, int], ...], dict[str, object]] = {}
        for dtype in (torch.float64, torch.float32):
            self.dtype = dtype
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.model = build_model(found.config, meta=False, factory=factory).to(dtype)
                randomize(self.model)
            try:
                self.logits = run(self.model, self.ids).to(torch.float64)
            except (RuntimeError, TypeError):
                if dtype == torch.float32:
                    raise
                continue  # the class mixes dtypes: prove it in float32
            if bool(torch.isfinite(self.logits).all()):
                break
        self.tolerance = TOLERANCE if self.dtype == torch.float64 else 1e-4
        self.state = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def wide(self, factors: Mapping[str, int]) -> nn.Module:
        """The model of the widened config (the last few are kept), weights to be overwritten."""
        key = tuple(sorted(factors.items()))
        if key not in self._wide:
            for other in list(self._wide)[: 1 - _KEPT]:  # each is as large as all that is searched with it
                del self._wide[other], self._held[other]
            model = build_model(self.found.resized(factors), meta=False, factory=self.factory)
            self._wide[key], self._held[key] = model.to(self.dtype), {}
        return self._wide[key]

    def error(
        self,
        layouts: Mapping[str, TensorLayout],
        factors: Mapping[str, int],
        compensations: Sequence[Compensation] = (),
    ) -> float:
        """Largest change of a logit after widening, relative to the largest logit; inf if impossible.

        Where the vocabulary grows, each new token is a copy of an old one: in its place it must give the
        same logits, and everywhere get the same logit.
        """
        times = factors.get("vocab", 1)
        try:
            model = self.wide(factors)
            self._load(model, layouts, factors, compensations)
            logits = run(model, self._tokens(times)).to(torch.float64)
        except Exception as error:  # any model code may raise anything on sizes it does not accept
            self.raised = words_of(error).removeprefix("LayoutError: ")[:200]
            return math.inf
        wanted = self.logits.repeat(times, 1, times)
        if logits.shape != wanted.shape:
            self.raised = f"its logits have shape {tuple(logits.shape)}, and not {tuple(wanted.shape)}"
            return math.inf
        if not bool(torch.isfinite(logits).all()):
            self.raised = "its logits are not finite"
            return math.inf
        return float((logits - wanted).abs().max() / wanted.abs().max())

    def _tokens(self, times: int = 1) -> torch.Tensor:
        """The tokens, and once more for each further copy of the vocabulary, the copies in their place."""
        size = self.found.sizes.get("vocab", 0)
        return torch.cat([self.ids + copy * size for copy in range(times)])

    def _load(
        self,
        model: nn.Module,
        layouts: Mapping[str, TensorLayout],
        factors: Mapping[str, int],
        compensations: Sequence[Compensation],
    ) -> None:
        held = self._held[tuple(sorted(factors.items()))]
        marks = {name: _mark(name, layouts[name], factors, compensations) for name in self.state}
        kept = {name for name, _ in model.named_parameters() if held.get(name) == marks[name]}
        stale = {name: tensor for name, tensor in self.state.items() if name not in kept}
        wide = widened(stale, layouts, self.found.sizes, factors, compensations)
        with torch.no_grad():
            for name, target in model.state_dict().items():
                if name in kept:
                    continue
                held.pop(name, None)
                if target.shape != wide[name].shape:
                    raise LayoutError(
                        f"{name} has shape {tuple(target.shape)} there, and not {tuple(wide[name].shape)}"
                    )
                target.copy_(wide[name])
                held[name] = marks[name]

    def unchanged(self, state: Mapping[str, torch.Tensor]) -> bool:
        """Whether the tiny model gives the same logits with other weights."""
        own = self.model.state_dict()
        try:
            with torch.no_grad():
                for name, tensor in state.items():
                    own[name].copy_(tensor)
            logits = run(self.model, self.ids).to(torch.float64)
        finally:
            with torch.no_grad():
                for name, tensor in self.state.items():
                    own[name].copy_(tensor)
        change = (logits - self.logits).abs().max() / self.logits.abs().max()
        return bool(change <= self.tolerance)

    def proves(
        self,
        layouts: Mapping[str, TensorLayout],
        axes: Sequence[str],
        compensations: Sequence[Compensation] = (),
    ) -> tuple[bool, float]:
        """Whether logits survive 2x and 3x copy-copy widening; the larger error of the two."""
        worst = 0.0
        for factor in (2, 3):
            worst = max(worst, self.error(layouts, dict.fromkeys(axes, factor), compensations))
            if worst > self.tolerance:
                return False, worst
        return True, worst

    def unreached(self) -> frozenset[str]:
        """Names of parameters that the logits do not depend on: nothing can be proved about them."""
        return frozenset(
            name for name, used in self._used(self.model, self.ids).items() if not bool(used.any())
        )

    def unreached_growth(
        self,
        layouts: Mapping[str, TensorLayout],
        axes: Sequence[str],
        compensations: Sequence[Compensation] = (),
    ) -> str | None:
        """A parameter whose new entries the logits do not depend on although they do on its old ones.

        Doubling the rows of a table that is looked up by position keeps the logits too: it is no width.
        """
        factors = dict.fromkeys(axes, 2)
        wide = self.wide(factors)
        self._load(wide, layouts, factors, compensations)
        used = self._used(wide, self._tokens(factors.get("vocab", 1)))
        growth = {a: (self.found.sizes[a], 2 * self.found.sizes[a]) for a in axes}
        zero = Rules(self.found.sizes, growth, "zero", "zero", "none")
        for name, there in used.items():
            ones = torch.ones(self.state[name].shape).numpy()
            old = torch.from_numpy(widened_array(ones, Wanted(layouts[name], zero, "float32"))) != 0
            if not bool(old.all()) and bool(there[old].any()) and not bool(there[~old].any()):
                return name
        return None

    def _used(self, model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """For every parameter, the entries that the logits depend on."""
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(parameter.is_floating_point())
        logits = forward(model, ids)
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
        total: Any = (logits * weights).sum()
        total.backward()
        used = {
            name: torch.zeros_like(p, dtype=torch.bool) if p.grad is None else p.grad != 0
            for name, p in model.named_parameters()
        }
        for parameter in model.parameters():
            parameter.grad = None
        return used


def _mark(
    name: str, layout: TensorLayout, factors: Mapping[str, int], compensations: Sequence[Compensation]
) -> object:
    """What a widened tensor follows from: its layout and the factors on it."""
    return layout.text, *(c for c in compensations if c.tensor == name and c.axis in factors)


def widened(
    state: Mapping[str, torch.Tensor],
    layouts: Mapping[str, TensorLayout],
    sizes: Mapping[str, int],
    factors: Mapping[str, int],
    compensations: Sequence[Compensation] = (),
) -> dict[str, torch.Tensor]:
    """The widened state dict, copy-copy, by the reference's arithmetic."""
    growth = {a: (sizes[a], sizes[a] * f) for a, f in factors.items()}
    rules = Rules(sizes, growth, copied=frozenset(growth))
    result = {}
    for name, tensor in state.items():
        scale, offset, consumed = 1.0, 0.0, set()
        for c in compensations:
            if c.tensor == name and c.axis in growth:
                scale *= c.scale(*growth[c.axis])
                if c.fan_in:
                    consumed.add(c.axis)
                offset = c.offset
        dtype = str(tensor.dtype).removeprefix("torch.")
        wanted = Wanted(
            layouts[name], rules, dtype, consumed=frozenset(consumed), scale=scale, offset=-offset
        )
        shifted = tensor + offset if offset else tensor
        result[name] = torch.from_numpy(widened_array(shifted.numpy(), wanted))
    return result


def randomize(model: nn.Module) -> None:
    """Overwrite every parameter and float buffer, so that nothing is right by symmetry.

    Constants (norm scales, zero biases, gates) get noise; random matrices get a healthy variance;
    structured values (state-space decay) stay near what they were.
    """
    with torch.no_grad():
        for tensor in {id(t): t for t in model.state_dict().values()}.values():
            if not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            std = float(tensor.std(correction=0))
            mean = float(tensor.mean())
            noise = torch.randn(tensor.shape, dtype=torch.float64).to(tensor)
            if not math.isfinite(std) or not math.isfinite(mean):
                tensor.copy_(0.3 * noise)
            elif std < 1e-9 or tensor.ndim < 2:
                spread = 0.3 if std < 1e-9 else 0.3 * std
                tensor.add_(spread * noise)
            elif abs(mean) > 6 * std / math.sqrt(tensor.numel()):
                tensor.add_(0.1 * std * noise)
            else:
                tensor.copy_(noise / math.sqrt(max(tensor.shape[-2:])) * 1.2)
