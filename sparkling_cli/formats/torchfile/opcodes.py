"""A look at a pickle's opcodes before anything decodes it.

Python's decoder sets aside room for a memo index before it knows that the index is honest, so a file of
twenty bytes can ask for gigabytes; and it knows opcodes that no torch file has. Both are refused here.
"""

from __future__ import annotations

import io
import pickle
import re

from sparkling_cli.errors import CheckpointError, UnsafePickleError

#: Opcodes of fixed length, but for "put at memo index" with four bytes, which depends on the file's size.
_FIXED = (
    rb"[()\]}NRbaesutQ0\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94]"
    rb"|[Kqh\x80].|M..|[Jj]....|[G\x95].{8}|c[^\n]*\n[^\n]*\n"
)
#: Opcode -> bytes of its length prefix.
_PREFIXED = {
    ord("X"): 4, ord("T"): 4, ord("B"): 4, 0x8B: 4, ord("U"): 1, ord("C"): 1, 0x8A: 1, 0x8C: 1,
    0x8D: 8, 0x8E: 8,
}  # fmt: skip


class CheckedUnpickler(pickle.Unpickler):
    """Python's decoder, for a pickle whose opcodes were looked at. There is no other in this package.

    Args:
        stream: the pickle begins where it stands; others may follow it.
        where: the file, for messages.

    Raises:
        UnsafePickleError: see :func:`check_opcodes`.
        CheckpointError: see :func:`check_opcodes`.
    """

    def __init__(self, stream: io.BytesIO, where: str) -> None:
        with stream.getbuffer() as whole, whole[stream.tell() :] as view:
            check_opcodes(view, where)
        super().__init__(stream)


def check_opcodes(data: bytes | memoryview, where: str) -> None:
    """Every opcode is one that data needs, and no memo index is larger than the pickle.

    Raises:
        UnsafePickleError: an opcode that plain data does not need, or an absurd memo index.
        CheckpointError: the pickle ends in the middle of an opcode.
    """
    run = re.compile(b"(?:" + _FIXED + b"|" + _put(len(data)) + b"){0,512}", re.DOTALL)
    at, end = 0, len(data)
    while at < end:
        found = run.match(data, at)
        stop = found.end() if found else at
        if stop == end:
            break
        prefix = _PREFIXED.get(data[stop])
        if prefix is not None:
            at = stop + 1 + prefix + int.from_bytes(data[stop + 1 : stop + 1 + prefix], "little")
        elif data[stop] == ord("."):
            return
        elif stop == at:
            opcode = bytes(data[stop : stop + 1])
            raise UnsafePickleError(
                f"{where}: its pickle has the opcode {opcode!r} at byte {stop}, which tensors and plain data "
                "do not need (or its memo index is absurd); nothing of it was executed"
            )
        else:
            at = stop
    raise CheckpointError(f"{where}: its pickle is truncated", hint="copy or download the file again")


def _put(size: int) -> bytes:
    """Pattern of ``LONG_BINPUT`` with an index that ``size`` bytes of pickle can have filled."""
    if size < 1 << 16:
        return rb"r..\x00\x00"
    if size < 1 << 24:
        return rb"r..[\x00-" + re.escape(bytes([size >> 16])) + rb"]\x00"
    return rb"r...[\x00-" + re.escape(bytes([min(size >> 24, 255)])) + rb"]"
