"""Old entries of Muon's matrices step as far as before, against the real optimizers scaled by hand."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from sparkling_cli import api
from sparkling_cli.errors import SparklingError, SpecError
from sparkling_cli.outcome import write_schedule
from sparkling_cli.results.expansion import Report
from sparkling_cli.schedule.rewarmup import Rewarmup, add_stage, read_rewarmup
from sparkling_cli.storage.sidecar import REPORT_JSON
from sparkling_cli.training import rewarm
from tests.training import optimizers as opt
from tests.training import reference as ref
from tests.training.optimizers import CASES, Case
from tests.training.test_optimizers import FFN, gradient, narrow, needs

#: what every variant multiplies an orthogonal update by, written out again
BY_SHAPE: dict[str | None, Callable[[int, int], float]] = {
    None: lambda a, b: max(1, a / b) ** 0.5,
    "match_rms_adamw": lambda a, b: 0.2 * max(a, b) ** 0.5,
}


def rewarmup(**options: Any) -> Rewarmup:
    """One expansion at step TE that keeps the step."""
    return add_stage(None, ref.BASE, ref.TE, rho=1.3, steps=20, keep_step=True, **options)


def before(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns before the expansion."""
    sizes = {ref.H: ref.H0, ref.F: ref.F0, 2 * ref.F: 2 * ref.F0}
    rows, columns = (sizes.get(size, size) for size in shape)
    return rows, columns


@pytest.mark.parametrize("adjust", BY_SHAPE)
def test_100_steps_equal_muon_scaled_by_hand(adjust: str | None) -> None:
    """A second model is stepped by torch's Muon; its update is scaled, then that of new entries (1e-10)."""
    net = ref.model()
    matrices = {n: p for n, p in net.named_parameters() if p.ndim == 2}
    mirror = {n: p.detach().clone().requires_grad_() for n, p in matrices.items()}

    def make(params: Any) -> Optimizer:
        return torch.optim.Muon(params, lr=ref.BASE.peak, weight_decay=0.1, adjust_lr_fn=adjust)

    optimizer, reference = make(matrices.values()), make(mirror.values())
    sched, ref_sched = ref.scheduler(optimizer, ref.TE), ref.scheduler(reference, ref.TE)
    rewarm(optimizer, net, ref.history_of(rewarmup()))
    masks, adjusted = ref.new_masks(), BY_SHAPE[adjust]
    furthest = 0.0
    for step in range(ref.TE, ref.TE + 100):
        optimizer.zero_grad()
        net(ref.data(step)).backward()
        start = {n: p.detach().clone() for n, p in mirror.items()}
        for n, p in mirror.items():
            p.grad = matrices[n].grad.clone()
        optimizer.step()
        reference.step()
        rate = ref.BASE(step)
        for n, p in mirror.items():
            if not masks[n].any():
                continue
            shrunk = start[n] * (1 - 0.1 * rate)
            update = p.detach() - shrunk
            (a, b), (a0, b0) = p.shape, before(p.shape)
            wanted = adjusted(a0, b0) * sqrt(min(a0, b0) / (a0 * b0))
            nominal = adjusted(a, b) * sqrt(min(a, b) / (a * b))
            share = float(update.square().mean().sqrt() / update[~masks[n]].square().mean().sqrt())
            factor = wanted / nominal * share
            furthest = max(furthest, abs(factor - 1))
            whole = shrunk + factor * update
            moved = start[n] + ref.eta_new(step) / rate * (whole - start[n])
            p.data = torch.where(masks[n], moved, whole)
        sched.step()
        ref_sched.step()
    assert ref.distance({n: p.detach() for n, p in matrices.items()}, mirror) < 1e-10
    assert furthest > 0.05


def expanded(case: Case, root: Path, *, keep: bool) -> Path:
    """A checkpoint after twelve steps of real training, widened."""
    source = root / "narrow"
    if not source.exists():
        narrow(case, source)
    schedule = {
        "type": "constant",
        "warmup_steps": 0,
        "peak": 1e-3,
        "total_steps": 99,
        "expansion_step": 12,
    }
    wide = root / f"wide-{keep}"
    fields = {"baseline": schedule, "rewarmup": {"keep_step": keep}}
    api.expand(source, wide, axes=FFN, report="none", **fields)
    return wide


