"""No tensor is lost and none stayed narrow: every file of an output against the account of its source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase

from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.manifest import Manifest
from sparkling_cli.plan.model import CARRIED
from sparkling_cli.results.account import Fate
from sparkling_cli.verification.rules import Derivation

Shape = tuple[int, ...]


def account_faults(manifest: Manifest, source: Checkpoint, output: Checkpoint) -> list[str]:
    """Where the manifest's account is not the sum of the tensors that are there."""
    lines = manifest.account.lines
    sides = (
        ("source", sum(line.bytes_before for line in lines), _bytes_of(source)),
        ("output", sum(line.bytes_after for line in lines), _bytes_of(output)),
    )
    return [
        f"the account gives the {side} {named:,} bytes of tensors, it has {there:,}"
        for side, named, there in sides
        if lines and named != there
    ]


def _bytes_of(checkpoint: Checkpoint) -> int:
    """Of every tensor of every file, each once."""
    further = (i.stored for i in checkpoint.further if i.stored and i.key not in checkpoint.tensors)
    return sum(stored.nbytes for stored in (*checkpoint.tensors.values(), *further))


def narrow_faults(
    derivation: Derivation, manifest: Manifest, output: Checkpoint, shapes: Mapping[str, Counter[Shape]]
) -> list[str]:
    """Tensors, anywhere in a file, that have the shape of something that grew as it was before.

    What has such a shape rightly (it is proved, or was carried at the user's word) is counted; one more is
    one too many.

    Args:
        derivation: what follows from the manifest.
        manifest: of the output.
        output: as our own reader sees it.
        shapes: for every file, how many tensors of each shape its own library finds in it.
    """
    layout = derivation.layout
    sizes = {**layout.sizes, **{axis: after for axis, (_, after) in derivation.rules.growth.items()}}
    patterns = [*layout.tensors, *(layout.disk or ())]
    grown = {layout.shape_of(p) for p in patterns if p.dims.shape(sizes) != layout.shape_of(p)}
    known: Counter[Shape] = Counter()
    names = Counter(output.weights.values())
    stored = output.by_key
    for key, entry in manifest.tensors.items():
        if entry.slot != CARRIED and key in stored:
            known[stored[key].shape] += max(names[key], 1)
            if len(stored[key].extents) > 1:  # ranks have slices of it, which may look like something else
                known.update(extent.shape for extent in stored[key].extents)
    for item in manifest.account.entries:
        if item.fate is Fate.CARRIED and any(fnmatchcase(item.name, one) for one in derivation.spec.carry):
            known[item.shape] += 1
    found: Counter[Shape] = Counter()
    for counts in shapes.values():
        found.update(counts)
    return [
        f"{found[shape] - known[shape]} tensor(s) of shape {shape}, which grew, are in files of the output"
        for shape in sorted(grown)
        if found[shape] > known[shape]
    ]
