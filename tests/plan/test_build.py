"""Rows of a plan: names, views, factors and state, on hand-made checkpoints."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

from sparkling_cli.errors import CheckpointError, LayoutError, SpecError
from sparkling_cli.formats.model import Checkpoint, ParamState
from sparkling_cli.layout.model import AxisInfo, Compensation, ModelLayout, TensorPattern
from sparkling_cli.plan.build import build_plan
from sparkling_cli.plan.model import Plan, Row
from sparkling_cli.plan.naming import weights_of
from sparkling_cli.spec.sources import make_spec
from sparkling_cli.storage.tensors import Extent, StoredTensor
from sparkling_cli.widening.geometry import Fill

LAYOUT = ModelLayout(
    "Toy",
    {
        "hidden": AxisInfo(4, True),
        "ffn": AxisInfo(6, True),
        "vocab": AxisInfo(10),
        "layers": AxisInfo(2),
        "experts": AxisInfo(3),
    },
    (
        TensorPattern("embed.weight", "vocab -> hidden"),
        TensorPattern("layers.{layers}.mlp.gate_up", "experts | (gate_up ffn) <- hidden"),
        TensorPattern("layers.{layers}.mlp.down", "experts | hidden <- ffn"),
        TensorPattern("norm.weight", "scale hidden"),
    ),
    disk=(
        TensorPattern("embed.weight", "vocab -> hidden"),
        TensorPattern("layers.{layers}.experts.{experts}.w1.weight", "gate:ffn <- hidden"),
        TensorPattern("layers.{layers}.experts.{experts}.w3.weight", "up:ffn <- hidden"),
        TensorPattern("layers.{layers}.experts.{experts}.w2.weight", "hidden <- ffn"),
        TensorPattern("norm.weight", "scale hidden"),
    ),
    config={"hidden_size": "hidden", "text.ffn": "ffn", "extra": "(2 ffn)"},
    compensations=(Compensation("hidden", "norm.weight", fan_in=True, offset=1.0),),
    tied=(("embed.weight", "head.weight"),),
    assembly={
        "layers.{layers}.mlp.gate_up": (
            "layers.{layers}.experts.{experts}.w1.weight",
            "layers.{layers}.experts.{experts}.w3.weight",
        ),
        "layers.{layers}.mlp.down": ("layers.{layers}.experts.{experts}.w2.weight",),
    },
)


def stored(*shape: int, offset: int = 0, dtype: str = "float32") -> StoredTensor:
    """A tensor in one piece."""
    return StoredTensor(dtype, shape, (Extent("a", offset, (0,) * len(shape), shape),))


@pytest.fixture(autouse=True)
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file, all zeros: state is held against the weights."""
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "a").write_bytes(bytes(1 << 14))
    monkeypatch.chdir(tmp_path)


def checkpoint(states: bool = True, **extra: StoredTensor) -> Checkpoint:
    """The toy on disk: experts apart; state as in the module."""
    tensors = {"embed.weight": stored(10, 4), "norm.weight": stored(4)}
    for layer in range(2):
        for expert in range(3):
            base = f"layers.{layer}.experts.{expert}"
            at = 1000 * layer + 100 * expert
            tensors[f"{base}.w1.weight"] = stored(6, 4, offset=at + 1)
            tensors[f"{base}.w2.weight"] = stored(4, 6, offset=at + 2)
            tensors[f"{base}.w3.weight"] = stored(6, 4, offset=at + 3)
    tensors |= extra
    weights = {name: name for name in tensors}
    params: tuple[ParamState, ...] = ()
    if states:
        tensors |= {
            "s.gu": stored(3, 12, 4), "s.norm": stored(4), "s.z": stored(4), "s.row": stored(4, 1),
        }  # fmt: skip
        params = (
            ParamState("layers.1.mlp.gate_up", {"exp_avg": "s.gu"}, {"step": 7.0}),
            ParamState("norm.weight", {"exp_avg": "s.norm", "z": "s.z"}, {"step": 7.0}),
        )
    config = {"hidden_size": 4, "text": {"ffn": 6}}
    return Checkpoint(Path("toy"), "test", tensors, weights, params, config=config)


