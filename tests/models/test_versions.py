"""The oldest transformers that is promised, in a process of its own, proves what the newest does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparkling_cli.models import survey
from sparkling_cli.models.skeleton import NEEDED

pytestmark = pytest.mark.survey

#: Where the oldest version lies, installed with what it needs.
FOLDER = os.environ.get("SPARKLING_OLDEST_TRANSFORMERS", "")
OLDEST = ".".join(map(str, (*NEEDED, 0)))
TYPES = ["llama", "gpt2", "bloom", "codegen", "mixtral", "gemma2", "helium"]


@pytest.mark.skipif(
    not FOLDER, reason=f"pip install --target DIR transformers=={OLDEST}, SPARKLING_OLDEST_TRANSFORMERS=DIR"
)
def test_the_oldest_version_proves_what_the_newest_does(tmp_path: Path) -> None:
    """Class by class the same axes in the columns of the survey, one with another, by the same files."""
    code = "from sparkling_cli.cli.app import app; from sparkling_cli.cli.console import run; run(app)"
    found = subprocess.run(
        [sys.executable, "-c", code, "architectures", *TYPES, "--json", "-q"],
        env={**os.environ, "PYTHONPATH": FOLDER, "SPARKLING_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    old = json.loads(found.stdout)
    assert f"transformers {OLDEST}" in old["versions"]
    for row, new in zip(old["architectures"], survey.survey(TYPES), strict=True):
        for column, roles in survey.COLUMNS:
            before = {a["name"]: a["joint"] for a in row["axes"] if a["proved"] and a["role"] in roles}
            after = {a.name: list(a.joint) for a in new.axes if a.proved and a.role in roles}
            assert before == after, (row["model_type"], column)
