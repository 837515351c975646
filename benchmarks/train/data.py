"""Real text as bytes: a novel, any text file, or a folder collected by ``benchmarks.train.corpus``.

A batch depends on (seed, step) alone, so that runs which part at the middle see the same data after it.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

#: the bundled part of the novel, used when no other text is given
BUNDLED = Path(__file__).resolve().parents[2] / "fixtures" / "text"


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes held out, both as uint8 tensors.

    Attributes:
        name: what it is, for records.
        train: bytes to train on.
        heldout: bytes to measure on.
        once: every passage is used once, in an order given by the seed; otherwise passages are drawn at
            random and may overlap.
    """

    name: str
    train: torch.Tensor
    heldout: torch.Tensor
    once: bool = False
    _orders: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    def facts(self) -> dict[str, object]:
        """Name, size and SHA-256 of both parts, for records."""
        digest = hashlib.sha256(self.train.numpy().tobytes() + self.heldout.numpy().tobytes()).hexdigest()
        return {"name": self.name, "bytes": len(self.train), "sha256": digest}

    def order(self, seed: int, length: int) -> torch.Tensor:
        """The passages of ``length`` bytes in the order of this seed."""
        if (seed, length) not in self._orders:
            generator = torch.Generator().manual_seed(seed)
            self._orders[seed, length] = torch.randperm(len(self.train) // length, generator=generator)
        return self._orders[seed, length]


def load_text(source: Path | None, heldout: int = 98_304) -> Text:
    """The text of a run.

    Args:
        source: the npm package's ``.tgz`` of *Moby-Dick*, a text file, a folder written by
            ``benchmarks.train.corpus``, or None for the text bundled with the fixtures.
        heldout: bytes at the end that are held out (the bundled text and a folder have a file for it).
    """
    if source is None:
        train, held = ((BUNDLED / name).read_bytes() for name in ("train.txt", "heldout.txt"))
        return Text("bundled", _bytes(train), _bytes(held))
    if source.is_dir():
        train, held = ((source / name).read_bytes() for name in ("train.bin", "heldout.bin"))
        return Text("Python sources", _bytes(train), _bytes(held), once=True)
    data = _novel(source) if source.suffix == ".tgz" else source.read_bytes()
    return Text(source.name, _bytes(data[:-heldout]), _bytes(data[-heldout:]))


def _novel(archive: Path) -> bytes:
    chapters: dict[int, str] = {}
    with tarfile.open(archive) as package:
        for member in package.getmembers():
            match = re.search(r"data/chapter_(\d+)\.json$", member.name)
            if match is None:
                continue
            file = package.extractfile(member)
            assert file is not None
            chapter = json.load(file)
            chapters[int(match.group(1))] = f"{chapter['title']}\n\n{chapter['text'].strip()}\n\n"
    return "".join(chapters[i] for i in sorted(chapters)).encode()


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def batch(text: Text, seed: int, step: int, rows: int, length: int) -> torch.Tensor:
    """Token ids of one step, shape (rows, length), from the training part.

    Raises:
        ValueError: the text is to be used once and is used up.
    """
    if text.once:
        order = text.order(seed, length)
        if (step + 1) * rows > len(order):
            raise ValueError(f"{text.name}: {len(text.train)} bytes are used up at step {step}")
        starts = order[step * rows : (step + 1) * rows, None] * length
    else:
        generator = torch.Generator().manual_seed((seed << 32) + step)
        starts = torch.randint(len(text.train) - length, (rows, 1), generator=generator)
    return text.train[starts + torch.arange(length)].long()


def heldout_blocks(text: Text, length: int) -> torch.Tensor:
    """The held-out part in blocks, shape (blocks, length)."""
    count = len(text.heldout) // length
    return text.heldout[: count * length].view(count, length).long()
