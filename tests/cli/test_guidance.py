"""What the command line says where a user could go wrong, and that it says it once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.test_expand_command import Command

FFN = ("--axis", "ffn", "--factor", 2)


@pytest.fixture
def sparkling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line."""
    monkeypatch.setenv("COLUMNS", "120")
    return Command(monkeypatch, capsys)


@pytest.fixture
def wide(sparkling: Command, dense_checkpoint: Path, tmp_path: Path) -> Path:
    """The bundled checkpoint with a wider ffn."""
    done = sparkling("expand", dense_checkpoint, tmp_path / "wide", *FFN, "--report", "none")
    assert done.code == 0, done.err
    return tmp_path / "wide"


def _without_state(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    (target / "optimizer.pt").unlink()
    return target


def test_missing_optimizer_state_is_a_warning(
    sparkling: Command, dense_checkpoint: Path, tmp_path: Path
) -> None:
    """Copies would stay copies: said on stderr also with --quiet, and it is the verdict; it is no error."""
    source = _without_state(dense_checkpoint, tmp_path / "checkpoint-600")
    quiet = sparkling("expand", source, tmp_path / "one", *FFN, "--report", "none", "--quiet")
    assert (quiet.code, quiet.out) == (0, "")
    for part in ("warning:", "copy optimizer.pt", "--init zero-copy", "random-copy"):
        assert part in " ".join(quiet.err.split())
    full = sparkling("expand", source, tmp_path / "two", *FFN, "--report", "none")
    assert full.code == 0
    assert "needs your attention" in full.out and "LOOK" in full.out and "Ready to train on" not in full.out
    silent = sparkling(
        "expand", source, tmp_path / "three", *FFN, "--report", "none", "--quiet", "--init", "zero-copy"
    )
    assert (silent.code, silent.out, silent.err) == (0, "", "")


@pytest.mark.parametrize("treatment", ["copy", "drop"])
def test_a_symmetric_treatment_is_one_finding(
    sparkling: Command, dense_checkpoint: Path, tmp_path: Path, treatment: str
) -> None:
    """One line of the verdict and one warning, in the same words."""
    done = sparkling(
        "expand", dense_checkpoint, tmp_path / "w", *FFN, "--report", "none", "--optimizer", treatment
    )
    assert done.code == 0
    assert done.out.count("LOOK") == 1
    assert done.err.count("warning:") == 1


def test_verify_says_ok_on_stdout(sparkling: Command, dense_checkpoint: Path, wide: Path) -> None:
    """It is the fact that was asked for."""
    done = sparkling("verify", dense_checkpoint, wide)
    assert done.code == 0
    assert done.out.startswith("ok: ") and done.err == ""


def test_another_source_puts_no_blame_on_the_output(
    sparkling: Command, dense_checkpoint: Path, moe_checkpoint: Path, wide: Path, tmp_path: Path
) -> None:
    """A later step of the same run, another model, the output itself: both names."""
    later = tmp_path / "checkpoint-900"
    shutil.copytree(dense_checkpoint, later)
    with (later / "model.safetensors").open("r+b") as file:
        file.seek(-64, 2)
        file.write(bytes(range(64)))
    other = tmp_path / "other-model"
    shutil.copytree(moe_checkpoint, other)
    for source in (later, other, wide):
        done = sparkling("verify", source, wide)
        message = " ".join(done.err.split())
        assert done.code == 8
        assert f"this output was made from {dense_checkpoint.name}, you gave {source.name}" in message
        assert "remove it" not in message


def test_a_changed_output_still_has_to_go(sparkling: Command, dense_checkpoint: Path, wide: Path) -> None:
    """With the right source, and where both are wrong, the output is to blame."""
    with (wide / "model.safetensors").open("r+b") as file:
        file.seek(-64, 2)
        file.write(bytes(range(64)))
    done = sparkling("verify", dense_checkpoint, wide)
    assert done.code == 8 and "remove it and expand again" in done.err


def test_harmless_files_beside_an_output_are_notes(
    sparkling: Command, dense_checkpoint: Path, wide: Path
) -> None:
    """Remarks and a later run's folder; what could be loaded, or replaces code, is an error."""
    (wide / "notes.txt").write_text("mine")
    (wide / "checkpoint-700").mkdir()
    (wide / "checkpoint-700" / "model.safetensors").write_bytes(b"")
    done = sparkling("verify", dense_checkpoint, wide)
    assert done.code == 0, done.err
    assert "notes.txt" in done.err and "checkpoint-700/model.safetensors" in done.err
    facts = json.loads(sparkling("verify", dense_checkpoint, wide, "--json").out)
    assert facts["extras"] == ["checkpoint-700/model.safetensors", "notes.txt"]
    for name in ("adapter.safetensors", "more.bin", "more.pt", "modeling.py", "sparkling/notes.txt"):
        (wide / name).write_bytes(b"")
        done = sparkling("verify", dense_checkpoint, wide)
        assert done.code == 8 and name in done.err and "move it out" in done.err
        assert "remove it" not in done.err
        (wide / name).unlink()
