"""Scaling ``calibrated``: factors fitted on tokens, so that every block adds to the stream what it added.

The method's factors assume features of zero mean, equal variance and independence. Trained rows align with
their input and random ones do not, copies at fractional factors are not independent of their sources, and a
zeroed half takes its share of the output away. Here that is measured and made up for, function by function,
in one pass of the widened model over the tokens: what a block's function adds to the residual stream is
multiplied so that RMS(f(Norm h)) / RMS(h) (Sec. 3.1, App. B) is what it was in the source on the same
tokens. Each factor is fitted with all earlier ones in place. It goes into the weight, and bias, that gives
the output. Where the stream itself is not made of copies, the head gets the factor at which the loss is
least. Under copy-copy columns get 1/multiplicity first, which keeps the function of inner axes exactly.

These rules are ours, not the paper's. Widened weights are made in memory, one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkling_cli.diagnostics.activations import batches_of, tokens_for
from sparkling_cli.diagnostics.data import LENGTH, SEQUENCES
from sparkling_cli.diagnostics.probe import Probe
from sparkling_cli.errors import LayoutError
from sparkling_cli.formats.directory import rewritten_json
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.layout.expr import Role, axis_names
from sparkling_cli.plan.model import Calibration, Plan, Row
from sparkling_cli.storage.read import TensorSource
from sparkling_cli.storage.tensors import StoredTensor
from sparkling_cli.widening import fill, moments
from sparkling_cli.widening.entries import as_doubles
from sparkling_cli.widening.kernel import compile_kernel
from sparkling_cli.widening.parts import Unit, boxes, stream_of

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, Any]


#: the axis of the residual stream
_STREAM = "hidden"
#: factors that are nearer to 1 are rounding: the weights keep their bits
_NEGLIGIBLE = 1e-4
#: where the factor on the logits is looked for, in how many thirds
_HEAD_FACTORS, _STEPS = (0.1, 2.0), 16


def calibrate(plan: Plan, *, data: Path | None, model: str | None, memory: int) -> Calibration:
    """The factors of an expansion, fitted on tokens.

    Args:
        plan: with the method's factors.
        data: text or tokens; see :func:`~sparkling_cli.diagnostics.data.load_tokens`.
        model: ``package.module:factory`` of the user's own model.
        memory: budget in bytes, beside the largest widened tensor.

    Raises:
        LayoutError, CheckpointError, MissingDependencyError: no model can be built and run.
    """
    with Probe(plan.source, model=model, memory=memory // 4) as small:
        tokens = tokens_for(small, data, SEQUENCES, LENGTH, 0)
        each = small.sequence_bytes(tokens.ids.shape[1])
        ids = batches_of(tokens.ids, 2 * each, memory)[0]
        small.run(ids)
        before = {stat.name: stat.r for stat in small.result().functions}
    wide = _Fit(plan, before, model=model, memory=memory // 4)
    with wide:
        logits = wide.run(ids)
    missing = before.keys() - wide.fitted
    if missing:
        raise LayoutError(
            f"scaling 'calibrated': {len(missing)} function(s) of blocks cannot be fitted, such as "
            f"{sorted(missing)[0]}: no one weight gives out what it adds to the residual stream",
            hint="use --scaling rms",
        )
    factors = {name: factor for name, factor in wide.factors.items() if abs(factor - 1) > _NEGLIGIBLE}
    stream = plan.growth.get(_STREAM)
    if stream is not None and not (stream.copied and stream.target % stream.source == 0):
        factors |= dict.fromkeys(_head(plan, wide.last), _least_loss(logits, ids))
    return Calibration(factors)


def _head(plan: Plan, parameter: str) -> list[str]:
    """Tensors that a factor on the logits goes into: the head, or where it is tied the final norm's."""
    tied = {name for group in plan.layout.tied for name in group}
    if parameter not in tied:
        return [parameter]
    return [item.tensor for item in plan.layout.compensations if item.fan_in and item.axis == _STREAM]


def _least_loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """The factor on logits at which the loss on these tokens is least; the loss is convex in it."""
    import torch
    from torch.nn.functional import cross_entropy

    found, wanted = logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()

    def loss(factor: float) -> float:
        parts = zip(torch.split(found, 256), torch.split(wanted, 256), strict=True)
        return sum(float(cross_entropy(part * factor, want, reduction="sum")) for part, want in parts)

    low, high = _HEAD_FACTORS
    for _ in range(_STEPS):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if loss(a) <= loss(b) else (a, high)
    return (low + high) / 2


