"""``verify``: every byte of an output, every tensor, every promise of its spec."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

from sparkling_cli.errors import CheckpointError, LayoutError, SparklingError, VerificationError
from sparkling_cli.execute.commit import in_the_making
from sparkling_cli.formats.detect import folder_of_checkpoints, meant_by
from sparkling_cli.formats.model import Checkpoint, ParamState
from sparkling_cli.formats.optimizer_states import form_of, is_named
from sparkling_cli.formats.quantized_states import Quantized, quantized_in
from sparkling_cli.layout.depth import LAYERS, shallower_layout
from sparkling_cli.layout.expr import TensorLayout
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.manifest import Manifest, TensorEntry, manifest_of, read_manifest
from sparkling_cli.models.expected import Asking, class_faults, weight_shapes
from sparkling_cli.models.kinds import completed, derives_kinds
from sparkling_cli.models.stored import without_strays
from sparkling_cli.plan.deepen import Orders, deeper_source, named_axes
from sparkling_cli.plan.model import CARRIED
from sparkling_cli.results.commands import Verification
from sparkling_cli.storage.byte_ranges import Handles, Placement, span_of
from sparkling_cli.storage.crc import FileDigest, Span, crc32, whole
from sparkling_cli.storage.sidecar import DIGESTS, FOLDER, MANIFEST, sidecar_root
from sparkling_cli.storage.tensors import FLOATING, StoredTensor
from sparkling_cli.storage.threads import processors, spread
from sparkling_cli.verification.account import account_faults, narrow_faults
from sparkling_cli.verification.compare import Found, Neighbours, Subject, bundles, examine
from sparkling_cli.verification.files import check_small_files, file_size, gaps, list_files
from sparkling_cli.verification.later import not_as_written
from sparkling_cli.verification.origin import listed, other_source
from sparkling_cli.verification.public import unreadable
from sparkling_cli.verification.quantized import QuantizedSubject
from sparkling_cli.verification.rules import Derivation, assembled
from sparkling_cli.widening.reference import Wanted

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def _meant(source: Path | None, output: Path) -> str | None:
    """What to say where the two were given in the wrong order, or a part of an output for it."""
    whole = next((folder for folder in output.parents[:2] if (folder / MANIFEST).is_file()), None)
    if whole is not None:
        return f"give the output's folder, {shlex.quote(str(whole))}"
    if source is None or manifest_of(source) is None:
        return None
    return f"the source comes first: {shlex.join(['sparkling', 'verify', str(output), str(source)])}"


def verify(source: Path | None, output: Path, *, progress: Progress | None = None) -> Verification:
    """Prove an output.

    Without a source: every file has the size and CRC-32 that were written, none is missing or extra, every
    tensor has its CRC-32 and the shape that spec, layout and axes give. With it: every tensor follows from
    the source's bytes bit by bit, as spec, layout and axes say (``verification.rules``), by index tables of
    its own (``widening.reference``); no tensor of the source is lost.

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
        raise CheckpointError(f"there is no output at {output}", hint=meant_by(output))
    if in_the_making(output):
        raise CheckpointError(
            f"{output} is no output yet: a run that was killed has left it",
            hint="run the same `sparkling expand` again: it goes on with what is there",
        )
    sidecars = sidecar_root(output)
    if not (sidecars / MANIFEST).exists():
        among = folder_of_checkpoints(output, outputs=True)
        if among is not None:
            raise among
        raise CheckpointError(
            f"{output} has no manifest ({MANIFEST}), so nothing can be proved",
            hint=_meant(source, output)
            or "only outputs of `sparkling expand` have one; it may have been moved away from its output",
        )
    faults = check_small_files(sidecars, DIGESTS, MANIFEST)
    _stop_at(faults, output, source)
    try:
        manifest = read_manifest(sidecars / MANIFEST)
    except CheckpointError as error:
        raise VerificationError(error.message) from error
    files = list_files(output, sidecars, manifest, skip={MANIFEST, DIGESTS})
    wrong = files.faults + [_unwritten(path) for path in files.unwritten]
    _stop_at(wrong, output, source, movable=not files.faults)
    try:
        derivation = Derivation(manifest)
    except SparklingError as error:
        raise VerificationError(f"the manifest of {output} is unsound: {error.message}") from error
    _stop_at(derivation.faults(), output, source)
    origin = None if source is None else _Origin(source, output, manifest, derivation)
    work = _Work(output, manifest, files.checks, derivation, origin)
    shown = progress("verifying", work.total) if progress else nullcontext(lambda _n: None)
    with shown as advance, Asking(work.config) as asked:
        faults = work.run(advance)
        answer = asked.answer()
        if origin is not None and work.found is not None and not work.source_faults:
            was = origin.checkpoint
            own = {path for path in files.checks if not path.startswith(f"{FOLDER}/")}
            carried = own & set(manifest.source.files)
            closed, inside = unreadable(work.found, own - carried, carried, origin.root)
            work.output_faults += closed
            work.output_faults += account_faults(manifest, was, work.found)
            work.output_faults += narrow_faults(derivation, manifest, work.found, inside)
            shapes = weight_shapes(work.found)
            work.output_faults += class_faults(answer, shapes, lambda: (was.config, weight_shapes(was)))
            faults = [*dict.fromkeys(work.output_faults + faults)]
    if source is not None and work.source_faults and not work.output_faults:
        raise other_source(source, output, manifest, work.source_faults)
    _stop_at(faults, output, source)
    return Verification(
        files=len(files.checks) + 2,
        nbytes=sum(check.bytes for check in files.checks.values()),
        tensors=len(manifest.tensors),
        derived=0 if origin is None else len(manifest.tensors),
        moments=0 if origin is None else sum(_reset(subject.wanted, derivation) for subject in work.subjects),
        source="" if source is None else source.name,
        model="" if answer is None or origin is None else answer.name,
        model_missing="" if origin is None else asked.missing(),
        extras=tuple(files.extras),
    )


