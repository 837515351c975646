"""Scaling ``calibrated``: factors fitted on tokens, so that every block adds to the stream what it added.

The method's factors assume features of zero mean, equal variance and independence. Trained rows align with
their input and random ones do not, copies at fractional factors are not independent of their sources, and a
zeroed half takes its share of the output away. Here that is measured and made up for, function by function:
what a block's function adds to the residual stream is multiplied so that RMS(f(Norm h)) / RMS(h) (Sec. 3.1,
App. B) is what it was in the source on the same tokens. The factor goes into the weight, and bias, that
gives the output. Under copy-copy columns get 1/multiplicity first, which keeps the function of inner axes
exactly. The head gets the factor that brings the best temperature of the predictions back to the source's.

Where something new is drawn or zero, what a function adds is signal, of the old entries, and noise, of the
new ones. What is missing is made up for by the signal alone: new entries keep the method's scale, and
the factor goes to the old ones. Only where there is too much does it go to both. So the noise is never
amplified; a common factor brings sizes back too, and the loss is above that of the method's rule. New
columns of embeddings are lowered until no more enters the first block than did.

The first batch is run a few times, each function fitted with all earlier ones in place, until new entries
have their scale. Then the widened model with its factors is run over all tokens and the factors are corrected
by what is left, until nothing is; so what comes out was measured on the model that is written. How much
batches differ says how well the ratios are known; where that is not enough, more tokens are taken.

These rules are ours, not the paper's. Widened weights are made in memory, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from math import ceil, isfinite, log, nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sparkling_cli.diagnostics.activations import batches_of, tokens_for
from sparkling_cli.diagnostics.data import Sample
from sparkling_cli.diagnostics.probe import Probe, pieces
from sparkling_cli.errors import LayoutError
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.layout.expr import COUNTED, Role, axis_names
from sparkling_cli.layout.keys import path_of, set_path
from sparkling_cli.plan.build import build_plan, with_calibration
from sparkling_cli.plan.model import Calibration, Plan, Row
from sparkling_cli.storage.read import TensorSource
from sparkling_cli.storage.tensors import StoredTensor
from sparkling_cli.widening import moments
from sparkling_cli.widening.entries import as_doubles
from sparkling_cli.widening.geometry import source_shape
from sparkling_cli.widening.kernel import Given, compile_kernel
from sparkling_cli.widening.means import Means
from sparkling_cli.widening.parts import boxes, stream_of

#: sequences to fit on at first, and at most where that is too few
SEQUENCES, MOST = 64, 512
#: standard error of a ratio that is good enough, and in how many batches at least it is estimated
_SURE, _BATCHES = 0.005, 16
#: a difference of losses that is none
_NOISE = 1e-4
#: a ratio may be off by this share on the tokens that it was fitted on
TOLERANCE = 0.02
#: the axis of the residual stream
_STREAM = "hidden"
#: factors that are nearer to 1 are rounding: the weights keep their bits
_NEGLIGIBLE = 1e-4
#: corrections, at most, and what is left after the last one that is needed
_PASSES, _ENOUGH = 4, 1e-3
#: first fits, at most, and how near new entries then are to the scale that they are to have
_ROUNDS, _SETTLED = 5, 0.01
#: where the factor on the logits is looked for, and at how many places
_TEMPERATURES, _PLACES = (0.05, 4.0), 29


def calibrate(plan: Plan, *, data: Path | None, model: str | None, memory: int) -> Calibration:
    """The factors of an expansion, fitted on tokens.

    Args:
        plan: with the method's factors.
        data: text or tokens; see :func:`~sparkling_cli.diagnostics.data.load_tokens`.
        model: ``package.module:factory`` of the user's own model.
        memory: budget in bytes, beside the largest widened tensor.

    Raises:
        LayoutError: a ratio cannot be brought back; or no model can be built and run.
        CheckpointError, MissingDependencyError: no model can be built and run.
    """
    options: dict[str, Any] = {"model": model, "memory": memory // 4}
    count, found = SEQUENCES, None
    while True:
        with Probe(plan.source, **options) as small:
            ids = tokens_for(small, Sample(data, count)).ids
            room = batches_of(ids, 2 * small.sequence_bytes(ids.shape[1]), memory)
            batches = torch.split(ids, min(len(room[0]), -(-len(ids) // _BATCHES)))
            if found is None:
                small.run(room[0])
                found = _first_fit(plan, small, room[0], options)
        with Probe(plan.source, **options) as small:
            before = _run(small, batches)
        after, calibration = _corrected(plan, found, before, batches, options)
        error = before.error(after)
        if error <= _SURE or len(ids) < count or count == MOST:
            break
        count = min(MOST, ceil(count * (error / _SURE) ** 2))
    with _widened(_by_the_method(plan), **options) as wide:
        for batch in batches:
            wide.run(batch)
        without = wide.result().loss
    return replace(calibration, note=_note(ids.numel(), error, before.loss, without, after.loss))


def _corrected(
    plan: Plan, fit: _Fit, before: _Pass, batches: Sequence[torch.Tensor], options: Mapping[str, Any]
) -> tuple[_Pass, Calibration]:
    """Correct the factors of a fit by what is left on all tokens; the last pass, and what it was made with.

    Raises:
        LayoutError: a ratio cannot be brought back.
    """
    tensors, head, factors = fit.tensors, _head(plan, fit.last), fit.factors
    for left in reversed(range(_PASSES)):
        calibration = _calibration(factors, fit.shares)
        with _widened(with_calibration(plan, calibration), **options) as wide:
            after = _run(wide, batches)
        cooler = after.temperature / before.temperature if head else 1.0
        moved = {name: after.ratios.get(name, 0.0) / wanted - 1 for name, wanted in before.ratios.items()}
        fitted = {name: moved[name] for name in tensors.keys() & moved.keys()}
        if not left or max(map(abs, (cooler - 1, *fitted.values()))) < _ENOUGH:
            break
        for name, by in fitted.items():
            for tensor in tensors[name]:
                factors[tensor] /= 1 + by
        for tensor in head:
            factors[tensor] = factors.get(tensor, 1.0) * cooler
    worst = max(moved, key=lambda name: abs(moved[name]), default="")
    if worst and not abs(moved[worst]) <= TOLERANCE:
        why = "does not settle" if worst in tensors else "no one weight gives out what it adds to the stream"
        raise LayoutError(
            f"scaling 'calibrated': the ratio RMS(f(Norm h))/RMS(h) of {worst} stays {moved[worst]:+.1%} "
            f"from the source's: {why}",
            hint="use --scaling rms",
        )
    return after, calibration


def _by_the_method(plan: Plan) -> Plan:
    """The same plan with the method's factors alone."""
    originals = {axis: grown.originals for axis, grown in plan.growth.items()}
    spec = plan.spec.model_copy(update={"scaling": "rms"})
    return build_plan(plan.source, plan.layout, spec, originals)


