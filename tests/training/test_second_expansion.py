"""Expanded, trained, expanded again: the paper's run of two stages, through the real commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from fixtures.tiny import build_trainer
from sparkling_cli.api import expand, verify, write_schedule
from sparkling_cli.schedule.rewarmup import read_rewarmup
from sparkling_cli.training import SparklingCallback, read_history
from tests.conftest import TinyCheckpoint

TE1, TE2, END = 4, 6, 8


class SaveAt(TrainerCallback):
    """Ask for a checkpoint at a step and end there."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """On resume the Trainer keeps the first run's interval, so ask."""
        control.should_save = control.should_training_stop = state.global_step == TE2


def widen(source: Path, destination: Path, axis: str) -> Path:
    """Twice as wide along one axis."""
    axes = [{"axis": axis, "factor": 2}]
    rewarmup = {"steps": 1, "rho": 2.0}
    return expand(source, destination, report="none", threads=1, axes=axes, rewarmup=rewarmup).destination


def go_on(wide: Path, out: Path, *others: TrainerCallback) -> torch.nn.Module:
    """Train from an expanded checkpoint with the callback; ends at END or where another callback says."""
    model = AutoModelForCausalLM.from_pretrained(wide)
    callbacks = (SparklingCallback(wide), *others)
    build_trainer(model, out, max_steps=END, callbacks=callbacks).train(resume_from_checkpoint=str(wide))
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("axis", ["ffn", "hidden"])
def test_two_stages(axis: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """Stage two's entries are tracked beside stage one's, whose schedule goes on to the end."""
    first = widen(tiny_checkpoint("llama", steps=TE1), tmp_path / "first", "ffn")
    go_on(first, tmp_path / "run", SaveAt())
    trained = tmp_path / "run" / f"checkpoint-{TE2}"
    second = widen(trained, tmp_path / "second", axis)

    one, two = read_rewarmup(first), read_rewarmup(second)
    assert [(s.stage, s.expansion_step) for s in two.stages] == [(1, TE1), (2, TE2)]
    for step in range(TE2, END):
        assert two.curves[0].ratio(step) == one.curves[0].ratio(step)

    again = write_schedule(second, rewarmup={"rho": 3.0})
    assert again.stages[0] == two.stages[0] and again.stages[1].rho == 3.0
    verify(trained, second)

    history = read_history(second)
    config = json.loads((first / "config.json").read_text())
    ffn, hidden = config["intermediate_size"], config["hidden_size"]
    region = history.region("model.layers.0.mlp.up_proj.weight", history_shape(second))
    if axis == "ffn":
        assert history.births["ffn"] == [(0, ffn // 2, 0), (ffn // 2, ffn, 1), (ffn, 2 * ffn, 2)]
        assert [region.count(stage) for stage in (0, 1, 2)] == [
            ffn // 2 * hidden,
            ffn // 2 * hidden,
            ffn * hidden,
        ]
    else:
        assert history.births["hidden"] == [(0, hidden, 0), (hidden, 2 * hidden, 2)]
        # stage two is the new columns of all rows, stage one the younger rows of the old columns
        assert [region.count(stage) for stage in (1, 2)] == [ffn // 2 * hidden, ffn * hidden]

    before = AutoModelForCausalLM.from_pretrained(second).state_dict()
    after = go_on(second, tmp_path / "end").state_dict()
    assert all(not torch.equal(before[name], value) for name, value in after.items())
    assert all(value.isfinite().all() for value in after.values())


def history_shape(checkpoint: Path) -> tuple[int, ...]:
    """Shape of the first up projection."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    return tuple(model.get_parameter("model.layers.0.mlp.up_proj.weight").shape)


def test_an_expansion_without_a_schedule_keeps_its_number(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """If the first expansion had no schedule, the second one's is for stage two all the same."""
    first = widen(tiny_checkpoint("llama", steps=TE1), tmp_path / "first", "ffn")
    for name in ("rewarmup.json", "rewarmup.csv"):
        (first / "sparkling" / name).unlink()
    second = widen(first, tmp_path / "second", "ffn")
    assert [s.stage for s in read_rewarmup(second).stages] == [2]
    assert {stage for _, _, stage in read_history(second).births["ffn"]} == {0, 1, 2}
