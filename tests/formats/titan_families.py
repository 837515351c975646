"""Models of torchtitan's whose parts do not fit the plain decoder of ``make_torchtitan``."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.flex_attention import AuxOutput, create_block_mask


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
        top_k=sizes.top_k,
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


def kimi_vision(sizes: Any) -> Any:
    """The vision encoder of Kimi: pixels to tokens of the text model."""
    from torchtitan.models import kimi_k2_7 as titan

    return titan._vision_encoder_config(
        dim=16,
        ffn_dim=sizes.vision_ffn,
        num_layers=2,
        num_heads=2,
        patch_size=2,
        init_pos_emb_height=4,
        init_pos_emb_width=6,
        text_hidden_size=sizes.dim,
    )


def muse_glimmer(sizes: Any, *, vision: bool) -> Any:
    """Gated attention with windows, norms before and behind, a vision encoder with an adapter."""
    from torchtitan.models import muse_glimmer as titan
    from torchtitan.models.common.config_utils import make_ffn_config

    more: dict[str, Any] = {}
    if vision:
        encoder = titan.muse_glimmer_vision_encoder_config(
            latent_dim=16,
            num_layers=2,
            num_heads=2,
            mlp_ratio=sizes.vision_ffn / 16,
            patch_size=2,
            patch_temporal=1,
            sparse_attention_factor=2,
            pos_emb_grid_h=2,
            pos_emb_grid_w=4,
        )
        adapter = titan.muse_glimmer_vision_adapter_config(input_dim=encoder.output_dim, output_dim=12)
        more = {"vision_adapter_dim": 12, "vision_encoder": encoder, "vision_adapter": adapter}
    config = titan._muse_glimmer_config(
        dim=sizes.dim,
        n_layers=sizes.layers,
        n_heads=sizes.n_heads,
        n_kv_heads=sizes.n_kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=sizes.vocab,
        max_seq_len=64,
        window_pattern=[5, 0],
        output_multiplier=0.5,
        attn_backend="flex",
        **more,
    )
    for layer in config.layers:
        layer.feed_forward = make_ffn_config(
            dim=sizes.dim,
            hidden_dim=sizes.hidden_dim,
            w1_param_init=titan._LINEAR_INIT,
            w2w3_param_init=titan._LINEAR_INIT,
        )
    return config


def plain_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, None]:
    """The gated delta rule of flash-linear-attention, whose kernels are for GPUs only, token by token."""
    q, k = (functional.normalize(tensor, dim=-1, eps=1e-6) for tensor in (q, k))
    memory = torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[-1])
    found = []
    for t in range(k.shape[1]):
        memory = memory * g[:, t, :, None, None].exp()
        told = (v[:, t] - torch.einsum("bnk,bnkv->bnv", k[:, t], memory)) * beta[:, t, :, None]
        memory = memory + torch.einsum("bnk,bnv->bnkv", k[:, t], told)
        found.append(torch.einsum("bnk,bnkv->bnv", q[:, t] * k.shape[-1] ** -0.5, memory))
    return torch.stack(found, 1), None


def import_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3.5 imports flash-linear-attention; where it is not installed, empty names stand in for its own."""
    if importlib.util.find_spec("fla") is None:
        names = {
            "fla.modules.conv.triton.ops": ["CausalConv1dFunction"],
            "fla.ops.gated_delta_rule": ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"],
            "fla.ops.gated_delta_rule.chunk": ["ChunkGatedDeltaRuleFunction"],
            "fla.ops.gated_delta_rule.fused_recurrent": ["FusedRecurrentFunction"],
        }
        for name, functions in names.items():
            module = types.ModuleType(name)
            for function in functions:
                setattr(module, function, type(function, (torch.autograd.Function,), {}))
            monkeypatch.setitem(sys.modules, name, module)
    rule = "torchtitan.models.qwen3_5.model._fla_chunk_gated_delta_rule"
    monkeypatch.setattr(rule, plain_delta_rule)


