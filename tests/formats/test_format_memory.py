"""Every format within its budget: a checkpoint ten times as large, and the peak of a process of its own."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp_files

from tests.formats.make_dcp import on_ranks
from tests.formats.make_megatron_dist import Planner

pytestmark = pytest.mark.slow

MIB = 1 << 20
BUDGET = 64 * MIB
#: What is imported beside torch itself: the program, and torch.distributed.checkpoint for its format.
IMPORTS = 32 * MIB
LAYERS = 6
LAYOUT = """format = 1
name = "large"
[axes.hidden]
[axes.ffn]
[axes.vocab]
widenable = false
[axes.layers]
widenable = false
[config]
[tensors]
"transformer.wte.weight" = "vocab -> hidden"
"transformer.h.{layers}.up.weight" = "ffn <- hidden"
"transformer.h.{layers}.down.weight" = "hidden <- ffn"
"""
_PEAK = """
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
"""
#: VmHWM is this program's own; the maximum that getrusage gives begins with the parent's.
_EXPAND = (
    _PEAK
    + """
import sys
from pathlib import Path
from sparkling_cli.api import expand, verify
layout, memory = Path(sys.argv[1]), int(sys.argv[2])
axes = [{"axis": "ffn", "factor": 1.25}]
for source, target in zip(map(Path, sys.argv[3::2]), map(Path, sys.argv[4::2])):
    expand(source, target, axes=axes, layout=layout, memory=memory, report="none")
    print(peak())
    verify(source, target)
    print(peak())
"""
)


def weights(scale: int) -> dict[str, torch.Tensor]:
    """Float32, a third of the checkpoint."""
    hidden, ffn, vocab = 32 * scale, 128 * scale, 190 * scale
    shapes = {"transformer.wte.weight": (vocab, hidden)}
    for layer in range(LAYERS):
        shapes[f"transformer.h.{layer}.up.weight"] = (ffn, hidden)
        shapes[f"transformer.h.{layer}.down.weight"] = (hidden, ffn)
    return {name: torch.full(shape, 0.5) for name, shape in shapes.items()}


def moments(model: dict[str, torch.Tensor], *, named: bool) -> dict[str, Any]:
    """AdamW's state dict, by number or by name."""
    keys: list[Any] = list(model) if named else list(range(len(model)))
    state = {
        key: {"step": torch.tensor(3.0), "exp_avg": value * 1e-3, "exp_avg_sq": value * 1e-6}
        for key, value in zip(keys, model.values(), strict=True)
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "params": keys, "param_names": list(model)}
    return {"state": state, "param_groups": [group]}


def single_file(root: Path, scale: int) -> None:
    """``{"model": ..., "optimizer": ...}``."""
    model = weights(scale)
    torch.save({"model": model, "optimizer": moments(model, named=False)}, root)


def litgpt(root: Path, scale: int) -> None:
    """``lit_model.pth`` and ``model_config.yaml``."""
    root.mkdir()
    single_file(root / "lit_model.pth", scale)
    (root / "model_config.yaml").write_text("name: large\n")


def trainer(root: Path, scale: int) -> None:
    """``model.safetensors`` and ``optimizer.pt``."""
    from safetensors.torch import save_file

    root.mkdir()
    model = weights(scale)
    save_file(model, root / "model.safetensors")
    torch.save(moments(model, named=False), root / "optimizer.pt")


def fsdp(root: Path, scale: int) -> None:
    """The same with FSDP's second copy of the weights, and names."""
    from safetensors.torch import save_file

    root.mkdir()
    model = weights(scale)
    save_file(model, root / "model.safetensors")
    torch.save(model, root / "pytorch_model_fsdp.bin")
    torch.save(moments(model, named=True), root / "optimizer.bin")


def dcp(root: Path, scale: int) -> None:
    """``.metadata`` and ``*.distcp``."""
    on_ranks(1, _save_dcp, str(root), scale)


def _save_dcp(rank: int, root: str, scale: int) -> None:
    import torch.distributed.checkpoint as distributed

    model = weights(scale)
    distributed.save({"model": model, "optimizer": moments(model, named=True)}, checkpoint_id=root)


def universal(root: Path, scale: int) -> None:
    """DeepSpeed's folders of parameters, and model states in half precision."""
    model = weights(scale)
    for name, state in moments(model, named=True)["state"].items():
        folder = root / "zero" / name
        folder.mkdir(parents=True)
        for slot in ("exp_avg", "exp_avg_sq"):
            torch.save({"cat_dim": 0, "param": state[slot]}, folder / f"{slot}.pt")
        torch.save({"cat_dim": 0, "param": model[name]}, folder / "fp32.pt")
        torch.save(state["step"], folder / "step.pt")
    states = {
        "module": OrderedDict((name, value.bfloat16()) for name, value in model.items()),
        "param_shapes": [OrderedDict((name, value.shape) for name, value in model.items())],
        "global_steps": 3,
    }
    torch.save(states, root / "mp_rank_00_model_states.pt")


def olmo(root: Path, scale: int) -> None:
    """``model.pt``, ``optim.pt`` and ``config.yaml``."""
    root.mkdir()
    model = weights(scale)
    torch.save(model, root / "model.pt")
    torch.save(moments(model, named=False), root / "optim.pt")
    (root / "config.yaml").write_text("model: {}\n")


