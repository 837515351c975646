"""Two models' forward passes on the same tokens, compared place by place, by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan, sqrt
from typing import Any

from sparkling_cli.layout.depth import LAYERS, Places
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.plan.carried import carried_factors
from sparkling_cli.results.base import change, deviation_of
from sparkling_cli.results.measured import (
    Activations,
    LayerActivation,
    LayerStat,
    Measurement,
    ResidualPoint,
)
from sparkling_cli.widening.geometry import Growth, Treatment

_BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Enlarged:
    """What was done to a model, as far as a comparison has to know.

    Attributes:
        widened: names of the weights that grew.
        carried: factors that a layer's input got in its weight's stead (a tied head's): the ratio after
            is multiplied by them, so that it is compared as if the weight had taken the factor.
        experts: how their number grew, where it is another.
        places: where the first model's layers are, where the second one is deeper: names are those of the
            second, and what is behind a new layer is compared with what was behind the old one before it.
    """

    widened: Collection[str] = ()
    carried: Mapping[str, float] = field(default_factory=dict)
    experts: Growth | None = None
    places: Places | None = None

    @classmethod
    def by(
        cls,
        layout: ModelLayout,
        growth: Mapping[str, Growth],
        treatment: Treatment,
        widened: Collection[str],
    ) -> Enlarged:
        """By an expansion's axes and treatment."""
        return cls(
            widened,
            carried_factors(layout, growth, treatment),
            growth.get("experts"),
            Places.of(layout, growth[LAYERS].order) if LAYERS in growth else None,
        )


#: fields of a comparison of which nothing is known
_UNMEASURED: Mapping[str, Any] = {
    "data": "", "random_tokens": False, "tokens": 0, "routing": (),
    "logit_change": None, "logit_largest": None,
}  # fmt: skip
#: nothing was done that a comparison has to know
UNCHANGED = Enlarged()


def compare(
    before: Measurement,
    after: Measurement,
    done: Enlarged = UNCHANGED,
    apart: Mapping[str, tuple[float, float]] | None = None,
    **measured: Any,
) -> Activations:
    """Compare two measurements that were made on the same tokens.

    Args:
        before: the first model.
        after: the second one.
        done: what was done to the first one.
        apart: place in the residual stream -> how far it moved there, and its cosine.
        measured: on what, and what else of both, as fields of the result.
    """
    if done.places is not None:
        before = _placed(before, after, done.places)
    new_stream = {place.name: place.rms for place in after.stream}
    moved = apart or {}
    return Activations(
        layers=_pairs(before.layers, after.layers, done.carried, done.widened),
        functions=_pairs(before.functions, after.functions, {}, done.widened),
        residual=tuple(
            ResidualPoint(
                name=place.name,
                layer=split_name(place.name)[0],
                before=place.rms,
                after=new_stream[place.name],
                deviation=deviation_of(place.rms, new_stream[place.name]),
                difference=moved.get(place.name, (None, None))[0],
                cosine=moved.get(place.name, (None, None))[1],
            )
            for place in before.stream
            if place.name in new_stream
        ),
        logits=change(before.logits_rms, after.logits_rms),
        loss_before=before.loss,
        loss_after=after.loss,
        vocabulary=after.vocabulary,
        only_before=_others(before.layers, after.layers),
        only_after=_others(after.layers, before.layers),
        **{**_UNMEASURED, **measured},
    )


def _placed(before: Measurement, after: Measurement, places: Places) -> Measurement:
    """The first measurement under the names of a deeper model, with the stream behind every block of that."""
    old = places.old
    stream = {old(place.name): place for place in before.stream}
    behind = {place.name: places.behind(place.name) or place.name for place in after.stream}
    changed = {
        "layers": tuple(one.model_copy(update={"name": old(one.name)}) for one in before.layers),
        "functions": tuple(one.model_copy(update={"name": old(one.name)}) for one in before.functions),
        "stream": tuple(
            stream[source].model_copy(update={"name": name})
            for name, source in behind.items()
            if source in stream
        ),
    }
    return before.model_copy(update=changed)


def _pairs(
    before: Sequence[LayerStat],
    after: Sequence[LayerStat],
    factors: Mapping[str, float],
    widened: Collection[str],
) -> tuple[LayerActivation, ...]:
    found = {layer.name: layer for layer in after}
    pairs = []
    for layer in before:
        if layer.name in found:
            block, kind = split_name(layer.name)
            grown = layer.name in widened or f"{layer.name}.weight" in widened
            grown = grown or any(name.startswith(f"{layer.name}.") for name in widened)
            factor = factors.get(layer.name, 1.0)
            pairs.append(
                LayerActivation.of(layer, found[layer.name], factor, role=kind, layer=block, widened=grown)
            )
    return tuple(pairs)


def _others(layers: Sequence[LayerStat], partners: Sequence[LayerStat]) -> tuple[str, ...]:
    names = {layer.name for layer in partners}
    return tuple(layer.name for layer in layers if layer.name not in names)


def split_name(name: str) -> tuple[int | None, str]:
    """Block and kind: ``model.layers.3.mlp.experts.7.up_proj`` is (3, ``mlp.experts.up_proj``)."""
    match = _BLOCK.search(name)
    if match is None:
        return None, name
    rest = name[match.end() :]
    return int(match[1]), ".".join(part for part in rest.split(".") if not part.isdigit())


def root_mean(squares: float, count: int) -> float:
    """sqrt(squares / count), 0 for nothing, NaN for what is not finite."""
    if not count:
        return 0.0
    return sqrt(squares / count) if isfinite(squares) else nan
