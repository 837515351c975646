"""The unmodified Trainer resumes from a widened directory as if nothing had happened but width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from fixtures import training
from sparkling_cli import api
from sparkling_cli.errors import SpecError
from sparkling_cli.manifest import read_manifest

AXES = {
    "ffn": [{"axis": "ffn", "factor": 2}],
    "hidden": [{"axis": "hidden", "factor": 2}],
    "both": [{"axis": "hidden", "factor": 2}, {"axis": "ffn", "factor": 2}],
    "heads": [{"axis": "heads", "factor": 2}],
    "kv_heads": [{"axis": "kv_heads", "factor": 2}],
}


@pytest.fixture(scope="session")
def widened(
    tmp_path_factory: pytest.TempPathFactory, dense_checkpoint: Path, moe_checkpoint: Path
) -> Callable[[str, str], tuple[Path, Path]]:
    """``(which, axes)`` -> source and widened directory, made once."""
    sources = {"dense": dense_checkpoint, "moe": moe_checkpoint}
    made: dict[tuple[str, str], Path] = {}

    def make(which: str, axes: str) -> tuple[Path, Path]:
        if (which, axes) not in made:
            target = tmp_path_factory.mktemp(f"{which}-{axes}") / "checkpoint-600"
            api.expand(sources[which], target, axes=AXES[axes], report="none")
            made[which, axes] = target
        return sources[which], made[which, axes]

    return make


def resumed(which: str, path: Path, model: Any, out: Path) -> dict[int, tuple[float, float]]:
    """Step -> (loss, learning rate) of the two steps after resuming."""
    trainer = training.build_trainer(which, out, model=model, stop_at=602)
    trainer.train(resume_from_checkpoint=str(path))
    log = trainer.state.log_history
    return {e["step"]: (e["loss"], e["learning_rate"]) for e in log if "loss" in e and e["step"] > 600}


@pytest.mark.parametrize(
    ("which", "axes"), [("dense", "ffn"), ("dense", "both"), ("moe", "ffn"), ("moe", "both")]
)
def test_the_trainer_goes_on(
    which: str, axes: str, widened: Callable[[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """Same step, same learning rate, and the source's loss at the first step."""
    source, target = widened(which, axes)
    before = resumed(which, source, AutoModelForCausalLM.from_pretrained(source), tmp_path / "a")
    after = resumed(which, target, AutoModelForCausalLM.from_pretrained(target), tmp_path / "b")
    assert list(before) == list(after) == [601, 602]
    assert after[601][0] == pytest.approx(before[601][0], abs=1e-3)
    assert [rate for _, rate in after.values()] == [rate for _, rate in before.values()]


@pytest.mark.parametrize("which", ["dense", "moe"])
def test_no_tensor_stays_at_its_random_initialization(
    which: str, widened: Callable[[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """A model built from the config alone, then resumed, is the widened one to the last bit."""
    _, target = widened(which, "ffn")
    config = AutoConfig.from_pretrained(target)
    torch.manual_seed(5)
    built = resumed(which, target, AutoModelForCausalLM.from_config(config), tmp_path / "a")
    loaded = resumed(which, target, AutoModelForCausalLM.from_pretrained(target), tmp_path / "b")
    assert built == loaded


@pytest.mark.parametrize("which", ["dense", "moe"])
@pytest.mark.parametrize("axes", list(AXES))
def test_optimizer_state_follows_its_weights(
    which: str, axes: str, widened: Callable[[str, str], tuple[Path, Path]]
) -> None:
    """Old entries bit-equal and in their order, new ones exactly zero, at the weights' own places.

    The places are found from the weights alone: every old weight is scaled by one factor, so where the
    source's value stands (times that factor) in order is where its moment must stand.
    """
    source, target = widened(which, axes)
    old_model = AutoModelForCausalLM.from_pretrained(source)
    new_model = AutoModelForCausalLM.from_pretrained(target)
    old_state = torch.load(source / "optimizer.pt", weights_only=True)
    new_state = torch.load(target / "optimizer.pt", weights_only=True)
    assert old_state["param_groups"] == new_state["param_groups"]
    names = parameter_order(old_model)
    assert parameter_order(new_model) == names
    assert len(names) == len(old_state["state"]) == len(new_state["state"])
    new_parameters = dict(new_model.named_parameters())
    old_parameters = dict(old_model.named_parameters())
    for i, name in enumerate(names):
        for slot in ("exp_avg", "exp_avg_sq"):
            old, new = old_state["state"][i][slot], new_state["state"][i][slot]
            assert new.shape == new_parameters[name].shape, name
            kept = new[new != 0]
            assert torch.equal(kept, old[old != 0]), name
        assert torch.equal(old_state["state"][i]["step"], new_state["state"][i]["step"])
        moment = new_state["state"][i]["exp_avg"]
        weights = new_parameters[name].detach()[moment != 0]
        reference = old_parameters[name].detach()[old_state["state"][i]["exp_avg"] != 0]
        ratio = (weights.double() / reference.double())[reference.abs() > 1e-6]
        assert ratio.min().item() == pytest.approx(ratio.max().item(), rel=1e-5), name


def parameter_order(model: Any) -> list[str]:
    """Optimizer order of the Trainer: decayed parameters first."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    names = [name for name, _ in model.named_parameters()]
    return [n for n in names if n in decayed] + [n for n in names if n not in decayed]


def test_the_source_is_untouched_and_the_output_repeats(dense_checkpoint: Path, tmp_path: Path) -> None:
    """Two runs give the same bytes in every file, and no file of the source changes."""
    before = contents(dense_checkpoint)
    for name in ("one/wide", "two/wide"):
        (tmp_path / name).parent.mkdir()
        api.expand(
            dense_checkpoint, tmp_path / name, axes=AXES["both"], init="random-copy", seed=3, report="full"
        )
    assert contents(dense_checkpoint) == before
    first, second = contents(tmp_path / "one/wide"), contents(tmp_path / "two/wide")
    assert list(first) == list(second)
    assert [name for name in first if first[name] != second[name]] == []


def test_a_directory_without_optimizer_state(dense_checkpoint: Path, tmp_path: Path) -> None:
    """Weights alone are widened, and the report says that there was no state."""
    source = tmp_path / "bare"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).write_bytes((dense_checkpoint / name).read_bytes())
    with pytest.raises(SpecError, match="stay equal for ever"):
        api.expand(source, tmp_path / "wide", axes=AXES["ffn"], report="none")
    result = api.expand(source, tmp_path / "wide", axes=AXES["ffn"], init="random-copy", report="none")
    assert any("no optimizer state" in note for note in result.expansion.plan.notes)
    assert load_file(tmp_path / "wide/model.safetensors")["model.layers.0.mlp.up_proj.weight"].shape[0] == 336


def test_the_manifest_describes_every_tensor(
    widened: Callable[[str, str], tuple[Path, Path]],
) -> None:
    """Names, shapes and scales of the manifest are those of the files."""
    _, target = widened("moe", "both")
    manifest = read_manifest(target)
    weights = load_file(target / "model.safetensors")
    listed = {e.name: e for e in manifest.tensors.values() if not e.slot}
    assert {name: tuple(t.shape) for name, t in weights.items()} == {n: e.shape for n, e in listed.items()}
    assert manifest.births() == {"hidden": [(0, 64, 0), (64, 128, 1)], "ffn": [(0, 32, 0), (32, 64, 1)]}
    assert manifest.stages[0].step == 600


def contents(root: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
