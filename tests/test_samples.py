"""What continuous integration takes of the surveys."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_every_class_of_transformers_occurs() -> None:
    """In one of the tests that go over classes, or in a part of the list of architectures."""
    from sparkling_cli.models.skeleton import causal_lm_names
    from tests.docs.test_generated_pages import PARTS

    every = re.search(r"EVERY=(\d+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert every is not None
    command = [sys.executable, "-m", "pytest", "-q", "-m", "survey", "--every", every[1], "--collect-only"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    cases = re.findall(r"::(\w+)\[(.+)\]$", listed, flags=re.M)
    names = sorted(causal_lm_names())
    parts = [int(case) for test, case in cases if test.startswith("test_the_list_of_architectures")]
    found = {case for _, case in cases}.union(*(names[part::PARTS] for part in parts))
    assert parts and sorted(set(names) - found) == []
