"""What can be run, and where its result is kept: one line of JSON per finished run."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

#: runs that start from a fresh model: the small one, the wide one, and the wide one for the compute of an
#: expanded run
SCRATCH = ("small", "wide", "wide-compute")


@dataclass(frozen=True, order=True)
class Widening:
    """What grows, how far and when.

    Written ``ffn``, ``ffn+hidden``, ``ffn*1.5``, ``ffn@0.25``; in two stages ``ffn,ffn@0.75``.

    Attributes:
        axes: logical axes.
        factor: new size / old size of each.
        share: of the run's steps that are done at the expansion.
        before: the stage before this one, of two.
    """

    axes: tuple[str, ...]
    factor: float = 2.0
    share: float = 0.5
    before: Widening | None = None

    @classmethod
    def parse(cls, text: str) -> Widening:
        """From the notation above."""
        before, _, text = text.rpartition(",")
        text, _, share = text.partition("@")
        axes, _, factor = text.partition("*")
        earlier = cls.parse(before) if before else None
        return cls(tuple(axes.split("+")), float(factor or 2), float(share or 0.5), earlier)

    def __str__(self) -> str:
        factor = f"*{self.factor:g}" if self.factor != 2 else ""
        share = f"@{self.share:g}" if self.share != 0.5 else ""
        before = f"{self.before}," if self.before else ""
        return before + "+".join(self.axes) + factor + share

    def factors(self) -> dict[str, float]:
        """Axis -> how much it has grown after this stage."""
        grown = self.before.factors() if self.before else {}
        return {**grown, **{axis: grown.get(axis, 1.0) * self.factor for axis in self.axes}}


@dataclass(frozen=True, order=True)
class Job:
    """One run: a model from scratch (``SCRATCH``) or a treatment. ``axes`` is a widening, or empty.

    The small model serves every widening, the wide one every time of expansion. A second stage goes on from
    the same treatment's first.
    """

    kind: str
    optimizer: str
    axes: str
    seed: int
    name: str

    @classmethod
    def of(cls, kind: str, optimizer: str, widening: Widening, seed: int, name: str) -> Job:
        """The job that serves this widening."""
        axes = str(widening)
        if name in ("small", "wide"):
            axes = "" if name == "small" else str(replace(widening, share=0.5))
        return cls(kind, optimizer, axes, seed, name)

    @property
    def base(self) -> Job:
        """The run whose checkpoint this treatment expands."""
        before = Widening.parse(self.axes).before
        name = "small" if before is None else self.name
        return replace(self, axes="" if before is None else str(before), name=name)

    def folder(self, work: Path) -> Path:
        """Where it keeps what it needs while it runs."""
        return work / f"{self.kind}-{self.optimizer}" / f"seed{self.seed}" / (self.axes or "base")


@dataclass(frozen=True)
class Store:
    """Results of one setting, in one small file that later runs add to; lines are sorted by job."""

    path: Path

    def read(self) -> dict[Job, dict[str, Any]]:
        """Everything in it."""
        if not self.path.exists():
            return {}
        records = [json.loads(line) for line in self.path.read_text().splitlines()]
        return {Job(**record.pop("job")): record for record in records}

    def add(self, job: Job, record: Mapping[str, Any]) -> None:
        """Add a result, or put it in place of the same job's; the file is never half written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.with_suffix(".lock"), wait=True):
            known = {**self.read(), job: dict(record)}
            part = self.path.with_suffix(".part")
            part.write_text("".join(_line(j, known[j]) for j in sorted(known)))
            part.rename(self.path)


def _line(job: Job, record: Mapping[str, Any]) -> str:
    return json.dumps({"job": vars(job), **record}, separators=(",", ":")) + "\n"


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file; whether it was free. It is gone with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def sources_digest(files: Iterable[Path]) -> str:
    """SHA-256 of the package's sources that made a result, shortened."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
