"""``verify``: every byte of an output, every tensor, every promise of its manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

from sparkling_cli.errors import CheckpointError, SparklingError, VerificationError
from sparkling_cli.execute.commit import in_the_making
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.formats.states import WEIGHT_LIKE
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.manifest import Manifest, TensorEntry, read_manifest
from sparkling_cli.storage.crc import Span, crc32, whole
from sparkling_cli.storage.places import Handles, Placement, span_of
from sparkling_cli.storage.pool import processors, spread
from sparkling_cli.storage.sidecar import DIGESTS, MANIFEST, sidecar_root
from sparkling_cli.storage.tensors import FLOATING, ITEM_BYTES, StoredTensor
from sparkling_cli.verification.bundle import Recipes, bundles, examine_bundle
from sparkling_cli.verification.compare import Found, Subject
from sparkling_cli.verification.files import (
    FileCheck,
    check_small_files,
    file_size,
    gaps,
    list_files,
)
from sparkling_cli.verification.origin import listed, other_source
from sparkling_cli.verification.report import VerifyReport
from sparkling_cli.widening.geometry import View

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def verify(source: Path | None, output: Path, *, progress: Progress | None = None) -> VerifyReport:
    """Prove an output.

    Without a source: every file has the size and CRC-32 that were written, none is missing or extra, every
    tensor has its CRC-32. With it: every tensor follows from the source's bytes bit by bit, by an index
    formula of its own; optimizer state is zero where new and untouched where old.

    Args:
        source: the checkpoint that was widened; None to look at the output alone.
        output: the output.
        progress: makes a progress sink (see ``api.Progress``).

    Raises:
        VerificationError: something does not hold, or the source is another one; the message lists what,
            first things first.
        CheckpointError: there is no output or no manifest, or the source cannot be opened.
    """
    if not output.exists():
        raise CheckpointError(f"there is no output at {output}")
    if in_the_making(output):
        raise CheckpointError(
            f"{output} is no output yet: a run that was killed has left it",
            hint="run the same `sparkling expand` again: it goes on with what is there",
        )
    sidecars = sidecar_root(output)
    if not (sidecars / MANIFEST).exists():
        raise CheckpointError(
            f"{output} has no manifest ({MANIFEST}), so nothing can be proved",
            hint="only outputs of `sparkling expand` have one; it may have been moved away from its output",
        )
    faults = check_small_files(sidecars, DIGESTS, MANIFEST)
    _stop_at(faults, output)
    try:
        manifest = read_manifest(sidecars / MANIFEST)
    except CheckpointError as error:
        raise VerificationError(error.message) from error
    files = list_files(output, sidecars, manifest, skip={MANIFEST, DIGESTS})
    _stop_at(files.faults + [_unwritten(path) for path in files.unwritten], output, movable=not files.faults)
    origin = None if source is None else _open_source(source, output, manifest)
    work = _Work(output, manifest, files.checks, source, origin)
    shown = progress("verifying", work.total) if progress else nullcontext(lambda _n: None)
    with shown as advance:
        faults = work.run(advance)
    if source is not None and work.source_faults and not work.output_faults:
        raise other_source(source, output, manifest, work.source_faults)
    _stop_at(faults, output)
    return VerifyReport(
        files=len(files.checks) + 2,
        nbytes=sum(check.size for check in files.checks.values()),
        tensors=len(manifest.tensors),
        derived=0 if origin is None else len(manifest.tensors),
        moments=0 if origin is None else sum(subject.reset for subject in work.subjects),
        source="" if source is None else source.name,
        extras=tuple(files.extras),
    )


def _unwritten(path: str) -> str:
    return f"{path} was not written with the output"


def _stop_at(faults: list[str], output: Path, *, movable: bool = False) -> None:
    if not faults:
        return
    hint = "do not train on it: remove it and expand again"
    if movable:
        hint = "it could be loaded as a part of the checkpoint: move it out of the output, and verify again"
    raise VerificationError(f"{output} is not what was written:\n  {listed(faults)}", hint=hint)


def _open_source(source: Path, output: Path, manifest: Manifest) -> Mapping[str, StoredTensor]:
    """Where every output tensor's source is, by output key.

    Raises:
        CheckpointError: the source cannot be opened.
        VerificationError: it is not the checkpoint that the manifest names, or lacks a tensor.
    """
    from sparkling_cli.formats.detect import open_checkpoint

    checkpoint = open_checkpoint(source)
    if checkpoint.format != manifest.source.format:
        fault = f"it is of format {checkpoint.format}, the output was made from {manifest.source.format}"
        raise other_source(source, output, manifest, [fault])
    found = dict(checkpoint.tensors)
    if any(key not in found for key in manifest.tensors):
        found.update(_renamed(checkpoint, manifest, source, output))
    missing = [key for key in manifest.tensors if key not in found]
    if missing:
        fault = f"it lacks {len(missing)} tensor(s) of the output, the first: {missing[0]!r}"
        raise other_source(source, output, manifest, [fault])
    entries: dict[int, int] = {}  # of a source, by view
    sizes = [k for k, entry in manifest.tensors.items() if not _fits(found[k], entry, manifest, entries)]
    if sizes:
        fault = f"{len(sizes)} of its tensors have other sizes than what was widened, the first: {sizes[0]!r}"
        raise other_source(source, output, manifest, [fault])
    return found


def _fits(stored: StoredTensor, entry: TensorEntry, manifest: Manifest, entries: dict[int, int]) -> bool:
    if entry.view is None:
        return stored.dtype == entry.dtype and prod(stored.shape) == prod(entry.shape)
    if entry.view not in entries:
        entries[entry.view] = prod(dim.source for dim in manifest.view(entry) or ())
    return stored.dtype == entry.dtype and prod(stored.shape) == entries[entry.view]


def _renamed(
    checkpoint: Checkpoint, manifest: Manifest, source: Path, output: Path
) -> dict[str, StoredTensor]:
    """Sources of weights that stand under module names in the output."""
    from sparkling_cli.plan.naming import weights_of

    layout = _layout_before(manifest)
    try:
        weights, _ = weights_of(checkpoint, layout, "module")
    except SparklingError as error:
        fault = f"it does not fit the output's layout: {error.message}"
        raise other_source(source, output, manifest, [fault]) from error
    return {weight.key: weight.stored for weight in weights}


def _layout_before(manifest: Manifest) -> ModelLayout:
    layout = manifest.model_layout()
    axes = dict(layout.axes)
    for name, (before, _) in manifest.stages[-1].growth.items():
        axes[name] = replace(axes[name], size=before)
    return replace(layout, axes=axes)


class _Work:
    """All that has to be read, as tasks for a few threads."""

    def __init__(
        self,
        output: Path,
        manifest: Manifest,
        files: Mapping[str, FileCheck],
        source: Path | None,
        origin: Mapping[str, StoredTensor] | None,
    ) -> None:
        self.output, self.manifest, self.files, self.source = output, manifest, files, source
        self.faults: list[str] = []
        self.source_faults: list[str] = []
        self.output_faults: list[str] = []
        self.subjects: list[Subject] = []
        self._views: dict[int | None, View | None] = {}
        stored = self._stored()
        for key, entry in manifest.tensors.items():
            try:
                self.subjects.append(self._subject(key, entry, stored[key], origin))
            except (CheckpointError, KeyError) as error:
                self.output_faults.append(f"tensor {key!r}: {error}")
        self.total = sum(check.size for check in files.values())

    def _stored(self) -> Mapping[str, StoredTensor]:
        """The output's tensors, as its own format finds them."""
        from sparkling_cli.formats.detect import open_checkpoint

        try:
            found = open_checkpoint(self.output).tensors
        except SparklingError as error:
            self.output_faults.append(f"it does not open: {error.message}")
            return {}
        extra = [key for key in found if key not in self.manifest.tensors]
        if extra:
            self.output_faults.append(
                f"{len(extra)} tensor(s) that were not written, the first: {extra[0]!r}"
            )
        return found

    def _subject(
        self,
        key: str,
        entry: TensorEntry,
        stored: StoredTensor,
        origin: Mapping[str, StoredTensor] | None,
    ) -> Subject:
        if stored.dtype != entry.dtype or stored.shape != entry.shape:
            raise CheckpointError(
                f"it is {stored.dtype} {stored.shape}, {entry.dtype} {entry.shape} was written"
            )
        placed = None
        if origin is not None:
            source = origin[key]
            if source.dtype != entry.dtype:
                raise CheckpointError(f"its source is {source.dtype}, it is {entry.dtype}")
            placed = Placement(source.dtype, source.shape, source.extents, key)
        if entry.view not in self._views:
            self._views[entry.view] = self.manifest.view(entry)
        view = self._views[entry.view]
        asymmetric = self.manifest.spec.get("optimizer") == "asymmetric"
        moment = asymmetric and entry.slot != "" and view is not None and entry.slot not in WEIGHT_LIKE
        return Subject(
            key=key,
            dtype=entry.dtype,
            shape=entry.shape,
            view=view,
            scale=entry.scale,
            offset=entry.offset,
            zero=entry.zero,
            reset=moment and entry.dtype in FLOATING,
            seed=int(self.manifest.spec.get("seed", 0)),
            stream=entry.stream or entry.name,
            target=Placement(stored.dtype, stored.shape, stored.extents, key),
            source=placed,
        )

    def run(self, advance: Callable[[int], None]) -> list[str]:
        """Read everything; what does not hold, in the output's order."""
        covered, parts = self._parts()
        recipes = Recipes()
        tasks: list[tuple[str, Any, int]] = [
            ("tensors", bundle, sum(subject.nbytes for subject in bundle))
            for bundle in bundles(self.subjects)
        ]
        tasks += [("gap", (path, span), span.length) for path, spans in parts.items() for span in spans]
        if self.source is not None:
            tasks += [("carried", path, 0) for path in self.manifest.source.files]

        def look(handles: tuple[Handles, Handles | None], kind: str, what: Any) -> Any:
            output, source = handles
            if kind == "tensors":
                return examine_bundle(what, output, source, recipes)
            if kind == "gap":
                return span_of(output, what[0], what[1].start, what[1].length)
            assert source is not None
            return span_of(source, what, 0, file_size(source.path(what)))

        def work(handles: tuple[Handles, Handles | None], number: int) -> Any:
            try:
                return look(handles, *tasks[number][:2])
            except SparklingError as error:
                return error

        @contextmanager
        def handles(_index: int, _stopped: object) -> Iterator[tuple[Handles, Handles | None]]:
            with closing(Handles(self.output)) as output, ExitStack() as stack:
                if self.source is None:
                    yield output, None
                else:
                    yield output, stack.enter_context(closing(Handles(self.source)))

        found = spread(
            count(0).__next__,
            len(tasks),
            work,
            handles,
            threads=min(processors(), 4),
            done=lambda number, _: advance(tasks[number][2]),
        )
        spans: dict[str, list[Span]] = {path: [] for path in self.files}
        for number, task in enumerate(tasks):
            result = found[number]
            if isinstance(result, SparklingError):
                self.faults.append(result.message)
            elif task[0] == "tensors":
                for subject, seen in zip(task[1], result, strict=True):
                    self._judge(subject, seen, spans, covered)
            elif task[0] == "gap":
                spans[task[1][0]].append(result)
            elif (result.length, result.crc) != self._source_file(task[1]):
                self.source_faults.append(f"{task[1]} in the source is not the file that was carried over")
        self.output_faults += [fault for path in self.files if (fault := self._file(path, spans[path]))]
        return self.output_faults + self.faults + self.source_faults

    def _parts(self) -> tuple[set[str], dict[str, list[Span]]]:
        """Files whose tensors are read as tensors, and all ranges that are read as mere bytes."""
        used: dict[str, list[tuple[int, int]]] = {path: [] for path in self.files}
        for subject in self.subjects:
            for place in subject.target.places if subject.target.flat else ():
                if place.path in used:
                    used[place.path].append((place.offset, place.offset + place.stop - place.start))
        covered, parts = set(), {}
        for path, check in self.files.items():
            if check.sidecar:
                continue
            free = gaps(used[path], check.size)
            if free is None:
                parts[path] = gaps([], check.size) or []
            else:
                covered.add(path)
                parts[path] = free
        return covered, parts

    def _judge(self, subject: Subject, found: Found, spans: dict[str, list[Span]], covered: set[str]) -> None:
        size = subject.nbytes
        if found.fault is not None:
            self.faults.append(f"tensor {subject.key!r}: {found.fault}")
        try:
            if whole(found.target, 0, size) != self.manifest.tensors[subject.key].crc32:
                self.output_faults.append(f"tensor {subject.key!r} has not the CRC-32 that was written")
            if subject.source is not None and not subject.zero:
                self._judge_source(subject, found)
        except ValueError as error:
            if found.fault is None:
                self.faults.append(f"tensor {subject.key!r}: {error}")
        if not subject.target.flat:
            return
        for place in subject.target.places:
            for span in found.target:
                if place.path in covered and place.start <= span.start < place.stop:
                    at = place.offset + span.start - place.start
                    spans[place.path].append(Span(at, span.length, span.crc))

    def _judge_source(self, subject: Subject, found: Found) -> None:
        assert subject.source is not None
        size = prod(subject.source.shape) * ITEM_BYTES[subject.dtype]
        written = self.manifest.source.tensors.get(subject.key)
        if written is not None and whole(found.source, 0, size) != written:
            self.source_faults.append(f"the source of tensor {subject.key!r} is not what was widened")

    def _source_file(self, path: str) -> tuple[int, int]:
        entry = self.manifest.source.files[path]
        return entry.bytes, entry.crc32

    def _file(self, path: str, spans: list[Span]) -> str | None:
        check = self.files[path]
        try:
            if check.sidecar:
                content = (sidecar_root(self.output) / path).read_bytes()
                return None if crc32(content) == check.crc32 else f"{path} was changed"
            found = whole(spans, 0, check.size)
        except (OSError, ValueError):
            return f"{path}: not every byte of it could be read"
        return None if found == check.crc32 else f"{path or self.output.name}: a byte of it was changed"
