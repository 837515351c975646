"""``verify`` on real outputs: what holds passes, whatever is changed is found."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparkling_cli import api
from sparkling_cli.errors import CheckpointError, SparklingError, VerificationError
from sparkling_cli.execute.commit import Staging, partial_of
from sparkling_cli.storage.crc import crc32
from sparkling_cli.verification import verify

Made = tuple[Path, Path]


@pytest.fixture(scope="module")
def dense(dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A dense checkpoint with wider ffn."""
    return _made(dense_checkpoint, tmp_path_factory, axes=[{"axis": "ffn", "factor": 1.5}])


@pytest.fixture(scope="module")
def moe(moe_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A mixture of experts with wider ffn and hidden, random fan-out."""
    axes = [{"axis": "ffn", "factor": 2}, {"axis": "hidden", "factor": 2}]
    return _made(moe_checkpoint, tmp_path_factory, axes=axes, init="random-copy")


def _made(source: Path, factory: pytest.TempPathFactory, **options: object) -> Made:
    target = factory.mktemp("verify") / "out"
    api.expand(source, target, report="none", **options)
    return source, target


def files_of(root: Path) -> list[Path]:
    """Every file."""
    return sorted(path for path in root.rglob("*") if path.is_file())


@pytest.fixture
def flip() -> Iterator[object]:
    """Flips one bit of a file, and back at the end of the test."""
    undo: list[tuple[Path, int, int]] = []

    def change(path: Path, bit: int) -> None:
        with path.open("r+b") as file:
            file.seek(bit // 8)
            byte = file.read(1)[0]
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))

    def once(path: Path, bit: int) -> None:
        change(path, bit)
        undo.append((path, bit, 0))

    def back() -> None:
        while undo:
            path, bit, _ = undo.pop()
            change(path, bit)

    once.back = back  # type: ignore[attr-defined]
    yield once
    back()


def test_true_outputs_pass(dense: Made, moe: Made) -> None:
    """What ``expand`` wrote holds, with its source and alone; everything is counted."""
    for source, output in (dense, moe):
        report = verify(source, output)
        assert report.derived == report.tensors > 50
        assert report.moments > 10
        assert report.nbytes >= sum(p.stat().st_size for p in files_of(output)) - 200_000
        assert "follow bit by bit" in report.summary()
        alone = verify(None, output)
        assert (alone.derived, alone.tensors) == (0, report.tensors)


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_any_flipped_bit_is_found(dense: Made, flip: object, count: int) -> None:
    """One bit of any file: headers, tensors, JSON, the manifest and its digests; without the source."""
    _, output = dense
    files = files_of(output)
    rng = random.Random(count)
    places = [(path, rng.randrange(path.stat().st_size * 8)) for path in files]
    sizes = [path.stat().st_size for path in files]
    for _ in range(count - len(places)):
        path = rng.choices(files, sizes)[0]
        places.append((path, rng.randrange(path.stat().st_size * 8)))
    for path, bit in places:
        flip(path, bit)  # type: ignore[operator]
        with pytest.raises(VerificationError):
            verify(None, output)
        flip.back()  # type: ignore[attr-defined]
    verify(None, output)


def test_names_the_changed_tensor_and_file(dense: Made, flip: object) -> None:
    """The message names the tensor and the file that a bit was changed in."""
    source, output = dense
    path = output / "model.safetensors"
    flip(path, (path.stat().st_size - 100) * 8)  # type: ignore[operator]
    with pytest.raises(VerificationError) as caught:
        verify(source, output)
    assert "CRC-32" in caught.value.message
    assert "model.safetensors: a byte of it was changed" in caught.value.message
    assert "is not what the source and the spec give" in caught.value.message


def test_missing_and_extra_files(dense: Made, tmp_path: Path) -> None:
    """A file too few, a file too many, a link instead of a file."""
    source, output = dense
    for number, change in enumerate(("missing", "extra", "link", "manifest")):
        copy = tmp_path / str(number)
        shutil.copytree(output, copy)
        if change == "missing":
            (copy / "generation_config.json").unlink()
        elif change == "extra":
            (copy / "other.bin").write_bytes(b"")
        elif change == "link":
            (copy / "generation_config.json").unlink()
            (copy / "generation_config.json").symlink_to(output / "generation_config.json")
        else:
            (copy / "sparkling" / "manifest.json").unlink()
        kind = CheckpointError if change == "manifest" else VerificationError
        with pytest.raises(
            kind, match="manifest" if change == "manifest" else r"generation_config|other\.bin"
        ):
            verify(source, copy)


def reseal(output: Path) -> None:
    """Make the manifest's own guard right again, as somebody who means harm would."""
    folder = output / "sparkling"
    lines = []
    for path in sorted(folder.iterdir()):
        if path.name != "files.crc32":
            content = path.read_bytes()
            lines.append(f"{crc32(content):08x} {len(content)} sparkling/{path.name}\n")
    body = "".join(lines).encode()
    (folder / "files.crc32").write_bytes(body + b"%08x %d .\n" % (crc32(body), len(body)))


def test_a_consistent_lie_is_found_with_the_source(dense: Made, tmp_path: Path) -> None:
    """Tensor, file and manifest CRCs that agree with each other do not pass for a derivation."""
    source, output = dense
    copy = tmp_path / "lie"
    shutil.copytree(output, copy)
    path = copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    head = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + head])
    name = "model.layers.0.mlp.up_proj.weight"
    start, stop = (8 + head + n for n in header[name]["data_offsets"])
    content[stop - 4 : stop] = b"\0\0\0\x3f"
    path.write_bytes(content)
    manifest = json.loads((copy / "sparkling/manifest.json").read_bytes())
    manifest["tensors"][name]["crc32"] = crc32(bytes(content[start:stop]))
    manifest["files"]["model.safetensors"]["crc32"] = crc32(bytes(content))
    (copy / "sparkling/manifest.json").write_text(json.dumps(manifest))
    reseal(copy)
    verify(None, copy)
    with pytest.raises(VerificationError, match=rf"{name}.*\(old or copied\) is not what"):
        verify(source, copy)


