"""Flat tensors that hold pieces of parameters: DeepSpeed's ZeRO over two processes, and arithmetic."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparkling_cli.errors import SparklingError, SpecError
from sparkling_cli.layout.regions import Region
from sparkling_cli.training import Piece, rewarm
from sparkling_cli.training.slices import new_entries_of_pieces
from tests.training import loops
from tests.training import reference as ref
from tests.training.zero_run import CASES, CPU_ADAM

ROOT = Path(__file__).resolve().parents[2]


def partitions(net: ref.Tiny, cuts: list[int]) -> tuple[list[torch.nn.Parameter], list[Piece]]:
    """The parameters one after the other, cut into flat tensors; and what these hold of which."""
    named = dict(net.named_parameters())
    whole = torch.cat([p.detach().flatten() for p in named.values()])
    bounds = [0, *cuts, len(whole)]
    flat = [torch.nn.Parameter(whole[a:b].clone()) for a, b in pairwise(bounds)]
    pieces, at = [], 0
    for name, p in named.items():
        for tensor, (a, b) in zip(flat, pairwise(bounds), strict=True):
            start, stop = max(a, at), min(b, at + p.numel())
            if start < stop:
                pieces.append(Piece(name, tuple(p.shape), start - at, stop - start, tensor, start - a))
        at += p.numel()
    return flat, pieces


def unflat(net: ref.Tiny, flat: list[torch.nn.Parameter]) -> dict[str, Tensor]:
    """The parameters again."""
    named = dict(net.named_parameters())
    parts = torch.cat(list(flat)).split([p.numel() for p in named.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}


def state_of(base: torch.optim.Optimizer, net: ref.Tiny, optimizer: torch.optim.Optimizer) -> None:
    """Give flat tensors the state of the parameters that they are made of."""
    at, states = 0, [optimizer.state[p] for p in net.parameters()]
    for tensor in base.param_groups[0]["params"]:
        for key, value in states[0].items():
            if isinstance(value, Tensor) and value.ndim:
                value = torch.cat([state[key].flatten() for state in states])[at:][: len(tensor)]
            base.state[tensor][key] = value.clone() if isinstance(value, Tensor) else value
        at += len(tensor)


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("counts", [(50,), (20, 30)], ids=["whole", "legs"])
def test_flat_partitions_equal_separate_parameters(kind: Any, in_turn: bool, counts: tuple[int, ...]) -> None:
    """Cut anywhere, also inside of rows, and stepped together or one after the other (ZeRO's way): 1e-10."""

    def make(params: Any) -> torch.optim.Optimizer:
        return kind(params, lr=ref.BASE.peak, weight_decay=0.1)

    net, optimizer, _ = ref.expanded(make)
    split, reference, ref_sched = ref.split_reference(net, optimizer, make)
    kept: dict[str, Any] = {}
    for number, first, last in loops.legs(counts):
        flat, pieces = partitions(net, [83, 200, 201, 500])
        base = make(flat)
        if number:
            with torch.no_grad():
                for tensor, value in zip(flat, kept["flat"], strict=True):
                    tensor.copy_(value)
            base.load_state_dict(kept["base"])
        else:
            state_of(base, net, optimizer)
        rewarming = rewarm(base, pieces, ref.history(), measure_every=1)
        rewarming.load_state_dict(kept.get("rewarming", rewarming.state_dict()))
        for step in range(first, last):
            base.zero_grad()
            torch.func.functional_call(net, unflat(net, flat), (ref.data(step),)).backward()
            (group,) = base.param_groups
            group["lr"] = ref.BASE(step)
            for params in [[f] for f in flat] if in_turn else [flat]:
                group["params"] = params
                base.step()
            group["params"] = [] if in_turn else flat
            assert rewarming.step == step + 1
            assert rewarming.metrics()["learning_rate_new"] == pytest.approx(ref.eta_new(step), rel=1e-12)
            group["params"] = flat
        parts = {"base": base, "rewarming": rewarming}
        kept = {"flat": flat, **{name: part.state_dict() for name, part in parts.items()}}
    for _ in ref.steps(split, reference, ref_sched, ref.TE, ref.TE + 50):
        pass
    found = {name: value.detach() for name, value in unflat(net, flat).items()}
    assert ref.distance(found, split.whole()) < loops.FLOAT64.limit


@given(st.data())
def test_any_piece_of_any_region(data: st.DataObject) -> None:
    """The new entries of a piece are those of the whole parameter that it holds, each once."""
    axes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=4))
    dims = tuple((((0, old, 0), *(((old, old + new, 1),) if new else ())),) for old, new in axes)
    shape = tuple(old + new for old, new in axes)
    region = Region(shape, dims)
    whole = torch.zeros(region.view)
    for box in region.boxes(1):
        whole[tuple(slice(a, b) for a, b in box)] = 1
    start = data.draw(st.integers(0, prod(shape)))
    stop = data.draw(st.integers(start, prod(shape)))
    flat = torch.zeros(stop - start + 7)
    entries = new_entries_of_pieces([(Piece("p", shape, start, stop - start, flat, 5), region)])
    for piece in entries.of(flat, 1) if entries else ():
        piece += 1
    wanted = torch.zeros(len(flat))
    wanted[5 : 5 + stop - start] = whole.flatten()[start:stop]
    assert torch.equal(flat, wanted)


