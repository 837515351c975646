"""What the command line says of itself: help, completion, suggestions for what is mistyped."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from sparkling_cli.cli.app import app
from sparkling_cli.spec.choices import Init
from sparkling_cli.spec.model import ExpansionSpec
from sparkling_cli.spec.options import OPTIONS, as_word
from tests.cli.test_expand_command import Command
from tests.docs.blocks import ROOT

GROUP: Any = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)


@pytest.fixture
def sparkling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line, 80 columns wide."""
    monkeypatch.setenv("COLUMNS", "80")
    return Command(monkeypatch, capsys)


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_the_terminal_and_uses_it(
    sparkling: Command, monkeypatch: pytest.MonkeyPatch, command: str, width: int
) -> None:
    """No line is wider than the terminal, an example included; wide terminals get wide lines."""
    monkeypatch.setenv("COLUMNS", str(width))
    done = sparkling(*command.split(), "--help")
    lengths = [len(line) for line in done.out.splitlines()]
    assert done.code == 0
    assert max(lengths) <= width
    assert "..." not in re.sub(r"\S*\.\.\.\S*(?=;|@|\s*\n?\s*may)|\[(?:ARGS|TYPE)\]\.\.\.", "", done.out)
    if command == "inspect":
        assert max(lengths) > width - 20


def test_options_stand_in_groups_with_their_choices(sparkling: Command) -> None:
    """In the order of a user's questions; no type of the programming language is shown."""
    text = sparkling("expand", "--help").out
    headings = re.findall(r"^(\w[\w ]+):$", text, flags=re.M)
    assert headings == [
        "Arguments", "What to grow", "Method", "Learning rate", "Input and layout", "Output and report",
        "Running",
    ]  # fmt: skip
    assert f"[{'|'.join(get_args(Init))}]" in text
    for command in COMMANDS:
        assert not re.search(r"<(?:list|str|int|float|path|text)\b", sparkling(command, "--help").out)


def test_defaults_shown_are_the_specs() -> None:
    """What ``--help`` names as default is what holds."""
    shown = {flag: p.show_default for p in GROUP.commands["expand"].params for flag in p.opts}
    for model, options in OPTIONS.items():
        for field, flag in options.items():
            default = model.model_fields[field].default
            if default is not None:
                assert str(shown[flag]) == as_word(default), flag
    assert ExpansionSpec.model_fields["init"].default == shown["--init"]


def examples() -> list[str]:
    """Every example of every command's help."""
    found = []
    for name in COMMANDS:
        text = inspect.cleandoc(GROUP.commands[name].help).partition("\b\n")[2]
        found += re.findall(r"^ *(sparkling .*)$", re.sub(r" *\\\n *", " ", text), flags=re.M)
    return found


