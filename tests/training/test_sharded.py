"""Parameters sharded by FSDP2 over two processes, on any dim, against one process."""

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
from tests.training.sharded_run import train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes under torchrun ended with."""
    out = tmp_path_factory.mktemp("sharded")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "tests.training.sharded_run", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_two_processes_equal_one(runs: Path, name: str, dim: int) -> None:
    """Sharded rows (unevenly: 7 of them) or columns give the same parameters, to float64 rounding."""
    net = ref.model()
    train(name, net, 0, 1)
    sharded = torch.load(runs / f"{name}-{dim}.pt")
    assert ref.distance(sharded, ref.parameters(net)) < 1e-12
    plain = ref.model()
    assert ref.distance(sharded, ref.parameters(plain)) > 1e-3


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
