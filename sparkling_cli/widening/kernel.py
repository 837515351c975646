"""One plan row, piece by piece: the same bytes as of the whole tensor, in a few hundred kilobytes.

The source is read once, in row-major order, in pieces. Every piece has its *images*: the ranges of the
target that are made from it (an old range, and the new ones that copy it). Runs tile the target and
each names a source, so the images of all pieces tile the target too. An image is a contiguous range of
the target, filled by a *program*: one step per combination of runs of the dims inside the piece.

    kernel = compile_kernel(row.view, row.dtype, row.scale, row.offset)
    for index in range(kernel.pieces):
        piece = kernel.piece(index)               # read source[piece.start:piece.stop]
        for image in piece.images:
            kernel.fill(image, source, target)    # write target at image.start
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from sparkling_cli.storage.tensors import FLOATING, ITEM_BYTES, row_major
from sparkling_cli.widening.entries import draw_into, noise_into, numpy_dtype, round_into, scale_into
from sparkling_cli.widening.fill import normal
from sparkling_cli.widening.geometry import Fill, Run, View, ViewDim, flattened
from sparkling_cli.widening.parts import Box, Unit, along, boxes, stream_of

if TYPE_CHECKING:
    import numpy as np

    from sparkling_cli.widening.moments import Moments

    Array = np.ndarray[Any, Any]
    #: entries ``start <= i < stop`` of the rows of means that stand behind the source's own, float64
    Mean = Callable[[int, int], Array]

#: bytes of an image: what stays in a core's second-level cache together with its source.
PIECE = 1 << 19
#: fills that take random numbers
_DRAWN = (Fill.NOISY, Fill.RANDOM)


class Given(NamedTuple):
    """What entries of one tensor are made from beside its pieces.

    Attributes:
        seed: of all streams of random numbers.
        stream: the tensor's.
        known: stream of each of its units -> mean and deviation of the old entries.
        mean: rows of means.
        noise: on noisy copies, as a share of the old entries' standard deviation.
    """

    seed: int
    stream: str
    known: Mapping[str, Moments]
    mean: Mean
    noise: float = 0.0

    def draw(self, unit: Unit, start: int, stop: int) -> tuple[Array, Moments]:
        """Standard normal float32 numbers of a unit's entries ``start <= i < stop``, mean and deviation."""
        own = stream_of(self.stream, unit)
        return normal(self.seed, own, start, stop), self.known[own]


class Step(NamedTuple):
    """One combination of runs: boxes of the image and of its piece, and what happens between them."""

    target: tuple[slice, ...]
    source: tuple[slice, ...]
    fill: Fill
    factor: float
    moved: bool  # copied without arithmetic
    unit: Unit  # that the box belongs to
    within: tuple[slice, ...]  # the box within the unit's entries of the image


@dataclass(frozen=True)
class Program:
    """How an image is made; equal programs on equal rows of a piece make equal bytes."""

    steps: tuple[Step, ...]
    plain: bool  # the image is its piece's bytes
    zero: bool  # all entries are zero
    random: bool  # some entries are random, so where the image lies matters
    means: bool  # some entries are means of whole rows: the same

    @property
    def given(self) -> bool:
        """Whether more is needed than the piece."""
        return self.random or self.means


class Image(NamedTuple):
    """Target entries ``start <= i < stop``, from rows ``first <= r < last`` of the piece.

    ``source`` is the place of their first entry in the source.
    """

    start: int
    stop: int
    first: int
    last: int
    source: int
    program: Program


class Piece(NamedTuple):
    """Source entries ``start <= i < stop`` and the images that they make."""

    start: int
    stop: int
    images: tuple[Image, ...]