def lengths(root: Path, case: Case, *, attach: bool) -> dict[str, list[float]]:
    """RMS of the updates of the narrow model's entries in ten steps, of every matrix that grows."""
    net, made = opt.resumed(root, case)
    if attach:
        rewarm(made, [(n, p) for n, p in net.named_parameters() if p.ndim == 2], root, announce=False)
    found: dict[str, list[float]] = {}
    for update in opt.updates(net, made, case, gradient):
        for name, value in update.items():
            if "mlp" in name:
                old = value[: opt.FFN] if "down" not in name else value[:, : opt.FFN]
                found.setdefault(name, []).append(float(old.square().mean().sqrt()))
    return found


MUONS = [case for case in CASES if "Muon" in case.name]


@pytest.mark.parametrize("case", MUONS, ids=[case.name for case in MUONS])
def test_old_entries_step_as_far_as_in_the_narrow_run(case: Case, tmp_path: Path) -> None:
    """From the first step on, to Newton-Schulz's own error; without it by up to a third less or more."""
    needs(case)
    wide, plain = (expanded(case, tmp_path, keep=keep) for keep in (True, False))
    assert read_rewarmup(wide).kept_since == 1 and read_rewarmup(plain).kept_since is None
    wanted = lengths(tmp_path / "narrow", case, attach=False)
    for root, near in ((wide, True), (plain, False)):
        found = lengths(root, case, attach=True)
        off = max(abs(a / b - 1) for name in wanted for a, b in zip(found[name], wanted[name], strict=True))
        assert (off < 0.06) == near, (root, off)
        assert near or off > 0.15


class Halved(Optimizer):
    """Orthogonalizes, by a rule of its own."""

    def __init__(self, params: Any, decay: float = 0.0) -> None:
        super().__init__(params, {"lr": 1e-3, "ns_steps": 5, "weight_decay": decay})

    def scale(self, shape: torch.Size) -> float:
        """Like no known one."""
        return float(shape[0]) ** 2

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Of every matrix."""
        for group in self.param_groups:
            for p in group["params"]:
                u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
                p.sub_(u @ v + group["weight_decay"] * p.square(), alpha=group["lr"] * self.scale(p.shape))


class Squared(Halved):
    """A known rule, and a weight decay of its own."""

    def scale(self, shape: torch.Size) -> float:
        """Moonlight's."""
        return float(max(shape)) ** 0.5


def test_what_is_not_known_is_refused() -> None:
    """Another rule by shape, another weight decay, matrices in parts, coarse dtypes; each by its name."""
    net, history = ref.model(), ref.history_of(rewarmup())
    matrices = [p for p in net.parameters() if p.ndim == 2]
    with pytest.raises(SparklingError, match=r"Halved steps 32 x 128 and 128 x 32 matrices .* times as far"):
        rewarm(Halved(matrices), net, history)
    with pytest.raises(SparklingError, match="Squared has a weight decay"):
        rewarm(Squared(matrices, decay=0.1), net, history)
    rewarm(Squared(matrices), net, history).remove()
    with pytest.raises(SparklingError, match=r"Squared orthogonalizes a tensor of shape \(2, 24, 8\)"):
        rewarm(Squared([net.experts]), net, history)
    coarse = ref.model(dtype=torch.bfloat16)
    with pytest.raises(SparklingError, match=r"Muon steps torch\.bfloat16 parameters"):
        rewarm(torch.optim.Muon([p for p in coarse.parameters() if p.ndim == 2]), coarse, history)


def test_probing_leaves_the_optimizer_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """State, groups, the scheduler's count and the parameters are as they were; the line says how many."""
    net = ref.model()
    matrices = [p for p in net.parameters() if p.ndim == 2]
    muon, adam = torch.optim.Muon(matrices), AdamW([p for p in net.parameters() if p.ndim != 2])
    sched = ref.scheduler(muon, 0)
    start, groups, count = ref.parameters(net), dict(muon.param_groups[0]), sched.last_epoch
    rewarm([muon, adam], net, ref.history_of(rewarmup()))
    assert capsys.readouterr().err.endswith("; old entries' step is kept in 4 tensors\n")
    assert ref.distance(ref.parameters(net), start) == 0 and not muon.state
    assert muon.param_groups[0] == groups and sched.last_epoch == count


