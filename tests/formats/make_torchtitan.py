"""Real torchtitan checkpoints: its models, its optimizer container, its checkpoint manager."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.formats import titan_families


@dataclass(frozen=True)
class Sizes:
    """The numbers of the model; the last ones are of models with experts, with vision."""

    dim: int = 48
    hidden_dim: int = 40
    n_heads: int = 6
    n_kv_heads: int = 2
    head_dim: int = 8
    vocab: int = 67
    layers: int = 2
    expert_dim: int = 24
    shared_dim: int = 32
    experts: int = 4
    top_k: int = 2
    groups: int = 0
    vision_ffn: int = 20


def build(sizes: Sizes, *, fuse_qkv: bool = True, family: str = "llama3") -> nn.Module:
    """Torchtitan's model of a family, all parameters random."""
    model = _LAYERS[family](sizes, fuse_qkv) if family in _LAYERS else _llama(sizes, fuse_qkv)
    centers = {
        f"{name}.weight": getattr(module, "gain_center", 1.0)
        for name, module in model.named_modules()
        if type(module).__name__ in ("OffsetRMSNorm", "RMSGainCenterNorm")
    }
    torch.manual_seed(3)
    model.init_weights(buffer_device=torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape) * 0.2
            parameter.copy_(noise + 1.0 - centers.get(name, 0.0) if "norm" in name else noise)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias_E"):
                buffer.copy_(torch.randn(buffer.shape) * 0.1)
    return model


def _decoder(
    model: Any, sizes: Sizes, layers: list[Any], *, tied: bool = False, sdpa: bool = True, **more: Any
) -> nn.Module:
    """A decoder of torchtitan's around such layers; attention by SDPA: flex needs a compiler."""
    from torchtitan.models.common import Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention

    init: Any = {"weight": nn.init.normal_}
    attentions = [layer.attention for layer in (*layers, *more.get("mtp_layers", ()))]
    for attention in filter(None, attentions if sdpa else ()):
        attention.inner_attention = ScaledDotProductAttention.Config()
    config = model.Config(
        dim=sizes.dim,
        vocab_size=sizes.vocab,
        tok_embeddings=Embedding.Config(num_embeddings=sizes.vocab, embedding_dim=sizes.dim, param_init=init),
        lm_head=Linear.Config(in_features=sizes.dim, out_features=sizes.vocab, param_init=init),
        layers=layers,
        enable_weight_tying=tied,
        **{"norm": RMSNorm.Config(normalized_shape=sizes.dim, param_init=init), **more},
    )
    return config.build()


def _qwen3(sizes: Sizes, fuse_qkv: bool, *, tied: bool = False, experts: bool = False) -> nn.Module:
    from torchtitan.models import qwen3
    from torchtitan.models.common import CosSinRoPE

    common: dict[str, Any] = {
        "n_layers": sizes.layers,
        "dim": sizes.dim,
        "n_heads": sizes.n_heads,
        "n_kv_heads": sizes.n_kv_heads,
        "head_dim": sizes.head_dim,
        "fuse_qkv": fuse_qkv,
        "attn_backend": "flex",
        "rope": CosSinRoPE.Config(dim=sizes.head_dim, max_seq_len=64, theta=10000.0),
    }
    if experts:
        layers = qwen3._build_qwen3_moe_layers(
            **common,
            moe_hidden_dim=sizes.expert_dim,
            num_experts=sizes.experts,
            top_k=sizes.top_k,
            moe_comm_backend="standard",
        )
    else:
        layers = qwen3._build_qwen3_layers(**common, hidden_dim=sizes.hidden_dim)
    return _decoder(qwen3.Qwen3Model, sizes, layers, tied=tied)


