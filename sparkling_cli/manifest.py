"""``sparkling/manifest.json``: the output's own history.

From it alone the training side, ``verify`` and a second expansion can work. It holds no time and no
absolute path, so the same expansion gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from sparkling_cli import __version__
from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.directory import read_sidecar
from sparkling_cli.layout import file as layout_file
from sparkling_cli.layout.depth import LAYERS, Order, new_layers, ordered
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.plan.model import Calibration, Expansion, Recipe, Row
from sparkling_cli.plan.symmetry import treatment_of, with_fills
from sparkling_cli.results.account import Account
from sparkling_cli.spec.model import ExpansionSpec
from sparkling_cli.spec.sources import make_spec
from sparkling_cli.storage.crc import FileDigest
from sparkling_cli.storage.sidecar import DIGESTS, FOLDER, MANIFEST, sidecar_root
from sparkling_cli.widening.geometry import Growth, Span, grown_layout

if TYPE_CHECKING:
    from sparkling_cli.execute.stream import Written

FORMAT = 2
#: Earlier ones that can be read: 1 also said what became of every tensor, which follows from the rest.
_EARLIER = (1,)

#: [start, stop, stage): entries of an axis, and the expansion that they were born in (0 = original)
Births = list[tuple[int, int, int]]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class AxisHistory(_Data):
    """How an axis came to its size."""

    births: Births


class Stage(_Data):
    """One expansion: number (1 = first), optimizer step, growth ``axis -> [before, after]``, spec.

    ``calibration`` has the factors that were fitted on tokens, by tensor in the module; ``calibration_new``
    those on new entries of a tensor, where they are others.
    """

    stage: int
    step: int | None
    growth: dict[str, tuple[int, int]]
    spec: dict[str, Any]
    calibration: dict[str, float] = {}
    calibration_new: dict[str, float] = {}


class SourceEntry(_Data):
    """What was read: format, the directory's own name, CRC-32 of every tensor and carried file."""

    format: str
    name: str
    tensors: dict[str, int]
    files: dict[str, FileDigest]


class TensorEntry(_Data):
    """One output tensor: see :class:`~sparkling_cli.plan.model.Row`.

    What became of it is not written down: it follows from spec, layout and axes, and ``verify`` works it out.
    """

    name: str
    kind: str = ""
    slot: str
    dtype: str
    shape: tuple[int, ...]
    crc32: int


class Manifest(_Data):
    """The whole manifest."""

    format_version: int
    tool: dict[str, str]
    spec: dict[str, Any]
    layout: dict[str, Any]
    axes: dict[str, AxisHistory]
    stages: tuple[Stage, ...]
    source: SourceEntry
    tensors: dict[str, TensorEntry]
    files: dict[str, FileDigest]
    account: Account = Account()

    def model_layout(self) -> ModelLayout:
        """The layout, with axis sizes after widening."""
        return layout_file.from_dict(self.layout, MANIFEST)

    def births(self) -> dict[str, Births]:
        """Axis -> births, for every axis that ever grew."""
        return {name: history.births for name, history in self.axes.items()}

    def growth(self, stage: int | None = None) -> dict[str, Growth]:
        """The axes that grew in an expansion, the last one by default."""
        return self._grown(len(self.stages) if stage is None else stage)[0]

    def originals(self) -> dict[str, tuple[Span, ...]]:
        """Which original every entry is a copy of, for every axis that ever grew (see ``Growth``)."""
        return self._grown(len(self.stages))[1]

    def _grown(self, last: int) -> tuple[dict[str, Growth], dict[str, tuple[Span, ...]]]:
        """Growth in stage ``last``, and originals after it: all follows from sizes and specs, in order."""
        grown: dict[str, Growth] = {}
        originals: dict[str, tuple[Span, ...]] = {}
        layout = self.model_layout()
        layers = next((s.growth[LAYERS][0] for s in self.stages if LAYERS in s.growth), 0)
        layers = layers or layout.sizes.get(LAYERS, 0)
        for stage in self.stages[:last]:
            spec = make_spec(stage.spec)
            grown = {
                axis: Growth(before, after, originals=originals.get(axis, ()))
                for axis, (before, after) in stage.growth.items()
            }
            grown = with_fills(grown, layout, treatment_of(spec))
            originals |= {
                axis: g.originals_after for axis, g in grown.items() if axis not in (LAYERS, "experts")
            }
            order: Order = tuple(range(layers))
            if LAYERS in grown:
                order = ordered(*stage.growth[LAYERS], spec.layer_mode, spec.at)
                grown[LAYERS] = replace(grown[LAYERS], order=order)
                layers = len(order)
            if "experts" in grown:
                grown["experts"] = grown["experts"].with_copies(spec.copies, order)
        return grown, originals


