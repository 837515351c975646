"""Tokens to measure on: every kind of file, the bundled text, and random ones that say so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sparkling_cli.diagnostics.data import Sample, load_tokens
from sparkling_cli.errors import CheckpointError, SpecError

VOCAB = 512


def tokenized(directory: Path, text: str) -> list[int]:
    """What transformers' own tokenizer makes of a text."""
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(directory)(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_bin_files_of_both_widths(tmp_path: Path, dtype: str) -> None:
    """A .bin of 16- or 32-bit ids is told apart by its content and cut into even windows."""
    ids = np.random.default_rng(0).integers(0, VOCAB, 1000)
    ids.astype(dtype).tofile(tmp_path / "tokens.bin")
    found = load_tokens(Sample(tmp_path / "tokens.bin", sequences=3, length=50), None, VOCAB)
    rows = [ids[i * (1000 // 3) : i * (1000 // 3) + 50] for i in range(3)]
    assert torch.equal(found.ids, torch.from_numpy(np.stack(rows)))
    assert ("uint16" if dtype == "<u2" else "uint32") in found.source
    assert not found.random


def test_bin_file_with_a_header(tmp_path: Path) -> None:
    """The header of llm.c's token files is skipped."""
    ids = np.arange(100, dtype="<u2")
    header = np.zeros(256, dtype="<i4")
    header[:3] = [20240520, 1, 100]
    (tmp_path / "t.bin").write_bytes(header.tobytes() + ids.tobytes())
    found = load_tokens(Sample(tmp_path / "t.bin", sequences=1, length=100), None, VOCAB)
    assert found.ids[0].tolist() == list(range(100))


def test_npy_file(tmp_path: Path) -> None:
    """An array of any integer type and shape is read as one row of ids."""
    np.save(tmp_path / "t.npy", np.arange(60, dtype=np.int32).reshape(6, 10))
    found = load_tokens(Sample(tmp_path / "t.npy", sequences=2, length=30), None, VOCAB)
    assert found.ids.reshape(-1).tolist() == list(range(60))


def test_text_goes_through_the_checkpoints_tokenizer(
    tmp_path: Path, dense_checkpoint: Path, heldout_text: Path
) -> None:
    """The first window of a text is the beginning of what transformers' tokenizer gives."""
    found = load_tokens(Sample(heldout_text, sequences=4, length=64), dense_checkpoint, VOCAB)
    ids = tokenized(dense_checkpoint, heldout_text.read_text(encoding="utf-8"))
    assert found.ids.shape == (4, 64)
    assert found.ids[0].tolist() == ids[:64]
    assert found.ids[3].tolist() == ids[3 * (len(ids) // 4) :][:64]


def test_json_lines(tmp_path: Path, dense_checkpoint: Path) -> None:
    """Documents follow one another, each ended by the end-of-text token."""
    from transformers import AutoTokenizer

    lines = [{"text": "Call me Ishmael."}, {"content": "Some years ago."}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = load_tokens(Sample(tmp_path / "a.jsonl", sequences=1, length=1000), dense_checkpoint, VOCAB)
    end = AutoTokenizer.from_pretrained(dense_checkpoint).eos_token_id
    ending = [] if end is None else [end]
    expected = tokenized(dense_checkpoint, "Call me Ishmael.") + ending
    expected += tokenized(dense_checkpoint, "Some years ago.") + ending
    assert found.ids[0].tolist() == expected


def test_bundled_text_is_the_default(dense_checkpoint: Path) -> None:
    """Without data a checkpoint with a tokenizer is measured on the text in the package."""
    found = load_tokens(Sample(None), dense_checkpoint, VOCAB)
    assert not found.random
    assert found.ids.shape == (8, 256)
    assert "bundled" in found.source


def test_random_tokens_say_so(tmp_path: Path) -> None:
    """Without data and tokenizer the tokens are random, the same for one seed, and named so."""
    one = load_tokens(Sample(None, sequences=2, length=9, seed=3), tmp_path, 100)
    same = load_tokens(Sample(None, sequences=2, length=9, seed=3), tmp_path, 100)
    other = load_tokens(Sample(None, sequences=2, length=9, seed=4), tmp_path, 100)
    assert one.random and "RANDOM" in one.source and "no tokenizer" in one.source
    assert torch.equal(one.ids, same.ids)
    assert not torch.equal(one.ids, other.ids)
    assert int(one.ids.min()) >= 0 and int(one.ids.max()) < 100


def test_few_tokens_make_few_sequences(tmp_path: Path) -> None:
    """A short file gives what it has."""
    np.save(tmp_path / "t.npy", np.arange(25))
    assert load_tokens(Sample(tmp_path / "t.npy", sequences=8, length=10), None, 99).ids.shape == (2, 10)
    assert load_tokens(Sample(tmp_path / "t.npy", sequences=8, length=90), None, 99).ids.shape == (1, 25)


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    """Data of another tokenizer is refused with the range that was found."""
    np.save(tmp_path / "t.npy", np.array([1, 2, 600]))
    with pytest.raises(SpecError, match=r"1 to 600.*512"):
        load_tokens(Sample(tmp_path / "t.npy"), None, VOCAB)
    np.array([1, 600, 2], dtype="<u2").tofile(tmp_path / "t.bin")
    with pytest.raises(SpecError, match="512"):
        load_tokens(Sample(tmp_path / "t.bin"), None, VOCAB)


def test_unusable_files(tmp_path: Path, dense_checkpoint: Path) -> None:
    """Each kind of bad data has its own message and no traceback of another library."""
    cases = {
        "missing.txt": (None, "no such file"),
        "empty.bin": (b"", "0 bytes"),
        "odd.bin": (b"abc", "3 bytes"),
        "bad.npy": (b"not numpy", "not a readable .npy"),
        "binary.txt": (b"\xff\xfe\x00", "neither UTF-8"),
        "short.txt": (b"", "at least 2"),
        "bad.jsonl": (b'{"text": "a"}\n{', "line 2 is not JSON"),
        "other.jsonl": (b'{"words": "a"}', "line 1 has no text"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(SpecError, match=message):
            load_tokens(Sample(tmp_path / name), dense_checkpoint, VOCAB)
    np.save(tmp_path / "floats.npy", np.zeros(9))
    with pytest.raises(SpecError, match="integers"):
        load_tokens(Sample(tmp_path / "floats.npy"), None, VOCAB)


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    """Text cannot be used when the checkpoint has no tokenizer; the message says what can."""
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokens(Sample(tmp_path / "a.txt"), tmp_path, VOCAB)
