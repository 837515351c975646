"""OLMo's unsharded steps, by a faithful writer of what its trainer leaves, and its model's own arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional

from sparkling_cli.errors import CheckpointError, SpecError
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.training import rewarm
from tests.formats.widening import check_moments, widen

STEPS = 5
SIZES = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 96, "vocab_size": 61}
KINDS = {
    "weight_tying": False, "rope": True, "alibi": False, "block_type": "sequential",
    "activation_type": "swiglu",
}  # fmt: skip
AXES = {"hidden": 2, "kv_heads": 2, "ffn": 2}


class Block(nn.Module):
    """Fused q, k, v; the MLP's two halves in one matrix, the gate second."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        width, self.heads, self.groups = (sizes[key] for key in ("d_model", "n_heads", "n_kv_heads"))
        self.size, inner = width // self.heads, sizes["mlp_hidden_size"]
        self.attn_norm, self.ff_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.att_proj = nn.Linear(width, width + 2 * self.groups * self.size, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_proj = nn.Linear(width, inner, bias=False)
        self.ff_out = nn.Linear(inner // 2, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as ``x``."""
        lengths = [self.heads * self.size, *[self.groups * self.size] * 2]
        parts = self.att_proj(self.attn_norm(x)).split(lengths, dim=-1)
        q, k, v = (part.view(*x.shape[:2], -1, self.size).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.attn_out(mixed.transpose(1, 2).flatten(2))
        up, gate = self.ff_proj(self.ff_norm(x)).chunk(2, dim=-1)
        return x + self.ff_out(functional.silu(gate) * up)


class Olmo(nn.Module):
    """The names of OLMo's model; the head is ``transformer.ff_out``."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        width, vocab = sizes["d_model"], sizes.get("embedding_size") or sizes["vocab_size"]
        parts = {
            "wte": nn.Embedding(vocab, width),
            "ln_f": nn.RMSNorm(width),
            "blocks": nn.ModuleList(Block(sizes) for _ in range(sizes["n_layers"])),
            "ff_out": nn.Linear(width, vocab, bias=False),
        }
        self.transformer = nn.ModuleDict(parts)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = self.transformer["wte"](ids)
        for block in self.transformer["blocks"]:
            x = block(x)
        return self.transformer["ff_out"](self.transformer["ln_f"](x))

    def optimizer(self) -> torch.optim.AdamW:
        """OLMo's two groups, decayed and not, each with its parameters' names."""
        groups: list[dict[str, Any]] = [
            {"params": [], "param_names": [], "weight_decay": 0.1},
            {"params": [], "param_names": [], "weight_decay": 0.0},
        ]
        for name, parameter in self.named_parameters():
            group = groups[parameter.dim() < 2 or "wte" in name]
            group["params"].append(parameter)
            group["param_names"].append(name)
        return torch.optim.AdamW(groups, lr=1e-3)


def train(model: Olmo, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Some real steps."""
    for step in range(first, last):
        ids = torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()


def make_olmo(root: Path, **kinds: Any) -> Olmo:
    """Train and save a step; gives the model back."""
    torch.manual_seed(0)
    model = Olmo(SIZES)
    optimizer = model.optimizer()
    train(model, optimizer, 0, STEPS)
    root.mkdir()
    torch.save(model.state_dict(), root / "model.pt")
    torch.save(optimizer.state_dict(), root / "optim.pt")
    torch.save({"global_step": STEPS, "epoch": 0}, root / "train.pt")
    config = {
        "run_name": "tiny", "model": {**SIZES, **KINDS, **kinds},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "scheduler": {"name": "cosine_with_warmup", "units": "steps", "t_warmup": 2, "alpha_f": 0.1},
        "max_duration": 40,
    }  # fmt: skip
    (root / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return model


def load(root: Path) -> tuple[Olmo, torch.optim.AdamW]:
    """As OLMo resumes from a step."""
    model = Olmo(yaml.safe_load((root / "config.yaml").read_text())["model"])
    model.load_state_dict(torch.load(root / "model.pt", weights_only=True))
    optimizer = model.optimizer()
    optimizer.load_state_dict(torch.load(root / "optim.pt", weights_only=True))
    return model, optimizer


def test_widened_and_trained_on(tmp_path: Path) -> None:
    """The same logits, every entry of the state, the schedule read, ten more steps in which copies part."""
    source = tmp_path / "step5-unsharded"
    narrow = make_olmo(source)
    target = widen(source, tmp_path / "wide", {**AXES, "vocab": 2}, rewarmup={"steps": 4})
    assert open_checkpoint(target).facts["global_step"] == STEPS
    (_, before), (wide, optimizer) = load(source), load(target)
    ids = torch.arange(24).reshape(2, 12)
    torch.testing.assert_close(wide(ids)[..., :61], narrow(ids), rtol=1e-5, atol=1e-5)
    old, new = before.state_dict()["state"], optimizer.state_dict()["state"]
    assert old.keys() == new.keys()
    for number, slots in old.items():
        check_moments(slots, new[number], str(number))
    rewarm(optimizer, wide, target, announce=False)
    train(wide, optimizer, STEPS, STEPS + 10)
    down = wide.transformer["blocks"][0].ff_out.weight
    half = down.shape[1] // 2
    assert functional.cosine_similarity(down[:, :half], down[:, half:], dim=0).mean() < 0.9999


def test_a_tied_head(tmp_path: Path) -> None:
    """Its embedding and head are one matrix, and OLMo's last norm may have no scale: the MLPs alone grow."""
    source = tmp_path / "step5-unsharded"
    make_olmo(source, weight_tying=True)
    tied = torch.load(source / "model.pt", weights_only=True)
    del tied["transformer.ff_out.weight"]
    torch.save(tied, source / "model.pt")
    (source / "optim.pt").unlink()
    options = {"optimizer": "drop", "allow_locked": True}
    widen(source, tmp_path / "wide", {"ffn": 2, "vocab": 2}, **options)
    found = yaml.safe_load((tmp_path / "wide" / "config.yaml").read_text())["model"]
    assert (found["embedding_size"], found["vocab_size"]) == (122, 61)
    with pytest.raises(SpecError, match="cannot be widened"):
        widen(source, tmp_path / "wider", {"hidden": 2, "kv_heads": 2}, **options)


@pytest.mark.parametrize("lost", ["model.pt", "config.yaml"])
def test_a_missing_file_is_named(tmp_path: Path, lost: str) -> None:
    """And a sharded step says how it is made into one that can be widened."""
    make_olmo(tmp_path / "step5")
    (tmp_path / "step5" / "train.pt").rename(tmp_path / "train.pt")
    assert any("train.pt is missing" in note for note in open_checkpoint(tmp_path / "step5").notes)
    (tmp_path / "train.pt").rename(tmp_path / "step5" / "train.pt")
    (tmp_path / "step5" / lost).unlink()
    with pytest.raises(CheckpointError, match=rf"{lost} is missing"):
        open_checkpoint(tmp_path / "step5")
    (tmp_path / "sharded" / "model").mkdir(parents=True)
    (tmp_path / "sharded" / "config.yaml").write_text("model: {}\n")
    torch.save({}, tmp_path / "sharded" / "model" / "rank0.pt")
    with pytest.raises(CheckpointError, match="sharded step of OLMo") as refused:
        open_checkpoint(tmp_path / "sharded")
    assert "unshard" in str(refused.value.hint)
