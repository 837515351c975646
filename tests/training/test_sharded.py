"""Parameters sharded over two processes on any dim, and over a mesh of four, against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparkling_cli.layout.regions import Region
from sparkling_cli.training.slices import new_entries
from tests.training import reference as ref
from tests.training.loops import FLOAT64
from tests.training.sharded_run import train

ROOT = Path(__file__).resolve().parents[2]


def run(processes: int, out: Path) -> Path:
    """What processes under torchrun ended with."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "-m", "tests.training.sharded_run", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two processes."""
    return run(2, tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four processes."""
    return run(4, tmp_path_factory.mktemp("mesh"))


def check(runs: Path, name: str, how: str) -> None:
    """The same parameters as in one process, to rounding; and bit for bit when left and taken up again."""
    net = ref.model()
    train(name, net, 0, 1)
    sharded = torch.load(runs / f"{name}-{how}-whole.pt")
    assert ref.distance(sharded, ref.parameters(net)) < FLOAT64.limit
    plain = ref.model()
    assert ref.distance(sharded, ref.parameters(plain)) > 1e-3
    legs = torch.load(runs / f"{name}-{how}-legs.pt")
    assert all(torch.equal(value, legs[key]) for key, value in sharded.items())


@pytest.mark.parametrize("dim", ["0", "1"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_two_processes_equal_one(two: Path, name: str, dim: str) -> None:
    """FSDP2 over rows (unevenly: 7 of them) or columns."""
    check(two, name, dim)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_mesh_of_two_dims_equals_one_process(four: Path, name: str) -> None:
    """Tensor parallel in one dim of the mesh, FSDP2 in the other."""
    check(four, name, "mesh")


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