def read_manifest(path: Path) -> Manifest:
    """A manifest file, or the one of an output.

    Raises:
        CheckpointError: there is none, or it is damaged or of another version.
    """
    hint = "only outputs of `sparkling expand` have one: give the output"
    data = read_sidecar(path, MANIFEST, "manifest", version=FORMAT, earlier=_EARLIER, hint=hint)
    try:
        if data["format_version"] in _EARLIER:
            data = _without(data, "views")
            data["tensors"] = {
                key: _without(entry, "view", "scale", "offset", "zero", "stream")
                for key, entry in data["tensors"].items()
            }
        return Manifest.model_validate(data)
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(f"the manifest {path} is damaged: it has no table of tensors") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"the manifest {path} is damaged: {where}: {first['msg']}") from None


def manifest_of(checkpoint: Path) -> Manifest | None:
    """The manifest of a checkpoint that is an output or descends from one; None if it is neither."""
    path = sidecar_root(checkpoint) / MANIFEST
    return read_manifest(path) if path.is_file() else None


def output_behind(checkpoint: Path, *given: Path) -> Path | None:
    """The output of ``sparkling expand`` that a checkpoint was trained on from, if it lies nearby.

    Args:
        checkpoint: one with a manifest that was carried on.
        given: paths that may be it, looked at first; then what lies beside it and beside its folder.
    """
    own = manifest_of(checkpoint)
    around = (checkpoint.parent, checkpoint.parent.parent)
    near = [path for folder in around for path in sorted(folder.glob(f"*/{DIGESTS}"))]
    near += sorted(around[1].glob(f"*/*/{DIGESTS}"))
    found = [path.parent.parent for path in near]
    found = [path.with_name(path.name.removesuffix(f".{FOLDER}")) for path in found]
    for path in (*given, *found):
        if not path.exists() or path.samefile(checkpoint) or not (sidecar_root(path) / DIGESTS).is_file():
            continue
        try:
            other = manifest_of(path)
        except CheckpointError:
            continue
        if own and other and (own.source, own.tensors) == (other.source, other.tensors):
            return path
    return None


def _without(data: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in keys}


