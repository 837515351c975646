"""Reads a torch file's pickle without running anything that it names.

The globals that ``torch.load(weights_only=True)`` allows become stand-ins; any other is an error that names
it. The decoder itself is Python's own; it calls nothing but the stand-ins and the two hooks below.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from typing import Any

from sparkling_cli.errors import CheckpointError, UnsafePickleError
from sparkling_cli.formats.torchfile.objects import GlobalType, Storage, make_global
from sparkling_cli.formats.torchfile.opcodes import CheckedUnpickler
from sparkling_cli.formats.torchfile.subclass import QUANTIZED, REBUILD, WRAPPER, SubclassCall
from sparkling_cli.storage.tensors import ITEM_BYTES

_STORAGES = (
    "Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool",
    "ComplexFloat", "ComplexDouble", "QUInt8", "QInt8", "QInt32", "QUInt4x2", "QUInt2x4",
)  # fmt: skip
_REBUILD = (
    "tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state", "qtensor", "sparse_tensor",
    "meta_tensor_no_storage", "nested_tensor", "device_tensor_from_numpy",
    "device_tensor_from_cpu_tensor",
)  # fmt: skip

_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_NUMBERS = ("int", "long", "float", "bool", "str", "unicode", "bytes", "xrange")
_NUMPY_SCALARS = (
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    "float16", "float32", "float64", "bool_", "bool",
)  # fmt: skip
_NUMPY_MADE = ("_reconstruct", "scalar")
_MEGATRON = (
    "enums.ModelType", "optimizer.optimizer_config.OptimizerConfig",
    *(f"rerun_state_machine.Rerun{name}" for name in ("Diagnostic", "Mode", "State")),
    *(f"transformer.enums.{name}" for name in
      ("AttnBackend", "CudaGraphModule", "CudaGraphScope", "InferenceCudaGraphScope")),
)  # fmt: skip
_NUMPY_RANDOM = ("mt19937.MT19937", "pcg64.PCG64", "pcg64.PCG64DXSM", "philox.Philox", "sfc64.SFC64")

#: What ``torch.load(weights_only=True)`` accepts by default, less what never occurs in a checkpoint.
ALLOWED: frozenset[str] = frozenset(
    {
        "collections.OrderedDict", "collections.Counter", "torch.Size", "torch.device", "torch.Tensor",
        "torch.nn.parameter.Parameter", "torch.serialization._get_layout", "_codecs.encode",
        "builtins.set", "builtins.complex", "builtins.bytearray",
        "torch.storage.UntypedStorage", "torch.storage.TypedStorage", "torch.UntypedStorage",
    }
    | {f"torch.{name}Storage" for name in _STORAGES}
    | {f"torch.cuda.{name}Storage" for name in _STORAGES}
    | {f"torch._utils._rebuild_{name}" for name in _REBUILD}
    | {f"torch.{name}" for name in ITEM_BYTES}
    | {f"torch.{name}" for name in ("quint8", "qint8", "qint32", "quint4x2", "quint2x4", "complex32")}
    | {f"torch.per_{name}" for name in ("tensor_affine", "tensor_symmetric", "channel_affine")}
    | {REBUILD, WRAPPER, *QUANTIZED}
)  # fmt: skip

#: Plain data of the standard library, NumPy, torch and Megatron that trainers keep beside tensors: options,
#: times, random states. As every global it becomes a stand-in that is never looked up or called.
HARMLESS: frozenset[str] = frozenset(
    {f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")}
    | {f"pathlib{sub}.{name}" for sub in ("", "._local") for name in _PATHS}
    | {f"builtins.{name}" for name in ("frozenset", "slice", "range", "list", "dict", "tuple", *_NUMBERS)}
    | {f"numpy.{name}" for name in ("ndarray", "dtype", *_NUMPY_SCALARS)}
    | {f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in _NUMPY_MADE}
    | {f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")}
    | {f"numpy.random._pickle.__{name}_ctor" for name in ("randomstate", "generator", "bit_generator")}
    | {f"numpy.random._{name}" for name in _NUMPY_RANDOM}
    | {f"megatron.core.{name}" for name in _MEGATRON}
    | {
        "argparse.Namespace", "types.SimpleNamespace", "collections.defaultdict", "collections.deque",
        "enum.Enum", "signal.Signals", "typing.Any",
        "uuid.UUID", "decimal.Decimal", "fractions.Fraction", "random.Random",
        "torch.torch_version.TorchVersion",
        "numpy.random.bit_generator.__pyx_unpickle_SeedSequence", "numpy.random.bit_generator.SeedSequence",
    }
)  # fmt: skip
#: packages all of whose classes only hold options
_OPTIONS = ("omegaconf.",)

_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_RESTART = (
    ": expand a copy of the checkpoint without the optimizer's file, with --init random-copy, and restart "
    "the optimizer"
)
_PROJECTED = f"its state lies in a subspace that was chosen for the weights at their old size{_RESTART}"
_KNOWN_FAULTS = {
    "torch.distributed.tensor": "it holds sharded tensors (DTensor): save a full state dict instead",
    "torchao": f"it holds tensor subclasses that are not known{_RESTART}",
    "__main__.ParamConfig": "modded-nanogpt numbers its optimizer's state by addresses in memory, saves one "
    'rank\'s part of it, and does not resume from it: torch.save({"model": model.state_dict()}, FILE), and '
    "expand that with --layout FILE and --init random-copy",
    "pytorch_optimizer": f"it holds objects of the optimizer's own, made for the old size{_RESTART}",
    "galore_torch": _PROJECTED,
    "apollo_torch": _PROJECTED,
    "bitsandbytes": "it holds quantized objects, which cannot be widened entry by entry",
}


class Anything(Collection[str]):
    """A list of allowed globals that has every name on it: all of them stay inert."""

    def __contains__(self, item: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class TreeUnpickler(CheckedUnpickler):
    """Decodes a pickle into containers and stand-ins."""

    def __init__(self, stream: io.BytesIO, where: str, allow: Collection[str] = ()) -> None:
        super().__init__(stream, where)
        self._where = where
        self._allow = allow
        self._globals: dict[tuple[str, str], GlobalType] = {}
        self._storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for an allowed global.

        Raises:
            UnsafePickleError: it is not on the list.
        """
        found = self._globals.get((module, name))
        if found is None:
            path = f"{_MODULES.get(module, module)}.{name}"
            harmless = path in ALLOWED or path in HARMLESS or path.startswith(_OPTIONS)
            if not harmless and path not in self._allow:
                raise UnsafePickleError(
                    f"{self._where}: its pickle names {path!r}, which is not on the list of harmless "
                    "globals; nothing of it was executed",
                    hint=_hint(path),
                )
            # who allows the function itself reads nothing of what it makes
            kind = SubclassCall if path == REBUILD and path not in self._allow else GlobalType
            found = self._globals[module, name] = make_global(module, name, kind)
        return found

    def persistent_load(self, pid: Any) -> Any:
        """The storage that a persistent id names.

        Raises:
            CheckpointError: the id is no storage, or contradicts an earlier one of the same key.
        """
        if not _names_storage(pid):
            raise CheckpointError(f"{self._where}: its pickle refers to {pid!r}, which is no storage")
        known = self._storages.get(pid[2])
        if known is None:
            known = self._storages[pid[2]] = Storage(*pid)
        elif known.kind is not pid[1] or known.entries != pid[4]:
            raise CheckpointError(f"{self._where}: storage {pid[2]!r} has two types or two sizes")
        return known


