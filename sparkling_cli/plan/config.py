"""What changes in a model's config: its sizes, what it says layer by layer, and numbers that are scaled."""

from __future__ import annotations

from collections.abc import Mapping

from sparkling_cli.errors import LayoutError
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.layout.depth import LAYERS, deeper_config
from sparkling_cli.layout.keys import lookup
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.widening.geometry import Growth, Treatment


def changed_config(
    checkpoint: Checkpoint,
    layout: ModelLayout,
    growth: Mapping[str, Growth],
    treatment: Treatment,
    scaling: str,
) -> dict[str, object]:
    """Config keys whose value changes, and keys that were implied before and must now be written.

    Args:
        checkpoint: the source.
        layout: with the sizes before widening.
        growth: of the plan.
        treatment: with the factors that axes get.
        scaling: of the spec.

    Raises:
        LayoutError: a key that is scaled is no number.
    """
    before = layout.config_sizes(layout.sizes)
    after = layout.config_sizes({**layout.sizes, **{name: g.target for name, g in growth.items()}})
    config = checkpoint.config or {}
    changed: dict[str, object] = {}
    if LAYERS in growth:
        counts = {key for key, term in layout.config.items() if term == LAYERS}
        changed |= deeper_config(config, counts, growth[LAYERS].order)
    for key, value in after.items():
        table, old = key.rpartition(".")[0], lookup(config, key)
        known = not table or lookup(config, table)  # of one that has an older name here, nothing is implied
        if value != before[key] or (known and old is None):
            changed[key] = [value] * len(old) if isinstance(old, list) else value
    for item in layout.compensations:
        if item.config and item.axis in growth and scaling != "none":
            old = lookup(config, item.config)
            if not isinstance(old, (int, float)):
                raise LayoutError(f"config key {item.config!r} must be a number to be scaled, found {old!r}")
            grown = growth[item.axis]
            factor = item.scale(grown.source, grown.target)
            changed[item.config] = float(changed.get(item.config, old)) * (  # type: ignore[arg-type]
                factor * (treatment.alpha(grown) if item.fan_in else 1.0)
            )
    return changed