def plan(source: Checkpoint, *axes: tuple[str, float], layout: ModelLayout = LAYOUT, **fields: Any) -> Plan:
    """Build a plan for these axes."""
    spec = make_spec({"axes": [{"axis": a, "factor": f} for a, f in axes], **fields})
    return build_plan(source, layout, spec)


def row(made: Plan, key: str) -> Row:
    """The row of a key."""
    return next(r for r in made.rows if r.key == key)


def test_fused_tensors_are_assembled_from_their_parts() -> None:
    """Gate parts first, up parts behind them, experts stacked: every extent at its place."""
    weights, renamed = weights_of(checkpoint(), LAYOUT, "auto")
    assert renamed
    fused = next(w for w in weights if w.name == "layers.1.mlp.gate_up").stored
    assert fused.shape == (3, 12, 4)
    places = {(e.offset, e.start, e.shape) for e in fused.extents}
    assert places == {
        (1000 + 100 * e + part, (e, 6 * (part == 3), 0), (1, 6, 4)) for e in range(3) for part in (1, 3)
    }


def test_names_on_disk_are_kept_without_state() -> None:
    """Weights-only directories keep the source's names, unless asked otherwise."""
    bare = checkpoint(states=False)
    assert {w.name for w in weights_of(bare, LAYOUT, "auto")[0]} == set(bare.weights)
    assert weights_of(bare, LAYOUT, "module")[1]
    assert not weights_of(checkpoint(), LAYOUT, "disk")[1]


def test_a_missing_part_is_an_error() -> None:
    """A fused tensor without one of its parts is never written with a hole."""
    source = checkpoint()
    del source.weights["layers.0.experts.1.w3.weight"]  # type: ignore[attr-defined]
    with pytest.raises(LayoutError, match=r"layers\.0\.mlp\.gate_up.*part 1"):
        weights_of(source, LAYOUT, "module")


def test_unknown_tensors_and_wrong_shapes_are_errors() -> None:
    """A tensor without a layout, or of another shape, stops the plan and is named."""
    with pytest.raises(LayoutError, match="surprise"):
        plan(checkpoint(surprise=stored(3)), ("ffn", 2))
    with pytest.raises(LayoutError, match=r"\(5,\).*says \(4,\)"):
        plan(checkpoint(**{"norm.weight": stored(5)}), ("ffn", 2))


def test_state_keeps_old_entries_unscaled_and_resets_new_ones() -> None:
    """S' = [S, 0] (Eq. 24), also where the weight's columns are scaled."""
    made = plan(checkpoint(), ("ffn", 2), ("hidden", 2))
    moment = row(made, "s.gu")
    assert moment.shape == (3, 24, 8)
    for dim in moment.recipe.view:
        assert all(run.scale == 1.0 for run in dim.runs)
        assert all(run.fill is Fill.ZERO for run in dim.runs if run.new)


def test_other_treatments() -> None:
    """asymmetric-scaled keeps the factors, copy copies, drop zeroes everything and the step."""
    scaled = row(plan(checkpoint(), ("hidden", 2), optimizer="asymmetric-scaled"), "s.gu")
    assert {run.scale for run in scaled.recipe.view[-1].runs} == {0.5}
    copied = row(plan(checkpoint(), ("hidden", 2), optimizer="copy", allow_locked=True), "s.gu")
    assert all(run.fill is Fill.COPY for dim in copied.recipe.view for run in dim.runs)
    dropped = plan(checkpoint(), ("hidden", 2), optimizer="drop", allow_locked=True)
    assert row(dropped, "s.gu").recipe.zero and not row(dropped, "s.z").recipe.zero
    assert dropped.scalars == {"layers.1.mlp.gate_up.step": 0.0, "norm.weight.step": 0.0}


