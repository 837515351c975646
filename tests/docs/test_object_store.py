"""The recipe for object stores, as it stands on its page, against a local S3 server."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Block, blocks, installed, prints, session

PAGE = ROOT / "docs" / "how-to" / "recipes.md"
CHECK = "bash in_store.sh wide.sha256 s3://runs/wide"


def recipe() -> tuple[Block, Block]:
    """The script and the session of the section."""
    script, shown = (b for b in blocks(PAGE) if b.reason and "test_object_store" in b.reason)
    assert script.title == "in_store.sh"
    return script, shown


@pytest.fixture
def store(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A server of its own; the environment in which the store's commands talk to it."""
    server = shutil.which("moto_server")
    if server is None or shutil.which("aws") is None:
        pytest.skip("pip install 'moto[server]' awscli")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    process = subprocess.Popen([server, "-p", port], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", int(port))) != 0:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.2)
        keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing")
        address = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
        yield installed(tmp_path) | keys | address
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_recipe_works_and_finds_what_the_store_has_changed(tmp_path: Path, store: dict[str, str]) -> None:
    """Every command, with what it prints; then with an object that was changed, and one that is gone."""

    def run(command: str) -> subprocess.CompletedProcess[str]:
        words = ["bash", "-euo", "pipefail", "-c", command]
        return subprocess.run(words, cwd=tmp_path, env=store, capture_output=True, text=True, check=False)

    def must(command: str) -> str:
        done = run(command)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    script, shown = recipe()
    assert script.title is not None
    (tmp_path / script.title).write_text(script.body + "\n")
    must("python -m sparkling_cli.examples.train; aws s3 mb s3://runs")
    must("aws s3 cp --recursive --only-show-errors example/checkpoint-100 s3://runs/checkpoint-100")
    for command, printed in session(shown):
        assert prints(printed, must(command)), command
    assert command == CHECK
    names = [line.split()[1] for line in (tmp_path / "wide.sha256").read_text().splitlines()]
    written = {
        p.relative_to(tmp_path / "scratch" / "wide").as_posix()
        for p in (tmp_path / "scratch" / "wide").rglob("*")
    }
    assert set(names) <= written and "sparkling/manifest.json" in names

    changed = bytearray((tmp_path / "scratch" / "wide" / "optimizer.pt").read_bytes())
    changed[len(changed) // 2] ^= 1
    (tmp_path / "changed").write_bytes(changed)
    must("aws s3 cp --only-show-errors changed s3://runs/wide/optimizer.pt")
    found = run(CHECK)
    assert found.returncode == 1 and "s3://runs/wide/optimizer.pt is not what was written" in found.stdout
    must("aws s3 cp --only-show-errors scratch/wide/optimizer.pt s3://runs/wide/optimizer.pt")
    must(CHECK)
    must("aws s3 rm s3://runs/wide/sparkling/manifest.json")
    assert run(CHECK).returncode != 0
