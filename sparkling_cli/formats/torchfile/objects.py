"""What a torch file's pickle is read into: plain containers, and stand-ins that can do nothing.

No module that a pickle names is imported and none of its functions is called. A global becomes a
:class:`GlobalType`, calling one records a :class:`Call`, a tensor becomes a :class:`TensorNode`. All of them
can be written back (``repickle``) as they were read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from sparkling_cli.errors import CheckpointError
from sparkling_cli.storage.tensors import are_sizes


class GlobalType(type):
    """Stand-in for something that a pickle names, ``module`` and ``qualname`` as written there.

    Each is a class of its own, made anew per file, because some pickle opcodes insist on a class.
    """

    module: str
    qualname: str

    def __call__(cls, *args: Any) -> Any:
        """Record the call, or make the object that this global stands for."""
        build = _BUILDERS.get(cls.path)
        if build is not None:
            return build(cls, args)
        return recorded(cls, args)

    def __setattr__(cls, name: str, value: Any) -> None:
        """Refuse: a pickle's BUILD opcode must not change a stand-in."""
        raise CheckpointError(f"a pickle tries to change {cls.path!r}")

    @property
    def path(cls) -> str:
        """Dotted name, with Python 2's module names translated."""
        module = "builtins" if cls.module == "__builtin__" else cls.module
        return f"{module}.{cls.qualname}"

    def __repr__(cls) -> str:
        return f"<global {cls.path}>"


class Call:
    """A recorded call (or, if ``new``, an object made by ``cls.__new__``) with all that followed it."""

    __slots__ = ("args", "function", "items", "new", "pairs", "state")

    function: GlobalType
    args: tuple[Any, ...]
    new: bool
    state: Any
    items: list[Any]
    pairs: list[tuple[Any, Any]]

    def __new__(cls, *args: Any) -> Call:
        """Record ``cls.__new__(cls, *args)``; only the unpickler calls this."""
        if not isinstance(cls, GlobalType):
            raise CheckpointError("only stand-ins for globals can be called")
        return _call(cls, cast(GlobalType, cls), args, True)

    def __setstate__(self, state: Any) -> None:
        self.state = [state]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.pairs.append((key, value))

    def append(self, item: Any) -> None:
        """Record an appended item."""
        self.items.append(item)

    def extend(self, items: Any) -> None:
        """Record appended items."""
        self.items.extend(items)

    def __repr__(self) -> str:
        return f"<{self.function.path}{self.args!r}>"


class Ordered(dict[Any, Any]):
    """A ``collections.OrderedDict``, with the instance attributes that it was saved with."""

    __slots__ = ("state",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = (state,)


def like(old: Any, new: dict[Any, Any]) -> dict[Any, Any]:
    """A dictionary of the old one's kind, with its attributes."""
    if not isinstance(old, Ordered):
        return dict(new)
    fresh = Ordered(new)
    fresh.state = old.state
    return fresh


@dataclass(slots=True, eq=False)
class Storage:
    """A storage as the pickle names it: ``(tag, type, key, location, entries)``."""

    tag: str
    kind: GlobalType
    key: str
    location: str
    entries: int


@dataclass(slots=True, eq=False)
class TensorNode:
    """A tensor in the tree: a storage and how to look at it. ``rest`` is what follows requires_grad."""

    function: GlobalType
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool = False
    rest: tuple[Any, ...] = ()

    @property
    def dtype(self) -> str:
        """The dtype's name as torch spells it."""
        if self.function.qualname == "_rebuild_tensor_v3":
            return str(self.rest[1].qualname)
        return STORAGE_DTYPES[self.storage.kind.qualname]


def make_global(module: str, qualname: str, kind: type[GlobalType] = GlobalType) -> GlobalType:
    """A new stand-in."""
    return kind(
        qualname, (Call,), {"__slots__": (), "module": module, "qualname": qualname, "__module__": __name__}
    )


def recorded(function: GlobalType, args: tuple[Any, ...]) -> Call:
    """A call as if the pickle had made it."""
    return _call(Call, function, args, False)


def _call(cls: type[Call], function: GlobalType, args: tuple[Any, ...], new: bool) -> Call:
    self = object.__new__(cls)
    self.function = function
    self.args = args
    self.new = new
    self.state = None
    self.items = []
    self.pairs = []
    return self


STORAGE_DTYPES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
}  # fmt: skip


_PATHS = ("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath")
#: what lies deeper in an object is not looked into: an object may contain itself
_DEEPEST = 20
_ARGUMENTS = {"_rebuild_tensor": 4, "_rebuild_tensor_v2": 6, "_rebuild_tensor_v3": 7}


