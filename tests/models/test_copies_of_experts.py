"""Copies of experts in chosen numbers, held to the class's own layers, its optimizer and the real Trainer."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from inference_support import shake
from safetensors.torch import load_file, save_file
from test_experts import CONFIGS
from training_support import Trained, reloaded, state_of, trained
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fixtures import training
from sparkling_cli import api
from sparkling_cli.cli.app import app
from sparkling_cli.diagnostics.symmetry import measure_symmetry
from sparkling_cli.errors import SpecError, VerificationError
from sparkling_cli.manifest import read_manifest
from sparkling_cli.models.skeleton import build_model
from sparkling_cli.training import read_history, rewarm
from sparkling_cli.verification.rules import Derivation
from sparkling_cli.widening.geometry import shared_out

NINE = [{"axis": "experts", "to": 9}]
#: how many of each of six experts; in the second layer others than in the first
COPIES: dict[str, list[int]] = {"all": [1, 2, 1, 3, 1, 1], "1": [3, 1, 1, 1, 1, 2]}
#: what then stands behind the old ones, in turn, by layer
BEHIND = {0: [1, 3, 3], 1: [0, 5, 0]}


def run(*words: str) -> None:
    """A command, in this process."""
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output


def through_first_layer(folder: Path, ids: torch.Tensor, **config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first layer's experts make of tokens, and the best expert of each, by the class's own code."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager", **config
    )
    kept: dict[str, torch.Tensor] = {}
    model.model.layers[0].mlp.register_forward_hook(
        lambda _m, _i, out: kept.update(out=out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        routed = model(ids, use_cache=False, output_router_logits=True).router_logits[0]
    return kept["out"].reshape(-1, kept["out"].shape[-1]), routed.argmax(-1)


def test_a_token_goes_to_the_copies_of_its_best_expert(tmp_path: Path) -> None:
    """At two experts for each token: where the best has copies it works alone, else nothing changes.

    Mixtral's weights are shares of the chosen experts alone, so its own layer says what both are: as it is,
    and with one expert for each token.
    """
    shake(build_model(CONFIGS["mixtral"], meta=False)).save_pretrained(tmp_path / "small")
    api.expand(
        tmp_path / "small", tmp_path / "wide", axes=NINE, copies=COPIES, report="none", allow_locked=True
    )
    ids = torch.randint(0, 61, (4, 64), generator=torch.Generator().manual_seed(5))
    two, best = through_first_layer(tmp_path / "small", ids)
    one, _ = through_first_layer(tmp_path / "small", ids, num_experts_per_tok=1)
    got, _ = through_first_layer(tmp_path / "wide", ids)
    copied = torch.tensor(COPIES["all"])[best] > 1
    assert 0.1 < float(copied.double().mean()) < 0.9
    wanted = torch.where(copied[:, None], one, two)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
    assert float((one - two).abs().max()) > 0.1 * float(two.abs().max())


def check_entries(small: Trained, folder: Path, behind: dict[int, list[int]]) -> int:
    """Every parameter and its state: old experts as they were, chosen copies behind them with state zero."""
    wide = {name: p.detach() for name, p in reloaded(small, folder).named_parameters()}
    old_state, new_state = state_of(small.folder), state_of(folder)
    grown = 0
    for name, value in small.values.items():
        old = value.to(wide[name].dtype)
        if wide[name].shape != old.shape:
            grown += 1
            layer = int(name.split("layers.")[1].split(".")[0])
            old = torch.cat([old, old[behind[layer]]])
        assert torch.allclose(wide[name], old, rtol=1e-6, atol=0), name
        for slot, before in old_state.get(small.numbers.get(name, -1), {}).items():
            kept = new_state[small.numbers[name]][slot]
            more = len(kept) - len(before) if before.dim() else 0
            wanted = torch.cat([before, torch.zeros(more, *before.shape[1:])]) if more else before
            assert torch.equal(kept, wanted), f"{name}: {slot}"
    return grown


@pytest.mark.parametrize("case", CONFIGS)
def test_chosen_copies_entry_by_entry(case: str, tmp_path: Path) -> None:
    """Stacked experts, routers, biases and state after a real step of AdamW, in each layer its own copies."""
    small = trained(CONFIGS[case], tmp_path / "small")
    one = case == "a correction bias"  # whose first layer is dense
    copies = {"1": COPIES["1"]} if one else COPIES
    found = api.expand(small.folder, tmp_path / "wide", axes=NINE, copies=copies, threads=1)
    api.verify(small.folder, tmp_path / "wide")
    assert check_entries(small, tmp_path / "wide", BEHIND) >= 3 * (1 if one else 2)
    assert found.report is not None and found.report.activations is not None
    assert found.report.activations.routing[0].kept > 0.999  # none but experts that the token had, or copies
    assert any("1 to 3 of each expert" in note for note in found.expansion.plan.notes)
    symmetry = measure_symmetry(tmp_path / "wide", tmp_path / "wide")
    assert {row.locked for row in symmetry.layers if row.axis == "experts"} == {1.0}


def test_experts_with_names_of_their_own(tmp_path: Path) -> None:
    """On disk each new expert has the next number, and the tensors of its source."""
    shake(build_model(CONFIGS["qwen3_moe"], meta=False)).save_pretrained(tmp_path / "small")
    options: dict[str, Any] = {"report": "none", "allow_locked": True}
    api.expand(tmp_path / "small", tmp_path / "wide", axes=NINE, copies=COPIES, **options)
    api.verify(tmp_path / "small", tmp_path / "wide")
    old, new = (load_file(tmp_path / f / "model.safetensors") for f in ("small", "wide"))
    extra = sorted(new.keys() - old.keys())
    assert len(extra) == 2 * 3 * 3
    for name in extra:
        layer, number = (int(part) for part in name.split(".") if part.isdigit())
        source = name.replace(f".experts.{number}.", f".experts.{BEHIND[layer][number - 6]}.")
        assert torch.equal(new[name], old[source]), name
    new["model.layers.0.mlp.experts.6.up_proj.weight"], new["model.layers.0.mlp.experts.7.up_proj.weight"] = (
        new["model.layers.0.mlp.experts.7.up_proj.weight"],
        new["model.layers.0.mlp.experts.6.up_proj.weight"],
    )
    save_file(new, tmp_path / "wide/model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=r"experts\.6\.up_proj"):
        api.verify(tmp_path / "small", tmp_path / "wide")


@pytest.mark.parametrize(("total", "copies"), [(9, COPIES), (18, {})])
def test_experts_per_token_may_grow_by_less(total: int, copies: Any, tmp_path: Path) -> None:
    """Three for two: a token's experts are those that it had, or copies of them; noise goes with it."""
    small = trained(CONFIGS["mixtral"], tmp_path / "small")
    axes = [{"axis": "experts", "to": total}, {"axis": "experts_per_token", "to": 3}]
    options: dict[str, Any] = {"axes": axes, "copies": copies, "router_noise": 1e-6, "threads": 1}
    found = api.expand(small.folder, tmp_path / "wide", **options)
    api.verify(small.folder, tmp_path / "wide")
    assert json.loads((tmp_path / "wide/config.json").read_text())["num_experts_per_tok"] == 3
    assert found.report is not None and found.report.activations is not None
    kept = found.report.activations.routing[0].kept
    assert kept > 0.999 if not copies else kept < 0.999  # two without copies, and a third that is another
    assert not any("the function is kept" in note for note in found.expansion.plan.notes)


