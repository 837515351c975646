"""Checkpoints of any size in the Trainer's layout, with random contents."""

from __future__ import annotations

import json
import shutil
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
_BLOCK = 1 << 22
LAYERS = 6


def weights(folder: Path, gigabytes: float) -> None:
    """The same Llama without optimizer state, of the same size."""
    dense(folder, 3 * gigabytes, optimizer=False)


def dense(folder: Path, gigabytes: float, *, optimizer: bool = True) -> None:
    """A Llama with AdamW state: few large tensors, float32, two moments."""
    source = next((FIXTURES / "dense-llama").glob("checkpoint-*"))
    config = json.loads((source / "config.json").read_bytes())
    # 14.5 h^2 parameters a layer, 12 bytes each
    hidden = max(round((gigabytes * 2**30 / (12 * LAYERS * 14.5)) ** 0.5 / 256), 1) * 256
    config |= {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": LAYERS,
        "head_dim": 64,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
    }
    folder.mkdir(parents=True)
    run = ("trainer_state.json", "scheduler.pt", "training_args.bin", "rng_state.pth")
    for name in run if optimizer else ():
        shutil.copy(source / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = _llama_shapes(config)
    _write_safetensors(folder / "model.safetensors", shapes)
    if optimizer:
        _write_optimizer(folder / "optimizer.pt", source / "optimizer.pt", shapes)


def experts(folder: Path, gigabytes: float, tensors: int = 40_000) -> None:
    """A mixture of experts without optimizer state: about ``tensors`` small tensors."""
    source = next((FIXTURES / "moe-qwen3").glob("checkpoint-*"))
    config = json.loads((source / "config.json").read_bytes())
    number = 512
    layers = max(round(tensors / (3 * number)), 1)
    inner = max(round(gigabytes * 2**30 / (layers * number * 3 * 4 * config["hidden_size"])), 1)
    config.pop("num_local_experts", None)
    config |= {"num_hidden_layers": layers, "num_experts": number, "moe_intermediate_size": inner}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    _write_safetensors(folder / "model.safetensors", _moe_shapes(config))


def _llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Module order, as the optimizer numbers them."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            **_attention(layer, config),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            **_norms(layer, hidden),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}


def _moe_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, size = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            **_attention(layer, config),
            f"{layer}.self_attn.q_norm.weight": (size,),
            f"{layer}.self_attn.k_norm.weight": (size,),
            f"{layer}.mlp.gate.weight": (config["num_experts"], hidden),
            **_norms(layer, hidden),
        }
        for expert in range(config["num_experts"]):
            part = f"{layer}.mlp.experts.{expert}"
            shapes |= {
                f"{part}.gate_proj.weight": (inner, hidden),
                f"{part}.up_proj.weight": (inner, hidden),
                f"{part}.down_proj.weight": (hidden, inner),
            }
    return shapes | {"model.norm.weight": (hidden,)}


def _attention(layer: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, size = config["hidden_size"], config["head_dim"]
    heads, pairs = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    return {
        f"{layer}.self_attn.q_proj.weight": (heads, hidden),
        f"{layer}.self_attn.k_proj.weight": (pairs, hidden),
        f"{layer}.self_attn.v_proj.weight": (pairs, hidden),
        f"{layer}.self_attn.o_proj.weight": (hidden, heads),
    }


def _norms(layer: str, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{layer}.input_layernorm.weight": (hidden,),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
    }


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A valid file written as a stream, so that making it needs no memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in sorted(shapes):
        size = 4 * prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    block = (np.random.default_rng(0).standard_normal(_BLOCK, dtype=np.float32) * 0.02).tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while at > 0:
            file.write(block[: min(at, len(block))])
            at -= len(block)


def _write_optimizer(path: Path, like: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    groups = torch.load(like, weights_only=True)["param_groups"]
    decayed = [name for name in shapes if "norm" not in name]
    order = decayed + [name for name in shapes if "norm" in name]
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number, name in enumerate(order):
        first = torch.randn(shapes[name], generator=generator).mul_(1e-3)
        state[number] = {"step": torch.tensor(600.0), "exp_avg": first, "exp_avg_sq": first.square()}
    groups[0]["params"] = list(range(len(decayed)))
    groups[1]["params"] = list(range(len(decayed), len(order)))
    torch.save({"state": state, "param_groups": groups}, path)


#: all kinds of checkpoint
KINDS = {"dense": dense, "weights": weights, "experts": experts}

if __name__ == "__main__":
    KINDS[sys.argv[1]](Path(sys.argv[2]), float(sys.argv[3]))
