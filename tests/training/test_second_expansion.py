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
from sparkling_cli.errors import CheckpointError, SpecError
from sparkling_cli.schedule.rewarmup import read_rewarmup
from sparkling_cli.training import SparklingCallback, carry_history, read_history
from tests.conftest import TinyCheckpoint

TE1, TE2, END = 4, 6, 8


class SaveAt(TrainerCallback):
    """Ask for a checkpoint at a step and end there."""

    def __init__(self, step: int = TE2) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """On resume the Trainer keeps the first run's interval, so ask."""
        control.should_save = control.should_training_stop = state.global_step == self.step


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


def restarted(wide: Path, out: Path) -> Path:
    """Trained on from an expanded checkpoint's weights alone: the counter of steps begins anew."""
    model = AutoModelForCausalLM.from_pretrained(wide)
    build_trainer(model, out, max_steps=END, callbacks=(SaveAt(TE1 - 1),)).train()
    found: Path = out / f"checkpoint-{TE1 - 1}"
    carry_history(wide, found)
    return found


def test_a_counter_that_began_anew(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """Refused, as no curve goes back before its expansion; both ways out that the message names work."""
    first = widen(tiny_checkpoint("llama", steps=TE1), tmp_path / "first", "ffn")
    source = restarted(first, tmp_path / "again")
    with pytest.raises(
        CheckpointError, match=rf"step {TE1 - 1} lies before expansion 1 .* at step {TE1}"
    ) as one:
        widen(source, tmp_path / "second", "ffn")
    assert not (tmp_path / "second").exists()
    assert f"--expansion-step with the optimizer steps done in the whole run, {TE1} or more" in str(one.value)
    moved = source / "sparkling" / "rewarmup.json"
    assert f"move {moved} away" in str(one.value)

    axes, options = [{"axis": "ffn", "factor": 2}], {"report": "none", "threads": 1}
    with pytest.raises(SpecError, match=f"expansion step {TE1 - 2} lies before"):
        expand(source, tmp_path / "second", axes=axes, baseline={"expansion_step": TE1 - 2}, **options)
    whole = {"expansion_step": 2 * TE1 - 1, "total_steps": 3 * TE1}
    expand(source, tmp_path / "second", axes=axes, baseline=whole, **options)
    assert [s.expansion_step for s in read_rewarmup(tmp_path / "second").stages] == [TE1, 2 * TE1 - 1]
    verify(source, tmp_path / "second")

    moved.rename(tmp_path / "rewarmup.json")
    third = widen(source, tmp_path / "third", "ffn")
    assert [(s.stage, s.expansion_step) for s in read_rewarmup(third).stages] == [(2, TE1 - 1)]
    verify(source, third)
    model = AutoModelForCausalLM.from_pretrained(third)
    callback = SparklingCallback(third)
    trainer = build_trainer(model, tmp_path / "run", max_steps=END, callbacks=(callback,))
    trainer.train(resume_from_checkpoint=str(third))
    assert callback.state_dict() == {"steps": [END]}


def test_an_earlier_versions_file_out_of_order(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """It is not read, and can be written anew as the message says."""
    first = widen(tiny_checkpoint("llama", steps=TE1), tmp_path / "first", "ffn")
    second = widen(first, tmp_path / "second", "ffn")
    file = second / "sparkling" / "rewarmup.json"
    data = json.loads(file.read_text())
    data["stages"][1]["expansion_step"] = TE1 - 1
    (second / "sparkling" / "files.crc32").unlink()
    file.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"expansion 2 at step .* lies before expansion 1") as caught:
        read_history(second)
    assert "sparkling schedule CKPT --write --expansion-step N" in str(caught.value.hint)
    write_schedule(second, baseline={"expansion_step": TE1 + 1})
    assert [s.expansion_step for s in read_history(second).rewarmup.stages] == [TE1, TE1 + 1]
