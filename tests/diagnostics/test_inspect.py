"""``sparkling inspect``: facts, statistics and comparisons of real checkpoints, for people and machines."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diagnostics_support import opened
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from sparkling_cli.cli import console as cli_console
from sparkling_cli.cli.app import app
from sparkling_cli.diagnostics.inspect import inspect_checkpoint
from sparkling_cli.diagnostics.measurement import compare
from sparkling_cli.report import terminal
from sparkling_cli.report.sparkline import sparkline
from sparkling_cli.results.commands import document
from sparkling_cli.results.measured import LayerStat, Measurement, StreamStat
from sparkling_cli.results.verdict import offenders

CODES = "\x1b["


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs ``sparkling`` in this process, without a terminal, 100 columns wide."""
    monkeypatch.setenv("COLUMNS", "100")

    def invoke(*arguments: str | Path) -> Result:
        monkeypatch.setattr(cli_console.output, "as_json", False)
        return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)

    return invoke


def strict(text: str) -> Any:
    """JSON that holds no NaN or infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("name", ["dense_checkpoint", "moe_checkpoint"])
def test_state_is_listed_under_parameter_names(name: str, request: pytest.FixtureRequest) -> None:
    """Each parameter's moments have their RMS, as torch's own loader sees them."""
    path: Path = request.getfixturevalue(name)
    report = inspect_checkpoint(path, activations=False)
    state = torch.load(path / "optimizer.pt", weights_only=True)["state"]
    squares = sum(float(s["exp_avg"].double().square().sum()) for s in state.values())
    found = [stat for stat in report.weights.tensors if stat.slot == "exp_avg"]
    assert sum(stat.rms**2 * stat.entries for stat in found) == pytest.approx(squares, rel=1e-9)
    assert sum(stat.tensors for stat in found) == len(state)
    assert not any(stat.role.isdigit() or stat.role == "*" for stat in found)
    weights = load_file(path / "model.safetensors")
    assert report.parameters == sum(w.numel() for w in weights.values())
    assert report.step == 600
    assert report.activations is None


def test_report_of_one_checkpoint(moe_checkpoint: Path, heldout_text: Path) -> None:
    """Weights, state and activations on the user's own text, as JSON without a single NaN."""
    report = inspect_checkpoint(moe_checkpoint, data=heldout_text, sequences=4, length=64)
    data = strict(json.dumps(document(report)))
    assert data["tokens"].startswith("heldout.txt")
    assert data["random_tokens"] is False
    names = [layer["name"] for layer in data["activations"]["layers"]]
    assert "model.layers.0.mlp.experts.down_proj" in names
    assert 3.0 < data["activations"]["loss"] < 4.0  # the fixtures' held-out loss is 3.46
    assert data["change"] is None


def test_against_itself(dense_checkpoint: Path) -> None:
    """Nothing changed: every deviation is exactly zero and the verdict says so."""
    report = inspect_checkpoint(dense_checkpoint, against=dense_checkpoint, sequences=2, length=32)
    assert report.change is not None
    assert {entry.deviation for entry in (*report.change.layers, *report.change.functions)} == {0.0}
    assert "equal to the last bit" in str(report.verdict)
    assert report.symmetry is None


def test_expanded_checkpoint(dense_checkpoint: Path, tmp_path: Path) -> None:
    """Against its source the change is shown; against itself the meter finds every copy locked."""
    from sparkling_cli import api

    wide = tmp_path / "wide"
    api.expand(dense_checkpoint, wide, axes=[{"axis": "ffn", "factor": 1.5}], report="none")
    report = inspect_checkpoint(wide, against=dense_checkpoint, sequences=2, length=64)
    assert report.symmetry is None
    assert report.change is not None
    assert offenders(report.change) == []
    assert report.change.logit_largest is not None
    assert report.change.logit_largest > 1e-3  # 1.5x keeps the signal, not the function
    locked = inspect_checkpoint(wide, against=wide, activations=False).symmetry
    assert locked is not None
    assert (locked.locked, locked.distance) == (1.0, 0.0)
    text = printed(terminal.symmetry_table(locked), width=80)
    assert "100%" in text


