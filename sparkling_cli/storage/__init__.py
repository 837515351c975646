"""Bytes on disk: tensors as boxes of bytes, ranges read and written, open files, checksums.

Below every checkpoint format and the engine, so that both move bytes by the same code.
"""
