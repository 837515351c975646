"""What is counted grows as widths do: killed anywhere, the next run finishes it; threads change no byte."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sparkling_cli import api
from sparkling_cli.execute import job

forked = multiprocessing.get_context("fork")
CASES: dict[str, dict[str, Any]] = {
    "vocab": {"axes": [{"axis": "vocab", "to": 600}], "vocab_fill": "random"},
    "experts": {"axes": [{"axis": "experts", "factor": 2}], "router_noise": 0.01},
    "copies of experts": {
        "axes": [{"axis": "experts", "to": 20}],
        "copies": {"all": [1, 2] * 4 + [1] * 8, "1": [1] * 14 + [3, 3]},
        "router_noise": 0.01,
    },
    "layers": {"axes": [{"axis": "layers", "factor": 2}]},
    "layers and experts": {
        "axes": [{"axis": "layers", "to": 5}, {"axis": "experts", "factor": 2}],
        "at": "end",
    },
}


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tasks, so that a run can be broken off in many places."""
    monkeypatch.setattr(job, "TASK", 100_000)


def contents(root: Path) -> dict[str, bytes]:
    """Every file below but the report, which names its folder."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files if p.parent.name != "sparkling"}


def dies(source: Path, target: Path, options: dict[str, Any], share: float) -> None:
    """Expand until a share of the bytes is written."""

    @contextmanager
    def progress(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
        done = 0

        def advance(size: int) -> None:
            nonlocal done
            done += size
            if title == "writing" and done >= share * (total or 0):
                os.kill(os.getpid(), signal.SIGKILL)

        yield advance

    api.expand(source, target, **options, report="none", threads=2, progress=progress)


@pytest.mark.parametrize(
    ("case", "share"),
    [
        pytest.param(
            case, share, marks=() if (case, share) == ("layers and experts", 0.5) else pytest.mark.slow
        )
        for case in CASES
        for share in (0.01, 0.5, 0.99)
    ],
)
def test_killed_and_begun_again(case: str, share: float, moe_checkpoint: Path, tmp_path: Path) -> None:
    """No output where it was killed; then the bytes of a run that nothing happens to, in little memory."""
    options, target = CASES[case], tmp_path / "grown"
    api.expand(moe_checkpoint, tmp_path / "whole", **options, report="none", threads=1)
    child = forked.Process(target=dies, args=(moe_checkpoint, target, options, share))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not target.exists()
    api.expand(moe_checkpoint, target, **options, report="none", threads=3, memory="64M")
    assert contents(target) == contents(tmp_path / "whole")
    api.verify(moe_checkpoint, target)