def test_a_tied_head_is_judged_with_the_norm_that_carries_its_factor(
    moe_checkpoint: Path, tmp_path: Path
) -> None:
    """At 2x hidden the final norm is halved in a tied head's stead: that is no change of the signal."""
    from sparkling_cli import api

    wide = tmp_path / "wide"
    api.expand(moe_checkpoint, wide, axes=[{"axis": "hidden", "factor": 2}], report="none")
    for against in (moe_checkpoint, wide):
        change = inspect_checkpoint(wide, against=against, sequences=2, length=32).change
        assert change is not None
        assert max(layer.moved for layer in change.layers) < 1e-5
        assert change.logit_largest is not None
        assert change.logit_largest < 1e-5


def test_without_a_tokenizer_tokens_are_random(dense_checkpoint: Path, tmp_path: Path) -> None:
    """A bare model directory is measured on random tokens, and that is said."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(dense_checkpoint / name, tmp_path)
    report = inspect_checkpoint(tmp_path, sequences=2, length=16)
    assert report.random_tokens
    assert report.tokens.startswith("RANDOM")
    assert report.activations is not None


def test_weights_are_measured_when_no_model_can_be_built(dense_checkpoint: Path, tmp_path: Path) -> None:
    """An unknown class still gives weight statistics, and a note says why there is nothing more."""
    shutil.copy(dense_checkpoint / "model.safetensors", tmp_path)
    config = json.loads((dense_checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "model_type": "unheard_of", "architectures": ["Unheard"]})
    )
    report = inspect_checkpoint(tmp_path)
    assert report.activations is None
    assert any("not measured" in note and "unheard_of" in note for note in report.notes)
    assert len(report.weights.tensors) > 10


def test_a_plain_dictionary(tmp_path: Path) -> None:
    """One file of weights and AdamW state of nobody's class: measured, state by number, with reasons."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    report = inspect_checkpoint(tmp_path / "ckpt.pt")
    found = {(stat.label, stat.slot): stat for stat in report.weights.tensors}
    weight = model[0].weight.detach().double()
    assert found["0.weight", ""].rms == pytest.approx(float(weight.square().mean().sqrt()))
    moment = optimizer.state[model[1].weight]["exp_avg"].double()
    assert found["2", "exp_avg"].rms == pytest.approx(float(moment.square().mean().sqrt()))
    assert any("by number" in note for note in report.notes)
    assert any("no model can be built" in note for note in report.notes)
    strict(json.dumps(document(report)))


def test_nan_is_named(dense_checkpoint: Path, tmp_path: Path, command: Callable[..., Result]) -> None:
    """A NaN in a weight is a warning of the command, and JSON stays strict."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dense_checkpoint / name, tmp_path)
    weights = load_file(dense_checkpoint / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = command("inspect", tmp_path, "--json", "--length", "16", "--sequences", "1")
    assert done.exit_code == 0, done.stderr
    data = strict(done.stdout)
    assert data["weights"]["nonfinite"] == ["model.layers.1.mlp.up_proj.weight"]
    done = command("inspect", tmp_path, "--no-activations")
    assert "layers.1.mlp.up_proj.weight weights: 1 NaN, 0 Inf" in done.stderr


def test_command_for_people(dense_checkpoint: Path, command: Callable[..., Result]) -> None:
    """Tables without escape codes where there is no terminal; no line wider than the screen."""
    done = command("inspect", dense_checkpoint, "--against", dense_checkpoint, "--length", "16")
    assert done.exit_code == 0, done.stderr
    assert "RMS of weights and optimizer state" in done.stdout
    assert "Signal kept" in done.stdout
    assert CODES not in done.stdout + done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= 100


def test_missing_checkpoint(tmp_path: Path) -> None:
    """A path that is not there is a checkpoint error with its exit code, not a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "sparkling_cli", "inspect", str(tmp_path / "nowhere")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert "nowhere" in done.stderr


def printed(*renderables: Any, width: int, **options: Any) -> str:
    """Renderables as text."""
    console = Console(width=width, record=False, file=None, **options)
    with console.capture() as capture:
        for renderable in renderables:
            console.print(renderable)
    return capture.get()


