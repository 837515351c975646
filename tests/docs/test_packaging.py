"""What is promised about Python versions, dependencies and the wheel."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import sparkling_cli
from tests.docs.blocks import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
_CLASSIFIER = "Programming Language :: Python :: "
PYTHONS = [c.removeprefix(_CLASSIFIER) for c in PROJECT["classifiers"] if c.startswith(_CLASSIFIER)]
#: Where a package is imported under a name that is not its own.
_IMPORTED_AS = {"pyyaml": "yaml"}


def declared(*extras: str) -> list[Requirement]:
    """The requirements of pyproject.toml, with those of the extras."""
    optional = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in optional[extra])]
    found = [Requirement(line) for line in lines]
    return [r for r in found if canonicalize_name(r.name) != PROJECT["name"]]


def applies(requirement: Requirement, python: str) -> bool:
    """Whether a requirement counts for that Python on an ordinary Linux machine."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": "x86_64",
        "sys_platform": "linux",
        "extra": "",
    }
    return requirement.marker is None or requirement.marker.evaluate(environment)


def pins(python: str) -> dict[str, Version]:
    """The version of every package in constraints.txt for that Python."""
    found: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if applies(requirement, python):
            (exact,) = requirement.specifier
            assert exact.operator == "=="
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} has two versions for Python {python}"
            found[name] = Version(exact.version)
    return found


def test_the_pythons_named_are_those_allowed_and_those_tested() -> None:
    """Classifiers, requires-python and the matrix of continuous integration name the same versions."""
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert PYTHONS[0] == min(PYTHONS, key=Version)
    assert all(allowed.contains(python) for python in PYTHONS)
    minor = Version(PYTHONS[0]).minor
    assert [f"3.{minor + i}" for i in range(len(PYTHONS))] == PYTHONS
    assert not allowed.contains(f"3.{minor - 1}")
    for job in workflow("ci.yml")["jobs"].values():
        if "strategy" in job:
            assert job["strategy"]["matrix"]["python"] == PYTHONS


@pytest.mark.parametrize("python", PYTHONS)
def test_every_pin_is_in_its_range_for_every_python(python: str) -> None:
    """One version of each package, one that the package's own requirement allows."""
    pinned = pins(python)
    for requirement in declared("hf", "plot", "docs", "dev"):
        name = canonicalize_name(requirement.name)
        if not applies(requirement, python) or name not in pinned:
            continue
        assert requirement.specifier.contains(pinned[name]), f"{requirement} against {pinned[name]}"
    assert {"torch", "numpy", "transformers", "pytest", "mypy", "ruff"} <= set(pinned)


#: modules that import the trainer of their name
_CALLBACKS = {"composer", "lightning", "olmo_core"}


def test_what_the_package_imports_is_declared() -> None:
    """Every import of somebody else's package is a requirement; those of extras are imported late.

    A trainer's callback is imported by those who train with it, and by nothing else here.
    """
    names = {canonicalize_name(r.name) for r in declared()}
    needed = {_IMPORTED_AS.get(name, name) for name in names}
    optional = {
        _IMPORTED_AS.get(canonicalize_name(r.name), r.name) for r in declared("hf", "plot", "notebook")
    }
    for path in (ROOT / "sparkling_cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            for module in modules:
                top = module.partition(".")[0]
                callback = path.parent.name == "training" and path.stem == top
                known = callback or top in sys.stdlib_module_names or top in {"sparkling_cli", "tomllib"}
                assert module.removeprefix("sparkling_cli.training.") not in _CALLBACKS, path
                assert known or top in needed | optional, f"{path.name} imports {top}"


def test_the_table_of_versions_is_what_is_declared_and_tried() -> None:
    """The recipes' table: Pythons and ranges of pyproject.toml; what a test names to be installed."""
    page = (ROOT / "docs" / "how-to" / "recipes.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([\w ]+) \| (.+) \|$", page.partition("## What goes with what")[2], re.M))
    assert rows["Python"] == f"{PYTHONS[0]} to {PYTHONS[-1]}"
    least = {r.name: str(r.specifier).removeprefix(">=") for r in declared("hf")}
    for row, package in (("torch", "torch"), ("transformers", "transformers"), ("Trainer", "accelerate")):
        assert f"{least[package]} or later" in rows[row]
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for tried in rows["tested against"].split(", "):
        name, version = tried.rsplit(" ", 1)
        assert re.search(rf"pip install [\w-]*{re.escape(name)}=={re.escape(version)}\b", tests, re.I), tried


