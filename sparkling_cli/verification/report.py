"""What a verification looked at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VerifyReport:
    """A verification that found nothing wrong.

    Attributes:
        files: files of the output, every byte of which was read.
        nbytes: their size.
        tensors: tensors whose bytes have the manifest's CRC-32.
        derived: tensors that were worked out from the source and are equal bit by bit.
        moments: optimizer tensors among those, whose new entries are exactly zero and whose old entries
            are the source's (under the treatment ``asymmetric``).
        source: the source's name; empty if only the output was looked at.
        extras: files in the output that were not written with it and that nothing loads as weights.
    """

    files: int
    nbytes: int
    tensors: int
    derived: int
    moments: int
    source: str
    extras: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for people."""
        text = f"ok: {self.files} files ({self.nbytes:,} bytes) and {self.tensors} tensors are as written"
        if not self.source:
            return f"{text}; not compared with a source"
        text += f"; {self.derived} follow bit by bit from {self.source}"
        return text + (f", {self.moments} optimizer tensors reset where new" if self.moments else "")
