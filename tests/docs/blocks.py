"""Code blocks of a documentation page, and a folder to run them in.

What is run, in order: every ``console`` block (lines after ``$``), every ``bash`` block and every
``python`` block without a title; a block with ``title="x.py"`` is saved under that name. A block is
left out only behind a comment ``<!-- not run: reason -->``, and listed in ``test_pages.py``. What
stands below a command in a ``console`` block is what it prints, spaces and line ends aside; ``...``
stands for anything. Where that begins with ``error:``, the command fails and says so on stderr.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(
    r"(?P<skip><!-- not run: (?P<reason>[^>]+?) -->\s*\n)?"
    r"(?P<indent>[ ]*)```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<body>.*?)\n(?P=indent)```",
    re.S,
)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    title: str | None
    body: str
    reason: str | None


def blocks(page: Path) -> Iterator[Block]:
    """All fenced blocks of a page, in order."""
    for match in _FENCE.finditer(page.read_text(encoding="utf-8")):
        body = textwrap.dedent(match["body"]) if match["indent"] else match["body"]
        yield Block(match["language"], match["title"], body, match["reason"])


def commands(block: Block) -> list[str]:
    """The commands of a ``console`` block, continuation lines joined."""
    return [command for command, _ in session(block)]


def session(block: Block) -> list[tuple[str, str]]:
    """The commands of a ``console`` block, and what is shown below each."""
    joined = re.sub(r"\s*\\\n\s*", " ", block.body)
    parts = re.split(r"^\$ ", joined, flags=re.M)[1:]
    return [(command, shown.strip()) for command, _, shown in (part.partition("\n") for part in parts)]


def prints(shown: str, printed: str) -> bool:
    """Whether what is shown below a command is in what it printed."""
    pattern = ".*?".join(re.escape(" ".join(part.split())) for part in shown.split("..."))
    return re.search(pattern, " ".join(printed.split())) is not None


TOOLS = {"sparkling": "-m sparkling_cli", "python": "", "torchrun": "-m torch.distributed.run"}


def like_a_clone(folder: Path) -> dict[str, str]:
    """Give a folder the bundled files beside the commands of an installation; the environment for them."""
    for name in ("fixtures", "docs"):
        (folder / name).symlink_to(ROOT / name)
    return installed(folder)


def installed(folder: Path) -> dict[str, str]:
    """Give a folder the commands of an installation; the environment for them."""
    tools = folder / ".tools"
    tools.mkdir()
    for name, words in TOOLS.items():
        script(tools / name, f'exec "{sys.executable}" {words} "$@"')
    return {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "100",
    }


def script(path: Path, body: str) -> None:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def run_page(page: Path, folder: Path) -> int:
    """Run a page from its first block to its last in a folder of its own; how many commands ran."""
    environment = installed(folder)
    count = 0
    for block in blocks(page):
        if block.reason:
            continue
        if block.title and block.language != "diff":
            (folder / block.title).write_text(block.body + "\n")
            continue
        if block.language not in ("console", "bash", "python"):
            continue
        if block.language == "python":
            (folder / "_block.py").write_text(block.body + "\n")
            todo = [("python _block.py", "")]
        else:
            todo = session(block) if block.language == "console" else [(block.body, "")]
        for command, shown in todo:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command.replace("PYTHONPATH=.", f"PYTHONPATH=.:{ROOT}")],
                cwd=folder, env=environment, capture_output=True, text=True, timeout=1500, check=False,
            )  # fmt: skip
            refused = shown.startswith("error:")
            said = f"{page.name}: {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            assert (done.returncode != 0) == refused, said
            assert prints(shown, done.stderr if refused else done.stdout), f"not printed: {shown}\n{said}"
            assert "Warning" not in done.stderr, said
            assert "\x1b" not in done.stdout, f"{page.name}: {command} prints escape codes into a pipe"
            count += 1
    return count
