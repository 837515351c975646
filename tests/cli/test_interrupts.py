"""Interrupts outside the making of an output, whose own message is checked with the engine."""

from __future__ import annotations

import sys

import pytest
import typer

from sparkling_cli.cli import console


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
