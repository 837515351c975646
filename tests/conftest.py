"""Checkpoints that tests widen: the bundled ones, and tiny ones made on demand by the real Trainer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Subprocesses and workers inherit it: proofs are made once a session, and none comes from the user's cache.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="sparkling-tests-")
    os.environ["SPARKLING_CACHE_DIR"] = _CACHE.name
# Before transformers is imported: no test asks the network, or prints what it does not need.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import hypothesis
import pytest
import torch

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")
# Tiny tensors are slower on several threads, and sums come out the same everywhere.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Whatever a test, or a fixture that it asks for first, draws is the same in every run."""
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--every 3``: a third of the survey."""
    about = "of each survey test, every N-th case only; the tests begin at different ones"
    parser.addoption("--every", type=int, default=1, metavar="N", help=about)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose the cases of ``--every``.

    Tests that go over the same classes begin at different ones, so that N of them together see every class.
    Tests of one case stay.
    """
    every: int = config.getoption("--every")
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("survey") and "[" in item.nodeid:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left = {
        item.nodeid
        for number, one in enumerate(cases.values())
        for place, item in enumerate(one)
        if (place + number) % every
    }
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left])
    items[:] = [item for item in items if item.nodeid not in left]


FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"

TinyCheckpoint = Callable[..., Path]


def bundled(name: str) -> Path:
    """Return the one ``checkpoint-N`` of the bundled run ``name``."""
    found = sorted((FIXTURES / name).glob("checkpoint-*"))
    assert len(found) == 1, f"expected one checkpoint under {FIXTURES / name}, found {found}"
    return found[0]


@pytest.fixture(scope="session")
def dense_checkpoint() -> Path:
    """The bundled Llama-class checkpoint (grouped queries, untied head). Not to be written to."""
    return bundled("dense-llama")


@pytest.fixture(scope="session")
def moe_checkpoint() -> Path:
    """The bundled Qwen3-MoE checkpoint (the paper's model in miniature). Not to be written to."""
    return bundled("moe-qwen3")


@pytest.fixture(scope="session")
def heldout_text() -> Path:
    """The text file that the bundled models did not see."""
    return FIXTURES / "text" / "heldout.txt"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """A function ``(arch, **options) -> Path``: see ``fixtures.tiny.make_checkpoint``.

    Equal calls share one directory for the whole session, so it is not to be written to.
    """
    from fixtures.tiny import make_checkpoint

    made: dict[str, Path] = {}

    def make(arch: str, **options: Any) -> Path:
        key = repr((arch, sorted(options.items())))
        if key not in made:
            made[key] = make_checkpoint(arch, tmp_path_factory.mktemp(f"tiny-{arch}"), **options)
        return made[key]

    return make