def test_asked_for_where_it_means_nothing(tmp_path: Path) -> None:
    """AdamW, SGD, and a second expansion that would give it up."""
    adam = next(case for case in CASES if case.name == "AdamW (torch)")
    with pytest.raises(SpecError, match=r"--keep-step is for Muon.*exp_avg"):
        expanded(adam, tmp_path / "adam", keep=True)
    sgd = Case("SGD", "torch", opt.of("torch.optim", "SGD", lr=1e-3, momentum=0.9), "")
    with pytest.raises(SpecError, match=r"--keep-step is for Muon.*momentum_buffer"):
        expanded(sgd, tmp_path / "sgd", keep=True)
    case = next(case for case in CASES if case.name == "Muon (torch)")
    wide = expanded(case, tmp_path, keep=True)
    with pytest.raises(SpecError, match="expansion 1 of this run was made with --keep-step"):
        api.make_plan(wide, axes=FFN)
    with pytest.raises(SpecError, match="schedule"):  # nothing to write it into
        api.make_plan(tmp_path / "narrow", axes=FFN, keep_step=True)


def test_an_output_that_exists_is_given_it(tmp_path: Path) -> None:
    """Once, and the recorded command says so once."""
    case = next(case for case in CASES if case.name == "Muon (torch)")
    wide = expanded(case, tmp_path, keep=False)
    commands = []
    for changes in ({"keep_step": True}, {"keep_step": True, "rho": 1.25}):
        write_schedule(wide, {"rewarmup": changes})
        commands.append(Report.read((wide / REPORT_JSON).read_bytes(), REPORT_JSON).command)
    assert read_rewarmup(wide).kept_since == 1
    assert commands[0].count("--keep-step") == commands[1].count("--keep-step") == 1
    assert "--rho 1.25" in commands[1] and commands[1].replace(" --rho 1.25", "") == commands[0]


def test_without_a_gradient_nothing_moves() -> None:
    """Neither by the optimizer, weight decay included, nor by what is scaled."""
    net = ref.model()
    muon = torch.optim.Muon([net.up.weight, net.down.weight], lr=1.0, weight_decay=0.1)
    rewarm(muon, net, ref.history_of(rewarmup()), announce=False)
    net.up.weight.grad = torch.randn_like(net.up.weight)
    before = ref.parameters(net)
    muon.step()
    assert torch.equal(net.down.weight, before["down.weight"])
    assert not torch.equal(net.up.weight, before["up.weight"])


def test_frozen_old_entries_do_not_throw_new_ones() -> None:
    """Without gradients of their own they are left where they are, within twice the step by shape."""
    found = []
    for keep in (False, True):
        weight = nn.Parameter(torch.ones(ref.H, ref.F, dtype=torch.float64))
        muon = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0)
        history = ref.history_of(add_stage(None, ref.BASE, ref.TE, rho=1.0, steps=0, keep_step=keep))
        rewarm(muon, [("down.weight", weight)], history, announce=False)
        weight.grad = torch.zeros_like(weight)
        weight.grad[ref.H0 :, ref.F0 :] = torch.eye(ref.H - ref.H0, ref.F - ref.F0)
        muon.step()
        found.append(weight.detach() - 1)
    assert not found[1][: ref.H0, : ref.F0].any()
    assert float(found[1].abs().max()) <= 2 * sqrt(ref.F / ref.F0) * float(found[0].abs().max())


def test_two_expansions_are_kept_since_the_first() -> None:
    """The oldest entries step as they did before the first; what each added is re-warmed on its own."""
    births = {"hidden": [[0, 5, 0], [5, ref.H, 2]], "ffn": [[0, 6, 0], [6, 9, 1], [9, ref.F, 2]]}
    both = add_stage(rewarmup(), ref.BASE, ref.TE + 50, rho=1.0, steps=0, keep_step=True)
    history = ref.history_of(both)
    history = type(history)(history.layout, births, both)
    assert history.shape_before("down.weight", 1) == (5, 6)
    assert history.shape_before("down.weight", 2) == (5, 9)
    weight = nn.Parameter(torch.randn(ref.H, ref.F, dtype=torch.float64))
    muon = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0)
    rewarm(muon, [("down.weight", weight)], history)
    start = weight.detach().clone()
    muon.state[weight]["momentum_buffer"] = torch.randn_like(weight)
    weight.grad = torch.randn_like(weight)
    muon.step()
    oldest: Tensor = (weight.detach() - start)[:5, :6]
    whole = 1 / sqrt(ref.F)  # of an orthogonal 8 x 12 matrix
    assert float(oldest.square().mean().sqrt()) == pytest.approx(1 / sqrt(6), rel=0.15)
    assert 1 / sqrt(6) / whole > 1.4
