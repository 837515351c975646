"""What the training side needs of an expanded checkpoint: layout, births and schedule; a few small files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sparkling_cli.errors import CheckpointError, LayoutError, SparklingError
from sparkling_cli.layout.model import ModelLayout, TensorPattern
from sparkling_cli.layout.regions import Births, Region, region_of, stage_of
from sparkling_cli.manifest import read_manifest
from sparkling_cli.schedule.rewarmup import Rewarmup, read_rewarmup
from sparkling_cli.storage.sidecar import CURVE, MANIFEST, REWARMUP, sidecar_root
from sparkling_cli.widening.geometry import Growth, Treatment, View, growth_at, view_of

#: what wrappers put into parameter names, wherever it stands
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})


@dataclass(frozen=True)
class History:
    """A model's expansions.

    Attributes:
        layout: of the model as it is now.
        births: axis -> ``[start, stop, stage]``, for every axis that ever grew.
        rewarmup: the schedule of every stage.
        growth: axis -> growth in the last expansion, with what each new entry is a copy of.
    """

    layout: ModelLayout
    births: Births
    rewarmup: Rewarmup
    growth: Mapping[str, Growth] = field(default_factory=dict)

    def region(self, name: str, shape: tuple[int, ...]) -> Region:
        """The region of the parameter of that name (wrappers' prefixes do not matter).

        Raises:
            LayoutError: no pattern stands for it, or it has not the shape after the expansion.
        """
        pattern, own = self._pattern(name)
        dims = pattern.dims
        expected = dims.shape(self.layout.sizes)
        if tuple(shape) != expected:
            raise LayoutError(
                f"parameter {name!r} has shape {tuple(shape)}, after the expansion it has {expected}",
                hint="build the model from the expanded checkpoint's config; of a model wrapped by "
                "FullyShardedDataParallel give the model itself, its named parameters are flat",
            )
        at = pattern.template.at(own) or {}
        born = [stage_of(index, self.births[axis]) for axis, index in at.items() if axis in self.births]
        return region_of(dims, self.layout.sizes, self.births, max(born, default=0))

    def shape_before(self, name: str, stage: int) -> tuple[int, ...]:
        """The shape that the parameter of that name had before an expansion.

        Raises:
            LayoutError: no pattern stands for it.
        """
        return self._pattern(name)[0].dims.shape(self._sizes_before(stage))

    def carried(self, name: str, stage: int) -> float:
        """The factor that the parameter's entries carry since an expansion; see :meth:`ModelLayout.carried`.

        Raises:
            LayoutError: no pattern stands for it.
        """
        own = self._pattern(name)[1]
        return self.layout.carried(own, self._sizes_before(stage), self.layout.sizes)

    def _sizes_before(self, stage: int) -> dict[str, int]:
        older = {
            axis: sum(int(stop) - int(start) for start, stop, born in births if born < stage)
            for axis, births in self.births.items()
        }
        return {**self.layout.sizes, **older}

    def view(self, name: str) -> View:
        """How the last expansion made the parameter of that name, as if all new entries were copies.

        Raises:
            LayoutError: no pattern stands for it.
        """
        pattern, own = self._pattern(name)
        before = {**self.layout.sizes, **{axis: grown.source for axis, grown in self.growth.items()}}
        growth = growth_at(self.growth, pattern.template, own)
        return view_of(pattern.dims, before, growth, Treatment())

    def _pattern(self, name: str) -> tuple[TensorPattern, str]:
        """The pattern that stands for the parameter of that name, and the name without wrappers' prefixes."""
        for candidate in _candidates(name):
            try:
                return self.layout.module_table.find(candidate), candidate
            except LayoutError:
                continue
        raise LayoutError(
            f"parameter {name!r} matches no pattern of the layout of {self.layout.name}",
            hint="pass named parameters under the names that the expanded checkpoint uses",
        )


def _candidates(name: str) -> list[str]:
    plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    found = [plain]
    while plain.startswith("module."):  # DistributedDataParallel and DeepSpeed
        plain = plain.removeprefix("module.")
        found.append(plain)
    return found


def read_history(checkpoint: Path | str) -> History:
    """The history that ``sparkling expand`` left in (or beside) a checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.exists():
        raise CheckpointError(f"{checkpoint} does not exist")
    root = sidecar_root(checkpoint)
    manifest, rewarmup = read_manifest(root / MANIFEST), read_rewarmup(root / REWARMUP, output=checkpoint)
    return History(manifest.model_layout(), manifest.births(), rewarmup, manifest.growth())


def carry_history(source: Path | str, destination: Path | str) -> None:
    """Copy an expanded checkpoint's history into one that training wrote later.

    A second expansion needs it there. ``SparklingCallback`` does it at every save.

    Raises:
        CheckpointError: the source has none.
        SparklingError: the destination is no directory.
    """
    source, destination = Path(source), Path(destination)
    if not destination.is_dir():
        raise SparklingError(f"{destination} is no directory; the history goes into a checkpoint directory")
    for name in (MANIFEST, REWARMUP, CURVE):
        found = sidecar_root(source) / name
        if not found.exists():
            raise CheckpointError(
                f"{source} has no {name}", hint="only outputs of `sparkling expand` have one"
            )
        target = destination / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(found, target)
