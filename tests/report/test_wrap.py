"""Where lines of messages end: between words, and never inside what may be pasted."""

from __future__ import annotations

import pytest
from rich.console import Console

from sparkling_cli.report.terminal import verdict_lines
from sparkling_cli.report.wrap import wrapped
from sparkling_cli.results.base import Finding, Verdict

COMMAND = "sparkling verify 'my run/checkpoint-100' wide/checkpoint-100"


@pytest.mark.parametrize("width", range(10, 120))
@pytest.mark.parametrize(
    ("text", "whole"),
    [
        (f"the source comes first: {COMMAND}, and then the output", COMMAND),
        ("ask for all of it by --report full --data 'my text.txt'; else nothing", "--data 'my text.txt'"),
        ("choose one: 'my run/checkpoint-100'; the others are outputs", "'my run/checkpoint-100'"),
        ("for example --axis ffn --factor 2 --multiple-of 64, if it fits", "--axis ffn --factor 2"),
        ("outputs of `sparkling expand --axis ffn` alone have one of these", "`sparkling expand --axis ffn`"),
    ],
)
def test_no_line_ends_inside_a_command(width: int, text: str, whole: str) -> None:
    """At any width; all other words are kept, in order, and lines are as short as they can be."""
    lines = wrapped(text, width)
    assert whole in lines and lines.split() == text.split()
    assert all(
        len(line) <= width for line in lines.splitlines() if not set(line) & set("'`-/") and " " in line
    )


@pytest.mark.parametrize(
    "text", ["old entries' steps and new entries' steps differ", "the run's own, --init"]
)
def test_an_apostrophe_is_no_quote(text: str) -> None:
    """Prose is broken wherever it has a space."""
    assert max(map(len, wrapped(text, 10).splitlines())) <= 10


def test_findings_of_a_verdict() -> None:
    """Behind their marks, aligned, and with whole commands, however narrow the screen is."""
    text = f"Activations were not measured, as the model is large: {COMMAND} --report full measures them."
    verdict = Verdict(
        level="attention",
        headline="Read.",
        findings=(Finding(level="attention", text=text), Finding(level="good", text="Kept " * 20)),
    )
    console = Console(width=60, record=True)
    for line in verdict_lines(verdict):
        console.print(line, soft_wrap=True)
    shown = console.export_text()
    assert f"{COMMAND} --report full" in shown
    first, *rest = shown.splitlines()[1:]
    assert first.startswith("  LOOK Activations") and rest[-1].startswith("       Kept")
    assert any(line.startswith("  ok   Kept") and len(line) <= 60 for line in rest)