class WidenedSource(TensorSource):
    """The widened weights of a plan, made in memory when they are asked for."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._rows: dict[str, Row] = {row.key: row for row in plan.rows if not row.slot}
        before = {key: row.source for key, row in self._rows.items()}
        super().__init__(replace(plan.source, tensors=before))
        self.checkpoint = widened_checkpoint(plan)
        self._before = TensorSource(replace(plan.source, tensors=before))

    def close(self) -> None:
        """Close the files."""
        super().close()
        self._before.close()

    def read(self, key: str, *, rows: slice | None = None) -> torch.Tensor:
        """The widened tensor, or some of its rows."""
        row = self._rows[key]
        old = self._before.read(key)
        recipe = row.recipe
        made = old if recipe.untouched and recipe.scales == (1.0, 1.0) else self._widened(row, old)
        return made if rows is None else made[rows]

    def _widened(self, row: Row, old: torch.Tensor) -> torch.Tensor:
        import numpy as np
        import torch

        recipe = row.recipe
        kernel = compile_kernel(recipe.view, recipe.dtype, recipe.scale, recipe.offset)
        source = old.contiguous().reshape(-1).view(torch.uint8).numpy()
        item = old.element_size()
        made = torch.empty(recipe.shape, dtype=old.dtype)
        target = made.reshape(-1).view(torch.uint8).numpy()
        known: dict[Unit, moments.Moments] = {}
        if kernel.random:
            entries = source.reshape(-1, item)
            for box in boxes(kernel.dims, source=True):
                edges = range(0, box.entries, moments.BLOCK)
                places = (box.places(at, min(at + moments.BLOCK, box.entries)) for at in edges)
                numbers = (as_doubles(entries[place].reshape(-1), recipe.dtype) for place in places)
                known[box.unit] = moments.merged(map(moments.block_moments, numbers))

        def draw(unit: Unit, start: int, stop: int) -> tuple[Array, moments.Moments]:
            return fill.normal(self._plan.spec.seed, stream_of(row.stream, unit), start, stop), known[unit]

        with np.errstate(all="ignore"):
            for index in range(kernel.pieces):
                piece = kernel.piece(index)
                part = source[piece.start * item : piece.stop * item]
                for image in piece.images:
                    kernel.fill(image, part, target[image.start * item : image.stop * item], draw)
        return made


def widened_checkpoint(plan: Plan) -> Checkpoint:
    """The checkpoint that a plan makes, without optimizer state: names, shapes and config."""
    rows = {row.key: row for row in plan.rows if not row.slot}
    weights = {name: key for name, key in plan.source.weights.items() if key in rows}
    text = rewritten_json(json.dumps(plan.source.config), plan.config, plan.source.config_file)
    return replace(
        plan.source,
        tensors={key: StoredTensor(row.dtype, row.shape, ()) for key, row in rows.items()},
        weights={**weights, **{row.name: row.key for row in rows.values()}},
        states=(),
        config=json.loads(text),
    )


class _Fit(Probe):
    """The widened model, whose outputs are multiplied as they come by what is fitted to them.

    Attributes:
        fitted: functions that have a factor.
        factors: tensor in the module -> factor.
        last: the parameter of the last product: the head's.
    """

    def __init__(self, plan: Plan, before: Mapping[str, float | None], **options: Any) -> None:
        source = WidenedSource(plan)
        super().__init__(widened_checkpoint(plan), source=source, **options)
        self._plan, self._targets = plan, before
        self.fitted: set[str] = set()
        self.factors: dict[str, float] = {}
        self.last = ""
        self._rows: dict[str, Row] = {}
        for row in plan.rows:
            if not row.slot:
                self._rows.setdefault(row.stream.partition("[")[0], row)
        self._watch.adjust = self._adjust

    def _observe(self, parameter: str, x: torch.Tensor, y: torch.Tensor) -> None:
        self.last = parameter
        super()._observe(parameter, x, y)

    def _adjust(self, name: str, stream: torch.Tensor, output: torch.Tensor) -> None:
        """Multiply what a function adds by what makes its ratio that of the source."""
        target = self._targets.get(name)
        read, added = (float(t.double().square().mean()) ** 0.5 for t in (stream, output))
        tensors = self._tensors_of(name)
        if target is None or not tensors or not (read > 0 and added > 0):
            return
        factor = target * read / added
        if not isfinite(factor):
            return
        output *= factor
        self.fitted.add(name)
        for tensor in tensors:
            self.factors[tensor] = factor

    def _tensors_of(self, name: str) -> list[str]:
        """Tensors under a function's name that give out entries of the residual stream."""
        return [
            tensor
            for tensor, row in self._rows.items()
            if (tensor == name or tensor.startswith(f"{name}.")) and _gives_stream(row)
        ]


def _gives_stream(row: Row) -> bool:
    assert row.recipe.pattern is not None
    dims = row.recipe.pattern.dims.dims
    return any(dim.role in (Role.OUT, Role.BIAS) and _STREAM in axis_names(dim.expr) for dim in dims)
