"""What a state tensor is: by the table of names, by measuring, or as the user says."""

from __future__ import annotations

import re
import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparkling_cli import api
from sparkling_cli.errors import CheckpointError, VerificationError
from sparkling_cli.execute import worker
from sparkling_cli.formats import optimizer_states as states
from sparkling_cli.widening.geometry import source_shape
from tests.conftest import TinyCheckpoint

FFN = [{"axis": "ffn", "factor": 2}]
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def names(tiny_checkpoint: TinyCheckpoint) -> list[str]:
    """Parameters in the order of the Trainer's optimizer: those with weight decay first."""
    weights = load_file(tiny_checkpoint("llama") / "model.safetensors")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"))
    ordered = [name for name, _ in model.named_parameters() if name in weights]
    return [n for n in ordered if "norm" not in n] + [n for n in ordered if "norm" in n]


def with_state(source: Path, target: Path, names: list[str], slot: str, made: Any) -> Path:
    """A copy of a checkpoint whose optimizer has one more state of every parameter."""
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    optimizer = torch.load(source / "optimizer.pt", weights_only=True)
    for number, name in enumerate(names):
        optimizer["state"][number][slot] = made(weights[name].float())
    torch.save(optimizer, target / "optimizer.pt")
    return target


def of_down(wide: Path, names: list[str], slot: str) -> torch.Tensor:
    """The state of a widened matrix whose columns grow and are scaled."""
    state = torch.load(wide / "optimizer.pt", weights_only=True)["state"]
    found: torch.Tensor = state[names.index(DOWN)][slot]
    return found


def as_is(weight: torch.Tensor) -> torch.Tensor:
    """A copy."""
    return weight.clone()