def test_a_flat_tensor_that_is_stepped_twice_is_noticed() -> None:
    """One of them is never stepped: the others come again before the step is whole."""
    net = ref.model()
    flat, pieces = partitions(net, [300])
    base = loops.adamw(flat)
    rewarm(base, pieces, ref.history())
    for p in flat:
        p.grad = torch.zeros_like(p)
    base.param_groups[0]["params"] = flat[:1]
    with pytest.warns(UserWarning, match="has no state"):
        base.step()
    with pytest.raises(SparklingError, match="not those that it had"):
        base.step()


def test_what_zero_does_beside_its_optimizer_is_refused() -> None:
    """By the option's name; and flat tensors of several optimizers whose groups are empty."""
    net = ref.model()
    flat, pieces = partitions(net, [300])

    class Zero:
        """As far as it is looked at."""

        single_partition_of_fp32_groups = flat
        optimizer = loops.adamw(flat)
        zenflow = True

    with pytest.raises(SpecError, match="Zero with zenflow"):
        rewarm(Zero(), net, ref.history())  # type: ignore[arg-type]
    several = [loops.adamw([f]) for f in flat]
    several[1].param_groups[0]["params"] = []
    with pytest.raises(SpecError, match="which of several optimizers"):
        rewarm(several, pieces, ref.history())


@pytest.mark.filterwarnings("ignore:AdamW has no state")
def test_flat_tensors_of_several_optimizers() -> None:
    """Each has its own: the same steps as in one."""
    found = []
    for together in (True, False):
        net = ref.model()
        flat, pieces = partitions(net, [300])
        several = [loops.adamw(flat)] if together else [loops.adamw([f]) for f in flat]
        rewarming = rewarm(several, pieces, ref.history(rho=3.0, tau=2), announce=False)
        for step in range(ref.TE, ref.TE + 4):
            torch.func.functional_call(net, unflat(net, flat), (ref.data(step),)).backward()
            for one in several:
                one.step()
                one.zero_grad()
            assert rewarming.step == step + 1
        found.append(unflat(net, flat))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes under torchrun ended with."""
    pytest.importorskip(
        "deepspeed", reason="pip install deepspeed==0.19.8 hjson py-cpuinfo ninja msgpack einops"
    )
    return run(tmp_path_factory.mktemp("zero"), CASES)


def run(out: Path, cases: Iterable[str], timeout: int = 400) -> Path:
    """What two processes ended with."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "tests.training.zero_run", str(out), *cases,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_zero_equals_separate_parameters_and_itself(runs: Path, case: str) -> None:
    """Fifty steps: to float32's rounding; with bfloat16 gradients as near as without re-warming (0.004)."""
    whole, legs, plain = (torch.load(runs / f"{case}-{run}.pt") for run in ("whole", "legs", "plain"))
    if case.endswith("bfloat16"):
        wanted, exact = loops.separate_masters(torch.float32, 2), loops.BFLOAT16
    else:
        wanted, exact = loops.separate(torch.float32), loops.FLOAT32
    assert ref.distance(whole, wanted) < exact.limit
    assert ref.distance(plain, wanted) > 0.05
    assert [name for name, value in whole.items() if not torch.equal(value, legs[name])] == []


@pytest.mark.slow
def test_deepspeeds_own_adam_in_the_hosts_memory(tmp_path: Path) -> None:
    """To float32's rounding; resumed too: it has powers of the betas, which it multiplies up in one run."""
    pytest.importorskip("deepspeed", reason="pip install deepspeed==0.19.8 and what it needs to compile")
    if shutil.which("g++") is None:
        pytest.skip("DeepSpeed's CPUAdam is compiled by g++")
    run(tmp_path, CPU_ADAM, timeout=1500)
    wanted = loops.separate(torch.float32)
    for case in CPU_ADAM:
        whole, legs, plain = (torch.load(tmp_path / f"{case}-{run}.pt") for run in ("whole", "legs", "plain"))
        assert ref.distance(whole, wanted) < loops.FLOAT32.limit
        assert ref.distance(legs, whole) < loops.FLOAT32.limit
        assert ref.distance(plain, wanted) > 0.05


@pytest.mark.slow
def test_the_trainer_under_zero_is_the_trainer(tmp_path: Path) -> None:
    """One process, ZeRO 2 and 3: the parameters of the Trainer without DeepSpeed, and bit for bit resumed."""
    pytest.importorskip(
        "deepspeed", reason="pip install deepspeed==0.19.8 hjson py-cpuinfo ninja msgpack einops"
    )
    places = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for stage in (0, 2, 3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, "-m", "tests.training.trainer_run", str(tmp_path), str(stage)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment |= {**places, "MASTER_PORT": port} if stage else {}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-4000:]
    alone = torch.load(tmp_path / "trainer-0-whole.pt")
    for stage in (0, 2, 3):
        whole, legs, plain = (
            torch.load(tmp_path / f"trainer-{stage}-{run}.pt") for run in ("whole", "legs", "plain")
        )
        assert ref.distance(whole, alone) < loops.FLOAT32.limit
        assert ref.distance(plain, alone) > 0.01
        assert all(torch.equal(value, legs[name]) for name, value in whole.items())
