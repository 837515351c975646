"""Trainer directories with sharded FSDP state, written and resumed under FSDP2 by 2 gloo processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparkling_cli.checkpoint.detect import open_checkpoint
from tests.formats.make_dcp import on_ranks
from tests.formats.make_fsdp import resume, save
from tests.formats.widening import widen

pytest.importorskip("transformers", reason="pip install transformers")


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"ffn": 2}, {"hidden": 2, "ffn": 2}])
def test_resumes_where_it_was(tmp_path: Path, axes: dict[str, float]) -> None:
    """The layout is inferred from config.json; the losses of the next steps start where they were."""
    on_ranks(2, save, str(tmp_path / "checkpoint-3"))
    source = open_checkpoint(tmp_path / "checkpoint-3")
    assert source.facts["kind"] == "Trainer with FSDP"
    assert (source.facts["global_step"], source.facts["max_steps"]) == (3, 20)
    assert max(len(t.extents) for t in source.tensors.values()) == 2
    target = widen(tmp_path / "checkpoint-3", tmp_path / "wide" / "checkpoint-3", axes)
    for name in ("scheduler.pt", "trainer_state.json"):
        assert (target / name).read_bytes() == (tmp_path / "checkpoint-3" / name).read_bytes()
    found = {}
    for name, path in (("old", tmp_path / "checkpoint-3"), ("new", target)):
        on_ranks(2, resume, str(path), str(tmp_path / f"{name}.pt"))
        found[name] = torch.load(tmp_path / f"{name}.pt")
    assert found["new"]["steps"] == [5.0]
    assert found["new"]["losses"][0] == pytest.approx(found["old"]["losses"][0], abs=1e-4)
    assert found["new"]["losses"][1] == pytest.approx(found["old"]["losses"][1], abs=0.2)
