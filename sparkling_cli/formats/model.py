"""The types that every checkpoint format shares.

Whatever the format, a stored tensor is a few row-major boxes at byte offsets of files. A reader says
where they are; a writer says where they shall be. Reading and writing bytes is nobody's business here,
so that one engine serves all formats.

Life of a checkpoint:

1. ``detect.open_checkpoint(path)`` finds the format and calls its ``open``: a :class:`Checkpoint`.
2. The plan decides shape, dtype and source of every output tensor (``plan.model.Plan``).
3. ``Format.outputs(checkpoint, request)`` lays out every output file completely: an :class:`OutputFile`
   each, with all bytes that are no tensor data, and the extents of the tensors.
4. ``execute`` fills the extents and the checksums, and commits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from sparkling_cli.errors import CheckpointError
from sparkling_cli.storage.tensors import Extent, StoredTensor
from sparkling_cli.widening.geometry import View


@dataclass(frozen=True)
class ParamState:
    """Optimizer state of one parameter.

    Attributes:
        param: the parameter's module name; for formats that number parameters, the number as text
            until ``checkpoint.optimizer.name_parameters`` has resolved it.
        tensors: state name (``exp_avg``) -> key in ``Checkpoint.tensors``.
        scalars: state name (``step``) -> number, for state that is no tensor or a one-entry tensor.
        places: name of a scalar -> every place where it stands, as the format describes it.
    """

    param: str
    tensors: Mapping[str, str]
    scalars: Mapping[str, float] = field(default_factory=dict)
    places: Mapping[str, Sequence[Any]] = field(default_factory=dict)


class Further(NamedTuple):
    """A tensor that is neither a weight nor state of a parameter: a counter, an average, a random state.

    Attributes:
        name: its file and its place in it, for people and for ``--carry``.
        file: relative path; "" if the checkpoint is one file.
        key: by which the format can write it with another shape; "" if it can only be copied.
        stored: dtype, shape, and, where ``key`` is set, its bytes (else where it lies,
            more or less); None of a file that could not be read.
        left_out: its file, or it alone, is not part of the output.
        weight: its name among the weights, where it lies there.
    """

    name: str
    file: str
    key: str
    stored: StoredTensor | None
    left_out: bool = False
    weight: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A source checkpoint, opened.

    Attributes:
        root: directory or file.
        format: the format's name, e.g. ``trainer``.
        tensors: every tensor that the plan may change, under a key that is unique in the checkpoint.
        weights: weight name on disk -> key. Tied names share a key only if they share bytes.
        states: optimizer state, one entry per parameter; empty without optimizer.
        param_groups: the optimizer's groups as plain data (lr, betas, ...; ``params`` as in ``states``).
        config: the model's sizes as the checkpoint states them (config.json, model_args, ...).
        config_file: where ``config`` stands, for messages.
        carried: files that are copied byte for byte, relative paths, sorted.
        further: every tensor of every file that is neither in ``weights`` nor in ``states``.
        further_files: carried files that can be written with other shapes, by relative path.
        facts: what else is known: ``global_step``, ``max_steps``, ``optimizer_class``, ...
        notes: what a user should know about this checkpoint.
        private: the format's own parsed objects; nobody else looks inside.
    """

    root: Path
    format: str
    tensors: Mapping[str, StoredTensor]
    weights: Mapping[str, str]
    states: tuple[ParamState, ...] = ()
    param_groups: tuple[Mapping[str, Any], ...] = ()
    config: Mapping[str, Any] | None = None
    config_file: str = ""
    carried: tuple[str, ...] = ()
    further: tuple[Further, ...] = ()
    further_files: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    private: Any = None

    def __repr__(self) -> str:
        return f"Checkpoint({self.root}, {self.format}, {len(self.tensors)} tensors)"

    @property
    def by_key(self) -> dict[str, StoredTensor]:
        """Every tensor that can be written with another shape, further ones included."""
        further = {item.key: item.stored for item in self.further if item.key and item.stored is not None}
        return {**further, **self.tensors}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every weight."""
        return {name: self.tensors[key].shape for name, key in self.weights.items()}

    def weight(self, name: str) -> StoredTensor:
        """The stored weight of that name."""
        return self.tensors[self.weights[name]]

    def alike(self, one: str, other: str) -> bool:
        """Whether the tensors under two keys are the same, byte by byte, read piece by piece."""
        import torch

        from sparkling_cli.storage.read import TensorSource

        first, second = self.tensors[one], self.tensors[other]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        with TensorSource(self) as source:
            pieces = zip(source.pieces(one), source.pieces(other), strict=True)
            return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pieces)

    @property
    def stored_weights(self) -> dict[str, str]:
        """Every name among the weights -> key: those too that are none of the model's."""
        return {**self.weights, **{item.weight: item.key for item in self.further if item.weight}}

    @property
    def loose(self) -> frozenset[str]:
        """Weights that may be none of the model's: its optimizer has state, and none for them.

        Without state that is by name, only those that are in no module: their names have no dots.
        """
        named = {s.param for s in self.states if s.tensors and not s.param.isdigit()}
        return frozenset(n for n in self.weights if (n not in named if named else "." not in n))

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The checkpoint with the optimizer's parameters under other names; those without one keep theirs.

        Args:
            names: old name, or number as text -> new name.
        """
        states = tuple(replace(state, param=names.get(state.param, state.param)) for state in self.states)
        groups = tuple(
            {**group, "params": [names.get(str(param), param) for param in group["params"]]}
            if isinstance(group.get("params"), (list, tuple))
            else group
            for group in self.param_groups
        )
        return replace(self, states=states, param_groups=groups)

    def without_weights(self, names: Collection[str]) -> Checkpoint:
        """The checkpoint with these weights among the further tensors."""
        if not names:
            return self
        apart = []
        for name in names:
            key = self.weights[name]
            file, colon, place = key.partition(":")
            shown = f"{file or self.root.name}: {place}" if colon else key
            apart.append(Further(shown, "", key, self.tensors[key], weight=name))
        left = {name: key for name, key in self.weights.items() if name not in names}
        return replace(self, weights=left, further=(*self.further, *apart))


#: Each tensor of a deeper model, in the model's order, and the one of the source that it is read from.
Pairs = Sequence[tuple[str, str]]


@runtime_checkable
class Deepening(Protocol):
    """A format whose files can hold more parameters than the source's."""

    def deeper(
        self,
        checkpoint: Checkpoint,
        weights: Pairs,
        groups: Sequence[Pairs],
    ) -> Checkpoint:
        """The checkpoint as one of a deeper model, in which tensors are read several times.

        Args:
            checkpoint: the source, its states named.
            weights: of the deeper model.
            groups: of the optimizer: their parameters.

        Raises:
            CheckpointError: its files cannot hold that.
        """
        ...


