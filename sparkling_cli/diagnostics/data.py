"""Tokens to measure on: the user's text or token file, a bundled text, or random ones, with a word on which.

The choice is deterministic: the same file, seed and sizes give the same sequences.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkling_cli.errors import CheckpointError, MissingDependencyError, SparklingError, SpecError

if TYPE_CHECKING:
    import numpy as np
    import torch

#: Most text that is read from a file; the sequences come from its beginning.
TEXT_LIMIT = 8 << 20
#: Sequences and tokens in each, when nothing else is asked for.
SEQUENCES, LENGTH = 8, 256

#: what can be measured on, in words
_KINDS = "text (.txt), JSON lines with a field text (.jsonl), or token ids (.npy, .bin)"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
    "tokenizer_config.json",
)
#: Headers of token files of llm.c and its kin: first int32 -> dtype of the tokens behind 1 KiB.
_HEADERS = {20240520: "uint16", 20240801: "uint32"}


@dataclass(frozen=True)
class Tokens:
    """Sequences of token ids.

    Attributes:
        ids: [sequences, length], int64.
        source: where they come from, in words.
        random: they are random and stand for no text.
    """

    ids: torch.Tensor
    source: str
    random: bool = False


@dataclass(frozen=True)
class Sample:
    """Which tokens a model is measured on.

    Attributes:
        data: ``.bin`` (uint16 or uint32), ``.npy``, ``.jsonl`` or text; None for the bundled text.
        sequences: how many, at most.
        length: tokens in each, at most; the model's own limit holds.
        seed: of random tokens, where there is no text.
    """

    data: Path | None = None
    sequences: int = SEQUENCES
    length: int = LENGTH
    seed: int = 0


#: what is measured on where nothing else is asked for
USUAL = Sample()


def load_tokens(on: Sample, tokenizer_directory: Path | None, vocab: int) -> Tokens:
    """Sequences of the user's data, else from the bundled text, else random ones.

    Args:
        on: which; the context of the model is the caller's business.
        tokenizer_directory: the checkpoint, if it may hold a tokenizer.
        vocab: ids must be below.

    Raises:
        SpecError: nothing is asked for; the file holds no usable tokens, or ids outside the vocabulary.
        CheckpointError: text was given and the checkpoint has no tokenizer.
        MissingDependencyError: text was given and transformers is not installed.
    """
    import torch

    data = on.data
    if on.sequences < 1 or on.length < 2:
        raise SpecError(
            f"{on.sequences} sequences of {on.length} tokens: nothing to measure on",
            hint="give at least one sequence of two tokens (--sequences 1 --length 2)",
        )
    if data is None:
        if tokenizer_directory is None or not _has_tokenizer(tokenizer_directory):
            return _random(vocab, on, "the checkpoint has no tokenizer")
        try:
            tokenizer = _tokenizer(tokenizer_directory)
        except SparklingError as error:
            return _random(vocab, on, error.message)
        text = resources.files(__package__).joinpath("sample.txt").read_text(encoding="utf-8")
        ids: Sequence[int] | np.ndarray[Any, Any] = tokenizer(text)
        source = "the bundled text (Moby Dick, chapters 130 and following)"
    else:
        check_file(data)
        if data.suffix in (".bin", ".npy"):
            ids, source = _token_file(data, vocab)
        else:
            ids, source = _text_file(data, tokenizer_directory)
    found = _cut(ids, on.sequences, on.length, source)
    _check_ids(found, vocab, source)
    return Tokens(torch.from_numpy(found), f"{source}, {found.shape[0]} x {found.shape[1]} tokens")


def check_file(data: Path) -> None:
    """That a file may hold text or tokens, by its name and its beginning; before anything long is begun.

    Raises:
        SpecError: there is none, or it is neither.
    """
    if not data.is_file():
        what = "is a folder" if data.is_dir() else "no such file"
        raise SpecError(f"--data {data}: {what}", hint=f"give {_KINDS}")
    if data.suffix not in (".bin", ".npy"):
        with data.open("rb") as file:
            _decoded(data, file.read(1 << 16), 1 << 16)


def _decoded(path: Path, raw: bytes, limit: int) -> str:
    """A file's beginning as text; what reached ``limit`` may end in the middle of a character."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(raw, final=len(raw) < limit)
    except UnicodeDecodeError as error:
        raise SpecError(
            f"--data {path}: neither UTF-8 text nor a known token file (byte {error.start})",
            hint=f"token files are recognized by their names; give {_KINDS}",
        ) from None


def _random(vocab: int, on: Sample, reason: str) -> Tokens:
    import torch

    generator = torch.Generator().manual_seed(on.seed)
    ids = torch.randint(0, vocab, (on.sequences, on.length), generator=generator)
    words = (
        f"RANDOM tokens ({on.sequences} x {on.length}, seed {on.seed}), because {reason}: magnitudes "
        "differ from those on text; pass --data with your own tokens"
    )
    return Tokens(ids, words, random=True)


