"""The house rules that a machine can check: import direction, module size, a light command line."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "sparkling_cli"
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in MODULES]

#: Rooms of docs/architecture.md from the foundation up; a room may import from those before it. Rooms
#: on one line may not import each other.
LEVELS = [
    {"errors"},
    {"layout", "spec", "storage", "layouts", "results"},
    {"widening"},
    {"formats"},
    {"plan"},
    {"execute"},
    {"models", "manifest", "schedule"},
    {"compute", "training"},
    {"diagnostics", "verification"},
    {"report"},
    {"outcome"},
    {"api"},
    {"forecast"},
    {"cli", "examples"},
    {"__main__"},
]
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}

#: Imports that cross a level or go between rooms of one level, each for a reason.
ALLOWED = {
    ("results", "schedule"): "the result of `sparkling schedule` holds curves as the schedule defines them",
    ("layout", "formats"): "packaged layouts are solved from the shapes of an opened checkpoint",
    ("plan", "manifest"): "an expansion carries the source's own manifest along (type only)",
    ("plan", "schedule"): "an expansion carries its re-warmup along (type only)",
    ("models", "manifest"): "an earlier output's manifest says its layout (type only)",
}


def imported_rooms(path: Path) -> set[str]:
    """Rooms of the package that a module imports anywhere, lazily or not."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "sparkling_cli":
                names = [f"sparkling_cli.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("sparkling_cli.")}
    return rooms & set(LEVEL)


def room_of(path: Path) -> str:
    """The folder or module directly under the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_imports_run_downwards(path: Path) -> None:
    """No module imports from a room above its own, or beside it."""
    room = room_of(path)
    if room == "__init__":
        return
    assert room in LEVEL, f"{room} has no place in docs/architecture.md"
    wrong = {
        other
        for other in imported_rooms(path)
        if other != room and LEVEL[other] >= LEVEL[room] and (room, other) not in ALLOWED
    }
    assert not wrong, f"{path.name} in {room} imports {sorted(wrong)}"


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_modules_stay_readable(path: Path) -> None:
    """A module is as long as its idea, and an idea that fills 600 lines is several."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_no_pickle_is_decoded_unlooked_at(path: Path) -> None:
    """Python's decoder believes a memo index, and takes the memory for it: one class checks that first."""
    name = path.relative_to(PACKAGE).as_posix()
    found = set(re.findall(r"pickle\.(?:Unpickler|loads?)\b", path.read_text(encoding="utf-8")))
    assert found == ({"pickle.Unpickler"} if name == "formats/torchfile/opcodes.py" else set())


def test_help_does_not_import_torch() -> None:
    """``sparkling --help`` and every command's help come without torch, transformers or rich tables."""
    code = (
        "import sys\n"
        "from sparkling_cli.cli.app import app\n"
        "from sparkling_cli.cli.console import run\n"
        "sys.argv = ['sparkling', *sys.argv[1:]]\n"
        "status = run(app)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else status)\n"
    )
    for arguments in (["--help"], ["expand", "--help"], ["inspect", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout


def test_the_project_speaks_of_itself_alone() -> None:
    """No absolute path of a development machine in the package."""
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert "/work/" not in text and "/root/" not in text, path
