"""What a class allows to vary: heads, ties, biases, equal and odd sizes, experts. Through files, with state.

Sizes here coincide on purpose (`square`) or are odd; in the proof they never are. Nothing is read from the
layout but which axes it offers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from training_support import reloaded, state_of, trained

from sparkling_cli import api
from sparkling_cli.compute.shape import shape_of
from sparkling_cli.layout.depth import LAYERS
from sparkling_cli.models import sizes
from sparkling_cli.models.infer import infer
from sparkling_cli.models.skeleton import build_model

pytestmark = pytest.mark.survey

Config = dict[str, Any]

_BASE: Config = {
    "vocab_size": 101,
    "hidden_size": 60,
    "intermediate_size": 97,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_SLIDING: Config = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS: Config = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_LATENT: Config = {
    "kv_lora_rank": 22,
    "q_lora_rank": 26,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 10,
    "v_head_dim": 14,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 20,
    "num_key_value_heads": 6,
    "num_hidden_layers": 3,
}
_MHA = {"num_attention_heads": 5, "num_key_value_heads": 5}
_MQA = {"num_key_value_heads": 1}
_SQUARE = {"hidden_size": 48, "intermediate_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
_TIED = {"tie_word_embeddings": True}
_BIASED = {"attention_bias": True, "mlp_bias": True}

#: family -> what it needs besides the base.
FAMILIES: Mapping[str, Config] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {**_SLIDING, "use_sliding_window": True},
    "qwen3": {"head_dim": 10},
    "gemma2": {**_SLIDING, "head_dim": 14, "query_pre_attn_scalar": 14},
    "gemma3_text": {**_SLIDING, "head_dim": 14, "query_pre_attn_scalar": 14},
    "phi3": {"original_max_position_embeddings": 64},
    "olmo2": {},
    "cohere2": {**_SLIDING, "head_dim": 10},
    "glm4": {"head_dim": 10},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "stablelm": {"partial_rotary_factor": 1.0},
    "starcoder2": {"sliding_window": 5},
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 20},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 20},
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 20},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 34, "mlp_only_layers": [0]},
    "qwen3_moe": {**_EXPERTS, "head_dim": 10, "mlp_only_layers": [0]},
    "deepseek_v2": {**_LATENT, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "deepseek_v3": {**_LATENT, "n_shared_experts": 1, "first_k_dense_replace": 1},
}
#: variation -> what changes.
VARIATIONS: Mapping[str, Config] = {
    "grouped": {},
    "multi-head, odd": _MHA,
    "multi-query": _MQA,
    "square": _SQUARE,
    "tied, biased": {**_TIED, **_BIASED},
}
#: further cases, whole.
FURTHER: Mapping[str, Config] = {
    "gpt2, tied": {"model_type": "gpt2", "vocab_size": 101, "n_embd": 60, "n_layer": 2, "n_head": 5},
    "gpt2, square": {
        "model_type": "gpt2", "vocab_size": 101, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_inner": 48,
        "tie_word_embeddings": False,
    },
    "gpt_neox, parallel": {
        "model_type": "gpt_neox", **_BASE, "num_attention_heads": 5, "use_parallel_residual": True,
    },
    "gpt_neox, serial, no biases, tied": {
        "model_type": "gpt_neox", **_BASE, "num_attention_heads": 5, "use_parallel_residual": False,
        "attention_bias": False, **_TIED,
    },
    "falcon, 7b": {
        "model_type": "falcon", "vocab_size": 101, "hidden_size": 60, "num_hidden_layers": 2,
        "num_attention_heads": 5, "multi_query": True, "parallel_attn": True,
    },
    "falcon, 40b": {
        "model_type": "falcon", "vocab_size": 101, "hidden_size": 60, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_kv_heads": 3, "new_decoder_architecture": True, "bias": True,
    },
    "opt": {
        "model_type": "opt", "vocab_size": 101, "hidden_size": 60, "num_hidden_layers": 2, "ffn_dim": 97,
        "num_attention_heads": 5, "max_position_embeddings": 64, "word_embed_proj_dim": 60,
    },
    "opt, projected embeddings": {
        "model_type": "opt", "vocab_size": 101, "hidden_size": 60, "num_hidden_layers": 2, "ffn_dim": 97,
        "num_attention_heads": 5, "max_position_embeddings": 64, "word_embed_proj_dim": 34,
        "do_layer_norm_before": False,
    },
    "phi": {"model_type": "phi", **_BASE, **_MHA, "partial_rotary_factor": 0.5},
    "qwen2_moe, no dense layer": {"model_type": "qwen2_moe", **_BASE, **_EXPERTS,
                                  "shared_expert_intermediate_size": 20},
    "qwen3_moe, every second layer": {
        "model_type": "qwen3_moe", **_BASE, **_EXPERTS, "head_dim": 10, "decoder_sparse_step": 2,
        "num_hidden_layers": 4,
    },
    "deepseek_v3, no query rank, two dense layers": {
        "model_type": "deepseek_v3", **_BASE, **_LATENT, "q_lora_rank": None, "first_k_dense_replace": 2,
        "n_shared_experts": 2,
    },
    "deepseek_v3, all sparse, groups": {
        "model_type": "deepseek_v3", **_BASE, **_LATENT, "first_k_dense_replace": 0, "n_group": 2,
        "topk_group": 1,
    },
    "glm4_moe": {
        "model_type": "glm4_moe", **_BASE, "head_dim": 10, "n_routed_experts": 6, "num_experts_per_tok": 2,
        "moe_intermediate_size": 20, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1, "partial_rotary_factor": 0.5,
    },
    "gpt_oss": {
        "model_type": "gpt_oss", **_BASE, **_SLIDING, "head_dim": 10, "num_local_experts": 6,
        "num_experts_per_tok": 2, "intermediate_size": 20,
    },
    "dbrx, groups beside hidden": {
        "model_type": "dbrx", "d_model": 72, "n_heads": 6, "n_layers": 2, "vocab_size": 101,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "jamba": {
        "model_type": "jamba", **_BASE, "num_hidden_layers": 4, "attn_layer_period": 4,
        "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4,
        "num_experts_per_tok": 2, "mamba_d_state": 6, "mamba_dt_rank": 7, "use_mamba_kernels": False,
    },
    "mamba": {
        "model_type": "mamba", "vocab_size": 101, "hidden_size": 60, "num_hidden_layers": 2,
        "state_size": 6, "time_step_rank": 7,
    },
}  # fmt: skip


def _cases() -> dict[str, Config]:
    """Every family in every variation that it has; experts stay as wide as the family says."""
    found = {}
    for family, special in FAMILIES.items():
        for variation, change in VARIATIONS.items():
            if "kv_lora_rank" in special and variation in ("multi-query", "multi-head, odd"):
                continue  # latent attention has no key/value heads
            found[f"{family}: {variation}"] = {"model_type": family, **_BASE, **special, **change}
            if "kv_lora_rank" in special:
                found[f"{family}: {variation}"]["num_key_value_heads"] = 6
    return {**found, **FURTHER}


CASES = _cases()


@pytest.mark.parametrize("case", sorted(CASES))
def test_all_axes_at_once_keep_the_logits_and_the_state(case: str, tmp_path: Path) -> None:
    """A step of AdamW, all axes but depth doubled: logits within 1e-4 as reloaded, state kept, else zero."""
    config = CASES[case]
    layout = infer(config)
    axes = [name for name, info in layout.axes.items() if info.widenable and name != LAYERS]
    assert {"hidden", "ffn"} <= set(axes), {n: i.reason for n, i in layout.axes.items() if n not in axes}
    small = trained(config, tmp_path / "small")
    asked = [{"axis": axis, "factor": 2} for axis in axes]
    api.expand(small.folder, tmp_path / "wide", axes=asked, report="none", threads=1)
    wide = reloaded(small, tmp_path / "wide").to(next(small.model.parameters()).dtype)
    with torch.no_grad():
        before = small.model(input_ids=small.ids, use_cache=False).logits.double()
        after = wide(input_ids=small.ids, use_cache=False).logits.double()[..., : before.shape[-1]]
    assert float((after - before).abs().max() / before.abs().max()) < 1e-4
    parameters = dict(wide.named_parameters())
    assert any(p.shape != small.values[n].shape for n, p in parameters.items())
    old, new = state_of(small.folder), state_of(tmp_path / "wide")
    for name, number in small.numbers.items():
        for slot, state in old.get(number, {}).items():
            assert new[number][slot].shape == parameters[name].shape, name
            kept = new[number][slot]
            assert torch.equal(kept[kept != 0], state[state != 0]), name


def test_a_count_that_no_tensor_reads_is_not_written() -> None:
    """LFM2's configs have ``num_heads`` beside ``num_attention_heads``: the class reads the latter."""
    config = {"model_type": "lfm2", "architectures": ["Lfm2ForCausalLM"], "hidden_size": 64, "vocab_size": 61}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_heads": 4, "num_key_value_heads": 2}
    config |= {"layer_types": ["conv", "full_attention", "conv"], "intermediate_size": 48}
    layout = infer({**config, "block_auto_adjust_ff_dim": False})
    assert layout.config["num_attention_heads"] == "(kv_heads q_per_kv)"
    assert "num_heads" not in layout.config


