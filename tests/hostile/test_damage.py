"""Seeded damage to checkpoints and outputs: an error of ours or a right result, never anything else."""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from sparkling_cli import api
from sparkling_cli.errors import SparklingError
from sparkling_cli.layout.file import to_toml
from sparkling_cli.spec.sources import make_spec, read_spec_file
from tests.conftest import TinyCheckpoint
from tests.hostile.corruptions import (
    DAMAGES,
    Damage,
    corrupt,
    edit_config,
    flip_bits,
    grow,
    lost_sector,
    truncate,
)
from tests.hostile.oracle import UnreadableError, check_widened

SECONDS = 10
AXES = [{"axis": "ffn", "factor": 2}]
#: kind of source: architecture, options, size of its ffn, fused experts
KINDS: dict[str, tuple[str, dict[str, str], int, bool]] = {
    "one file": ("llama", {}, 59, False),
    "shards": ("llama", {"shard_size": "20KB"}, 59, False),
    "renamed experts": ("mixtral", {}, 24, True),
}


class HangError(BaseException):
    """It took too long; no ``Exception``, so that nobody swallows it."""


@contextmanager
def limit(seconds: int = SECONDS) -> Iterator[None]:
    """Raise :class:`HangError` after so much processor time, or six times as much of the clock's."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise HangError

    timers = (
        (signal.SIGPROF, signal.ITIMER_PROF, seconds),
        (signal.SIGALRM, signal.ITIMER_REAL, 6 * seconds),
    )
    before = [signal.signal(number, ring) for number, _, _ in timers]
    for _, timer, value in timers:
        signal.setitimer(timer, value)
    try:
        yield
    finally:
        for (number, timer, _), old in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, old)


def state_of(root: Path) -> dict[str, tuple[int, int, int]]:
    """Size, time of change and kind of everything below a path."""
    found = {}
    for path in [root, *root.rglob("*")]:
        info = path.lstat()
        found[str(path)] = (info.st_size, info.st_mtime_ns, info.st_mode)
    return found


def attempt(work: Path, source: Path, run: Callable[[Path], object]) -> str:
    """Run an expansion; ``accepted``, the name of the error, or what must not be.

    Args:
        work: the folder that holds ``source`` and nothing else; the output is to be ``out`` in it.
        source: must not change.
        run: makes the output.

    Raises:
        AssertionError: another exception, a hang, something left behind, a changed source.
    """
    before = state_of(source)
    try:
        with limit():
            run(work / "out")
        outcome = "accepted"
    except SparklingError as error:
        assert error.message.strip() and error.exit_code.value > 1
        assert [path.name for path in work.iterdir()] == [source.name], "something was left behind"
        outcome = type(error).__name__
    assert state_of(source) == before, "the source was changed"
    assert not (work / "canary").exists(), "a pickle was executed"
    return outcome


def damage_many(
    work: Path, original: Path, seeds: range, ffn: int, fused: bool, damages: tuple[Damage, ...]
) -> Counter[str]:
    """Expand damaged copies of a checkpoint; how often what came of it."""
    tally: Counter[str] = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        folder = work / str(seed)
        source = folder / original.name
        shutil.copytree(original, source)
        said = corrupt(source, rng, damages)
        allow = rng.random() < 0.3
        try:
            outcome = attempt(
                folder,
                source,
                lambda out, source=source, allow=allow: api.expand(  # type: ignore[misc]
                    source, out, axes=AXES, report="none", allow_nonfinite=allow
                ),
            )
            if outcome == "accepted":
                check_widened(source, folder / "out", ffn=ffn, fused=fused)
                api.verify(source, folder / "out")
        except (Exception, HangError, UnreadableError) as error:
            raise AssertionError(f"seed {seed}: {said}: {error!r}") from error
        tally[outcome] += 1
        shutil.rmtree(folder)
    return tally


@pytest.mark.parametrize("count", [20, pytest.param(400, marks=pytest.mark.survey)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(3600)
def test_damaged_checkpoints(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, kind: str, count: int) -> None:
    """Any damage to any file: refused with nothing left, or what the public loaders read was widened."""
    arch, options, ffn, fused = KINDS[kind]
    source = tiny_checkpoint(arch, **options)
    api.expand(source, tmp_path / "whole", axes=AXES, report="none")
    check_widened(source, tmp_path / "whole", ffn=ffn, fused=fused)
    shutil.rmtree(tmp_path / "whole")
    first = 10_000 * list(KINDS).index(kind)
    # A config with other numbers is another model, which takes seconds to be understood: fewer of those.
    damages = DAMAGES if count > 100 else tuple(d for d in DAMAGES if d is not edit_config)
    tally = damage_many(tmp_path, source, range(first, first + count), ffn, fused, damages)
    assert tally["accepted"] and tally["CheckpointError"] > count // 4, tally


@pytest.mark.parametrize("count", [12, pytest.param(300, marks=pytest.mark.survey)])
@pytest.mark.timeout(3600)
def test_damaged_outputs(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, count: int) -> None:
    """``verify`` refuses every damaged output; ``expand`` takes its manifest for what it is, or refuses."""
    source = tiny_checkpoint("llama")
    made = tmp_path / "made"
    api.expand(source, made, axes=AXES, report="none")
    refused = 0
    for seed in range(count):
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        shutil.copytree(made, folder / "made")
        damages: tuple[Damage, ...] = (edit_config, flip_bits, lost_sector, truncate, grow)
        said = corrupt(folder / "made" / "sparkling" if rng.random() < 0.7 else folder / "made", rng, damages)
        same = contents(folder / "made") == contents(made)
        try:
            with limit():
                api.verify(source, folder / "made")
            assert same, "a changed output was taken for the true one"
        except SparklingError:
            refused += 1
        except (Exception, HangError) as error:
            raise AssertionError(f"seed {seed}: {said}: {error!r}") from error
        try:
            attempt(
                folder,
                folder / "made",
                lambda out, folder=folder: api.expand(folder / "made", out, axes=AXES, report="none"),
            )  # type: ignore[misc]
        except (Exception, HangError) as error:
            raise AssertionError(f"seed {seed}, a second expansion: {said}: {error!r}") from error
        shutil.rmtree(folder)
    assert refused > count // 2


def contents(root: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.survey)])
def test_damaged_layout_and_spec_files(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, count: int) -> None:
    """Layout and spec files with any damage: read, or refused; a plan by what was read is no crash."""
    source = tiny_checkpoint("llama")
    layout = tmp_path / "layout.toml"
    layout.write_text(to_toml(api.layout_of(source)))
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "axes:\n  - axis: ffn\n    factor: 2\nscaling: rms\nrewarmup: {rho: 1.3, steps: 250}\nseed: 7\n"
    )
    outcomes: Counter[str] = Counter()
    for seed in range(count):
        rng = random.Random(seed)
        original = layout if seed % 2 else spec
        folder = tmp_path / str(seed)
        folder.mkdir()
        path = folder / original.name
        path.write_bytes(scrambled(original.read_bytes(), rng))
        try:
            with limit():
                if original is layout:
                    api.make_plan(source, spec=make_spec({"axes": AXES}), layout=path)
                else:
                    api.make_plan(source, spec=make_spec(read_spec_file(path), path.name), layout=layout)
            outcomes["accepted"] += 1
        except SparklingError as error:
            outcomes[type(error).__name__] += 1
        except (Exception, HangError) as error:
            raise AssertionError(f"seed {seed}: {path.read_bytes()!r}: {error!r}") from error
    assert len(outcomes) >= 3, outcomes


_ODD_WORDS = (
    b"", b"-1", b"0", b"1e400", b"nan", b"'x'", b"[]", b"{a: 1}", b"null", b"ffn", b"hidden", b"(", b"((",
    b"+", b"9" * 400, b"|", b"<-", b"->", b"\xff", b"{layers}", b"*a", b"&a", b"!!python/object:os.system",
)  # fmt: skip


def scrambled(content: bytes, rng: random.Random) -> bytes:
    """Text with a character, word or line changed, doubled, lost or moved."""
    lines = content.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    kind = rng.choice(("byte", "word", "word", "word", "lost", "twice", "moved", "cut"))
    if kind == "byte":
        data = bytearray(content)
        data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if kind == "word":
        words = lines[at].split(b" ")
        words[rng.randrange(len(words))] = rng.choice(_ODD_WORDS)
        lines[at] = b" ".join(words)
    elif kind == "lost":
        del lines[at]
    elif kind == "twice":
        lines.insert(at, lines[at])
    elif kind == "moved":
        lines.insert(rng.randrange(len(lines)), lines.pop(at))
    else:
        lines = lines[:at]
    return b"".join(lines)