def _note(tokens: int, error: float, *losses: float | None) -> str:
    """What a calibration was made on, how sure it is, and what it does to the loss there."""
    words = f"calibrated on {tokens:,} tokens: ratios are known to {error:.1%} (standard error)"
    if None in losses:
        return words
    before, without, after = (float(loss or 0) for loss in losses)
    words += f"; loss there {before:.4f} before, {after:.4f} widened, {without:.4f} by --scaling rms"
    if after > without + _NOISE:
        words += ". It is higher than by --scaling rms: prefer that if the loss at the boundary matters"
    return words


def _first_fit(plan: Plan, small: Probe, ids: torch.Tensor, options: Mapping[str, Any]) -> _Fit:
    """Factors that give functions their ratios on a few tokens, and what new entries get of them.

    A tensor's new entries get ``share * factor``, which is to be the factor, or 1 where that is less. As the
    factor depends on the share, the two are found in turn.

    Args:
        plan: with the method's factors.
        small: the source, after these tokens.
        ids: of tokens.
        options: of a probe.
    """
    noisy, targets = _noisy(plan), _ratios(small)
    shares: dict[str, float] = {}
    tables: dict[str, float] = {}
    for left in reversed(range(_ROUNDS)):
        fit = _Fit(plan, targets, shares, **options)
        with fit:
            fit.run(ids)
        if not shares:
            tables = dict.fromkeys(fit.tables & noisy, _table_share(plan, small, fit))
        wanted = {name: min(1.0, 1 / factor) for name, factor in fit.factors.items() if name in noisy}
        wanted |= tables
        off = max((abs(wanted[name] / shares.get(name, 1.0) - 1) for name in wanted), default=0.0)
        if not left or off < _SETTLED:
            break
        shares = wanted
    return fit


