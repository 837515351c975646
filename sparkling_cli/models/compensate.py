"""Factors that widening hidden needs outside the widened tensors (App. D.1 and embedding multipliers).

A tied head's fan-in factor goes to the norm whose output is the head's input; multipliers that a model
computes from its hidden size (``sqrt(hidden)`` on embeddings, ``1/hidden`` on logits) are undone where
they act. Which of these a class needs is tried, like every hypothesis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from sparkling_cli.layout.expr import TensorLayout
from sparkling_cli.layout.model import Compensation
from sparkling_cli.layout.names import skeleton
from sparkling_cli.models.families import _tied_heads
from sparkling_cli.models.parity import LogitParity
from sparkling_cli.models.shrink import run

Compensations = tuple[Compensation, ...]
#: An exponent that is measured is at most so far from the true one.
_EXACT = 1e-4
_POWERS = (0.0, 0.5, -0.5, 1.0, -1.0)


def hypotheses_for(
    parity: LogitParity, axes: Sequence[str], layouts: Mapping[str, TensorLayout]
) -> list[Compensations]:
    """Compensations to try when ``axes`` (hidden among them) grow, the likeliest first.

    Args:
        parity: the tiny model.
        axes: hidden first, then the axes that grow with it.
        layouts: the likeliest layout of every tensor, for measuring.
    """
    axis = axes[0]
    tied = bool(_tied_heads(parity.model))
    norm = final_norm(parity)
    embedding = embedding_name(parity.model)
    found: list[Compensations] = []
    for embed_power, rounded in _embedding_powers(parity, axes, layouts, embedding):
        undo = -embed_power if tied else 0.0
        scaled = {embedding, *_tied_heads(parity.model)} if tied else {embedding}
        on_embedding = [
            Compensation(axis, n, power=embed_power, rounded=rounded) for n in sorted(scaled) if embed_power
        ]
        # What is measured under a layout that is not the true one may be no multiplier at all.
        inside = dict.fromkeys((_inside(parity, axes, layouts, on_embedding), ()))
        for head_power in _POWERS if norm else (0.0,):
            for offset in (0.0, 1.0) if tied or head_power else (0.0,):
                for within in inside:
                    comps = [*on_embedding, *within]
                    if norm and (tied or head_power + undo):
                        on_norm = _on_norm(norm, axis, tied, head_power + undo, offset)
                        comps += [replace(c, rounded=rounded and not head_power) for c in on_norm]
                    if tuple(comps) not in found:
                        found.append(tuple(comps))
    if () not in found:
        found.append(())
    return found


#: Multipliers inside the layers that are looked for, one after the other.
_MOST_INSIDE = 6
#: Linear layers before a deviation that are tried as its place, and exponents.
_NEAR, _INNER_POWERS = 8, (0.5, -0.5, 1.0, -1.0)


@dataclass(frozen=True)
class _Input:
    """What enters a module with a weight: RMS and mean size of its entries, which copying keeps."""

    module: str
    linear: bool
    rms: float
    size: float

    def differs(self, other: _Input | None) -> bool:
        """Whether the other's entries cannot be copies of this one's."""
        pairs = ((self.rms, other.rms), (self.size, other.size)) if other else ()
        return any(abs(a - b) > 1e-4 * a for a, b in pairs)


def _inside(
    parity: LogitParity,
    axes: Sequence[str],
    layouts: Mapping[str, TensorLayout],
    comps: Sequence[Compensation],
) -> Compensations:
    """Compensations of multipliers inside the layers, such as ``sqrt(hidden / rank)`` on latent queries.

    What enters every module with a weight is measured when the axes double. The first one that enters another
    way has the multiplier just before it, or inside a computation without modules before it. A linear layer
    takes a multiplier back in its weight: the module itself, or one of those that ran last.
    """
    axis, factors = axes[0], dict.fromkeys(axes, 2)
    before = _inputs(parity.model, parity.ids)

    def first_other(found: Sequence[Compensation]) -> tuple[int, _Input | None]:
        """The place of the first input that differs for no reason that is found, and what enters there."""
        if math.isinf(parity.error(layouts, factors, (*comps, *found))):
            return -1, None
        after = {item.module: item for item in _inputs(parity.wide(factors), parity.ids)}
        changed = {c.tensor.removesuffix(".weight") for c in found}
        for place, item in enumerate(before):
            if item.module not in changed and item.differs(after.get(item.module)):
                return place, after.get(item.module)
        return len(before), None

    def on(module: str, power: float) -> list[Compensation]:
        kind = skeleton(f"{module}.weight")
        return [Compensation(axis, name, power=power) for name in parity.state if skeleton(name) == kind]

    found: list[Compensation] = []
    place, other = first_other(found)
    for _ in range(_MOST_INSIDE):
        if other is None:
            break
        near = [item.module for item in before[max(0, place - _NEAR) : place] if item.linear][::-1]
        exact = math.log2(other.rms / before[place].rms) if before[place].rms and other.rms else 0.0
        power = -round(2 * exact) / 2
        likely = [before[place].module] if before[place].linear else near[:1]
        trials = [(name, power) for name in likely if power]
        trials += [(name, power) for name in near for power in _INNER_POWERS]
        used = {skeleton(c.tensor) for c in found}
        best = None
        for module, power in trials:
            if skeleton(f"{module}.weight") in used:
                continue
            then = first_other([*found, *on(module, power)])
            if then[0] > place:
                best = (module, power, then)
                break
        if best is None:
            break
        found += on(*best[:2])
        place, other = best[2]
    return tuple(found)


def _inputs(model: nn.Module, ids: torch.Tensor) -> list[_Input]:
    """What enters the modules with a weight, in the order in which they run."""
    own = {n: m for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), nn.Parameter)}
    found: dict[str, _Input] = {}

    def see(name: str, entering: bool, tensors: list[torch.Tensor]) -> None:
        if entering and tensors and tensors[0].is_floating_point() and tensors[0].numel():
            entries = tensors[0].to(torch.float64)
            rms, size = entries.square().mean().sqrt(), entries.abs().mean()
            found.setdefault(name, _Input(name, isinstance(own[name], nn.Linear), float(rms), float(size)))

    _watch(model, ids, own, see)
    return list(found.values())


def _watch(
    model: nn.Module,
    ids: torch.Tensor,
    modules: Mapping[str, nn.Module],
    see: Callable[[str, bool, list[torch.Tensor]], None],
) -> None:
    """Run the model; ``see`` is given the name of a module, and what enters (True) or leaves it."""

    def entering(name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        see(name, True, [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)])

    def leaving(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        see(name, False, [output] if isinstance(output, torch.Tensor) else [])

    with ExitStack() as hooks:
        for name, module in modules.items():
            before = module.register_forward_pre_hook(partial(entering, name), with_kwargs=True)
            hooks.callback(before.remove)
            hooks.callback(module.register_forward_hook(partial(leaving, name)).remove)
        run(model, ids)


def _embedding_powers(
    parity: LogitParity, axes: Sequence[str], layouts: Mapping[str, TensorLayout], embedding: str
) -> list[tuple[float, bool]]:
    """Exponents p of (d'/d)^p that may undo a multiplier on the embedding, and whether it is rounded.

    Measured where the first layer is entered and where the embedding is left, as a norm may stand
    between the two.
    """
    if not embedding:
        return [(0.0, False)]
    first = next((n for n, _ in parity.model.named_modules() if n.endswith(".0") and n.count(".") <= 3), None)
    owner = embedding.rpartition(".")[0]
    found = [_power(parity, axes, layouts, first, True)] if first else []
    found.append(_power(parity, axes, layouts, owner, False))
    return list(dict.fromkeys(found))


def _power(
    parity: LogitParity, axes: Sequence[str], layouts: Mapping[str, TensorLayout], module: str, entering: bool
) -> tuple[float, bool]:
    """Exponent that keeps the RMS of what enters or leaves a module when the axes grow; in halves.

    And whether it does so only to bfloat16's rounding.
    """
    before = _rms_at(parity.model, parity.ids, module, entering)
    powers = []
    for factor in (2, 3):
        if math.isinf(parity.error(layouts, dict.fromkeys(axes, factor))):
            return 0.0, False
        after = _rms_at(parity.wide(dict.fromkeys(axes, factor)), parity.ids, module, entering)
        if before <= 0 or after <= 0:
            return 0.0, False
        powers.append(math.log(before / after) / math.log(factor))
    near = round(2 * powers[0]) / 2
    furthest = max(abs(p - near) for p in powers)
    return (near, furthest > _EXACT) if furthest < 0.02 and abs(near) <= 1 else (0.0, False)


def _rms_at(model: nn.Module, ids: torch.Tensor, module: str, entering: bool) -> float:
    """RMS of the first float tensor that enters or leaves a module; 0 if there is none."""
    seen: list[torch.Tensor] = []

    def see(_name: str, enters: bool, tensors: list[torch.Tensor]) -> None:
        seen.extend(t for t in tensors if enters == entering and t.is_floating_point())

    _watch(model, ids, {module: model.get_submodule(module)}, see)
    return float(seen[0].to(torch.float64).square().mean().sqrt()) if seen else 0.0


def _on_norm(norm: Sequence[str], axis: str, tied: bool, power: float, offset: float) -> list[Compensation]:
    return [
        Compensation(axis, n, fan_in=tied, power=power, offset=offset if n.endswith("weight") else 0.0)
        for n in norm
    ]


def _said(model: nn.Module, method: str) -> Any:
    """What a method of the model returns; None where it has none."""
    try:
        return getattr(model, method, lambda: None)()
    except NotImplementedError:
        return None


def embedding_name(model: nn.Module) -> str:
    """Name of the token embedding's weight, or an empty string."""
    wanted = _said(model, "get_input_embeddings")
    for name, module in model.named_modules():
        chosen = module is wanted or (wanted is None and isinstance(module, torch.nn.Embedding))
        if chosen and isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            return f"{name}.weight"
    return ""


def head_module(model: nn.Module, vocab: int) -> nn.Module | None:
    """The output head: what the model says it is, else the last linear layer of vocabulary size."""
    found = _said(model, "get_output_embeddings")
    if isinstance(found, torch.nn.Module):
        return found
    heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == vocab]
    return heads[-1] if heads else None


def final_norm(parity: LogitParity) -> tuple[str, ...]:
    """Names of the 1-d parameters of the module whose output is the head's input; () if none."""
    model = parity.model
    head = head_module(model, parity.logits.shape[-1])
    if head is None:
        return ()
    outputs: list[tuple[str, torch.Tensor]] = []
    inputs: list[torch.Tensor] = []

    def see(name: str, entering: bool, tensors: list[torch.Tensor]) -> None:
        if entering and not name:
            inputs.extend(tensors)
        elif name and not entering:
            outputs.extend((name, tensor) for tensor in tensors)

    own = {name: {p.ndim for p in module.parameters(recurse=False)} for name, module in model.named_modules()}
    norms = {name: model.get_submodule(name) for name, dims in own.items() if dims == {1}}
    _watch(model, parity.ids, {**norms, "": head}, see)
    same = [name for name, tensor in outputs if inputs and tensor.data_ptr() == inputs[-1].data_ptr()]
    chosen = same[-1] if same else outputs[-1][0] if outputs else None
    if chosen is None:
        return ()
    return tuple(f"{chosen}.{n}" for n, _ in model.get_submodule(chosen).named_parameters(recurse=False))
