"""Checkpoints whose parts contradict each other, or miss a part: refused or named, with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparkling_cli import api
from sparkling_cli.errors import CheckpointError, ExitCode, SparklingError
from sparkling_cli.plan.model import Plan
from sparkling_cli.spec.sources import make_spec
from tests.conftest import TinyCheckpoint


@pytest.fixture
def source(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    """A copy of a tiny Trainer checkpoint."""
    copy = tmp_path / "checkpoint-3"
    shutil.copytree(tiny_checkpoint("llama"), copy)
    return copy


def planned(source: Path, **fields: Any) -> Plan:
    """The plan of an expansion of the MLPs."""
    return api.make_plan(source, spec=make_spec({"axes": [{"axis": "ffn", "factor": 2}], **fields})).plan


def edit_optimizer(source: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change ``optimizer.pt`` and save it again."""
    data = torch.load(source / "optimizer.pt", weights_only=True)
    edit(data)
    torch.save(data, source / "optimizer.pt")


@pytest.mark.parametrize(("lost", "left"), [("exp_avg", "exp_avg_sq"), ("exp_avg_sq", "exp_avg")])
def test_half_of_adams_state(source: Path, lost: str, left: str) -> None:
    """Adam would fail at its first step: its moments come in pairs."""
    edit_optimizer(source, lambda data: data["state"][2].pop(lost))
    with pytest.raises(CheckpointError, match=f"has '{left}' but no '{lost}'") as caught:
        planned(source)
    assert caught.value.hint


def test_an_optimizer_with_the_first_moment_alone(source: Path) -> None:
    """Lion's state is whole without the second."""

    def to_lion(data: dict[str, Any]) -> None:
        for state in data["state"].values():
            del state["exp_avg_sq"]

    edit_optimizer(source, to_lion)
    assert planned(source).rows


def test_two_optimizers_are_not_compared(source: Path) -> None:
    """The groups of Lion and of Adam have different options."""

    def mixed(data: dict[str, Any]) -> None:
        del data["param_groups"][1]["eps"]
        for number in data["param_groups"][1]["params"]:
            del data["state"][number]["exp_avg_sq"]

    edit_optimizer(source, mixed)
    assert planned(source).rows


def test_a_parameter_without_state_is_named(source: Path) -> None:
    """It may be right, if the parameter never had a gradient, so it is a warning."""
    assert not any("no state for" in text for text in planned(source).warnings)
    edit_optimizer(source, lambda data: data["state"].pop(0))
    (said,) = (text for text in planned(source).warnings if "no state for" in text)
    assert "1 of its" in said and "embed_tokens" in said


@pytest.mark.parametrize("rate", [float("nan"), float("inf")])
def test_a_learning_rate_that_is_no_number(source: Path, rate: float) -> None:
    """The next step would spoil every weight."""
    edit_optimizer(source, lambda data: data["param_groups"][0].update(lr=rate))
    with pytest.raises(CheckpointError, match="learning rate of optimizer group 0") as caught:
        planned(source)
    assert "--allow-nonfinite" in str(caught.value)
    assert planned(source, allow_nonfinite=True).rows


@pytest.mark.parametrize("changed", [{"model_type": "gpt2"}, {"architectures": ["GPT2LMHeadModel"]}])
def test_config_of_two_models(source: Path, changed: dict[str, object]) -> None:
    """``model_type`` and ``architectures`` name different models: no loader could say which it is."""
    config = json.loads((source / "config.json").read_bytes())
    (source / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(SparklingError, match="gpt2") as caught:
        planned(source)
    assert caught.value.exit_code == ExitCode.CHECKPOINT and "llama" in caught.value.message