def test_a_tower_of_the_same_width_holds_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3.5's images end as wide as hidden by a number of the vision config: text alone would run.

    The number grows with hidden (test_images.py). Where its name would not say what it is, measuring does.
    """
    text = {"model_type": "qwen3_5_text", "hidden_size": 64, "vocab_size": 63, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 16}
    text |= {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4}
    text |= {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    vision = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 40, "out_hidden_size": 64}
    config = {
        "model_type": "qwen3_5",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": text,
        "vision_config": vision,
    }
    monkeypatch.setattr(sizes, "_OUTPUT", re.compile("$^"))
    layout = infer(config)
    assert not layout.axes["hidden"].widenable
    assert "out_hidden_size" in layout.axes["hidden"].reason
    assert layout.axes["ffn"].widenable


def test_tables_of_a_head_hold_its_width() -> None:
    """Phi-3 wants tables of hidden over heads entries: hidden and heads grow together, neither alone."""
    tables = {"type": "longrope", "long_factor": [1.5] * 8, "short_factor": [1.0] * 8}
    config = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 96, "vocab_size": 61}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2}
    config |= {"intermediate_size": 40, "rope_scaling": tables, "original_max_position_embeddings": 64}
    config |= {"max_position_embeddings": 256, "pad_token_id": 0}
    layout = infer(config)
    assert layout.axes["hidden"].widenable and layout.axes["hidden"].joint == ("kv_heads",)
    assert layout.axes["kv_heads"].joint == ("hidden",)
    assert "refuses" in layout.axes["q_per_kv"].reason
    assert layout.axes["ffn"].widenable and not layout.axes["ffn"].joint


def test_blocks_that_layers_share_count_once() -> None:
    """Zamba-2 in a depth that its tiny model does not have: the block that every sixth layer has is one."""
    kinds = ["mamba", "mamba", "hybrid"] * 4
    config = {"model_type": "zamba2", "architectures": ["Zamba2ForCausalLM"], "hidden_size": 64}
    config |= {
        "num_hidden_layers": 12,
        "layers_block_type": kinds,
        "num_attention_heads": 4,
        "num_mem_blocks": 1,
    }
    config |= {
        "vocab_size": 61,
        "intermediate_size": 48,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "adapter_rank": 6,
    }
    config |= {"n_mamba_heads": 8, "mamba_expand": 2, "use_shared_mlp_adapter": True, "pad_token_id": 0}
    model = build_model(config)
    assert shape_of(infer(config), config).count().total == sum(p.numel() for p in model.parameters())


def test_a_number_of_an_absent_tower_stays_in_its_table() -> None:
    """Beside the text's flat sizes, a default that the config leaves out is no key of the text's."""
    config = {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    config |= {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 61}
    config |= {"num_hidden_layers": 2, "intermediate_size": 48, "image_token_id": 7, "pad_token_id": 0}
    config |= {"video_token_id": 10, "vision_start_token_id": 8, "vision_end_token_id": 9}
    config["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    layout = infer(config)
    assert layout.config["hidden_size"] == "hidden"
    assert layout.config["vision_config.out_hidden_size"] == "hidden"
    assert "out_hidden_size" not in layout.config
