"""Heads in blocks, heads that become larger, counts by layer: through files, by the classes' own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparkling_cli import api
from sparkling_cli.errors import SpecError
from sparkling_cli.models.infer import infer
from sparkling_cli.models.skeleton import build_model
from tests.models.inference_support import logit_change_through_disk, shake

LLAMA = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 61}
CONFIGS: dict[str, dict[str, Any]] = {
    "codegen": {"n_embd": 64, "n_head": 8, "n_layer": 2, "vocab_size": 61, "rotary_dim": 4, "n_inner": 48},
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 61},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 61, "max_seq_len": 64},
    "diffllama": {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 4},
    "laguna": {
        **LLAMA,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "zamba": {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "vocab_size": 61,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 3,
        "mamba_d_state": 5,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
}
GROWN = {
    "codegen": ("hidden", "heads"),
    "bloom": ("hidden", "head_dim", "ffn"),
    "mpt": ("hidden", "head_dim", "ffn"),
    "diffllama": ("heads",),
    "laguna": ("kv_heads", "q_per_kv"),
    "zamba": ("hidden", "attention_hidden_size", "n_mamba_heads"),
}


@pytest.mark.parametrize(
    "model_type", ["codegen", "bloom", *(pytest.param(m, marks=pytest.mark.slow) for m in list(CONFIGS)[2:])]
)
def test_the_widened_files_give_the_same_logits(model_type: str, tmp_path: Path) -> None:
    """Doubled, and tripled; the config that is written is the one that the class was built from."""
    config = {"model_type": model_type, **CONFIGS[model_type]}
    layout = infer(config)
    assert all(layout.axes[layout.aliases.get(axis, axis)].widenable for axis in GROWN[model_type])
    for factor in (2, 3):
        factors = dict.fromkeys(GROWN[model_type], factor)
        assert logit_change_through_disk(config, layout, factors, tmp_path / str(factor)) < 1e-5


def test_the_counts_of_a_layer_and_of_all_agree() -> None:
    """Laguna has the heads of every layer in a list, and once more for all."""
    layout = infer({"model_type": "laguna", **CONFIGS["laguna"]})
    terms = {layout.config[f"num_attention_heads{rest}"] for rest in ("", "_per_layer")}
    assert terms == {"(kv_heads q_per_kv)"}


def test_zero_fill_of_larger_heads_leaves_queries_and_keys_as_copies(tmp_path: Path) -> None:
    """BLOOM's fused rows: zeros in both queries and keys would keep their gradients zero for ever."""
    config = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], **CONFIGS["bloom"]}
    model: Any = shake(build_model(config, meta=False))
    model.save_pretrained(tmp_path / "small")
    axes = {"hidden": 2.0, "head_dim": 2.0, "ffn": 2.0}
    with pytest.raises(SpecError, match="head_dim") as caught:
        api.expand(tmp_path / "small", tmp_path / "wide", axes={"hidden": 2.0})
    assert "--axis hidden --axis head_dim --axis ffn" in str(caught.value)
    api.expand(tmp_path / "small", tmp_path / "wide", axes=axes, init="zero-copy", scaling="none")
    wide = type(model).from_pretrained(tmp_path / "wide")
    rows = wide.transformer.h[0].self_attention.query_key_value.weight.detach().reshape(4, 3, 16, 64)
    assert bool((rows[:, :2, 8:, :32] == rows[:, :2, :8, :32]).all())
    assert bool(rows[:, :2].any()) and not bool(rows[:, 2, 8:].any())


def test_a_root_in_bfloat16_is_undone_as_it_is_rounded(tmp_path: Path) -> None:
    """RecurrentGemma multiplies embeddings by sqrt(hidden) in bfloat16, whatever its weights are in."""
    config = {
        "model_type": "recurrent_gemma",
        "architectures": ["RecurrentGemmaForCausalLM"],
        "hidden_size": 40,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 61,
        "lru_width": 40,
        "attention_window_size": 16,
    }
    model: Any = shake(build_model(config, meta=False))
    model.save_pretrained(tmp_path / "small")
    result = api.expand(
        tmp_path / "small",
        tmp_path / "wide",
        axes={"hidden": 2, "heads": 2},
        report="none",
        allow_locked=True,
    )
    wide = type(model).from_pretrained(result.destination)
    factor = torch.tensor(40.0).sqrt().bfloat16().float() / torch.tensor(80.0).sqrt().bfloat16().float()
    table = model.model.embed_tokens.weight.detach()
    torch.testing.assert_close(wide.model.embed_tokens.weight.detach()[:, :40], table * factor)
    ids = torch.arange(7, 16)[None]
    torch.testing.assert_close(wide(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert api.verify(tmp_path / "small", result.destination).derived
