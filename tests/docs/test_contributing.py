"""The worked examples of CONTRIBUTING.md, carried out in a copy of the clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Block, blocks, commands

PAGE = ROOT / "CONTRIBUTING.md"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files of the repository that the examples need, free to be changed."""
    leave_out = shutil.ignore_patterns("__pycache__")
    for folder in ("sparkling_cli", "tests/formats"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=leave_out)
    for file in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def apply(block: Block, clone: Path) -> None:
    """Write a new file, or make the change that a diff shows."""
    assert block.title is not None
    folder = clone if "/" in block.title else clone / "installed"  # a module alone is a framework's
    path = folder / block.title
    if block.language != "diff":
        assert not path.exists(), f"{block.title} is there already"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.body + "\n", encoding="utf-8")
        return
    lines = block.body.splitlines()
    before = "\n".join(line[1:] for line in lines if line[0] in " -")
    after = "\n".join(line[1:] for line in lines if line[0] in " +")
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{block.title} has no such place any more:\n{before}"
    path.write_text(text.replace(before, after), encoding="utf-8")


@pytest.mark.slow
def test_the_worked_examples_work(clone: Path) -> None:
    """Every file is written, every change made, every command run; the new code has types and format."""
    (clone / "bin").mkdir()
    for tool in ("pytest", "ruff", "mypy"):
        script = clone / "bin" / tool
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {tool} "$@"\n')
        script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{clone / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = f"{clone}{os.pathsep}{clone / 'installed'}"
    run: list[str] = []
    for block in blocks(PAGE):
        if block.reason is not None:
            continue
        if block.language != "console":
            apply(block, clone)
            continue
        for command in commands(block):
            done = subprocess.run(
                command.split(), cwd=clone, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert " passed" in done.stdout
            assert "skipped" not in done.stdout
            run.append(command)
    assert len(run) == 2
    for check in ("ruff check sparkling_cli tests", "ruff format --check sparkling_cli tests", "mypy"):
        done = subprocess.run(
            check.split(), cwd=clone, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{check}\n{done.stdout}{done.stderr}"
