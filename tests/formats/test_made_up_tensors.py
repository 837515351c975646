"""A made-up tensor, in every format, at every depth, in every disguise: refused, or in the account."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from sparkling_cli import api
from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.plan.model import Expansion
from sparkling_cli.results.account import Fate, Kind
from sparkling_cli.spec.sources import make_spec
from sparkling_cli.storage.read import read_tensor
from tests.conftest import TinyCheckpoint
from tests.formats.make_dcp import on_ranks
from tests.formats.make_nanogpt import make_nanogpt
from tests.formats.widening import widen

Shape = tuple[int, ...]
#: of nanoGPT nothing grows alone
JOINT = ("ffn", "hidden", "heads")

# -- sources: what each trainer writes itself


def trainer(root: Path, tiny: TinyCheckpoint) -> Path:
    """A Llama of the Trainer's."""
    return shutil.copytree(tiny("llama"), root / "checkpoint-3")


def nanogpt(root: Path, _: TinyCheckpoint) -> Path:
    """A single file."""
    make_nanogpt(root / "ckpt.pt")
    return root / "ckpt.pt"


def lightning(root: Path, _: TinyCheckpoint) -> Path:
    """A single file of Lightning's Trainer."""
    pytest.importorskip("lightning", reason="pip install lightning==2.6.6")
    from tests.formats.make_lightning import Module, run

    run(Module(), 2, root, save=root / "last.ckpt")
    return root / "last.ckpt"


