"""The drawing of what was widened: tensors as blocks with their new rows and columns."""

from __future__ import annotations

from math import log, prod, sqrt

from markupsafe import Markup

from sparkling_cli.report import svg
from sparkling_cli.results.expansion import TensorChange
from sparkling_cli.results.numbers import significant

#: Patterns drawn as blocks; the table beside the drawing lists all of them.
BLOCKS_AT_MOST = 8


def tensor_block(change: TensorChange) -> Markup:
    """One tensor to scale: what was there, and behind it the new rows and columns."""
    width, height = 168.0, 132.0
    stacked = change.after[:-2] != change.before[:-2]
    rows, columns = _matrix(change.after, stacked=stacked)
    old_rows, old_columns = _matrix(change.before, stacked=stacked)
    w, h = _fit(rows, columns, 104.0, 84.0)
    x0, y0 = (width - w) / 2, 24 + (84 - h) / 2
    old_w, old_h = w * old_columns / columns, h * old_rows / rows
    body = [svg.rect(x0, y0, w, h, "entries new"), svg.rect(x0, y0, old_w, old_h, "entries old")]
    label = " × ".join(f"{size:,}" for size in change.after)
    body.append(svg.text(width / 2, 14, label, "tick", "middle"))
    factor = _factor(change.scale)
    body.append(svg.text(width / 2, height - 6, f"{change.role}{factor}", "tick", "middle"))
    description = f"{change.name}: {change.before} to {change.after}, {change.role}{factor}"
    return svg.svg(width, height, change.name, description, *body, class_="block")


def _factor(scale: tuple[float, float]) -> str:
    low, high = scale
    if low == high:
        return "" if low == 1.0 else f", ×{significant(low)}"
    return f", ×{significant(low)}…{significant(high)}"


def _matrix(shape: tuple[int, ...], *, stacked: bool) -> tuple[int, int]:
    """Rows and columns of a tensor; vectors are one column, stacked axes are left out or below each other."""
    if not shape:
        return 1, 1
    if len(shape) == 1:
        return shape[0], 1
    return (prod(shape[:-1]) if stacked else shape[-2]), shape[-1]


def _fit(rows: int, columns: int, width: float, height: float) -> tuple[float, float]:
    """Sides of a block: the ratio softened, so that a vector is still seen."""
    ratio = columns / rows
    soft = sqrt(ratio) if 0.02 < ratio < 50 else (0.1 if ratio < 1 else 10.0)
    soft = min(max(soft, 0.14), 6.0)
    if abs(log(ratio)) < 0.7:
        soft = ratio
    w = min(width, height * soft)
    return w, w / soft
