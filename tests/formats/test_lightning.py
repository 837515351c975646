"""Lightning's own checkpoints, widened and resumed by Lightning's own ``Trainer.fit(ckpt_path=...)``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparkling_cli.formats.detect import open_checkpoint
from tests.formats.make_nanogpt import batch
from tests.formats.widening import check_moments, widen

pytest.importorskip("lightning", reason="pip install lightning==2.6.6")
from tests.formats.make_lightning import Module, run

pytestmark = pytest.mark.slow


def test_resumes_where_it_was(tmp_path: Path) -> None:
    """Hyper-parameters widened, first loss and step and schedule as in the run that was not stopped."""
    module = Module()
    run(module, 4, tmp_path, save=tmp_path / "last.ckpt")
    target = widen(tmp_path / "last.ckpt", tmp_path / "wide.ckpt", {"hidden": 2, "heads": 2, "ffn": 2})
    checkpoint = open_checkpoint(target)
    assert checkpoint.facts["kind"] == "lightning"
    assert checkpoint.facts["global_step"] == 4
    wide = Module.load_from_checkpoint(target)
    assert (wide.hparams["n_embd"], wide.hparams["n_head"]) == (48, 6)
    ids = batch(module.sizes, 50)
    torch.testing.assert_close(wide.model(ids), module.model(ids), rtol=1e-5, atol=1e-5)

    run(same := Module(), 6, tmp_path, resume=tmp_path / "last.ckpt")
    trainer = run(wide, 6, tmp_path, resume=target)
    assert trainer.global_step == 6
    assert wide.losses[0] == pytest.approx(same.losses[0], abs=1e-5)
    assert wide.lr_schedulers().get_last_lr() == same.lr_schedulers().get_last_lr()

    old = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    new = torch.load(target, weights_only=True)["optimizer_states"][0]["state"]
    for number, before in old.items():
        check_moments({k: before[k] for k in ("exp_avg", "exp_avg_sq")}, new[number], str(number))


def test_only_the_sizes_change(tmp_path: Path) -> None:
    """Loops, callbacks, epochs and versions are carried over word for word."""
    run(Module(), 3, tmp_path, save=tmp_path / "last.ckpt")
    target = widen(tmp_path / "last.ckpt", tmp_path / "wide.ckpt", {"hidden": 2, "heads": 2, "ffn": 2})
    before = torch.load(tmp_path / "last.ckpt", weights_only=True)
    after = torch.load(target, weights_only=True)
    assert list(before) == list(after)
    for key in before.keys() - {"state_dict", "optimizer_states", "hyper_parameters"}:
        assert before[key] == after[key], key