def test_unreset_moments_are_found(dense: Made, tmp_path: Path) -> None:
    """Moments whose new entries are copies, in an output that says that they were reset."""
    source, _ = dense
    copied = tmp_path / "moments"
    asked = [{"axis": "ffn", "factor": 1.5}]
    api.expand(source, copied, axes=asked, optimizer="copy", allow_locked=True, report="none")
    manifest = json.loads((copied / "sparkling/manifest.json").read_bytes())
    manifest["spec"]["optimizer"] = manifest["stages"][-1]["spec"]["optimizer"] = "asymmetric"
    (copied / "sparkling/manifest.json").write_text(json.dumps(manifest))
    reseal(copied)
    with pytest.raises(VerificationError, match=r"exp_avg.*\(zero\) is not what"):
        verify(source, copied)


@pytest.mark.parametrize("change", ["growth", "births", "spec", "name", "layout"])
def test_a_manifest_that_contradicts_itself(dense: Made, tmp_path: Path, change: str) -> None:
    """Growth that nobody asked for, births of other sizes, a name of another parameter."""
    source, output = dense
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    manifest = json.loads((copy / "sparkling/manifest.json").read_bytes())
    if change == "growth":
        manifest["spec"]["axes"] = manifest["stages"][-1]["spec"]["axes"] = [{"axis": "ffn", "factor": 2.0}]
    elif change == "births":
        manifest["axes"]["ffn"]["births"][-1][0] -= 1
    elif change == "spec":
        manifest["spec"]["scaling"] = "none"
    elif change == "name":
        names = [entry for entry in manifest["tensors"].values() if entry["slot"] == "exp_avg"]
        names[0]["name"], names[1]["name"] = names[1]["name"], names[0]["name"]
    else:
        manifest["layout"]["tensors"] = {
            name: text.replace("<- ffn", "<- 160") for name, text in manifest["layout"]["tensors"].items()
        }
    (copy / "sparkling/manifest.json").write_text(json.dumps(manifest))
    reseal(copy)
    with pytest.raises(VerificationError):
        verify(source, copy)


def test_manifests_of_the_first_format_are_read(dense: Made, tmp_path: Path) -> None:
    """What they say of every tensor beside its name and digest is not needed, and not believed."""
    source, output = dense
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    manifest = json.loads((copy / "sparkling/manifest.json").read_bytes())
    manifest["format_version"], manifest["views"] = 1, []
    for entry in manifest["tensors"].values():
        entry |= {"view": 0, "scale": 1.0, "offset": 0.0, "zero": False, "stream": ""}
    (copy / "sparkling/manifest.json").write_text(json.dumps(manifest))
    reseal(copy)
    assert verify(source, copy).derived > 50


def test_another_source_is_not_the_source(dense: Made, tmp_path: Path) -> None:
    """A source whose bytes have changed since is found out, also where its tensors still fit."""
    source, output = dense
    copy = tmp_path / "src"
    shutil.copytree(source, copy)
    path = copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(VerificationError, match="source"):
        verify(copy, output)
    (copy / "trainer_state.json").write_bytes((source / "trainer_state.json").read_bytes() + b" ")
    path.write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(VerificationError, match=r"trainer_state\.json in the source"):
        verify(copy, output)


def test_what_a_killed_run_left_is_no_output(
    dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complete but for its name: it is said to be unfinished, and the next run finishes it."""
    target, axes = tmp_path / "out", [{"axis": "ffn", "factor": 2}]

    def die(_: Staging) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(Staging, "commit", die)
        killed.setattr(Staging, "discard", lambda staging: os.close(staging._lock))
        with pytest.raises((KeyboardInterrupt, SparklingError)):
            api.expand(dense_checkpoint, target, axes=axes, report="none")
    left = partial_of(target) / "data" / "out"
    assert (left / "sparkling/manifest.json").is_file()
    with pytest.raises(CheckpointError, match="is no output yet"):
        verify(dense_checkpoint, left)
    api.expand(dense_checkpoint, target, axes=axes, report="none")
    verify(dense_checkpoint, target)


def test_nothing_to_prove(tmp_path: Path, dense_checkpoint: Path) -> None:
    """A path that is not there, and a checkpoint that is no output."""
    with pytest.raises(CheckpointError, match="no output"):
        verify(None, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no manifest"):
        verify(None, dense_checkpoint)


@pytest.mark.parametrize("count", [25, pytest.param(300, marks=pytest.mark.slow)])
def test_damaged_outputs_never_crash_it(dense: Made, tmp_path: Path, count: int) -> None:
    """Truncated, overwritten and emptied files: an error of ours, never another."""
    source, output = dense
    rng = random.Random(7)
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    for path in rng.choices(files_of(copy), k=count):
        whole = path.read_bytes()
        content = bytearray(whole)
        start = rng.randrange(len(content))
        kind = rng.choice(["cut", "noise", "empty", "insert"])
        if kind == "cut":
            del content[start:]
        elif kind == "noise":
            content[start : start + 64] = rng.randbytes(len(content[start : start + 64]))
        elif kind == "empty":
            content.clear()
        else:
            content[start:start] = b"\0"
        if bytes(content) != whole:
            path.write_bytes(content)
            with pytest.raises(SparklingError):
                verify(source, copy)
            path.write_bytes(whole)
    verify(source, copy)
