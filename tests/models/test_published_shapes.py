"""Configs as they are published, made small: trained, widened through files, loaded, same logits.

The default suite draws a few of a table of the project's own; the survey goes over the whole table and over
every ``config.json`` in the folder that ``SPARKLING_CONFIGS`` names.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_every_class_trains import widenings
from training_support import trained
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from sparkling_cli import api
from sparkling_cli.models.shrink import shrink

#: What is particular about how a class is published, in the numbers that a published config has.
PUBLISHED: dict[str, dict[str, Any]] = {
    "state-space width given": {
        "model_type": "falcon_h1",
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "mamba_d_ssm": 1536,
        "mamba_n_heads": 24,
        "mamba_d_head": 64,
        "mamba_n_groups": 1,
        "mamba_d_state": 128,
        "vocab_size": 32784,
    },
    "layers as a pattern": {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "M-M-M*-" * 4,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 28,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "n_groups": 8,
        "vocab_size": 131072,
    },
    "multipliers of latents": {
        "model_type": "longcat_flash",
        "hidden_size": 6144,
        "num_layers": 28,
        "num_attention_heads": 64,
        "ffn_hidden_size": 12288,
        "expert_ffn_hidden_size": 2048,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 512,
        "zero_expert_num": 256,
        "moe_topk": 12,
        "vocab_size": 131072,
    },
}
#: Sizes that divide as published ones do: Mamba-2's heads are groups x expand x something.
DIVIDED = {"mamba2": {"num_heads": 16, "head_dim": 8, "intermediate_size": 128}}
_FOLDER = os.environ.get("SPARKLING_CONFIGS", "")
_FILES = sorted(Path(_FOLDER).glob("*.json")) if _FOLDER else []


def check_published(config: dict[str, Any], tmp_path: Path) -> None:
    """Every axis that is proved, with those that grow along: all keys are there, logits within 1e-5."""
    if config["model_type"] not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers has no class for {config['model_type']}")
    small = trained({**shrink(config), **DIVIDED.get(config["model_type"], {})}, tmp_path / "small")
    layout = api.layout_of(small.folder)
    groups = list(widenings(layout))
    assert any("hidden" in group for group in groups), layout.axes["hidden"].reason
    with torch.no_grad():
        before = small.model(input_ids=small.ids, use_cache=False).logits.double()
    for axes in groups:
        asked = [{"axis": axis, "factor": 2} for axis in axes]
        target = tmp_path / axes[0]
        api.expand(
            small.folder, target, axes=asked, allow_locked=True, names="disk", report="none", threads=1
        )
        wide, info = type(small.model).from_pretrained(
            target,
            output_loading_info=True,
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        wide = wide.to(next(small.model.parameters()).dtype).eval()
        with torch.no_grad():
            after = wide(input_ids=small.ids, use_cache=False).logits.double()
        assert float((after - before).abs().max() / before.abs().max()) < 1e-5, axes


@pytest.mark.parametrize("name", random.Random(22).sample(sorted(PUBLISHED), 2))
def test_some_published_configs_made_small(name: str, tmp_path: Path) -> None:
    """A few of the table, always the same."""
    check_published(PUBLISHED[name], tmp_path)


@pytest.mark.survey
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_configs_made_small(name: str, tmp_path: Path) -> None:
    """The whole table."""
    check_published(PUBLISHED[name], tmp_path)


@pytest.mark.survey
@pytest.mark.skipif(not _FILES, reason="SPARKLING_CONFIGS names no folder with published configs")
@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.stem)
def test_published_files_made_small(path: Path, tmp_path: Path) -> None:
    """Every config of a folder that is not part of the project."""
    check_published(json.loads(path.read_text()), tmp_path)
