"""Real torchtitan checkpoints: its Llama 3, its optimizer container, its checkpoint manager."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class Sizes:
    """The numbers of the model."""

    dim: int = 48
    hidden_dim: int = 40
    n_heads: int = 6
    n_kv_heads: int = 2
    head_dim: int = 8
    vocab: int = 67
    layers: int = 2


def build(sizes: Sizes, *, fuse_qkv: bool = True) -> nn.Module:
    """Torchtitan's ``Llama3Model``; attention by SDPA, as its flex kernel is no use on a CPU."""
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
    torch.manual_seed(3)
    model = config.build()
    model.init_weights()
    return model


def batch(sizes: Sizes, step: int = 0) -> torch.Tensor:
    """Random tokens, the same for the same step."""
    return torch.randint(sizes.vocab, (2, 16), generator=torch.Generator().manual_seed(30 + step))


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Next-token loss."""
    return functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


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

    def __init__(self, folder: Path, sizes: Sizes, *, fuse_qkv: bool = True) -> None:
        from torchtitan.components.checkpoint import CheckpointManager
        from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
        from torchtitan.components.optimizer.lr_scheduler import LRSchedulersContainer

        self.sizes = sizes
        self.model = build(sizes, fuse_qkv=fuse_qkv)
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
    folder: Path, sizes: Sizes | None = None, *, steps: int = 3, fuse_qkv: bool = True
) -> Run:
    """Train and save ``folder/step-N`` through torchtitan's checkpoint manager."""
    run = Run(folder, sizes or Sizes(), fuse_qkv=fuse_qkv)
    run.train(steps)
    run.manager.save(steps, last_step=True)
    return run
