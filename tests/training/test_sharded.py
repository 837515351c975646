"""Parameters shared out over two or four processes, on dims or anywhere, against separate ones in one."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache, partial
from itertools import product
from pathlib import Path

import pytest
import torch

from sparkling_cli.layout.regions import Region
from sparkling_cli.training.slices import new_entries
from tests.training import reference as ref
from tests.training.loops import FLOAT64
from tests.training.sharded_run import ACCELERATE, FOUR, MORE_OF_TWO, STEPS, TWO, make

ROOT = Path(__file__).resolve().parents[2]


def run(processes: int, out: Path, ways: tuple[str, ...]) -> Path:
    """What processes under torchrun ended with."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "-m", "tests.training.sharded_run", str(out), *ways,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two processes."""
    return run(2, tmp_path_factory.mktemp("two"), TWO)


@pytest.fixture(scope="module")
def more_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two processes."""
    return run(2, tmp_path_factory.mktemp("more"), MORE_OF_TWO)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four processes."""
    return run(4, tmp_path_factory.mktemp("four"), FOUR)


@cache
def separate(name: str) -> dict[str, torch.Tensor]:
    """Old and new entries as separate parameters in one process, after the same steps."""
    made = partial(make, name)
    net, optimizer, _ = ref.expanded(made)
    split, reference, sched = ref.split_reference(net, optimizer, made)
    for _ in ref.steps(split, reference, sched, ref.TE, ref.TE + STEPS):
        pass
    return {key: value.detach() for key, value in split.whole().items()}


def check(runs: Path, name: str, how: str) -> None:
    """The parameters of separate ones, to rounding; and bit for bit when left and taken up again."""
    whole, legs = (torch.load(runs / f"{name}-{how}-{run}.pt") for run in ("whole", "legs"))
    assert ref.distance(whole, separate(name)) < FLOAT64.limit
    assert [key for key, value in whole.items() if not torch.equal(value, legs[key])] == []


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_reference_is_told_from_a_run_without_re_warming(name: str) -> None:
    """What the runs below are held to is further away than their tolerance."""
    net, optimizer, sched = ref.expanded(partial(make, name))
    for _ in ref.steps(net, optimizer, sched, ref.TE, ref.TE + STEPS):
        pass
    assert ref.distance(ref.parameters(net), separate(name)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("how", TWO)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_two_processes_equal_separate_parameters(two: Path, name: str, how: str) -> None:
    """FSDP2 over rows (unevenly: 7 of them) or columns; FSDP1, whose cuts lie anywhere."""
    check(two, name, how)


@pytest.mark.slow
@pytest.mark.parametrize("how", MORE_OF_TWO)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_more_of_two_processes(more_of_two: Path, name: str, how: str) -> None:
    """FSDP2 with its policy of offloading, FSDP1 that shares out nothing."""
    check(more_of_two, name, how)


@pytest.mark.slow
def test_fsdp1_by_accelerate(tmp_path: Path) -> None:
    """What its ``prepare`` returns."""
    pytest.importorskip("accelerate")
    runs = run(2, tmp_path, ACCELERATE)
    for name, how in product(("adamw", "sgd"), ACCELERATE):
        check(runs, name, how)


@pytest.mark.slow
@pytest.mark.parametrize("how", FOUR)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_mesh_of_two_dims_equals_separate_parameters(four: Path, name: str, how: str) -> None:
    """Tensor parallel in one dim of the mesh and FSDP2 in the other; FSDP1 sharded in one and replicated."""
    check(four, name, how)


def check_kept_step(runs: Path, how: str) -> None:
    """Muon's own step of sharded matrices, scaled here by hand as whole ones."""
    start = ref.parameters(ref.model())
    plain, kept = (torch.load(runs / f"muon-{how}-{keep}.pt") for keep in (False, True))
    masks = ref.new_masks()
    for name in ("embed.weight", "up.weight", "mixed.weight", "down.weight"):
        old = ~masks[name]
        columns = int(old.any(0).sum())
        shrunk = start[name] * (1 - 0.1 * ref.BASE.peak)
        update = plain[name] - shrunk
        share = update.square().mean().sqrt() / update[old].square().mean().sqrt()
        factor = (update.shape[1] / columns) ** 0.5 * share
        assert abs(factor - 1) > 0.02
        wanted = shrunk + factor * update
        assert float((kept[name] - wanted).norm() / wanted.norm()) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("dim", ["0", "1"])
def test_a_kept_step_of_two_processes(two: Path, dim: str) -> None:
    """FSDP2: a process may hold old entries alone."""
    check_kept_step(two, dim)


@pytest.mark.slow
def test_a_kept_step_on_a_mesh_of_two_dims(four: Path) -> None:
    """Tensor parallel too."""
    check_kept_step(four, "mesh")


def test_large_regions_come_in_pieces() -> None:
    """Pieces tile the region, none above the limit: the memory beside the parameters is bounded."""
    param = torch.zeros(3, 1000, 1000)
    rows = ((0, 400, 0), (400, 1000, 1))
    region = Region((3, 1000, 1000), ((((0, 3, 0),),), (rows,), (((0, 1000, 0),),)))
    entries = new_entries(param, region)
    assert entries is not None
    for piece in entries.of(param, 1):
        assert piece.numel() <= 1 << 17
        piece += 1
    assert int(param.sum()) == 3 * 600 * 1000
    assert float(param.max()) == 1.0
    assert not param[:, :400].any()
