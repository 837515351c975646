"""Layout files of the package for transformers classes: held to the classes' own code, like what is inferred.

A real AdamW step, widened through files; logits, state, gradients and activations of the widened model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_every_class_trains import complaints, widenings
from training_support import reloaded, trained

from sparkling_cli import api
from sparkling_cli.errors import SpecError
from sparkling_cli.layout.packaged import packaged_data, packaged_names

MAMBA = {
    "mamba_n_heads": 16,
    "mamba_d_head": 8,
    "mamba_d_state": 5,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
    "time_step_limit": [0.0, 9.0],
}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 61}
MIXED = ["linear_attention", "full_attention", "linear_attention"]
GRANITE = {
    "model_type": "granitemoehybrid",
    "architectures": ["GraniteMoeHybridForCausalLM"],
    **SIZES,
    **MAMBA,
    **ATTENTION,
    "layer_types": MIXED,
    "intermediate_size": 24,
    "shared_intermediate_size": 40,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.3,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mamba2": {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        **SIZES,
        "num_heads": 16,
        "head_dim": 8,
        "state_size": 5,
        "n_groups": 2,
        "expand": 2,
        "time_step_limit": [0.0, 9.0],
    },
    "bamba": {
        "model_type": "bamba",
        "architectures": ["BambaForCausalLM"],
        **SIZES,
        **MAMBA,
        **ATTENTION,
        "intermediate_size": 40,
        "attn_layer_indices": [1],
    },
    "helium": {
        "model_type": "helium",
        "architectures": ["HeliumForCausalLM"],
        **SIZES,
        **ATTENTION,
        "head_dim": 16,
        "intermediate_size": 40,
    },
    "granitemoehybrid": GRANITE,
    "granitemoehybrid without experts": {**GRANITE, "num_local_experts": 0},
    "granitemoehybrid without attention": {**GRANITE, "layer_types": ["linear_attention"] * 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("which", CONFIGS)
def test_state_gradients_and_activations_follow(which: str, tied: bool, tmp_path: Path) -> None:
    """Every axis of the file doubled, with those that grow along."""
    small = trained({**CONFIGS[which], "tie_word_embeddings": tied}, tmp_path / "small")
    layout = api.layout_of(small.folder)
    assert layout.name == which.split()[0] + ("-tied" if tied else "")
    wrong = []
    for axes in widenings(layout):
        asked = [{"axis": axis, "factor": 2} for axis in axes]
        for treatment in ("asymmetric", "copy"):
            target = tmp_path / f"{axes[0]}-{treatment}"
            api.expand(small.folder, target, axes=asked, optimizer=treatment, report="none")
            api.verify(small.folder, target)
        wrong += [f"{axes[0]}: {what}" for what in complaints(small, layout, tmp_path / axes[0])]
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("which", CONFIGS)
def test_all_axes_three_times_as_wide(which: str, tied: bool, tmp_path: Path) -> None:
    """The library loads the output from its own config, and it says what the source said."""
    small = trained({**CONFIGS[which], "tie_word_embeddings": tied}, tmp_path / "small")
    layout = api.layout_of(small.folder)
    asked = [{"axis": name, "factor": 3} for name, info in layout.axes.items() if info.widenable]
    api.expand(small.folder, tmp_path / "wide", axes=asked, report="none")
    api.verify(small.folder, tmp_path / "wide")
    wide = reloaded(small, tmp_path / "wide")
    with torch.no_grad():
        before = reloaded(small, small.folder)(input_ids=small.ids, use_cache=False).logits
        after = wide(input_ids=small.ids, use_cache=False).logits
    assert torch.allclose(after, before, rtol=1e-5, atol=1e-6 * float(before.abs().max()))
    ratio = sum(p.numel() for p in wide.parameters()) / sum(p.numel() for p in small.model.parameters())
    assert ratio > 2.5


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("which", CONFIGS)
def test_what_is_said_about_the_model(which: str, tied: bool, tmp_path: Path) -> None:
    """Parameters and active ones are the model's own; a tied head's input carries its factor."""
    small = trained({**CONFIGS[which], "tie_word_embeddings": tied}, tmp_path / "small")
    sizes = {name: p.numel() for name, p in small.model.named_parameters()}
    idle = sum(size // 2 for name, size in sizes.items() if ".experts." in name)  # two of four work
    hidden = api.layout_of(small.folder).axes["hidden"]
    asked = [{"axis": axis, "factor": 2} for axis in ("hidden", *hidden.joint)]
    found = api.expand(small.folder, tmp_path / "wide", axes=asked, report="full").report
    assert found is not None
    assert found.activations is not None
    assert found.before.parameters == sum(sizes.values())
    assert found.before.active == sum(sizes.values()) - idle
    assert not found.activations.offenders


def test_hidden_grows_with_the_mixers_heads(tmp_path: Path) -> None:
    """By half: counts in the config agree; hidden alone is refused with the axis that must come along."""
    small = trained(CONFIGS["mamba2"], tmp_path / "small")
    with pytest.raises(SpecError, match="couples hidden to mamba_heads"):
        api.expand(small.folder, tmp_path / "no", axes=[{"axis": "hidden", "factor": 2}])
    both = [{"axis": "hidden", "factor": 1.5}, {"axis": "heads", "factor": 1.5}]
    api.expand(small.folder, tmp_path / "wide", axes=both, report="none")
    config = json.loads((tmp_path / "wide/config.json").read_text())
    assert (config["hidden_size"], config["num_heads"], config["expand"]) == (96, 24, 2)
    assert torch.isfinite(reloaded(small, tmp_path / "wide")(input_ids=small.ids).logits).all()


def test_every_file_of_a_class_is_tried() -> None:
    """A file that is for a class of transformers has a config here."""
    types = {packaged_data(name).get("requires", {}).get("model_type") for name in packaged_names()}
    assert types - {None} == {config["model_type"] for config in CONFIGS.values()}
