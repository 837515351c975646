"""What a widened checkpoint must hold, worked out from what the public loaders read from its source.

Only for 2x copy-copy of the tiny checkpoints' ``ffn``, whose size no other axis has: a dim of that size
is that axis. Fan-in (the last dim of a weight) is halved, moments are kept and zero where they are new.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

State = dict[str, torch.Tensor]


class UnreadableError(Exception):
    """The public loaders refuse the source, so that nobody may accept it."""


def weights_of(root: Path) -> State:
    """All weights, as transformers would find them."""
    index = root / "model.safetensors.index.json"
    try:
        if (root / "model.safetensors").is_file():
            return load_file(root / "model.safetensors")
        if index.is_file():
            names = set(json.loads(index.read_text())["weight_map"].values())
            return {key: value for name in sorted(names) for key, value in load_file(root / name).items()}
        return torch.load(root / "pytorch_model.bin", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError, ValueError) as error:
        raise UnreadableError(f"weights: {error}") from error


def optimizer_of(root: Path) -> Any:
    """``optimizer.pt``, or None."""
    for name in ("optimizer.pt", "optimizer.bin"):
        if (root / name).exists():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return torch.load(root / name, weights_only=True)
            except Exception as error:
                raise UnreadableError(f"optimizer: {error}") from error
    return None


def wider(tensor: torch.Tensor, ffn: int, *, moment: bool, fused: bool = False) -> torch.Tensor:
    """A tensor with every dim of size ``ffn`` doubled (both halves of a fused gate and up)."""
    for dim, size in enumerate(tensor.shape):
        if size == 2 * ffn and fused:
            halves = tensor.split(ffn, dim)
            return torch.cat([wider(half, ffn, moment=moment) for half in halves], dim)
        if size == ffn:
            new = torch.zeros_like(tensor) if moment else tensor
            whole = torch.cat([tensor, new], dim)
            fan_in = dim == tensor.ndim - 1 and tensor.ndim > 1 and not moment
            return whole * 0.5 if fan_in else whole
    return tensor


def fused_experts(weights: State) -> State:
    """Mixtral's weights under module names: experts stacked, gate above up."""
    found: State = {}
    parts: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for name, tensor in weights.items():
        match = re.fullmatch(r"(.*)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight", name)
        if match:
            parts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        else:
            found[name.replace("block_sparse_moe", "mlp")] = tensor
    for layer, experts in parts.items():
        count = 1 + max(number for number, _ in experts)
        gate_up = [torch.cat([experts[e, "w1"], experts[e, "w3"]]) for e in range(count)]
        found[f"{layer}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        found[f"{layer}.mlp.experts.down_proj"] = torch.stack([experts[e, "w2"] for e in range(count)])
    return found


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in dtype, shape and every entry; NaN is NaN."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def check_widened(source: Path, output: Path, *, ffn: int, fused: bool) -> None:
    """The output is the widened source, by the public loaders' reading of both.

    Raises:
        AssertionError: it is not.
        UnreadableError: the source should not have been accepted.
    """
    before, after = weights_of(source), weights_of(output)
    expected = (
        fused_experts(before) if fused and not any("gate_up_proj" in name for name in before) else before
    )
    if fused and not any("gate_up_proj" in name for name in after):
        after = fused_experts(after)
        expected = fused_experts(before)
    assert set(after) == set(expected), sorted(set(after) ^ set(expected))[:4]
    for name, tensor in expected.items():
        want = wider(tensor, ffn, moment=False, fused=fused)
        assert same(after[name], want), f"{name}: {after[name].shape} {after[name].dtype}"
    old, new = optimizer_of(source), optimizer_of(output)
    assert (old is None) == (new is None), "optimizer state lost or made up"
    if old is None:
        return
    assert {k: v for k, v in old.items() if k != "state"} == {k: v for k, v in new.items() if k != "state"}
    assert list(old["state"]) == list(new["state"])
    for number, slots in old["state"].items():
        assert list(slots) == list(new["state"][number])
        for slot, value in slots.items():
            found = new["state"][number][slot]
            if isinstance(value, torch.Tensor):
                want = wider(value, ffn, moment=True, fused=fused)
                assert same(found, want), f"state {number}.{slot}: {found.shape} {found.dtype}"
            else:
                assert repr(found) == repr(value), f"state {number}.{slot}: {found!r}"
