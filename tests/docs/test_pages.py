"""Every command and every piece of Python in the documentation works as printed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, blocks, commands, run_page, session
from tests.docs.runs import AFTER, RUNS

PAGES = sorted((ROOT / "docs").rglob("*.md"))
#: Pages that are made by commands of their own, with their own checks.
MADE = {"cli.md", "api.md", "spec.md", "exit-codes.md", "architectures.md", "performance.md", "evidence.md"}
WRITTEN = [page for page in PAGES if page.name not in MADE]
RUNNABLE = [
    page
    for page in WRITTEN
    if any(b.language in ("console", "bash", "python") and not b.reason for b in blocks(page))
]


#: Pages outside docs/, which the repository's host shows.
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]


def name_of(page: Path) -> str:
    """Path below docs/, or the name of a page outside."""
    return page.name if page in OUTSIDE else str(page.relative_to(ROOT / "docs"))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_the_page_works_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    """All its blocks, in order, in a folder with the bundled checkpoints, or with the run it starts from."""
    if name_of(page) in RUNS:
        RUNS[name_of(page)](tmp_path)
    assert run_page(page, tmp_path) > 0
    if name_of(page) in AFTER:
        AFTER[name_of(page)](tmp_path)


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_python_is_saved_and_run(page: Path) -> None:
    """Every piece of Python has a file's name, and a command below it runs it or a file that imports it."""
    found = list(blocks(page))
    for at, block in enumerate(found):
        if block.language != "python" or block.reason is not None:
            continue
        assert block.title, f"{page.name}: a block of Python without a file's name"
        later = "\n".join(b.body for b in found[at + 1 :])
        stem = Path(block.title).stem
        assert re.search(rf"^\$ python {stem}\.py|^from {stem} import", later, flags=re.M), block.title