def test_there_is_one_version() -> None:
    """It stands in the package; the build reads it there, and no other file repeats it."""
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert "version" not in citation


def workflow(name: str) -> dict[str, Any]:
    """A workflow of .github, parsed."""
    text = (ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8")
    parsed: dict[str, Any] = yaml.safe_load(text)
    return parsed


def steps(jobs: dict[str, Any]) -> str:
    """All commands of a workflow."""
    return "\n".join(step["run"] for job in jobs.values() for step in job["steps"] if "run" in step)


def test_continuous_integration_runs_what_is_there() -> None:
    """Its `make` goals and scripts exist."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    goals = set(re.findall(r"^([\w-]+):", makefile, flags=re.M))
    for name in ("ci.yml", "long.yml"):
        commands = steps(workflow(name)["jobs"])
        called = [line.split()[1] for line in commands.splitlines() if line.startswith("make ")]
        assert set(called) <= goals
        for word in commands.split():
            if word.startswith((".ci/", "docs/", "tests/")):
                assert (ROOT / word).exists(), word
    everything = steps(workflow("ci.yml")["jobs"])
    for part in ("make lint", "make test", "make docs", "test_packaging.py"):
        assert part in everything


def test_the_hooks_before_a_commit_are_the_checks_of_lint() -> None:
    """Ruff's rules, its format, and the types."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [hook["entry"] for repo in hooks["repos"] for hook in repo["hooks"]]
    assert len(entries) == 3
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nlint:")[2].splitlines()[1]
    checks = [command.strip().removeprefix("$(BIN)/") for command in recipe.split("&&")]
    assert [entry.removeprefix(".venv/bin/") for entry in entries] == [
        check.replace(" --check", "") for check in checks
    ]


def dependency_folders() -> list[str]:
    """Where this environment keeps the packages that the wheel requires."""
    folders = []
    for requirement in declared("hf"):
        spec = find_spec(_IMPORTED_AS.get(canonicalize_name(requirement.name), requirement.name))
        if spec is not None and spec.origin is not None:
            folders.append(str(Path(spec.origin).parents[1]))
    return list(dict.fromkeys(folders))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_works_in_an_environment_of_its_own(tmp_path: Path) -> None:
    """Built, installed outside the clone, used: every file of the package is inside."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "sparkling_cli"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {name for name in tracked if (ROOT / name).exists()} <= inside
    assert wheel.name.split("-")[1] == sparkling_cli.__version__

    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python3*")) / "site-packages"
    # a path in a .pth file is searched, but the .pth files in it are not read: no editable install
    (site / "dependencies.pth").write_text("\n".join(dependency_folders()) + "\n")
    install = [*pip, "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True)

    def sparkling(*words: str) -> str:
        done = subprocess.run(
            [str(tmp_path / "env" / "bin" / "sparkling"), *words],
            cwd=tmp_path, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    origin = subprocess.run(
        [str(python), "-c", "import sparkling_cli; print(sparkling_cli.__file__)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert origin.startswith(str(site))
    assert "expand" in sparkling("--help")
    train = [str(python), "-m", "sparkling_cli.examples.train"]
    subprocess.run(train, cwd=tmp_path, capture_output=True, check=True, env={"PATH": "/usr/bin:/bin"})
    sparkling("expand", "example/checkpoint-100", "wide", "--axis", "ffn", "--factor", "2")
    assert (tmp_path / "wide" / "sparkling" / "report.html").stat().st_size > 10_000
    sparkling("verify", "example/checkpoint-100", "wide")


def test_an_older_transformers_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which version is needed, as pyproject.toml says it, and which is there; no name of a module in it."""
    from sparkling_cli.errors import MissingDependencyError
    from sparkling_cli.models import skeleton

    (needed,) = (r for r in declared("hf") if r.name == "transformers")
    assert str(needed.specifier) == f">={'.'.join(map(str, skeleton.NEEDED))}"
    monkeypatch.setattr(skeleton.importlib.metadata, "version", lambda _name: "4.57.1")
    with pytest.raises(MissingDependencyError) as caught, skeleton.model_errors({"model_type": "llama"}):
        raise AssertionError("the model's code is not tried")
    assert "transformers 5.0 or later is needed" in caught.value.message
    assert "4.57.1 is installed" in caught.value.message
    assert "pip install 'transformers>=5.0'" in str(caught.value.hint)
    with skeleton.model_errors({}, "package.module:factory"):
        pass  # a user's own model needs no transformers
