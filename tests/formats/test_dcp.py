"""``torch.distributed.checkpoint`` directories: read without executing, widened box by box, loaded again."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo

from sparkling_cli.errors import CheckpointError, UnsafePickleError
from sparkling_cli.formats.dcp.metadata import read_metadata
from sparkling_cli.formats.dcp.names import find_roles
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.storage.tensors import grown_box
from tests.formats.make_dcp import (
    CONFIG,
    load_whole,
    on_ranks,
    resume_sharded,
    save_resharded,
    save_single,
    save_trained,
)
from tests.formats.make_nanogpt import GPT, GPTConfig, batch, loss_of
from tests.formats.test_singlefile import _layout_file
from tests.formats.widening import check_moments, tensors_of, widen

JOINT = {"hidden": 2, "heads": 2, "ffn": 2}
WIDE = GPTConfig(n_layer=2, n_head=6, n_embd=30, vocab_size=67)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GPT]:
    """A checkpoint of one process after real steps, and its model."""
    path = tmp_path_factory.mktemp("dcp") / "step-3"
    return path, save_single(path)


@pytest.fixture(scope="module")
def resharded(single: tuple[Path, GPT], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same contents saved by 2 and 4 ranks, sharded on every dim, unevenly."""
    root = tmp_path_factory.mktemp("ranks")
    on_ranks(2, save_resharded, str(single[0]), str(root / "two"), (2,))
    on_ranks(4, save_resharded, str(single[0]), str(root / "four"), (2, 2))
    return {"two": root / "two", "four": root / "four"}


def _widened(source: Path, folder: Path, **options: Any) -> Path:
    layout = _layout_file(folder, head_dim=5)
    return widen(source, folder / "wide", JOINT, layout=layout, **options)


def test_loaded_by_dcp(single: tuple[Path, GPT], tmp_path: Path) -> None:
    """dcp.load fills a widened model and optimizer: same logits, moments kept, the rest carried over."""
    source, model = single
    target = _widened(source, tmp_path)
    wide, optimizer, state = load_whole(target, WIDE)
    ids = batch(CONFIG, 9)
    torch.testing.assert_close(wide(ids), model(ids), rtol=1e-5, atol=1e-5)
    _, _, old = load_whole(source, CONFIG)
    for name, before in old["optimizer"]["state"].items():
        after = state["optimizer"]["state"][name]
        assert after["step"] == before["step"] == 3
        check_moments({k: before[k] for k in ("exp_avg", "exp_avg_sq")}, after, name)
    assert state["train_state"] == {"step": 3, "note": "kept"}
    assert torch.equal(state["rng"], torch.arange(7, dtype=torch.uint8))
    loss_of(wide, ids).backward()
    optimizer.step()


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_sharding_does_not_matter(
    single: tuple[Path, GPT], resharded: dict[str, Path], ranks: str, tmp_path: Path
) -> None:
    """Sources of 2 and 4 ranks give the same tensors, before and after, as that of one process."""
    path = resharded[ranks]
    boxes = [len(t.extents) for t in open_checkpoint(path).tensors.values()]
    assert max(boxes) == (4 if ranks == "four" else 2)
    plain, sharded = tensors_of(single[0]), tensors_of(path)
    assert plain.keys() == sharded.keys()
    assert all(torch.equal(plain[key], sharded[key]) for key in plain)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = tensors_of(_widened(single[0], tmp_path / "a", init="random-random"))
    many = tensors_of(_widened(path, tmp_path / "b", init="random-random"))
    assert all(torch.equal(one[key], many[key]) for key in one)
    _, _, loaded = load_whole(tmp_path / "b" / "wide", WIDE)
    for name, value in loaded["model"].items():
        assert torch.equal(value, one[f"model.{name}"]), name