def mixed(share: float) -> Any:
    """A tensor whose correlation with the weight is about ``share``."""

    def make(weight: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(weight.numel())
        noise = torch.randn(weight.shape, generator=generator) * weight.std(correction=0)
        return share * weight + (1 - share**2) ** 0.5 * noise

    return make


def rounding(weight: torch.Tensor) -> torch.Tensor:
    """What rounding to bfloat16 takes from a weight."""
    return weight - weight.bfloat16().float()


@pytest.mark.parametrize("slot", ["ax", "slow_buffer", "p0", "z", "of_nobody_yet"])
def test_copies_follow_the_weight(
    slot: str, tiny_checkpoint: TinyCheckpoint, names: list[str], tmp_path: Path
) -> None:
    """Names of the table, and one that is measured: the widened copy is the widened weight, bit by bit."""
    source = with_state(tiny_checkpoint("llama"), tmp_path / "checkpoint-3", names, slot, as_is)
    result = api.expand(source, tmp_path / "wide", axes=FFN, report="none")
    api.verify(source, tmp_path / "wide")
    wide = load_file(tmp_path / "wide" / "model.safetensors")[DOWN].float()
    assert torch.equal(of_down(tmp_path / "wide", names, slot), wide)
    said = [note for note in result.expansion.plan.notes if re.search(rf"\b{slot}\b", note)]
    assert bool(said) is (slot == "of_nobody_yet")


def flat(weight: torch.Tensor) -> torch.Tensor:
    """A copy in one dim."""
    return weight.flatten()


def behind_a_one(weight: torch.Tensor) -> torch.Tensor:
    """A copy with a dim of one entry before the weight's."""
    return weight[None].clone()


VOCAB = [{"axis": "vocab", "to": 110}, *FFN]


@pytest.mark.parametrize("chosen", [False, True], ids=["mean of all", "mean of two"])
@pytest.mark.parametrize("made", [flat, behind_a_one])
def test_a_copy_in_another_shape_has_the_same_new_rows(
    made: Any, chosen: bool, tiny_checkpoint: TinyCheckpoint, names: list[str], tmp_path: Path
) -> None:
    """New tokens of a copy are means of rows, wherever the rows' ends are not to be seen in its shape."""
    source = with_state(tiny_checkpoint("llama"), tmp_path / "checkpoint-3", names, "master_param", made)
    old = len(load_file(source / "model.safetensors")["model.embed_tokens.weight"])
    api.expand(
        source, tmp_path / "wide", axes=VOCAB, vocab_from={old: (1, 2)} if chosen else {}, report="none"
    )
    api.verify(source, tmp_path / "wide")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    state = torch.load(tmp_path / "wide" / "optimizer.pt", weights_only=True)["state"]
    assert len(wide["model.embed_tokens.weight"]) > old
    for number, name in enumerate(names):
        assert torch.equal(state[number]["master_param"], made(wide[name].float())), name


@pytest.mark.parametrize("made", [flat, behind_a_one])
def test_means_over_other_rows_are_found(
    made: Any, tiny_checkpoint: TinyCheckpoint, names: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    """The proof knows a copy's rows by itself: one mean of the whole tensor in every new entry is refused."""
    source = with_state(tiny_checkpoint("llama"), tmp_path / "checkpoint-3", names, "master_param", made)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "source_shape", lambda view: (prod(source_shape(view)),))
        api.expand(source, tmp_path / "wide", axes=VOCAB, report="none")
    with pytest.raises(VerificationError, match="embed_tokens"):
        api.verify(source, tmp_path / "wide")


def squares(weight: torch.Tensor) -> torch.Tensor:
    """Squared gradients that weight decay alone is left of: their magnitude follows the weight's."""
    return 1e-4 * weight.square()


@pytest.mark.parametrize(
    ("made", "kind"), [(mixed(0.0), "moment"), (mixed(0.97), "weight"), (rounding, "weight")]
)
def test_measured(
    made: Any, kind: str, tiny_checkpoint: TinyCheckpoint, names: list[str], tmp_path: Path
) -> None:
    """Noise is a moment; an average, and what rounding took, follow the weight."""
    source = with_state(tiny_checkpoint("llama"), tmp_path / "checkpoint-3", names, "odd", made)
    result = api.expand(source, tmp_path / "wide", axes=FFN, report="none")
    api.verify(source, tmp_path / "wide")
    old = torch.load(source / "optimizer.pt", weights_only=True)["state"][names.index(DOWN)]["odd"]
    found, width = of_down(tmp_path / "wide", names, "odd"), old.shape[1]
    if kind == "moment":
        assert torch.equal(found[:, :width], old) and not found[:, width:].any()
    else:  # at twice the width every column is halved, and occurs twice
        assert torch.equal(found[:, :width], old / 2) and torch.equal(found[:, width:], old / 2)
    assert [note for note in result.expansion.plan.notes if f"'odd' is taken for a {kind}" in note]


@pytest.mark.parametrize("made", [mixed(0.82), squares, lambda w: 0.01 * w])
def test_what_cannot_be_decided_is_refused(
    made: Any, tiny_checkpoint: TinyCheckpoint, names: list[str], tmp_path: Path
) -> None:
    """With the option that says it, which works."""
    source = with_state(tiny_checkpoint("llama"), tmp_path / "checkpoint-3", names, "odd", made)
    with pytest.raises(CheckpointError, match="'odd' is of no known kind") as caught:
        api.expand(source, tmp_path / "wide", axes=FFN, report="none")
    for kind in ("weight", "moment", "carry"):
        assert f"--state odd={kind}" in str(caught.value.hint)
    for kind, columns in (("weight", 2), ("moment", 2), ("carry", 1)):
        api.expand(source, tmp_path / kind, axes=FFN, state={"odd": kind}, report="none")
        api.verify(source, tmp_path / kind)
        old = torch.load(source / "optimizer.pt", weights_only=True)["state"][names.index(DOWN)]["odd"]
        found = of_down(tmp_path / kind, names, "odd")
        assert found.shape == (old.shape[0], columns * old.shape[1])
        assert bool(found[:, old.shape[1] :].any()) is (kind == "weight")


def followed(weight: torch.Tensor) -> torch.Tensor:
    """FTRL's linear term, of which it makes the weight: ``w = -lr z / (beta + sqrt(n))``."""
    squares = torch.rand(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    return -weight * (1.0 + squares.sqrt()) / 0.01


@pytest.mark.parametrize(
    ("slot", "made", "why"),
    [
        ("momentum_buffer", mixed(0.97), "known as a moment, but its values are those of the weights"),
        ("prev", as_is, "known as a moment, but its values are those of the weights"),
        ("z", followed, "known as a weight, but its values do not follow the weights"),
        ("slow_buffer", mixed(0.0), "known as a weight, but its values do not follow the weights"),
        ("p0", lambda w: mixed(0.0)(w) * 1e-4, "known as a weight, but its values are 0.0001 times as large"),
        ("x0", as_is, "makes the weights anew at every step"),
    ],
)  # fmt: skip
def test_a_name_that_its_values_contradict(
    slot: str, made: Any, why: str, tiny_checkpoint: TinyCheckpoint, names: list[str], tmp_path: Path
) -> None:
    """Refused, with the options that say what it is; each of them works."""
    source = with_state(tiny_checkpoint("llama"), tmp_path / "checkpoint-3", names, slot, made)
    with pytest.raises(CheckpointError, match=f"'{slot}'.*{why}") as caught:
        api.expand(source, tmp_path / "wide", axes=FFN, report="none")
    assert not (tmp_path / "wide").exists()
    old = torch.load(source / "optimizer.pt", weights_only=True)["state"][names.index(DOWN)][slot]
    for kind in ("weight", "moment"):
        assert f"--state {slot}={kind}" in str(caught.value.hint)
        api.expand(source, tmp_path / kind, axes=FFN, state={slot: kind}, report="none")
        api.verify(source, tmp_path / kind)
        new = of_down(tmp_path / kind, names, slot)[:, old.shape[1] :]
        assert torch.equal(new, old / 2 if kind == "weight" else torch.zeros_like(old))


def averaged(decay: float, steps: int) -> Any:
    """AccSGD's buffer beside weights that rest where ``steps`` steps of decay alone have brought them.

    With large step L and mixing b the buffer becomes (1 - b) buffer + b (w - L g), and w goes a share of the
    way to it (Jain et al. 2018, Algorithm 1); here g = decay w, so both are multiples of the first weights.
    """
    kappa, xi, constant, rate = 1000.0, 10.0, 0.7, 1e-2
    mixing = xi * constant**2 / kappa
    share = mixing / (constant + mixing)
    weight = buffer = 1.0
    for _ in range(steps):
        gradient = decay * weight
        buffer = (1 - mixing) * buffer + mixing * (weight - rate * kappa / constant * gradient)
        weight = (1 - share) * (weight - rate * gradient) + share * buffer
    return lambda value: value * (buffer / weight)


@pytest.mark.parametrize(("decay", "steps"), [(0.0, 20), (0.1, 20), (0.1, 200), (0.1, 2000), (0.5, 300)])
@pytest.mark.parametrize("named", [True, False])
def test_a_slow_average_under_weight_decay_is_no_moment(
    decay: float, steps: int, named: bool, tiny_checkpoint: TinyCheckpoint, names: list[str], tmp_path: Path
) -> None:
    """However decay has moved it, by the optimizer's options; without them, by more than decay explains."""
    made = averaged(decay, steps)
    source = with_state(tiny_checkpoint("llama"), tmp_path / "checkpoint-3", names, "momentum_buffer", made)
    optimizer = torch.load(source / "optimizer.pt", weights_only=True)
    for state in optimizer["state"].values():
        del state["exp_avg"], state["exp_avg_sq"]
    options = {"kappa": 1000.0, "xi": 10.0, "constant": 0.7} if named else {}
    for group in optimizer["param_groups"]:
        group.update({"weight_decay": decay, **options})
        del group["betas"]
    torch.save(optimizer, source / "optimizer.pt")
    why = "AccSGD's slow average" if named else "those of the weights"
    with pytest.raises(
        CheckpointError, match=f"'momentum_buffer' is known as a moment, but .*{why}"
    ) as caught:
        api.expand(source, tmp_path / "wide", axes=FFN, report="none")
    assert "--state momentum_buffer=weight" in str(caught.value.hint)


def test_weight_decay_makes_no_copy_of_a_moment(
    tiny_checkpoint: TinyCheckpoint, names: list[str], tmp_path: Path
) -> None:
    """Torch's SGD whose gradients are gone: its momentum is decay / (1 - momentum) = 1 times the weight."""
    source = tmp_path / "checkpoint-3"
    shutil.copytree(tiny_checkpoint("llama"), source)
    weights = load_file(source / "model.safetensors")
    parameters = [torch.nn.Parameter(weights[name].float()) for name in names]
    old = torch.load(source / "optimizer.pt", weights_only=True)["param_groups"]
    sizes = [len(group["params"]) for group in old]
    groups = [{"params": parameters[: sizes[0]]}, {"params": parameters[sizes[0] :]}]
    optimizer = torch.optim.SGD(groups, lr=1e-6, momentum=0.9, weight_decay=0.1)
    for _ in range(200):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    torch.save(optimizer.state_dict(), source / "optimizer.pt")
    buffer = optimizer.state[parameters[names.index(DOWN)]]["momentum_buffer"]
    assert torch.allclose(buffer, parameters[names.index(DOWN)], rtol=1e-3)
    api.expand(source, tmp_path / "wide", axes=FFN, report="none")
    api.verify(source, tmp_path / "wide")
    found = of_down(tmp_path / "wide", names, "momentum_buffer")
    assert torch.equal(found[:, : buffer.shape[1]], buffer) and not found[:, buffer.shape[1] :].any()


def test_the_table_has_every_name_once() -> None:
    """A name that stands for two kinds would be decided by the order of the code."""
    tables = (*states._KINDS.values(),)
    assert sum(map(len, tables)) == len(frozenset().union(*tables))
