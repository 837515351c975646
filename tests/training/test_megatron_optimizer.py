"""Megatron's distributed optimizer over several processes, with masters: against separate parameters."""

from __future__ import annotations

from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch

from sparkling_cli.errors import SpecError
from sparkling_cli.training import rewarm
from tests.formats.make_dcp import on_ranks
from tests.formats.make_megatron import BUCKETS, Run, Sizes, World, gradient, save_both, without_cuda
from tests.formats.widening import tensors_of, widen
from tests.training import reference as ref

FIRST, STEPS, TAU, RHO = 3, 50, 6, 1.3
PEAK, MINIMUM, WARMUP, TOTAL = 1e-2, 1e-3, 2, 80
FFN, EXPERTS, LAYERS = 40, 4, 2
FFN_2 = {"ffn": 2.0}
MASTERS = "optimizer.state.param."
WORLDS = {
    "two processes": (World(2), Sizes(), 5000, FFN_2),
    "tensor parallel": (World(4, tensor=2), Sizes(), None, FFN_2),
    "pipeline": (World(2, pipeline=2), Sizes(), None, FFN_2),
    "experts": (World(2, expert=2), Sizes(experts=EXPERTS), None, FFN_2),
    "more experts": (World(2, expert=2), Sizes(experts=EXPERTS), None, {"experts": 2.0}),
    "more layers": (World(2, pipeline=2), Sizes(), None, {"layers": 2.0}),
}


def old_rate(step: int) -> float:
    """The run's cosine, after its warmup."""
    return MINIMUM + (PEAK - MINIMUM) * (1 + cos(pi * (step - WARMUP) / (TOTAL - WARMUP))) / 2


def new_rate(step: int) -> float:
    """Eq. 27-28 of the method."""
    begin, done = old_rate(FIRST), step - FIRST
    if done < TAU:
        return begin + (RHO - 1) * begin * done / TAU
    share = (1 + cos(pi * (done - TAU) / (TOTAL - FIRST - TAU))) / 2
    return MINIMUM + (RHO * begin - MINIMUM) * share


def run_legs(rank: int, root: str, path: str, name: str, stops: tuple[int, ...]) -> None:
    """Train on from a widened directory, in as many runs one after the other as there are stops."""
    without_cuda()
    first, (world, sizes, bucket, axes) = FIRST, WORLDS[name]
    grown = {axis: int(getattr(sizes, axis) * factor) for axis, factor in axes.items()}
    for number, last in enumerate(stops):
        run = Run(rank, world, sizes._replace(**grown), bucket)
        run.load(path)
        chain = run.optimizer.chained_optimizers
        several = [rewarm(o, [run.wrapped], f"{root}/wide", step=first, announce=False) for o in chain]
        for step in range(first, last):
            run.step(step, old_rate(step))
            assert {one.step for one in several} == {step + 1}
        assert several[0].metrics()["learning_rate_new"] == pytest.approx(new_rate(last - 1), rel=1e-9)
        first, path = last, f"{root}/{len(stops)}-{number}"
        run.save(path, BUCKETS, last)


def reference(path: Path, axes: dict[str, float]) -> dict[str, torch.Tensor]:
    """The same steps with old and new entries as separate parameters of torch's own AdamW."""
    found = tensors_of(path)
    weights = {k.removeprefix(MASTERS): value.clone() for k, value in found.items() if k.startswith(MASTERS)}
    groups: list[dict[str, Any]] = []
    parts, moments = {}, {}
    for key, value in weights.items():
        new = torch.zeros(value.shape, dtype=torch.bool)
        if "layers" in axes:
            if "decoder.layers." in key:
                new[LAYERS:] = True
        elif "experts" in axes:
            if ".mlp.experts." in key or ".router." in key:
                new[:, EXPERTS:] = True
        elif "linear_fc1.weight" in key:
            new[..., FFN : 2 * FFN, :] = new[..., 3 * FFN :, :] = True
        elif "linear_fc2" in key:
            new[..., FFN:] = True
        for mask in (~new, new):
            part = torch.nn.Parameter(value[mask].double())
            parts[key, bool(mask is new)] = (part, mask)
            groups.append({"params": [part], "weight_decay": 0.01, "new": mask is new})
            moments[part] = {
                s: found[f"optimizer.state.{s}.{key}"][mask].double() for s in ("exp_avg", "exp_avg_sq")
            }
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.999), eps=1e-8)
    for part, state in moments.items():
        optimizer.state[part] = {"step": torch.tensor(float(FIRST)), **state}
    for step in range(FIRST, FIRST + STEPS):
        for (key, _), (part, mask) in parts.items():
            part.grad = gradient(key, tuple(mask.shape), step)[mask].double()
        for group in optimizer.param_groups:
            group["lr"] = new_rate(step) if group["new"] else old_rate(step)
        optimizer.step()
    for (key, _), (part, mask) in parts.items():
        weights[key][mask] = part.detach().float()
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_equal_to_separate_parameters(tmp_path: Path, name: str) -> None:
    """Fifty steps to the rounding of float32; left after twenty and taken up again, bit for bit."""
    pytest.importorskip("megatron.core", reason="pip install megatron-core==0.16.1")
    world, sizes, bucket, axes = WORLDS[name]
    on_ranks(world.ranks, save_both, str(tmp_path), world, sizes, bucket)
    places = {"at": "end"} if "layers" in axes else {}
    wide = widen(tmp_path / BUCKETS, tmp_path / "wide", axes, rewarmup={"steps": TAU, "rho": RHO}, **places)
    last = FIRST + STEPS
    found = {}
    for stops in ((last,), (FIRST + 20, last)):
        on_ranks(world.ranks, run_legs, str(tmp_path), str(wide), name, stops)
        found[len(stops)] = tensors_of(tmp_path / f"{len(stops)}-{len(stops) - 1}")
    for key, value in found[1].items():
        assert torch.equal(found[2][key], value), key
    before = tensors_of(wide)
    for key, value in reference(wide, axes).items():
        moved = (value - before[MASTERS + key]).abs().max()
        assert (found[1][MASTERS + key] - value).abs().max() <= 1e-5 * moved, key
        assert torch.equal(found[1][key], found[1][MASTERS + key].bfloat16()), key


def test_masters_elsewhere_are_refused() -> None:
    """By the option's name, before anything is attached."""

    class Distributed:
        gbuf_ranges, model_param_group_index_map = (), {}
        config = type("", (), {"use_precision_aware_optimizer": True})

    with pytest.raises(SpecError, match="with use_precision_aware_optimizer") as refused:
        rewarm(Distributed(), [], ref.history())  # type: ignore[arg-type]
    assert "--use-precision-aware-optimizer" in str(refused.value.hint)