def _reset(wanted: Wanted, derivation: Derivation) -> bool:
    """Whether it is state of which new entries start from zero; of a new layer's parameter all of them."""
    whole = wanted.moment == "drop" and wanted.state == "" and derivation.spec.optimizer != "drop"
    new = wanted.moment == "asymmetric" and not wanted.same
    return (new or whole) and wanted.dtype in FLOATING


def _unwritten(path: str) -> str:
    return f"{path} was not written with the output"


def _stop_at(faults: list[str], output: Path, source: Path | None, *, movable: bool = False) -> None:
    if faults:
        move = "it could be loaded as a part of the checkpoint: move it out of the output, and verify again"
        raise not_as_written(output, source, listed(faults), move if movable else None)


class _Origin:
    """The checkpoint that was widened.

    Attributes:
        root: its folder or file.
        checkpoint: as its format opens it.
        tensors: output key -> what the tensor was made from.

    Raises:
        CheckpointError: the source cannot be opened.
        VerificationError: it is not the checkpoint that the manifest names, or lacks a tensor.
    """

    def __init__(self, root: Path, output: Path, manifest: Manifest, derivation: Derivation) -> None:
        from sparkling_cli.formats.detect import open_checkpoint

        layout, rules = derivation.layout, derivation.rules
        if rules.order:
            layout = shallower_layout(layout, rules.order)
        self.checkpoint = found = without_strays(open_checkpoint(root), layout)
        self.root = found.root  # where the path names one step of several, their folder
        if found.format != manifest.source.format:
            fault = f"it is of format {found.format}, the output was made from {manifest.source.format}"
            raise other_source(root, output, manifest, [fault])
        axes = named_axes(layout, rules.growth, found.format)
        if axes:
            orders = {axis: tuple(rules.origin(axis).tolist()) for axis in axes}
            found = self._deeper(output, manifest, derivation, orders)
        self.tensors = found.by_key
        used: set[str] = set()
        if any(key not in self.tensors for key in manifest.tensors):
            made, used = assembled(found, derivation.layout)
            self.tensors |= made
        for key in manifest.tensors.keys() - self.tensors.keys():
            named = found.weights.get(derivation.source_name(manifest.tensors[key].name))
            if named is not None:
                self.tensors[key] = found.tensors[named]
        missing = [key for key in manifest.tensors if key not in self.tensors]
        if missing:
            fault = f"it lacks {len(missing)} tensor(s) of the output, the first: {missing[0]!r}"
            raise other_source(root, output, manifest, [fault])
        self.lost = [key for key in found.tensors if key not in manifest.tensors and key not in used]

    def _deeper(self, output: Path, manifest: Manifest, derivation: Derivation, orders: Orders) -> Checkpoint:
        """The source with the names of the output's model.

        Optimizer state is numbered. What the numbers of the source stand for follows from the names that the
        manifest gives those of the output, without new layers: both are in one order.
        """
        from sparkling_cli.formats.detect import open_checkpoint

        source, wide = self.checkpoint, open_checkpoint(output)
        named = {
            state.param: manifest.tensors[key].name
            for state in wide.states
            for key in state.tensors.values()
            if key in manifest.tensors
        }
        held = {state.param for state in source.states if state.tensors}
        names: dict[str, str] = {}
        groups = []
        for own, group in zip(source.param_groups, wide.param_groups, strict=True):
            found = [named.get(str(param), "") for param in group.get("params", ())]  # "": it has no state
            groups.append([(name, derivation.source_name(name)) for name in found])
            old = [there for name, there in groups[-1] if name and not derivation.is_new(name)]
            numbers = [str(param) for param in own.get("params", ()) if str(param) in held]
            if len(old) != len(numbers):
                raise other_source(self.root, output, manifest, ["its optimizer has other parameters"])
            names.update(zip(numbers, old, strict=True))
        states = tuple(replace(state, param=names.get(state.param, state.param)) for state in source.states)
        layout = manifest.model_layout()
        if LAYERS in orders:
            layout = shallower_layout(layout, orders[LAYERS])
        return deeper_source(replace(source, states=states), layout, orders, groups)


