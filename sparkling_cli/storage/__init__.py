"""Bytes on disk: tensors as boxes of bytes, ranges read and written, open files, checksums.

Below every checkpoint format and the engine, so that both move bytes by the same code: ``tensors`` what
is stored where, ``byte_ranges`` reads and writes them, ``read`` whole tensors for torch, ``crc`` checksums,
``threads`` numbered tasks, ``sidecar`` the names of an output's own files, ``cache`` small results
that are kept between runs.
"""