@pytest.mark.parametrize("axis", ["experts", "layers"])
def test_grown_again(axis: str, tmp_path: Path) -> None:
    """The next expansion counts chosen copies as experts; together with depth, by the source's layer."""
    small = trained(CONFIGS["qwen3_moe"], tmp_path / "small")
    first = [*NINE, {"axis": "layers", "to": 3}] if axis == "layers" else NINE
    options: dict[str, Any] = {"report": "none", "threads": 1}
    api.expand(small.folder, tmp_path / "one", axes=first, copies=COPIES, **options)
    api.verify(small.folder, tmp_path / "one")
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    if axis == "layers":  # 0, a new one read from 0, 1
        routers = [one[f"model.layers.{layer}.mlp.gate.weight"] for layer in range(3)]
        for router, source in zip(routers, (0, 0, 1), strict=True):
            assert torch.equal(router[6:], router[BEHIND[source]])
    api.expand(tmp_path / "one", tmp_path / "two", axes={"experts": 2}, **options)
    api.verify(tmp_path / "one", tmp_path / "two")
    two = AutoModelForCausalLM.from_pretrained(tmp_path / "two").state_dict()
    for name, value in one.items():
        wanted = torch.cat([value, value]) if two[name].shape != value.shape else value
        assert torch.equal(two[name], wanted), name
    births = json.loads((tmp_path / "two/sparkling/manifest.json").read_text())["axes"]["experts"]["births"]
    assert births == [[0, 6, 0], [6, 9, 1], [9, 18, 2]]


