"""Averages of the weights, wherever a trainer or its user keeps them: widened as the weights are.

The average is half of every weight. To copy entries, and to scale them by a power of two, are exact: in the
output too it is half of every weight, bit by bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict

from sparkling_cli import api
from tests.formats import make_nanochat, test_composer, test_deepspeed, test_lingua, test_olmo

Weights = dict[str, torch.Tensor]


def half(weights: Weights) -> Weights:
    """Of every entry."""
    return {name: value / 2 for name, value in weights.items()}


class Nanochat:
    """A file of the user's own in a step's folder."""

    axes = ("hidden", "kv_heads", "ffn")
    weights = "model_000005.pt"

    def make(self, root: Path) -> Path:
        """What is to be expanded."""
        self.save(root)
        torch.save({"decay": 0.999, "shadow": half(torch.load(root / self.weights))}, root / "ema.pt")
        return root

    def save(self, root: Path) -> None:
        """The checkpoint."""
        make_nanochat.make_nanochat(root)

    def read(self, target: Path) -> tuple[Weights, Weights]:
        """Weights and their average."""
        return torch.load(target / self.weights), torch.load(target / "ema.pt")["shadow"]


class Olmo(Nanochat):
    """The same in an unsharded step."""

    weights = "model.pt"

    def save(self, root: Path) -> None:
        """The checkpoint."""
        test_olmo.make_olmo(root)


class Universal:
    """DeepSpeed's, in the parameters' own folders."""

    axes = ("hidden", "heads", "ffn")

    def make(self, root: Path) -> Path:
        """What is to be expanded."""
        for name, value in test_deepspeed._pipeline(root).items():
            if (root / "zero" / name).is_dir():
                torch.save({"cat_dim": 0, "param": value / 2}, root / "zero" / name / "ema.pt")
        return root

    def read(self, target: Path) -> tuple[Weights, Weights]:
        """Weights and their average."""
        folders = [path.parent for path in target.glob("zero/*/ema.pt")]
        weights, average = (
            {folder.name: torch.load(folder / file)["param"] for folder in folders}
            for file in ("fp32.pt", "ema.pt")
        )
        return weights, average


class Composer:
    """Its algorithm EMA, in a rank file."""

    axes = ("hidden", "kv_heads", "ffn")

    def make(self, root: Path) -> Path:
        """What is to be expanded."""
        root.mkdir()
        _, saved = test_composer.made()
        state: Any = saved["state"]
        average = {"named_parameters_dict": half(state["model"]), "named_buffers_dict": {}}
        state["algorithms"] = [("EMA", {"ema_model": average, "ema_started": True})]
        torch.save(saved, root / "ep0-ba5-rank0.pt")
        return root / "ep0-ba5-rank0.pt"

    def read(self, target: Path) -> tuple[Weights, Weights]:
        """Weights and their average."""
        state = torch.load(target, weights_only=False)["state"]
        return state["model"], state["algorithms"][0][1]["ema_model"]["named_parameters_dict"]


class Lingua:
    """Sharded, at a level of its own."""

    axes = ("hidden", "kv_heads", "ffn")

    def make(self, root: Path) -> Path:
        """What is to be expanded."""
        test_lingua.make_lingua(root)
        weights, state = get_state_dict(*test_lingua.load(root))
        with test_lingua.quiet():
            dcp.save({"model": weights, "optim": state, "ema": half(weights)}, checkpoint_id=root)
        return root

    def read(self, target: Path) -> tuple[Weights, Weights]:
        """Weights and their average."""
        with test_lingua.quiet():
            dcp_to_torch_save(target, target.parent / "whole.pt")
        whole = torch.load(target.parent / "whole.pt")
        return whole["model"], whole["ema"]


@pytest.mark.parametrize("form", [Nanochat(), Olmo(), Universal(), Composer(), Lingua()])
def test_half_of_every_weight(tmp_path: Path, form: Any) -> None:
    """In the output as in the source, though the weights are wider and scaled."""
    source = form.make(tmp_path / "5")
    target = tmp_path / "wide" / source.name
    target.parent.mkdir()
    api.expand(source, target, axes=dict.fromkeys(form.axes, 2), report="none")
    (before, _), (weights, average) = form.read(source), form.read(target)
    assert average.keys() == before.keys()
    assert any(average[name].shape != value.shape for name, value in before.items())
    for name, value in average.items():
        assert torch.equal(value, weights[name] / 2), name