@dataclass(frozen=True)
class Kernel:
    """A compiled view.

    Attributes:
        dims: the view with neighbours collapsed; dims up to ``split`` are walked through, those behind
            it are inside a piece. ``split`` is -1 if the whole tensor is one piece.
        rows: entries of dim ``split`` per piece.
        dtype: of source and target.
        scale: factor on all entries.
        offset: added after scaling.
        fresh: factor on entries that are new on any dim, in the stead of ``scale``.
    """

    dims: tuple[ViewDim, ...]
    split: int
    rows: int
    dtype: str
    scale: float
    offset: float
    fresh: float

    @cached_property
    def source_entries(self) -> int:
        """Entries of the source."""
        return prod(dim.source for dim in self.dims)

    @cached_property
    def target_entries(self) -> int:
        """Entries of the target."""
        return prod(dim.target for dim in self.dims)

    @cached_property
    def inner_source(self) -> tuple[int, ...]:
        """Source sizes of the dims inside a piece."""
        return tuple(dim.source for dim in self.dims[self.split + 1 :])

    @cached_property
    def inner_target(self) -> tuple[int, ...]:
        """Target sizes of the dims inside a piece."""
        return tuple(dim.target for dim in self.dims[self.split + 1 :])

    @cached_property
    def random(self) -> bool:
        """Some entries are random: the moments of the source's units are needed."""
        return any(run.fill in _DRAWN for dim in self.dims for run in dim.runs)

    @cached_property
    def given(self) -> bool:
        """More is needed than the pieces: random numbers, or means, whose entries are on the leading dim."""
        return self.random or any(run.fill is Fill.MEAN for run in self.dims[0].runs)

    @cached_property
    def _chunks(self) -> int:
        return -(-self.dims[self.split].source // self.rows) if self.split >= 0 else 1

    @cached_property
    def pieces(self) -> int:
        """Number of pieces."""
        if not self.source_entries or not self.target_entries:
            return 0
        return prod(dim.source for dim in self.dims[: max(self.split, 0)]) * self._chunks

    def piece(self, index: int) -> Piece:
        """The piece of that number; pieces are in the source's order."""
        if self.split < 0:
            return self._only
        outer, chunk = divmod(index, self._chunks)
        dim = self.dims[self.split]
        first, last = chunk * self.rows, min((chunk + 1) * self.rows, dim.source)
        source_inner, target_inner = prod(self.inner_source), prod(self.inner_target)
        base = outer * dim.source
        images = []
        for target, chosen in self._outer_images(outer):
            for number, run in enumerate(dim.runs):
                low, high = max(first, run.source), min(last, run.source + run.length)
                if low >= high:
                    continue
                start = (target * dim.target + run.target + low - run.source) * target_inner
                stop = start + (high - low) * target_inner
                program = self._program((*chosen, number))
                begin = (base + low) * source_inner
                images.append(Image(start, stop, low - first, high - first, begin, program))
        return Piece((base + first) * source_inner, (base + last) * source_inner, tuple(images))

    @cached_property
    def _only(self) -> Piece:
        """The one piece of a small tensor."""
        image = Image(0, self.target_entries, 0, 1, 0, self._program(()))
        return Piece(0, self.source_entries, (image,))

    @cached_property
    def plain(self) -> bool:
        """A small tensor that is copied."""
        return self._only.images[0].program.plain

    def _outer_images(self, outer: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Flat target index and run numbers of every image of one source index of the walked dims."""
        places: list[list[tuple[int, int]]] = []
        for dim in reversed(self.dims[: self.split]):
            outer, index = divmod(outer, dim.source)
            places.append(
                [
                    (run.target + index - run.source, number)
                    for number, run in enumerate(dim.runs)
                    if run.source <= index < run.source + run.length
                ]
            )
        for chosen in product(*reversed(places)):
            target = 0
            for dim, (index, _) in zip(self.dims, chosen, strict=False):
                target = target * dim.target + index
            yield target, tuple(number for _, number in chosen)

    @cached_property
    def _programs(self) -> dict[tuple[int, ...], Program]:
        return {}

    def _program(self, chosen: tuple[int, ...]) -> Program:
        """The program for given runs of the walked dims, made once."""
        found = self._programs.get(chosen)
        if found is None:
            found = self._compose(chosen)
            same = next((p for p in self._programs.values() if p == found), found)
            found = self._programs[chosen] = same
        return found

    def _compose(self, chosen: tuple[int, ...]) -> Program:
        outer = [dim.runs[number] for dim, number in zip(self.dims, chosen, strict=False)]
        inner = self.dims[len(chosen) :]
        steps = []
        for runs in product(*(dim.runs for dim in inner)):
            fill = _combined([*outer, *runs], self.dims)
            new = any(run.new for run in (*outer, *runs))
            factor = _factor(self.fresh if new else self.scale, [*outer, *runs], self.dtype)
            moved = fill is Fill.COPY and factor == 1.0 and self.offset == 0.0
            if self.dtype not in FLOATING and not moved and fill is not Fill.ZERO:
                raise TypeError(f"{self.dtype} entries can be copied, not computed")
            target = (slice(None), *(slice(r.target, r.target + r.length) for r in runs))
            source = (slice(None), *(slice(r.source, r.source + r.length) for r in runs))
            if fill is Fill.MEAN and not outer:  # the image begins with the old rows
                first = runs[0].target - self.dims[0].source
                source = (slice(None), slice(first, first + runs[0].length), *source[2:])
            within = (slice(None), *map(_within, inner, runs))
            unit = tuple(number for run in (*outer, *runs) for number in run.part)
            steps.append(Step(target, source, fill, factor, moved, unit, within))
        return Program(
            steps=tuple(steps),
            plain=len(steps) == 1 and steps[0].moved and self.inner_source == self.inner_target,
            zero=all(step.fill is Fill.ZERO for step in steps),
            random=any(step.fill in _DRAWN for step in steps),
            means=any(step.fill is Fill.MEAN for step in steps),
        )

    def bytes_of(self, image: Image) -> slice:
        """The bytes of its piece that an image is made from; of a plain one, the image itself."""
        row = prod(self.inner_source) * ITEM_BYTES[self.dtype]
        return slice(image.first * row, image.last * row)

    @cached_property
    def _boxes(self) -> dict[Unit, Box]:
        return {box.unit: box for box in boxes(self.dims, source=False)}

    def fill(self, image: Image, source: Array, target: Array, given: Given | None) -> None:
        """Make one image.

        Args:
            image: of the piece that ``source`` holds.
            source: the piece's bytes, uint8, aligned to the dtype.
            target: room for the image's bytes, uint8, aligned to the dtype.
            given: of the tensor; needed if the program says so.
        """
        rows = image.last - image.first
        piece = source[self.bytes_of(image)]
        old = piece.view(numpy_dtype(self.dtype)).reshape(rows, *self.inner_source)
        new = target.view(numpy_dtype(self.dtype)).reshape(rows, *self.inner_target)
        if not image.program.given:
            self._run(image.program, old, new, {}, old)
            return
        if given is None:
            raise ValueError("a program with random entries or means needs them")
        means = self._means(image, rows, given.mean) if image.program.means else old
        drawn = {}
        for unit in {step.unit for step in image.program.steps if step.fill in _DRAWN}:
            box = self._boxes[unit]
            numbers, moments = given.draw(box.drawn_as, box.before(image.start), box.before(image.stop))
            drawn[unit] = numbers.reshape(rows, *box.shape[self.split + 1 :]), moments
        self._run(image.program, old, new, drawn, means, given.noise)

    def _means(self, image: Image, rows: int, mean: Mean) -> Array:
        """The rows of means that an image is made from: its own, or all of them where it is the tensor."""
        lead = self.dims[0]
        inner = prod(dim.source for dim in self.dims[1:])
        if self.split < 0:
            return mean(0, (lead.target - lead.source) * inner).reshape(1, -1, *self.inner_source[1:])
        row = image.start // prod(dim.target for dim in self.dims[1:]) - lead.source
        start = row * inner + image.source % inner
        found = mean(start, start + rows * prod(self.inner_source))
        return found.reshape(rows, *self.inner_source)

    def fill_alike(self, count: int, source: Array, apart: int, target: Array, target_apart: int) -> None:
        """Make whole small tensors at even distances; nothing of them is random.

        Args:
            count: how many.
            source: bytes from the first source on.
            apart: bytes from one source's beginning to the next one's.
            target: room from the first target on.
            target_apart: bytes from one target's beginning to the next one's.
        """
        old = _at_distances(source, count, apart, self.inner_source, self.dtype)
        new = _at_distances(target, count, target_apart, self.inner_target, self.dtype)
        self._run(self._only.images[0].program, old, new, {}, old)

    def _run(
        self,
        program: Program,
        old: Array,
        new: Array,
        drawn: Mapping[Unit, tuple[Array, Moments]],
        means: Array,
        noise: float = 0.0,
    ) -> None:
        """All steps of a program, from arrays (rows, *inner_source) to arrays (rows, *inner_target)."""
        for step in program.steps:
            into = new[step.target]
            if step.fill is Fill.ZERO:
                into[...] = 0
            elif step.moved:
                into[...] = old[step.source]
            elif step.fill is Fill.MEAN:
                round_into(means[step.source], step.factor, self.offset, into, self.dtype)
            elif step.fill is Fill.NOISY:
                numbers, moments = drawn[step.unit]
                there, spread = numbers[step.within], moments.std * noise
                noise_into(old[step.source], there, spread, step.factor, self.offset, into, self.dtype)
            elif step.fill is Fill.RANDOM:
                numbers, moments = drawn[step.unit]
                draw_into(numbers[step.within], moments, step.factor, self.offset, into, self.dtype)
            else:
                scale_into(old[step.source], step.factor, self.offset, into, self.dtype)


def _within(dim: ViewDim, run: Run) -> slice:
    """Where a run's entries are among those of its part."""
    first = along(dim, source=False)[run.part].before(run.target)
    return slice(first, first + run.length)


def _at_distances(data: Array, count: int, apart: int, shape: tuple[int, ...], dtype: str) -> Array:
    """Arrays of one shape, as one with another dim before the others."""
    import numpy as np

    kind = numpy_dtype(dtype)
    strides = (apart, *(kind.itemsize * stride for stride in row_major(shape)))
    return np.ndarray((count, *shape), kind, data, 0, strides)


def compile_kernel(
    view: View,
    dtype: str,
    scale: float = 1.0,
    offset: float = 0.0,
    piece: int = PIECE,
    fresh: float | None = None,
) -> Kernel:
    """The kernel of a view; the same object for the same arguments.

    Args:
        view: sizes and runs of every view dim.
        dtype: by torch's name.
        scale: factor on all entries.
        offset: added after scaling.
        piece: bytes of an image, at most (one entry of the innermost dim at least).
        fresh: factor on new entries, if it is not ``scale``.
    """
    fresh = float(scale if fresh is None else fresh)
    return _compiled(view, dtype, float(scale), float(offset), piece, fresh)


@lru_cache(maxsize=1024)
def _compiled(view: View, dtype: str, scale: float, offset: float, piece: int, fresh: float) -> Kernel:
    dims = collapse(view)
    room = max(piece // ITEM_BYTES[dtype], 1)
    split, inner = len(dims) - 1, 1
    while split >= 0 and inner * dims[split].target <= room:
        inner *= dims[split].target
        split -= 1
    return Kernel(dims, split, max(room // max(inner, 1), 1), dtype, scale, offset, fresh)


def collapse(view: View) -> tuple[ViewDim, ...]:
    """The view with fewer dims: a dim without change joins the one before it."""
    dims: list[ViewDim] = []
    for dim in view:
        if dims and dim.identity:
            last, width = dims[-1], dim.source
            runs = flattened(last.runs, dim.runs, width)
            dims[-1] = ViewDim(last.source * width, last.target * width, runs, last.dim)
        elif dims and dims[-1].identity and dims[-1].source == 1:
            dims[-1] = dim
        else:
            dims.append(dim)
    return tuple(dims) or (ViewDim(1, 1, (Run(0, 0, 1),), 0),)


def _combined(runs: list[Run], dims: tuple[ViewDim, ...]) -> Fill:
    """The fill of entries in these runs, one per dim."""
    groups: dict[int, tuple[Fill, bool]] = {}
    for run, dim in zip(runs, dims, strict=True):
        fill, shield = groups.get(dim.dim, (Fill.COPY, False))
        groups[dim.dim] = (max(fill, run.fill), shield or run.shield)
    return max(Fill.COPY if shield else fill for fill, shield in groups.values())


def _factor(scale: float, runs: list[Run], dtype: str) -> float:
    """The product of all factors in working precision, taken in the order of the dims."""
    import numpy as np

    wide = np.float64 if dtype == "float64" else np.float32
    factor = wide(scale)
    for run in runs:
        factor = wide(factor * wide(run.scale))
    return float(factor)
