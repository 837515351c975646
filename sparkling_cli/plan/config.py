"""What changes in a model's config: its sizes, what it says layer by layer, and numbers that are scaled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sparkling_cli.errors import LayoutError
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.layout.depth import LAYERS, deeper_config
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
    found = _flat(checkpoint.config or {})
    changed: dict[str, object] = {}
    if LAYERS in growth:
        counts = {key for key, term in layout.config.items() if term == LAYERS}
        changed |= deeper_config(checkpoint.config or {}, counts, growth[LAYERS].order)
    for key, value in after.items():
        table = key.rpartition(".")[
            0
        ]  # of a table that the config has under an older name, nothing is implied
        known = not table or any(name.startswith(f"{table}.") for name in found)
        if value != before[key] or (known and found.get(key) is None):
            old = found.get(key)
            changed[key] = [value] * len(old) if isinstance(old, list) else value
    for item in layout.compensations:
        if item.config and item.axis in growth and scaling != "none":
            old = found.get(item.config)
            if not isinstance(old, (int, float)):
                raise LayoutError(f"config key {item.config!r} must be a number to be scaled, found {old!r}")
            grown = growth[item.axis]
            factor = item.scale(grown.source, grown.target)
            changed[item.config] = float(changed.get(item.config, old)) * (  # type: ignore[arg-type]
                factor * (treatment.alpha(grown) if item.fan_in else 1.0)
            )
    return changed


def _flat(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    return dict(_items(config, prefix))


def _items(config: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