@pytest.mark.parametrize("width", [80, 120])
def test_worst_layers_come_first(width: int) -> None:
    """The table is sorted by deviation and fits the screen; more rows than the limit are left out."""
    before = Measurement(
        layers=(),
        functions=tuple(LayerStat.of(f"model.layers.{i}.mlp", 1.0, 1.0, 1) for i in range(40)),
        stream=(StreamStat(name="embeddings", rms=0.1), StreamStat(name="model.layers.0", rms=1.0)),
        logits_rms=3.0,
        loss=2.0,
        vocabulary=512,
    )
    moved = tuple(LayerStat.of(f"model.layers.{i}.mlp", 1.0, 1.0 + i / 100, 1) for i in range(40))
    after = before.model_copy(update={"functions": moved})
    text = printed(*terminal.change_tables(compare(before, after)), width=width)
    rows = [line for line in text.splitlines() if ".mlp" in line]
    assert len(rows) == terminal.ROWS
    assert rows[0].split()[0] == "layers.39.mlp"
    assert rows[0].split()[-1] == "+39%"
    assert max(len(line) for line in text.splitlines()) <= width
    everything = printed(*terminal.change_tables(compare(before, after), rows=None), width=width)
    assert everything.count(".mlp") == 40


def test_what_is_unchanged_is_one_line_and_two_lines_share_a_scale() -> None:
    """Rows that only rounding moved are counted; half the stream is not drawn like the whole."""
    before = Measurement(
        layers=(),
        functions=tuple(LayerStat.of(f"model.layers.{i}.mlp", 1.0, 1.0, 1) for i in range(9)),
        stream=(StreamStat(name="embeddings", rms=0.1), StreamStat(name="model.layers.0", rms=10.0)),
        logits_rms=3.0,
        loss=2.0,
        vocabulary=512,
    )
    moved = (LayerStat.of("model.layers.0.mlp", 1.0, 1.2, 1), *before.functions[1:])
    stream = (before.stream[0], StreamStat(name="model.layers.0", rms=1.0))
    after = before.model_copy(update={"functions": moved, "stream": stream})
    text = printed(*terminal.change_tables(compare(before, after)), width=80)
    assert text.count(".mlp") == 1 and "8 others" in text and "unchanged" in text
    assert "▁█ 0.1 to 10 before" in text and "▁▄ 0.1 to 1 after" in text
    calm = printed(*terminal.change_tables(compare(before, before)), width=80)
    assert ".mlp" not in calm and "all 9" in calm


def test_colour_only_where_it_is_wanted(dense_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_COLOR takes the colours away, on a terminal too."""
    report = inspect_checkpoint(dense_checkpoint, against=dense_checkpoint, sequences=1, length=8)
    assert report.change is not None
    (table,) = terminal.change_tables(report.change)
    assert "\x1b[32m" in printed(table, width=100, force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in printed(table, width=100, force_terminal=True, color_system="standard")


def test_sparklines() -> None:
    """Bars follow the logarithm; equal values are flat; what is not finite is marked."""
    assert sparkline([1, 10, 100], logarithmic=True) == "▁▅█"
    assert sparkline([1, 10, 100]) == "▁▁█"
    assert len(set(sparkline([2.0, 2.0, 2.01], logarithmic=True))) == 1
    assert sparkline([1.0, float("nan"), 2.0], logarithmic=True) == "▁\u00d7█"
    assert sparkline([]) == ""


def test_opening_by_hand_and_by_format_agree(dense_checkpoint: Path) -> None:
    """The package's reader and the tests' own find the same weights at the same places."""
    from sparkling_cli.formats.detect import open_checkpoint
    from sparkling_cli.storage.read import TensorSource

    with (
        TensorSource(open_checkpoint(dense_checkpoint)) as one,
        TensorSource(opened(dense_checkpoint)) as two,
    ):
        for name, tensor in load_file(dense_checkpoint / "model.safetensors").items():
            assert torch.equal(one.weight(name), tensor)
            assert torch.equal(two.weight(name), tensor)
