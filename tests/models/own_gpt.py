"""A hand-written GPT, as a user would have it: fused qkv, learned positions, a gate, tied embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (the usual name)


class Block(nn.Module):
    """Pre-norm attention and a gated MLP whose gate and up rows are interleaved."""

    def __init__(self, width: int, heads: int, head_dim: int, inner: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.out = nn.Linear(heads * head_dim, width)
        self.gate_up = nn.Parameter(torch.randn(width, 2 * inner) / width**0.5)
        self.down = nn.Parameter(torch.randn(inner, width) / inner**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual attention, then the residual MLP; (B, L, width) -> the same."""
        b, length, _ = x.shape
        qkv = self.qkv(self.norm_1(x)).view(b, length, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, length, -1))
        gate, up = (self.norm_2(x) @ self.gate_up).unflatten(-1, (-1, 2)).unbind(-1)
        return x + (F.silu(gate) * up) @ self.down


class OwnGPT(nn.Module):
    """The whole model; returns logits."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, inner = config["d_model"], config["d_ff"]
        self.tokens = nn.Embedding(config["vocab_size"], width)
        self.positions = nn.Embedding(config["max_position_embeddings"], width)
        self.blocks = nn.ModuleList(
            Block(width, config["n_heads"], config["head_dim"], inner) for _ in range(config["n_layers"])
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config["vocab_size"], bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, vocab) of token ids (B, L)."""
        at = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(at)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(config: dict[str, Any]) -> nn.Module:
    """The factory that ``--model own_gpt:build`` names."""
    return OwnGPT(config)


#: Names that say nothing to a program, and the usual ones.
UNUSUAL = {
    "symbols": "vocab_size",
    "breadth": "d_model",
    "inner": "d_ff",
    "lookers": "n_heads",
    "each": "head_dim",
    "depth": "n_layers",
    "reach": "max_position_embeddings",
}


def build_unusual(config: dict[str, Any]) -> nn.Module:
    """The same model from a config with names of its own."""
    return OwnGPT({UNUSUAL[key]: value for key, value in config.items()})


def build_divided(config: dict[str, Any]) -> nn.Module:
    """The same again, the width divided among the heads."""
    usual = {UNUSUAL[key]: value for key, value in config.items()}
    return OwnGPT({**usual, "head_dim": usual["d_model"] // usual["n_heads"]})


def build_scaled(config: dict[str, Any]) -> nn.Module:
    """A Llama with code of its own, as MiniCPM's: logits are divided by hidden over ``dim_model_base``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    class ScaledForCausalLM(LlamaForCausalLM):
        """Multiplies the last hidden state by a number that depends on the width."""

        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            factor = config.dim_model_base / config.hidden_size
            self.lm_head.register_forward_pre_hook(lambda _, inputs: (factor * inputs[0],))

    return ScaledForCausalLM(LlamaConfig(**config))