class InertUnpickler(TreeUnpickler):
    """Accepts every global, as a stand-in, and every storage, of which nothing is read."""

    def __init__(self, stream: io.BytesIO, where: str) -> None:
        super().__init__(stream, where, Anything())

    def persistent_load(self, pid: Any) -> Any:
        """A storage; before torch 1.6 its name had six parts."""
        if isinstance(pid, tuple) and len(pid) in (5, 6) and isinstance(pid[1], GlobalType):
            return Storage("storage", pid[1], str(pid[2]), str(pid[3]), 0)
        return Storage("storage", self.find_class("torch", "ByteStorage"), "", "", 0)


def _names_storage(pid: Any) -> bool:
    """Whether a persistent id is ``("storage", type, key, location, entries)``."""
    if type(pid) is not tuple or len(pid) != 5:
        return False
    tag, kind, key, location, entries = pid
    return (
        tag == "storage"
        and type(key) is str
        and type(location) is str
        and type(entries) is int
        and entries >= 0
        and isinstance(kind, GlobalType)
    )


def read_tree(data: bytes, where: str, allow: Collection[str] = ()) -> Any:
    """Decode ``data.pkl``.

    Args:
        data: the pickle.
        where: the file, for messages.
        allow: more globals (dotted) that may be named; they become stand-ins like all others.

    Raises:
        UnsafePickleError: a global that is not allowed is named.
        CheckpointError: it does not decode.
    """
    try:
        return TreeUnpickler(io.BytesIO(data), where, allow).load()
    except UnsafePickleError:
        raise
    except CheckpointError as error:
        if error.message.startswith(where):
            raise
        raise CheckpointError(f"{where}: {error.message}", hint=error.hint) from error
    except RecursionError as error:
        raise CheckpointError(f"{where}: its pickle is nested too deeply") from error
    except Exception as error:
        # The decoder raises whatever a damaged stream leads to: IndexError, TypeError, UnicodeError, ...
        raise CheckpointError(
            f"{where}: its pickle is damaged: {type(error).__name__}: {error}",
            hint="copy or download the file again",
        ) from error


def _hint(path: str) -> str:
    for start, hint in _KNOWN_FAULTS.items():
        if path.startswith(start):
            return hint
    return "save the file again with tensors, numbers, text and containers only"
