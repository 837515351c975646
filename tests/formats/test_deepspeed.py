"""DeepSpeed's Universal Checkpoint: a faithful small one always, real ZeRO runs where DeepSpeed is there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.detect import open_checkpoint
from tests.formats.make_nanogpt import GPT, GPTConfig, batch, scatter, train
from tests.formats.test_singlefile import _layout_file
from tests.formats.widening import check_moments, widen

JOINT = {"hidden": 2, "heads": 2, "ffn": 2}
WIDE = GPTConfig(n_embd=48, n_head=6)


@pytest.fixture(scope="module", autouse=True)
def one_group() -> Iterator[None]:
    """DeepSpeed keeps its process group for ever; modules that are tested later make their own."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def _universal(root: Path, *, partitioned: bool) -> GPT:
    """A Universal Checkpoint as the converter writes it, after real steps."""
    model = GPT(GPTConfig())
    scatter(model)
    optimizer = model.optimizer()
    train(model, optimizer, GPTConfig(), 3)
    for name, parameter in model.named_parameters():
        folder = root / "zero" / name
        folder.mkdir(parents=True)
        state = optimizer.state[parameter]
        slots = {"fp32": parameter.detach(), **{k: state[k] for k in ("exp_avg", "exp_avg_sq")}}
        for slot, value in slots.items():
            value = value.clone()
            whole = value.flatten() if partitioned else {"cat_dim": 0, "param": value}
            torch.save(whole, folder / f"{slot}.pt")
        if not partitioned:
            torch.save(state["step"], folder / "step.pt")
    module = OrderedDict((k, v.bfloat16()) for k, v in model.state_dict().items())
    module["lm_head.weight"] = module["transformer.wte.weight"]
    if partitioned:
        module = OrderedDict((k, torch.empty(0, dtype=torch.bfloat16)) for k in module)
    states: dict[str, Any] = {
        "module": module,
        "param_shapes": [OrderedDict((n, p.shape) for n, p in model.named_parameters())],
        "shared_params": {"lm_head.weight": "transformer.wte.weight"},
        "frozen_param_fragments": None,
        "global_steps": 3,
    }
    prefix = "zero_pp_rank_0_" if partitioned else ""
    torch.save(states, root / f"{prefix}mp_rank_00_model_states.pt")
    options: dict[str, Any] = {"param_groups": [{"lr": 1e-3}]}
    if partitioned:  # the converter puts one rank's flat partitions in, and the only step counter there is
        flat = torch.ones(sum(p.numel() for p in model.parameters()))
        state = {"step": torch.tensor(3.0), "exp_avg": flat, "exp_avg_sq": flat.clone()}
        options["optimizer_state_dict"] = {"state": {0: state}, "param_groups": [{"lr": 1e-3}]}
        options["fp32_flat_groups"] = [flat.clone()]
    torch.save(options, root / "zero" / "optimizer_state.pt")
    return model