def composer(root: Path, scale: int) -> None:
    """A rank file with all of a run's state in it."""
    model = weights(scale)
    state = {"model": model, "optimizers": {"AdamW": moments(model, named=True)}}
    torch.save({"state": state, "rng": []}, root)


def megatron(root: Path, scale: int) -> None:
    """Two ranks' slices in half precision, their masters in float32."""
    whole = weights(scale)
    for rank in range(2):
        parts = {n: v.chunk(2, dim=1 if "down" in n else 0)[rank].clone() for n, v in whole.items()}
        inner = moments(parts, named=False)
        group = {**inner["param_groups"][0], "params": list(range(len(parts))), "step": 3}
        state = {i: {k: v for k, v in slots.items() if k != "step"} for i, slots in inner["state"].items()}
        optimizer = {
            "optimizer": {"state": state, "param_groups": [group]},
            "fp32_from_fp16_params": [list(parts.values())],
        }
        folder = root / f"mp_rank_{rank:02d}"
        folder.mkdir(parents=True)
        halves = {n: v.bfloat16() for n, v in parts.items()}
        saved = {"args": Namespace(), "checkpoint_version": 3.0, "model": halves, "optimizer": optimizer}
        torch.save(saved, folder / "model_optim_rng.pt")


def nanochat(root: Path, scale: int) -> None:
    """A step of two ranks: rows of the table's moments, and stacks of the matrices' with their factors."""
    root.mkdir()
    model = weights(scale * 5 // 4)  # one moment of a matrix, not two
    torch.save(model, root / "model_000003.pt")
    (root / "meta_000003.json").write_text('{"model_config": {}}')
    (_, table), *matrices = model.items()
    stacks = [[value for name, value in matrices if kind in name] for kind in ("down", "up")]
    numbers = [list(range(1, 1 + LAYERS)), list(range(1 + LAYERS, 1 + 2 * LAYERS))]
    groups = [{"lr": 0.2, "params": params} for params in ([0], *numbers)]
    for rank in range(2):
        part = table.tensor_split(2)[rank]
        state: dict[int, Any] = {0: {"step": 3, "exp_avg": part * 1e-3, "exp_avg_sq": part * 1e-6}}
        for (first, *_), stack in zip(numbers, stacks, strict=True):
            stacked = torch.stack(stack[rank * LAYERS // 2 :][: LAYERS // 2])
            factor = stacked.mean(dim=2 if stacked.shape[1] >= stacked.shape[2] else 1, keepdim=True)
            state[first] = {"momentum_buffer": stacked * 1e-3, "second_momentum_buffer": factor}
        torch.save({"state": state, "param_groups": groups}, root / f"optim_000003_rank{rank}.pt")


def buckets(root: Path, scale: int) -> None:
    """Megatron's flat buckets of state, in which parameters are told apart by their masters."""
    whole = {name: value.add_(number) for number, (name, value) in enumerate(weights(scale).items())}
    state: dict[str, Any] = {name: value.bfloat16() for name, value in whole.items()}
    state["optimizer.param_groups.0.lr"] = torch.tensor(1e-3)
    group = "optimizer.distributed.dp_group_idx_0"
    for slot in ("param", "exp_avg", "exp_avg_sq"):
        flat = torch.cat([value.flatten() for value in reversed(whole.values())])
        state[f"{group}.gbuf_idx_0.dtype_(a, b).bucket_idx_0.{slot}"] = flat
    state[f"{group}.optimizer/shard_0_1"] = {"param_groups": [{"lr": 1e-3}]}
    said = {"content_metadata": {"distrib_optim_sharding_type": "dp_reshardable"}, "optimizer": {}}
    root.mkdir()
    dcp_files.save(state, checkpoint_id=root, planner=Planner(flatten_state_dict=False), no_dist=True)
    torch.save(said, root / "common.pt")


def child(code: str, *arguments: object) -> list[int]:
    """The numbers that a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(line) for line in done.stdout.split()]


@pytest.mark.parametrize(
    "make",
    [single_file, litgpt, trainer, fsdp, dcp, universal, olmo, composer, megatron, nanochat, buckets],
)
def test_peak(tmp_path: Path, make: Callable[[Path, int], None]) -> None:
    """``expand`` and ``verify`` of a large checkpoint rise by no more than the budget over a small one's.

    The first run in the process imports what the format needs; the second one's rise is its own.
    """
    (tmp_path / "layout.toml").write_text(LAYOUT)
    end = ".pt" if make in (single_file, composer) else ""
    paths = []
    for name, scale in (("small", 1), ("large", 32)):
        source = tmp_path / f"{name}{end}"
        make(source, scale)
        paths += [source, tmp_path / f"wide-{name}{end}"]
    files = [source] if source.is_file() else source.rglob("*")
    assert sum(path.stat().st_size for path in files if path.is_file()) >= 10 * BUDGET
    _, before, expanded, verified = child(_EXPAND, tmp_path / "layout.toml", BUDGET, *paths)
    assert expanded - before <= BUDGET
    assert verified - before <= BUDGET
    (idle,) = child(_PEAK + "import torch\nprint(peak())")
    assert max(expanded, verified) - idle <= BUDGET + IMPORTS
    print(f"{make.__name__}: {(expanded - before) / MIB:.0f}, {(verified - before) / MIB:.0f} MiB")