def _table_share(plan: Plan, small: Probe, wide: Probe) -> float:
    """The factor on new columns of embeddings at which no more enters the first block than in the source.

    Where the old channels of the stream have an RMS of R and all of them one of R', the new ones have a mean
    square of ``(d' R'^2 - d R^2) / (d' - d)``; by the factor it is R^2, or less.
    """
    grown = plan.growth.get(_STREAM)
    before, after = ([point.rms or 0.0 for point in of.result().stream[:1]] for of in (small, wide))
    if grown is None or not before or not after:
        return 1.0
    squares = grown.target * after[0] ** 2 - grown.source * before[0] ** 2
    new = squares / (grown.target - grown.source)
    return min(1.0, before[0] / sqrt(new)) if new > 0 and before[0] else 1.0


def _noisy(plan: Plan) -> set[str]:
    """Tensors in which some new entry is no copy, or meets something that is none."""
    loose = {axis for axis, grown in plan.growth.items() if not grown.copied}
    found = set()
    for row in plan.rows:
        pattern = row.recipe.pattern
        grown = pattern.dims.axes() & plan.growth.keys() if pattern is not None else set()
        if grown & loose and not grown & COUNTED:
            found.add(row.stream.partition("[")[0])
    return found


def _calibration(factors: Mapping[str, float], shares: Mapping[str, float]) -> Calibration:
    """Factors that are more than rounding, and those of new entries where they are others."""
    kept = {name: factor for name, factor in factors.items() if abs(factor - 1) > _NEGLIGIBLE}
    new = {name: kept.get(name, 1.0) * share for name, share in shares.items()}
    return Calibration(kept, {name: f for name, f in new.items() if abs(shares[name] - 1) > _NEGLIGIBLE})


@dataclass(frozen=True)
class _Pass:
    """All tokens through a model.

    Attributes:
        temperature: the factor on its logits at which the loss is least, about.
        ratios: function -> RMS(f(Norm h)) / RMS(h), where it adds something.
        loss: per token.
        logs: of every batch, function -> logarithm of the ratio there.
        weights: tokens of every batch.
    """

    temperature: float
    ratios: Mapping[str, float]
    loss: float | None
    logs: Sequence[Mapping[str, float]]
    weights: Sequence[int]

    def error(self, after: _Pass) -> float:
        """The largest standard error of a change of a ratio, as a share, from how batches differ in it."""
        if len(self.weights) < 2:
            return 0.0
        weights = np.array(self.weights) / sum(self.weights)
        errors = [0.0]
        for name in self.ratios:
            both = zip(self.logs, after.logs, strict=True)
            moved = np.array([new.get(name, nan) - old.get(name, nan) for old, new in both])
            off = weights * (moved - (weights * moved).sum())
            errors.append(float(np.sqrt((off**2).sum() * len(off) / (len(off) - 1))))
        return max(error for error in errors if isfinite(error))


def _ratios(probe: Probe) -> dict[str, float]:
    """Function -> RMS(f(Norm h)) / RMS(h), where it adds something."""
    return {stat.name: stat.r for stat in probe.result().functions if stat.r}


