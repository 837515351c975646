"""Go or no-go some steps after an expansion."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from math import log
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


def later(
    wide: Path, target: Path, change: Callable[[torch.Tensor], torch.Tensor], above: float | None = None
) -> Path:
    """What a run may have saved 20 steps later: the weights changed in some way.

    ``above``: the logged loss over 4 - log(step) / 10, which is logged before, as a share of it.
    """
    shutil.copytree(wide, target)
    weights = load_file(target / "model.safetensors")
    save_file(
        {name: change(w) for name, w in weights.items()}, target / "model.safetensors", {"format": "pt"}
    )
    state = json.loads((target / "trainer_state.json").read_text())
    if above is not None:
        line = {step: 4 - log(step) / 10 for step in range(1, 621)}
        state["log_history"] = [
            {"step": step, "loss": loss * (1 + above * (step > 600))} for step, loss in line.items()
        ]
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


@pytest.mark.parametrize(
    ("above", "level"), [(-0.1, "good"), (0.02, "good"), (0.1, "note"), (0.3, "attention")]
)
def test_the_log_against_the_line_of_before(wide: Path, tmp_path: Path, above: float, level: str) -> None:
    """Means of the last twenty steps, of the log and of the line that it was on; far above is no-go."""
    trained = later(wide, tmp_path / "trained", noise(0.01), above)
    found = api.inspect(trained, wide, activations=False)
    wanted = sum(4 - log(step) / 10 for step in range(601, 621)) / 20
    assert found.logged_loss is not None and found.logged_loss.values == 20
    assert found.logged_loss.forecast == pytest.approx(wanted, rel=1e-9)
    assert found.logged_loss.loss == pytest.approx(wanted * (1 + above), rel=1e-9)
    assert found.verdict is not None
    (one,) = (finding for finding in found.verdict.findings if "log's last 20 losses" in finding.text)
    assert one.level == level and found.verdict.headline.startswith("No-go") == (level == "attention")


@pytest.mark.parametrize(
    ("new", "old", "level"),
    [(1.0, 1.0, "good"), (0.0, 1.0, "attention"), (8.0, 1.0, "note"), (1.0, 8.0, "note")],
)
def test_new_entries_against_old_ones(wide: Path, tmp_path: Path, new: float, old: float, level: str) -> None:
    """How far each are from where they began; new ones that stay there are not trained."""
    torch.manual_seed(0)

    def change(w: torch.Tensor) -> torch.Tensor:
        size = torch.full(w.shape, old)
        for dim in range(w.ndim):
            if w.shape[dim] == 336:
                size.narrow(dim, 168, 168).fill_(new)
        return w + 1e-3 * size * torch.randn_like(w)

    found = api.inspect(later(wide, tmp_path / "trained", change), wide, activations=False)
    assert found.symmetry is not None
    assert found.symmetry.update_rms_new == pytest.approx(1e-3 * new, rel=0.01)
    assert found.symmetry.update_rms_old == pytest.approx(1e-3 * old, rel=0.01)
    assert found.verdict is not None
    (one,) = (finding for finding in found.verdict.findings if finding.text.startswith("New entries"))
    assert one.level == level and found.verdict.headline.startswith("No-go") == (level == "attention")
    assert ("is the re-warmup applied?" in one.text) == (0 < new < old)
    assert ("first updates are long" in one.text) == (new > old)


@pytest.mark.parametrize(
    ("made", "go"),
    [
        ({}, True),
        ({"optimizer": "asymmetric-scaled"}, True),
        ({"optimizer": "copy"}, False),
        ({"optimizer": "drop"}, False),
        ({"optimizer": "copy", "init": "zero-copy"}, True),
        ({"optimizer": "copy", "init": "random-copy"}, True),
        ({"source": "without state"}, False),
        ({"source": "without state", "init": "zero-copy"}, True),
    ],
    ids=str,
)
def test_the_state_of_copies_is_judged_by_the_manifest(
    made: dict[str, str], go: bool, dense_checkpoint: Path, tmp_path: Path
) -> None:
    """Copies that began with their sources' state: no-go however far they are apart; others may go on.

    Two AdamWs show what the distance is worth: under the same gradients and state, but another learning
    rate, two entries are no longer equal.
    """
    pair = [torch.nn.Parameter(torch.ones(8)) for _ in range(2)]
    optimizers = [torch.optim.AdamW([p], lr=rate) for p, rate in zip(pair, (1e-2, 1.3e-2), strict=True)]
    for p, optimizer in zip(pair, optimizers, strict=True):
        p.grad = torch.arange(1.0, 9.0)
        optimizer.step()
    assert not torch.equal(*pair)
    source = dense_checkpoint
    if made.pop("source", ""):
        source = shutil.copytree(dense_checkpoint, tmp_path / "source")
        (source / "optimizer.pt").unlink()
    target = tmp_path / "wide"
    api.expand(source, target, axes={"ffn": 2}, report="none", allow_locked=True, **made)
    trained = later(target, tmp_path / "trained", noise(0.01))
    verdict = api.inspect(trained, target, activations=False).verdict
    assert verdict is not None and verdict.headline.startswith("Go:") == go
    assert ("By the manifest" in str(verdict)) == (not go)
    assert "0% of new channels are still equal" in str(verdict)


def test_what_training_moved_is_not_laid_to_the_widening(
    wide: Path, dense_checkpoint: Path, tmp_path: Path
) -> None:
    """Against the source, with steps of training between: it says so, and what to compare with."""
    made = shutil.copytree(wide, tmp_path / "wide")
    trained = later(made, tmp_path / "trained", noise(3.0))
    verdict = api.inspect(trained, dense_checkpoint).verdict
    assert verdict is not None and verdict.headline.startswith("20 steps of training lie between")
    assert f"sparkling inspect {trained} --against {made}." in str(verdict)
    straight = api.inspect(made, dense_checkpoint).verdict
    assert straight is not None and straight.headline == "Signal kept."


def test_before_the_first_step_there_is_nothing_to_stop(wide: Path) -> None:
    """All copies are their sources, as they should be."""
    verdict = api.inspect(wide, wide, activations=False).verdict
    assert verdict is not None and verdict.headline == "Go: train on."
    assert "Nothing was trained" in str(verdict)
