"""Go or no-go some steps after an expansion."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparkling_cli import api
from sparkling_cli.cli.app import app
from sparkling_cli.cli.console import run


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, dense_checkpoint: Path) -> Path:
    """The bundled checkpoint with a wider ffn, at step 600."""
    target = tmp_path_factory.mktemp("go") / "wide"
    api.expand(dense_checkpoint, target, axes={"ffn": 2}, report="none")
    return target


def later(wide: Path, target: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """What a run may have saved 20 steps later: the weights changed in some way."""
    shutil.copytree(wide, target)
    weights = load_file(target / "model.safetensors")
    save_file(
        {name: change(w) for name, w in weights.items()}, target / "model.safetensors", {"format": "pt"}
    )
    state = json.loads((target / "trainer_state.json").read_text())
    (target / "trainer_state.json").write_text(json.dumps({**state, "global_step": 620}))
    return target


def noise(size: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Every entry moves on its own."""
    torch.manual_seed(0)
    return lambda w: w + size * w.std() * torch.randn_like(w) if w.ndim > 1 else w


def broken(weight: torch.Tensor) -> torch.Tensor:
    """One entry of every matrix is NaN."""
    weight.view(-1)[0] = float("nan")
    return weight


@pytest.mark.parametrize(
    ("change", "go", "words"),
    [
        (noise(0.01), True, "0% of new channels"),
        (lambda w: 1.001 * w, False, "100% of new channels are still equal"),
        (noise(3.0), False, "the loss goes"),
        (broken, False, "nan or inf"),
    ],
    ids=["parted", "locked", "lost", "nan"],
)
def test_what_may_go_on(
    change: Callable[[torch.Tensor], torch.Tensor], go: bool, words: str, wide: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Copies that parted under a kept loss; not copies that stay, a lost loss, NaN."""
    monkeypatch.setenv("COLUMNS", "300")
    trained = later(wide, tmp_path / "trained", change)
    monkeypatch.setattr(sys, "argv", ["sparkling", "inspect", str(trained), "--against", str(wide)])
    code = run(app)
    shown = capsys.readouterr().out
    assert code == (0 if go else 8)
    assert ("Go: train on." if go else "No-go: do not train on from here.") in shown
    assert words in shown.lower()


def test_before_the_first_step_there_is_nothing_to_stop(wide: Path) -> None:
    """All copies are their sources, as they should be."""
    verdict = api.inspect(wide, wide, activations=False).verdict
    assert verdict is not None and verdict.headline == "Go: train on."
    assert "Nothing was trained" in str(verdict)