def distributed(root: Path, tiny: TinyCheckpoint) -> Path:
    """The same Llama as a DCP directory, its optimizer by names."""
    weights = load_file(tiny("llama") / "model.safetensors")
    moments = {
        name: {slot: torch.rand(value.shape) for slot in ("exp_avg", "exp_avg_sq")}
        | {"step": torch.tensor(3.0)}
        for name, value in weights.items()
    }
    state = {"model": weights, "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3}]}}
    dcp.save(state, checkpoint_id=root / "step-3", no_dist=True)
    shutil.copy(tiny("llama") / "config.json", root / "step-3")
    return root / "step-3"


def fsdp(root: Path, _: TinyCheckpoint) -> Path:
    """Sharded by FSDP2 over two processes."""
    from tests.formats.make_fsdp import save

    on_ranks(2, save, str(root / "checkpoint-3"))
    return root / "checkpoint-3"


def litgpt(root: Path, _: TinyCheckpoint) -> Path:
    """LitGPT's directory."""
    pytest.importorskip("litgpt", reason="pip install litgpt==0.5.13")
    from tests.formats.make_litgpt import LLAMA, make_litgpt

    make_litgpt(root / "step-3", LLAMA)
    return root / "step-3"


def olmo_core(root: Path, _: TinyCheckpoint) -> Path:
    """OLMo-core's directory."""
    pytest.importorskip("olmo_core", reason="pip install ai2-olmo-core==3.0.0")
    from tests.formats.make_olmo_core import NARROW, make_olmo_core

    make_olmo_core(root / "step3", NARROW, root / "work")
    return root / "step3"


def torchtitan(root: Path, _: TinyCheckpoint) -> Path:
    """A step of torchtitan's checkpoint manager."""
    pytest.importorskip("torchtitan", reason="pip install torchtitan==0.3.0 triton")
    from tests.formats.make_torchtitan import make_torchtitan

    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("gloo", init_method=f"file://{root / 'store'}", rank=0, world_size=1)
    try:
        make_torchtitan(root / "run")
    finally:
        dist.destroy_process_group()
        del os.environ["LOCAL_RANK"]
    return root / "run" / "step-3"


def megatron(root: Path, _: TinyCheckpoint) -> Path:
    """Megatron's torch_dist, with the optimizer by parameters."""
    pytest.importorskip("megatron.core", reason="pip install megatron-core==0.16.1")
    from tests.formats.test_megatron import _resume

    on_ranks(1, _resume, str(root / "iter"), str(root / "none"), False, str(root / "losses.pt"))
    return root / "iter"


def deepspeed(root: Path, _: TinyCheckpoint, *, partitioned: bool = False) -> Path:
    """A Universal Checkpoint; its layout lies beside it."""
    from tests.formats.test_deepspeed import _layout_file, _universal

    _universal(root / "step3_universal", partitioned=partitioned)
    _layout_file(root, head_dim=8)
    return root / "step3_universal"


SOURCES: dict[str, Callable[..., Path]] = {
    "trainer": trainer, "nanogpt": nanogpt, "lightning": lightning, "dcp": distributed, "fsdp": fsdp,
    "litgpt": litgpt, "olmo-core": olmo_core, "torchtitan": torchtitan, "megatron": megatron,
    "deepspeed": deepspeed, "deepspeed-3": partial(deepspeed, partitioned=True),
}  # fmt: skip

DIRECTORIES = [form for form in SOURCES if form not in ("nanogpt", "lightning")]

# -- places

Tree = dict[str, Any]
Put = Callable[[Path, torch.Tensor], None]
DEPTHS: dict[str, Callable[[Tree, torch.Tensor], None]] = {
    "top": lambda tree, t: tree.update(extra=t),
    "dictionary": lambda tree, t: tree.update(extra={"a": {"b": {"c": {"d": {"e": t}}}}}),
    "lists": lambda tree, t: tree.update(extra=[1, [t], "x"]),
    "tuple": lambda tree, t: tree.update(extra=(0, {"k": (t,)})),
    "key": lambda tree, t: tree.update(extra={t: 1}),
    "key's value": lambda tree, t: tree.update(extra={torch.ones(2): {"exp_avg": t}}),
    "parameter": lambda tree, t: tree.update(extra=torch.nn.Parameter(t, requires_grad=False)),
}


def in_file(name: str, put: Callable[[Tree, torch.Tensor], object], root: Path, tensor: torch.Tensor) -> None:
    """In one of the checkpoint's own torch files."""
    path = next(root.glob(name)) if name else root
    tree = torch.load(path, weights_only=False)
    put(tree, tensor)
    torch.save(tree, path)


def in_group(*path: Any) -> Callable[[Tree, torch.Tensor], None]:
    """In a group of the optimizer that lies there."""

    def put(tree: Any, tensor: torch.Tensor) -> None:
        for step in path:
            tree = tree[step]
        tree["param_groups"][0]["momentum_buffer"] = tensor

    return put


def in_state(tree: Any, tensor: torch.Tensor) -> bool:
    """Among the optimizer's state of a matrix of another shape, in nested or in flat dictionaries."""
    own = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    if any(in_state(value, tensor) for value in reversed(list(own))):
        return True
    for name in reversed([*tree] if isinstance(tree, dict) else []):
        value, steps = tree[name], str(name).split(".")
        if "exp_avg" in steps and value.dim() > 1 and value.shape != tensor.shape:
            tree[".".join("extra" if step == "exp_avg" else step for step in steps)] = tensor
            return True
    return False


def in_weights(root: Path, tensor: torch.Tensor) -> None:
    """Among the weights, in no module."""
    path = root / "model.safetensors"
    save_file({**load_file(path), "extra": tensor.contiguous()}, path, {"format": "pt"})


def in_folder(name: str, wrap: Callable[[torch.Tensor], Any], root: Path, tensor: torch.Tensor) -> None:
    """In the folder of a parameter's state, of one of another shape."""
    saved = {path: torch.load(path, weights_only=True) for path in sorted(root.glob("zero/*h.1*/fp32.pt"))}
    matrices = {path: found["param"] if isinstance(found, dict) else found for path, found in saved.items()}
    path = next(p for p, found in matrices.items() if 500 < found.numel() != tensor.numel())
    torch.save(wrap(tensor), path.parent / name)


def in_own_file(root: Path, tensor: torch.Tensor) -> None:
    """Beside the state itself, in its file."""
    path = sorted(root.glob("zero/*mlp*weight/exp_avg.pt"))[-1]
    found = torch.load(path, weights_only=True)
    torch.save({**(found if isinstance(found, dict) else {"param": found}), "extra": [tensor]}, path)


FOLDERS: dict[str, Put] = {
    "a file of its own": partial(in_folder, "extra.pt", lambda t: t.clone()),
    "a file like the state's": partial(in_folder, "extra.pt", lambda t: {"cat_dim": 0, "param": t.clone()}),
    "deep in a file of its own": partial(in_folder, "extra.pt", lambda t: {"a": [{"b": t, "c": t.sum()}]}),
    "the folder above": partial(in_folder, "../extra.pt", lambda t: [t]),
    "the state's file": in_own_file,
}


def in_entries(
    folder: str, put: Callable[[Tree, torch.Tensor], object], root: Path, tensor: torch.Tensor
) -> None:
    """As an entry of a DCP directory, saved anew with all that it had."""
    tree: Tree = {}
    reader: Any = dcp.FileSystemReader(root / folder)
    if folder == "model_and_optim":
        from olmo_core.distributed.checkpoint.filesystem import RemoteFileSystemReader

        reader = RemoteFileSystemReader(root / folder)
    _load_state_dict(tree, reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    put(tree, tensor)
    for path in [*(root / folder).glob("*.distcp"), root / folder / ".metadata"]:
        path.unlink()
    dcp.save(tree, checkpoint_id=root / folder, no_dist=True)


def beside(
    name: str, write: Callable[[Path, torch.Tensor], object], root: Path, tensor: torch.Tensor
) -> None:
    """In a file of its own, which no format knows."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    write(root / name, tensor)


BESIDE: dict[str, Callable[[Path, torch.Tensor], object]] = {
    "custom_checkpoint_0.pkl": lambda path, t: torch.save({"some": {"thing": t}}, path),
    "consolidated/consolidated.pth": lambda path, t: torch.save({"model": [t]}, path),
    "a/b/c/state.bin": lambda path, t: torch.save((t,), path),
    "ema/thing.safetensors": lambda path, t: save_file({"thing": t.contiguous()}, path),
    "export/model-00001-of-00001.safetensors": lambda path, t: save_file({"x": t.contiguous()}, path),
    "old.pth": lambda path, t: torch.save({"m": t}, path, _use_new_zipfile_serialization=False),
    "states/.metadata": lambda path, t: dcp.save({"thing": t}, checkpoint_id=path.parent, no_dist=True),
    "thing.npy": lambda path, t: np.save(path, t.numpy()),
    "things.npz": lambda path, t: np.savez(path, a=t.numpy()),
    "arrays.pkl": lambda path, t: path.write_bytes(pickle.dumps({"k": [t.numpy()]})),
}


def places(form: str) -> Iterator[tuple[str, Put]]:
    """Every place in a format, and how a tensor is put there."""
    files = {
        "trainer": ("optimizer.pt", in_group()), "nanogpt": ("", in_group("optimizer")),
        "lightning": ("", in_group("optimizer_states", 0)),
        "litgpt": ("lit_model.pth", in_group("optimizer")),
        "deepspeed": ("*_model_states.pt", None), "deepspeed-3": ("*_model_states.pt", None),
    }  # fmt: skip
    folders = {
        "dcp": ("",), "torchtitan": ("",), "megatron": ("",), "olmo-core": ("model_and_optim",),
        "fsdp": ("pytorch_model_fsdp_0", "optimizer_0"),
    }  # fmt: skip
    if form in files:
        name, group = files[form]
        for depth, put in DEPTHS.items():
            yield f"{name or 'file'}, {depth}", partial(in_file, name, put)
        if group is not None:
            yield f"{name or 'file'}, optimizer's group", partial(in_file, name, group)
            yield f"{name or 'file'}, a parameter's state", partial(in_file, name, in_state)
        for depth, inside in FOLDERS.items() if form.startswith("deepspeed") else ():
            yield f"a parameter's folder, {depth}", inside
    if form == "trainer":
        yield "model.safetensors", in_weights
    for folder in folders.get(form, ()):
        for depth, put in DEPTHS.items():
            if depth.startswith("key"):  # DCP flattens dictionaries by their names
                continue
            yield f"{folder}/.metadata, {depth}", partial(in_entries, folder, put)
        if not folder.startswith("pytorch"):
            yield f"{folder}/.metadata, a parameter's state", partial(in_entries, folder, in_state)
    if form in DIRECTORIES:
        for name, write in BESIDE.items():
            yield name, partial(beside, name, write)


DISGUISES: dict[str, Callable[[Shape], Shape]] = {
    "as is": lambda s: s,
    "stacked": lambda s: (3, *s),
    "transposed": lambda s: s[::-1],
    "flattened": lambda s: (prod(s),),
    "two flattened": lambda s: (2, prod(s)),
    "concatenated": lambda s: (2 * s[0], *s[1:]),
    "concatenated along the last": lambda s: (*s[:-1], 3 * s[-1]),
}
#: nothing of any of the models; 7, 11, ... are above 1 and divide none of their sizes
HARMLESS: tuple[Shape, ...] = ((7,), (13, 17), (11, 5, 7), (119, 1, 13))


@pytest.fixture(scope="module")
def source_of(
    tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The source in a format, made once."""
    made: dict[str, Path] = {}

    def get(form: str) -> Path:
        if form not in made:
            made[form] = SOURCES[form](tmp_path_factory.mktemp(form), tiny_checkpoint)
        return made[form]

    return get


def planned(source: Path, original: Path, **options: Any) -> Expansion:
    """The plan of an expansion of a copy."""
    layout = next(original.parent.glob("*.toml"), None)
    axes = JOINT if source.is_file() or layout is not None else ("ffn", "hidden")
    asked = {"axes": [{"axis": axis, "factor": 2} for axis in axes], **options}
    return api.make_plan(source, spec=make_spec(asked), layout=layout)


def slow_but(form: str) -> tuple[pytest.MarkDecorator, ...]:
    """The three that torch alone can make are quick."""
    return () if form in ("trainer", "nanogpt", "dcp") else (pytest.mark.slow,)


CASES = [(form, place, put) for form in SOURCES for place, put in places(form)]


@pytest.mark.parametrize(
    ("form", "place", "put"),
    [pytest.param(*case, id=f"{case[0]}: {case[1]}", marks=slow_but(case[0])) for case in CASES],
)
def test_a_made_up_tensor(
    form: str, place: str, put: Put, source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two disguises of growing shapes and one harmless shape; a format's places have them all, in turns."""
    at = [p for f, p, _ in CASES if f == form].index(place)
    chosen = [list(DISGUISES)[(2 * at + turn) % len(DISGUISES)] for turn in range(2)]
    check(form, put, source_of(form), tmp_path, chosen, [HARMLESS[at % len(HARMLESS)]], f"{form} {place}")


def check(
    form: str, put: Put, original: Path, work: Path, chosen: list[str], harmless: list[Shape], seed: str
) -> None:
    """Disguises are refused, with a way out that works; what is harmless is carried; the account has all."""
    rows = planned(original, original).plan.rows
    shapes = sorted({r.source.shape for r in rows if r.shape != r.source.shape and len(r.source.shape) == 2})
    rng = random.Random(seed)
    wanted = [(name, DISGUISES[name](rng.choice(shapes))) for name in chosen]
    for number, (name, shape) in enumerate([*wanted, *(("", shape) for shape in harmless)]):
        source = work / str(number) / original.name
        source.parent.mkdir()
        (shutil.copytree if original.is_dir() else shutil.copy)(original, source)
        put(source, torch.rand(shape))
        if name:
            with pytest.raises(CheckpointError, match="that of something that grows") as caught:
                planned(source, original)
            pattern = str(caught.value.hint).partition("--carry '")[2].rstrip("'")
            made = planned(source, original, carry=[pattern])
        else:
            made = planned(source, original)
        entry = [e for e in made.plan.account.entries if e.shape == shape]
        assert [(e.fate, e.kind) for e in entry] == [(Fate.CARRIED, Kind.OTHER)], (form, name, shape)


EVERYWHERE = {
    "trainer": (in_weights, partial(in_file, "optimizer.pt", in_state)),
    "nanogpt": (partial(in_file, "", DEPTHS["top"]), partial(in_file, "", in_state)),
    "dcp": (partial(in_entries, "", DEPTHS["top"]), partial(in_entries, "", in_state)),
    "torchtitan": (partial(in_entries, "", DEPTHS["top"]), partial(in_entries, "", in_state)),
    "megatron": (partial(in_entries, "", DEPTHS["top"]), partial(in_entries, "", in_state)),
    "deepspeed": (FOLDERS["a file of its own"], FOLDERS["the state's file"]),
    "deepspeed-3": (FOLDERS["a file like the state's"], FOLDERS["the state's file"]),
}


@pytest.mark.parametrize("form", [pytest.param(form, marks=slow_but(form)) for form in EVERYWHERE])
def test_what_is_carried_is_in_the_output(
    form: str, source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Beside weights and among state, of any shape, bit for bit; and ``verify`` finds the output whole."""
    original = source_of(form)
    source = tmp_path / "narrow" / original.name
    source.parent.mkdir()
    (shutil.copytree if original.is_dir() else shutil.copy)(original, source)
    for put, shape in zip(EVERYWHERE[form], ((7, 11, 13), (11,)), strict=True):
        put(source, torch.arange(prod(shape), dtype=torch.float32).reshape(shape))
    layout = next(original.parent.glob("*.toml"), None)
    axes = dict.fromkeys(JOINT if source.is_file() or layout is not None else ("ffn", "hidden"), 2)
    wide = widen(source, tmp_path / "wide" / source.name, axes, layout=layout)
    for path in (source, wide):
        checkpoint = open_checkpoint(path)
        found = {stored.shape: stored for stored in checkpoint.by_key.values()}
        for shape in ((7, 11, 13), (11,)):
            values = read_tensor(checkpoint.root, found[shape])
            assert torch.equal(values.flatten(), torch.arange(prod(shape), dtype=torch.float32)), (
                path,
                shape,
            )


@pytest.mark.parametrize("form", [pytest.param(form, marks=slow_but(form)) for form in DIRECTORIES])
def test_files_of_other_formats_are_named(
    form: str, source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Exported weights are left out; what cannot be looked into is carried; both are said."""
    source = tmp_path / source_of(form).name
    shutil.copytree(source_of(form), source)
    exported = ["model.onnx", "tf_model.h5", "flax_model.msgpack", "gguf/model.gguf", "onnx/model.onnx_data"]
    odd = ["states.dat", "loader/worker_0.npz2"]
    for name in [*exported, *odd]:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(bytes(range(256)) * 4)
    (source / "notes.txt").write_text("text is no tensor")
    made = planned(source, source_of(form))
    for name in exported:
        assert any(note.startswith(f"{name} is not carried over") for note in made.plan.notes)
        assert name not in made.plan.source.carried
    (note,) = [note for note in made.plan.notes if "without a look" in note]
    assert all(name in note for name in odd) and "notes.txt" not in note
    assert {*odd, "notes.txt"} <= {*made.plan.source.carried}
