"""More layers in Megatron's torch_dist format, held to megatron-core's own model, loader and optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from sparkling_cli.errors import SpecError
from sparkling_cli.formats.dcp.metadata import read_metadata
from tests.formats.make_dcp import on_ranks
from tests.formats.make_megatron import BUCKETS, BY_PARAMETER, Sizes, World, load_wide, save_both
from tests.formats.make_megatron_dist import Planner
from tests.formats.test_megatron_legacy import LAYERS, MOMENTS, Gpt, new_args, train
from tests.formats.widening import tensors_of, widen

SILENT = ("linear_proj.weight", "linear_fc2.weight", "linear_proj.bias", "linear_fc2.bias")
#: pieces of the name of what Megatron saves of all layers in one tensor, and of its state
STACK = "decoder.layers."
WORLDS: dict[str, tuple[World, Sizes, World]] = {
    "one process": (World(), Sizes(bf16=False), World()),
    "pipeline": (World(2, pipeline=2), Sizes(), World(2, pipeline=2)),
    "stages that become one": (World(2, pipeline=2), Sizes(), World()),
    "experts": (
        World(2, expert=2),
        Sizes(experts=4, router=(("moe_shared_expert_intermediate_size", 24),)),
        World(2, expert=2),
    ),
}


def _expected(key: str, old: torch.Tensor, layers: int) -> torch.Tensor:
    """What becomes of a stored tensor: layers behind the old ones, silent or copies, their moments zero."""
    if STACK not in key:
        return old
    new = old[len(old) - (layers - len(old)) :]  # the last ones, in their order
    zero = key.endswith(SILENT) or ".exp_avg" in key
    return torch.cat([old, torch.zeros_like(new) if zero else new])


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_layers_behind(tmp_path: Path, name: str) -> None:
    """Loaded by Megatron, on other stages too, and saved again, entry by entry; the logits bit by bit."""
    pytest.importorskip("megatron.core", reason="pip install megatron-core==0.16.1")
    world, sizes, other = WORLDS[name]
    on_ranks(world.ranks, save_both, str(tmp_path), world, sizes, None)
    target = widen(tmp_path / BUCKETS, tmp_path / "wide", {"layers": 2}, at="end")
    deep = sizes._replace(layers=4)
    on_ranks(other.ranks, load_wide, str(tmp_path), str(target), other, deep, str(tmp_path / "again"))
    old, new, again = (tensors_of(tmp_path / of) for of in (BY_PARAMETER, "wide", "again"))
    assert again.keys() == new.keys() == old.keys()
    for key, tensor in old.items():
        assert torch.equal(new[key], _expected(key, tensor, 4)), key
        assert torch.equal(again[key], new[key]), key
    found, asked = (set(read_metadata(tmp_path / of).state_dict_metadata) for of in ("wide", "again"))
    assert found == asked
    if world == other == World():
        before, after = (torch.load(tmp_path / f"{of}.pt") for of in ("logits", "wide"))
        assert torch.equal(before, after)


def _stacked(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of one layer each as Megatron has them: all layers in one."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        _, behind, rest = name.partition(STACK)
        if behind:
            found.setdefault(STACK + rest.partition(".")[2], []).append(value)
        else:
            found[name] = value
    return {name: torch.stack(held) if isinstance(held, list) else held for name, held in found.items()}


def _save(root: Path, **changes: Any) -> tuple[Gpt, torch.optim.AdamW]:
    """Train and save a small model; gives it, with its optimizer."""
    torch.manual_seed(0)
    args = new_args()
    vars(args).update(changes)
    model = Gpt(args)
    optimizer = model.optimizer()
    train(model, optimizer, 0, 3)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    state = {name: value.bfloat16() for name, value in _stacked(weights).items()}
    for slot in ("param", *MOMENTS):
        own = {
            n: weights[n] if slot == "param" else optimizer.state[p][slot]
            for n, p in model.named_parameters()
        }
        state |= {f"optimizer.state.{slot}.{name}": value for name, value in _stacked(own).items()}
    root.mkdir()
    objects = {
        f"{STACK}self_attention.linear_qkv._extra_state/shard_{i}_{LAYERS}": [i] for i in range(LAYERS)
    }
    dcp.save(
        {**state, **objects}, checkpoint_id=root, planner=Planner(flatten_state_dict=False), no_dist=True
    )
    clock = {
        "max_lr": 1e-3, "min_lr": 1e-4, "lr_warmup_steps": 16, "num_steps": 24,
        "lr_decay_style": "cosine", "lr_decay_steps": 320,
    }  # fmt: skip
    torch.save({"args": args, "iteration": 3, "opt_param_scheduler": clock}, root / "common.pt")
    return model, optimizer


def _load(root: Path) -> tuple[Gpt, dict[str, torch.Tensor]]:
    """The model that the masters make, and all tensors, by torch's own reader."""
    args = torch.load(root / "common.pt", weights_only=False)["args"]
    model = Gpt(args)
    named = _stacked({name: p.detach() for name, p in model.named_parameters()})
    state = {
        f"optimizer.state.{slot}.{name}": torch.empty_like(value)
        for slot in ("param", *MOMENTS)
        for name, value in named.items()
    }
    dcp.load(state, checkpoint_id=root, no_dist=True)
    for name, parameter in model.named_parameters():
        before, behind, rest = name.partition(STACK)
        number, _, rest = rest.partition(".")
        whole = state[f"optimizer.state.param.{behind + rest if behind else before}"]
        parameter.data.copy_(whole[int(number)] if behind else whole)
    return model, state


def test_all_layers_in_one_tensor(tmp_path: Path) -> None:
    """Weights, masters, moments and objects of each layer, joint with widths; other places are refused."""
    source = tmp_path / "iter_0000003"
    narrow, _ = _save(source)
    with pytest.raises(SpecError, match="by its number, so old ones keep theirs") as refused:
        widen(source, tmp_path / "no", {"layers": 2})
    assert "--at end" in str(refused.value.hint)
    deep = widen(source, tmp_path / "deep", {"layers": 1.5}, at="end", rewarmup={"steps": 4})
    model, state = _load(deep)
    assert torch.load(deep / "common.pt", weights_only=False)["args"].num_layers == 6
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(model(ids), narrow(ids))
    for key, old in _load(source)[1].items():
        assert torch.equal(state[key], _expected(key, old, 6)), key
    objects = {f"{STACK}self_attention.linear_qkv._extra_state/shard_{i}_6": None for i in range(6)}
    dcp.load(objects, checkpoint_id=deep, no_dist=True)
    assert [held[0][0] for held in objects.values()] == [0, 1, 2, 3, 2, 3]
    wide = widen(deep, tmp_path / "wide", {"layers": 2, "hidden": 2, "ffn": 2}, at="end")
    torch.testing.assert_close(_load(wide)[0](ids), narrow(ids), rtol=1e-5, atol=1e-5)


def test_residual_behind_the_norm(tmp_path: Path) -> None:
    """A block then norms the stream itself: refused by the argument's name."""
    _save(tmp_path / "a", apply_residual_connection_post_layernorm=True)
    with pytest.raises(SpecError, match="apply_residual_connection_post_layernorm is true"):
        widen(tmp_path / "a", tmp_path / "no", {"layers": 2}, at="end")
