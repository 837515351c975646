"""What the command line says where a user could go wrong, and that it says it once."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
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


def test_copies_without_optimizer_state_are_refused(
    sparkling: Command, dense_checkpoint: Path, tmp_path: Path
) -> None:
    """Copies would stay copies: an error with the ways out, each of which works; a warning where allowed."""
    source = _without_state(dense_checkpoint, tmp_path / "checkpoint-600")
    refused = sparkling("expand", source, tmp_path / "one", *FFN, "--report", "none", "--quiet")
    assert (refused.code, refused.out) == (3, "")
    for part in ("error:", "copy optimizer.pt", "--init zero-copy", "--init random-copy", "--allow-locked"):
        assert part in " ".join(refused.err.split())
    assert not (tmp_path / "one").exists()
    full = sparkling("expand", source, tmp_path / "two", *FFN, "--report", "none", "--allow-locked")
    assert full.code == 0
    assert "warning:" in full.err
    assert "Locked:" in full.out and "LOOK" in full.out and "Ready to train on" not in full.out
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
        "expand",
        dense_checkpoint,
        tmp_path / "w",
        *FFN,
        "--report",
        "none",
        "--optimizer",
        treatment,
        "--allow-locked",
    )
    assert done.code == 0
    assert done.out.count("LOOK") == 1
    assert done.err.count("warning:") == 1


def test_verify_says_ok_on_stdout(sparkling: Command, dense_checkpoint: Path, wide: Path) -> None:
    """It is the fact that was asked for."""
    done = sparkling("verify", dense_checkpoint, wide)
    assert done.code == 0
    assert done.out.startswith("ok: ")
    assert re.fullmatch(r"\d\d:\d\d:\d\d verifying [\d.]+ MiB\n", done.err)  # the log of a batch job


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
    assert done.code == 8 and "do not train on it: expand again, under another name" in done.err


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_data_that_cannot_be_read_is_refused_before_anything_is_written(
    sparkling: Command, dense_checkpoint: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """Text without a tokenizer, ids of another one; what is not measured on needs none."""
    source = tmp_path / "checkpoint-600"
    shutil.copytree(dense_checkpoint, source, ignore=shutil.ignore_patterns("*token*", "vocab.json"))
    text, ids = tmp_path / "text.txt", tmp_path / "ids.npy"
    text.write_text("Call me Ishmael. " * 99)
    np.save(ids, np.arange(100_000))
    for data, code, said in ((text, 4, "no tokenizer to read it with"), (ids, 3, "another tokenizer")):
        done = sparkling("expand", source, tmp_path / "out", *FFN, "--data", data, *more)
        assert done.code == code and said in " ".join(done.err.split())
        assert "writing" not in done.err and done.out == "" and not (tmp_path / "out").exists()
    np.save(ids, np.arange(100) % 7)
    assert sparkling("expand", source, tmp_path / "out", *FFN, "--data", ids, *more).code == 0


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


def _command(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-m", "sparkling_cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**environment, "PYTHONPATH": str(root)},
    )


def test_the_recorded_command_runs_again(dense_checkpoint: Path, tmp_path: Path) -> None:
    """Relative paths as given, every option; run again it gives the same bytes. A log breaks no line."""
    deep = tmp_path / "a-folder-with-a-long-name" / "another-folder-with-a-long-name"
    shutil.copytree(dense_checkpoint, deep / "runs" / "checkpoint-600")
    target = "outputs-with-quite-a-long-name-of-their-own/checkpoint-600"
    done = _command(
        "expand", "runs/checkpoint-600", target, *FFN, "--report", "none", "--rho", 1.25, folder=deep
    )
    assert done.returncode == 0, done.stderr
    assert f"check    sparkling verify runs/checkpoint-600 {target}\n" in done.stdout
    assert f'SparklingCallback("{target}")' in done.stdout
    report = json.loads((deep / target / "sparkling" / "report.json").read_text())
    assert report["command"] == (
        f"sparkling expand runs/checkpoint-600 {target} --axis ffn --factor 2 --rho 1.25 --report none"
    )
    first = {p.name: p.read_bytes() for p in (deep / target).rglob("*") if p.is_file()}
    shutil.rmtree(deep / target)
    again = _command(*report["command"].split()[1:], folder=deep)
    assert again.returncode == 0, again.stderr
    assert first == {p.name: p.read_bytes() for p in (deep / target).rglob("*") if p.is_file()}


def test_absolute_paths_leave_the_machine_out(
    sparkling: Command, dense_checkpoint: Path, tmp_path: Path
) -> None:
    """Only what tells source and output apart is recorded."""
    target = tmp_path / "w" / dense_checkpoint.name
    assert sparkling("expand", dense_checkpoint, target, *FFN, "--report", "none").code == 0
    command = json.loads((target / "sparkling" / "report.json").read_text())["command"]
    short = f"{dense_checkpoint.parent.name}/{dense_checkpoint.name} w/{dense_checkpoint.name}"
    assert command.startswith(f"sparkling expand {short} --axis ffn")
    assert str(tmp_path) not in command


def test_usage_errors_are_documents_too(sparkling: Command) -> None:
    """Wherever --json stands, and whatever is wrong."""
    for arguments in (
        ("expand", "--json"),
        ("expand", "x", "--factor", "two", "--json"),
        ("verify", "x", "y", "--nope", "--json"),
    ):
        done = sparkling(*arguments)
        facts = json.loads(done.out)
        assert done.code == facts["exit_code"] == 2
        assert facts["schema"] == "sparkling/error" and facts["message"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--axis", "ffn", "--factor", "0.5"], ["--factor 0.5", "only widening", "above 1, e.g. 2"]),
        ([], ["name what to widen: --axis ffn --factor 2"]),
        (["--axis", "ffn", "--factor", "2", "--init", "copy"], ["did you mean 'copy-copy'"]),
        (["--axis", "ffn"], ["add --factor 2"]),
        (["--axis", "hidden,ffn", "--factor", "2"], ["repeat --axis: --axis hidden --axis ffn"]),
        (["--spec", "nope.yaml"], ["there is no spec file nope.yaml"]),
        (["--axis", "ffn", "--factor", "2", "--data", "nope.txt"], ["--data nope.txt: no such file"]),
    ],
)
def test_hints_say_what_to_type(
    sparkling: Command, dense_checkpoint: Path, tmp_path: Path, arguments: list[str], said: list[str]
) -> None:
    """And no Errno or follow-up that is not so."""
    done = sparkling("expand", dense_checkpoint, tmp_path / "w", *arguments)
    message = " ".join(done.err.split())
    assert done.code == 3
    for part in said:
        assert part in message
    assert "Errno" not in message and "Tuple" not in message


def test_a_long_re_warmup_is_a_note(sparkling: Command, dense_checkpoint: Path, tmp_path: Path) -> None:
    """More than a tenth of what remains (600 steps) is said; a tenth is not."""
    for steps, said in ((61, True), (60, False)):
        done = sparkling(
            "expand", dense_checkpoint, tmp_path / "w", *FFN, "--rewarmup-steps", steps, "--dry-run"
        )
        assert done.code == 0
        assert ("more than a tenth" in done.err) == said


def test_nothing_over_nothing_is_no_ratio(sparkling: Command, wide: Path) -> None:
    """The last step of a cosine to zero."""
    rows = [line.split() for line in sparkling("schedule", wide).out.splitlines()]
    last = next(row for row in rows if row and row[0] == "1,200")
    assert last[-1] == "-"


def test_a_dry_run_is_the_whole_plan(
    sparkling: Command, dense_checkpoint: Path, tmp_path: Path, wide: Path
) -> None:
    """Destination, optimizer treatment and re-warmup are in it, and what the real run would refuse."""
    done = sparkling("expand", dense_checkpoint, tmp_path / "other", *FFN, "--dry-run", "--rho", 1.25)
    assert done.code == 0
    for part in (f"output  {tmp_path / 'other'}", "optimizer state  asymmetric", "in 250 steps", "to 1.25 x"):
        assert part in done.out
    assert sparkling("expand", dense_checkpoint, wide, *FFN, "--dry-run").code == 7
    assert sparkling("expand", dense_checkpoint, dense_checkpoint / "in", *FFN, "--dry-run").code == 7


def test_a_budget_that_nothing_fits_in(sparkling: Command, dense_checkpoint: Path, tmp_path: Path) -> None:
    """It is refused, not silently exceeded."""
    for memory, code in (("1", 3), ("15M", 3), ("16M", 0)):
        done = sparkling(
            "expand", dense_checkpoint, tmp_path / "w", *FFN, "--memory", memory, "--report", "none"
        )
        assert done.code == code
    assert (tmp_path / "w").is_dir()


def test_axes_have_one_list_of_names(sparkling: Command, dense_checkpoint: Path, tmp_path: Path) -> None:
    """The error for a typo and the hint of a refused axis offer the same."""
    typo = sparkling("expand", dense_checkpoint, tmp_path / "w", "--axis", "ffm", "--factor", 2).err
    refused = sparkling("expand", dense_checkpoint, tmp_path / "w", "--axis", "head_dim", "--factor", 2).err
    names = " ".join(refused.split()).rpartition("widened here: ")[2]
    assert "heads" in names and names in " ".join(typo.split())


def test_comparing_what_is_unrelated_is_said(
    sparkling: Command, dense_checkpoint: Path, moe_checkpoint: Path, wide: Path
) -> None:
    """Another class, and no expansion between the two; a true pair gets no such note."""
    look = ("--no-activations", "--against")
    other = sparkling("inspect", dense_checkpoint, *look, moe_checkpoint)
    assert "warning: these are different models" in other.err
    quiet = sparkling("inspect", dense_checkpoint, *look, moe_checkpoint, "--quiet")
    assert "warning: these are different models" in quiet.err
    same = sparkling("inspect", dense_checkpoint, *look, dense_checkpoint)
    assert "no expansion lies between these two" in same.err
    pair = sparkling("inspect", wide, *look, dense_checkpoint)
    assert pair.code == 0 and "expansion" not in pair.err and "different" not in pair.err


def test_a_missing_config_is_asked_for(sparkling: Command, dense_checkpoint: Path, tmp_path: Path) -> None:
    """Weights without a config.json: the first thing to try is to bring it."""
    source = tmp_path / "source"
    shutil.copytree(dense_checkpoint, source)
    (source / "config.json").unlink()
    done = sparkling("expand", source, tmp_path / "w", *FFN)
    assert done.code == 5
    assert "copy its config.json into it; else pass --layout FILE" in " ".join(done.err.split())


def test_source_and_output_in_the_wrong_order(sparkling: Command, dense_checkpoint: Path, wide: Path) -> None:
    """The command with both in their places; not where neither is an output."""
    done = sparkling("verify", wide, dense_checkpoint)
    assert done.code == 4
    assert f"the source comes first: sparkling verify {dense_checkpoint} {wide}" in " ".join(done.err.split())
    assert "comes first" not in sparkling("verify", dense_checkpoint, dense_checkpoint).err
    look = sparkling("inspect", dense_checkpoint, "--against", wide, "--no-activations")
    assert f"swap them, sparkling inspect {wide} --against {dense_checkpoint}" in " ".join(look.err.split())


def test_a_spec_file_without_axes_is_shown_one(
    sparkling: Command, dense_checkpoint: Path, tmp_path: Path
) -> None:
    """In the form of a file."""
    (tmp_path / "flat.yaml").write_text("axis: ffn\nfactor: 2\n")
    done = sparkling("expand", dense_checkpoint, tmp_path / "w", "--spec", tmp_path / "flat.yaml")
    assert done.code == 3 and "axes: [{axis: ffn, factor: 2}]" in done.err
    (tmp_path / "right.yaml").write_text("axes: [{axis: ffn, factor: 2}]\n")
    assert sparkling("expand", dense_checkpoint, "--spec", tmp_path / "right.yaml", "--dry-run").code == 0
