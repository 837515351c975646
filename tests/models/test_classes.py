"""Inferred layouts widen real files: the reloaded model says what the small one said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from inference_support import logit_change_through_disk

from sparkling_cli.models.infer import infer

_SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2}
_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
_LLAMA = {"model_type": "llama", **_SMALL, **_HEADS, "intermediate_size": 40}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}

#: name -> (config, factors); sizes on purpose unlike those of the proof.
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "llama": (_LLAMA, {"ffn": 2, "hidden": 2}),
    "llama whose ffn equals hidden": ({**_LLAMA, "intermediate_size": 24}, {"ffn": 2}),
    "llama, tied, biases, odd sizes": (
        {
            **_LLAMA,
            "hidden_size": 28,
            "head_dim": 6,
            "intermediate_size": 37,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
        {"ffn": 3, "hidden": 2},
    ),
    "llama, query heads alone": (_LLAMA, {"q_per_kv": 2}),
    "llama, key/value heads": (_LLAMA, {"kv_heads": 3}),
    "qwen3_moe": (
        {"model_type": "qwen3_moe", **_SMALL, **_HEADS, **_MOE, "head_dim": 8, "intermediate_size": 48},
        {"ffn": 2, "hidden": 2, "kv_heads": 2},
    ),
    "gpt2": (
        {"model_type": "gpt2", "vocab_size": 64, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32},
        {"hidden": 2, "heads": 2, "ffn": 2},
    ),
    "gemma2": (
        {
            "model_type": "gemma2",
            **_SMALL,
            **_HEADS,
            "head_dim": 8,
            "intermediate_size": 40,
            "query_pre_attn_scalar": 8,
        },
        {"ffn": 2, "hidden": 2},
    ),
    "phi3": (
        {"model_type": "phi3", **_SMALL, **_HEADS, "intermediate_size": 40, "pad_token_id": 0},
        {"ffn": 2, "hidden": 2},
    ),
    "gpt_neox": (
        {"model_type": "gpt_neox", **_SMALL, "num_attention_heads": 4, "intermediate_size": 40},
        {"ffn": 2, "hidden": 2, "heads": 2},
    ),
    "mixtral": (
        {
            "model_type": "mixtral",
            **_SMALL,
            **_HEADS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 40,
        },
        {"ffn": 2, "hidden": 2},
    ),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_widened_files_reload_with_the_same_logits(case: str, tmp_path: Path) -> None:
    """Save, widen the files by the inferred layout, reload by from_pretrained: logits within 1e-5."""
    config, factors = CASES[case]
    layout = infer(config)
    assert logit_change_through_disk(config, layout, factors, tmp_path) < 1e-5


def test_every_widenable_axis_says_how_it_was_proved() -> None:
    """A proved axis names its error, a refused one its reason."""
    layout = infer(_LLAMA)
    assert layout.axes["ffn"].widenable and "logits" in layout.axes["ffn"].reason
    assert not layout.axes["head_dim"].widenable and "rotary" in layout.axes["head_dim"].reason


def test_the_only_mlp_of_a_mixture_is_called_ffn() -> None:
    """``expert_ffn`` and ``ffn`` name one axis where all MLPs are experts."""
    layout = infer(CASES["qwen3_moe"][0])
    assert layout.aliases == {"expert_ffn": "ffn"}
    assert layout.config["moe_intermediate_size"] == "ffn"


def test_linear_parts_are_told_from_gates() -> None:
    """The product's linear factor is ``up``, values are ``v``, on disk and in the module."""
    layout = infer(CASES["qwen3_moe"][0])
    module = {p.name: p.layout for p in layout.tensors}
    disk = {p.name: p.layout for p in layout.disk or ()}
    experts = "model.layers.{layers}.mlp.experts."
    assert module[experts + "gate_up_proj"] == "experts | (gate_up ffn) <- hidden"
    assert disk[experts + "{experts}.gate_proj.weight"] == "gate:ffn <- hidden"
    assert disk[experts + "{experts}.up_proj.weight"] == "up:ffn <- hidden"
    assert module["model.layers.{layers}.self_attn.v_proj.weight"].startswith("v:")
    assert layout.assembly[experts + "gate_up_proj"] == (
        experts + "{experts}.gate_proj.weight",
        experts + "{experts}.up_proj.weight",
    )


def test_hidden_alone_is_refused_where_the_class_couples_it() -> None:
    """GPT-2 has no head_dim: hidden and heads grow together, and the layout says so."""
    layout = infer(CASES["gpt2"][0])
    assert layout.axes["hidden"].joint == ("heads",)
    assert layout.axes["heads"].joint == ("hidden",)
    pattern = layout.module_table.find("transformer.h.0.attn.c_attn.weight")
    assert pattern.layout == "hidden -> (qkv heads head_dim)"
