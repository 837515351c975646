"""Megatron's flat buckets of optimizer state: held against what Megatron itself makes of the same state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.dcp.metadata import read_metadata
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.training import rewarm
from tests.formats.make_dcp import on_ranks
from tests.formats.make_megatron import BUCKETS, BY_PARAMETER, Sizes, World, load_wide, save_both
from tests.formats.make_megatron_dist import GROUP, load_by_parameter, make_megatron_dist
from tests.formats.test_megatron_legacy import FFN, HIDDEN, MOMENTS, STEPS, Gpt, train
from tests.formats.widening import check_moments, tensors_of, widen

AXES = {"hidden": 2, "kv_heads": 2, "ffn": 2}
WORLDS = {
    "one process": (World(), Sizes(bf16=False), None),
    "three processes": (World(3), Sizes(bf16=False), None),
    "three processes, small buckets": (World(3), Sizes(), 5000),
    "tensor parallel": (World(4, tensor=2), Sizes(), None),
    "pipeline": (World(4, pipeline=2), Sizes(), None),
    "experts": (World(2, expert=2), Sizes(experts=4), None),
    "experts in one process": (World(), Sizes(experts=4, bf16=False), None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_as_megatron_has_it(tmp_path: Path, name: str) -> None:
    """The state that is read is what Megatron saves by parameter; the wide one is loaded by Megatron."""
    pytest.importorskip("megatron.core", reason="pip install megatron-core==0.16.1")
    world, sizes, bucket = WORLDS[name]
    on_ranks(world.ranks, save_both, str(tmp_path), world, sizes, bucket)
    source, truth = tmp_path / BUCKETS, tensors_of(tmp_path / BY_PARAMETER)
    found = tensors_of(source)
    assert sum(".exp_avg_sq." in key for key in found) == len(open_checkpoint(source).weights)
    assert found.keys() == truth.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, truth[key]), key
    wide = widen(source, tmp_path / "wide", AXES, rewarmup={"steps": 4})
    new = tensors_of(wide)
    for key, tensor in truth.items():
        if ".exp_avg" in key:
            check_moments({key: tensor}, new, key)
    grown = sizes._replace(ffn=80, hidden=96, groups=4)
    other = World(2) if world[1:] == (1, 1, 1) and not sizes.experts else world
    on_ranks(other.ranks, load_wide, str(tmp_path), str(wide), other, grown, str(tmp_path / "again"))
    again = tensors_of(tmp_path / "again")
    assert again.keys() == new.keys()
    for key, tensor in again.items():
        assert torch.equal(tensor, new[key]), key
    if (tmp_path / "wide.pt").exists():
        before, after = (torch.load(tmp_path / f"{of}.pt") for of in ("logits", "wide"))
        close = 1e-5 if not sizes.bf16 else 3e-2
        torch.testing.assert_close(after, before, rtol=close, atol=close)


@pytest.mark.parametrize(("size", "inside"), [(None, False), (4000, False), (4000, True)])
def test_widened_and_trained_on(tmp_path: Path, size: int | None, inside: bool) -> None:
    """Each parameter gets its own moments; what is saved once says so, and the new sizes."""
    source = tmp_path / "iter_0000005"
    narrow, optimizer = make_megatron_dist(source, size, inside=inside)
    moments = {n: dict(optimizer.state[p]) for n, p in narrow.named_parameters()}
    checkpoint = open_checkpoint(source)
    assert checkpoint.facts["global_step"] == STEPS
    assert checkpoint.param_groups[0]["weight_decay"] == 0.1
    target = widen(source, tmp_path / "wide", AXES, rewarmup={"steps": 4})
    wide, optimizer, common = load_by_parameter(target)
    ids = torch.arange(24).reshape(2, 12)
    torch.testing.assert_close(wide(ids), narrow(ids), rtol=1e-5, atol=1e-5)
    assert common["optimizer"]["param_state_sharding_type"] == "fully_reshardable"
    assert common["content_metadata"]["distrib_optim_sharding_type"] == "fully_reshardable"
    assert [group["weight_decay"] for group in common["optimizer"]["optimizer"]["param_groups"]] == [0.1, 0]
    assert (common["args"].hidden_size, common["args"].ffn_hidden_size) == (2 * HIDDEN, 2 * FFN)
    assert not [name for name in read_metadata(target).state_dict_metadata if name.startswith(GROUP)]
    for name, parameter in wide.named_parameters():
        check_moments({slot: moments[name][slot] for slot in MOMENTS}, optimizer.state[parameter], name)
    rewarm(optimizer, wide, target, announce=False)
    train(wide, optimizer, STEPS, STEPS + 10)
    down = wide.decoder["layers"][0].mlp["linear_fc2"].weight
    assert torch.nn.functional.cosine_similarity(down[:, :FFN], down[:, FFN:], dim=0).mean() < 0.9999


def changed(root: Path, name: str, tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Write other entries of an equal number over those of a tensor, wherever they lie in the files."""
    old, new = (one.contiguous().view(torch.uint8).numpy().tobytes() for one in (tensor, other))
    for path in root.glob("*.distcp"):
        whole = path.read_bytes()
        if old in whole:
            path.write_bytes(whole.replace(old, new))
            return
    raise AssertionError(name)


