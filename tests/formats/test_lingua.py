"""lingua's checkpoints: DCP written by torch's own calls, of a model with lingua's names and arithmetic."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.training import rewarm
from tests.formats.widening import check_moments, widen

STEPS = 5
SIZES = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": None, "vocab_size": 61,
    "ffn_dim_multiplier": 1.3, "multiple_of": 8, "weight_tying": False,
}  # fmt: skip


def ffn_width(sizes: dict[str, Any]) -> int:
    """Of the MLPs, as lingua's FeedForward computes it."""
    inner = int(2 * 4 * sizes["dim"] / 3)
    if sizes["ffn_dim_multiplier"] is not None:
        inner = int(sizes["ffn_dim_multiplier"] * inner)
    return sizes["multiple_of"] * ((inner + sizes["multiple_of"] - 1) // sizes["multiple_of"])


class Block(nn.Module):
    """Pre-norm attention with grouped queries, and a gated MLP."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        width, self.size = sizes["dim"], sizes["dim"] // sizes["n_heads"]
        keys, inner = sizes["n_kv_heads"] * self.size, ffn_width(sizes)
        shapes = {"wq": (width, width), "wk": (width, keys), "wv": (width, keys), "wo": (width, width)}
        self.attention = nn.ModuleDict({n: nn.Linear(*shape, bias=False) for n, shape in shapes.items()})
        shapes = {"w1": (width, inner), "w3": (width, inner), "w2": (inner, width)}
        self.feed_forward = nn.ModuleDict({n: nn.Linear(*s, bias=False) for n, s in shapes.items()})
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as ``x``."""
        part, h = self.attention, self.attention_norm(x)
        q, k, v = (
            part[name](h).view(*x.shape[:2], -1, self.size).transpose(1, 2) for name in ("wq", "wk", "wv")
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + part["wo"](mixed.transpose(1, 2).flatten(2))
        part, h = self.feed_forward, self.ffn_norm(x)
        return x + part["w2"](functional.silu(part["w1"](h)) * part["w3"](h))


class Transformer(nn.Module):
    """The names of lingua's LMTransformer."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(sizes["vocab_size"], sizes["dim"])
        self.layers = nn.ModuleList(Block(sizes) for _ in range(sizes["n_layers"]))
        self.norm = nn.RMSNorm(sizes["dim"])
        tied = sizes["weight_tying"]
        self.output = None if tied else nn.Linear(sizes["dim"], sizes["vocab_size"], bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        head = self.tok_embeddings if self.output is None else self.output
        return functional.linear(self.norm(x), head.weight)


def train(model: Transformer, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Some real steps."""
    for step in range(first, last):
        ids = torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()


@contextmanager
def quiet() -> Iterator[None]:
    """DCP without a process group warns of just that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_lingua(root: Path, **sizes: Any) -> Transformer:
    """Train and save ``checkpoints/0000000005``; gives the model back."""
    torch.manual_seed(0)
    config = {**SIZES, **sizes}
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    train(model, optimizer, 0, STEPS)
    weights, state = get_state_dict(model, optimizer)
    with quiet():
        dcp.save({"model": weights, "optim": state}, checkpoint_id=root)
    options = {
        "name": "tiny", "steps": 40, "model": config,
        "optim": {"lr": 1e-3, "warmup": 2, "lr_min_ratio": 0.1, "scheduler": "cosine", "cycle_length": 1.0},
    }  # fmt: skip
    (root / "params.json").write_text(json.dumps(options))
    (root / "train_state_00000.json").write_text(json.dumps({"step": STEPS, "acc_step": 0}))
    (root / "consolidated").mkdir()
    with quiet():
        dcp_to_torch_save(root, root / "consolidated" / "consolidated.pth")
    (root / "consolidated" / "params.json").write_text(json.dumps(options))
    return model


def load(root: Path) -> tuple[Transformer, torch.optim.AdamW]:
    """As lingua resumes: a model from ``params.json``, then ``dcp.load`` into it."""
    model = Transformer(json.loads((root / "params.json").read_text())["model"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    weights, state = get_state_dict(model, optimizer)
    found = {"model": weights, "optim": state}
    with quiet():
        dcp.load(found, checkpoint_id=root)
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optim"])
    return model, optimizer


@pytest.mark.parametrize(
    ("axes", "sizes"),
    [
        ({"ffn": 2, "vocab": 2}, {}),
        ({"hidden": 2, "kv_heads": 2}, {}),
        ({"hidden": 2, "kv_heads": 2, "ffn": 3}, {"ffn_dim_multiplier": None}),
        ({"hidden": 2, "kv_heads": 2, "ffn": 2, "vocab": 2}, {"weight_tying": True, "multiple_of": 1}),
    ],
)
def test_widened_and_trained_on(tmp_path: Path, axes: dict[str, int], sizes: dict[str, Any]) -> None:
    """Lingua's own computation gives the new width; the same logits, state, ten steps that part copies."""
    source = tmp_path / "0000000005"
    narrow = make_lingua(source, **sizes)
    target = widen(source, tmp_path / "wide", axes, rewarmup={"steps": 4})
    assert open_checkpoint(source).facts["kind"] == "lingua"
    assert not (target / "consolidated").exists()
    (_, before), (wide, optimizer) = load(source), load(target)
    ids = torch.arange(24).reshape(2, 12)
    torch.testing.assert_close(wide(ids)[..., :61], narrow(ids), rtol=1e-5, atol=1e-5)
    old, new = before.state_dict()["state"], optimizer.state_dict()["state"]
    for number, slots in old.items():
        check_moments(slots, new[number], str(number))
        assert new[number]["step"] == STEPS
    rewarm(optimizer, wide, target, announce=False)
    train(wide, optimizer, STEPS, STEPS + 10)
    queries = wide.layers[0].attention["wq"].weight
    down = wide.layers[0].feed_forward["w2"].weight.T if "ffn" in axes else queries.T
    part = down.shape[0] // axes.get("ffn", 2)
    assert functional.cosine_similarity(down[:part], down[part : 2 * part]).mean() < 0.9999


def test_a_width_that_no_multiplier_gives(tmp_path: Path) -> None:
    """The message says which factors there are."""
    make_lingua(tmp_path / "0000000005", multiple_of=8)
    with pytest.raises(CheckpointError, match=r"multiple of model\.multiple_of = 8") as refused:
        widen(tmp_path / "0000000005", tmp_path / "wide", {"ffn": 1.125})
    assert "--multiple-of 8" in str(refused.value.hint)
    widen(tmp_path / "0000000005", tmp_path / "wide", {"ffn": 1.125}, multiple_of=8)
    assert load(tmp_path / "wide")[0].layers[0].feed_forward["w1"].weight.shape[0] == 128


@pytest.mark.parametrize("lost", ["__0_0.distcp", "params.json"])
def test_a_missing_file_is_named(tmp_path: Path, lost: str) -> None:
    """A rank's file that was not copied, or the sizes; a run's folder names its step."""
    step = tmp_path / "run" / "checkpoints" / "0000000005"
    step.parent.mkdir(parents=True)
    make_lingua(step)
    with pytest.raises(CheckpointError, match="is a folder of checkpoints: 0000000005") as refused:
        open_checkpoint(tmp_path / "run")
    assert str(step) in str(refused.value.hint)
    (step / lost).unlink()
    with pytest.raises(CheckpointError, match=rf"{lost} is missing"):
        open_checkpoint(step)
