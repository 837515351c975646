"""The kernel against the reference on whole tensors, and against arithmetic entry by entry."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkling_cli.storage.tensors import FLOATING, ITEM_BYTES
from sparkling_cli.widening import fill
from sparkling_cli.widening.entries import count_nonfinite
from sparkling_cli.widening.geometry import Fill, Run, View, ViewDim
from sparkling_cli.widening.kernel import Given, compile_kernel
from sparkling_cli.widening.means import Means
from sparkling_cli.widening.moments import BLOCK, Moments, block_moments, merged
from sparkling_cli.widening.parts import Unit, boxes, stream_of
from tests.execute.engine_support import (
    as_array,
    doubled,
    kept,
    random_tensor,
    source_shape,
    to_bytes,
    views,
)
from tests.widening.whole import target_shape, widen_tensor


def by_pieces(
    tensor: torch.Tensor,
    view: View,
    piece: int,
    scale: float = 1.0,
    offset: float = 0.0,
    fresh: float | None = None,
) -> bytes:
    """The widened tensor's bytes, made by the kernel; every target byte must be made exactly once."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    item = ITEM_BYTES[dtype]
    kernel = compile_kernel(view, dtype, scale, offset, piece, fresh)
    source, target = as_array(to_bytes(tensor)), np.zeros(kernel.target_entries * item, dtype=np.uint8)
    touched = np.zeros(kernel.target_entries, dtype=np.int64)
    known = moments_of(tensor, view) if kernel.random else {}
    read = 0

    given = Given(3, "s", {stream_of("s", unit): own for unit, own in known.items()}, means_of(tensor))
    for index in range(kernel.pieces):
        part = kernel.piece(index)
        assert part.start == read, "pieces are in order and leave no gap"
        read = part.stop
        data = source[part.start * item : part.stop * item].copy()
        for image in part.images:
            assert (image.stop - image.start) * item <= max(piece, item)
            touched[image.start : image.stop] += 1
            made = np.full((image.stop - image.start) * item, 255, dtype=np.uint8)
            kernel.fill(image, data, made, given)
            if image.program.plain:
                assert made.tobytes() == data[kernel.bytes_of(image)].tobytes()
            if image.program.zero:
                assert not made.any()
            target[image.start * item : image.stop * item] = made
    assert read == kernel.source_entries
    assert (touched == 1).all()
    return target.tobytes()


def means_of(tensor: torch.Tensor) -> Means:
    """Rows of means, in turn of the first two rows, of the last one and of all."""
    rows = tensor.double().numpy().reshape(tensor.shape[0] if tensor.ndim else 1, -1)
    last = len(rows) - 1
    of = ((0, min(1, last)), (last,), ()) * 100
    return Means(of, rows.shape, lambda start, stop: rows.reshape(-1)[start:stop])


def moments_of(tensor: torch.Tensor, view: View) -> dict[Unit, Moments]:
    """Mean and squared deviations of every unit's old entries, summed in the engine's blocks."""
    flat = tensor.reshape(-1).double().numpy() if str(tensor.dtype)[6:] in FLOATING else np.zeros(0)
    found = {}
    for box in boxes(view, source=True) if flat.size else ():
        values = flat[box.places(0, box.entries)]
        found[box.unit] = merged(block_moments(values[i : i + BLOCK]) for i in range(0, len(values), BLOCK))
    return found


