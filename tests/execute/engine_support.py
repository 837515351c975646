"""Raw checkpoints laid out by hand, so that the engine can be tested without any format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from sparkling_cli.execute import stream
from sparkling_cli.execute.stream import Written
from sparkling_cli.formats.model import Checkpoint, Checksum, OutputFile
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.plan.model import Expansion, Invocation, Plan, Recipe, Row
from sparkling_cli.results.account import Kind
from sparkling_cli.spec.model import AxisSpec, ExpansionSpec
from sparkling_cli.storage.tensors import FLOATING, ITEM_BYTES, Extent, StoredTensor
from sparkling_cli.widening.geometry import Fill, Run, Treatment, View, ViewDim
from tests.widening.whole import target_shape, widen_tensor

SCALES = (1.0, 0.5, 0.7071067811865476, 1 / 3, 1.25)


@st.composite
def runs(draw: st.DrawFn, source: int, floating: bool) -> tuple[Run, ...]:
    """Runs that tile some target of one view dim."""
    if draw(st.booleans()):
        return (Run(0, 0, source),)
    found, at = [], 0
    scales = st.sampled_from(SCALES if floating else (1.0,))
    fills = st.sampled_from([Fill.COPY, Fill.RANDOM, Fill.ZERO] if floating else [Fill.COPY, Fill.ZERO])
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, source - 1))
        length = draw(st.integers(1, source - start))
        new = draw(st.booleans())
        fill = draw(fills) if new else Fill.COPY
        shield = draw(st.integers(0, 5)) == 0
        found.append(Run(at, start, length, new, draw(scales), fill, shield))
        at += length
    return tuple(found)


def _kept_before(source: int, found: tuple[Run, ...]) -> tuple[Run, ...]:
    """All old entries, then the runs as new ones."""
    return (Run(0, 0, source), *(replace(run, target=run.target + source, new=True) for run in found))


@st.composite
def views(draw: st.DrawFn, floating: bool = True, largest: int = 5) -> View:
    """Views of up to four view dims over some storage dims."""
    dims, storage = [], 0
    sources = draw(st.lists(st.integers(1, largest), max_size=4))
    made = [draw(runs(source, floating)) for source in sources]
    if any(run.fill is Fill.RANDOM for found in made for run in found):  # distributions need old entries
        made = [_kept_before(source, found) for source, found in zip(sources, made, strict=True)]
    for source, found in zip(sources, made, strict=True):
        cut = draw(st.sampled_from(["whole", "in turns", "one by one"]))
        if cut != "whole":  # entries in turns belong to two parts; or each is one, drawn as its source is
            found = tuple(
                replace(
                    run,
                    target=run.target + i,
                    source=j,
                    length=1,
                    part=(j % 2,) if cut == "in turns" else (run.target + i,),
                    drawn_as=(j % 2,) if cut == "in turns" else (j,),
                )
                for run in found
                for i, j in enumerate(range(run.source, run.source + run.length))
            )
        dims.append(ViewDim(source, found[-1].target + found[-1].length, found, storage))
        storage += draw(st.integers(0, 1))
    numbers = {old: new for new, old in enumerate(sorted({dim.dim for dim in dims}))}
    return tuple(replace(dim, dim=numbers[dim.dim]) for dim in dims)


def source_shape(view: View) -> tuple[int, ...]:
    """Storage shape before widening."""
    return target_shape(tuple(replace(dim, target=dim.source) for dim in view))


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any tensor of that dtype; floating ones hold ordinary numbers and a few zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    if dtype in FLOATING:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        values = torch.where(values.abs() < 0.1, torch.copysign(torch.zeros(()), values), values)
        return values.to(getattr(torch, dtype))
    raw = torch.randint(0, 2, (prod(shape) * ITEM_BYTES[dtype],), generator=generator, dtype=torch.uint8)
    return torch.frombuffer(bytearray(raw.numpy().tobytes()), dtype=getattr(torch, dtype)).reshape(shape)


def to_bytes(tensor: torch.Tensor) -> bytes:
    """Row-major bytes of any tensor."""
    flat = tensor.contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def raw_plan(
    folder: Path,
    rows: Mapping[str, tuple[torch.Tensor, View, dict[str, object]]],
    *,
    seed: int = 0,
    carried: Mapping[str, bytes] | None = None,
    spec: Mapping[str, object] | None = None,
) -> tuple[Plan, tuple[OutputFile, ...]]:
    """A source folder with one ``data.bin``, its plan, and an output of two files with checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    stored, at, content = {}, 7, bytearray(7)
    for key, (tensor, _, _) in rows.items():
        shape = tuple(tensor.shape)
        extent = Extent("data.bin", at, (0,) * len(shape), shape)
        dtype = str(tensor.dtype).removeprefix("torch.")
        stored[key] = StoredTensor(dtype, shape, (extent,))
        content += to_bytes(tensor)
        at = len(content)
    (folder / "data.bin").write_bytes(content)
    for path, text in (carried or {}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(text)
    checkpoint = Checkpoint(folder, "raw", stored, {}, carried=tuple(sorted(carried or {})))
    made = []
    for key, (_, view, options) in rows.items():
        kind = stored[key]
        recipe = Recipe(Kind.WEIGHT, "", kind.dtype, kind.shape, target_shape(view), view, **options)  # type: ignore[arg-type]
        made.append(Row(key, key, kind, recipe, key))
    chosen = ExpansionSpec(axes=(AxisSpec(axis="ffn", factor=2),), seed=seed, **(spec or {}))  # type: ignore[arg-type]
    recipes, layout = tuple(row.recipe for row in made), ModelLayout("raw", {}, ())
    plan = Plan(checkpoint, layout, chosen, {}, Treatment(), recipes, tuple(made))
    return plan, (_laid_out("sub/a.bin", made[::2]), _laid_out("b.bin", made[1::2], last=True))


def _laid_out(path: str, rows: list[Row], *, last: bool = False) -> OutputFile:
    """Before every tensor a 16-byte header with a checksum slot, after it a gap."""
    literals, tensors, checksums, at = [], [], [], 0
    for row in rows:
        literals.append((at, b"head" + bytes(4) + row.key.encode()[:8].ljust(8)))
        size = prod(row.shape) * ITEM_BYTES[row.dtype]
        tensors.append((row.key, Extent(path, at + 16, (0,) * len(row.shape), row.shape)))
        checksums.append(Checksum(at + 16, at + 16 + size, (at + 4,)))
        at += 16 + size + 5
    return OutputFile(path, at, tuple(literals), tuple(tensors), tuple(checksums), last)


def execute(plan: Plan, files: tuple[OutputFile, ...], destination: Path, **options: Any) -> Written:
    """Carry a raw plan out."""
    expansion = Expansion(plan, files, destination, Invocation(plan.source.root))
    return stream.execute(expansion, **options)


def expected(plan: Plan, row: Row, tensor: torch.Tensor) -> bytes:
    """The bytes of an output tensor by the reference arithmetic."""
    recipe = row.recipe
    if recipe.zero:
        return bytes(prod(row.shape) * ITEM_BYTES[row.dtype])
    wide = widen_tensor(
        tensor, recipe.view, scale=recipe.scale, offset=recipe.offset, seed=plan.spec.seed, stream=row.stream
    )
    return to_bytes(wide)


def output_bytes(root: Path, plan: Plan, files: tuple[OutputFile, ...]) -> dict[str, bytes]:
    """Bytes of every (single-extent) tensor of an output."""
    sizes = {row.key: prod(row.shape) * ITEM_BYTES[row.dtype] for row in plan.rows}
    found = {}
    for file in files:
        content = (root / file.path if file.path else root).read_bytes()
        for key, extent in file.tensors:
            found[key] = content[extent.offset : extent.offset + sizes[key]]
    return found


def no_sidecar(written: Written) -> dict[str, bytes]:
    """A small file that depends on what was written."""
    digests = {path: [d.bytes, d.crc32] for path, d in written.files.items()}
    return {"sparkling/manifest.json": json.dumps([digests, dict(written.tensors)]).encode()}


def doubled(size: int, dim: int, *, scale: float = 1.0, fill: Fill = Fill.COPY) -> ViewDim:
    """A view dim that doubles."""
    return ViewDim(
        size, 2 * size, (Run(0, 0, size, False, scale), Run(size, 0, size, True, scale, fill)), dim
    )


def kept(size: int, dim: int) -> ViewDim:
    """A view dim to which nothing happens."""
    return ViewDim(size, size, (Run(0, 0, size),), dim)


def as_array(data: bytes) -> np.ndarray:  # type: ignore[type-arg]
    """Bytes as a writable uint8 array."""
    return np.frombuffer(bytearray(data), dtype=np.uint8)
