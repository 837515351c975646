"""Stop at any step, go on in a new process: the run is the same, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import SGD, AdamW, Optimizer

from sparkling_cli.errors import SpecError
from sparkling_cli.training import rewarm
from tests.training import reference as ref

ROOT = Path(__file__).resolve().parents[2]
STOP, END = ref.TE + 7, ref.TE + 15


def make(name: str, params: Any) -> Optimizer:
    """AdamW corrects from its state, SGD keeps new entries aside."""
    if name == "adamw":
        return AdamW(params, lr=ref.BASE.peak, weight_decay=0.1)
    return SGD(params, lr=ref.BASE.peak, momentum=0.9)


def go_on(folder: Path, name: str) -> None:
    """The second process: load what the first one saved, and train to the end."""
    saved = torch.load(folder / "saved.pt")
    net = ref.model(dtype=torch.float32)
    net.load_state_dict(saved["model"])
    optimizer = make(name, net.parameters())
    sched = ref.scheduler(optimizer, 0)
    optimizer.load_state_dict(saved["optimizer"])
    sched.load_state_dict(saved["scheduler"])
    rewarming = rewarm(optimizer, net, ref.history())
    rewarming.load_state_dict(saved["rewarming"])
    for _ in ref.steps(net, optimizer, sched, STOP, END):
        pass
    torch.save({"model": net.state_dict(), "rewarming": rewarming.state_dict()}, folder / "end.pt")


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_new_process_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Uninterrupted, and saved, killed and resumed in a new process: equal parameters and counters."""
    net, optimizer, sched = ref.expanded(lambda params: make(name, params), torch.float32)
    rewarming = rewarm(optimizer, net, ref.history())
    for step in ref.steps(net, optimizer, sched, ref.TE, END):
        if step + 1 == STOP:
            saved = {
                "model": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": sched.state_dict(),
                "rewarming": rewarming.state_dict(),
            }
            torch.save(saved, tmp_path / "saved.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1); from pathlib import Path;"
        "from tests.training.test_resume import go_on; go_on(Path(sys.argv[1]), sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tmp_path), name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    resumed = torch.load(tmp_path / "end.pt")
    assert resumed["rewarming"] == rewarming.state_dict() == {"steps": [END]}
    for key, value in net.state_dict().items():
        assert torch.equal(value, resumed["model"][key]), key


def test_the_step_can_be_given_instead() -> None:
    """``rewarm(step=N)`` is the same as loading the state of step N."""
    results = []
    for given in (True, False):
        net, optimizer, _ = ref.expanded(lambda params: make("adamw", params))
        if given:
            rewarm(optimizer, net, ref.history(), step=STOP)
        else:
            rewarm(optimizer, net, ref.history()).load_state_dict({"steps": [STOP]})
        net(ref.data(0)).backward()
        optimizer.step()
        results.append(ref.parameters(net))
    assert ref.distance(*results) == 0


def test_state_of_another_setup_is_refused() -> None:
    """Counters of two optimizers do not load into one."""
    net, optimizer, _ = ref.expanded(lambda params: make("adamw", params))
    with pytest.raises(SpecError, match="2 optimizer"):
        rewarm(optimizer, net, ref.history()).load_state_dict({"steps": [40, 40]})


@pytest.mark.filterwarnings("error")
def test_the_step_that_makes_state_to_load_into_is_none() -> None:
    """``torch.distributed.checkpoint`` steps an optimizer without state once, at a rate of zero."""
    net, optimizer, _ = ref.expanded(lambda params: make("adamw", params))
    for group in optimizer.param_groups:
        del group["initial_lr"]
    model, state = deepcopy(get_state_dict(net, optimizer))
    fresh = ref.model(seed=1)
    theirs = make("adamw", fresh.parameters())
    rewarming = rewarm(theirs, fresh, ref.history())
    set_state_dict(fresh, theirs, model_state_dict=model, optim_state_dict=state)
    assert rewarming.step == ref.TE
    for one in (net, fresh):
        one.zero_grad()
        one(ref.data(0)).backward()
    rewarm(optimizer, net, ref.history())
    optimizer.step()
    theirs.step()
    assert rewarming.step == ref.TE + 1
    assert all(torch.equal(value, ref.parameters(net)[key]) for key, value in ref.parameters(fresh).items())