def _run(probe: Probe, batches: Sequence[torch.Tensor]) -> _Pass:
    """All tokens through a model.

    The loss is convex in a factor on the logits; it is taken at fixed places, with a parabola through the
    lowest three.
    """
    places = np.geomspace(*_TEMPERATURES, _PLACES)
    losses = np.zeros(_PLACES)
    logs: list[dict[str, float]] = []
    known: dict[str, tuple[float, float]] = {}
    for ids in batches:
        for row, wanted in zip(probe.run(ids), ids, strict=True):
            for part, want in zip(pieces(row[:-1]), pieces(wanted[1:], row.shape[-1]), strict=True):
                for i, factor in enumerate(places):
                    losses[i] += float(cross_entropy(part.float() * factor, want, reduction="sum"))
        sums, logs = probe.squares(), [*logs, {}]
        for name, (read, added) in sums.items():
            old_read, old_added = known.get(name, (0.0, 0.0))
            if added > old_added and read > old_read:
                logs[-1][name] = log((added - old_added) / (read - old_read)) / 2
        known = sums
    least = min(max(int(losses.argmin()), 1), _PLACES - 2)
    before, here, after = losses[least - 1 : least + 2]
    bend = before - 2 * here + after
    shift = (before - after) / (2 * bend) if bend > 0 else 0.0
    temperature = float(places[least] * (places[1] / places[0]) ** min(max(shift, -1.0), 1.0))
    weights = [ids.numel() for ids in batches]
    return _Pass(temperature, _ratios(probe), probe.result().loss, logs, weights)


def _head(plan: Plan, parameter: str) -> list[str]:
    """Tensors that a factor on the logits goes into: the head's, or where it is tied the final norm's."""
    names = {row.stream for row in plan.rows if not row.slot}
    if parameter in {name for group in plan.layout.tied for name in group}:
        found = [item.tensor for item in plan.layout.compensations if item.fan_in and item.axis == _STREAM]
    else:
        found = [parameter, parameter.removesuffix("weight") + "bias"]
    return [name for name in dict.fromkeys(found) if name in names]