class _Meanings:
    """What the tensors of an output are, as its own format and the layout say.

    Attributes:
        dims: key of a weight -> its layout.
        owners: key of state -> the state that it is part of.
    """

    def __init__(self, output: Checkpoint, layout: ModelLayout) -> None:
        self._weights: dict[str, str] = {}
        for name, key in output.weights.items():
            self._weights.setdefault(key, name)  # of tied names that share their bytes, the first
        self._states: dict[str, tuple[str, str]] = {}
        self.owners: dict[str, ParamState] = {}
        for state in output.states:
            for slot, key in state.tensors.items():  # levels of quantized state may be of several
                self._states.setdefault(key, (state.param, slot))
                self.owners.setdefault(key, state)
        names = layout.canonical_names(self._weights.values())
        found = layout.disk_table.look_up(names)
        if None in found:
            found = layout.module_table.look_up(names)
        pairs = zip(self._weights, found, strict=True)
        self.dims = {key: pattern.dims for key, pattern in pairs if pattern is not None}

    def faults(self, manifest: Manifest) -> list[str]:
        """Where the manifest takes a tensor for another one than it is."""
        found = []
        named: dict[str, str] = {}
        for key, entry in manifest.tensors.items():
            param, slot = self._states.get(key, (entry.name, entry.slot))
            if key in self._states and entry.slot == CARRIED and not is_named(slot):
                continue  # among a parameter's state, and none of the optimizer's
            if slot != entry.slot:
                found.append(f"tensor {key!r} is state {slot!r}, the manifest says {entry.slot!r}")
            elif key in self._weights and (entry.slot or self._weights[key] != entry.name):
                found.append(f"tensor {key!r} is the weight {self._weights[key]!r}, not {entry.name!r}")
            elif not entry.slot and key not in self.dims and key in self._weights:
                found.append(f"tensor {key!r}: no pattern of the layout stands for {entry.name!r}")
            elif key in self._states and named.setdefault(param, entry.name) != entry.name:
                found.append(f"tensor {key!r}: parameter {param} is {named[param]!r} and {entry.name!r}")
        owners = list(named.values())
        return found if len(set(owners)) == len(owners) else [*found, "two parameters have one name"]


class _OtherSourceError(CheckpointError):
    """A tensor of the source is not the one that was widened."""


