"""Which pieces of a parameter's state are the codes, scales and levels of one quantized moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple

from sparkling_cli.formats.optimizer_states import CODES, LEVELS, PACKED_CODES, SCALES
from sparkling_cli.storage.tensors import Shape, StoredTensor

#: entries of a block of bitsandbytes', the usual one first
_SIZES = (256, 2048, 128, 64, 512, 1024, 4096)


class Quantized(NamedTuple):
    """One quantized moment of a parameter.

    Attributes:
        codes: name of the state that has them.
        scales: name of the state with a number for each block.
        levels: name of the state with what codes stand for; "" if they are numbers themselves.
        size: entries of a block.
        bits: of a code.
        whole: the number of entries must be a multiple of ``size``.
        slabs: moments of the parameter's size in it, each with blocks of its own, one behind the other.
    """

    codes: str
    scales: str
    levels: str
    size: int
    bits: int
    whole: bool
    slabs: int

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the states that it is made of."""
        return tuple(name for name in (self.codes, self.scales, self.levels) if name)

    def shapes(self, stored: Shape, scales: Shape, parameter: Shape) -> tuple[Shape, Shape]:
        """Shapes of codes and scales for a parameter of another shape.

        Args:
            stored: of the codes as they are.
            scales: as they are.
            parameter: its new shape.
        """
        entries = prod(parameter)
        codes = (entries // 2,) if self.bits == 4 else (*stored[: len(stored) - len(parameter)], *parameter)
        return codes, (*scales[:-1], -(-entries // self.size))


def quantized_in(state: Mapping[str, StoredTensor], parameter: Shape) -> Iterator[Quantized]:
    """Every quantized moment among a parameter's state; what does not fit together is none.

    Args:
        state: name -> tensor.
        parameter: its shape.
    """
    for slot, stored in state.items():
        if stored.dtype == "uint8" and slot[-6:] in ("state1", "state2"):
            found = _bitsandbytes(slot, state, parameter)
        elif slot.endswith((CODES, PACKED_CODES)):
            found = _torchao(slot, state, parameter)
        else:
            continue
        if found is not None:
            yield found


def _bitsandbytes(slot: str, state: Mapping[str, StoredTensor], parameter: Shape) -> Quantized | None:
    """``state1`` with ``absmax1`` and ``qmap1``; AdEMAMix' first has two moments."""
    home, number = slot[:-6], slot[-1]
    names = f"{home}absmax{number}", f"{home}qmap{number}"
    scales, levels = state.get(names[0]), state.get(names[1])
    if scales is None or levels is None or {scales.dtype, levels.dtype} != {"float32"}:
        return None
    own = state[slot].shape[: len(state[slot].shape) - len(parameter)]
    if (state[slot].shape, scales.shape[:-1], levels.shape) != ((*own, *parameter), own, (256,)):
        return None
    size = next((s for s in _SIZES if -(-prod(parameter) // s) == scales.shape[-1]), 0)
    return Quantized(slot, *names, size, 8, whole=False, slabs=prod(own)) if size else None


def _torchao(slot: str, state: Mapping[str, StoredTensor], parameter: Shape) -> Quantized | None:
    """``exp_avg`` of codes, scales, and levels where codes are none."""
    stem, bits = slot.rpartition(".")[0], 4 if slot.endswith(PACKED_CODES) else 8
    codes, scales, levels = state[slot], state.get(f"{stem}{SCALES}"), state.get(f"{stem}{LEVELS}")
    entries, own = prod(parameter), codes.dtype == "float8_e4m3fn"
    if scales is None or scales.dtype != "float32" or len(scales.shape) != 1 or not prod(scales.shape):
        return None
    if own != (levels is None) or codes.dtype not in ("uint8", "float8_e4m3fn"):
        return None
    if levels is not None and (levels.dtype, levels.shape) != ("float32", (1 << bits,)):
        return None
    if codes.shape != ((entries // 2,) if bits == 4 else parameter) or entries % scales.shape[0]:
        return None
    name = "" if levels is None else f"{stem}{LEVELS}"
    return Quantized(slot, f"{stem}{SCALES}", name, entries // scales.shape[0], bits, whole=True, slabs=1)
