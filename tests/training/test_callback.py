"""The callback in transformers' own ``Trainer``: attached, saved, killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback

from fixtures.tiny import build_trainer
from sparkling_cli.api import expand
from sparkling_cli.errors import SpecError
from sparkling_cli.training import SparklingCallback, read_history
from tests.conftest import TinyCheckpoint

ROOT = Path(__file__).resolve().parents[2]
TE, STOP, END = 4, 6, 8


@pytest.fixture(scope="module")
def wide(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 after real steps, ffn twice as wide."""
    source = tiny_checkpoint("qwen3", steps=TE)
    destination = tmp_path_factory.mktemp("wide") / "expanded"
    options: dict[str, Any] = {"axes": [{"axis": "ffn", "factor": 2}], "rewarmup": {"steps": 1, "rho": 3.0}}
    return expand(source, destination, report="none", threads=1, **options).destination


class Die(TrainerCallback):
    """Ends the process the hard way once the checkpoint of step STOP is on disk."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a checkpoint: on resume the Trainer keeps the first run's interval."""
        control.should_save = state.global_step == STOP

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After all other callbacks of the save."""
        if state.global_step == STOP:
            os._exit(9)


def run(
    resume: Path, out: Path, wide: Path, *, callback: bool = True, others: tuple[TrainerCallback, ...] = ()
) -> dict[str, torch.Tensor]:
    """Train from ``resume`` to the end of the schedule; the parameters then."""
    model = AutoModelForCausalLM.from_pretrained(resume)
    mine = (SparklingCallback(wide),) if callback else ()
    trainer = build_trainer(model, out, max_steps=END, callbacks=(*mine, *others))
    trainer.train(resume_from_checkpoint=str(resume))
    assert trainer.state.global_step == END
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def run_and_die(wide: str, out: str) -> None:
    """What the killed process does."""
    run(Path(wide), Path(out), Path(wide), others=(Die(),))


def test_killed_and_resumed_is_the_same_run(wide: Path, tmp_path: Path) -> None:
    """Killed after step 6 of 8 and resumed: bit for bit the run that was not killed."""
    whole = run(wide, tmp_path / "whole", wide)
    code = (
        "import sys, torch; torch.set_num_threads(1);"
        "from tests.training.test_callback import run_and_die; run_and_die(*sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, str(wide), str(tmp_path / "killed")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 9, done.stderr[-4000:]
    checkpoint = tmp_path / "killed" / f"checkpoint-{STOP}"
    resumed = run(checkpoint, tmp_path / "resumed", wide)
    forgotten = run(checkpoint, tmp_path / "forgotten", wide, callback=False)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    assert any(not torch.equal(value, forgotten[name]) for name, value in whole.items())

    # the checkpoint that training wrote carries the history and the counter
    assert read_history(checkpoint) == read_history(wide)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["SparklingCallback"]["attributes"] == {"resumed": {"steps": [STOP]}}
    # and can itself take the expanded directory's place
    own = run(checkpoint, tmp_path / "own", checkpoint)
    for name, value in whole.items():
        assert torch.equal(value, own[name]), name


def test_the_log_has_the_new_entries_rate(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside ``learning_rate``: in the history, for a logger after the callback, and by Eq. 27-28."""
    seen: dict[int, float] = {}

    class Logger(TrainerCallback):
        """Any reporting callback."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "learning_rate" in logs:
                seen[state.global_step] = logs["learning_rate_new"]

    model = AutoModelForCausalLM.from_pretrained(wide)
    trainer = build_trainer(
        model, tmp_path / "run", max_steps=END, callbacks=(SparklingCallback(wide), Logger())
    )
    trainer.args.logging_steps = 1
    trainer.train(resume_from_checkpoint=str(wide))
    history = {e["step"]: e for e in trainer.state.log_history if "learning_rate_new" in e}
    assert list(history) == list(seen) == list(range(TE + 1, END + 1))
    rewarmup = read_history(wide).rewarmup
    for step, entry in history.items():
        assert entry["learning_rate_new"] == seen[step]
        # the entry of step t has what the t-th step used
        wanted = rewarmup.curves[0].eta_new(step - 1)
        assert entry["learning_rate_new"] == pytest.approx(wanted, rel=1e-9)
        assert entry["learning_rate"] == pytest.approx(rewarmup.baseline(step - 1), rel=1e-9)
    entries = sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n) // 2
    line = f"re-warming {entries:,} entries in 6 tensors until step {TE + 1}: 3 x, then as the rest"
    assert line in capsys.readouterr().err


def test_the_log_has_the_loss_against_the_runs_line(wide: Path, tmp_path: Path) -> None:
    """A log of before the expansion that lies on a line gives the line; a short one gives nothing."""
    source = tmp_path / "wide"
    shutil.copytree(wide, source)
    for count in (1, 4):
        past = [{"step": s, "loss": 5 - log(s), "learning_rate": 0.1} for s in (2, 3, 4)] * count
        state = json.loads((wide / "trainer_state.json").read_text())
        (source / "trainer_state.json").write_text(json.dumps({**state, "log_history": past}))
        model = AutoModelForCausalLM.from_pretrained(source)
        trainer = build_trainer(
            model, tmp_path / str(count), max_steps=END, callbacks=(SparklingCallback(source),)
        )
        trainer.args.logging_steps = 1
        trainer.train(resume_from_checkpoint=str(source))
        found = {e["step"]: e for e in trainer.state.log_history if "loss_above_forecast" in e}
        assert list(found) == (list(range(TE + 1, END + 1)) if count > 1 else [])
        for step, entry in found.items():
            assert entry["loss_above_forecast"] == pytest.approx(entry["loss"] - 5 + log(step))


def test_tensorboard_has_the_new_entries_rate(wide: Path, tmp_path: Path) -> None:
    """Placed before the Trainer's own reporters, the callback's figures are in the file that they write."""
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = AutoModelForCausalLM.from_pretrained(wide)
    trainer = build_trainer(model, tmp_path, max_steps=END, report_to=["tensorboard"])
    trainer.callback_handler.callbacks.insert(0, SparklingCallback(wide, measure_every=1))
    trainer.train(resume_from_checkpoint=str(wide))
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    rewarmup = read_history(wide).rewarmup
    found = {event.step: event.value for event in events.Scalars("train/learning_rate_new")}
    assert list(found) == list(range(TE + 1, END + 1))
    for step, rate in found.items():
        assert rate == pytest.approx(rewarmup.curves[0].eta_new(step - 1), rel=1e-6)
    entries = [e for e in trainer.state.log_history if "update_rms_new" in e]
    assert [e["step"] for e in entries] == list(found)
    # rho is 3: once re-warmed, entries without a past move further than those that have one
    assert entries[-1]["update_rms_new"] > entries[-1]["update_rms_old"] > 0
    shares = [e.value for e in events.Scalars("train/share_locked")]
    assert len(shares) == len(entries) and shares[0] > shares[-1]  # copies part
    cosines = [e.value for e in events.Scalars("train/cosine_of_copies")]
    assert len(cosines) == len(entries) and cosines == sorted(cosines, reverse=True) and cosines[-1] < 1
    assert [e.value for e in events.Scalars("train/update_rms_old")] == pytest.approx(
        [e["update_rms_old"] for e in entries]
    )


def test_the_console_has_the_new_entries_rate(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every line that the Trainer prints: placed first, or given to it when it is made."""
    for first in (True, False):
        model = AutoModelForCausalLM.from_pretrained(wide)
        mine = SparklingCallback(wide)
        given = {} if first else {"callbacks": (mine,)}
        trainer = build_trainer(model, tmp_path / str(first), max_steps=END, **given)
        trainer.add_callback(PrinterCallback)  # the Trainer's own, last, as the Trainer places it
        if first:
            trainer.callback_handler.callbacks.insert(0, mine)
        trainer.args.logging_steps = 1
        trainer.train(resume_from_checkpoint=str(wide))
        printed = [line for line in capsys.readouterr().out.splitlines() if "'learning_rate'" in line]
        assert len(printed) == END - TE
        assert all("'learning_rate_new'" in line for line in printed)


