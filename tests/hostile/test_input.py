"""Broken and hostile input, case by case, through the whole command: exit code, one message, nothing left."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparkling_cli import api
from sparkling_cli.cli.app import app
from sparkling_cli.cli.console import run
from sparkling_cli.errors import CheckpointError, ExitCode
from sparkling_cli.storage.byte_ranges import tiles
from tests.conftest import TinyCheckpoint
from tests.hostile.corruptions import Canary

EXPAND = [sys.executable, "-m", "sparkling_cli", "expand"]
FFN = ["--axis", "ffn", "--factor", "2", "--report", "none"]


@pytest.fixture
def source(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    """A copy of a tiny Trainer checkpoint, in a folder of its own."""
    copy = tmp_path / "work" / "checkpoint-3"
    shutil.copytree(tiny_checkpoint("llama"), copy)
    return copy


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs ``sparkling expand`` and checks the exit code and what is left; the message."""

    def check(source: Path, *words: str, code: ExitCode = ExitCode.CHECKPOINT) -> str:
        before = sorted(path.name for path in source.parent.iterdir())
        monkeypatch.setattr(sys, "argv", ["sparkling", "expand", str(source), *(words or FFN)])
        assert run(app) == code
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("error:") == 1 and "Traceback" not in said.err
        assert sorted(path.name for path in source.parent.iterdir()) == before
        return " ".join(said.err.split())

    return check


def edit_config(source: Path, **changes: object) -> None:
    """Put other values into config.json."""
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("optimizer.pt", ExitCode.UNSAFE),
        ("scheduler.pt", ExitCode.UNSAFE),
        ("pytorch_model.bin", ExitCode.UNSAFE),
        ("training_args.bin", ExitCode.OK),
        ("rng_state.pth", ExitCode.OK),
    ],
)
def test_pickles_are_never_executed(
    source: Path, tmp_path: Path, refused: Callable[..., str], name: str, code: ExitCode
) -> None:
    """Code in any torch file does not run: what is needed is refused, what is only noted stays inert."""
    if name == "pytorch_model.bin":
        (source / "model.safetensors").unlink()
    torch.save({"state": {}, "param_groups": [], "x": Canary(tmp_path / "canary")}, source / name)
    if code == ExitCode.OK:
        options = {"type": "cosine", "peak": 1e-3, "warmup_steps": 1, "minimum": 0.0, "total_steps": 6}
        axes = [{"axis": "ffn", "factor": 2}]
        api.expand(source, tmp_path / "out", axes=axes, baseline=options, report="none")
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    else:
        assert name in refused(source, code=code)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 60},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**15},
        {"head_dim": 12},
        {"hidden_size": 64},
    ],
)
@pytest.mark.parametrize("state", [True, False])
def test_config_that_disagrees(
    source: Path, refused: Callable[..., str], changes: dict[str, int], state: bool
) -> None:
    """Numbers that the tensors contradict are refused before a model is built, and the config is named."""
    if not state:
        (source / "optimizer.pt").unlink()
    edit_config(source, **changes)
    assert "config" in refused(source)


@pytest.mark.parametrize("changes", [{"hidden_act": "x"}, {"head_dim": -1}, {"num_attention_heads": 0}])
def test_config_that_no_model_can_have(
    source: Path, refused: Callable[..., str], changes: dict[str, object]
) -> None:
    """Whatever the model's own code raises becomes one message."""
    edit_config(source, **changes)
    assert "cannot be built from this config" in refused(source, code=ExitCode.LAYOUT)


@pytest.mark.parametrize(
    "edit",
    [
        lambda groups: groups[0]["params"].reverse(),
        lambda groups: groups[1]["params"].pop(),
        lambda groups: groups[1]["params"].append(99),
        lambda groups: groups.pop(),
        lambda groups: groups[0].update(params=3),
    ],
)
def test_groups_that_do_not_match(
    source: Path, refused: Callable[..., str], edit: Callable[[list[dict[str, object]]], object]
) -> None:
    """Optimizer groups that are not the model's."""
    data = torch.load(source / "optimizer.pt", weights_only=True)
    edit(data["param_groups"])
    torch.save(data, source / "optimizer.pt")
    assert "optimizer" in refused(source)


