"""Text that does not repeat: Python's own sources and documents, and those of the installed packages.

``python -m benchmarks.train.corpus FOLDER [--roots PATH ...]`` collects it on any machine. Files are taken in
the order of their SHA-256, which mixes them; paragraphs that came before are left out (licences, copied
functions), so no passage is seen twice; one file in 32 is held out. What a run used is recorded by name, size
and SHA-256: two machines with other packages have other texts, and their losses are not comparable.
"""

from __future__ import annotations

import argparse
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

SUFFIXES = frozenset({".py", ".pyi", ".rst", ".md", ".txt"})
LARGEST = 1 << 19  # bytes of one file: larger ones are tables, not text
TRAIN = 48 << 20
HELDOUT = 1 << 19
SHORT = 48  # bytes: shorter paragraphs (``else:``, ``@property``) may repeat


def default_roots() -> list[Path]:
    """The standard library and the installed packages of the Python that runs this."""
    paths = sysconfig.get_paths()
    return [Path(paths["stdlib"]), Path(paths["purelib"])]


def files(roots: Iterable[Path]) -> Iterator[Path]:
    """All files of text below ``roots``."""
    for root in roots:
        for path in root.rglob("*"):
            if path.suffix in SUFFIXES and path.is_file() and path.stat().st_size <= LARGEST:
                yield path


def collect(
    roots: Iterable[Path], train_bytes: int = TRAIN, heldout_bytes: int = HELDOUT
) -> tuple[bytes, bytes]:
    """The training text and the held-out text, of at most so many bytes.

    Depends on the files' contents alone, not on their names or places.

    Raises:
        ValueError: the files held out are too few.
    """
    by_hash: dict[bytes, Path] = {}
    for path in files(roots):
        by_hash.setdefault(hashlib.sha256(path.read_bytes()).digest(), path)
    digests = sorted(by_hash)
    seen: set[bytes] = set()
    held = _join((by_hash[d] for d in digests if d[-1] % 32 == 0), seen, None)
    if len(held) < heldout_bytes:
        raise ValueError(f"{len(held)} bytes of text to hold out, {heldout_bytes} wanted: give more --roots")
    train = _join((by_hash[d] for d in digests if d[-1] % 32), seen, train_bytes)
    return train, _spread(held, heldout_bytes)


def _join(paths: Iterable[Path], seen: set[bytes], most: int | None) -> bytes:
    parts: list[bytes] = []
    size = 0
    for path in paths:
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        for paragraph in text.encode().split(b"\n\n"):
            if len(paragraph) >= SHORT:
                digest = hashlib.sha256(paragraph.strip()).digest()[:12]
                if digest in seen:
                    continue
                seen.add(digest)
            parts.append(paragraph + b"\n\n")
            size += len(parts[-1])
            if most is not None and size >= most:
                return b"".join(parts)[:most]
    return b"".join(parts)


def _spread(data: bytes, size: int, piece: int = 512) -> bytes:
    """Pieces from all over ``data``, so that few files do not decide."""
    count = size // piece
    stride = len(data) // count
    return b"".join(data[i * stride : i * stride + piece] for i in range(count))


def write(folder: Path, roots: Iterable[Path], train_bytes: int = TRAIN) -> None:
    """Collect into ``folder``: ``train.bin`` and ``heldout.bin``, the latter last."""
    train, held = collect(roots, train_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.bin").write_bytes(train)
    (folder / "heldout.bin").write_bytes(held)


def main() -> None:
    """Collect and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--roots", type=Path, nargs="+", default=default_roots())
    options = parser.parse_args()
    write(options.folder, options.roots)
    for name in ("train.bin", "heldout.bin"):
        data = (options.folder / name).read_bytes()
        print(f"{name}: {len(data)} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
