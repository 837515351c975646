"""Quantized moments: which tensors of a parameter's state make up one, and what they become."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.model import Checkpoint, ParamState
from sparkling_cli.formats.quantized_states import Quantized, quantized_in
from sparkling_cli.spec.model import ExpansionSpec
from sparkling_cli.storage.tensors import StoredTensor
from sparkling_cli.widening.quantized import Blocks

Shape = tuple[int, ...]


class QuantizedParts(NamedTuple):
    """A quantized moment of a parameter, and where its codes, scales and levels (if any) lie."""

    own: Quantized
    parts: tuple[StoredTensor, ...]

    def of(self, slot: str) -> StoredTensor:
        """One of them."""
        return self.parts[self.own.slots.index(slot)]

    def blocks(self, slot: str) -> Blocks:
        """How the moment is quantized, for its codes or its scales."""
        return Blocks(self.own.size, self.own.bits, slot == self.own.scales, bool(self.own.levels))

    def shape(self, slot: str, parameter: Shape, name: str) -> Shape:
        """The shape of codes or scales for a parameter of a new shape.

        Raises:
            CheckpointError: its entries are no whole number of blocks, which this optimizer asks for.
        """
        if self.own.whole and prod(parameter) % self.own.size:
            raise CheckpointError(
                f"optimizer state {slot!r} of {name!r} is quantized in blocks of {self.own.size} entries, "
                f"which do not make up its new shape {parameter} of {prod(parameter)} entries",
                hint="choose sizes of which they do; or expand a copy of the checkpoint without the "
                "optimizer's state, with --init random-copy, and restart the optimizer",
            )
        codes, scales = self.own.shapes(self.parts[0].shape, self.parts[1].shape, parameter)
        return scales if slot == self.own.scales else codes


def quantized_parts(
    checkpoint: Checkpoint, state: ParamState, parameter: Shape, spec: ExpansionSpec
) -> dict[str, QuantizedParts]:
    """State name -> the quantized moment that it is part of; none where the spec says what it is.

    Args:
        checkpoint: the source.
        state: of a parameter.
        parameter: its shape.
        spec: what is asked for.
    """
    tensors = {slot: checkpoint.tensors[key] for slot, key in state.tensors.items() if slot not in spec.state}
    return {
        slot: QuantizedParts(found, tuple(tensors[name] for name in found.slots))
        for found in quantized_in(tensors, parameter)
        for slot in found.slots
    }