def test_moments_of_another_shape(source: Path, refused: Callable[..., str]) -> None:
    """A moment that is not its parameter's size would crash or spoil a resumed run."""
    data = torch.load(source / "optimizer.pt", weights_only=True)
    data["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(data, source / "optimizer.pt")
    assert "exp_avg" in refused(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weight", "exp_avg_sq", "step"])
def test_not_a_number(
    source: Path, tmp_path: Path, refused: Callable[..., str], where: str, value: float
) -> None:
    """NaN and Inf are refused with the tensor's name, and widened when that is asked for."""
    if where == "weight":
        weights = load_file(source / "model.safetensors")
        weights["lm_head.weight"][3, 5] = value
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    else:
        data = torch.load(source / "optimizer.pt", weights_only=True)
        data["state"][2][where].reshape(-1)[0] = value
        torch.save(data, source / "optimizer.pt")
    said = refused(source)
    assert ("lm_head.weight" if where == "weight" else where) in said and "--allow-nonfinite" in said
    api.expand(
        source, tmp_path / "out", axes=[{"axis": "ffn", "factor": 2}], allow_nonfinite=True, report="none"
    )
    api.verify(source, tmp_path / "out")


def test_integers_in_a_weights_place(source: Path, refused: Callable[..., str]) -> None:
    """A dtype in which no weight can be computed."""
    weights = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name].to(torch.int32)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert "int32" in refused(source)


@pytest.mark.parametrize("shape", [[10**15], [2**31, 2**31], [2**64, 2**64, 0]])
def test_absurd_sizes_take_no_memory(source: Path, refused: Callable[..., str], shape: list[int]) -> None:
    """A header's sizes are believed only as far as the file goes."""
    path = source / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["lm_head.weight"]["shape"] = shape
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
    assert "lm_head.weight" in refused(source)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "config.json", "rng_state.pth"])