class WidenedSource(TensorSource):
    """The widened weights of a plan, made in memory when they are asked for."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._rows: dict[str, Row] = {row.key: row for row in plan.rows if not row.slot}
        before = {key: row.source for key, row in self._rows.items()}
        super().__init__(replace(plan.source, tensors=before))
        self.checkpoint = widened_checkpoint(plan)
        self._before = TensorSource(replace(plan.source, tensors=before))
        self._last: tuple[str, torch.Tensor] | None = None

    def close(self) -> None:
        """Close the files."""
        self._last = None
        super().close()
        self._before.close()

    def read(self, key: str, *, rows: slice | None = None) -> torch.Tensor:
        """The widened tensor, or some of its rows."""
        if self._last is None or self._last[0] != key:
            self._last = None  # one at a time
            row = self._rows[key]
            old = self._before.read(key)
            self._last = key, self._widened(row, old) if row.recipe.changes else old
        made = self._last[1]
        return made if rows is None else made[rows]

    def _widened(self, row: Row, old: torch.Tensor) -> torch.Tensor:
        recipe = row.recipe
        kernel = compile_kernel(recipe.view, recipe.dtype, recipe.scale, recipe.offset, fresh=recipe.fresh)
        source = old.contiguous().reshape(-1).view(torch.uint8).numpy()
        item = old.element_size()
        made = torch.empty(recipe.shape, dtype=old.dtype)
        target = made.reshape(-1).view(torch.uint8).numpy()
        known: dict[str, moments.Moments] = {}
        if kernel.random:
            entries = source.reshape(-1, item)
            for box in boxes(kernel.dims, source=True):
                edges = range(0, box.entries, moments.BLOCK)
                places = (box.places(at, min(at + moments.BLOCK, box.entries)) for at in edges)
                numbers = (as_doubles(entries[place].reshape(-1), recipe.dtype) for place in places)
                known[stream_of(row.stream, box.unit)] = moments.merged(map(moments.block_moments, numbers))
        doubles = as_doubles(source, recipe.dtype) if kernel.given else source
        means = Means(self._plan.means, source_shape(recipe.view), lambda start, stop: doubles[start:stop])
        given = Given(self._plan.spec.seed, row.stream, known, means, self._plan.spec.router_noise)
        with np.errstate(all="ignore"):
            for index in range(kernel.pieces):
                piece = kernel.piece(index)
                part = source[piece.start * item : piece.stop * item]
                for image in piece.images:
                    out = target[image.start * item : image.stop * item]
                    kernel.fill(image, part, out, given)
        return made


def widened_checkpoint(plan: Plan) -> Checkpoint:
    """The checkpoint that a plan makes, without optimizer state: names, shapes and config."""
    rows = {row.key: row for row in plan.rows if not row.slot}
    weights = {name: key for name, key in plan.source.weights.items() if key in rows}
    config = deepcopy(plan.source.config)
    for key, value in plan.config.items():
        set_path(config, path_of(key), value)
    return replace(
        plan.source,
        tensors={key: StoredTensor(row.dtype, row.shape, ()) for key, row in rows.items()},
        weights={**weights, **{row.name: row.key for row in rows.values()}},
        states=(),
        config=config,
    )


def _widened(plan: Plan, **options: Any) -> Probe:
    """The model that a plan makes."""
    return Probe(widened_checkpoint(plan), source=WidenedSource(plan), **options)


class _Fit(Probe):
    """The widened model, whose outputs are multiplied as they come by what is fitted to them.

    Args:
        plan: with the method's factors.
        targets: function -> ratio that it is to have.
        shares: tensor in the module -> factor on its new entries.
        options: of a probe.

    Attributes:
        shares: as given.
        tensors: function -> tensors in the module that its factor goes into; only those that have any.
        factors: tensor in the module -> factor.
        last: the parameter of the last product: the head's.
        tables: tensors in the module that are embeddings, and give the stream its first entries.
    """

    def __init__(
        self, plan: Plan, targets: Mapping[str, float], shares: Mapping[str, float], **options: Any
    ) -> None:
        plan = with_calibration(plan, _calibration({}, shares))
        super().__init__(widened_checkpoint(plan), source=WidenedSource(plan), **options)
        self._targets, self.shares = targets, shares
        self.tensors: dict[str, list[str]] = {}
        self.factors: dict[str, float] = {}
        self.last = ""
        rows = {row.stream.partition("[")[0]: row for row in plan.rows if not row.slot}
        self._giving = [name for name, row in rows.items() if _gives_stream(row)]
        embeddings = {f"{p}.weight" for p, m in self.model.named_modules() if isinstance(m, nn.Embedding)}
        self.tables = embeddings & set(self._giving)
        self._watch.adjust = self._adjust

    def _observe(self, parameter: str, x: torch.Tensor, y: torch.Tensor) -> None:
        self.last = parameter
        super()._observe(parameter, x, y)

    def _adjust(self, name: str, stream: torch.Tensor, output: torch.Tensor) -> None:
        """Multiply what a function adds by what makes its ratio that of the source."""
        if name in self._watch.normed:  # whatever its size, a norm takes it out again
            return
        tensors = [t for t in self._giving if t == name or t.startswith(f"{name}.")]
        read, added = (float(t.double().square().mean()) ** 0.5 for t in (stream, output))
        factor = self._targets.get(name, 0.0) * read / added if added else 0.0
        if tensors and factor and isfinite(factor):
            output *= factor
            self.tensors[name] = tensors
            self.factors |= dict.fromkeys(tensors, factor)


def _gives_stream(row: Row) -> bool:
    assert row.recipe.pattern is not None
    dims = row.recipe.pattern.dims.dims
    return any(dim.role in (Role.OUT, Role.BIAS) and _STREAM in axis_names(dim.expr) for dim in dims)
