"""Interrupts at any moment of a command: exit code 130, a message, and nothing half-made."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from sparkling_cli.cli import console

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("raised", [KeyboardInterrupt, typer.Abort])
def test_an_interrupt_is_told(
    raised: type[BaseException], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 130 comes with a message: typer alone would say nothing."""
    app = typer.Typer()

    @app.command()
    def command() -> None:
        raise raised

    monkeypatch.setattr(sys, "argv", ["sparkling"])
    monkeypatch.setattr(console, "output", console.Output())  # as a new process has it
    assert console.run(app) == 130
    assert "interrupted" in capsys.readouterr().err


def started(code: str, *arguments: str, folder: Path) -> subprocess.Popen[str]:
    """A process in a folder that imports the package of this clone."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


#: places of a program in which Python throws an exception away, turns it into another or hands it to C
PLACES = {
    "a finalizer": "class Old:\n    def __del__(self):\n        come()\nOld()",
    "a weak reference": (
        "import weakref\nclass Old: pass\nold = Old()\nr = weakref.ref(old, lambda _: come())\ndel old"
    ),
    "an import": "try:\n    import interrupted_module\nexcept BaseException:\n    pass",
    "a callback of C code": "import ctypes\nctypes.CFUNCTYPE(None)(come)()",
    "a handler of all exceptions": "try:\n    come()\nexcept BaseException:\n    pass",
    "a thread that is waited for": (
        "import threading, time\n"
        "t = threading.Thread(target=lambda: (time.sleep(0.2), come(), time.sleep(60)))\nt.start()\nt.join()"
    ),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("place", PLACES)
def test_no_place_swallows_a_signal(place: str, number: signal.Signals, tmp_path: Path) -> None:
    """The command ends there and then, with its message."""
    come = (
        f"import os\ndef come():\n    os.kill(os.getpid(), {int(number)})\n    [None for _ in range(1000)]\n"
    )
    (tmp_path / "interrupted_module.py").write_text(f"{come}come()\nraise ImportError\n")
    command = f"{come}import sys\nsys.path.insert(0, '.')\n{PLACES[place]}\nprint('went on')"
    # in place of the whole command line
    code = f"import sparkling_cli.cli.console as c\nc.run = lambda _: exec({command!r}, {{}})\n"
    # the tests may run under nohup, or in the background of a shell
    code += "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from sparkling_cli.__main__ import main; main()"
    done = started(code, folder=tmp_path)
    out, err = done.communicate(timeout=60)
    assert (done.returncode, out) == (130, ""), err
    assert err == "error: interrupted: no unfinished output was left under its final name\n"


def interrupted(
    source: Path, folder: Path, delay: float, number: signal.Signals, *more: str
) -> tuple[int, list[str], str, str]:
    """Exit code, what lies in the folder, and what was printed, of ``expand`` that got a signal."""
    folder.mkdir()
    code = "from sparkling_cli.__main__ import main; print(flush=True); main()"
    arguments = ("expand", str(source), "new/wide", "--axis", "ffn", "--factor", "2", *more)
    process = started(code, *arguments, folder=folder)
    assert process.stdout is not None
    process.stdout.readline()  # Python itself has started
    time.sleep(delay)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    return process.returncode, sorted(p.name for p in folder.iterdir()), out, err


def test_the_message_is_a_document_too(dense_checkpoint: Path, tmp_path: Path) -> None:
    """Under --json, once the console is loaded."""
    for attempt in range(20):
        code, left, out, _ = interrupted(
            dense_checkpoint, tmp_path / str(attempt), 0.6 + attempt / 5, signal.SIGTERM, "--json"
        )
        assert (code, left) == (130, [])
        if out.strip():
            facts = json.loads(out)
            assert facts["schema"] == "sparkling/error" and facts["exit_code"] == 130
            return
    pytest.fail("never got as far as the console")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_random_moments(number: signal.Signals, dense_checkpoint: Path, tmp_path: Path) -> None:
    """With the report on: exit code 130 and nothing left, folders included; or the whole output."""
    began = time.monotonic()
    code, left, _, err = interrupted(dense_checkpoint, tmp_path / "whole", 0, signal.SIGWINCH)
    assert (code, left) == (0, ["new"]), err
    took = time.monotonic() - began
    random_moments = random.Random(int(number))
    for attempt in range(25):
        delay = random_moments.uniform(0, took)
        code, left, _, err = interrupted(dense_checkpoint, tmp_path / str(attempt), delay, number)
        assert (code, left) in ((130, []), (0, ["new"])), (delay, err)
        assert "Traceback" not in err, (delay, err)
        if code:
            assert err.rstrip().count("\n") <= 6 and "interrupted" in err