def test_only_new_entries_move_otherwise(wide: Path, tmp_path: Path) -> None:
    """In the first steps the callback changes new ffn entries by the curve's ratio, and no old entry."""
    with_hooks, plain = (
        first_step(wide, tmp_path / str(callback), callback=callback) for callback in (True, False)
    )
    start = {n: p.detach() for n, p in AutoModelForCausalLM.from_pretrained(wide).named_parameters()}
    history = read_history(wide)
    # two steps: the ratio is 1 at step TE; what differs was done by the step after
    curve = history.rewarmup.curves[0]
    assert curve.ratio(TE) == 1.0
    assert curve.ratio(TE + 1) > 2.0
    for name, value in with_hooks.items():
        region = history.region(name, tuple(value.shape))
        new = torch.zeros(region.view, dtype=torch.bool)
        for box in region.boxes(1):
            new[tuple(slice(a, b) for a, b in box)] = True
        new = new.view(value.shape)
        assert torch.equal(value[~new], plain[name][~new]), name
        if new.any():
            assert not torch.equal(value[new], plain[name][new]), name
            assert not torch.equal(value, start[name])


def first_step(wide: Path, out: Path, *, callback: bool) -> dict[str, torch.Tensor]:
    """The parameters after two steps from the expansion on."""
    model = AutoModelForCausalLM.from_pretrained(wide)
    mine = (SparklingCallback(wide),) if callback else ()
    trainer = build_trainer(model, out, max_steps=END, stop_at=TE + 2, callbacks=mine)
    trainer.train(resume_from_checkpoint=str(wide))
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_run_that_begins_too_early_is_refused(wide: Path, tmp_path: Path) -> None:
    """Training from step 0 on the wide weights is not the run that the schedule is for."""
    model = AutoModelForCausalLM.from_pretrained(wide)
    trainer = build_trainer(model, tmp_path, max_steps=END, callbacks=(SparklingCallback(wide),))
    with pytest.raises(SpecError, match="resume_from_checkpoint"):
        trainer.train()


def test_a_second_run_of_one_callback_begins_again(wide: Path, tmp_path: Path) -> None:
    """Two runs of one Trainer from the expanded checkpoint: the second one's rates are the first one's."""
    callback = SparklingCallback(wide)
    model = AutoModelForCausalLM.from_pretrained(wide)
    trainer = build_trainer(model, tmp_path, max_steps=END, callbacks=(callback,))
    trainer.args.logging_steps = 1
    rates = []
    for _ in range(2):
        trainer.train(resume_from_checkpoint=str(wide))
        assert callback.state_dict() == {"steps": [END]}
        logged = [entry for entry in trainer.state.log_history if "learning_rate_new" in entry]
        rates.append([(entry["step"], entry["learning_rate_new"]) for entry in logged])
    assert rates[0] == rates[1] and len(rates[0]) > 1
