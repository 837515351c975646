"""A GPT and an optimizer with nanochat's names, groups and step files, trained for some real steps.

nanochat is run from its repository, so what it leaves on disk is written faithfully here: the parameters and
what each does, AdamW and Muon in one optimizer whose Muon state is stacked by shape, and files per rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

STEP = 5
BATCH = 4096
OPTIONS = {
    "depth": 4, "head_dim": 8, "num_iterations": 40, "warmup_steps": 2, "warmdown_ratio": 0.5,
    "final_lr_frac": 0.05,
}  # fmt: skip


@dataclass(frozen=True)
class GPTConfig:
    """The numbers under ``model_config``."""

    sequence_len: int = 32
    vocab_size: int = 60
    n_layer: int = 4
    n_head: int = 8
    n_kv_head: int = 8
    n_embd: int = 64
    window_pattern: str = "L"

    @property
    def head_dim(self) -> int:
        """Of queries, keys and values."""
        return self.n_embd // self.n_head


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMS norm without a scale."""
    return functional.rms_norm(x, (x.shape[-1],))


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions of (batch, time, heads, size)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * 100.0 ** -(torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


def linear(inner: int, outer: int) -> nn.Linear:
    """Without a bias."""
    return nn.Linear(inner, outer, bias=False)


class Attention(nn.Module):
    """Normed queries and keys; every second layer adds a gated embedding of the token to its values."""

    def __init__(self, config: GPTConfig, *, gated: bool) -> None:
        super().__init__()
        self.config = config
        keys = config.n_kv_head * config.head_dim
        self.c_q, self.c_k = linear(config.n_embd, config.n_embd), linear(config.n_embd, keys)
        self.c_v, self.c_proj = linear(config.n_embd, keys), linear(config.n_embd, config.n_embd)
        self.ve_gate = linear(12, config.n_kv_head) if gated else None

    def forward(self, x: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
        """Same shape as ``x``."""
        size = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = self.c_q(x).view(size), self.c_k(x).view(size), self.c_v(x).view(size)
        if self.ve_gate is not None and extra is not None:
            v = v + 3 * torch.sigmoid(self.ve_gate(x[..., :12]))[..., None] * extra.view(size)
        q, k = 1.2 * norm(rotated(q)), 1.2 * norm(rotated(k))
        heads = [part.transpose(1, 2) for part in (q, k, v)]
        y = functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Four times as wide inside; squared ReLU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc, self.c_proj = (
            linear(config.n_embd, 4 * config.n_embd),
            linear(4 * config.n_embd, config.n_embd),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as ``x``."""
        return self.c_proj(functional.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """Attention and MLP."""

    def __init__(self, config: GPTConfig, *, gated: bool) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(config, gated=gated), Mlp(config)

    def forward(self, x: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
        """Same shape as ``x``."""
        x = x + self.attn(norm(x), extra)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """The model; tables have a multiple of 64 rows."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        rows, layers = -(-config.vocab_size // 64) * 64, range(config.n_layer)
        gated = [i for i in layers if i % 2 == (config.n_layer - 1) % 2]
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.full((config.n_layer,), 0.1))
        self.smear_lambda, self.backout_lambda = (nn.Parameter(torch.full((1,), 0.2)) for _ in "ab")
        blocks = nn.ModuleList(Block(config, gated=i in gated) for i in layers)
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(rows, config.n_embd), "h": blocks})
        self.lm_head = linear(config.n_embd, rows)
        self.smear_gate = linear(24, 1)
        keys = config.n_kv_head * config.head_dim
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(rows, keys) for i in gated})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of (batch, time) tokens."""
        x = norm(self.transformer["wte"](ids))
        gate = self.smear_lambda * torch.sigmoid(self.smear_gate(x[:, 1:, :24]))
        first = x = torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1)
        middle = x
        for i, block in enumerate(self.transformer["h"]):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * first
            x = block(x, self.value_embeds[str(i)](ids) if str(i) in self.value_embeds else None)
            middle = x if i == self.config.n_layer // 2 else middle
        logits = self.lm_head(norm(x - self.backout_lambda * middle))[..., : self.config.vocab_size]
        return 15 * torch.tanh(logits / 15)

    def groups(self) -> Iterator[dict[str, Any]]:
        """The optimizer's, in nanochat's order."""
        adam = {"kind": "adamw", "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.01}
        for params, rate in (
            ([self.lm_head.weight], 0.004),
            ([self.transformer["wte"].weight], 0.2),
            (list(self.value_embeds.parameters()), 0.1),
            ([self.resid_lambdas], 0.005),
            ([self.x0_lambdas], 0.5),
            ([self.smear_gate.weight, self.smear_lambda, self.backout_lambda], 0.2),
        ):
            yield {**adam, "params": params, "lr": rate, "initial_lr": rate}
        matrices = list(self.transformer["h"].parameters())
        muon = {"kind": "muon", "lr": 0.02, "initial_lr": 0.02, "momentum": 0.95, "beta2": 0.9}
        for shape in sorted({p.shape for p in matrices}):
            yield {**muon, "params": [p for p in matrices if p.shape == shape]}


class MuonAdamW(torch.optim.Optimizer):
    """AdamW, and Muon whose state (its second moment factored) is stacked, under a group's first."""

    def __init__(self, groups: Iterator[dict[str, Any]]) -> None:
        super().__init__(list(groups), {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of everything that has a gradient."""
        for group in self.param_groups:
            if group["kind"] == "muon":
                self._muon(group)
                continue
            for p in group["params"]:
                state, (beta1, beta2) = self.state[p], group["betas"]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
                size = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] / (1 - beta1 ** state["step"]) * state["exp_avg"] / size)

    def _muon(self, group: dict[str, Any]) -> None:
        params = group["params"]
        rows, columns = params[0].shape
        state, grads = self.state[params[0]], torch.stack([p.grad for p in params])
        dim = 2 if rows >= columns else 1
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grads)
        if "second_momentum_buffer" not in state:
            state["second_momentum_buffer"] = torch.zeros_like(grads.narrow(dim, 0, 1))
        state["momentum_buffer"].lerp_(grads, 1 - group["momentum"])
        u, _, v = torch.linalg.svd(
            grads.lerp(state["momentum_buffer"], group["momentum"]), full_matrices=False
        )
        update = u @ v
        mean = update.square().mean(dim=dim, keepdim=True)
        state["second_momentum_buffer"].lerp_(mean, 1 - group["beta2"])
        scaled = update * state["second_momentum_buffer"].clamp_min(1e-10).rsqrt()
        scaled *= update.norm(dim=(1, 2), keepdim=True) / scaled.norm(dim=(1, 2), keepdim=True)
        for p, change in zip(params, scaled, strict=True):
            p.sub_(group["lr"] * max(1.0, rows / columns) ** 0.5 * change)


def batch(config: GPTConfig, step: int) -> torch.Tensor:
    """Random tokens, the same for the same step."""
    return torch.randint(config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(step))


def train(model: GPT, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Some real steps."""
    for step in range(first, last):
        optimizer.zero_grad()
        ids = batch(model.config, step)
        functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()


def rank_states(saved: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """What one of several ranks saves: its rows of large tables, its share of every stack, padded."""
    kinds = {n: group["kind"] for group in saved["param_groups"] for n in group["params"]}
    state: dict[int, dict[str, Any]] = {}
    for number, slots in saved["state"].items():
        state[number] = {}
        for slot, value in slots.items():
            if kinds[number] == "muon":
                each = -(-len(value) // ranks)
                value = torch.cat([value, value.new_zeros(each * ranks - len(value), *value.shape[1:])])
                value = value[rank * each : (rank + 1) * each].clone()
            elif isinstance(value, torch.Tensor) and value.numel() >= 1024:
                value = value.chunk(ranks)[rank].clone()
            state[number][slot] = value
    return {"state": state, "param_groups": saved["param_groups"]}


def whole_states(parts: list[dict[str, Any]], model: GPT) -> dict[str, Any]:
    """One rank's state from that of all ranks, by the sizes of a model's parameters."""
    params = [p for group in model.groups() for p in group["params"]]
    counts = {n: len(group["params"]) for group in parts[0]["param_groups"] for n in group["params"][:1]}
    state: dict[int, dict[str, Any]] = {}
    for number, slots in parts[0]["state"].items():
        state[number] = {}
        for slot, value in slots.items():
            several = [part["state"][number][slot] for part in parts]
            if slot in ("momentum_buffer", "second_momentum_buffer"):
                value = torch.cat(several)[: counts[number]]
                assert not torch.cat(several)[counts[number] :].any()
            elif isinstance(value, torch.Tensor) and params[number].numel() >= 1024:
                value = torch.cat(several)
            else:
                assert all(torch.equal(torch.as_tensor(one), torch.as_tensor(value)) for one in several)
            state[number][slot] = value
    return {"state": state, "param_groups": parts[0]["param_groups"]}


def save(root: Path, model: GPT, optimizer: MuonAdamW, *, step: int = STEP, ranks: int = 1) -> None:
    """The files of a step."""
    root.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), root / f"model_{step:06d}.pt")
    options = {**OPTIONS, "aspect_ratio": model.config.n_embd // model.config.n_layer}
    meta = {
        "step": step, "val_bpb": float("inf"), "model_config": asdict(model.config), "user_config": options,
        "total_batch_size": BATCH, "loop_state": {"min_val_bpb": float("inf")},
    }  # fmt: skip
    (root / f"meta_{step:06d}.json").write_text(json.dumps(meta, indent=2))
    for rank in range(ranks):
        part = rank_states(optimizer.state_dict(), rank, ranks) if ranks > 1 else optimizer.state_dict()
        torch.save(part, root / f"optim_{step:06d}_rank{rank}.pt")


def make_nanochat(root: Path, *, ranks: int = 1, **sizes: int) -> GPT:
    """Train and save a small run's step; gives the model back."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(**sizes))
    optimizer = MuonAdamW(model.groups())
    train(model, optimizer, 0, STEP)
    save(root, model, optimizer, ranks=ranks)
    return model


def load(root: Path, *, step: int = STEP) -> tuple[GPT, MuonAdamW]:
    """As a run resumes from a step, every rank's state put together."""
    meta = json.loads((root / f"meta_{step:06d}.json").read_text())
    model = GPT(GPTConfig(**meta["model_config"]))
    model.load_state_dict(torch.load(root / f"model_{step:06d}.pt", weights_only=True))
    optimizer = MuonAdamW(model.groups())
    files = sorted(root.glob(f"optim_{step:06d}_rank*.pt"))
    parts = [torch.load(path, weights_only=True) for path in files]
    optimizer.load_state_dict(whole_states(parts, model))
    return model, optimizer
