"""More experts in Megatron's torch_dist format, held to megatron-core's own routers, loader and optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparkling_cli.errors import SpecError
from sparkling_cli.formats.dcp.megatron import pieces_of
from sparkling_cli.formats.dcp.metadata import read_metadata
from sparkling_cli.layout.presence import by_config
from sparkling_cli.widening.geometry import Run, ViewDim
from tests.formats.make_dcp import on_ranks
from tests.formats.make_megatron import BUCKETS, BY_PARAMETER, Sizes, World, load_wide, save_both
from tests.formats.widening import check_moments, tensors_of, widen

BOTH = {"experts": 2, "experts_per_token": 2}
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
SHARED = {"moe_shared_expert_intermediate_size": 24}
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax of the chosen": {},
    "softmax of all": {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
    "sigmoid with bias, shared experts": {**SIGMOID, **SHARED},
    "two losses": {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
        "moe_aux_loss_coeff": [0.01, 0.01],
    },
}


def test_objects_of_layers_and_experts() -> None:
    """Each gets its new number of parts, and copies get what their sources have; the model's own stay."""
    name = "decoder.layers.mlp.experts.experts.linear_fc1."
    layers, head = ViewDim(2, 2, (Run(0, 0, 2),), 0), ViewDim(68, 68, (Run(0, 0, 68),), 0)
    experts = ViewDim(4, 7, (Run(0, 0, 4), Run(4, 3, 1, new=True), Run(5, 1, 2, new=True)), 1)
    own = [f"{name}_extra_state/shard_1.{at}_2.4" for at in (2, 3)]
    views = {f"{name}weight": (layers, experts), "output_layer.weight": (head,)}
    found = pieces_of([*own, "output_layer._extra_state/shard_0_1"], views)
    wanted = ((2, 6), (3, 4))
    assert found == {
        entry: tuple(f"{name}_extra_state/shard_1.{at}_2.7" for at in places)
        for entry, places in zip(own, wanted, strict=True)
    }


@pytest.mark.parametrize(
    ("kind", "widenable"), [("aux_loss", True), (["aux_loss", "z"], True), (None, True), ("sinkhorn", False)]
)
def test_values_that_an_axis_does_not_grow_for(kind: Any, widenable: bool) -> None:
    """One of them, or any in a list."""
    axes = {"experts": {"widenable": True, "where": {"kind": "all but sinkhorn or other"}}}
    found = by_config({"axes": axes}, {"kind": kind})["axes"]["experts"]
    assert found["widenable"] is widenable
    assert (
        widenable or found["reason"] == "the config's kind is sinkhorn: known for all but sinkhorn or other"
    )


def _sizes(router: dict[str, Any], **sizes: Any) -> Sizes:
    return Sizes(experts=4, router=tuple(router.items()), **sizes)


def check_entries(root: Path, experts: list[int]) -> None:
    """What was written, and saved again: each expert is of the source's that stands in its place."""
    old, new, again = (tensors_of(root / of) for of in (BY_PARAMETER, "wide", "again"))
    assert again.keys() == new.keys() == old.keys()
    for key, tensor in old.items():
        assert torch.equal(again[key], new[key]), key
        if ".exp_avg" in key:
            check_moments({key: tensor}, new, key)
        elif ".experts." in key or ".router." in key:
            assert torch.equal(new[key], tensor[:, experts]), key
        else:
            assert torch.equal(new[key], tensor), key


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
def test_all_copies_are_chosen(tmp_path: Path, router: str) -> None:
    """Logits of the model that Megatron loads from it; every entry of weights and state; saved once more."""
    pytest.importorskip("megatron.core", reason="pip install megatron-core==0.16.1")
    sizes = _sizes(ROUTERS[router], bf16=False)
    on_ranks(1, save_both, str(tmp_path), World(), sizes, None)
    target = widen(tmp_path / BUCKETS, tmp_path / "wide", BOTH)
    grown = sizes._replace(experts=8, topk=4)
    on_ranks(1, load_wide, str(tmp_path), str(target), World(), grown, str(tmp_path / "again"))
    before, after = (torch.load(tmp_path / f"{of}.pt") for of in ("logits", "wide"))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    check_entries(tmp_path, [0, 1, 2, 3, 0, 1, 2, 3])


@pytest.mark.slow
def test_chosen_copies(tmp_path: Path) -> None:
    """Two of every second expert: Megatron loads them, and has every entry of weights and state."""
    pytest.importorskip("megatron.core", reason="pip install megatron-core==0.16.1")
    sizes = _sizes({}, bf16=False)
    on_ranks(1, save_both, str(tmp_path), World(), sizes, None)
    copies = {"all": [1, 2, 1, 2]}
    target = widen(tmp_path / BUCKETS, tmp_path / "wide", {"experts": 1.5}, copies=copies)
    on_ranks(
        1, load_wide, str(tmp_path), str(target), World(), sizes._replace(experts=6), str(tmp_path / "again")
    )
    check_entries(tmp_path, [0, 1, 2, 3, 1, 3])


@pytest.mark.slow
def test_experts_on_two_ranks(tmp_path: Path) -> None:
    """With their objects: one for each layer and expert, as Megatron asks for them."""
    pytest.importorskip("megatron.core", reason="pip install megatron-core==0.16.1")
    world, sizes = World(2, expert=2), _sizes(SIGMOID)
    on_ranks(2, save_both, str(tmp_path), world, sizes, None)
    target = widen(tmp_path / BUCKETS, tmp_path / "wide", {"experts": 3, "experts_per_token": 3, "hidden": 2})
    grown = sizes._replace(experts=12, topk=6, hidden=96)
    on_ranks(2, load_wide, str(tmp_path), str(target), world, grown, str(tmp_path / "again"))
    new, again = (tensors_of(tmp_path / of) for of in ("wide", "again"))
    assert again.keys() == new.keys()
    for key, tensor in again.items():
        assert torch.equal(tensor, new[key]), key
    found, asked = (set(read_metadata(tmp_path / of).state_dict_metadata) for of in ("wide", "again"))
    assert found == asked
    assert sum("linear_fc2._extra_state/shard_" in name for name in found) == 2 * 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("router", "topk", "axes", "reason"),
    [
        ({**SIGMOID, "moe_router_num_groups": 2, "moe_router_group_topk": 1}, 2, BOTH, "num_groups is 2"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, 2, BOTH, "known for all but sinkhorn"),
        (SIGMOID, 1, BOTH, "moe_router_topk is 1: known for all but 1"),
    ],
)
def test_other_routers(
    tmp_path: Path, router: dict[str, Any], topk: int, axes: dict[str, float], reason: str
) -> None:
    """In which copies would not do what their source did: refused, widths are offered."""
    pytest.importorskip("megatron.core", reason="pip install megatron-core==0.16.1")
    on_ranks(1, save_both, str(tmp_path), World(), _sizes(router, topk=topk), None)
    with pytest.raises(SpecError, match=reason) as caught:
        widen(tmp_path / BUCKETS, tmp_path / "no", axes)
    assert "ffn" in str(caught.value.hint)
    widen(tmp_path / BUCKETS, tmp_path / "wide", {"ffn": 2})
