"""The last moments of a run, and disks that fail beside the writes: all or nothing, and who is to blame."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparkling_cli import api
from sparkling_cli.errors import CheckpointError, OutputError
from sparkling_cli.execute import commit
from sparkling_cli.execute.stream import Written
from sparkling_cli.formats import detect
from sparkling_cli.formats.directory import list_files
from sparkling_cli.formats.model import OutputFile
from sparkling_cli.formats.torchfile import read_torch_file
from sparkling_cli.plan.model import Plan
from sparkling_cli.spec.sources import make_spec
from tests.conftest import TinyCheckpoint
from tests.execute.engine_support import doubled, execute, no_sidecar, raw_plan

Laid = tuple[Plan, tuple[OutputFile, ...]]


def laid(folder: Path, *, single: bool = False) -> Laid:
    """A small checkpoint: a folder with a carried file, or a single file."""
    view = (doubled(4, 0),)
    plan, files = raw_plan(
        folder / "src", {"w": (torch.ones(4), view, {})}, carried={} if single else {"c.txt": b"carried"}
    )
    if not single:
        return plan, files
    row = plan.rows[0]
    extents = tuple(extent._replace(path="") for extent in row.source.extents)
    row = row._replace(source=row.source._replace(extents=extents))
    source = replace(plan.source, root=folder / "src" / "data.bin")
    return replace(plan, source=source, rows=(row,)), (replace(files[0], path=""),)


def a_sidecar(_: Written) -> dict[str, bytes]:
    """One small file."""
    return {"sparkling/x": b"x"}


def names(folder: Path) -> list[str]:
    """What lies there."""
    return sorted(path.name for path in folder.iterdir())


def failing(*_: object, **__: object) -> int:
    """A disk that is broken."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("single", [False, True])
def test_too_late_for_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, single: bool
) -> None:
    """While the output appears, a signal neither tears it in two nor makes an error of it."""
    plan, files = laid(tmp_path, single=single)
    real = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        os.kill(os.getpid(), number)
        found = real(self, target)
        os.kill(os.getpid(), number)
        return found

    before = {n: signal.signal(n, h) for n, h in HANDLERS.items()}
    monkeypatch.setattr(Path, "rename", interrupted)
    try:
        execute(plan, files, tmp_path / "dst", sidecar=a_sidecar)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert names(tmp_path) == (["dst", "dst.sparkling", "src"] if single else ["dst", "src"])


#: as a command has them, whatever the tests run under
HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("place", ["last rename", "sync behind it"])
def test_a_disk_that_fails_as_the_output_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single: bool, place: str
) -> None:
    """What has appeared goes again: nothing is left, as the message says, and the next run succeeds."""
    plan, files = laid(tmp_path, single=single)
    target = tmp_path / "dst"
    real_rename, real_sync = Path.rename, commit.sync

    def rename(self: Path, to: Path) -> Path:
        return real_rename(self, to) if to != target else Path(str(failing()))

    def sync(path: Path) -> None:
        failing() if path == tmp_path else real_sync(path)

    with monkeypatch.context() as patch:
        if place == "last rename":
            patch.setattr(Path, "rename", rename)
        else:
            patch.setattr(commit, "sync", sync)
        with pytest.raises(OutputError, match="cannot write"):
            execute(plan, files, target, sidecar=a_sidecar)
    assert names(tmp_path) == ["src"]
    execute(plan, files, target, sidecar=a_sidecar)


def test_a_disk_that_fails_at_the_first_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that was just made does not stay behind."""
    plan, files = laid(tmp_path)
    real = os.open

    def opened(path: object, *args: object, **kwargs: object) -> int:
        return failing() if str(path).endswith("/lock") else real(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(OutputError, match="cannot make"):
        execute(plan, files, tmp_path / "dst", sidecar=no_sidecar)
    assert names(tmp_path) == ["src"]


def test_an_output_that_cannot_be_read_back(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the output's fault, not the source's."""
    source = tmp_path / "checkpoint-3"
    shutil.copytree(tiny_checkpoint("llama"), source)
    expansion = api.make_plan(source, spec=make_spec({"axes": [{"axis": "ffn", "factor": 2}]}))

    def unreadable(_: Path) -> None:
        raise CheckpointError("model.safetensors: cannot be read: Input/output error")

    for report in ("none", "auto"):
        with monkeypatch.context() as patch:
            patch.setattr(detect, "open_checkpoint", unreadable)
            with pytest.raises(OutputError, match=r"cannot be read back .*model\.safetensors"):
                api.expand(source, tmp_path / "dst", expansion=expansion, report=report)
        assert names(tmp_path) == ["checkpoint-3"]


def test_a_source_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source's file is named, of a carried file too, and the output's disk is not blamed."""
    plan, files = laid(tmp_path)
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(CheckpointError, match=r"cannot read .*c\.txt: Input/output error"):
        execute(plan, files, tmp_path / "dst", sidecar=no_sidecar)
    with pytest.raises(CheckpointError, match=r"a\.pt: cannot be read: Input/output error"):
        read_torch_file(tmp_path / "a.pt", "a.pt")


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files would be missing in the output, and nobody would know."""
    (tmp_path / "sub").mkdir()
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("sub"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(CheckpointError, match=r"cannot list .*sub: Permission denied"):
        list_files(tmp_path)


def test_a_folder_that_cannot_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To recognize a format, folders are looked into: the source is to blame, not the output."""

    class Form:
        def claims(self, root: Path) -> bool:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(root / "sub"))

    monkeypatch.setattr(detect, "formats", lambda: (Form(),))
    with pytest.raises(CheckpointError, match=r"cannot read .*sub: Permission denied"):
        detect.open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "optimizer.pt", "model.safetensors", "rng_state.pth"])
def test_a_source_that_changes_behind_the_plan(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, name: str
) -> None:
    """A trainer that saves over the checkpoint while its layout is inferred: old headers, new tensors."""
    source = tmp_path / "checkpoint-3"
    shutil.copytree(tiny_checkpoint("llama"), source)
    expansion = api.make_plan(source, spec=make_spec({"axes": [{"axis": "ffn", "factor": 2}]}))
    (source / "new.txt").write_text("of no matter")
    (source / name).write_bytes((source / name).read_bytes())
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        api.expand(source, tmp_path / "dst", expansion=expansion, report="none")
    assert names(tmp_path) == ["checkpoint-3"]


def test_a_folder_of_something_else_is_not_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold a file system: that it is no checkpoint is seen before its files are listed."""
    (tmp_path / "notes.txt").write_text("nothing")
    walked: list[object] = []
    monkeypatch.setattr(os, "walk", lambda root, **_: walked.append(root) or iter(()))
    with pytest.raises(CheckpointError, match="no known checkpoint format"):
        api.make_plan(tmp_path, spec=make_spec({"axes": [{"axis": "ffn", "factor": 2}]}, "options"))
    assert not walked
