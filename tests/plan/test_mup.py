"""muP's multipliers and rates: what is said of them, by Microsoft's package and a nanoGPT with muP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparkling_cli import api

VOCAB, HIDDEN, FFN, BASE = 33, 16, 48, 8
LAYOUT = f"""
format = 1
name = "muP"

[axes]
hidden = {{ size = {HIDDEN} }}
ffn = {{ size = {FFN} }}
vocab = {{ size = {VOCAB} }}

[tensors]
"embed.weight" = "vocab -> hidden"
"up.weight" = "ffn <- hidden"
"down.weight" = "hidden <- ffn"
"head.weight" = "vocab <- hidden"
"""


def model(mup: Any, hidden: int, ffn: int, base: int) -> nn.Module:
    """An MLP under muP: its base has ``base`` of the hidden width, and three times that inside."""

    class Net(nn.Module):
        def __init__(self, hidden: int, ffn: int) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCAB, hidden)
            self.up = nn.Linear(hidden, ffn, bias=False)
            self.down = nn.Linear(ffn, hidden, bias=False)
            self.head = mup.MuReadout(hidden, VOCAB, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            return self.head(x + self.down(torch.relu(self.up(x))))

    torch.manual_seed(0)
    net = Net(hidden, ffn)
    mup.set_base_shapes(net, Net(base, 3 * base), delta=Net(2 * base, 6 * base), rescale_params=False)
    with torch.no_grad():
        net.head.weight.normal_(std=0.1)
    return net


def step(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> dict[str, Tensor]:
    """How far one step moves every parameter."""
    ids = torch.randint(VOCAB, (4, 8), generator=torch.Generator().manual_seed(number))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(ids).flatten(0, 1), ids.flatten()).backward()
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in net.named_parameters()}


def test_a_base_that_has_grown_too_keeps_function_and_steps(tmp_path: Path) -> None:
    """With Microsoft's package; a base that stays halves the logits and its own groups' rate."""
    mup = pytest.importorskip("mup", reason="pip install mup==1.0.0")
    net = model(mup, HIDDEN, FFN, BASE)
    made = mup.MuAdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    for number in range(5):
        step(net, made, number)
    saved = {"model": net.state_dict(), "optimizer": made.state_dict()}
    torch.save(saved, tmp_path / "narrow.pt")
    (tmp_path / "layout.toml").write_text(LAYOUT)
    names = [name for group in made.param_groups for p in group["params"]
             for name, q in net.named_parameters() if q is p]  # fmt: skip
    (tmp_path / "order.txt").write_text("\n".join(names))
    wide = tmp_path / "wide.pt"
    found = api.expand(
        tmp_path / "narrow.pt", wide, axes={"hidden": 2, "ffn": 2}, scaling="function", report="none",
        layout=tmp_path / "layout.toml", param_order=tmp_path / "order.txt",
    )  # fmt: skip
    (note,) = [note for note in found.report.notes if note.startswith("muP")]
    assert "rates of 0.005, 0.01 (MuAdam's) stay as they are" in note

    ids = torch.randint(VOCAB, (2, 8))
    expanded = torch.load(wide)
    ratios, outputs, rates = [], [], []
    for base in (2 * BASE, BASE):
        other = model(mup, 2 * HIDDEN, 2 * FFN, base)
        other.load_state_dict(expanded["model"])
        outputs.append(other(ids))
        optimizer = mup.MuAdamW(other.parameters(), lr=1e-2, weight_decay=0.1)
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.load_state_dict(expanded["optimizer"])
        ratios.append(optimizer.param_groups[0]["lr"] / made.param_groups[0]["lr"])
    torch.testing.assert_close(outputs[0], net(ids))
    torch.testing.assert_close(outputs[1], net(ids) / 2)
    assert rates == [[5e-3, 1e-2], [2.5e-3, 1e-2]] and ratios == [1.0, 1.0]


def test_a_nanogpt_with_mup(tmp_path: Path) -> None:
    """Its multiplier and the groups' shares of the rate are named; without muP nothing is said."""
    width, heads, depth = 32, 4, 1
    sizes = {"wte": (VOCAB, width), "wpe": (16, width), "ln_f": (width,)}
    block = {"ln_1": (width,), "attn.c_attn": (3 * width, width), "attn.c_proj": (width, width),
             "ln_2": (width,), "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}  # fmt: skip
    shapes = {**sizes, **{f"h.{n}.{name}": shape for n in range(depth) for name, shape in block.items()}}
    params = {f"transformer.{name}.weight": nn.Parameter(torch.randn(s)) for name, s in shapes.items()}
    hidden = [p for name, p in params.items() if "c_" in name]
    others = [p for name, p in params.items() if "c_" not in name]
    args = {"n_layer": depth, "n_head": heads, "n_embd": width, "block_size": 16, "bias": False,
            "vocab_size": VOCAB, "dropout": 0.0}  # fmt: skip
    for mup in (True, False):
        groups = [{"params": hidden, "lr_scale": 0.5 if mup else 1}, {"params": others, "lr_scale": 1}]
        made = torch.optim.AdamW(groups, lr=1e-3)
        for p in params.values():
            p.grad = torch.randn_like(p)
        made.step()
        model = {name: p.detach() for name, p in params.items()}
        more = {"mup_width_multiplier": 2.0} if mup else {}
        torch.save(
            {
                "model": {**model, "lm_head.weight": model["transformer.wte.weight"]},
                "optimizer": made.state_dict(), "model_args": {**args, **more}, "iter_num": 1,
                "best_val_loss": torch.tensor(3.0), "config": {**args, **more},
            },
            tmp_path / "ckpt.pt",
        )  # fmt: skip
        order = [name for group in (hidden, others) for p in group for name, q in params.items() if q is p]
        (tmp_path / "order.txt").write_text("\n".join(order))
        plan = api.make_plan(
            tmp_path / "ckpt.pt", axes={"hidden": 2, "heads": 2, "ffn": 2}, param_order=tmp_path / "order.txt"
        ).plan
        notes = [note for note in plan.notes if note.startswith("muP")]
        assert len(notes) == mup
        assert not mup or "mup_width_multiplier = 2 and groups with lr_scale 0.5, 1 stay" in notes[0]
        assert "mup_width_multiplier" not in plan.config
