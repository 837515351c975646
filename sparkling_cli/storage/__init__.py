"""Bytes on disk: tensors as boxes of bytes, ranges read and written, open files, checksums.

Below every checkpoint format and the engine, so that both move bytes by the same code: ``tensors`` what
is stored where, ``places`` ranges read and written, ``read`` whole tensors for torch, ``crc`` checksums,
``pool`` tasks on threads, ``sidecar`` the names of an output's own files.
"""
