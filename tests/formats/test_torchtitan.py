"""torchtitan's own checkpoints, widened and resumed by torchtitan's own checkpoint manager."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.formats.widening import check_moments, corner, widen

pytest.importorskip("torchtitan", reason="pip install torchtitan==0.3.0 triton")
from tests.formats.make_torchtitan import Run, Sizes, batch, loss_of, make_torchtitan

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def process_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Torchtitan wants a process group; one process will do."""
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "0")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("fuse_qkv", [True, False])
@pytest.mark.parametrize(
    ("axes", "wide"),
    [
        ({"ffn": 2}, Sizes(hidden_dim=80)),
        ({"hidden": 2}, Sizes(dim=96)),
        ({"hidden": 2, "ffn": 3}, Sizes(dim=96, hidden_dim=120)),
    ],
)
def test_resumes_where_it_was(tmp_path: Path, axes: dict[str, float], wide: Sizes, fuse_qkv: bool) -> None:
    """Same logits and first loss, step and schedule kept, state entry by entry, and it trains on."""
    run = make_torchtitan(tmp_path / "run", fuse_qkv=fuse_qkv)
    (tmp_path / "wide").mkdir()
    widen(tmp_path / "run" / "step-3", tmp_path / "wide" / "step-3", axes)
    resumed = Run(tmp_path / "wide", wide, fuse_qkv=fuse_qkv)
    assert resumed.manager.load(3)
    assert (resumed.state.step, resumed.state.ntokens_seen) == (3, run.state.ntokens_seen)
    assert resumed.schedulers.state_dict() == run.schedulers.state_dict()
    ids = batch(run.sizes, 9)
    torch.testing.assert_close(resumed.model(ids), run.model(ids), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(loss_of(resumed.model, ids), loss_of(run.model, ids), rtol=1e-6, atol=1e-5)
    old, new = run.optimizers.optimizers[0], resumed.optimizers.optimizers[0]
    for (name, before), after in zip(run.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert new.state[after]["step"] == 3
        moments = {slot: old.state[before][slot] for slot in ("exp_avg", "exp_avg_sq")}
        check_moments(moments, new.state[after], name)
        for slot, value in moments.items():
            assert torch.equal(corner(new.state[after][slot], before.shape), value), name
    resumed.train(1)


def test_weights_only(tmp_path: Path) -> None:
    """A model-only save, which torchtitan makes last, is widened too; two layouts fit, one is chosen."""
    run = make_torchtitan(tmp_path / "run")
    run.manager.last_save_model_only = True
    run.manager.save(4, last_step=True)
    target = tmp_path / "wide" / "step-4"
    target.parent.mkdir()
    widen(tmp_path / "run" / "step-4", target, {"ffn": 2}, layout=Path("torchtitan-llama3"))
    resumed = Run(tmp_path / "wide", Sizes(hidden_dim=80))
    import torch.distributed.checkpoint as dcp

    weights = resumed.model.state_dict()
    dcp.load(weights, checkpoint_id=target)
    resumed.model.load_state_dict(weights)
    ids = batch(run.sizes, 9)
    torch.testing.assert_close(resumed.model(ids), run.model(ids), rtol=1e-5, atol=2e-5)