def test_unreadable_files(
    source: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A file that may not be read is named; other files of the same checkpoint are not blamed."""
    import io

    real_open, real_os_open, real_path_open = io.open, os.open, Path.open

    def denied(path: object) -> bool:
        return isinstance(path, (str, Path)) and Path(path) == source / name

    def opened(path: object, *args: object, **kwargs: object) -> object:
        if denied(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *args, **kwargs)  # type: ignore[call-overload]

    def os_opened(path: object, *args: object, **kwargs: object) -> int:
        if denied(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real_os_open(path, *args, **kwargs)  # type: ignore[arg-type]

    def path_opened(path: Path, *args: object, **kwargs: object) -> object:
        return opened(path) if denied(path) else real_path_open(path, *args, **kwargs)  # type: ignore[arg-type]

    for module in (io, sys.modules["builtins"]):
        monkeypatch.setattr(module, "open", opened)
    monkeypatch.setattr(Path, "open", path_opened)  # in Python 3.10 it keeps an io.open of its own
    monkeypatch.setattr(os, "open", os_opened)
    said = refused(source)
    assert name in said and "Permission denied" in said


def test_a_path_is_never_broken_by_a_narrow_terminal(
    source: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be copied from the message whatever the width; the words around it go on new lines."""
    monkeypatch.setenv("COLUMNS", "30")
    missing = source.parent / ("a-folder-that-is-not-there-" * 3)
    assert str(missing) in refused(missing)


def test_places_that_no_output_can_have(source: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """Inside the source, around it, over it, below a file, through ``..``, and over something else."""
    for place in (
        source / "out",
        source,
        source.parent,
        source / ".." / source.name / "out",
        source / "config.json" / "out",
        source / "config.json" / "missing" / "out",
    ):
        refused(source, str(place), *FFN, code=ExitCode.OUTPUT)
    (tmp_path / "dangling").symlink_to("nowhere")
    for place in (tmp_path / "dangling", tmp_path / "dangling" / "out"):
        refused(source, str(place), *FFN, code=ExitCode.OUTPUT)


def test_things_that_are_no_checkpoint(tmp_path: Path, refused: Callable[..., str]) -> None:
    """An empty directory, a text file, a missing path, a device."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "empty", tmp_path / "file", tmp_path / "absent"):
        assert path.name in refused(path)


def test_odd_paths_that_are_fine(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spaces, other scripts, brackets like markup, ``..``, a trailing slash, relative, a link."""
    folder = tmp_path / "ein Ordner [red]ü 模型"
    folder.mkdir()
    (folder / "link").symlink_to(source)
    monkeypatch.chdir(folder)
    for number, given in enumerate(
        (f"{source}/", "../work/checkpoint-3", "link", f"{folder}/../work/checkpoint-3")
    ):
        monkeypatch.setattr(sys, "argv", ["sparkling", "expand", given, f"out {number}[red]/", *FFN])
        assert run(app) == ExitCode.OK
        api.verify(given, folder / f"out {number}[red]")


def test_link_loops(source: Path, refused: Callable[..., str]) -> None:
    """A link to itself, and one to nothing."""
    (source / "loop").symlink_to("loop")
    assert "nowhere" in refused(source)
    (source / "loop").unlink()
    (source / "gone").symlink_to("nothing")
    assert "nowhere" in refused(source)


def test_boxes_tile_or_not() -> None:
    """Boxes tile a shape only if every entry is in exactly one of them; sums of sizes do not tell."""
    assert tiles([((0, 0), (2, 3)), ((2, 0), (2, 3))], (4, 3))
    assert tiles([((0, 0), (2, 3)), ((2, 0), (0, 3)), ((2, 0), (2, 3))], (4, 3))
    assert tiles([((), ())], ())
    assert not tiles([((0, 0), (2, 3)), ((0, 0), (2, 3))], (4, 3))
    assert not tiles([((0, 0), (3, 3)), ((2, 0), (1, 3))], (4, 3))
    assert not tiles([((0, 0), (2, 3)), ((2, 1), (2, 3))], (4, 3))
    assert not tiles([], (4, 3)) and tiles([], (0, 3))


def test_damaged_dcp_tiling_is_named(tmp_path: Path) -> None:
    """A rank's box twice and another's missing: as many entries as the tensor has, but not its entries."""
    import pickle

    from tests.formats.make_dcp import save_single

    save_single(tmp_path / "step-3")
    path = tmp_path / "step-3" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    name = next(n for n, m in metadata.state_dict_metadata.items() if len(getattr(m, "size", ())) == 2)
    metadata.state_dict_metadata[name].chunks *= 2
    path.write_bytes(pickle.dumps(metadata, protocol=4))
    with pytest.raises(CheckpointError, match="do not tile"):
        api.make_plan(tmp_path / "step-3", spec=api._spec(None, {"axes": [{"axis": "ffn", "factor": 2}]}))


def test_module_runs_without_home_or_terminal(source: Path, tmp_path: Path) -> None:
    """No HOME, a C locale, forty columns, no colour, a cache that cannot be written: all the same."""
    environment = {
        "PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
        "NO_COLOR": "1", "COLUMNS": "40", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": "/proc/nowhere",
    }  # fmt: skip
    target = tmp_path / "größer"
    done = subprocess.run(
        [sys.executable, "-m", "sparkling_cli", "expand", str(source), str(target), *FFN],
        env=environment, cwd=Path(__file__).parents[2], capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"\x1b" not in done.stdout + done.stderr
    api.verify(source, target)


_WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "accelerate"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
sys.meta_path.insert(0, Absent())
from sparkling_cli.__main__ import main
main()
"""


def test_without_transformers(source: Path, tmp_path: Path) -> None:
    """Inference says what to install; what a layout file fits needs nothing of it."""
    from sparkling_cli.layout.file import to_toml

    layout = tmp_path / "layout.toml"
    layout.write_text(to_toml(api.layout_of(source)))

    def run(*words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-c", _WITHOUT, *words],
            env={**os.environ, "SPARKLING_CACHE_DIR": str(tmp_path / "cache")},
            cwd=Path(__file__).parents[2], capture_output=True, timeout=300, check=False,
        )  # fmt: skip

    def expand(*words: str) -> subprocess.CompletedProcess[bytes]:
        return run("expand", str(source), str(tmp_path / "out"), *FFN, *words)

    assert expand().returncode == 0
    seen = run("inspect", str(tmp_path / "out"), "--against", str(source))
    assert seen.returncode == 0 and b"activations were not measured" in seen.stderr
    assert b"listed by number" not in seen.stderr
    api.verify(source, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 1}))
    layout.write_text(
        layout.read_text().replace("ordered = true\n", "")
    )  # numbers of parameters need the class
    for words in ((), ("--layout", str(layout))):
        done = expand(*words)
        assert done.returncode == ExitCode.ENVIRONMENT, done.stderr
        assert b"pip install" in done.stderr and b"Traceback" not in done.stderr
    (source / "optimizer.pt").unlink()
    done = expand("--layout", str(layout), "--init", "zero-copy")
    assert done.returncode == 0, done.stderr
    api.verify(source, tmp_path / "out")


def test_stdout_on_a_full_disk(source: Path, tmp_path: Path) -> None:
    """A report that cannot be printed is one message; the output, made before, is whole."""
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        done = subprocess.run(
            [*EXPAND, str(source), str(tmp_path / "out"), *FFN, "--json"],
            stdout=full, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2], timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode == ExitCode.OUTPUT and b"Traceback" not in done.stderr
    api.verify(source, tmp_path / "out")
