"""A GPT with nanoGPT's documented parameter names and checkpoint dictionary, trained for some real steps.

nanoGPT is a script, not a package, so its documented layout is written faithfully here: the names of the
parameters, tied embedding and head, AdamW in two groups (two or more dims: weight decay; the rest: none),
and ``ckpt.pt`` = ``{model, optimizer, model_args, iter_num, best_val_loss, config}``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

TOKENS_SEED = 3


@dataclass(frozen=True)
class GPTConfig:
    """The numbers that nanoGPT keeps in ``model_args``."""

    block_size: int = 16
    vocab_size: int = 67
    n_layer: int = 2
    n_head: int = 3
    n_embd: int = 24
    dropout: float = 0.0
    bias: bool = True


class Norm(nn.Module):
    """LayerNorm whose bias is optional."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as ``x``."""
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    """Causal attention; queries, keys and values come out of one projection, one block after the other."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.heads = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as ``x``."""
        b, t, c = x.shape
        q, k, v = (
            part.view(b, t, self.heads, c // self.heads).transpose(1, 2)
            for part in self.c_attn(x).split(c, dim=2)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(b, t, c))


class Mlp(nn.Module):
    """Four times as wide inside as outside, always."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as ``x``."""
        return self.c_proj(functional.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = Norm(config.n_embd, config.bias)
        self.attn = Attention(config)
        self.ln_2 = Norm(config.n_embd, config.bias)
        self.mlp = Mlp(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as ``x``."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The model; embedding and head share one matrix."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": Norm(config.n_embd, config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``(batch, time, vocab)``."""
        parts = self.transformer
        x = parts["wte"](ids) + parts["wpe"](torch.arange(ids.shape[1]))
        for block in parts["h"]:
            x = block(x)
        return self.lm_head(parts["ln_f"](x))

    def optimizer(self, lr: float = 3e-3, weight_decay: float = 0.1) -> torch.optim.AdamW:
        """AdamW as nanoGPT configures it."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def batch(config: GPTConfig, step: int = 0) -> torch.Tensor:
    """Random tokens, the same for the same step."""
    generator = torch.Generator().manual_seed(TOKENS_SEED + step)
    return torch.randint(config.vocab_size, (4, config.block_size), generator=generator)


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Next-token loss."""
    logits = model(ids)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def scatter(model: nn.Module, std: float = 0.2) -> None:
    """Random values everywhere, norms and biases too, so that a wrong index shows."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise + 1.0 if parameter.dim() == 1 and "weight" in name else noise)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, config: GPTConfig, steps: int) -> None:
    """Some real optimizer steps."""
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(config, step)).backward()
        optimizer.step()


def make_nanogpt(
    path: Path, config: GPTConfig | None = None, *, steps: int = 4, prefix: str = "", dtype: str = "float32"
) -> GPT:
    """Train and save ``ckpt.pt``; gives the model back.

    Args:
        path: the file.
        config: sizes.
        steps: optimizer steps.
        prefix: ``_orig_mod.`` for a compiled model.
        dtype: of the weights.
    """
    config = config or GPTConfig()
    torch.manual_seed(5)
    model = GPT(config)
    scatter(model)
    model.to(getattr(torch, dtype))
    optimizer = model.optimizer()
    train(model, optimizer, config, steps)
    checkpoint: dict[str, Any] = {
        "model": {prefix + name: value for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": asdict(config),
        "iter_num": steps,
        "best_val_loss": torch.tensor(4.25),
        "config": {
            "learning_rate": 3e-3, "min_lr": 3e-4, "warmup_iters": 2, "lr_decay_iters": 40,
            "max_iters": 40, "decay_lr": True, "n_embd": config.n_embd, "n_head": config.n_head,
            "dataset": "text", "compile": bool(prefix),
        },
    }  # fmt: skip
    torch.save(checkpoint, path)
    return model


def resume_nanogpt(path: Path, prefix: str = "_orig_mod.") -> tuple[GPT, torch.optim.AdamW, dict[str, Any]]:
    """Resume as nanoGPT's ``train.py`` does with ``init_from='resume'``."""
    checkpoint = torch.load(path, weights_only=True)
    model = GPT(GPTConfig(**checkpoint["model_args"]))
    state = {name.removeprefix(prefix): value for name, value in checkpoint["model"].items()}
    model.load_state_dict(state)
    optimizer = model.optimizer()
    optimizer.load_state_dict(checkpoint["optimizer"])
    return model, optimizer, checkpoint
