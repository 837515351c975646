"""The models of the proof: a dense byte-level one and a mixture of experts, small and wide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


@dataclass(frozen=True)
class Size:
    """Widths of the small model; ``ffn`` is each expert's for a mixture."""

    layers: int
    hidden: int
    ffn: int
    head_dim: int
    heads: int = 4
    context: int = 128


#: (kind, size) -> widths; ``pilot`` is the size at which the acceptance numbers were set
SIZES: Mapping[tuple[str, str], Size] = {
    ("dense", "pilot"): Size(4, 96, 128, 24),
    ("moe", "pilot"): Size(3, 64, 48, 24),
    ("dense", "horizon"): Size(2, 48, 64, 12),
    ("moe", "horizon"): Size(2, 48, 32, 12),
    ("dense", "large"): Size(6, 256, 512, 32, heads=8),
    ("dense", "gpu"): Size(8, 384, 768, 64, heads=6, context=256),
    ("dense", "quick"): Size(2, 64, 64, 16),
    ("dense", "micro"): Size(2, 48, 48, 12),
    ("moe", "micro"): Size(2, 32, 24, 12),
    ("moe", "quick"): Size(2, 48, 32, 16),
}


def config(kind: str, size: Size, factors: Mapping[str, float]) -> PreTrainedConfig:
    """The config of one model.

    Args:
        kind: ``dense`` (Llama class) or ``moe`` (Qwen3-MoE class: decoupled head_dim, q/k norms, 8 experts
            top-2, tied embeddings, after the paper's model in miniature).
        size: of the small model.
        factors: axis -> how many times as large.
    """

    def grown(axis: str, small: int) -> int:
        return int(small * factors.get(axis, 1))

    hidden, ffn = grown("hidden", size.hidden), grown("ffn", size.ffn)
    common: dict[str, Any] = {
        "vocab_size": 256,
        "num_hidden_layers": grown("layers", size.layers),
        "num_attention_heads": size.heads,
        "head_dim": size.head_dim,
        "hidden_size": hidden,
        "max_position_embeddings": size.context,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    if kind == "dense":
        return LlamaConfig(
            intermediate_size=ffn, num_key_value_heads=size.heads, tie_word_embeddings=False, **common
        )
    return Qwen3MoeConfig(
        intermediate_size=4 * ffn,
        moe_intermediate_size=ffn,
        num_experts=grown("experts", 8),
        num_experts_per_tok=grown("experts_per_token", 2),
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **common,
    )


_REUSED: dict[object, tuple[PreTrainedModel, Any]] = {}


def reusable(model: PreTrainedModel, compile_: bool) -> tuple[PreTrainedModel, Any]:
    """A module with the weights of ``model``, and what to call; one per shape: it is compiled once.

    How many experts a token goes to is in no parameter's shape.
    """
    shapes = tuple((name, tuple(p.shape)) for name, p in model.named_parameters())
    key = (type(model), shapes, getattr(model.config, "num_experts_per_tok", None))
    if key not in _REUSED:
        _REUSED[key] = model, (torch.compile(model) if compile_ else model)
    kept, forward = _REUSED[key]
    if kept is not model:
        kept.load_state_dict(model.state_dict())
    for p in kept.parameters():
        p.grad = None
    return kept, forward


def fresh(kind: str, size: str, factors: Mapping[str, float], seed: int) -> PreTrainedModel:
    """A freshly initialized model; ``factors``: axis -> how many times as large as the small one."""
    torch.manual_seed(seed)
    made = config(kind, SIZES[kind, size], factors)
    return (LlamaForCausalLM if kind == "dense" else Qwen3MoeForCausalLM)(made)