def _deepseek(
    sizes: Sizes, fuse_qkv: bool, *, q_lora: int = 0, mtp: int = 0, vision: bool = False, norm: bool = False
) -> nn.Module:
    from torchtitan.models import deepseek_v3 as dsv3
    from torchtitan.models.common import ComplexRoPE
    from torchtitan.models.common.config_utils import make_ffn_config

    layers = dsv3.build_mla_moe_layers(
        n_layers=sizes.layers,
        n_dense_layers=1,
        dim=sizes.dim,
        n_heads=sizes.n_heads,
        q_lora_rank=q_lora,
        kv_lora_rank=20,
        qk_nope_head_dim=10,
        qk_rope_head_dim=8,
        v_head_dim=14,
        mscale=1.0,
        dense_hidden_dim=sizes.hidden_dim,
        moe_hidden_dim=sizes.expert_dim,
        num_experts=sizes.experts,
        num_shared_experts=1,
        router_top_k=sizes.top_k,
        router_score_func="sigmoid",
        router_route_norm=norm,
        router_num_expert_groups=sizes.groups or None,
        router_num_limited_groups=sizes.groups // 2 or None,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        linear_init=dsv3._LINEAR_INIT,
        norm_init=dsv3._NORM_INIT,
        depth_init=dsv3._depth_init,
        depth_experts_init=dsv3._depth_experts_init,
        rope=ComplexRoPE.Config(dim=8, max_seq_len=64, theta=10000.0),
    )
    layers[-1].moe.shared_experts = make_ffn_config(
        dim=sizes.dim,
        hidden_dim=sizes.shared_dim,
        w1_param_init=dsv3._LINEAR_INIT,
        w2w3_param_init=dsv3._LINEAR_INIT,
    )
    if vision:
        from torchtitan.models.kimi_k2_7 import KimiK25Model

        encoder = titan_families.kimi_vision(sizes)
        return _decoder(KimiK25Model, sizes, layers, vision_encoder=encoder)
    ahead = dsv3._build_mtp_layers(layers[-1], dim=sizes.dim, num_mtp_layers=mtp)
    for layer in ahead:
        layer.eh_proj.param_init = dsv3._LINEAR_INIT
        for norm in (layer.enorm, layer.hnorm, layer.mtp_norm):
            norm.param_init = dsv3._NORM_INIT
    return _decoder(dsv3.DeepSeekV3Model, sizes, layers, mtp_layers=ahead)


def _gpt_oss(sizes: Sizes, fuse_qkv: bool) -> nn.Module:
    model, layers = titan_families.gpt_oss(sizes, fuse_qkv)
    return _decoder(model, sizes, layers, sdpa=False)


def _muse_glimmer(sizes: Sizes, fuse_qkv: bool, *, vision: bool) -> nn.Module:
    return titan_families.muse_glimmer(sizes, vision=vision).build()


def _qwen3_5(sizes: Sizes, fuse_qkv: bool, *, experts: bool) -> nn.Module:
    model, layers, more = titan_families.qwen3_5(sizes, experts=experts)
    return _decoder(model, sizes, layers, **more)


_LAYERS: dict[str, Any] = {
    "qwen3": _qwen3,
    "qwen3-tied": partial(_qwen3, tied=True),
    "qwen3-moe": partial(_qwen3, experts=True),
    "qwen3-moe-tied": partial(_qwen3, experts=True, tied=True),
    "deepseek-v3": _deepseek,
    "deepseek-v3-norm": partial(_deepseek, norm=True),
    "deepseek-v3-lora": partial(_deepseek, q_lora=18),
    "deepseek-v3-mtp": partial(_deepseek, mtp=2),
    "gpt-oss": _gpt_oss,
    "qwen3.5": partial(_qwen3_5, experts=False),
    "qwen3.5-moe": partial(_qwen3_5, experts=True),
    "kimi": partial(_deepseek, vision=True),
    "muse-glimmer": partial(_muse_glimmer, vision=False),
    "muse-glimmer-vision": partial(_muse_glimmer, vision=True),
}