@pytest.mark.parametrize(("factor", "alpha"), [(2.0, 0.5), (1.5, sqrt(4 / 10))])
def test_a_tied_head_is_compensated_on_a_one_plus_w_norm(factor: float, alpha: float) -> None:
    """The final norm becomes alpha (1 + w) - 1, its weight-like state too, its moments do not."""
    made = plan(checkpoint(), ("hidden", factor))
    for key in ("norm.weight", "s.z"):
        norm = row(made, key)
        assert [run.scale for run in norm.recipe.view[0].runs] == pytest.approx(
            [alpha] * len(norm.recipe.view[0].runs)
        )
        assert norm.recipe.scale == 1.0
        assert norm.recipe.offset == pytest.approx(alpha - 1, rel=1e-12)
    moment = row(made, "s.norm")
    assert (moment.recipe.scale, moment.recipe.offset) == (1.0, 0.0)
    assert {run.scale for run in moment.recipe.view[0].runs} == {1.0}
    assert {run.scale for run in row(made, "embed.weight").recipe.view[1].runs} == {1.0}


def test_state_under_a_tied_name_has_the_factors_of_the_weight() -> None:
    """What the layout says of the first name holds of state that the optimizer keeps under another."""
    layout = replace(LAYOUT, compensations=(Compensation("hidden", "embed.weight", power=-0.5),))
    source = checkpoint(False, **{"s.z": stored(10, 4), "s.m": stored(10, 4)})
    state = ParamState("head.weight", {"exp_avg": "s.m", "z": "s.z"}, {"step": 7.0})
    weights = {name: key for name, key in source.weights.items() if not name.startswith("s.")}
    made = plan(
        replace(source, weights=weights, states=(state,)),
        ("hidden", 4.0), layout=layout, optimizer="asymmetric-scaled",
    )  # fmt: skip
    assert row(made, "embed.weight").recipe.scale == row(made, "s.z").recipe.scale == 0.5
    assert row(made, "s.m").recipe.scale == 0.5


def test_config_changes_nested_and_implied_keys() -> None:
    """Changed values, nested ones too, and keys that were only implied before."""
    made = plan(checkpoint(), ("ffn", 2))
    assert made.config == {"text.ffn": 12, "extra": 24}


def test_factored_state_is_refused_only_where_it_grows() -> None:
    """Adafactor-like state of a parameter that does not change is carried over; else it is refused."""
    source = checkpoint()
    bad = ParamState("layers.1.mlp.gate_up", {"exp_avg_sq_row": "s.row"})
    broken = Checkpoint(**{**vars(source), "states": (bad,)})
    with pytest.raises(CheckpointError, match="exp_avg_sq_row"):
        plan(broken, ("ffn", 2))
    fine = Checkpoint(**{**vars(source), "states": (ParamState("norm.weight", {"exp_avg_sq_row": "s.row"}),)})
    assert row(plan(fine, ("ffn", 2), allow_locked=True), "s.row").shape == (4, 1)


def test_an_axis_of_whose_parameters_none_has_state_is_locked() -> None:
    """State elsewhere does not part its copies: as where one of several optimizers is left out."""
    norm = ParamState("norm.weight", {"exp_avg": "s.norm"})
    source = Checkpoint(**{**vars(checkpoint()), "states": (norm,)})
    for axes in ([("ffn", 2)], [("ffn", 2), ("hidden", 2)]):
        with pytest.raises(SpecError, match=r"no state for any of their parameters.*\(axes ffn\)"):
            plan(source, *axes)
    assert plan(source, ("ffn", 2), allow_locked=True).warnings
    assert plan(source, ("hidden", 2)).rows


def test_integer_weights_cannot_grow() -> None:
    """A quantized weight is refused with what to do."""
    with pytest.raises(CheckpointError, match="dequantize"):
        plan(checkpoint(**{"embed.weight": stored(10, 4, dtype="int8")}), ("hidden", 2))
