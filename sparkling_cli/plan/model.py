"""The plan's types: recipes, rows that refer to them, and the expansion that carries all of it along.

A plan is made from shapes alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparkling_cli.formats.model import Checkpoint, OutputFile
from sparkling_cli.layout.model import ModelLayout, TensorPattern
from sparkling_cli.results.account import Account, Kind
from sparkling_cli.spec.model import ExpansionSpec
from sparkling_cli.storage.tensors import ITEM_BYTES, StoredTensor
from sparkling_cli.widening.derived import is_derived
from sparkling_cli.widening.geometry import Fill, Growth, Treatment, View, scale_range
from sparkling_cli.widening.quantized import Blocks

if TYPE_CHECKING:
    from sparkling_cli.manifest import Manifest
    from sparkling_cli.schedule.rewarmup import Rewarmup


#: slot of tensors that are neither weights nor state, in files that are written anew
CARRIED = "carried"


@dataclass(frozen=True, eq=False)
class Recipe:
    """What happens to every tensor of one kind: tens of thousands of tensors share a few dozen recipes.

    The source is read as ``view`` (its dims split at flattened factors); entry by entry the target is
    ``scale * run_scales * source + offset``, in float32 (float64 for float64), rounded once to
    ``dtype``; new entries whose fill is zero are 0, random ones are ``std * N(0, 1)`` with the
    source tensor's standard deviation times the fan-in scale of their columns.

    Two recipes are equal only if they are one object, so a recipe is a key of dictionaries at no cost.

    Attributes:
        kind: what the tensors are.
        slot: "" for weights, else the state's name (``exp_avg``).
        dtype: of source and target.
        before: shape of the source.
        shape: shape of the target.
        view: sizes and runs, per view dim.
        scale: factor on all entries (compensations, and what was fitted on tokens).
        offset: see :class:`~sparkling_cli.layout.model.Compensation`; already folded: added after scale.
        zero: the whole tensor becomes zero (dropped state).
        pattern: of the layout, that stands for the weights; None for state.
        fresh: factor on entries that are new on any dim, where that is not ``scale``.
        blocks: of quantized state, of which ``view`` is the view as a whole; None of any other tensor.
    """

    kind: Kind
    slot: str
    dtype: str
    before: tuple[int, ...]
    shape: tuple[int, ...]
    view: View
    scale: float = 1.0
    offset: float = 0.0
    zero: bool = False
    pattern: TensorPattern | None = None
    fresh: float | None = None
    blocks: Blocks | None = None

    @cached_property
    def derived(self) -> bool:
        """It is made as a whole: new entries follow from all old ones, or it is a part of quantized state."""
        return (is_derived(self.view) or self.blocks is not None) and not self.zero

    @property
    def changes(self) -> bool:
        """Whether the output differs from the source."""
        scaled = self.scale != 1.0 or self.offset != 0.0 or self.zero
        return scaled or not all(dim.identity for dim in self.view)

    @property
    def scales(self) -> tuple[float, float]:
        """The smallest and the largest factor of any entry."""
        low, high = scale_range(self.view)
        both = self.scale, self.scale if self.fresh is None else self.fresh
        return min(both) * low, max(both) * high

    @property
    def fills(self) -> tuple[Fill, ...]:
        """How new entries are filled."""
        found = {run.fill for dim in self.view for run in dim.runs if run.new}
        return tuple(sorted(found, key=lambda fill: fill.name))


class Row(NamedTuple):
    """What happens to one tensor.

    Attributes:
        key: key of the output tensor.
        name: weight name in the output, or the parameter's module name for state.
        source: where the source's bytes are.
        recipe: what becomes of them.
        stream: name of the random stream (the parameter's name): the same on disk and in state.
        new: the tensor is a copy, under a name of its own, of one that has a row too.
        parts: of quantized state, where codes, scales and levels (if there are any) lie in the source.
    """

    key: str
    name: str
    source: StoredTensor
    recipe: Recipe
    stream: str
    new: bool = False
    parts: tuple[StoredTensor, ...] = ()

    @property
    def slot(self) -> str:
        """See :class:`Recipe`."""
        return self.recipe.slot

    @property
    def dtype(self) -> str:
        """See :class:`Recipe`."""
        return self.recipe.dtype

    @property
    def grows(self) -> bool:
        """Whether it has new entries."""
        return self.new or self.recipe.shape != self.recipe.before

    @property
    def entries_before(self) -> int:
        """Entries of the source that no other row has."""
        return 0 if self.new else prod(self.recipe.before)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the target."""
        return self.recipe.shape


@dataclass(frozen=True)
class Calibration:
    """Factors that were fitted on tokens (scaling ``calibrated``), beyond those of the method.

    Attributes:
        factors: tensor in the module -> factor on all of its entries.
        fresh: the same on its new entries, where that is another.
        note: what it was made on.
    """

    factors: Mapping[str, float] = field(default_factory=dict)
    fresh: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    def of(self, stream: str) -> float:
        """The factor on a tensor, or part of one, that has these random numbers (see ``widening.parts``)."""
        return self.factors.get(stream.partition("[")[0], 1.0) if self.factors else 1.0

    def of_new(self, stream: str) -> float | None:
        """The factor on its new entries; None where it is that of the others."""
        return self.fresh.get(stream.partition("[")[0]) if self.fresh else None


@dataclass(frozen=True)
class Plan:
    """A whole widening, ready to be executed, printed or compared.

    Attributes:
        source: the opened checkpoint.
        layout: the model's layout.
        spec: what was asked for.
        growth: axis -> sizes before and after, axes that grow only.
        treatment: the spec's fills and scaling.
        recipes: what becomes of tensors, each once.
        rows: every output tensor, in the output's order.
        config: config key -> new value.
        scalars: state scalars to overwrite.
        calibration: factors fitted on tokens; None until they are, and under other scalings.
        notes: what the user should know; warnings: what the user should act on.
        account: every tensor of the source, by kind and by what becomes of it.
        read: the source as it is read for a deeper model (see ``plan.deepen``); else None.
    """

    source: Checkpoint
    layout: ModelLayout
    spec: ExpansionSpec
    growth: Mapping[str, Growth]
    treatment: Treatment
    recipes: tuple[Recipe, ...]
    rows: tuple[Row, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    calibration: Calibration | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    account: Account = field(default_factory=Account)
    read: Checkpoint | None = None

    def __repr__(self) -> str:
        return f"Plan({self.source.root}, {self.layout.name}, {len(self.rows)} tensors)"

    def nbytes(self, *, after: bool) -> tuple[int, int]:
        """Bytes of weights and of optimizer state, of the source or of the output."""
        found = [0, 0]
        for (recipe, new), count in self._counts.items():
            shape = recipe.shape if after else recipe.before
            if after or not new:
                found[bool(recipe.slot)] += count * prod(shape) * ITEM_BYTES[recipe.dtype]
        return found[0], found[1]

    @cached_property
    def _counts(self) -> Counter[tuple[Recipe, bool]]:
        """How many rows have a recipe, and are new."""
        return Counter((row.recipe, row.new) for row in self.rows)

    @property
    def means(self) -> tuple[tuple[int, ...], ...]:
        """See :class:`~sparkling_cli.widening.geometry.Growth`, of the vocabulary."""
        grown = self.growth.get("vocab")
        return () if grown is None else grown.means

    @property
    def has_moments(self) -> bool:
        """Whether there is state that follows parameters and is no copy of the weights."""
        return any(recipe.kind in (Kind.MOMENT, Kind.FACTOR) for recipe in self.recipes)


@dataclass(frozen=True)
class Invocation:
    """What was asked for beside the spec, paths as they were given.

    Attributes:
        source: the checkpoint.
        destination: the output; None where its name was left to the tool.
        layout: a layout file.
        model: a user's own model.
        data: what activations are measured on.
        report: auto, full or none.
        param_order: a file with the parameters' names in the optimizer's order.
    """

    source: Path
    destination: Path | None = None
    layout: Path | None = None
    model: str | None = None
    data: Path | None = None
    report: str = "auto"
    param_order: Path | None = None


@dataclass(frozen=True)
class Expansion:
    """All that is known before the first byte is written: what execution, outcome and report work from.

    Attributes:
        plan: what will be done.
        files: the output's files, laid out by the format.
        destination: where the output will appear.
        invocation: what was asked for.
        previous: the source's own manifest, when it is an earlier output.
        rewarmup: the re-warmup of new entries; None where ``rewarmup_missing`` says why.
        rewarmup_missing: why there is none.
        source_state: size, time of change and inode of the source's files before they were opened.
    """

    plan: Plan
    files: tuple[OutputFile, ...]
    destination: Path
    invocation: Invocation
    previous: Manifest | None = None
    rewarmup: Rewarmup | None = None
    rewarmup_missing: str = ""
    source_state: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    def __repr__(self) -> str:
        grown = ", ".join(f"{name} {g.source} to {g.target}" for name, g in self.plan.growth.items())
        return f"Expansion({self.plan.source.root} to {self.destination}: {grown})"

    @property
    def bytes_to_write(self) -> int:
        """Size of all output files that are written anew."""
        return sum(file.size for file in self.files)