def qwen3_5(sizes: Any, *, experts: bool) -> tuple[Any, list[Any], Any]:
    """Linear attention in the first layer, gated attention in the second, a vision encoder."""
    from torchtitan.models import qwen3_5 as titan

    common: dict[str, Any] = {
        "n_layers": sizes.layers,
        "dim": sizes.dim,
        "n_heads": sizes.n_heads,
        "n_kv_heads": sizes.n_kv_heads,
        "head_dim": sizes.head_dim,
        "rotary_dim": 4,
        "rope": titan.MRoPE.Config(dim=4, max_seq_len=64, theta=10000.0, mrope_section=[1, 1, 0]),
        "n_key_heads": 2,
        "n_value_heads": 4,
        "key_head_dim": 6,
        "value_head_dim": 5,
        "full_attention_interval": 2,
        "attn_backend": "flex",
    }
    if experts:
        layers = titan._build_qwen35_moe_layers(
            **common,
            moe_hidden_dim=sizes.expert_dim,
            num_experts=sizes.experts,
            top_k=sizes.top_k,
            shared_expert_hidden_dim=sizes.shared_dim,
        )
    else:
        layers = titan._build_qwen35_layers(**common, hidden_dim=sizes.hidden_dim)
    encoder = titan._qwen35_vision_encoder_config(
        dim=16,
        ffn_dim=sizes.vision_ffn,
        num_layers=2,
        num_heads=2,
        patch_size=2,
        temporal_patch_size=1,
        spatial_merge_size=2,
        out_hidden_size=sizes.dim,
        num_position_embeddings=16,
    )
    more = {"vision_encoder": encoder, "norm": titan._offset_norm(sizes.dim)}
    return titan.Qwen35Model, layers, more


def compute_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bfloat16, no compiler, no mesh, and flex attention, which CPUs cannot train, in plain torch."""
    common = "torchtitan.models.common"
    monkeypatch.setattr("torchtitan.distributed.utils._spmd_backend", "default")
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
    monkeypatch.setattr(f"{common}.attention.FlexAttention._compiled_flex_attn", plain_flex_attention)
    monkeypatch.setattr(f"{common}.attention._compiled_create_block_mask", create_block_mask)
    import_without_kernels(monkeypatch)
    for family in ("kimi_k2_7", "muse_glimmer", "qwen3_5"):
        made = f"torchtitan.models.{family}.vision_encoder.compiled_create_block_mask"
        monkeypatch.setattr(made, create_block_mask)


def outputs_of(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The logits of the next token and of those that MTP modules predict beyond it.

    Models with a vision encoder see an image in every sequence.
    """
    more: dict[str, Any] = {}
    if type(model).__name__ in ("GptOssModel", "MuseGlimmerModel"):
        more["attention_masks"] = model.get_attention_masks(torch.arange(ids.shape[1]).expand(ids.shape))
    if type(model).__name__ == "Qwen35Model":
        more["positions"] = torch.arange(ids.shape[1]).expand(ids.shape)
    if getattr(model, "vision_encoder", None) is not None:
        image = model.config.vocab_size - 1
        ids = ids.clamp(max=image - 1)
        ids[:, 3:7] = image
        pixels = torch.randn(len(ids), 16, 12, generator=torch.Generator().manual_seed(8))
        more |= {"pixel_values": pixels, "grid_thw": torch.tensor([[1, 4, 4], [1, 2, 8]])}
        more["special_tokens"] = {"image_id": image, "video_id": image}
    found = model(ids, **more)
    return tuple(found) if isinstance(found, Sequence) else (found,)


def loss_of(outputs: Sequence[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The loss of every predicted token, the next one and those beyond it, summed."""
    losses = [
        functional.cross_entropy(logits[:, :-ahead].flatten(0, 1).float(), ids[:, ahead:].flatten())
        for ahead, logits in enumerate(outputs, 1)
    ]
    return torch.stack(losses).sum()
