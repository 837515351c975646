"""What becomes of the length of old entries' steps in a wider model, said before anything is written."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from math import isclose
from typing import Any

from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.formats.muon import MOMENTUM, rule_of, step_rms
from sparkling_cli.layout.expr import COUNTED
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.widening.geometry import Growth


def step_notes(checkpoint: Checkpoint, layout: ModelLayout, growth: Mapping[str, Growth]) -> list[str]:
    """Under Muon, behind multipliers that follow from a width, and under muP.

    Args:
        checkpoint: the source.
        layout: of the model.
        growth: of the plan.
    """
    after = {**layout.sizes, **{axis: grown.target for axis, grown in growth.items()}}
    steps = (*_muon_notes(checkpoint, layout, after), *_width_notes(checkpoint, layout, after))
    return [*steps, *_mup_notes(checkpoint, layout, growth)]


def _muon_notes(checkpoint: Checkpoint, layout: ModelLayout, after: Mapping[str, int]) -> list[str]:
    """How far Muon's old entries step in matrices that have grown, by the rule that the options tell."""
    groups = [(group, rule_of(group)) for group in checkpoint.param_groups]
    rules = {str(name): rule for group, rule in groups if rule for name in group.get("params", ())}
    found: defaultdict[float, Counter[str]] = defaultdict(Counter)
    for state in checkpoint.states:
        name = layout.canonical(state.param)
        if state.param in rules and MOMENTUM & state.tensors.keys() and layout.module_table.has(name):
            pattern = layout.module_table.find(name)
            old, new = pattern.dims.shape(layout.sizes), pattern.dims.shape(after)
            if len(old) == 2 and old != new:
                rule = rules[state.param]
                ratio = round(step_rms(rule, *new) / step_rms(rule, *old), 3)
                found[ratio][pattern.name] += 1
    return [
        f"Muon's step follows the shape of a matrix: old entries step {ratio:.2f} times as far as before, "
        f"once new ones carry momentum, in {_counted(kinds)}; --keep-step undoes it"
        for ratio, kinds in found.items()
        if ratio != 1
    ]


def _width_notes(checkpoint: Checkpoint, layout: ModelLayout, after: Mapping[str, int]) -> list[str]:
    """What a step becomes where the model multiplies by a number that follows from a width."""
    found: defaultdict[float, Counter[str]] = defaultdict(Counter)
    for state in checkpoint.states:
        name = layout.canonical(state.param)
        factor = round(layout.carried(name, layout.sizes, after), 3)
        if factor != 1 and layout.module_table.has(name):
            found[factor][layout.module_table.find(name).name] += 1
    return [
        f"the model multiplies what {_counted(kinds)} makes by a number that follows from its width: a step "
        f"of the same rate moves it {1 / factor:.2f} times as far; --keep-step undoes it under AdamW"
        for factor, kinds in found.items()
    ]


#: numbers of muP that a trainer gives its model beside the width
_MUP = re.compile(r"mup_(width_mult(iplier)?|width_scale|base_width|base_hidden_size|base_d_model)$")


def _mup_notes(checkpoint: Checkpoint, layout: ModelLayout, growth: Mapping[str, Growth]) -> list[str]:
    """That muP's numbers and the groups' rates stay, where the layout has none that follow from a width."""
    if not growth.keys() - COUNTED or layout.carries(growth):
        return []
    held = [f"{k} = {v:g}" for k, v in (checkpoint.config or {}).items() if _MUP.search(k) and _is_number(v)]
    scales = {group["lr_scale"] for group in checkpoint.param_groups if _is_number(group.get("lr_scale"))}
    if scales - {1}:
        held.append(f"groups with lr_scale {', '.join(f'{scale:g}' for scale in sorted(scales))}")
    elif len(rates := _mu_adam(checkpoint.param_groups)) > 1:
        held.append(f"groups with rates of {', '.join(f'{rate:.3g}' for rate in rates)} (MuAdam's)")
    if not held:
        return []
    return [
        f"muP: {' and '.join(held)} stay as they are, so multipliers and old entries' steps are what they "
        "were; numbers made anew from the new width would change both: give the trainer the old ones, or a "
        "base width that has grown by the same factor"
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _mu_adam(groups: Iterable[Mapping[str, Any]]) -> list[float]:
    """The rates of groups whose rate times weight decay is one number, as mup's MuAdam makes them."""
    decayed = [(float(g["lr"]), float(g["weight_decay"])) for g in groups if g.get("weight_decay")]
    found = {rate: rate * decay for rate, decay in decayed}
    products = list(found.values())
    alike = all(isclose(product, products[0], rel_tol=1e-6) for product in products)
    return sorted(found) if alike else []


def _counted(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in kinds.items())
