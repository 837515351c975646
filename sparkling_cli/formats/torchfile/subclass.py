"""Tensor subclasses that hold quantized numbers, as a pickle has them.

Such a subclass is written as a call with four arguments: how an empty one is made, its class, the arguments
of that (class, dtype, size, strides, ...), and its attributes: plain tensors of codes and scales, settings.
Nothing of it is run; the tensors inside are widened where they lie, and the call gets its new size.
"""

from __future__ import annotations

from typing import Any

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.torchfile.objects import Call, GlobalType, recorded
from sparkling_cli.storage.tensors import are_sizes, row_major

REBUILD = "torch._tensor._rebuild_from_type_v2"
WRAPPER = "torch._utils._rebuild_wrapper_subclass"
#: torchao's quantized optimizer state, in all places that it has had; codes are two to a byte in the first
_HOMES = ("torchao.optim", "torchao.prototype.low_bit_optim")
PACKED = frozenset(f"{home}.subclass_4bit.OptimState4bit" for home in _HOMES)
QUANTIZED = PACKED | {
    f"{home}.subclass_{kind}.OptimState{name}"
    for home in _HOMES
    for kind, name in (("8bit", "8bit"), ("fp8", "Fp8"))
}
#: from such a call to its attributes
INSIDE = ("__0__", 3)


class SubclassCall(GlobalType):
    """The stand-in for the function that makes tensors of other types; only known ones are recorded."""

    def __call__(cls, *args: Any) -> Any:  # noqa: N805  # of a metaclass
        """Record the call.

        Raises:
            CheckpointError: it makes something else than quantized state of a known class.
        """
        paths = [arg.path if isinstance(arg, GlobalType) else "" for arg in args[:2]]
        if paths[:1] != [WRAPPER] or paths[1:] not in [[path] for path in QUANTIZED]:
            what = paths[1] if len(paths) > 1 else "nothing"
            raise CheckpointError(
                f"it holds a tensor subclass or a tensor with Python attributes ({what or '?'})",
                hint="save the file again with plain tensors",
            )
        made = args[2] if len(args) == 4 else None
        sized = isinstance(made, tuple) and len(made) > 3 and are_sizes(made[2]) and are_sizes(made[3])
        if not sized or type(args[3]) is not dict:
            raise CheckpointError(f"a {paths[1]} has other arguments than its size and its attributes")
        return recorded(cls, args)


def is_subclass(value: Any) -> bool:
    """Whether a value of a tree is a tensor of such a class."""
    return isinstance(value, Call) and isinstance(value.function, SubclassCall)


def is_packed(call: Call) -> bool:
    """Whether two of its numbers share a byte."""
    return call.args[1].path in PACKED


def resized(args: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[Any, ...]:
    """The arguments of a call for a tensor of another shape; tensors inside are the same objects.

    Args:
        args: of the call.
        shape: the new one.
    """
    kind, cls, made, inside = args
    own = dict(inside)
    if "_shape" in own:  # a torch.Size, or a tuple
        old = own["_shape"]
        own["_shape"] = recorded(old.function, (shape,)) if isinstance(old, Call) else shape
    return kind, cls, (*made[:2], shape, row_major(shape), *made[4:]), own