def make_manifest(expansion: Expansion, written: Written, others: Mapping[str, bytes]) -> bytes:
    """The manifest of an expansion that was carried out.

    Args:
        expansion: what was done.
        written: digests of what was read and written.
        others: the other files of the ``sparkling/`` folder.
    """
    plan, previous = expansion.plan, expansion.previous
    spec = plan.spec.as_data()
    tensors = _tensors(plan.rows, {recipe: _common(recipe) for recipe in plan.recipes}, written)
    stages = [] if previous is None else [stage.model_dump(mode="json") for stage in previous.stages]
    if plan.spec.scaling == "calibrated" and plan.calibration is None:
        raise ValueError("scaling 'calibrated' needs factors: nothing was fitted")
    stages.append(
        {
            "stage": len(stages) + 1,
            "step": plan.source.facts.get("global_step"),
            "growth": {name: [g.source, g.target] for name, g in sorted(plan.growth.items())},
            "spec": spec,
            **_fitted(plan.calibration),
        }
    )
    before = {} if previous is None else previous.births()
    data = {
        "format_version": FORMAT,
        "tool": {"name": "sparkling-cli", "version": __version__},
        "spec": spec,
        "layout": layout_file.to_dict(grown_layout(plan.layout, plan.growth)),
        "axes": {name: {"births": b} for name, b in sorted(births_after(plan.growth, before).items())},
        "stages": stages,
        "source": {
            "format": plan.source.format,
            "name": plan.source.root.name,
            "tensors": dict(written.sources),
            "files": {
                name: vars(written.files[name]) for name in plan.source.carried if name in written.files
            },
        },
        "account": plan.account.model_dump(mode="json"),
    }
    files = {
        "files": {
            **{name: vars(written.files[name]) for name in sorted(written.files)},
            **{name: vars(FileDigest.of(b)) for name, b in sorted(others.items())},
        },
    }
    text = f'{_text(data)[:-1]},"tensors":{tensors},{_text(files)[1:]}\n'
    return text.encode()


def with_changes(content: bytes, spec: ExpansionSpec, changed: Mapping[str, bytes]) -> bytes:
    """A manifest with another spec of its last expansion, and other files of the ``sparkling/`` folder."""
    data = json.loads(content)
    data["spec"] = data["stages"][-1]["spec"] = spec.as_data()
    digests = {name: vars(FileDigest.of(b)) for name, b in changed.items()}
    others = {**{n: d for n, d in data["files"].items() if n.startswith(f"{FOLDER}/")}, **digests}
    own = {name: digest for name, digest in data["files"].items() if name not in others}
    data["files"] = own | dict(sorted(others.items()))
    return f"{_text(data)}\n".encode()


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def births_after(growth: Mapping[str, Growth], before: Mapping[str, Births]) -> dict[str, Births]:
    """Births of every axis that ever grew, this growth included."""
    stage = 1 + max((s for births in before.values() for _, _, s in births), default=0)
    after = {name: list(births) for name, births in before.items()}
    for name, grown in growth.items():
        births = after.setdefault(name, [(0, grown.source, 0)])
        if grown.order:
            after[name] = _births_in(grown.order, births, stage)
        else:
            births.append((grown.source, grown.target, stage))
    return after


def _births_in(order: Order, before: Births, stage: int) -> Births:
    """Births of layers that are put between the old ones."""
    old = [born for start, stop, born in before for _ in range(start, stop)]
    born = [stage if new else old[source] for source, new in zip(order, new_layers(order), strict=True)]
    edges = [0, *(i for i in range(1, len(born)) if born[i] != born[i - 1]), len(born)]
    return [(start, stop, born[start]) for start, stop in pairwise(edges)]


def _tensors(rows: tuple[Row, ...], common: Mapping[Recipe, str], written: Written) -> str:
    """All :class:`TensorEntry` as JSON text: what a recipe says, and names and digest of every row."""
    quoted = json.JSONEncoder().encode
    entries = []
    for row in rows:
        crc = written.tensors[row.key]
        entry = f'{{"name":{quoted(row.name)},{common[row.recipe]},"crc32":{crc}}}'
        entries.append(f"{quoted(row.key)}:{entry}")
    return "{" + ",".join(entries) + "}"


def _fitted(calibration: Calibration | None) -> dict[str, dict[str, float]]:
    """A stage's factors that were fitted on tokens."""
    if calibration is None:
        return {}
    new = {"calibration_new": dict(calibration.fresh)} if calibration.fresh else {}
    return {"calibration": dict(calibration.factors), **new}


def _common(recipe: Recipe) -> str:
    """The entry of a tensor without its names and digest, as JSON text without braces."""
    entry = {
        "kind": recipe.kind.value,
        "slot": recipe.slot,
        "dtype": recipe.dtype,
        "shape": list(recipe.shape),
    }
    return _text(entry)[1:-1]