def entry_by_entry(
    tensor: torch.Tensor, view: View, scale: float, offset: float, fresh: float | None
) -> bytes:
    """The same by the definition, one entry after the other, from the plan's documentation alone."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    wide = np.float64 if dtype == "float64" else np.float32
    flat = tensor.reshape([dim.source for dim in view])
    neighbours: dict[Unit, list[float]] = {}
    random = any(run.fill is Fill.RANDOM for dim in view for run in dim.runs)
    for index in product(*(range(dim.source) for dim in view)) if random else ():
        unit = part_of(view, index, "source")
        neighbours.setdefault(unit, []).append(float(flat[tuple(index)]))
    drawn: dict[Unit, int] = {}
    out = torch.zeros([dim.target for dim in view], dtype=tensor.dtype)
    sizes = [dim.target for dim in view]
    for index in product(*(range(n) for n in sizes)):
        unit, drawn_as = part_of(view, index, "target"), part_of(view, index, "target", "drawn_as")
        number = drawn[unit] = drawn.get(unit, -1) + 1
        found = [
            next(r for r in dim.runs if r.target <= t < r.target + r.length)
            for t, dim in zip(index, view, strict=True)
        ]
        new = fresh is not None and any(run.new for run in found)
        source, fills, shields, factor = [], {}, set(), wide(fresh if new else scale)
        for t, dim, run in zip(index, view, found, strict=True):
            source.append(run.source + t - run.target)
            fills.setdefault(dim.dim, []).append(run.fill)
            shields |= {dim.dim} if run.shield else set()
            factor = wide(factor * wide(run.scale))
        how = max((max(f) for d, f in fills.items() if d not in shields), default=Fill.COPY)
        if how is Fill.ZERO:
            continue
        if how is Fill.RANDOM:
            noise = float(fill.normal(3, stream_of("s", drawn_as), number, number + 1)[0])
            std, mean = np.std(neighbours[drawn_as]), np.mean(neighbours[drawn_as])
            value = wide(noise) * wide(wide(std) * factor) + wide(wide(mean) * factor + wide(offset))
            out[index] = torch.tensor(float(value), dtype=torch.float64)
        elif factor == 1 and offset == 0.0:
            out[index] = flat[tuple(source)]
        else:
            value = wide(flat[tuple(source)].to(torch.float64).item()) * factor
            value = wide(value + wide(offset)) if offset else value
            out[index] = torch.tensor(float(value), dtype=torch.float64)
    return to_bytes(out)


def part_of(view: View, index: Sequence[int], side: str, which: str = "part") -> Unit:
    """The unit of an entry of the source or the target; or the one that it is ``drawn_as``."""
    unit: Unit = ()
    for i, dim in zip(index, view, strict=True):
        runs = [run for run in dim.runs if not (side == "source" and run.new)]
        unit += next(getattr(r, which) for r in runs if getattr(r, side) <= i < getattr(r, side) + r.length)
    return unit


@settings(max_examples=300)
@given(
    view=views(),
    dtype=st.sampled_from(sorted(FLOATING)),
    piece=st.integers(1, 400),
    scale=st.sampled_from((1.0, 0.5, 1.7)),
    offset=st.sampled_from((0.0, 0.0, -1.0, 0.3)),
    seed=st.integers(0, 99),
)
def test_kernel_is_reference(
    view: View, dtype: str, piece: int, scale: float, offset: float, seed: int
) -> None:
    """Piece by piece gives the bits of the arithmetic on whole tensors, for any view and piece size."""
    tensor = random_tensor(dtype, source_shape(view), seed)
    whole = widen_tensor(tensor, view, scale=scale, offset=offset, seed=3, stream="s")
    assert tuple(whole.shape) == target_shape(view)
    assert by_pieces(tensor, view, piece, scale, offset) == to_bytes(whole)


@settings(max_examples=120)
@given(
    view=views(largest=4),
    dtype=st.sampled_from(sorted(FLOATING)),
    scale=st.sampled_from((1.0, 0.7)),
    offset=st.sampled_from((0.0, -1.0)),
    fresh=st.sampled_from((None, 1.0, 1.3)),
)
def test_kernel_is_definition(
    view: View, dtype: str, scale: float, offset: float, fresh: float | None
) -> None:
    """The bits are those of the definition, entry by entry, in numpy scalars.

    The entries' standard deviation is summed differently there, so random entries may differ in the
    last bits; all others must not.
    """
    tensor = random_tensor(dtype, source_shape(view), 1)
    made = by_pieces(tensor, view, 64, scale, offset, fresh)
    wanted = entry_by_entry(tensor, view, scale, offset, fresh)
    kind = getattr(torch, dtype)
    if any(run.fill is Fill.RANDOM for dim in view for run in dim.runs):
        a = torch.frombuffer(bytearray(made), dtype=kind).double()
        b = torch.frombuffer(bytearray(wanted), dtype=kind).double()
        assert torch.allclose(a, b, rtol=1e-2 if ITEM_BYTES[dtype] == 2 else 1e-5, atol=1e-6)
    else:
        assert made == wanted


@settings(max_examples=100)
@given(
    view=views(floating=False),
    dtype=st.sampled_from(sorted(set(ITEM_BYTES) - FLOATING)),
    piece=st.integers(1, 200),
)
def test_stored_dtypes_are_moved(view: View, dtype: str, piece: int) -> None:
    """Dtypes without arithmetic are copied and zeroed bit by bit."""
    tensor = random_tensor(dtype, source_shape(view), 5)
    assert by_pieces(tensor, view, piece) == to_bytes(widen_tensor(tensor, view))


@pytest.mark.parametrize("dtype", ["int64", "float8_e4m3fn", "bool"])
def test_no_arithmetic_on_stored_dtypes(dtype: str) -> None:
    """Scaling a dtype that has no arithmetic is refused by both ways, not rounded."""
    view = (doubled(4, 0, scale=0.5),)
    tensor = random_tensor(dtype, (4,), 0)
    with pytest.raises(TypeError, match="copied, not computed"):
        widen_tensor(tensor, view)
    with pytest.raises(TypeError, match="copied, not computed"):
        by_pieces(tensor, view, 64)


def test_copied_nan_payloads_survive() -> None:
    """An entry that is only copied keeps its bits, also where others are scaled."""
    bits = torch.tensor([0x7F800001, 0x7FC12345, 0x3F800000, 0x40000000], dtype=torch.int32)
    view = (ViewDim(4, 6, (Run(0, 0, 4), Run(4, 2, 2, True, 0.5)), 0),)
    for made in (by_pieces(bits.view(torch.float32), view, 8), widen_tensor(bits.view(torch.float32), view)):
        raw = made if isinstance(made, bytes) else to_bytes(made)
        assert raw[:16] == to_bytes(bits)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_number_is_rounded_once(dtype: str) -> None:
    """Scaling a 16-bit float equals float32 arithmetic rounded once, for all 65,536 bit patterns."""
    kind = getattr(torch, dtype)
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(kind)
    for scale in (0.5, 3**-0.5, 0.1, 1.3, 1e-3):
        made = torch.frombuffer(bytearray(by_pieces(every, (kept(65536, 0),), 1 << 19, scale)), dtype=kind)
        wanted = (every.float() * torch.tensor(scale, dtype=torch.float32)).to(kind)
        same = (made.view(torch.int16) == wanted.view(torch.int16)) | (made.isnan() & wanted.isnan())
        assert same.all()


def test_large_tensor_across_noise_blocks() -> None:
    """A tensor of several noise and moment blocks, at three piece sizes."""
    view = (kept(3, 0), doubled(70, 1, fill=Fill.RANDOM), doubled(300, 2, scale=0.7))
    tensor = random_tensor("float32", source_shape(view), 2)
    wanted = to_bytes(widen_tensor(tensor, view, seed=3, stream="s"))
    assert prod(target_shape(view)) > 3 * fill.BLOCK
    for piece in (1 << 19, 50_000, 4_000):
        assert by_pieces(tensor, view, piece) == wanted


def test_nonfinite_entries_are_counted() -> None:
    """NaN and Inf are counted exactly; finite entries whose sum overflows are none."""
    for dtype in sorted(FLOATING):
        kind = getattr(torch, dtype)
        values = torch.zeros(1000, dtype=kind)
        values[7], values[8], values[999] = float("nan"), float("inf"), float("-inf")
        assert count_nonfinite(as_array(to_bytes(values)), dtype) == 3
        huge = torch.full((1000,), torch.finfo(kind).max, dtype=kind)
        with np.errstate(over="ignore"):
            assert count_nonfinite(as_array(to_bytes(huge)), dtype) == 0
        assert count_nonfinite(as_array(to_bytes(values[7:8])), dtype) == 1


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("inner", [(), (7,), (3, 5)])
def test_rows_of_means(dtype: str, inner: tuple[int, ...]) -> None:
    """New rows in pieces of any size are the means, with the columns' own factors, rounded once."""
    tensor = random_tensor(dtype, (11, *inner), 4)
    new = Run(11, 0, 5, new=True, fill=Fill.MEAN)
    wider = [ViewDim(n, n + 2, (Run(0, 0, n, scale=0.5), Run(n, 1, 2, new=True, scale=0.5)), i + 1)
             for i, n in enumerate(inner)]  # fmt: skip
    view = (ViewDim(11, 16, (Run(0, 0, 11), new), 0), *wider)
    rows = tensor.double()
    means = torch.stack([rows[:2].mean(0), rows[10], rows.mean(0), rows[:2].mean(0), rows[10]])
    wanted = torch.cat([rows, means])
    for dim, size in enumerate(inner, 1):
        wanted = torch.cat([wanted, wanted.narrow(dim, 1, 2)], dim) * 0.5
        assert wanted.shape[dim] == size + 2
    for piece in (8, 64, 200, 1 << 19):
        made = torch.frombuffer(bytearray(by_pieces(tensor, view, piece)), dtype=tensor.dtype)
        made = made.reshape(wanted.shape)
        assert torch.equal(made[:11], wanted[:11].to(tensor.dtype)), piece
        assert torch.allclose(made[11:].double(), wanted[11:], rtol=torch.finfo(tensor.dtype).eps, atol=1e-15)