@pytest.mark.slow
def test_fsdp2_saves_and_resumes_on_other_rank_counts(tmp_path: Path) -> None:
    """Trained under FSDP2 on 2 ranks, widened, resumed on 2, 4 and 1: the losses are the same."""
    on_ranks(2, save_trained, str(tmp_path / "step-3"))
    target = _widened(tmp_path / "step-3", tmp_path)
    found = {}
    for ranks, path, config in ((2, tmp_path / "step-3", CONFIG), (2, target, WIDE), (4, target, WIDE)):
        result = tmp_path / f"{ranks}-{config.n_embd}.pt"
        on_ranks(ranks, resume_sharded, str(path), config, str(result))
        found[ranks, config.n_embd] = torch.load(result)["losses"]
    narrow, wide = found[2, 15], found[2, 30]
    assert wide[0] == pytest.approx(narrow[0], abs=1e-5)
    assert wide[1] < wide[0]
    assert found[4, 30] == pytest.approx(wide, abs=1e-5)


def test_same_bytes_twice(single: tuple[Path, GPT], tmp_path: Path) -> None:
    """Data files and ``.metadata`` are the same in two runs, and the source is untouched."""
    before = {p.name: p.read_bytes() for p in single[0].iterdir()}
    outputs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        outputs.append(_widened(single[0], tmp_path / name))
    names = sorted(p.relative_to(outputs[0]) for p in outputs[0].rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(outputs[1]) for p in outputs[1].rglob("*") if p.is_file())
    for name in names:
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes(), name
    assert {p.name: p.read_bytes() for p in single[0].iterdir()} == before


def test_dropped_state_restarts_the_counters(single: tuple[Path, GPT], tmp_path: Path) -> None:
    """``drop`` rewrites the step items, which are whole archives of their own."""
    _, _, state = load_whole(_widened(single[0], tmp_path, optimizer="drop", allow_locked=True), WIDE)
    for found in state["optimizer"]["state"].values():
        assert float(found["step"]) == 0
        assert not found["exp_avg"].any()


def test_integer_ids_and_deeper_nesting(tmp_path: Path) -> None:
    """An ``app`` level and a raw optimizer state dict (numbers, no names) are understood."""
    model = save_single(tmp_path / "unused")
    optimizer = model.optimizer()
    loss_of(model, batch(CONFIG)).backward()
    optimizer.step()
    state = {"app": {"model": model.state_dict(), "optim": optimizer.state_dict(), "extra": {"epoch": 2}}}
    dcp.save(state, checkpoint_id=tmp_path / "step-1", no_dist=True)
    checkpoint = open_checkpoint(tmp_path / "step-1")
    assert {s.param for s in checkpoint.states} == {str(i) for i in range(len(checkpoint.states))}
    target = _widened(tmp_path / "step-1", tmp_path)
    wide = GPT(WIDE)
    fresh = wide.optimizer()
    loss_of(wide, batch(WIDE)).backward()
    fresh.step()
    loaded = {"app": {"model": wide.state_dict(), "optim": fresh.state_dict(), "extra": {"epoch": 0}}}
    dcp.load(loaded, checkpoint_id=target, no_dist=True)
    ids = batch(CONFIG, 9)
    wide.load_state_dict(loaded["app"]["model"])
    torch.testing.assert_close(wide(ids), model(ids), rtol=1e-5, atol=1e-5)
    assert loaded["app"]["extra"]["epoch"] == 2


class _Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (self.path,)


def test_unsafe_metadata_is_refused_unexecuted(single: tuple[Path, GPT], tmp_path: Path) -> None:
    """PyTorch would run it; we name it and do not."""
    shutil.copytree(single[0], tmp_path / "bad")
    metadata = read_metadata(tmp_path / "bad")
    metadata.planner_data["x"] = _Trap(str(tmp_path / "made"))
    (tmp_path / "bad" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsafePickleError, match="mkdir"):
        open_checkpoint(tmp_path / "bad")
    assert not (tmp_path / "made").exists()


