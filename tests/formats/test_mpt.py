"""llm-foundry's MPT in composer's rank file: by a faithful small model of its class, whose names it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.models.locate import packaged_layout
from tests.formats.widening import check_moments, widen

STEPS = 5
#: the config's own keys, as llm-foundry writes them beside the weights
CONFIG: dict[str, Any] = {
    "model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 4, "max_seq_len": 64,
    "vocab_size": 96, "learned_pos_emb": True, "no_bias": True, "head_dim": None, "logit_scale": None,
    "norm_type": "low_precision_layernorm", "tie_word_embeddings": True, "block_overrides": None,
    "attn_config": {
        "attn_type": "multihead_attention", "attn_pdrop": 0.0, "fused_qkv": True, "qk_ln": False,
        "qk_gn": False, "alibi": False, "rope": False, "kv_dim": None,
    },
    "ffn_config": {"ffn_type": "mptmlp"},
}  # fmt: skip


def config(**changes: Any) -> dict[str, Any]:
    """Keys of the two tables are given by their own names."""
    made = {key: dict(value) if isinstance(value, dict) else value for key, value in CONFIG.items()}
    for key, value in changes.items():
        home = made["ffn_config" if key.startswith("ffn") else "attn_config"]
        (made if key in made else home)[key] = value
    return made


class Attention(nn.Module):
    """Queries, keys and values behind each other in one matrix; ALiBi, rotary positions or neither."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.c, options = c, c["attn_config"]
        self.heads, self.size = c["n_heads"], c["head_dim"] or c["d_model"] // c["n_heads"]
        self.groups = options.get("kv_n_heads", self.heads)
        bias = not c["no_bias"]
        self.Wqkv = nn.Linear(c["d_model"], (self.heads + 2 * self.groups) * self.size, bias=bias)
        self.out_proj = nn.Linear(self.heads * self.size, c["d_model"], bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as ``x``."""
        counts, steps = (self.heads, self.groups, self.groups), torch.arange(x.shape[1])
        parts = self.Wqkv(x).split([n * self.size for n in counts], dim=-1)
        q, k, v = (
            part.unflatten(-1, (n, self.size)).transpose(1, 2) for part, n in zip(parts, counts, strict=True)
        )
        if self.c["attn_config"]["rope"]:
            angles = steps[:, None] * 1e4 ** -(torch.arange(self.size // 2) / (self.size // 2))
            cos, sin = (torch.cat([f, f], -1) for f in (angles.cos(), angles.sin()))
            q, k = (
                t * cos + torch.cat([-t[..., self.size // 2 :], t[..., : self.size // 2]], -1) * sin
                for t in (q, k)
            )
        bias = torch.full((len(steps), len(steps)), -torch.inf).triu(1)
        if self.c["attn_config"]["alibi"]:
            slopes = 2.0 ** (-8 / self.heads * torch.arange(1, self.heads + 1))
            bias = bias + slopes[:, None, None] * (steps - steps[:, None]).clamp(max=0)
        found = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
        return self.out_proj(found.transpose(1, 2).flatten(2))


class Ffn(nn.Module):
    """As wide as ``ffn_hidden_size`` says, else ``expansion_ratio`` times the model."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        inner = c["ffn_config"].get("ffn_hidden_size") or c["d_model"] * c["expansion_ratio"]
        bias = not c["no_bias"]
        self.up_proj = nn.Linear(c["d_model"], inner, bias=bias)
        self.down_proj = nn.Linear(inner, c["d_model"], bias=bias)
        self.gate_proj = None
        if c["ffn_config"]["ffn_type"] == "mptglu":
            self.gate_proj = nn.Linear(c["d_model"], inner, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as ``x``."""
        up = self.up_proj(x)
        return self.down_proj(
            functional.gelu(up) if self.gate_proj is None else functional.gelu(self.gate_proj(x)) * up
        )


class Block(nn.Module):
    """Norms before attention and MLP."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.norm_1, self.attn = norm(c), Attention(c)
        self.norm_2, self.ffn = norm(c), Ffn(c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as ``x``."""
        x = x + self.attn(self.norm_1(x))
        return x + self.ffn(self.norm_2(x))


def norm(c: dict[str, Any]) -> nn.Module:
    """With a bias where the model has some."""
    made = nn.RMSNorm(c["d_model"], eps=1e-5) if c["norm_type"] == "rmsnorm" else nn.LayerNorm(c["d_model"])
    if c["no_bias"] and isinstance(made, nn.LayerNorm):
        made.register_parameter("bias", None)
    return made


class Mpt(nn.Module):
    """``MPTForCausalLM``."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        parts = {"wte": nn.Embedding(c["vocab_size"], c["d_model"])}
        if c["learned_pos_emb"]:
            parts["wpe"] = nn.Embedding(c["max_seq_len"], c["d_model"])
        blocks = nn.ModuleList(Block(c) for _ in range(c["n_layers"]))
        self.transformer = nn.ModuleDict({**parts, "blocks": blocks, "norm_f": norm(c)})
        self.lm_head = (
            None if c["tie_word_embeddings"] else nn.Linear(c["d_model"], c["vocab_size"], bias=False)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of (batch, time) tokens."""
        x = self.transformer["wte"](ids)
        if "wpe" in self.transformer:
            x = x + self.transformer["wpe"].weight[: ids.shape[1]]
        for block in self.transformer["blocks"]:
            x = block(x)
        x = self.transformer["norm_f"](x)
        return (
            functional.linear(x, self.transformer["wte"].weight) if self.lm_head is None else self.lm_head(x)
        )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Some real steps."""
    for step in range(first, last):
        ids = torch.randint(96, (4, 16), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()


def made(path: Path, c: dict[str, Any]) -> Mpt:
    """A trained model, saved as composer saves it: names begin with the attribute of its holder."""
    torch.manual_seed(0)
    model = Mpt(c)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, 0, STEPS)
    names = [f"model.{name}" for name, _ in model.named_parameters()]
    found = optimizer.state_dict()
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in found["param_groups"]]
    moments = {"state": {names[i]: slots for i, slots in found["state"].items()}, "param_groups": groups}
    state = {
        "model": {f"model.{name}": value for name, value in model.state_dict().items()},
        "optimizers": {"DecoupledAdamW": moments},
        "timestamp": {"Timestamp": {"batch": STEPS}},
        "integrations": {
            "huggingface": {"model": {"config": {"file_extension": ".json", "content": c}}},
        },
    }
    torch.save({"state": state, "rng": []}, path)
    return model


GROUPED = {
    "attn_type": "grouped_query_attention", "kv_n_heads": 2, "rope": True, "learned_pos_emb": False,
    "ffn_type": "mptglu", "norm_type": "rmsnorm", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "axes"),
    [
        (GROUPED, ("ffn", "hidden", "kv_heads", "vocab")),
        pytest.param({"no_bias": False}, ("ffn", "hidden", "heads"), marks=pytest.mark.slow),
        pytest.param({"alibi": True, "learned_pos_emb": False}, ("ffn",), marks=pytest.mark.slow),
    ],
)
def test_widened_and_trained_on(tmp_path: Path, changes: dict[str, Any], axes: tuple[str, ...]) -> None:
    """The wide model of the written config: logits, every entry of the state, ten more steps."""
    narrow = made(tmp_path / "ep0-ba5-rank0.pt", config(**changes))
    (tmp_path / "wide").mkdir()
    target = widen(
        tmp_path / "ep0-ba5-rank0.pt", tmp_path / "wide" / "ep0-ba5-rank0.pt", dict.fromkeys(axes, 2)
    )
    old, new = (torch.load(path)["state"] for path in (tmp_path / "ep0-ba5-rank0.pt", target))
    wide = Mpt(new["integrations"]["huggingface"]["model"]["config"]["content"])
    wide.load_state_dict({name.removeprefix("model."): value for name, value in new["model"].items()})
    ids = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(99))
    torch.testing.assert_close(wide(ids)[..., :96], narrow(ids), rtol=1e-5, atol=2e-5)
    before, after = (state["optimizers"]["DecoupledAdamW"]["state"] for state in (old, new))
    assert before.keys() == after.keys()
    for name, slots in before.items():
        check_moments(slots, after[name], name)
    optimizer = torch.optim.AdamW(wide.parameters(), lr=1e-3)
    states = {i: after[f"model.{name}"] for i, (name, _) in enumerate(wide.named_parameters())}
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    train(wide, optimizer, STEPS, STEPS + 10)
    up = wide.transformer["blocks"][0].ffn.up_proj.weight
    half = up.shape[0] // 2
    assert functional.cosine_similarity(up[:half], up[half:]).mean() < 0.9999


def test_what_its_layouts_are_not_for(tmp_path: Path) -> None:
    """ALiBi's heads stay; a norm over each head is another model, and so is the class of transformers."""

    def layout(c: dict[str, Any]) -> ModelLayout | None:
        made(tmp_path / "a.pt", c)
        return packaged_layout(open_checkpoint(tmp_path / "a.pt"))

    found = layout(config(alibi=True, learned_pos_emb=False))
    assert found is not None and found.name == "mpt-alibi"
    assert not found.axes["heads"].widenable and "slopes" in str(found.axes["heads"].reason)
    assert layout(config(qk_gn=True)) is None
    assert layout({**config(), "layer_norm_epsilon": 1e-5}) is None
