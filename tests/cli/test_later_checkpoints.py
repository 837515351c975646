"""What ``verify`` says of checkpoints that were trained on from an output; which of several is proposed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sparkling_cli import api
from sparkling_cli.training import carry_history
from tests.cli.test_expand_command import Command


@pytest.fixture
def sparkling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line, on a narrow screen."""
    monkeypatch.setenv("COLUMNS", "80")
    return Command(monkeypatch, capsys)


@pytest.fixture
def run(dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``my run`` with a source at step 600 and an output of it, below the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dense_checkpoint, "my run/checkpoint-600")
    api.expand("my run/checkpoint-600", "wide run/checkpoint-600", axes={"ffn": 2}, report="none")
    return tmp_path


def _trained(output: Path, target: Path, step: int | None) -> None:
    """What a run may have written later: other weights, a later step (None: not said)."""
    if target != output:
        shutil.copytree(output, target, ignore=shutil.ignore_patterns("sparkling"))
        carry_history(output, target)
    weights = {name: 1.01 * tensor for name, tensor in load_file(target / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    if step is None:
        (target / "trainer_state.json").unlink()
        (target / "optimizer.pt").unlink()
    else:
        state = json.loads((target / "trainer_state.json").read_text())
        (target / "trainer_state.json").write_text(json.dumps({**state, "global_step": step}))


def _pasted(err: str) -> list[str]:
    """The last command of a message, as a shell would take it; a line's end would stay in a word."""
    command = err[err.rindex("sparkling ") :].split(", where")[0].strip()
    assert "\n" not in command
    return shlex.split(command)


@pytest.mark.parametrize("step", [640, None])
def test_trained_work_is_not_called_damaged(sparkling: Command, run: Path, step: int | None) -> None:
    """No word of deleting; the command that is proposed runs, and looks at that checkpoint."""
    later = Path("wide run/checkpoint-640")
    _trained(Path("wide run/checkpoint-600"), later, step)
    done = sparkling("verify", "my run/checkpoint-600", later)
    assert done.code == 8 and "remove" not in done.err and "expand again" not in done.err
    message = " ".join(done.err.split())
    assert "is a later checkpoint, trained on from an output" in message
    assert ("at step 640, the expansion at 600" in message) == (step is not None)
    words = _pasted(done.err)
    assert words == ["sparkling", "inspect", str(later), "--against", "wide run/checkpoint-600"]
    looked = sparkling(*words[1:], "--no-activations")
    assert "new channels are still equal" in looked.out and looked.code == 8  # they were all scaled alike


def test_an_output_that_a_run_wrote_into(sparkling: Command, run: Path) -> None:
    """All of its own files are there, and the step tells; the output to compare with is gone."""
    output = Path("wide run/checkpoint-600")
    _trained(output, output, 640)
    done = sparkling("verify", "my run/checkpoint-600", output)
    assert done.code == 8 and "later checkpoint" in " ".join(done.err.split())
    assert "remove" not in done.err and "OUTPUT is what `sparkling expand` wrote" in " ".join(
        done.err.split()
    )


def test_a_damaged_output_is_not_taken_for_a_later_one(sparkling: Command, run: Path) -> None:
    """At the expansion's own step it is what was written, or damaged."""
    output = Path("wide run/checkpoint-600")
    _trained(output, output, 600)
    done = sparkling("verify", "my run/checkpoint-600", output)
    assert done.code == 8 and "is not what was written" in done.err
    assert "expand again, under another name" in " ".join(done.err.split()) and "remove" not in done.err


def test_which_of_several_is_proposed(sparkling: Command, run: Path) -> None:
    """To widen, the latest step that is no output; to prove or to look up rates, an output."""
    folder = Path("my run")
    shutil.copytree(folder / "checkpoint-600", folder / "checkpoint-90")
    for name in ("checkpoint-600-q_per_kv1.5x", "checkpoint-600-vocab2x"):
        shutil.copytree("wide run/checkpoint-600", folder / name)
    widened = sparkling("expand", "my run", "--axis", "ffn=2")
    assert widened.code == 4 and "choose one: 'my run/checkpoint-600'\n" in widened.err
    for command in (("verify", "my run/checkpoint-600", "my run"), ("schedule", "my run")):
        done = sparkling(*command)
        assert done.code == 4 and "is a folder of checkpoints: checkpoint-90, checkpoint-600" in done.err
        assert "choose one: 'my run/checkpoint-600-vocab2x'\n" in done.err
        chosen = shlex.split(done.err.split("choose one: ")[1])
        assert sparkling(*command[:-1], *chosen).code == 0


def test_hints_can_be_pasted(sparkling: Command, run: Path) -> None:
    """Commands and paths in hints and findings, on 80 columns, of paths with spaces and long ones."""
    deep = Path("a run/" + "/".join(f"a long name of a folder {n}" for n in range(4)))
    shutil.copytree("wide run/checkpoint-600", deep)
    swapped = sparkling("verify", deep, "my run/checkpoint-600")
    assert _pasted(swapped.err) == ["sparkling", "verify", "my run/checkpoint-600", str(deep)]
    inside = sparkling("inspect", deep / "model.safetensor")
    assert shlex.split(re.findall(r"did you mean\s(.*)\?", inside.err)[0]) == [
        str(deep / "model.safetensors")
    ]
    part = sparkling("expand", "my run/checkpoint-600/config.json", "--axis", "ffn=2")
    assert shlex.split(part.err.split("give its folder,")[1]) == ["my run/checkpoint-600"]
    made = sparkling(
        "expand", "my run/checkpoint-600", "other run/out", "--axis", "ffn=2", "--report", "none"
    )
    page = next(line for line in made.out.splitlines() if line.startswith("report "))
    assert shlex.split(page)[1:] == ["other run/out/sparkling/report.html"]