def test_a_memo_index_takes_no_memory(single: tuple[Path, GPT], tmp_path: Path) -> None:
    """Five damaged bytes of ``.metadata`` made Python's decoder set aside gigabytes."""
    shutil.copytree(single[0], tmp_path / "bad")
    (tmp_path / "bad" / ".metadata").write_bytes(b"\x80\x04]r\x00\x00\x00\x10.")  # at 2^28: 4 GiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnsafePickleError, match="memo index"):
        open_checkpoint(tmp_path / "bad")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_what_is_missing_is_named(single: tuple[Path, GPT], tmp_path: Path) -> None:
    """No ``.metadata``, no data file, a cut data file, a cut ``.metadata``, a file of another save."""
    source = single[0]

    def broken(name: str) -> Path:
        shutil.copytree(source, tmp_path / name)
        return tmp_path / name

    path = broken("unfinished")
    (path / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="written last"):
        open_checkpoint(path)
    path = broken("no-data")
    (path / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is missing"):
        open_checkpoint(path)
    path = broken("cut")
    data = (path / "__0_0.distcp").read_bytes()
    (path / "__0_0.distcp").write_bytes(data[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(path)
    path = broken("damaged")
    (path / ".metadata").write_bytes((source / ".metadata").read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(path)
    path = broken("mixed")
    (path / "__0_0.distcp").write_bytes(b"\0" * 64 + data[:-64])
    with pytest.raises(CheckpointError):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match="folder of checkpoints") as caught:
        open_checkpoint(source.parent)
    assert f"choose one: {source.parent}" in str(caught.value.hint)


def test_items_of_a_torch_without_transforms(
    single: tuple[Path, GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before torch 2.7 items were never transformed, and their class has no field that says so."""
    expected = open_checkpoint(single[0])
    monkeypatch.delattr(_StorageInfo, "transform_descriptors")
    found = open_checkpoint(single[0])
    assert not any(
        hasattr(info, "transform_descriptors") for info in read_metadata(single[0]).storage_data.values()
    )
    assert found.tensors == expected.tensors


def test_transformed_items_are_refused(single: tuple[Path, GPT], tmp_path: Path) -> None:
    """Compressed bytes are not taken for tensor data."""
    shutil.copytree(single[0], tmp_path / "packed")
    metadata = read_metadata(tmp_path / "packed")
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["zstd"]
    (tmp_path / "packed" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"stored through zstd.*no tensor data"):
        open_checkpoint(tmp_path / "packed")


def test_metadata_without_its_field_is_damaged(tmp_path: Path) -> None:
    """A flipped bit in the field's name leaves an object that lacks it."""
    from torch.distributed.checkpoint.metadata import Metadata

    found = Metadata({})
    del found.__dict__["state_dict_metadata"]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(CheckpointError, match="expected DCP's Metadata"):
        open_checkpoint(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    """Only an optimizer: the entries are listed."""
    state = {"optimizer": {"state": {"w": {"exp_avg": torch.ones(2)}}}}
    dcp.save(state, checkpoint_id=tmp_path / "odd", no_dist=True)
    with pytest.raises(CheckpointError, match=r"no model weights.*optimizer\.state"):
        open_checkpoint(tmp_path / "odd")


def test_roles_without_planner_data() -> None:
    """Flat names alone tell weights from state: torchtitan's, OLMo-core's, and prefixed ones."""
    for model, optimizer in (("", "optimizer."), ("model.", "optim."), ("model.", "optimizer.")):
        names = [
            f"{model}layers.0.w",
            f"{optimizer}state.layers.0.w.exp_avg",
            f"{optimizer}state.layers.0.w.step",
        ]
        groups = [f"{optimizer}param_groups.layers.0.w.lr", "train_state.step"]
        paths = {name: (name,) for name in names + groups}
        roles = find_roles(paths, frozenset(names), "x")
        assert roles.weights == {"layers.0.w": names[0]}
        assert roles.states == {"layers.0.w": {"exp_avg": names[1], "step": names[2]}}
        assert roles.groups == {"layers.0.w": {"lr": groups[0]}}
        assert roles.others == ("train_state.step",)


@given(
    st.integers(1, 40),
    st.integers(0, 60),
    st.lists(st.integers(0, 40), max_size=5),
)
def test_grown_boxes_tile(old: int, more: int, cuts: list[int]) -> None:
    """Boxes that tile a dim tile the wider one, without an empty one."""
    edges = sorted({0, old, *(c for c in cuts if c < old)})
    at = 0
    for low, high in pairwise(edges):
        (start,), (size,) = grown_box((low,), (high - low,), (old,), (old + more,))
        assert start == at
        assert size >= high - low
        at += size
    assert at == old + more
