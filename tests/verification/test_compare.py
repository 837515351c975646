"""Small tensors read together are judged as they are alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from sparkling_cli import api
from sparkling_cli.errors import VerificationError
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.verification import compare, verify

SPECS: dict[str, dict[str, Any]] = {
    "copied": {"axes": [{"axis": "ffn", "factor": 2}]},
    "random": {"axes": [{"axis": "hidden", "factor": 1.5}], "init": "random-copy"},
    "zero": {"axes": [{"axis": "kv_heads", "factor": 2}], "init": "zero-copy"},
    "silent": {"axes": [{"axis": "ffn", "factor": 1.5}], "init": "random-zero", "scaling": "function"},
    "exact": {
        "axes": [{"axis": "ffn", "to": 230}],
        "scaling": "function",
        "optimizer": "copy",
        "allow_locked": True,
    },
}


def said(source: Path, output: Path) -> str:
    """What ``verify`` finds."""
    try:
        verify(source, output)
    except VerificationError as error:
        return error.message
    return ""


@pytest.mark.parametrize("name", SPECS)
def test_together_and_alone(
    dense_checkpoint: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same faults in the same words, wherever a bit is flipped."""
    output = tmp_path / "out"
    api.expand(dense_checkpoint, output, report="none", **SPECS[name])
    tensors = open_checkpoint(output).tensors
    groups = compare.bundles
    sizes: list[int] = []

    def noted(subjects: Any) -> list[tuple[compare.Subject, ...]]:
        found = groups(subjects)
        sizes.extend(len(one) for one in found)
        return found

    monkeypatch.setattr("sparkling_cli.verification.prove.bundles", noted)
    assert said(dense_checkpoint, output) == ""
    assert max(sizes) > 5
    rng = random.Random(name)
    for key in rng.sample(sorted(tensors), 12):
        extent, size = tensors[key].extents[0], tensors[key].nbytes
        path = output / extent.path
        content = path.read_bytes()
        changed = bytearray(content)
        changed[extent.offset + rng.randrange(size)] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        together = said(dense_checkpoint, output)
        with monkeypatch.context() as patch:
            patch.setattr(compare, "_BOXES", 0)
            alone = said(dense_checkpoint, output)
        path.write_bytes(content)
        assert key in together
        assert "CRC-32" in together
        assert together == alone