@pytest.mark.parametrize("example", [e for e in examples() if not e.startswith("sparkling architectures")])
def test_examples_work_on_the_bundled_checkpoint(
    example: str, sparkling: Command, dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each as it stands, where its files are; what it is to write is planned only."""
    monkeypatch.chdir(tmp_path)
    for name in ("ckpt", "checkpoint-1000"):
        shutil.copytree(dense_checkpoint, name)
    shutil.copy(dense_checkpoint / "config.json", tmp_path)
    (tmp_path / "expansion.yaml").write_text(
        "axes:\n  - {axis: ffn, factor: 2}\nrewarmup: {rho: 1.3, steps: 10}\n"
    )
    (tmp_path / "heldout.txt").write_text("Once there was a river. " * 400)
    words = shlex.split(example.partition(" > ")[0])[1:]
    if words[0] == "layout" or "mine.toml" in words:
        (tmp_path / "mine.toml").write_text(sparkling("layout", "ckpt").out)
    if re.search(r"\bwide/|ckpt-ffn2x|checkpoint-1200", example) and words[0] != "expand":
        made = ("ckpt", "ckpt-ffn2x") if "ckpt" in example else ("checkpoint-1000", "wide")
        grown = sparkling("expand", *made, "--axis", "ffn=2", "--report", "none")
        assert grown.code == 0, grown.err
        if "checkpoint-1200" in example:
            shutil.copytree("wide", "checkpoint-1200")
    more = ["--dry-run"] if words[0] == "expand" and "--dry-run" not in words else []
    done = sparkling(*words, *more)
    assert done.code == 0, done.err
    assert done.out.strip() or done.err.strip()


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        (["widen"], "did you mean `sparkling expand`?"),
        (["expnad", "x"], "did you mean `sparkling expand`?"),
        (["validate"], "did you mean `sparkling verify`?"),
        (["qqqq"], "see `sparkling --help`"),
        (["expand", "x", "--axs", "ffn"], "did you mean --axis?"),
        (["expand", "x", "--optimiser", "copy"], "did you mean --optimizer?"),
        (["expand", "x", "--learning-rate", "1"], "did you mean --peak-lr?"),
        (["expand", "x", "-o", "y"], "the output is the second argument: sparkling expand CKPT DST"),
        (["expand", "x", "--zzz"], "see `sparkling expand --help`"),
        (["--axis", "ffn", "x"], "the command comes first: sparkling expand ... --axis"),
        (["expand"], "for example `sparkling expand ckpt/ --axis ffn --factor 2`; see"),
        (["verify", "x"], "for example `sparkling verify ckpt/ ckpt-ffn2x/`; see"),
        (["expand", "x", "--threads", "many"], "see `sparkling expand --help`"),
    ],
)
def test_a_misread_line_is_an_error_like_any_other(sparkling: Command, typed: list[str], answer: str) -> None:
    """``error:`` and ``hint:``, what was probably meant, and exit code 2; no usage text in between."""
    done = sparkling(*typed)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert f"  hint: {answer}" in done.err
    assert "Usage:" not in done.err and not done.out


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        (["--axis", "ffn=2x"], ["expected a number", "write 2"]),
        (["--axis", "ffn", "--factor", "1,5"], ["expected a number", "write 1.5"]),
        (["--axis", "ffn", "--to", "4k"], ["expected a whole number"]),
        (["--axis", "ffn=4096"], ["4096 times the size", "--axis ffn --to 4096"]),
        (["--axis", "ffn=0.5"], ["a factor is greater than 1"]),
        (["--axis", "ffn=2", "--axis", "hidden"], ["found neither for hidden", "--axis hidden=2"]),
        (
            ["--axis", "ffn=2", "--factor", "2"],
            ["--factor 2 is left over: every --axis has its factor already (ffn=2)", "leave it out"],
        ),
    ],
)
def test_short_forms_that_are_none(
    sparkling: Command, dense_checkpoint: Path, typed: list[str], parts: list[str]
) -> None:
    """What was expected, and the form that was meant."""
    done = sparkling("expand", dense_checkpoint, *typed, "--dry-run")
    assert done.code == (2 if typed[2:] and "expected" in parts[0] else 3)
    for part in parts:
        assert part in " ".join(done.err.split())


def test_the_short_form_is_the_long_one(sparkling: Command, dense_checkpoint: Path) -> None:
    """``--axis ffn=2 --axis hidden --to 144``: factors behind names, the rest by the other options."""
    short = sparkling(
        "expand", dense_checkpoint, "--axis", "ffn=2", "--axis", "hidden", "--to", 144, "--dry-run", "--json"
    )
    axes = json.loads(short.out)["axes"]
    assert {name: sizes["after"] for name, sizes in axes.items()} == {"ffn": 336, "hidden": 144}


def complete(line: str, folder: Path) -> list[str]:
    """What bash is offered for a line that ends where Tab was pressed."""
    words = line.split(" ")
    done = subprocess.run(
        [sys.executable, "-m", "sparkling_cli"],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "_SPARKLING_COMPLETE": "complete_bash",
             "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
    )  # fmt: skip
    return done.stdout.split()


def test_the_shell_is_offered_what_fits(moe_checkpoint: Path, tmp_path: Path) -> None:
    """Commands, checkpoints, the axes of the checkpoint on the line, choices."""
    shutil.copytree(moe_checkpoint, tmp_path / "ckpt")
    (tmp_path / "notes.txt").touch()
    assert complete("sparkling ex", tmp_path) == ["expand"]
    assert complete("sparkling expand ", tmp_path) == ["ckpt/"]
    assert complete("sparkling expand ckpt --init random-", tmp_path) == [
        "random-copy", "random-zero", "random-random",
    ]  # fmt: skip
    assert set(complete("sparkling expand ckpt --axis ", tmp_path)) >= {"expert_ffn", "hidden", "heads"}
    assert complete("sparkling expand nowhere --axis f", tmp_path) == ["ffn"]
    (tmp_path / "runs" / "checkpoint-1").mkdir(parents=True)
    assert complete("sparkling expand ru", tmp_path) == ["runs/", "runs/checkpoint-1/"]


def test_nothing_asks_for_help(sparkling: Command) -> None:
    """And is no error, though it leaves as a command that was not given."""
    done = sparkling()
    assert done.code == 2 and "error" not in done.out + done.err
    assert "sparkling expand ckpt/ --axis ffn --factor 2" in done.out
    assert "Usage: sparkling verify [OPTIONS] SRC DST" in sparkling("verify", "--help").out


def test_the_recorded_command_of_the_short_form_runs(
    sparkling: Command, dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors and sizes of one expansion are recorded so that the command gives the same again."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dense_checkpoint, "ckpt")
    options = ("--axis", "hidden", "--to", 144, "--axis", "ffn=2", "--report", "none")
    assert sparkling("expand", "ckpt", "wide", *options).code == 0
    command = json.loads((tmp_path / "wide" / "sparkling" / "report.json").read_text())["command"]
    shutil.move("wide", "first")
    assert sparkling(*shlex.split(command)[1:]).code == 0
    first, again = ((tmp_path / n / "sparkling" / "manifest.json").read_bytes() for n in ("first", "wide"))
    assert first == again
