"""The run that the documentation is tried on is a training run like any other."""

from __future__ import annotations

import json
import math
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import sparkling_cli
from sparkling_cli.examples.train import main

TEXT = resources.files("sparkling_cli.diagnostics").joinpath("sample.txt").read_bytes()


def log(checkpoint: Path) -> list[dict[str, Any]]:
    """What the Trainer logged on the way to a checkpoint."""
    found: list[dict[str, Any]] = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return found


@pytest.mark.parametrize("moe", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_learns_and_goes_on_when_it_was_widened(
    moe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the half it knows more than how often each byte occurs; the wider model learns on, re-warmed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train", *(["--moe"] if moe else [])])
    main()
    half = Path("example/checkpoint-100")
    assert capsys.readouterr().out.endswith(f"written  {half}\n")
    counts = Counter(TEXT).values()
    entropy = -sum(n / len(TEXT) * math.log(n / len(TEXT)) for n in counts)
    assert log(half)[-1]["loss"] < entropy < log(half)[0]["loss"]

    sparkling_cli.expand(half, "wide/checkpoint-100", axis="ffn", factor=2, rewarmup_steps=10, report="none")
    monkeypatch.setattr("sys.argv", ["train", "--resume", "wide/checkpoint-100"])
    main()
    end = log(Path("example/checkpoint-200"))
    after = [entry for entry in end if "learning_rate_new" in entry]
    assert [entry["step"] for entry in after] == [120, 140, 160, 180, 200]
    # the rate logged at a step is that of the next; the ratio stays once the re-warmup is over
    assert all(entry["learning_rate_new"] > entry["learning_rate"] for entry in after)
    assert after[-1]["loss"] < log(half)[-1]["loss"]
