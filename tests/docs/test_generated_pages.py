"""Generated pages are those that the code makes, and the site builds."""

from __future__ import annotations

import importlib.util
import posixpath
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

from tests.docs.blocks import ROOT

AGAIN = "run `sparkling architectures --markdown > docs/architectures.md`"
#: in which the classes are judged
PARTS = 12


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


def architectures() -> str:
    """The page; only the build of torch (``+cpu``) may differ.

    A Python for which there is no such version of transformers has other classes.
    """
    from sparkling_cli.storage.cache import versions

    page = without_build((ROOT / "docs" / "architectures.md").read_text(encoding="utf-8"))
    own = without_build(", ".join(versions()[1:3]))
    if f" with {own};" not in page:
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        newest = {
            line.partition(";")[0].replace("==", " ") for line in lines if "python_version <" not in line
        }
        assert not set(own.split(", ")) <= newest, (
            f"the page was made with other versions than {own}: {AGAIN}"
        )
        pytest.skip(f"the page was made with other versions than {own}")
    return page


def lines_of(page: str, model_type: str) -> list[str]:
    """A class's row in the table, and what it refuses."""
    starts = (f"| {model_type} |", f"- **{model_type}**")
    return [line for line in page.splitlines() if line.startswith(starts)]


@pytest.mark.survey
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(PARTS))
def test_the_list_of_architectures_is_what_the_library_offers(part: int) -> None:
    """Every class judged again."""
    from sparkling_cli.models import survey
    from sparkling_cli.models.skeleton import causal_lm_names

    page, names = architectures(), sorted(causal_lm_names())[part::PARTS]
    made = survey.to_markdown(survey.survey(names))
    for name in names:
        assert lines_of(page, name) == lines_of(made, name) != [], AGAIN


def test_the_list_of_architectures_counts_its_rows() -> None:
    """Every class of the library has a row, in order, and no other a line; the rest follows from the rows."""
    from sparkling_cli.models import survey
    from sparkling_cli.models.skeleton import causal_lm_names

    page, names = architectures(), causal_lm_names()
    lines = page.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    assert [(kind, name) for kind, name, *_ in rows] == sorted(names.items()), AGAIN
    refused = [line.split("**")[1] for line in lines if line.startswith("- **")]
    assert refused == sorted(refused) and set(refused) <= set(names), AGAIN
    proved = [len({row[1] for row in rows if row[place] not in ("refused", "none")}) for place in (2, 3, 4)]
    frame = without_build(survey.to_markdown(()))
    frame = frame.replace(
        "0 model types, 0 classes", f"{len(rows)} model types, {len(set(names.values()))} classes"
    )
    frame = frame.replace("ffn 0, hidden 0, heads 0", "ffn {}, hidden {}, heads {}".format(*proved))
    own = {line for name in names for line in lines_of(page, name)}
    assert [line for line in lines if line not in own] == frame.splitlines(), AGAIN


def without_build(page: str) -> str:
    """The page without what says for which device torch was built."""
    return re.sub(r"(torch [\d.]+)\+\w+", r"\1", page)


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """Without a warning, with every page, each in the navigation; every built link leads somewhere."""
    pytest.importorskip("zensical", reason="the docs extra is not installed")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "out" / "site"
    pages = {path.relative_to(site).as_posix(): Built(path) for path in site.rglob("*.html")}
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert set(pages) == {name.replace(".md", ".html") for name in written} | {"404.html"}
    assert pages["index.html"].links >= set(pages) - {"404.html", "index.html"}
    for name, page in pages.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target)) if target else name
            assert (site / path).is_file(), f"{name} links to {link}"
            if anchor and path in pages:
                assert anchor in pages[path].anchors, f"{name} links to {link}"


class Built(HTMLParser):
    """What a built page links to, and what in it can be linked to; ``404.html`` is served for any path."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        if path.name != "404.html":
            self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Addresses within the site, and ids."""
        for key, value in attrs:
            if key in ("href", "src") and value and not re.match(r"[a-z]+:|//", value):
                self.links.add(unquote(value).removeprefix("./"))
            elif key == "id" and value:
                self.anchors.add(value)