class _Work:
    """All that has to be read, as tasks for a few threads."""

    def __init__(
        self,
        output: Path,
        manifest: Manifest,
        files: Mapping[str, FileDigest],
        derivation: Derivation,
        origin: _Origin | None,
    ) -> None:
        self.output, self.manifest, self.files, self.derivation = output, manifest, files, derivation
        self.origin = origin
        self.source = None if origin is None else origin.root
        self.faults: list[str] = []
        self.source_faults: list[str] = []
        self.output_faults: list[str] = []
        self.subjects: list[Subject] = []
        self.found: Checkpoint | None = None
        self.config: Mapping[str, Any] | None = None
        self.total = sum(check.bytes for check in files.values())
        self._judge_names()

    def _judge_names(self) -> None:
        """Every tensor is there and is what spec and layout say, all but its bytes."""
        from sparkling_cli.formats.detect import open_checkpoint

        try:
            found = open_checkpoint(self.output)
        except SparklingError as error:
            self.output_faults.append(f"it does not open: {error.message}")
            return
        found = without_strays(found, self.derivation.layout)
        self.found, self.config = found, found.config
        extra = [key for key in found.tensors if key not in self.manifest.tensors]
        if extra:
            self.output_faults.append(
                f"{len(extra)} tensor(s) that were not written, the first: {extra[0]!r}"
            )
        if self.origin is not None:
            lost = self.origin.lost
            if lost:
                self.output_faults.append(
                    f"{len(lost)} tensor(s) of the source are lost, the first: {lost[0]!r}"
                )
            before = self.origin.checkpoint.config
            self.output_faults += self.derivation.config_faults(before, found.config)
            if LAYERS in self.derivation.rules.growth and derives_kinds(before) and not self.output_faults:
                source, output = completed(before or {}), completed(found.config or {})
                if source is not None and output is not None:
                    self.output_faults += self.derivation.kind_faults(source.config, output.config)
        stored = found.by_key
        meanings = _Meanings(found, self.derivation.layout)
        self.output_faults += meanings.faults(self.manifest)
        for key, entry in self.manifest.tensors.items():
            if key not in stored:
                self.output_faults.append(f"tensor {key!r} is missing")
                continue
            try:
                self.subjects.append(self._subject(key, entry, stored[key], meanings))
            except _OtherSourceError as error:
                self.source_faults.append(f"tensor {key!r}: {error.message}")
            except LayoutError as error:  # what the source has does not fit the layout that was widened
                faults = self.output_faults if self.origin is None else self.source_faults
                faults.append(f"tensor {key!r}: {error.message}")
            except CheckpointError as error:
                self.output_faults.append(f"tensor {key!r}: {error.message}")

    def _subject(self, key: str, entry: TensorEntry, stored: StoredTensor, meanings: _Meanings) -> Subject:
        if stored.dtype != entry.dtype or stored.shape != entry.shape:
            raise CheckpointError(
                f"it is {stored.dtype} {stored.shape}, {entry.dtype} {entry.shape} was written"
            )
        moment = self._quantized(key, entry, meanings.owners.get(key))
        if moment is not None:
            return moment
        placed = None
        if self.origin is None:
            source = self._shrunk(stored, entry, meanings.dims.get(key))
        else:
            source = self.origin.tensors[key]
            placed = Placement(source.dtype, source.shape, source.extents, key)
        if source.dtype != entry.dtype:
            raise _OtherSourceError(f"its source is {source.dtype}, it is {entry.dtype}")
        name = self.derivation.layout.canonical(entry.name)
        if entry.slot == CARRIED:
            wanted = self.derivation.carried(source)
        elif entry.slot:
            wanted = self.derivation.state(entry.name, entry.slot, source, entry.kind)
        else:
            wanted = self.derivation.weight(name, meanings.dims[key], source.dtype)
        if wanted.before != source.shape:
            raise _OtherSourceError(f"its source has shape {source.shape}, the layout says {wanted.before}")
        if wanted.shape != stored.shape:
            raise CheckpointError(f"it has shape {stored.shape}, spec and layout give {wanted.shape}")
        target = Placement(stored.dtype, stored.shape, stored.extents, key)
        stream = self.derivation.stream(name) if wanted.random and not entry.slot else name
        return Subject(key, wanted, self.derivation.spec.seed, stream, target, placed)

    def _quantized(self, key: str, entry: TensorEntry, state: ParamState | None) -> Subject | None:
        """The subject of codes or scales of a quantized moment; None of any other tensor."""
        if state is None or self.found is None or entry.slot not in state.tensors:  # of none, or carried
            return None
        if entry.slot in self.derivation.spec.state:
            return None
        wide = {slot: self.found.tensors[own] for slot, own in state.tensors.items()}
        if wide[entry.slot].dtype not in ("uint8", "float8_e4m3fn", "float32"):
            return None
        wanted, before = self.derivation.numbers(entry.name)
        found = next((q for q in quantized_in(wide, wanted.shape) if entry.slot in q.slots), None)
        if found is None or wanted.same:
            return None
        codes, scales = found.shapes(wide[found.codes].shape, wide[found.scales].shape, before)
        size = scales if entry.slot == found.scales else codes
        wide_size = wide[entry.slot].shape
        part = self.derivation.reshaped(size, wide_size, entry.dtype, zero=wanted.zero)
        if entry.slot == found.levels:
            part = self.derivation.carried(wide[entry.slot])
        target = self._places(self.found.tensors, state, found)
        number = found.slots.index(entry.slot)
        if self.origin is None:
            return Subject(key, part, 0, "", target[number], None)
        source = self.origin.tensors
        if any(state.tensors[slot] not in source for slot in found.slots):
            raise _OtherSourceError("its source lacks a part of this quantized state")
        there = source[key]
        if (there.dtype, there.shape) != (entry.dtype, part.before):
            raise _OtherSourceError(f"its source is {there.dtype} {there.shape}, it should be {part.before}")
        places = self._places(source, state, found)
        whole = None if entry.slot == found.levels else QuantizedSubject(found, wanted, target, places)
        return Subject(key, part, 0, "", target[number], places[number], whole)

    @staticmethod
    def _places(
        tensors: Mapping[str, StoredTensor], state: ParamState, found: Quantized
    ) -> tuple[Placement, ...]:
        """Where codes, scales and levels are."""
        parts = {state.tensors[slot]: tensors[state.tensors[slot]] for slot in found.slots}
        return tuple(Placement(one.dtype, one.shape, one.extents, key) for key, one in parts.items())

    def _shrunk(self, stored: StoredTensor, entry: TensorEntry, dims: TensorLayout | None) -> StoredTensor:
        """What a tensor was made from, as far as its own shape tells; for an output without its source."""
        layout = self.derivation.layout
        sizes = {**layout.sizes, **{axis: after for axis, (_, after) in self.derivation.rules.growth.items()}}
        if entry.slot and entry.slot != CARRIED:
            dims = layout.module_table.find(layout.canonical(entry.name)).dims
            form = form_of(entry.slot, stored.shape, dims.shape(sizes))
            if form is not None:
                before = form.layout(dims, stored.shape).shape(layout.sizes)
                return stored._replace(shape=form.stored(before))
        if dims is None or dims.shape(sizes) != stored.shape:
            return stored
        return stored._replace(shape=dims.shape(layout.sizes))

    def run(self, advance: Callable[[int], None]) -> list[str]:
        """Read everything; what does not hold, in the output's order."""
        if self.output_faults and not self.subjects:
            return self.output_faults
        covered, parts = self._parts()
        tasks: list[tuple[str, Any, int]] = [
            ("tensors", bundle, sum(subject.nbytes for subject in bundle))
            for bundle in bundles(self.subjects)
        ]
        tasks += [("gap", (path, span), span.length) for path, spans in parts.items() for span in spans]
        if self.source is not None:
            tasks += [("carried", path, 0) for path in self.manifest.source.files]

        known = Neighbours(self.subjects, self.source or self.output)

        def look(handles: tuple[Handles, Handles | None], kind: str, what: Any) -> Any:
            output, source = handles
            if kind == "tensors":
                return examine(what, output, source, known)
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

        with closing(known):
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
            elif FileDigest(result.length, result.crc) != self.manifest.source.files[task[1]]:
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
            if path.startswith(f"{FOLDER}/"):
                continue
            free = gaps(used[path], check.bytes)
            if free is None:
                parts[path] = gaps([], check.bytes) or []
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
            if subject.source is not None and not subject.wanted.zero:
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
        size = prod(subject.source.shape) * subject.source.item
        written = self.manifest.source.tensors.get(subject.key)
        if written is not None and whole(found.source, 0, size) != written:
            self.source_faults.append(f"the source of tensor {subject.key!r} is not what was widened")

    def _file(self, path: str, spans: list[Span]) -> str | None:
        check = self.files[path]
        try:
            if path.startswith(f"{FOLDER}/"):
                content = (sidecar_root(self.output) / path).read_bytes()
                return None if crc32(content) == check.crc32 else f"{path} was changed"
            found = whole(spans, 0, check.bytes)
        except (OSError, ValueError):
            return f"{path}: not every byte of it could be read"
        return None if found == check.crc32 else f"{path or self.output.name}: a byte of it was changed"
