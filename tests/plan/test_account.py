"""Nothing is carried over unseen: every tensor of a source is in the account, or refused by name."""

from __future__ import annotations

import shutil
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from sparkling_cli import api
from sparkling_cli.errors import CheckpointError
from sparkling_cli.plan.model import Expansion
from sparkling_cli.results.account import Account
from sparkling_cli.spec.sources import make_spec
from tests.conftest import TinyCheckpoint
from tests.formats.make_nanogpt import make_nanogpt

ADAM = ("exp_avg", "exp_avg_sq")
FFN = {"axes": [{"axis": "ffn", "factor": 2}]}


ALL = {"axes": [{"axis": axis, "factor": 2} for axis in ("ffn", "hidden", "heads")]}


def asked(source: Path) -> dict[str, Any]:
    """The MLPs of a Llama; all of nanoGPT, of which nothing grows alone."""
    return ALL if source.is_file() else FFN


def planned(source: Path, **options: Any) -> Expansion:
    """The plan of an expansion."""
    return api.make_plan(source, spec=make_spec({**asked(source), **options}))


@pytest.fixture(scope="module")
def trainer(tiny_checkpoint: TinyCheckpoint) -> Path:
    """A tiny Llama after three real steps: hidden 48, MLPs 40 (see fixtures.tiny)."""
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small nanoGPT checkpoint, trained for some real steps."""
    path = tmp_path_factory.mktemp("single") / "ckpt.pt"
    make_nanogpt(path)
    return path


def nested(trainer: Path) -> dict[str, Any]:
    """Model and optimizer of a Trainer's directory, state by parameter name."""
    weights = load_file(trainer / "model.safetensors")
    moments = {
        name: {slot: torch.rand(value.shape) for slot in ("exp_avg", "exp_avg_sq")}
        | {"step": torch.tensor(3.0)}
        for name, value in weights.items()
    }
    return {"model": weights, "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3}]}}


def storages(value: Any, found: dict[tuple[int, ...], int]) -> dict[tuple[int, ...], int]:
    """Every tensor in a tree by its place in memory, with its bytes: what shares bytes is there once."""
    if isinstance(value, torch.Tensor):
        place = (value.untyped_storage().data_ptr(), value.storage_offset(), *value.shape, *value.stride())
        found[place] = value.numel() * value.element_size()
    elif isinstance(value, dict):
        for key, item in value.items():
            storages(key, found)
            storages(item, found)
    elif isinstance(value, (list, tuple)):
        for item in value:
            storages(item, found)
    return found


def test_the_sum_is_the_sources(single: Path, trainer: Path) -> None:
    """Tensors and bytes of the account are those that torch loads from every file of the source."""
    found = storages(torch.load(single, weights_only=True), {})
    account = planned(single).plan.account
    assert (account.tensors, account.bytes_before) == (len(found), sum(found.values()))
    trees = [load_file(trainer / "model.safetensors")]
    trees += [
        torch.load(path, weights_only=False)
        for path in sorted(trainer.rglob("*.p*t*"))
        if path.suffix in (".pt", ".pth")
    ]
    found = {}
    for tree in trees:
        storages(tree, found)
    account = planned(trainer).plan.account
    arrays = [entry for entry in account.entries if "numpy" in entry.name]
    assert account.tensors - len(arrays) == len(found)
    assert account.bytes_before - sum(prod(e.shape) * 4 for e in arrays) == sum(found.values())


def test_the_manifest_has_the_account(single: Path, tmp_path: Path) -> None:
    """As the plan has it, and what is written is what it says."""
    made = api.expand(single, tmp_path / "wide.pt", **ALL, report="none")
    from sparkling_cli.manifest import read_manifest
    from sparkling_cli.storage.sidecar import MANIFEST, sidecar_root

    account: Account = read_manifest(sidecar_root(tmp_path / "wide.pt") / MANIFEST).account
    assert account == made.expansion.plan.account
    written = storages(torch.load(tmp_path / "wide.pt", weights_only=True), {})
    assert sum(line.bytes_after for line in account.lines) == sum(written.values())


def average_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As a moving average lags behind its weights."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: 0.97 * w + 0.03 * w.std(correction=0) * torch.randn(w.shape, generator=generator)
        for name, w in weights.items()
    }


