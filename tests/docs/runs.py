"""The training runs that some pages start from: what their readers have, made by the real frameworks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

_NANOGPT = """
from pathlib import Path
from tests.formats.make_nanogpt import make_nanogpt
make_nanogpt(Path("out/ckpt.pt"), prefix="_orig_mod.")
"""

#: nanoGPT's ``model.py`` as far as its ``train.py`` uses it; its loss takes ``view``s, so contiguous targets.
_MODEL = """
from torch.nn import functional

from tests.formats.make_nanogpt import GPT as Faithful
from tests.formats.make_nanogpt import GPTConfig


class GPT(Faithful):
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return self.optimizer(learning_rate)

    def forward(self, idx, targets=None):
        logits = super().forward(idx)
        loss = functional.cross_entropy(
            logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1
        )
        return logits, loss
"""

_TORCHTITAN = """
import os
import torch.distributed as dist
os.environ["LOCAL_RANK"] = "0"
dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=0, world_size=1)
from pathlib import Path
from tests.formats.make_torchtitan import Run, Sizes
run = Run(Path("outputs/checkpoint"), Sizes())
run.train(3)
run.state.step = 5000
run.manager.save(5000, last_step=True)
dist.destroy_process_group()
"""


_PRETRAINING = """
import torch
from pathlib import Path
from tests.formats import make_nanochat, test_composer, test_lingua, test_megatron_legacy, test_olmo
for step in (3, make_nanochat.STEP):
    torch.manual_seed(3)
    model = make_nanochat.GPT(make_nanochat.GPTConfig())
    optimizer = make_nanochat.MuonAdamW(model.groups())
    make_nanochat.train(model, optimizer, 0, step)
    make_nanochat.save(Path("base_checkpoints/d4"), model, optimizer, step=step)
test_megatron_legacy.make_megatron(Path("checkpoints/iter_0000005"), 2, 1)
Path("wide").mkdir()
torch.save(test_composer.made()[1], "ep0-ba5-rank0.pt")
test_olmo.make_olmo(Path("step5-unsharded"))
Path("runs").mkdir()
test_lingua.make_lingua(Path("runs/0000000005"))
"""


def _python(code: str, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def nanogpt(folder: Path) -> None:
    """``out/ckpt.pt`` and ``model.py``."""
    (folder / "out").mkdir()
    _python(_NANOGPT, folder)
    (folder / "model.py").write_text(_MODEL)


def torchtitan(folder: Path) -> None:
    """``outputs/checkpoint/step-5000``."""
    pytest.importorskip("torchtitan", reason="pip install torchtitan==0.3.0 triton")
    _python(_TORCHTITAN, folder)


def pretraining(folder: Path) -> None:
    """A small run of every trainer on the page."""
    _python(_PRETRAINING, folder)


def clone(folder: Path) -> None:
    """The bundled checkpoints beside it."""
    (folder / "fixtures").symlink_to(ROOT / "fixtures")


def plain_loop(folder: Path) -> None:
    """The loop went on with the state of step 100: its counters say 103, and copies have parted."""
    import torch

    state = torch.load(folder / "state.pt", weights_only=True)["optimizer"]["state"]
    assert {int(entry["step"]) for entry in state.values()} == {103}
    widened = [entry["exp_avg"] for entry in state.values() if entry["exp_avg"].shape == (352, 64)]
    assert widened
    for moment in widened:
        assert not torch.allclose(moment[:176], moment[176:], rtol=1e-3)


#: What must hold after a page was run, beyond its commands' success.
AFTER: Mapping[str, Callable[[Path], None]] = {"how-to/plain-loop.md": plain_loop}

RUNS: Mapping[str, Callable[[Path], None]] = {
    "explanation/method.md": clone,
    "how-to/nanogpt.md": nanogpt,
    "how-to/pretraining.md": pretraining,
    "how-to/torchtitan.md": torchtitan,
}
