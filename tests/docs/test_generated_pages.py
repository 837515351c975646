"""Generated pages are those that the code makes, and the site builds."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.blocks import ROOT


def generator() -> ModuleType:
    """docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_code_says() -> None:
    """Commands, API, spec, exit codes and schemas as committed."""
    pytest.importorskip("transformers")
    for name, content in generator().pages().items():
        path = ROOT / "docs" / "reference" / name
        assert path.exists(), f"{name} is missing: run `python docs/generate.py`"
        assert path.read_text(encoding="utf-8") == content, f"{name} is stale: run `python docs/generate.py`"


def test_no_generated_page_is_left_over() -> None:
    """Every schema in the folder is still made."""
    made = set(generator().pages())
    there = {f"schemas/{path.name}" for path in (ROOT / "docs" / "reference" / "schemas").iterdir()}
    assert there <= made


@pytest.mark.survey
@pytest.mark.timeout(3600)
def test_the_list_of_architectures_is_what_the_library_offers() -> None:
    """Every class judged again; only the build of torch (``+cpu``) may differ."""
    from sparkling_cli.models import survey

    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    made = survey.to_markdown(survey.survey())
    hint = "run `sparkling architectures --markdown > docs/architectures.md`"
    assert without_build(page).splitlines() == without_build(made).splitlines(), hint


def without_build(page: str) -> str:
    """The page without what says for which device torch was built."""
    return re.sub(r"(torch [\d.]+)\+\w+", r"\1", page)


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """Without a warning: every page in the navigation, every link inside."""
    pytest.importorskip("material", reason="the docs extra is not installed")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    build += ["--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "tutorial.html").exists()
