"""Models of torchtitan's whose parts do not fit the plain decoder of ``make_torchtitan``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.flex_attention import AuxOutput


def plain_flex_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, block_mask: Any, scale: float | None, **more: Any
) -> tuple[torch.Tensor, Any]:
    """PyTorch's ``flex_attention``, which has no backward on CPUs, in plain torch."""
    assert more["score_mod"] is None
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
    scores = q @ k.mT * (scale or q.shape[-1] ** -0.5)
    index = [
        torch.arange(size).view([-1 if i == n else 1 for i in range(4)])
        for n, size in enumerate(scores.shape)
    ]
    scores = scores.masked_fill(~block_mask.mask_mod(*index), -torch.inf)
    return scores.softmax(-1) @ v, AuxOutput(lse=scores.logsumexp(-1))


def gpt_oss(sizes: Any, fuse_qkv: bool) -> tuple[Any, list[Any]]:
    """Biases and sinks in the attention, every other layer with a window, experts with biases."""
    from torchtitan.models import gpt_oss as titan
    from torchtitan.models.common import CosSinRoPE

    rope = CosSinRoPE.Config(
        dim=sizes.head_dim,
        max_seq_len=64,
        theta=10000.0,
        scaling="yarn",
        rope_factor=4,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=False,
        original_seq_len=16,
    )
    layers = titan._build_gptoss_layers(
        dim=sizes.dim,
        n_layers=sizes.layers,
        hidden_dim=sizes.expert_dim,
        num_experts=sizes.experts,
        top_k=2,
        load_balance_coeff=1e-3,
        attn_backend="flex",
        moe_comm_backend="standard",
        rope=rope,
    )
    for number, layer in enumerate(layers):
        layer.attention = titan._make_gptoss_attn_config(
            dim=sizes.dim,
            layer_id=number,
            attn_backend="flex",
            n_heads=sizes.n_heads,
            n_kv_heads=sizes.n_kv_heads,
            head_dim=sizes.head_dim,
            sliding_window_size=None if number % 2 else 5,
            fuse_qkv=fuse_qkv,
            rope=rope,
        )
    return titan.GptOssModel, layers


def outputs_of(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The logits of the next token and of those that MTP modules predict beyond it."""
    masks = None
    if type(model).__name__ in ("GptOssModel", "MuseGlimmerModel"):
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        masks = model.get_attention_masks(positions)
    found = model(ids, attention_masks=masks)
    return tuple(found) if isinstance(found, Sequence) else (found,)


def loss_of(outputs: Sequence[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The loss of every predicted token, the next one and those beyond it, summed."""
    losses = [
        functional.cross_entropy(logits[:, :-ahead].flatten(0, 1).float(), ids[:, ahead:].flatten())
        for ahead, logits in enumerate(outputs, 1)
    ]
    return torch.stack(losses).sum()