@pytest.mark.parametrize(
    "name", ["custom_checkpoint_0.pkl", "consolidated/consolidated.pth", "ema/a.safetensors"]
)
def test_copies_of_the_weights_in_other_files(name: str, trainer: Path, tmp_path: Path) -> None:
    """An average, or a second copy, is widened exactly as the weights are: by the same map of entries."""
    source = tmp_path / "checkpoint-3"
    shutil.copytree(trainer, source)
    (source / name).parent.mkdir(exist_ok=True)
    weights = load_file(source / "model.safetensors")
    averages = average_of(weights)
    if name.endswith(".safetensors"):
        save_file(averages, source / name)
    else:
        torch.save({"shadow": averages, "decay": 0.9}, source / name)
    result = api.expand(source, tmp_path / "wide", **FFN, report="none")
    api.verify(source, tmp_path / "wide")
    assert any(name in note and "copies or averages" in note for note in result.expansion.plan.notes)
    # The same files with average and weights exchanged: its weights are then the average, widened.
    other = tmp_path / "other"
    shutil.copytree(trainer, other)
    save_file(averages, other / "model.safetensors", metadata={"format": "pt"})
    api.expand(other, tmp_path / "other-wide", **FFN, report="none")
    wanted = load_file(tmp_path / "other-wide" / "model.safetensors")
    found = (
        load_file(tmp_path / "wide" / name)
        if name.endswith(".safetensors")
        else torch.load(tmp_path / "wide" / name, weights_only=True)["shadow"]
    )
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key


def test_copies_of_norms_that_are_all_ones(trainer: Path, tmp_path: Path) -> None:
    """An average's norms say nothing by themselves in a young run; the matrices beside them do."""
    source = tmp_path / "checkpoint-3"
    shutil.copytree(trainer, source)
    ones = {
        n: torch.ones_like(w) if w.dim() == 1 else w
        for n, w in load_file(source / "model.safetensors").items()
    }
    save_file(ones, source / "model.safetensors", metadata={"format": "pt"})
    averages = {n: w if w.dim() == 1 else average_of({n: w})[n] for n, w in ones.items()}
    torch.save({"shadow": averages, "since": timedelta(days=1)}, source / "custom_checkpoint_0.pkl")
    api.expand(source, tmp_path / "wide", axes=[{"axis": "hidden", "factor": 2}], report="none")
    found = torch.load(tmp_path / "wide" / "custom_checkpoint_0.pkl", weights_only=False)
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert found["since"] == timedelta(days=1)
    for name, weight in wide.items():
        assert found["shadow"][name].shape == weight.shape
        if weight.dim() == 1:
            assert torch.equal(found["shadow"][name], weight)


def test_named_like_weights_but_none(trainer: Path, tmp_path: Path) -> None:
    """Gradients under the weights' names do not follow them: refused, not scaled."""
    source = tmp_path / "checkpoint-3"
    shutil.copytree(trainer, source)
    weights = load_file(source / "model.safetensors")
    torch.save({"grads": {name: torch.rand(w.shape) for name, w in weights.items()}}, source / "grads.pt")
    with pytest.raises(CheckpointError, match=r"grads\.pt: grads\..*mlp"):
        planned(source)


def test_state_keyed_by_parameters(trainer: Path, tmp_path: Path) -> None:
    """GrokAdamW's: dictionaries with parameters as keys, inside the groups; refused, or carried whole."""
    source = tmp_path / "checkpoint-3"
    shutil.copytree(trainer, source)
    optimizer = torch.load(source / "optimizer.pt", weights_only=True)
    weights = [torch.nn.Parameter(w) for w in load_file(source / "model.safetensors").values()]
    optimizer["param_groups"][0]["state"] = {w: {"exp_avg": torch.rand(w.shape), "step": 3} for w in weights}
    torch.save(optimizer, source / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: param_groups\.0\.state"):
        planned(source)
    api.expand(source, tmp_path / "wide", **FFN, carry=["optimizer.pt: param_groups.0.state*"], report="none")
    found = torch.load(tmp_path / "wide" / "optimizer.pt", weights_only=True)["param_groups"][0]["state"]
    assert all(torch.equal(key, weight) for key, weight in zip(found, weights, strict=True))


def test_an_optimizer_at_another_level(trainer: Path, tmp_path: Path) -> None:
    """Composer's sharded layout: ``state.optimizers.<class>.state.<parameter>.exp_avg`` is widened."""
    tree = nested(trainer)
    moments = tree["optimizer"]["state"]
    state = {
        "model": tree["model"],
        "optimizers": {"DecoupledAdamW": tree["optimizer"]},
        "timestamp": {"Timestamp": {"batch": 3}},
        "seed": 17,
    }
    root = tmp_path / "ep0-ba3"
    dcp.save({"state": state, "rng": [torch.zeros(16, dtype=torch.uint8)]}, checkpoint_id=root, no_dist=True)
    shutil.copy(trainer / "config.json", root)
    api.expand(root, tmp_path / "wide", **FFN, report="none")
    api.verify(root, tmp_path / "wide")
    metadata = dcp.FileSystemReader(tmp_path / "wide").read_metadata().state_dict_metadata
    for name, slots in moments.items():
        wide = metadata[f"state.model.{name}"].size
        for slot in ("exp_avg", "exp_avg_sq"):
            assert metadata[f"state.optimizers.DecoupledAdamW.state.{name}.{slot}"].size == wide
        assert (tuple(wide) != tuple(slots["exp_avg"].shape)) == (".mlp." in name)