def test_the_training_side_knows_what_is_a_copy_of_what(tmp_path: Path) -> None:
    """Every new expert is compared with the one that it is a copy of, in each layer another."""
    small = trained(CONFIGS["mixtral"], tmp_path / "small")
    schedule = {
        "schedule": "constant",
        "peak_lr": 1e-3,
        "warmup_steps": 0,
        "expansion_step": 1,
        "total_steps": 9,
    }
    api.expand(
        small.folder, tmp_path / "wide", axes=NINE, copies=COPIES, report="none", threads=1, **schedule
    )
    history = read_history(tmp_path / "wide")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rewarming = rewarm(optimizer, model, history)
    assert rewarming.metrics()["share_locked"] == 1.0
    with torch.no_grad():  # one expert of the first layer leaves its source: of all new entries so many
        stack = model.model.layers[0].mlp.experts.down_proj
        stack[7] += 1.0
    new = sum(3 * p[0].numel() for n, p in model.named_parameters() if "experts." in n or "gate.weight" in n)
    assert rewarming.metrics()["share_locked"] == pytest.approx(1 - stack[7].numel() / new)


@pytest.mark.slow
def test_copies_part_under_the_real_trainer(moe_checkpoint: Path, tmp_path: Path) -> None:
    """From the first steps on, every one of them: noise lets each be chosen."""
    counts = [3, 1] * 8
    behind = [0, 2, 4, 6, 8, 10, 12, 14] * 2
    folder = tmp_path / "checkpoint-600"
    api.expand(
        moe_checkpoint,
        folder,
        axes=[{"axis": "experts", "to": 32}],
        copies={"all": counts},
        router_noise=0.01,
        report="none",
        threads=1,
    )
    api.verify(moe_checkpoint, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = training.build_trainer("moe", tmp_path / "run", model=model, stop_at=602)
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == 602
    stacks = [p.detach() for name, p in model.named_parameters() if name.endswith("experts.down_proj")]
    assert len(stacks) == 3
    for p in stacks:
        apart = (p[16:] - p[behind]).flatten(1).abs().amax(1) / p.abs().max()
        assert float(apart.min()) > 1e-5


@pytest.mark.parametrize(("load", "total"), [([3.0, 1, 2, 0], 9), ([0.2, 0.2, 0.6], 5), ([5, 5, 5], 6)])
def test_shared_out_by_load(load: Sequence[float], total: int) -> None:
    """No other numbers give a copy that has most to do less; equal loads share alike."""
    found = shared_out(load, total)
    every = product(range(1, total), repeat=len(load))
    most = min(max(x / n for x, n in zip(load, c, strict=True)) for c in every if sum(c) == total)
    assert sum(found) == total and min(found) >= 1
    assert max(x / n for x, n in zip(load, found, strict=True)) == pytest.approx(most)
    if len(set(load)) == 1:
        assert set(found) == {total // len(load)}


def test_by_load_from_a_file(tmp_path: Path) -> None:
    """The command line; the manifest has the numbers, and the recorded command makes the same bytes again."""
    small = trained(CONFIGS["mixtral"], tmp_path / "small")
    load = {"0": [10, 20, 10, 29, 10, 10], "all": [0.31, 0.1, 0.1, 0.1, 0.1, 0.29]}
    (tmp_path / "load.json").write_text(json.dumps(load))
    words = [
        "--report",
        "none",
        "--expert-load",
        str(tmp_path / "load.json"),
        "--axis",
        "experts",
        "--to",
        "9",
    ]
    run("expand", str(small.folder), str(tmp_path / "wide"), *words)
    assert check_entries(small, tmp_path / "wide", {0: [1, 3, 3], 1: [0, 5, 0]}) == 6
    folder = tmp_path / "wide/sparkling"
    assert json.loads((folder / "manifest.json").read_text())["spec"]["copies"] == {
        "0": [1, 2, 1, 3, 1, 1],
        "all": [3, 1, 1, 1, 1, 2],
    }
    command = json.loads((folder / "report.json").read_text())["command"]
    assert "--copies" in command and "--expert-load" not in command
    again = shlex.split(command)[2:]
    run("expand", str(small.folder), str(tmp_path / "again"), *again[2:])
    for name in ("model.safetensors", "optimizer.pt", "config.json"):
        assert (tmp_path / "wide" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_equal_numbers_are_the_default(tmp_path: Path) -> None:
    """Twice as many of each is what a factor gives, with as many more for each token too."""
    small = trained(CONFIGS["mixtral"], tmp_path / "small")
    axes = [{"axis": "experts", "factor": 2}, {"axis": "experts_per_token", "factor": 2}]
    options: dict[str, Any] = {"axes": axes, "report": "none", "threads": 1}
    api.expand(small.folder, tmp_path / "plain", **options)
    api.expand(small.folder, tmp_path / "said", copies={"all": [2] * 6}, **options)
    for name in ("model.safetensors", "optimizer.pt", "config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "said" / name).read_bytes(), name


def test_a_manifest_of_other_copies_is_found_out(tmp_path: Path) -> None:
    """Numbers that cannot have given this many experts."""
    small = trained(CONFIGS["mixtral"], tmp_path / "small")
    api.expand(small.folder, tmp_path / "wide", axes=NINE, copies=COPIES, report="none", threads=1)
    manifest = read_manifest(tmp_path / "wide")
    assert Derivation(manifest).faults() == []
    spec = {**manifest.spec, "copies": {**COPIES, "1": [3, 1, 1, 1, 1, 3]}}
    stage = manifest.stages[0].model_copy(update={"spec": spec})
    changed = manifest.model_copy(update={"spec": spec, "stages": (stage,)})
    assert Derivation(changed).faults() == ["the copies in layer 1 are not 9 experts"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "too few numbers": ({"axes": NINE, "copies": {"all": [2, 2, 2]}}, "3 numbers, the model has 6 experts"),
    "another sum": (
        {"axes": NINE, "copies": {"all": [1] * 6}},
        "add up to 6 experts, the axis grows from 6 to",
    ),
    "no such layer": (
        {"axes": NINE, "copies": {"all": COPIES["all"], "2": COPIES["1"]}},
        r"copies\.2: this layer has no experts",
    ),
    "a layer left out": ({"axes": NINE, "copies": {"1": COPIES["1"]}}, "nothing is said of layers 0"),
    "nothing grows": ({"axes": {"ffn": 2}, "copies": COPIES}, "number of experts does not grow"),
    "many more per token": (
        {"axes": [*NINE, {"axis": "experts_per_token", "to": 4}], "copies": COPIES},
        "couples experts_per_token to experts",
    ),
    "both": ({"axes": NINE, "copies": COPIES, "expert_load": {"all": [1] * 6}}, "give one"),
    "no load": ({"axes": NINE, "expert_load": {"all": [0] * 6}}, "no expert has any load"),
    "none left": ({"axes": NINE, "copies": {"all": [0, 3, 1, 3, 1, 1]}}, "greater than or equal to 1"),
    "a part of them": ({"axes": NINE}, "--copies FILE"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused(case: str, tmp_path: Path) -> None:
    """Each in words that name what stands against it."""
    options, words = WRONG[case]
    shake(build_model(CONFIGS["mixtral"], meta=False)).save_pretrained(tmp_path / "small")
    with pytest.raises(SpecError) as caught:
        api.expand(tmp_path / "small", tmp_path / "wide", report="none", allow_locked=True, **options)
    assert re.search(words, f"{caught.value.message} {caught.value.hint}")