class Declared(NamedTuple):
    """An output tensor: what it will be.

    Attributes:
        key: unique in the output; equal to the source's key unless weights are renamed.
        name: weight name in the output (for weights), else "".
        dtype: as in the source.
        shape: after widening.
        source_file: file that the (first) source extent lies in; the output goes into its counterpart.
        around: shape after widening of the tensor that this one is a part of (codes of quantized state); ()
            of a tensor by itself.
        view: which entries come from where.
    """

    key: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    source_file: str
    around: tuple[int, ...] = ()
    view: View = ()


@dataclass(frozen=True)
class OutputRequest:
    """All that a format needs to lay out its output.

    Attributes:
        tensors: every output tensor, in the plan's order.
        config: config key (dotted) -> new value.
        scalars: state scalars to overwrite, ``key`` of the form ``<param>.<name>`` (a dropped ``step``).
    """

    tensors: tuple[Declared, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)

    def numbers(self, states: Iterable[ParamState]) -> Iterator[tuple[Any, float]]:
        """Every place of a scalar that changes, and its new value."""
        for state in states if self.scalars else ():
            for name, places in state.places.items():
                value = self.scalars.get(f"{state.param}.{name}")
                if value is not None:
                    yield from ((place, value) for place in places)

    def by_key(self, known: Collection[str], where: str) -> dict[str, Declared]:
        """Output tensors by key, of a format in which weights lie under the module's own names.

        Args:
            known: keys of the source.
            where: the checkpoint, for messages.

        Raises:
            CheckpointError: the request renames weights.
        """
        for item in self.tensors:
            if item.key not in known:
                raise CheckpointError(
                    f"{where}: there is no {item.key!r}; weights are not renamed in this format",
                    hint="pass --names disk",
                )
        return {item.key: item for item in self.tensors}


@dataclass(frozen=True)
class Checksum:
    """CRC-32 of the bytes ``start <= i < stop`` of a file, stored little-endian at each offset in ``at``."""

    start: int
    stop: int
    at: tuple[int, ...]


@dataclass(frozen=True)
class OutputFile:
    """One output file, complete but for tensor data and checksums.

    Attributes:
        path: relative to the output's root ("" when the output is a single file).
        size: bytes.
        literals: (offset, bytes) of all that is no tensor data; gaps are zero bytes.
        tensors: (key in the request, extent) of all tensor data in this file, by offset.
        checksums: checksums over tensor data, filled in after it.
        last: written after all other files and synced on its own (an index that makes the rest valid).
    """

    path: str
    size: int
    literals: tuple[tuple[int, bytes], ...]
    tensors: tuple[tuple[str, Extent], ...] = ()
    checksums: tuple[Checksum, ...] = ()
    last: bool = False


class Format(Protocol):
    """A checkpoint format. Methods are called in this order: ``claims``, ``open``, ``outputs``."""

    name: str

    def claims(self, root: Path) -> bool:
        """Whether this path is of this format, by the names of a few files.

        Raises:
            CheckpointError: it is almost this format; the message says what is missing.
        """

    def open(self, root: Path) -> Checkpoint:
        """Read names, shapes, dtypes, places and the small files. No tensor data is read.

        Raises:
            CheckpointError: missing, damaged or contradictory files.
            UnsafePickleError: a pickle that is not weights-only-safe.
        """

    def outputs(self, checkpoint: Checkpoint, request: OutputRequest) -> tuple[OutputFile, ...]:
        """Lay out every output file (files in ``checkpoint.carried`` are not among them)."""