def test_what_cannot_be_told(tmp_path: Path) -> None:
    """Masters that are no weight's, a missing file, another kind: refused, with the way out."""
    model, optimizer = make_megatron_dist(tmp_path / "a")
    down = model.decoder["layers"][1].mlp["linear_fc2"].weight.detach()
    root = tmp_path / "a"
    kept = {path: path.read_bytes() for path in root.iterdir()}

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match) as error:
            open_checkpoint(root)
        assert "--dist-ckpt-optim-fully-reshardable" in str(error.value.hint)
        for path, content in kept.items():
            path.write_bytes(content)

    changed(root, "down", down, down.flip(1))
    refused("is a flat bucket of the optimizer: .* it is no part of a weight")
    up = model.decoder["layers"][0].mlp["linear_fc1"].weight.detach()
    changed(root, "moments", optimizer.state[model.output_layer.weight]["exp_avg"], torch.zeros(64, 32))
    open_checkpoint(root)
    changed(root, "up", up[:2].bfloat16(), up[2:4].bfloat16())
    refused("it is no part of a weight")
    (root / "common.pt").unlink()
    refused("common.pt is missing")
    common = torch.load(root / "common.pt", weights_only=False)
    common["content_metadata"]["distrib_optim_sharding_type"] = "dp_zero_gather_scatter"
    torch.save(common, root / "common.pt")
    refused("lies flat, as 'dp_zero_gather_scatter'")


def test_equal_weights(tmp_path: Path) -> None:
    """Two parameters with the same numbers may have been either's."""

    def equal(model: Gpt) -> None:
        layers = model.decoder["layers"]
        layers[0].input_layernorm.weight.data.copy_(layers[1].input_layernorm.weight)

    make_megatron_dist(tmp_path / "a", change=equal)
    with pytest.raises(
        CheckpointError, match=r"it might be any of .*0.input.*, .*1.input.*, which are equal"
    ):
        open_checkpoint(tmp_path / "a")


def test_shifted_masters(tmp_path: Path) -> None:
    """State by parameter whose masters are other parameters' is not taken for theirs."""
    make_megatron_dist(tmp_path / "a")
    wide = widen(tmp_path / "a", tmp_path / "wide", {"ffn": 2})
    found = tensors_of(wide)
    masters = found["optimizer.state.param.output_layer.weight"]
    changed(wide, "masters", masters, masters.roll(64))
    with pytest.raises(CheckpointError, match=r"masters of 'output_layer\.weight' .* other numbers"):
        open_checkpoint(wide)