def _rebuild_tensor(function: GlobalType, args: tuple[Any, ...]) -> TensorNode:
    """A tensor from the arguments of one of torch's three rebuild functions, checked."""
    untyped = function.qualname == "_rebuild_tensor_v3"
    enough = _ARGUMENTS[function.qualname]
    if len(args) < enough or type(args[0]) is not Storage:
        raise CheckpointError(f"a tensor has {len(args)} arguments, expected {enough}, a storage first")
    storage, offset, shape, stride = args[:4]
    if isinstance(shape, Call) and shape.function.path == "torch.Size" and len(shape.args) == 1:
        shape = shape.args[0]
    if not (all(map(are_sizes, (shape, stride, (offset,)))) and len(shape) == len(stride)):
        raise CheckpointError(f"a tensor has offset {offset!r}, shape {shape!r}, strides {stride!r}")
    if untyped and not isinstance(args[6], GlobalType):
        raise CheckpointError(f"a tensor's dtype is {args[6]!r}")
    if not untyped and storage.kind.qualname not in STORAGE_DTYPES:
        raise CheckpointError(f"a tensor's storage is of type {storage.kind.qualname!r}, which is not known")
    metadata = args[enough] if len(args) > enough else None
    if metadata:
        raise CheckpointError(f"a tensor carries the view bits {metadata!r} (conjugate or negative)")
    requires_grad = bool(args[4]) if len(args) > 4 else False
    return TensorNode(function, storage, offset, shape, stride, requires_grad, args[5:])


def _ordered(function: GlobalType, args: tuple[Any, ...]) -> Any:
    return Ordered() if args == () else recorded(function, args)


#: objects that are nothing but their attributes
NAMESPACES = frozenset({"argparse.Namespace", "types.SimpleNamespace"})
#: steps of a path from an object to its attributes
ATTRIBUTES = ("__3__", 0)
#: fields of a call, by their names in a path (``torchfile.children``)
FIELDS = {"__0__": "args", "__1__": "items", "__2__": "pairs", "__3__": "state"}


def step_into(holder: Any, step: Any) -> Any:
    """What a container or a call holds under one step of a path."""
    return getattr(holder, FIELDS[step]) if isinstance(holder, Call) else holder[step]


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path."""
    for step in path:
        tree = step_into(tree, step)
    return tree


def copied_call(call: Call) -> Call:
    """A call with the same content, whose fields can be changed."""
    copy = _call(type(call), call.function, call.args, call.new)
    copy.items, copy.pairs = call.items, call.pairs
    copy.state = None if call.state is None else list(call.state)
    return copy


_BUILDERS = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor,
    "collections.OrderedDict": _ordered,
}


def plain(value: Any, depth: int = 0) -> Any:
    """Numbers, text and containers as ordinary Python data; tensors become their names.

    ``torch.Size`` becomes a tuple, bytes and sets come back as such, enumerations become their values, paths
    text, objects of other classes dictionaries with their class under ``__class__``.
    """
    if depth > _DEEPEST:
        return repr(type(value))
    if isinstance(value, dict):
        return {_plain_key(k, depth + 1): plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v, depth + 1) for v in value)
    if isinstance(value, Call):
        return _plain_call(value, depth + 1)
    if isinstance(value, GlobalType):
        return value.path
    if isinstance(value, (TensorNode, Storage)):
        return f"<{type(value).__name__}>"
    return value


def _plain_key(value: Any, depth: int) -> Any:
    found = plain(value, depth)
    try:
        hash(found)
    except TypeError:  # an object as a key: a parameter, for one
        return repr(value)
    return found


def _plain_call(value: Call, depth: int) -> Any:
    path, args = value.function.path, [plain(arg, depth) for arg in value.args]
    if path == "_codecs.encode" and len(args) == 2:
        return str(args[0]).encode("latin1")
    if path in ("torch.Size", "builtins.set") and len(args) == 1:
        return tuple(args[0]) if path == "torch.Size" else set(args[0])
    state = value.state[0] if value.state is not None else None
    if path in NAMESPACES and state is not None:
        return plain(state, depth)
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
        state = {**(state[0] or {}), **state[1]}
    if isinstance(state, dict):
        return {"__class__": path, **{str(k): plain(v, depth) for k, v in state.items()}}
    if value.pairs:
        return {_plain_key(k, depth): plain(v, depth) for k, v in value.pairs}
    if path in _PATHS:
        return "/".join(map(str, args)).replace("//", "/")
    if len(args) == 1 and isinstance(args[0], (str, int, float, list, tuple)):
        return args[0]
    return {"__class__": path, "args": args}
