"""What is found on a tiny model of few layers, in a real one of more: by logits after reloading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_support import reloaded, trained

from sparkling_cli import api
from sparkling_cli.models.shrink import shrink
from sparkling_cli.models.skeleton import default_config


@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("model_type", ["bert-generation", "openai-gpt"])
def test_a_final_norm_inside_the_last_layer(model_type: str, layers: int, tmp_path: Path) -> None:
    """The norm that takes a tied head's factor is the real model's last one, not the tiny one's."""
    config = {**shrink(default_config(model_type)), "num_hidden_layers": layers, "n_layer": layers}
    small = trained(config, tmp_path / "small")
    axes = ["hidden", "heads", *(["ffn"] if model_type == "openai-gpt" else [])]
    api.expand(small.folder, tmp_path / "wide", axes=dict.fromkeys(axes, 2), report="none")
    with torch.no_grad():
        before = reloaded(small, small.folder)(input_ids=small.ids).logits
        after = reloaded(small, tmp_path / "wide")(input_ids=small.ids).logits
    assert torch.allclose(after, before, rtol=0, atol=1e-9 * float(before.abs().max()))
