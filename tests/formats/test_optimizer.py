"""Numbers of optimizer state to parameter names: against real Trainers, and refused when not beyond doubt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.formats.model import Checkpoint, ParamState
from sparkling_cli.formats.numbered_states import name_in_order, name_parameters
from sparkling_cli.layout.file import read_layout
from sparkling_cli.models.locate import vocabulary_of
from sparkling_cli.storage.tensors import Extent, StoredTensor

TinyCheckpoint = Callable[..., Path]


def real_names(arch: str, optimizer: str, out: Path) -> tuple[list[str], list[Any], set[str]]:
    """Names in the order of a real Trainer's optimizer; its model's parameters; the decayed names."""
    from fixtures.tiny import build_trainer, make_model

    model = make_model(arch)
    trainer = build_trainer(model, out, optimizer=optimizer)
    trainer.create_optimizer()
    by_identity = {id(p): name for name, p in model.named_parameters()}
    names = [by_identity[id(p)] for group in trainer.optimizer.param_groups for p in group["params"]]
    parameters = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    return names, parameters, set(trainer.get_decay_parameter_names(model))


@pytest.mark.parametrize(
    ("arch", "optimizer", "expected_class"),
    [
        ("llama", "adamw_torch_fused", "AdamW"),
        ("qwen3_moe", "adamw_torch_fused", "AdamW"),
        ("gpt2", "adamw_torch_fused", "AdamW"),
        ("llama", "adam", "Adam"),
        ("llama", "amsgrad", "AdamW"),
        ("llama", "lion", "Lion"),
        ("llama", "sgd", "SGD"),
        ("gpt2", "muon", "Muon"),
        ("qwen3_moe", "muon", "Muon"),
        ("llama", "adafactor", "Adafactor"),
        ("llama", "adafactor_torch", "Adafactor"),
    ],
)
def test_numbers_become_the_trainers_own_names(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, arch: str, optimizer: str, expected_class: str
) -> None:
    """Every number stands for the parameter that a real Trainer gives it, frozen ones left out."""
    checkpoint = open_checkpoint(tiny_checkpoint(arch, optimizer=optimizer))
    names, parameters, decay = real_names(arch, optimizer, tmp_path)
    named = name_parameters(checkpoint, parameters, decay)
    assert [state.param for state in named.states] == [names[int(state.param)] for state in checkpoint.states]
    assert [n for group in named.param_groups for n in group["params"]] == names
    assert checkpoint.facts["optimizer_class"] == expected_class
    assert named.tensors is checkpoint.tensors and named.private is checkpoint.private


def test_plain_sgd_has_nothing_to_name(tiny_checkpoint: TinyCheckpoint) -> None:
    """SGD without momentum keeps no state: the checkpoint says so and is left as it is."""
    checkpoint = open_checkpoint(tiny_checkpoint("llama", optimizer="sgd_plain"))
    assert not any(state.tensors for state in checkpoint.states)
    assert name_parameters(checkpoint, [], set()) is checkpoint or checkpoint.states


def numbered(
    groups: Sequence[Sequence[int]],
    shapes: Mapping[int, tuple[int, ...]],
    *,
    slot: str = "exp_avg",
    **group_options: Any,
) -> Checkpoint:
    """A checkpoint with one state tensor per number."""
    tensors = {
        f"k{n}": StoredTensor("float32", shape, (Extent("o", 0, (0,) * len(shape), shape),))
        for n, shape in shapes.items()
    }
    return Checkpoint(
        root=Path("run"),
        format="trainer",
        tensors=tensors,
        weights={},
        states=tuple(ParamState(str(n), {slot: f"k{n}"}) for n in shapes),
        param_groups=tuple({"params": list(group), **group_options} for group in groups),
    )


MODEL = [
    ("embed", (9, 4)),
    ("norm", (4,)),
    ("up", (8, 4)),
    ("bias", (8,)),
    ("down", (4, 8)),
    ("head", (9, 4)),
]
DECAY = {"embed", "up", "down", "head"}


def names_of(
    checkpoint: Checkpoint, parameters: Any = MODEL, decay: Any = DECAY, vocabulary: Any = frozenset()
) -> list[str]:
    """Names after resolution."""
    return [state.param for state in name_parameters(checkpoint, parameters, decay, vocabulary).states]


def shapes_of(*names: str) -> dict[int, tuple[int, ...]]:
    """Numbered shapes of these parameters of MODEL."""
    return {i: dict(MODEL)[name] for i, name in enumerate(names)}


@pytest.mark.parametrize(
    ("sizes", "order"),
    [
        ((4, 2), ("embed", "up", "down", "head", "norm", "bias")),
        ((6,), ("embed", "norm", "up", "bias", "down", "head")),
        ((2, 4), ("norm", "bias", "embed", "up", "down", "head")),
        ((2, 4), ("up", "down", "embed", "norm", "bias", "head")),
        ((5, 1), ("embed", "norm", "up", "down", "head", "bias")),
        ((4, 2), ("norm", "up", "bias", "down", "embed", "head")),
        ((2, 4), ("embed", "head", "norm", "up", "bias", "down")),
    ],
)
def test_groupings_in_use(sizes: tuple[int, ...], order: tuple[str, ...]) -> None:
    """The Trainers', one group, vectors first, Muon's; embedding and head with a rate of their own."""
    numbers = iter(range(6))
    groups = [[next(numbers) for _ in range(size)] for size in sizes]
    found = names_of(numbered(groups, shapes_of(*order)), vocabulary={"embed", "head"})
    assert found == list(order)


def test_an_older_trainers_empty_group() -> None:
    """Without biases everything was decayed, and the second group is there and empty."""
    order = [name for name, _ in MODEL if name != "bias"]
    model = [(name, shape) for name, shape in MODEL if name != "bias"]
    shapes = {i: shape for i, (_, shape) in enumerate(model)}
    assert names_of(numbered([[0, 1, 2, 3, 4], []], shapes), model, DECAY) == order


def test_an_older_trainers_biases_of_a_norms_shape() -> None:
    """As in Qwen2: a bias and a norm have one shape; the sizes of the groups say which grouping it is."""
    model = [("embed", (9, 4)), ("norm", (4,)), ("q", (4, 4)), ("q.bias", (4,)), ("last", (4,))]
    shapes = {0: (9, 4), 1: (4,), 2: (4, 4), 3: (4,), 4: (4,)}
    found = names_of(numbered([[0, 1, 2, 3], [4]], shapes), model, {"embed", "q"})
    assert found == ["embed", "norm", "q", "last", "q.bias"]


def test_frozen_parameters_are_skipped() -> None:
    """A group with fewer numbers than names: which ones are frozen follows from the shapes."""
    order = ("up", "down", "bias")
    assert names_of(numbered([[0, 1], [2]], shapes_of(*order))) == list(order)


def test_frozen_parameters_in_doubt() -> None:
    """Embed and head have one shape; if one of them is frozen, nobody knows which: refused."""
    with pytest.raises(CheckpointError, match=r"may be that of 'embed' or of 'head'") as caught:
        names_of(numbered([[0], [1, 2]], shapes_of("embed", "norm", "bias")))
    assert "1, 2 parameters, the model has 6, 4 of them decayed" in str(caught.value)


def test_shapes_prove_the_order() -> None:
    """Numbers in another order than the model's are refused with the first mismatch, never used."""
    wrong = {**shapes_of("embed", "up", "down", "head", "norm", "bias"), 1: (4, 8), 2: (8, 4)}
    with pytest.raises(CheckpointError) as caught:
        names_of(numbered([[0, 1, 2, 3], [4, 5]], wrong))
    assert "'exp_avg' of parameter 1 has shape (4, 8); 'up'" in str(caught.value)
    assert "has (8, 4)" in str(caught.value)


