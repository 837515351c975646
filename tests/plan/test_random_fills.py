"""Random entries are drawn from the distribution of what they stand beside; one model, one initialization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fixtures.tiny import CONFIGS
from sparkling_cli import api
from sparkling_cli.models.skeleton import build_model

Tensors = dict[str, torch.Tensor]


def weights(folder: Path) -> Tensors:
    """All weights of a folder, under the names of its files."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def module_weights(folder: Path) -> Tensors:
    """All weights under the module's names, as the library loads them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def close(new: torch.Tensor, old: torch.Tensor, factor: float = 1.0) -> bool:
    """Mean and deviation within five standard errors."""
    n, std = new.numel(), float(old.double().std(correction=0))
    off = abs(float(new.double().mean()) / factor - float(old.double().mean()))
    spread = abs(float(new.double().std(correction=0)) / factor / std - 1) if std else 0.0
    return off <= 5 * std / n**0.5 + 1e-7 and spread <= 5 / (2 * n) ** 0.5


def shaped(kind: str, folder: Path) -> Path:
    """A model whose every part, expert and bias has a mean and a deviation of its own."""
    torch.manual_seed(1)
    model: Any = build_model({**CONFIGS[kind], "model_type": kind}, meta=False)
    with torch.no_grad():
        for number, (name, tensor) in enumerate(sorted(model.named_parameters())):
            tensor.copy_(torch.randn_like(tensor) * (0.05 + 0.01 * (number % 7)) + 0.02 * (number % 5))
            if kind == "gpt2" and "c_attn" in name:
                for i, part in enumerate(tensor.chunk(3, dim=-1)):
                    part.mul_(i + 1).add_(0.1 * i)
            if "experts" in name and tensor.ndim == 3:
                for i in range(tensor.shape[0]):
                    tensor[i].mul_(1 + 0.3 * i)
                    if "gate_up" in name:
                        tensor[i, : tensor.shape[1] // 2].mul_(0.5).sub_(0.05)
    model.save_pretrained(folder)
    return folder


def test_fused_parts_and_biases_of_gpt2(tmp_path: Path) -> None:
    """c_attn's q, k and v, and every bias, keep their own mean and deviation in new heads and rows."""
    small = shaped("gpt2", tmp_path / "small")
    axes = [{"axis": "heads", "factor": 3}, {"axis": "ffn", "factor": 3}, {"axis": "hidden", "factor": 3}]
    api.expand(small, tmp_path / "wide", axes=axes, init="random-random", scaling="none", report="none")
    api.verify(small, tmp_path / "wide")
    old, new = weights(small), weights(tmp_path / "wide")
    wrong = []
    for name in old:
        before, after = old[name], new[name]
        if "ln_" in name:
            continue  # norms are copied
        if "c_attn" in name:
            pairs = zip(before.chunk(3, -1), after.chunk(3, -1), strict=True)
        else:
            pairs = zip([before], [after], strict=True)
        for i, (a, b) in enumerate(pairs):
            keep = torch.zeros_like(b, dtype=torch.bool)
            keep[tuple(slice(0, n) for n in a.shape)] = True
            assert torch.equal(b[keep].reshape(a.shape), a), name
            if not keep.all() and not close(b[~keep], a):
                wrong.append(f"{name} part {i}: {float(b[~keep].mean()):.4f} {float(b[~keep].std()):.4f}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("init", ["random-copy", "random-random"])
def test_one_model_one_initialization(tmp_path: Path, init: str) -> None:
    """Experts apart on disk or stacked in the module, float32 or with a master copy: equal weights."""
    small = shaped("qwen3_moe", tmp_path / "small")
    axes = [{"axis": "expert_ffn", "factor": 2}, {"axis": "hidden", "factor": 2}]
    for names in ("disk", "module"):
        api.expand(small, tmp_path / names, axes=axes, init=init, names=names, report="none", threads=2)
        api.verify(small, tmp_path / names)
    assert set(weights(tmp_path / "disk")) != set(weights(tmp_path / "module"))
    disk, module = module_weights(tmp_path / "disk"), module_weights(tmp_path / "module")
    assert disk.keys() == module.keys()
    assert [name for name in disk if not torch.equal(disk[name], module[name])] == []
    before = module_weights(small)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    old, new = before[name], disk[name]
    (experts, rows, columns), ffn = old.shape, new.shape[1] // 2
    for expert in range(experts):
        for part in range(2):
            a = old[expert, part * rows // 2 : (part + 1) * rows // 2]
            b = new[expert, part * ffn : (part + 1) * ffn]
            # new rows over old columns, which carry the fan-in factor of hidden alone
            assert close(b[rows // 2 :, :columns], a, factor=0.5**0.5), (expert, part)


def test_a_weight_and_its_copy_in_the_optimizer_agree(tmp_path: Path) -> None:
    """bfloat16 weights are their float32 master rounded, in random entries too."""
    small = shaped("llama", tmp_path / "small")
    old = weights(small)
    torch.manual_seed(2)
    rounded = {name: tensor.bfloat16() for name, tensor in old.items()}
    save_file(rounded, small / "model.safetensors", metadata={"format": "pt"})
    state = {
        i: {"step": torch.tensor(3.0), "exp_avg": torch.randn(t.shape), "exp_avg_sq": torch.rand(t.shape),
            "master_param": t.clone()}
        for i, t in enumerate(old.values())
    }  # fmt: skip
    group: dict[str, Any] = {"params": list(state), "lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    torch.save({"state": state, "param_groups": [group | {"param_names": list(old)}]}, small / "optimizer.pt")
    asked = [{"axis": "ffn", "factor": 2}]
    api.expand(small, tmp_path / "wide", axes=asked, init="random-copy", scaling="none", report="none")
    api.verify(small, tmp_path / "wide")
    new = weights(tmp_path / "wide")
    saved = torch.load(tmp_path / "wide" / "optimizer.pt", weights_only=True)
    for i, name in enumerate(old):
        assert torch.equal(saved["state"][i]["master_param"].bfloat16(), new[name]), name


@pytest.mark.parametrize("init", ["random-copy", "zero-copy"])
def test_heads_that_no_tensor_has_do_not_stand_in_the_way(init: str, tmp_path: Path) -> None:
    """A class that divides hidden by its heads: both grow, and what is new in hidden is drawn, or zero."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 4,
             "num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 32}  # fmt: skip
    small = tmp_path / "small"
    build_model({"model_type": "opt", **sizes}, meta=False).save_pretrained(small)
    asked = [{"axis": "hidden", "factor": 2}, {"axis": "heads", "factor": 2}]
    api.expand(small, tmp_path / "wide", axes=asked, init=init, report="none")
    assert api.verify(small, tmp_path / "wide").ok
    name = "model.decoder.embed_tokens.weight"
    old, new = module_weights(small)[name], module_weights(tmp_path / "wide")[name]
    assert torch.equal(new[:, :32], old)
    assert close(new[:, 32:], old) if init == "random-copy" else not new[:, 32:].any()
    assert not torch.equal(new[:, 32:], old)
