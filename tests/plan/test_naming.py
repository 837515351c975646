"""Which names the output's weights get, and when that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparkling_cli.errors import LayoutError
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.layout.model import AxisInfo, ModelLayout, TensorPattern
from sparkling_cli.plan.naming import weights_of
from sparkling_cli.storage.tensors import StoredTensor


def fused_on_disk(assembly: dict[str, tuple[str, ...]]) -> tuple[Checkpoint, ModelLayout]:
    """A model that keeps q and k apart, and stores them as one tensor."""
    layout = ModelLayout(
        name="fused",
        axes={"hidden": AxisInfo(4, True), "heads": AxisInfo(2, True)},
        tensors=(
            TensorPattern("q.weight", "heads <- hidden"),
            TensorPattern("k.weight", "heads <- hidden"),
            TensorPattern("norm.weight", "scale hidden"),
        ),
        disk=(
            TensorPattern("qk.weight", "(q:heads + k:heads) <- hidden"),
            TensorPattern("ln.weight", "scale hidden"),
        ),
        assembly=assembly,
    )
    tensors = {"qk.weight": StoredTensor("F32", (4, 4), ()), "ln.weight": StoredTensor("F32", (4,), ())}
    names = {name: name for name in tensors}
    return Checkpoint(root=Path("somewhere"), format="trainer", tensors=tensors, weights=names), layout


def test_a_fused_tensor_cannot_be_written_under_module_names() -> None:
    """The error says what to do instead; under the names on disk it is no problem."""
    checkpoint, layout = fused_on_disk({"norm.weight": ("ln.weight",)})
    with pytest.raises(LayoutError, match=r"qk\.weight.*made of several") as caught:
        weights_of(checkpoint, layout, "module")
    assert "from_pretrained" in str(caught.value)
    weights, renamed = weights_of(checkpoint, layout, "disk")
    assert [w.name for w in weights] == ["qk.weight", "ln.weight"]
    assert not renamed


def test_module_names_need_to_be_known() -> None:
    """A layout without an assembly does not say which tensors make up which."""
    checkpoint, layout = fused_on_disk({})
    with pytest.raises(LayoutError, match="does not say which tensors on disk"):
        weights_of(checkpoint, layout, "module")