def test_one_entry_is_no_shape_for_a_moment() -> None:
    """A moment of one entry does not stand for a whole parameter; a counter of any name may."""
    shapes = {**shapes_of("embed", "up", "down", "head", "norm", "bias"), 4: (1,)}
    with pytest.raises(CheckpointError, match=r"has shape \(1,\)"):
        names_of(numbered([[0, 1, 2, 3], [4, 5]], shapes))


def test_param_names_win_and_are_proved() -> None:
    """Names in the groups are used as they are, if the model has them and the shapes agree."""
    checkpoint = numbered([[0, 1]], {0: (8, 4), 1: (4,)}, param_names=["up", "norm"])
    assert names_of(checkpoint) == ["up", "norm"]
    with pytest.raises(CheckpointError, match="no parameter of the model"):
        names_of(numbered([[0]], {0: (4,)}, param_names=["other"]))
    with pytest.raises(CheckpointError, match="has shape"):
        names_of(numbered([[0]], {0: (5,)}, param_names=["norm"]))
    with pytest.raises(CheckpointError, match="differ in length"):
        names_of(numbered([[0]], {0: (4,)}, param_names=["norm", "up"]))


def test_an_order_that_the_user_gives(tmp_path: Path) -> None:
    """Frozen parameters and a rate per layer: what nobody could tell is read from a file, and proved."""
    groups = [[0], [1, 2], [3]]
    checkpoint = numbered(groups, shapes_of("head", "bias", "up", "norm"))
    with pytest.raises(CheckpointError, match="cannot be told apart") as refused:
        names_of(checkpoint)
    assert "--param-order" in str(refused.value.hint)
    path = tmp_path / "order.txt"
    path.write_text("module.head\nmodule.bias\nmodule.up\nmodule.norm\n")
    found = name_in_order(checkpoint, dict(MODEL), path)
    assert [state.param for state in found.states] == ["head", "bias", "up", "norm"]
    assert [group["params"] for group in found.param_groups] == [["head"], ["bias", "up"], ["norm"]]
    for text, fault in (("head\nbias\nup", "it has 3 names"), ("head\nup\nbias\nnorm", "has shape"),
                        ("head\nbias\nup\nother", "'other' is no parameter")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(CheckpointError, match=fault) as refused:
            name_in_order(checkpoint, dict(MODEL), path)
        assert "optimizer.param_groups" in str(refused.value.hint)


def test_contradictory_groups() -> None:
    """A number in two groups, state without a group, more groups than anyone knows."""
    with pytest.raises(CheckpointError, match="two optimizer groups"):
        names_of(numbered([[0], [0]], {0: (4,)}))
    with pytest.raises(CheckpointError, match="in no group"):
        names_of(numbered([[0]], {0: (4,), 7: (4,)}))
    with pytest.raises(CheckpointError, match="one or two groups"):
        names_of(numbered([[0], [1], [2]], shapes_of("embed", "norm", "up")))
    with pytest.raises(CheckpointError, match="group 0 has 7 parameters, 6 expected"):
        names_of(numbered([list(range(7))], shapes_of("embed", "norm", "up")))


def test_other_groupings_need_distinct_shapes() -> None:
    """Hidden matrices first, as Muon's users group, is not taken where an embedding looks like one."""
    parameters = [("embed.weight", (4, 4)), ("a", (4, 4)), ("norm", (3,))]
    checkpoint = numbered([[0], [1, 2]], {0: (4, 4), 1: (4, 4), 2: (3,)})
    with pytest.raises(CheckpointError, match="have one shape and would be in different groups"):
        names_of(checkpoint, parameters, {"embed.weight", "a"}, {"embed.weight"})
    told_apart = [("embed.weight", (9, 4)), *parameters[1:]]
    checkpoint = numbered([[0], [1, 2]], {0: (4, 4), 1: (9, 4), 2: (3,)})
    found = names_of(checkpoint, told_apart, {"embed.weight", "a"}, {"embed.weight"})
    assert found == ["a", "embed.weight", "norm"]


def test_any_groups_by_shapes_alone() -> None:
    """Groups of any number and order, if every shape is in one of them; else the twins are named."""
    tied = MODEL[:-1]  # embed has no twin
    checkpoint = numbered([[0], [1, 2], [3, 4]], shapes_of("embed", "norm", "bias", "up", "down"))
    assert names_of(checkpoint, tied, DECAY - {"head"}) == ["embed", "norm", "bias", "up", "down"]
    checkpoint = numbered(
        [[0], [1], [2, 3], [4, 5]], shapes_of("head", "embed", "norm", "bias", "up", "down")
    )
    with pytest.raises(CheckpointError, match=r"both have the shape \(9, 4\) of 'embed', 'head'"):
        names_of(checkpoint)
    checkpoint = numbered([[0], [1, 2], [3, 4]], shapes_of("embed", "bias", "norm", "up", "down"))
    with pytest.raises(CheckpointError, match="group 1 is not in the model's order"):
        names_of(checkpoint, tied, DECAY - {"head"})


def test_the_layout_says_what_an_embedding_is(tmp_path: Path) -> None:
    """Tables that are looked up in are told by their axes, whatever their names are."""
    (tmp_path / "layout.toml").write_text(
        """format = 1
name = "odd names"
[axes]
hidden = { size = 4 }
ffn = { size = 8 }
vocab = { size = 9, widenable = false }
places = { size = 7, widenable = false }
[tensors]
"one.weight" = "vocab -> hidden"
"two.weight" = "places -> hidden"
"three.weight" = "ffn <- hidden"
"four.weight" = "hidden -> ffn"
"five.weight" = "hidden <- ffn"
"six.weight" = "vocab <- hidden"
"seven.weight" = "scale hidden"
"""
    )
    layout = read_layout(tmp_path / "layout.toml")
    shapes = {p.name: layout.shape_of(p) for p in layout.tensors}
    assert vocabulary_of(layout, shapes.items()) == {"one.weight", "two.weight", "six.weight"}


def test_named_states_are_left_alone() -> None:
    """Formats that name their parameters pass through."""
    checkpoint = Checkpoint(Path("x"), "dcp", {}, {}, states=(ParamState("layers.0.w", {}),))
    assert name_parameters(checkpoint, MODEL, DECAY) is checkpoint


def test_deep_models_resolve_fast() -> None:
    """Forty thousand parameters, a quarter of them frozen, resolve without trying combinations."""
    parameters = [(f"layers.{i}.{n}", s) for i in range(10_000) for n, s in MODEL[1:5]]
    decay = {n for n, s in parameters if len(s) == 2}
    trained = [(n, s) for n, s in parameters if not n.endswith("bias")]
    order = [t for t in trained if t[0] in decay] + [t for t in trained if t[0] not in decay]
    split = len([t for t in trained if t[0] in decay])
    groups = [list(range(split)), list(range(split, len(order)))]
    checkpoint = numbered(groups, {i: shape for i, (_, shape) in enumerate(order)})
    assert names_of(checkpoint, parameters, decay) == [name for name, _ in order]


def test_state_of_a_stopped_trainer_without_steps(tmp_path: Path) -> None:
    """An optimizer that never stepped has groups and no state."""
    (tmp_path / "a").mkdir()
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2, 2)}, tmp_path / "a" / "model.safetensors")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2, 2))])
    torch.save(optimizer.state_dict(), tmp_path / "a" / "optimizer.pt")
    checkpoint = open_checkpoint(tmp_path / "a")
    assert checkpoint.states == () and "no state" in checkpoint.notes[0]
    assert name_parameters(checkpoint, [("w", (2, 2))], {"w"}) is checkpoint