def _llama(sizes: Sizes, fuse_qkv: bool) -> nn.Module:
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
    from torchtitan.models.llama3 import Llama3Model
    from torchtitan.models.llama3.model import Llama3TransformerBlock

    dim, vocab = sizes.dim, sizes.vocab
    linear: Any = {"weight": partial(nn.init.normal_, std=0.2)}
    norm: Any = RMSNorm.Config(normalized_shape=dim, param_init={"weight": nn.init.normal_})

    def block() -> Any:
        return Llama3TransformerBlock.Config(
            attention_norm=norm,
            ffn_norm=norm,
            attention=make_gqa_config(
                dim=dim,
                n_heads=sizes.n_heads,
                n_kv_heads=sizes.n_kv_heads,
                head_dim=sizes.head_dim,
                wqkv_param_init=linear,
                wo_param_init=linear,
                inner_attention=ScaledDotProductAttention.Config(),
                fuse_qkv=fuse_qkv,
                rope=ComplexRoPE.Config(dim=sizes.head_dim, max_seq_len=64, theta=500000, scaling="llama"),
            ),
            feed_forward=make_ffn_config(
                dim=dim, hidden_dim=sizes.hidden_dim, w1_param_init=linear, w2w3_param_init=linear
            ),
        )

    config = Llama3Model.Config(
        dim=dim,
        vocab_size=vocab,
        tok_embeddings=Embedding.Config(num_embeddings=vocab, embedding_dim=dim, param_init=linear),
        norm=norm,
        lm_head=Linear.Config(in_features=dim, out_features=vocab, param_init=linear),
        layers=[block() for _ in range(sizes.layers)],
    )
    return config.build()


def batch(sizes: Sizes, step: int = 0) -> torch.Tensor:
    """Random tokens, the same for the same step."""
    return torch.randint(sizes.vocab, (2, 16), generator=torch.Generator().manual_seed(30 + step))


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """All that the model predicts: of the next token and, with MTP, of those beyond it."""
    return torch.stack(titan_families.outputs_of(model, ids))


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Next-token loss, with MTP the losses of further tokens besides."""
    return titan_families.loss_of(titan_families.outputs_of(model, ids), ids)


class TrainState:
    """The step counter, saved as torchtitan's trainer saves its own."""

    def __init__(self) -> None:
        self.step = 0
        self.ntokens_seen = 0

    def state_dict(self) -> dict[str, Any]:
        """As torchtitan's trainer."""
        return {"step": self.step, "ntokens_seen": self.ntokens_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As torchtitan's trainer."""
        self.step, self.ntokens_seen = state["step"], state["ntokens_seen"]


class Run:
    """A training run put together of torchtitan's own parts. Needs a process group."""

    def __init__(self, folder: Path, sizes: Sizes, *, fuse_qkv: bool = True, family: str = "llama3") -> None:
        from torchtitan.components.checkpoint import CheckpointManager
        from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
        from torchtitan.components.optimizer.lr_scheduler import LRSchedulersContainer

        self.sizes = sizes
        self.model = build(sizes, fuse_qkv=fuse_qkv, family=family)
        group = ParamGroupConfig(
            pattern=".*",
            optimizer_name="AdamW",
            optimizer_kwargs={"lr": 2e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
        )
        self.optimizers = OptimizersContainer(
            OptimizersContainer.Config(param_groups=[group], implementation="for-loop"),
            model_parts=[self.model],
        )
        self.schedulers = LRSchedulersContainer(self.optimizers, lambda step: 1.0 / (1 + step / 50))
        self.state = TrainState()
        self.manager = CheckpointManager(
            CheckpointManager.Config(enable=True, folder=str(folder), interval=1, last_save_model_only=False),
            dataloader=None,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedulers,
            states={"train_state": self.state},
            sd_adapter=None,
        )

    def train(self, steps: int) -> None:
        """Some real optimizer steps."""
        for _ in range(steps):
            self.optimizers.zero_grad()
            ids = batch(self.sizes, self.state.step)
            loss_of(self.model, ids).backward()
            self.optimizers.step()
            self.schedulers.step()
            self.state.step += 1
            self.state.ntokens_seen += ids.numel()
        self.optimizers.zero_grad()


def make_torchtitan(
    folder: Path,
    sizes: Sizes | None = None,
    *,
    steps: int = 3,
    fuse_qkv: bool = True,
    family: str = "llama3",
) -> Run:
    """Train and save ``folder/step-N`` through torchtitan's checkpoint manager."""
    run = Run(folder, sizes or Sizes(), fuse_qkv=fuse_qkv, family=family)
    run.train(steps)
    run.manager.save(steps, last_step=True)
    return run
