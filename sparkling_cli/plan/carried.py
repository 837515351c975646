"""Factors that a linear layer's input got in its weight's stead."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.layout.parse import parse_layout
from sparkling_cli.widening.geometry import Growth, Treatment, view_of


def carried_factors(
    layout: ModelLayout, growth: Mapping[str, Growth], treatment: Treatment
) -> dict[str, float]:
    """Linear layer -> factor that its input got in its weight's stead.

    A tied head cannot take its own fan-in factor; the final norm takes it (App. D.1). Norm and head are
    one map then: r of the head is comparable after multiplication by this factor, in RMS over channels.
    """
    factors: dict[str, float] = {}
    carriers = {  # one of each axis: a norm's scale and bias carry the same factor
        item.axis: item for item in layout.compensations if item.fan_in and item.tensor
    }
    for item in carriers.values():
        grown = growth.get(item.axis)
        if grown is None or treatment.scaling == "none":
            continue
        view = view_of(
            parse_layout(f"scale {item.axis}"),
            {item.axis: grown.source},
            {item.axis: grown},
            treatment,
            consumed=frozenset({item.axis}),
        )
        squares = sum(run.length * run.scale**2 for run in view[0].runs)
        factor = sqrt(squares / grown.target) * item.scale(grown.source, grown.target)
        for group in layout.tied:
            for name in group:
                module = name.removesuffix(".weight")
                factors[module] = factors.get(module, 1.0) * factor
    return factors
