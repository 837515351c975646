"""The small files that an output has of its own: their names, and where they lie."""

from __future__ import annotations

from pathlib import Path

#: folder of an output's own files, made anew by every expansion and never carried over
FOLDER = "sparkling"
MANIFEST = "sparkling/manifest.json"
#: digests of the small files, the manifest's among them
DIGESTS = "sparkling/files.crc32"
REWARMUP = "sparkling/rewarmup.json"
CURVE = "sparkling/rewarmup.csv"
REPORT_JSON = "sparkling/report.json"
REPORT_HTML = "sparkling/report.html"


def sidecar_root(output: Path, is_file: bool | None = None) -> Path:
    """The folder that ``sparkling/...`` files lie in: a directory itself, ``NAME.sparkling`` of a file.

    Args:
        output: a checkpoint.
        is_file: whether it is a single file; by default as it lies on the disk.
    """
    single = output.is_file() if is_file is None else is_file
    return output.with_name(output.name + ".sparkling") if single else output