@pytest.mark.parametrize("partitioned", [False, True])
def test_parameter_folders(tmp_path: Path, partitioned: bool) -> None:
    """fp32 weights give the same logits, moments are kept, shapes and module follow."""
    root = tmp_path / "step3_universal"
    model = _universal(root, partitioned=partitioned)
    layout = _layout_file(tmp_path, head_dim=8)
    target = widen(root, tmp_path / "wide", JOINT, layout=layout)
    source = open_checkpoint(root)
    assert (source.facts["global_step"], source.facts["zero_3"]) == (3, partitioned)

    def load(path: Path, name: str, slot: str) -> torch.Tensor:
        found = torch.load(path / "zero" / name / f"{slot}.pt", weights_only=True)
        assert isinstance(found, dict) is not partitioned
        assert not partitioned or found.dim() == 1
        return found if partitioned else found["param"]

    wide = GPT(WIDE)
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            parameter.copy_(load(target, name, "fp32").view_as(parameter))
    ids = batch(WIDE, 9)
    torch.testing.assert_close(wide(ids), model(ids), rtol=1e-5, atol=1e-5)
    for name, _ in wide.named_parameters():
        slots = ("exp_avg", "exp_avg_sq")
        old = {slot: load(root, name, slot) for slot in slots}
        check_moments(old, {slot: load(target, name, slot) for slot in slots}, name)
        if not partitioned:
            assert torch.load(target / "zero" / name / "step.pt", weights_only=True) == 3
    options = torch.load(target / "zero" / "optimizer_state.pt", weights_only=True)
    assert options["param_groups"] == [{"lr": 1e-3}]
    assert {state.scalars["step"] for state in source.states if state.tensors} == {3.0}
    if partitioned:  # what is left of the flat partitions is what DeepSpeed reads
        assert options["optimizer_state_dict"]["state"] == {0: {"step": torch.tensor(3.0)}}
        assert "fp32_flat_groups" not in options
    (states,) = target.glob("*_model_states.pt")
    found = torch.load(states, weights_only=True)
    shapes = dict(found["param_shapes"][0])
    assert shapes == {n: p.shape for n, p in wide.named_parameters()}
    if not partitioned:
        halves = {n: p.detach().bfloat16() for n, p in wide.state_dict().items()}
        for name, value in found["module"].items():
            torch.testing.assert_close(value, halves[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("partitioned", [False, True])
def test_dropped_state_restarts_the_counters(tmp_path: Path, partitioned: bool) -> None:
    """``drop`` zeroes moments and every step counter, also the one that ZeRO-3 keeps for all parameters."""
    root = tmp_path / "step3_universal"
    _universal(root, partitioned=partitioned)
    layout = _layout_file(tmp_path, head_dim=8)
    target = widen(root, tmp_path / "wide", JOINT, layout=layout, optimizer="drop", allow_locked=True)
    steps = list(target.glob("zero/*/step.pt"))
    assert bool(steps) is not partitioned
    assert all(torch.load(path, weights_only=True) == 0 for path in steps)
    if partitioned:
        options = torch.load(target / "zero" / "optimizer_state.pt", weights_only=True)
        assert options["optimizer_state_dict"]["state"][0]["step"] == 0
    for path in target.glob("zero/*/exp_avg*.pt"):
        found = torch.load(path, weights_only=True)
        assert not (found if partitioned else found["param"]).any()


def test_three_without_a_step(tmp_path: Path) -> None:
    """Under ZeRO-3 DeepSpeed resumes by one file's step: without it, nothing is written."""
    root = tmp_path / "step3_universal"
    _universal(root, partitioned=True)
    torch.save({"param_groups": []}, root / "zero" / "optimizer_state.pt")
    with pytest.raises(CheckpointError, match="with a step in it"):
        open_checkpoint(root)
    (root / "zero" / "optimizer_state.pt").unlink()
    with pytest.raises(CheckpointError, match="not finished"):
        open_checkpoint(root)


def test_flat_partitions_are_refused(tmp_path: Path) -> None:
    """The error names DeepSpeed's own converter, with the paths filled in."""
    root = tmp_path / "step3"
    root.mkdir()
    (root / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="ds_to_universal") as caught:
        open_checkpoint(root)
    assert str(root) in str(caught.value)


def test_unfinished_conversion(tmp_path: Path) -> None:
    """A folder without its fp32 weights is named."""
    _universal(tmp_path / "u", partitioned=False)
    (tmp_path / "u" / "zero" / "transformer.wpe.weight" / "fp32.pt").unlink()
    with pytest.raises(CheckpointError, match="wpe"):
        open_checkpoint(tmp_path / "u")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resumes_where_it_was(tmp_path: Path, stage: int) -> None:
    """ZeRO saved, converted, widened, loaded by ``load_universal``: the next losses are the source's."""
    pytest.importorskip("deepspeed", reason="DS_ACCELERATOR=cpu DS_BUILD_OPS=0 pip install deepspeed==0.19.8")
    from tests.formats import make_deepspeed as made

    deepspeed = made.start(tmp_path)
    config = GPTConfig()
    engine = made.engine_of(deepspeed, config, stage)
    made.train(engine, config, 3)
    engine.save_checkpoint(str(tmp_path / "run"), tag="step3")
    expected = made.train(engine, config, 2, first=3)
    source = made.convert(tmp_path / "run", "step3")
    (tmp_path / "out").mkdir()
    layout = _layout_file(tmp_path, head_dim=8)
    target = widen(source, tmp_path / "out" / "step3_universal", JOINT, layout=layout)
    (tmp_path / "out" / "latest_universal").write_text(target.name)
    wide = made.engine_of(deepspeed, WIDE, stage, universal=True)
    path, _ = wide.load_checkpoint(str(tmp_path / "out"))
    assert path is not None
    assert wide.global_steps == 3
    assert made.steps_of(wide) == {3.0}
    losses = made.train(wide, WIDE, 2, first=3)
    assert losses[0] == pytest.approx(expected[0], abs=0.02)
    assert losses[1] == pytest.approx(expected[1], abs=0.1)
    dropped = widen(
        source, tmp_path / "dropped" / target.name, JOINT, layout=layout, optimizer="drop", allow_locked=True
    )
    (tmp_path / "dropped" / "latest_universal").write_text(dropped.name)
    fresh = made.engine_of(deepspeed, WIDE, stage, universal=True)
    fresh.load_checkpoint(str(tmp_path / "dropped"))
    assert made.steps_of(fresh) == {0.0}
    assert made.train(fresh, WIDE, 1, first=3)[0] == pytest.approx(expected[0], abs=0.02)
