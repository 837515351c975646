"""Two hosts that share a disk and nothing else: network namespaces with a cable between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

#: namespace -> its end of the cable, and that end's address
HOSTS = {"sparkling-a": ("spark-a", "10.83.7.1"), "sparkling-b": ("spark-b", "10.83.7.2")}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("ip") is None or os.geteuid() != 0, reason="network namespaces need root and iproute2"
    ),
]


def ip(*words: str, check: bool = True) -> bool:
    """Run ``ip``; whether it did what it was told."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if check and done.returncode:
        pytest.skip(f"no network namespaces here: ip {' '.join(words)}: {done.stderr.strip()}")
    return done.returncode == 0


@pytest.fixture
def hosts() -> Iterator[None]:
    """Both hosts, wired up; they are gone afterwards."""
    try:
        for name in HOSTS:
            ip("netns", "add", name)
        (one, _), (other, _) = HOSTS.values()
        ip("link", "add", one, "type", "veth", "peer", "name", other)
        for name, (end, address) in HOSTS.items():
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", end, "up")
        yield
    finally:
        for name in HOSTS:
            ip("netns", "del", name, check=False)


def test_one_output_from_two_hosts(hosts: None, dense_checkpoint: Path, tmp_path: Path) -> None:
    """Two processes on each of two hosts write what one process writes."""
    expand = ["-m", "sparkling_cli", "expand", str(dense_checkpoint)]
    options = ["--axis", "ffn", "--factor", "2", "--init", "random-copy", "--report", "none"]
    running = []
    for rank, (name, (end, _)) in enumerate(HOSTS.items()):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
        torchrun += ["--node-rank", str(rank), "--master-addr", HOSTS["sparkling-a"][1]]
        torchrun += ["--master-port", "29517", *expand, str(tmp_path / "both" / "wide"), *options]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": end, "OMP_NUM_THREADS": "1"}
        words = ["ip", "netns", "exec", name, *torchrun]
        running.append(
            subprocess.Popen(
                words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    for process in running:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]
    alone = [sys.executable, *expand, str(tmp_path / "one" / "wide"), *options, "--quiet"]
    subprocess.run(alone, check=True, timeout=300)
    one = tmp_path / "one"
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) > 10
    for path in files:
        assert (tmp_path / "both" / path).read_bytes() == (one / path).read_bytes(), path