def test_the_upload_is_a_command_of_the_hubs(tmp_path: Path) -> None:
    """Read and understood as far as the network, which it does not get; wrong use would be 2."""
    page = ROOT / "docs" / "how-to" / "recipes.md"
    (upload,) = (
        c for b in blocks(page) if b.language == "console" for c in commands(b) if c.startswith("hf ")
    )
    hub = shutil.which("hf", path=str(Path(sys.executable).parent))
    if hub is None:
        pytest.skip("pip install huggingface_hub")
    (tmp_path / "scratch" / "wide").mkdir(parents=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_TOKEN": "none"}
    done = subprocess.run(
        [hub, *shlex.split(upload)[1:]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "offline mode" in done.stdout + done.stderr, done.stdout + done.stderr


def outputs(page: Path) -> set[str]:
    """What a page's commands and scripts write: outputs of ``expand``, and the Python files saved."""
    found = [block for block in blocks(page) if block.reason is None]
    words = [c.split() for b in found if b.language == "console" for c in commands(b) if "--dry-run" not in c]
    made = {
        w[i + 2] for w in words for i, x in enumerate(w) if x == "expand" and not w[i + 2].startswith("-")
    }
    return made | {block.title for block in found if block.title}


def test_pages_keep_out_of_each_others_way() -> None:
    """Read one after the other in one clone, no page writes what another wrote, nor inside it."""
    written = [(page.name, Path(name)) for page in WRITTEN for name in outputs(page)]
    assert len(written) > 12
    for page, one in written:
        for other_page, other in written:
            assert page == other_page or (one != other and one not in other.parents), f"{page}: {one}"


#: Every block that is not run with its page, by the reason that stands above it.
NOT_RUN = {
    "how-to/loops.md": [
        "needs frameworks and runs of the reader's own",
        "needs DeepSpeed and a run of the reader's own",
        "needs Megatron and a run of the reader's own",
    ],
    "how-to/optimizers.md": [
        "needs a run of the reader's own that was trained by Muon",
        "a few lines for a script of the reader's own",
        "a few lines for a script of the reader's own",
    ],
    "how-to/recipes.md": [
        *["with the page; tests/docs/test_object_store.py runs it against a local S3 server"] * 2,
        "needs an account on the hub",
    ],
    "how-to/several-machines.md": [
        "needs two machines that share a disk",
        "needs a clone, 50 GB of disk and minutes",
    ],
    "tutorial.md": ["an excerpt of sparkling_cli/examples/train.py"],
    "CONTRIBUTING.md": ["it is what the tests of this page run in"],
}


@pytest.mark.parametrize("page", WRITTEN + OUTSIDE, ids=name_of)
def test_commands_stand_in_blocks_that_are_run(page: Path) -> None:
    """A console block has commands behind ``$``, no other block has any; what is not run is listed above."""
    for block in blocks(page):
        if block.language == "console":
            assert commands(block), block.body
        elif block.language not in ("bash", "diff"):
            assert not re.search(r"^(\$|sparkling|pip|make|torchrun|python -m) ", block.body, re.M), (
                block.body
            )
    reasons = [block.reason for block in blocks(page) if block.reason is not None]
    assert reasons == NOT_RUN.get(name_of(page), [])


#: Pages of the clone itself; all others are read by those who have only the package.
OF_THE_CLONE = {"architecture.md", "explanation/method.md"}


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_nothing_of_the_clone_is_needed(page: Path) -> None:
    """No command or script of a page names what lies beside the package, but where the reason says so."""
    for block in blocks(page):
        if name_of(page) not in OF_THE_CLONE and "a clone" not in (block.reason or ""):
            assert not re.search(r"\b(fixtures|benchmarks|tests|docs)[/.]", block.body), block.body


@pytest.mark.parametrize("page", PAGES + OUTSIDE, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link has its file, and its heading where it names one."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if file.name in MADE and not file.exists():
            pytest.skip(f"{file.name} is made by a long run")
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.M)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{page.name} links to {target}"


def test_files_of_the_examples_are_those_that_pages_show() -> None:
    """What a page shows of ``docs/examples`` is that to the letter; so is the tutorial's excerpt."""
    shown = {b.title: b.body for page in WRITTEN for b in blocks(page) if b.title}
    held = [path for path in (ROOT / "docs" / "examples").iterdir() if path.name in shown]
    assert {path.name for path in held} >= {"pipeline.sh", "paper-config.json"}
    for path in held:
        assert path.read_text() == shown[path.name] + "\n"
    script = (ROOT / "sparkling_cli" / "examples" / "train.py").read_text()
    (excerpt,) = (b.body for b in blocks(ROOT / "docs" / "tutorial.md") if b.language == "python")
    assert all(line in script for line in excerpt.splitlines())


def test_the_reader_of_blocks_reads_them_all(tmp_path: Path) -> None:
    """Indented blocks, titles, continuation lines and reasons."""
    page = tmp_path / "page.md"
    page.write_text(
        "1. a\n\n    ```console\n    $ one \\\n        two\n    out\n    $ three\n    ```\n\n"
        '```python title="x.py"\npass\n```\n\n<!-- not run: needs a thing -->\n```console\n$ four\n```\n'
    )
    found = list(blocks(page))
    assert [b.language for b in found] == ["console", "python", "console"]
    assert session(found[0]) == [("one two", "out"), ("three", "")]
    assert found[1].title == "x.py"
    assert found[2].reason == "needs a thing"


def test_another_output_than_shown_fails_its_page(tmp_path: Path) -> None:
    """Spaces, line ends and what ``...`` stands for are no difference; a number is."""
    for number, shown in enumerate(("1  2\n3 ... 6", "1 2 4")):
        page = tmp_path / f"page{number}.md"
        page.write_text(f"```console\n$ printf '1 2\\n3 4 5 6'\n{shown}\n```\n")
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        if number == 0:
            assert run_page(page, folder) == 1
            continue
        with pytest.raises(AssertionError, match="not printed"):
            run_page(page, folder)


def test_a_failing_command_fails_its_page(tmp_path: Path) -> None:
    """The check above can fail."""
    page = tmp_path / "page.md"
    page.write_text("```console\n$ sparkling verify nowhere neither\n```\n")
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(AssertionError, match="sparkling verify nowhere"):
        run_page(page, folder)