def _cut(
    ids: Sequence[int] | np.ndarray[Any, Any], sequences: int, length: int, source: str
) -> np.ndarray[Any, Any]:
    """Sequences at even distances over all the tokens; fewer and shorter ones where there are few."""
    import numpy as np

    total = len(ids)
    if total < 2:
        raise SpecError(f"{source}: {total} token(s); at least 2 are needed")
    length = min(length, total)
    count = max(1, min(sequences, total // length))
    stride = total // count
    rows = [np.asarray(ids[i * stride : i * stride + length], dtype=np.int64) for i in range(count)]
    return np.stack(rows)


def _check_ids(ids: np.ndarray[Any, Any], vocab: int, source: str) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        raise SpecError(
            f"{source}: token ids go from {low} to {high}; the model's vocabulary has {vocab} entries",
            hint="the data was made with another tokenizer",
        )


def _token_file(path: Path, vocab: int) -> tuple[np.ndarray[Any, Any], str]:
    import numpy as np

    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise SpecError(f"--data {path}: not a readable .npy file: {error}") from None
        if array.dtype.kind not in "ui":
            raise SpecError(f"--data {path}: dtype {array.dtype}; token ids are integers")
        return array.reshape(-1), f"{path.name} ({array.dtype})"
    size = path.stat().st_size
    if size >= 1024 and size % 2 == 0:
        with path.open("rb") as file:
            magic = int.from_bytes(file.read(4), "little")
        if magic in _HEADERS:
            kind = np.dtype(_HEADERS[magic])
            count = (size - 1024) // kind.itemsize
            body = np.memmap(path, dtype=kind, mode="r", offset=1024, shape=(count,))
            return body, f"{path.name} ({kind}, behind a header)"
    if size < 2 or size % 2:
        raise SpecError(f"--data {path}: {size} bytes; a .bin file holds uint16 or uint32 token ids")
    return _bare(path, size, vocab)


def _bare(path: Path, size: int, vocab: int) -> tuple[np.ndarray[Any, Any], str]:
    """A file of nothing but ids: 16 bits or 32, by which of them are in the vocabulary.

    Pairs of 16-bit ids read as one 32-bit id lie far outside any vocabulary, unless every other id is
    next to zero, so 32 bits are taken only when all ids of the file's sample allow it.
    """
    import numpy as np

    narrow = np.memmap(path, dtype="<u2", mode="r")
    if size % 4 == 0:
        wide = np.memmap(path, dtype="<u4", mode="r")
        if int(wide[: 1 << 20].max()) < vocab:
            return wide, f"{path.name} (uint32)"
    return narrow, f"{path.name} (uint16)"


def _text_file(path: Path, directory: Path | None) -> tuple[list[int], str]:
    if directory is None or not _has_tokenizer(directory):
        raise CheckpointError(
            f"--data {path} is text, and the checkpoint has no tokenizer to read it with",
            hint="pass token ids instead: .npy, or .bin with uint16 or uint32",
        )
    with path.open("rb") as file:
        raw = file.read(TEXT_LIMIT)
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        return _json_lines(path, raw, directory), path.name
    return _tokenizer(directory)(_decoded(path, raw, TEXT_LIMIT)), path.name


def _json_lines(path: Path, raw: bytes, directory: Path) -> list[int]:
    """All documents one after the other, each ended by the end-of-text token if there is one."""
    tokenizer = _tokenizer(directory)
    ids: list[int] = []
    for number, line in _lines(raw):
        try:
            document = json.loads(line)
        except ValueError as error:
            raise SpecError(f"--data {path}: line {number} is not JSON: {error}") from None
        text = document if isinstance(document, str) else None
        if isinstance(document, dict):
            text = document.get("text", document.get("content"))
        if not isinstance(text, str):
            raise SpecError(f"--data {path}: line {number} has no text under 'text' or 'content'")
        ids += tokenizer(text)
        ids += tokenizer.end
    return ids


def _lines(raw: bytes) -> Iterator[tuple[int, bytes]]:
    lines = raw.split(b"\n")
    if len(raw) == TEXT_LIMIT:
        lines = lines[:-1]  # cut in the middle
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line


def _has_tokenizer(directory: Path) -> bool:
    return directory.is_dir() and any((directory / name).is_file() for name in _TOKENIZER_FILES)


class _tokenizer:  # noqa: N801  (used like a function)
    """Text to ids by the checkpoint's own tokenizer; never downloads, never runs remote code."""

    def __init__(self, directory: Path) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise MissingDependencyError(
                "text is tokenized by transformers, which is not installed",
                hint="pip install '.[hf]' in the clone, or pass token ids (.npy, .bin)",
            ) from None
        from transformers.utils import logging

        level = logging.get_verbosity()
        logging.set_verbosity(40)  # errors only: it warns about texts longer than the context
        try:
            self._inner: Any = AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever a damaged or foreign tokenizer raises
            raise CheckpointError(
                f"the tokenizer in {directory} cannot be loaded: {error}",
                hint="pass token ids instead: .npy, or .bin with uint16 or uint32",
            ) from error
        finally:
            logging.set_verbosity(level)
        end = self._inner.eos_token_id
        self.end: list[int] = [] if end is None else [end]

    def __call__(self, text: str) -> list[int]:
        try:
            found: list[int] = self._inner(text, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # whatever a tokenizer's files hold
            raise CheckpointError(
                f"the checkpoint's tokenizer fails on text: {type(error).__name__}: {error}",
                hint="pass token ids instead: .npy, or .bin with uint16 or uint32",
            ) from error
        return found
