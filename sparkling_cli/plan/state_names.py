"""What an optimizer's state is: by name, held against the weights; by measuring; or as the spec gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from heapq import nlargest
from math import prod

from sparkling_cli.errors import CheckpointError, SpecError
from sparkling_cli.formats.model import Checkpoint, Further
from sparkling_cli.formats.optimizer_states import (
    OTHERWISE,
    WEIGHT_LIKE,
    StateKind,
    base_name,
    is_named,
    state_kind,
)
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.plan.measure import Pair, decay_slope, doubt, measured_kind
from sparkling_cli.spec.model import ExpansionSpec
from sparkling_cli.storage.tensors import FLOATING, StoredTensor

_GIVEN = {"weight": StateKind.WEIGHT, "moment": StateKind.MOMENT, "carry": StateKind.SCALAR}
#: kinds that the weights tell apart
_MEASURED = (StateKind.WEIGHT, StateKind.MOMENT, StateKind.UNKNOWN)
#: tensors in which a name of the table is held against the weights
_CONFIRMED = 3


@dataclass(frozen=True)
class Known:
    """The weights, against which tensors are measured.

    Attributes:
        weights: name in the module -> where the weight lies.
        checkpoint: the source.
        layout: of the model.
        spec: what is asked for.
    """

    weights: Mapping[str, StoredTensor]
    checkpoint: Checkpoint
    layout: ModelLayout
    spec: ExpansionSpec

    def state_kinds(self) -> tuple[dict[str, StateKind], list[str]]:
        """Kinds of states that the spec gives, or whose name is not in the table; and what was measured.

        Raises:
            SpecError: the spec gives a state that there is none of.
            CheckpointError: neither name nor values say what a state is, or they contradict each other.
        """
        if self.spec.state:
            self._check_given()
        given = {slot: _GIVEN[kind] for slot, kind in self.spec.state.items()}
        decay = decay_slope(self.checkpoint.param_groups)
        notes = []
        for slot, (pairs, chance) in self._by_slot(given).items():
            if is_named(slot):
                kind = StateKind.WEIGHT if base_name(slot) in WEIGHT_LIKE else StateKind.MOMENT
                found = self._otherwise(slot)
                if not found:
                    found = doubt(self.checkpoint.root, pairs[:_CONFIRMED], base_name(slot), kind, decay)
                    found = found and f"its values {found}"
                if found:
                    raise CheckpointError(
                        f"optimizer state {slot!r} is known as a {kind.value}, but {found}",
                        hint=f"say what it is: {ways(slot)}; or expand a checkpoint without the optimizer's "
                        "state, and restart the optimizer",
                    )
                continue
            if chance:  # of a square parameter, and so by chance of its shape
                given[slot] = StateKind.OTHER
                continue
            kind, text = measured_kind(self.checkpoint.root, pairs, decay)
            if kind is StateKind.UNKNOWN and not any(self._nonzero(stored) for stored, _ in pairs):
                kind, text = StateKind.MOMENT, "all of it is zero"
            if kind is StateKind.UNKNOWN:
                raise CheckpointError(
                    f"optimizer state {slot!r} is of no known kind, and its values do not say whether it "
                    f"follows the weights: {text}",
                    hint=f"say what it is: {ways(slot)}",
                )
            given[slot] = kind
            notes.append(f"optimizer state {slot!r} is taken for a {kind.value}: {text}")
        return given, notes

    def _check_given(self) -> None:
        there = sorted(
            {slot for state in self.checkpoint.states for slot in (*state.tensors, *state.scalars)}
        )
        for slot in self.spec.state:
            if slot not in there:
                raise SpecError(
                    f"--state {slot}: there is no optimizer state of that name; there is "
                    f"{', '.join(there) or 'none at all'}",
                    hint="give one of these names, or leave it out" if there else "leave it out",
                )

    def _otherwise(self, slot: str) -> str:
        """What a name of the table is in this optimizer, as its options tell; "" if what the table says."""
        for options, names in OTHERWISE.items():
            if base_name(slot) in names and any(
                options <= group.keys() for group in self.checkpoint.param_groups
            ):
                return f"the optimizer's options ({', '.join(sorted(options))}) say: {names[base_name(slot)]}"
        return ""

    def _by_slot(self, given: Mapping[str, StateKind]) -> dict[str, tuple[list[Pair], bool]]:
        """State name -> its tensors, the largest first, each with its weight; of parameter's shape all.

        With them, whether some of that name have another shape.
        """
        found: dict[str, tuple[list[Pair], bool]] = {}
        alike: dict[tuple[str, ...], list[tuple[StoredTensor, Mapping[str, str]]]] = {}
        for state in self.checkpoint.states:  # tens of thousands, of a few kinds
            weight = self.weights.get(state.param) or self.weights.get(self.layout.canonical(state.param))
            if weight is not None and state.tensors:
                alike.setdefault(tuple(state.tensors), []).append((weight, state.tensors))
        for slots, states in alike.items():
            largest = nlargest(_CONFIRMED, states, key=lambda item: prod(item[0].shape))
            for slot in slots:
                if slot in given or slot == "step":
                    continue
                pairs, chance = found.get(slot, ([], False))
                for weight, tensors in largest if is_named(slot) else states:
                    stored = self.checkpoint.tensors[tensors[slot]]
                    kind = state_kind(slot, stored.dtype, stored.shape, weight.shape)
                    if kind is StateKind.OTHER:
                        chance = True
                    elif kind in _MEASURED and stored.shape == weight.shape:
                        pairs.append((stored, weight))
                if pairs:
                    found[slot] = sorted(pairs, key=lambda pair: -prod(pair[0].shape)), chance
        return found

    def copied(self, item: Further) -> str | None:
        """The parameter that a tensor is a copy of, by its name and the values in its dictionary; else None.

        Norms of a young run are all ones, and biases zero: that they are copies follows from the matrices
        beside them.
        """
        home, name = self._place(item)
        return name if name and self._copies.get(home) is StateKind.WEIGHT else None

    def _place(self, item: Further) -> tuple[str, str]:
        """The dictionary that a tensor lies in, and the parameter whose name and shape it has; "" if none."""
        assert item.stored is not None
        name = item.key.rpartition(":")[2]
        while name:
            weight = self.weights.get(self.layout.canonical(name))
            if weight is not None:
                break
            name = name.partition(".")[2]
        else:
            return item.name, ""
        same = weight.shape == item.stored.shape and item.stored.dtype in FLOATING
        return item.key.removesuffix(name), name if same else ""

    @cached_property
    def _copies(self) -> dict[str, StateKind]:
        """What the tensors of every dictionary are that have names and shapes of parameters."""
        pairs: dict[str, list[Pair]] = {}
        for item in self.checkpoint.further:
            home, name = self._place(item) if item.key and item.stored is not None else ("", "")
            if name and item.stored is not None:
                pairs.setdefault(home, []).append((item.stored, self.weights[self.layout.canonical(name)]))
        return {home: measured_kind(self.checkpoint.root, found)[0] for home, found in pairs.items()}

    def _nonzero(self, stored: StoredTensor) -> bool:
        from sparkling_cli.storage.read import read_tensor

        return bool(read_tensor(self.checkpoint.root, stored).any())


def ways(slot: str) -> str:
    """The options that say what a state is."""
    return (
        f"--state {slot}=weight (a copy or average of the weights), --state {slot}=moment (new entries start "
        f"from zero) or --state {slot}=carry"
    )
