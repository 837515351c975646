"""Learning-rate curves against the equations in high precision and against transformers' schedules."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal, getcontext
from itertools import pairwise
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

import sparkling_cli
from sparkling_cli.errors import CheckpointError, SpecError
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.formats.model import Checkpoint, ParamState
from sparkling_cli.outcome import write_schedule
from sparkling_cli.results.expansion import Report
from sparkling_cli.schedule import write
from sparkling_cli.schedule.baseline import baseline_of, doubts, example, example_words, schedule_command
from sparkling_cli.schedule.curves import Curve, Rewarmed, fresh_factor
from sparkling_cli.schedule.rewarmup import add_stage, from_data, read_rewarmup
from sparkling_cli.schedule.write import notes, plan_rewarmup, remarks, rewarmup_files
from sparkling_cli.spec.model import BaselineSpec, ExpansionSpec
from sparkling_cli.storage.sidecar import CURVE, REPORT_JSON, REWARMUP

getcontext().prec = 60


def exact_cos(x: Decimal) -> Decimal:
    """The cosine by its series, to 50 digits (|x| <= pi)."""
    total = term = Decimal(1)
    for n in range(1, 60):
        term = -term * x * x / ((2 * n - 1) * (2 * n))
        total += term
    return total


PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")


def exact_f(t: int, tw: int, total: int, e0: Decimal, emax: Decimal, emin: Decimal) -> Decimal:
    """Eq. 25-26 as the paper has them."""
    if t < tw:
        return e0 + (emax - e0) * t / tw
    return emin + (emax - emin) * (1 + exact_cos(PI * (t - tw) / (total - tw))) / 2


@pytest.mark.parametrize(
    ("tw", "total", "te", "rho", "tau", "floor"),
    [
        (90, 3000, 1500, 1.3, 25, 1e-5),
        (36, 1200, 600, 1.3, 250, 4e-5),
        (0, 1000, 100, 1.25, 0, 1e-6),
        (300, 10_000, 9000, 2.0, 250, 2e-5),
        (100, 1000, 50, 1.3, 10, 1e-5),
    ],
)
def test_eq_25_to_28(tw: int, total: int, te: int, rho: float, tau: int, floor: float) -> None:
    """Old and new entries' rates equal the equations, computed in 60 digits, to 1e-12 relative."""
    peak = 1.9556e-3
    base = Curve("cosine", peak, floor, 0.0, tw, total)
    new = Rewarmed(base, te, rho, tau)
    d = {k: Decimal(v) for k, v in {"peak": peak, "floor": floor, "rho": rho}.items()}
    eta_e = exact_f(te, tw, total, Decimal(0), d["peak"], d["floor"])
    for t in [*range(te, min(te + 2 * tau + 3, total)), *range(te, total + 1, 97), total]:
        old_wanted = exact_f(t, tw, total, Decimal(0), d["peak"], d["floor"])
        new_wanted = exact_f(t - te, tau, total - te, eta_e, d["rho"] * eta_e, d["floor"])
        assert abs(Decimal(base(t)) / old_wanted - 1) < Decimal("1e-12")
        assert abs(Decimal(new(t - te)) / new_wanted - 1) < Decimal("1e-12")


def test_cosine_without_a_floor_ends_at_zero() -> None:
    """With emin = 0 the agreement is to 1e-12 of the peak (the equation itself cancels near the end)."""
    base = Curve("cosine", 1e-3, 0.0, 0.0, 10, 500)
    for t in range(501):
        wanted = exact_f(t, 10, 500, Decimal(0), Decimal("0.001"), Decimal(0))
        assert abs(Decimal(base(t)) - wanted) < Decimal("1e-15")
    assert base(500) == 0.0


#: every schedule of transformers' table that does not follow a metric, with arguments that change it
KWARGS: dict[str, list[dict[str, Any]]] = {
    "linear": [{}],
    "constant": [{}],
    "constant_with_warmup": [{}],
    "cosine": [{}, {"num_cycles": 1.5}, {"num_cycles": 0.25}],
    "cosine_with_min_lr": [{"min_lr_rate": 0.1}, {"min_lr": 2e-5}, {"min_lr": 2e-5, "num_cycles": 2.5}],
    "cosine_warmup_with_min_lr": [
        {"min_lr_rate": 0.1},
        {"min_lr": 2e-5, "warmup_lr_rate": 0.3},
        {"min_lr_rate": 0.05, "warmup_lr_rate": 0.01, "num_cycles": 1.5},
    ],
    "cosine_with_restarts": [{}, {"num_cycles": 3}],
    "polynomial": [{}, {"lr_end": 1e-5}, {"power": 2.0}, {"power": 0.5, "lr_end": 1e-6}],
    "inverse_sqrt": [{}, {"timescale": 500}],
    "warmup_stable_decay": [
        {"num_decay_steps": 40},
        {"num_decay_steps": 60, "decay_type": "linear", "min_lr_ratio": 0.05},
        {"num_decay_steps": 30, "decay_type": "1-sqrt", "min_lr_ratio": 0.1},
        {"num_decay_steps": 60, "num_stable_steps": 50, "min_lr_ratio": 0.1},
        {"num_decay_steps": 60, "num_stable_steps": 20, "decay_type": "linear"},
        {"num_decay_steps": 0, "num_stable_steps": 60, "min_lr_ratio": 0.2},
        {"num_decay_steps": 400, "num_stable_steps": 10},
        {"num_decay_steps": 195},
        {"num_decay_steps": 90, "num_cycles": 1.5, "min_lr_ratio": 0.1},
        {"num_decay_steps": 40, "warmup_type": "cosine", "min_lr_ratio": 0.1},
        {"num_decay_steps": 40, "warmup_type": "1-sqrt"},
    ],
}
BY_METRIC = {"reduce_lr_on_plateau", "greedy"}
HF = [(name, kwargs) for name, several in KWARGS.items() for kwargs in several]


def test_the_whole_table_is_covered() -> None:
    """No schedule of the installed transformers is left out of the comparison, but those by a metric."""
    names = {name.value for name in TYPE_TO_SCHEDULER_FUNCTION}
    assert names - BY_METRIC == set(KWARGS)


def checkpoint(**facts: Any) -> Checkpoint:
    """A checkpoint that knows these facts and nothing else."""
    state = ParamState("w", {"exp_avg": "a", "exp_avg_sq": "b"}, {"step": 50.0})
    return Checkpoint(
        Path("checkpoint-50"), "trainer", {}, {}, (state,), ({"betas": (0.9, 0.999)},), facts=facts
    )


def real_rates(name: str, kwargs: dict[str, Any], peak: float, warmup: int, total: int) -> list[float]:
    """The rates that transformers' own scheduler gives, for every number of steps done."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(name, optimizer, warmup, total, dict(kwargs))
    rates = []
    for _ in range(total + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def source_of(name: str, kwargs: dict[str, Any], peak: float, warmup: int, total: int, at: int) -> Checkpoint:
    """A checkpoint whose training arguments ask for that schedule."""
    schedule = {"type": name, "warmup_steps": warmup, "peak": peak, "minimum": None, "kwargs": kwargs}
    return checkpoint(global_step=at, max_steps=total, schedule=schedule)


@pytest.mark.parametrize("warmup", [13, 2, 0])
@pytest.mark.parametrize(("name", "kwargs"), HF)
def test_baselines_are_transformers_schedules(name: str, kwargs: dict[str, Any], warmup: int) -> None:
    """What is read of a run's facts gives the rates that transformers' own scheduler gives, step by step."""
    peak, total = 7e-4, 200
    curve, step = baseline_of(source_of(name, kwargs, peak, warmup, total, 5), BaselineSpec())
    assert step == 5
    assert curve.total_steps == total
    for t, rate in enumerate(real_rates(name, kwargs, peak, warmup, total)):
        assert curve(t) == pytest.approx(rate, rel=1e-12, abs=1e-19)


def remaining_fall(name: str, kwargs: dict[str, Any], total: int, te: int) -> Callable[[float], float] | None:
    """The shape of what remains, if it is one fall that ends with the run."""

    def cosine(x: float) -> float:
        return (1 + cos(pi * x)) / 2

    if name in ("linear", "polynomial"):
        return lambda x: (1 - x) ** float(kwargs.get("power", 1.0))
    if name.startswith("cosine"):
        return None if "num_cycles" in kwargs else cosine
    if {"num_stable_steps", "num_cycles"} & set(kwargs) or te < total - kwargs.get("num_decay_steps", 0):
        return None
    return {"linear": lambda x: 1 - x, "1-sqrt": None}.get(kwargs.get("decay_type", ""), cosine)


@pytest.mark.parametrize(("name", "kwargs"), HF)
@pytest.mark.parametrize("te", [20, 90, 165])
def test_the_ratio_is_no_accident(name: str, kwargs: dict[str, Any], te: int) -> None:
    """On the real scheduler's rates: Eq. 27-28 where one fall remains, else rho after the re-warmup.

    Written out here from the rates of the scheduler itself, not from the curve under test.
    """
    peak, warmup, total, rho, tau = 7e-4, 13, 200, 1.3, 8
    real = real_rates(name, kwargs, peak, warmup, total)
    if real[te] == 0:
        pytest.skip("the rate at the expansion is zero: refused")
    curve, _ = baseline_of(source_of(name, kwargs, peak, warmup, total, te), BaselineSpec())
    made = add_stage(None, curve, te, rho=rho, steps=tau)
    shape = remaining_fall(name, kwargs, total, te)
    ratio_of_floor = kwargs.get("min_lr_rate", kwargs.get("min_lr_ratio", 0.0))
    floor = kwargs.get("min_lr", peak * ratio_of_floor)
    if name == "polynomial":
        floor = kwargs.get("lr_end", 1e-7)
    for t in range(te, total):
        ratio = made.curves[0].ratio(t)
        if real[t] == 0:
            assert ratio == 1.0
        elif shape is None:
            assert ratio == pytest.approx(1 + 0.3 * min(1, (t - te) / tau), rel=1e-12)
        elif t - te < tau:
            assert ratio * real[t] == pytest.approx(real[te] * (1 + 0.3 * (t - te) / tau), rel=1e-12)
        else:
            left = shape((t - te - tau) / (total - te - tau))
            wanted = floor + (rho * real[te] - floor) * left
            assert ratio * real[t] == pytest.approx(wanted, rel=1e-9)


def test_a_stable_phase_of_a_given_length() -> None:
    """Warmup 2, stable 4, decay 6 of 20 steps: the decay is 6 to 12, and the ratio 1.3 throughout it."""
    kwargs = {"num_stable_steps": 4, "num_decay_steps": 6, "min_lr_ratio": 0.1}
    source = source_of("warmup_stable_decay", kwargs, 1e-3, 2, 20, 4)
    spec = ExpansionSpec(**SPEC, rewarmup={"steps": 2})
    made = plan_rewarmup(source, spec)
    assert [made.baseline(t) for t in (4, 5, 6)] == [1e-3] * 3
    assert made.baseline(9) == pytest.approx(0.55e-3)
    assert [made.baseline(t) for t in range(12, 21)] == pytest.approx([1e-4] * 9)
    ratios = [made.curves[0].ratio(t) for t in range(4, 21)]
    assert ratios == pytest.approx([1.0, 1.15] + [1.3] * 15)


@pytest.mark.parametrize("name", sorted(BY_METRIC))
def test_schedules_that_follow_a_metric(name: str) -> None:
    """They cannot be known in advance; a described one takes their place."""
    source = checkpoint(global_step=5, max_steps=90, schedule={"type": name, "peak": 1e-3, "kwargs": {}})
    with pytest.raises(SpecError, match=f"{name}.*metric"):
        baseline_of(source, BaselineSpec())
    curve, _ = baseline_of(source, BaselineSpec(type="constant", warmup_steps=0))
    assert curve(60) == 1e-3


def test_absolute_rates_under_rates_by_group() -> None:
    """Transformers divides ``min_lr`` by the optimizer's default rate, whatever its groups have."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (2e-3, 1e-3)]
    optimizer = torch.optim.SGD(groups, lr=1e-3)
    scheduler = get_scheduler("cosine_with_min_lr", optimizer, 10, 100, {"min_lr": 1e-4})
    facts: dict[str, Any] = {
        "global_step": 5, "max_steps": 100, "base_lrs": [2e-3, 1e-3],
        "schedule": {
            "type": "cosine_with_min_lr", "warmup_steps": 10, "peak": 2e-3, "kwargs": {"min_lr": 1e-4},
        },
    }  # fmt: skip
    curve, _ = baseline_of(checkpoint(**facts, training_args={"learning_rate": 1e-3}), BaselineSpec())
    for t in range(100):
        assert curve(t) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()
    with pytest.raises(SpecError, match="minimum cannot be read"):
        baseline_of(checkpoint(**facts, training_args={"learning_rate": 5e-3}), BaselineSpec())


def test_the_schedulers_own_record_is_believed() -> None:
    """A run whose scheduler was not made from its training arguments is no cosine, whatever these say."""
    facts: dict[str, Any] = {
        "global_step": 50, "max_steps": 200, "last_epoch": 50, "base_lrs": [1e-3, 2e-3], "schedule": SCHEDULE,
    }  # fmt: skip
    right = 0.5 * (1 + cos(pi * 40 / 190))
    curve, _ = baseline_of(checkpoint(**facts, last_lrs=[1e-3 * right, 2e-3 * right]), BaselineSpec())
    assert curve(50) == pytest.approx(1e-3 * right)
    with pytest.raises(SpecError, match=r"at step 50 .* another scheduler"):
        baseline_of(checkpoint(**facts, last_lrs=[1e-3, 2e-3]), BaselineSpec())
    described = BaselineSpec(type="constant", warmup_steps=10)
    assert baseline_of(checkpoint(**facts, last_lrs=[1e-3, 2e-3]), described)[0].type == "constant"


class _Halved:
    """A scheduler of somebody's own, whose state says nothing that is known."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.rate = optimizer, optimizer.param_groups[0]["lr"] / 2

    def step(self, _: float | None = None) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate

    def state_dict(self) -> dict[str, Any]:
        return {"rate": self.rate}


def _sequential(optimizer: torch.optim.Optimizer) -> Any:
    parts = [schedulers.LinearLR(optimizer, 0.1, 1, 3), schedulers.ConstantLR(optimizer, 1.0, 1)]
    return schedulers.SequentialLR(optimizer, parts, [3])


def _chained(optimizer: torch.optim.Optimizer) -> Any:
    parts = [schedulers.ConstantLR(optimizer, 1.0, 1), schedulers.ExponentialLR(optimizer, 0.999)]
    return schedulers.ChainedScheduler(parts)


@pytest.mark.parametrize(
    "make", [_sequential, _chained, schedulers.ReduceLROnPlateau, _Halved], ids=lambda make: make.__name__
)
def test_schedulers_without_base_rates(dense_checkpoint: Path, tmp_path: Path, make: Any) -> None:
    """A run's own scheduler, beside training arguments that still say cosine: its last rates contradict."""
    source = tmp_path / "own"
    shutil.copytree(dense_checkpoint, source)
    steps = int(open_checkpoint(source).facts["global_step"])
    tree = torch.load(source / "optimizer.pt", weights_only=True)
    groups = [{"params": [torch.zeros(1)], "lr": 0.004} for _ in tree["param_groups"]]
    optimizer = torch.optim.SGD(groups)
    scheduler = make(optimizer)
    for _ in range(steps):
        optimizer.step()
        scheduler.step(*([1.0] if make is schedulers.ReduceLROnPlateau else []))
    for saved, group in zip(tree["param_groups"], optimizer.param_groups, strict=True):
        saved["lr"] = group["lr"]
    torch.save(tree, source / "optimizer.pt")
    torch.save(scheduler.state_dict(), source / "scheduler.pt")
    with pytest.raises(SpecError, match=rf"at step {steps} .* {group['lr']:.6g}, .* another scheduler"):
        baseline_of(open_checkpoint(source), BaselineSpec())


@pytest.mark.parametrize(("decay", "half"), [("linear", 0.5), ("cosine", 0.5), ("1-sqrt", 1 - 0.5**0.5)])
def test_a_described_decay(decay: str, half: float) -> None:
    """``--schedule wsd --decay linear``: the shape of the last steps, for trainers that write no schedule."""
    given = BaselineSpec(
        type="wsd",
        peak=2e-3,
        warmup_steps=10,
        total_steps=100,
        decay_steps=40,
        decay=decay,
        expansion_step=30,
    )
    curve, _ = baseline_of(checkpoint(), given)
    assert curve(60) == 2e-3
    assert curve(80) == pytest.approx(2e-3 * half)
    assert curve(100) == 0.0


def test_other_shapes_begin_anew() -> None:
    """Linear falls to emin, constant stays at rho eta_e, wsd keeps rho through its decay."""
    linear = Rewarmed(Curve("linear", 1e-3, 1e-4, 0.0, 10, 110), 60, 1.3, 5)
    eta_e = 1e-4 + 9e-4 * 0.5
    assert linear(0) == pytest.approx(eta_e)
    assert linear(5) == pytest.approx(1.3 * eta_e)
    assert linear(27.5) == pytest.approx(1e-4 + (1.3 * eta_e - 1e-4) / 2)
    assert linear(50) == pytest.approx(1e-4)
    constant = Rewarmed(Curve("constant", 1e-3, 0.0, 0.0, 10, 110), 60, 1.3, 5)
    assert constant(5) == constant(50) == pytest.approx(1.3e-3)
    base = Curve("wsd", 1e-3, 0.0, 0.0, 10, 110, 20)
    wsd = Rewarmed(base, 60, 1.3, 5)
    for t in range(65, 110):
        assert wsd(t - 60) / base(t) == pytest.approx(1.3)
    inside = Rewarmed(base, 100, 1.3, 4)
    assert inside(4) == pytest.approx(1.3 * base(100)) and inside(10) == 0.0


@pytest.mark.parametrize(
    ("facts", "given", "message"),
    [
        ({}, {}, "type, peak, total_steps, expansion_step, warmup_steps"),
        (
            {"global_step": 5, "max_steps": 9, "schedule": {"type": "inverse_sqrt", "peak": 1.0}},
            {},
            "inverse_sqrt",
        ),
        ({"global_step": 9, "max_steps": 9}, {"type": "linear", "peak": 1, "warmup_steps": 0}, "over"),
        ({"global_step": 0, "max_steps": 9}, {"type": "linear", "peak": 1, "warmup_steps": 2}, "zero"),
        ({"global_step": 5, "max_steps": 9}, {"type": "wsd", "peak": 1, "warmup_steps": 2}, "decay_steps"),
    ],
)
def test_what_cannot_be_known_is_asked_for(
    facts: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    """An unknown schedule is an error that names what is missing, never a guess."""
    with pytest.raises(SpecError, match=message):
        baseline_of(checkpoint(**facts), BaselineSpec(**given))


def test_options_win_over_files() -> None:
    """A stated field replaces the one that was read; the others stay."""
    schedule = {"type": "cosine", "warmup_steps": 10, "peak": 1e-3, "minimum": 0.0, "kwargs": {}}
    source = checkpoint(global_step=50, max_steps=200, schedule=schedule)
    curve, _ = baseline_of(source, BaselineSpec(total_steps=300, minimum=1e-5))
    assert curve == Curve("cosine", 1e-3, 1e-5, 0.0, 10, 300)


def test_fresh_factor_undoes_adam() -> None:
    """At a steady gradient the factor makes an update with zero moments and an old counter a fresh one."""
    for beta1, beta2 in [(0.9, 0.95), (0.9, 0.999)]:
        for n0 in (40, 5000):
            m = v = 0.0
            for k in range(1, 200):
                m, v = beta1 * m + (1 - beta1), beta2 * v + (1 - beta2)
                n = n0 + k
                update = (m / (1 - beta1**n)) / (v / (1 - beta2**n)) ** 0.5
                assert update * fresh_factor(beta1, beta2, k, n) == pytest.approx(1.0, rel=1e-9)
    assert 1 / fresh_factor(0.9, 0.999, 1) == pytest.approx(3.16, abs=0.01)
    worst = max(1 / fresh_factor(0.9, 0.999, k) for k in range(1, 200))
    assert 6.5 < worst < 6.7
    assert max(1 / fresh_factor(0.9, 0.95, k) for k in range(1, 200)) < 1.15


SCHEDULE = {"type": "cosine", "warmup_steps": 10, "peak": 1e-3, "minimum": None, "kwargs": {}}
SPEC = {"axes": [{"axis": "ffn", "factor": 2}]}


def test_files_hold_the_curve_step_by_step(tmp_path: Path) -> None:
    """The CSV has the curve that follows from the JSON, and the JSON reads back as it was."""
    spec = ExpansionSpec(**SPEC, rewarmup={"rho": 1.3, "steps": 20, "bias_correction": "fresh"})
    made = plan_rewarmup(checkpoint(global_step=50, max_steps=200, schedule=SCHEDULE), spec)
    files = rewarmup_files(made)
    data = json.loads(files[REWARMUP])
    assert from_data(data, "x") == made
    rows = list(csv.DictReader(io.StringIO(files[CURVE].decode())))
    assert [int(r["step"]) for r in rows] == list(range(50, 201))
    curve = made.curves[0]
    for i, row in enumerate(rows):
        t = int(row["step"])
        assert float(row["eta_old"]) == made.baseline(t)
        assert float(row["eta_new"]) == curve.eta_new(t)
        assert float(row["ratio"]) == curve.ratio(t)
        assert float(row["correction"]) == fresh_factor(0.9, 0.999, i + 1)
        if float(row["eta_old"]) > 0:
            assert float(row["ratio"]) == float(row["eta_new"]) / float(row["eta_old"])
    assert len(files[REWARMUP]) < 1000  # the closed form, however long the run
    assert float(rows[0]["ratio"]) == 1.0
    assert float(rows[20]["eta_new"]) == pytest.approx(1.3 * made.baseline(50))
    (tmp_path / "sparkling").mkdir()
    (tmp_path / REWARMUP).write_bytes(files[REWARMUP])
    assert read_rewarmup(tmp_path) == made


def test_a_second_expansion_keeps_the_first_ones_curve() -> None:
    """Stage one's rate goes on where it was while stage two begins anew."""
    base = Curve("cosine", 1e-3, 1e-5, 0.0, 10, 400)
    first = add_stage(None, base, 100, rho=1.3, steps=20)
    both = add_stage(first, base, 250, rho=1.5, steps=10)
    assert [s.stage for s in both.stages] == [1, 2]
    for t in range(250, 400):
        assert both.curves[0].ratio(t) == first.curves[0].ratio(t)
    assert both.curves[1].ratio(250) == 1.0
    assert both.curves[1].eta_new(260) == pytest.approx(1.5 * base(250))


def test_users_are_told() -> None:
    """Notes on beta2 = 0.999 and on a re-warmup that outlasts the run."""
    short = checkpoint(global_step=150, max_steps=200, schedule=SCHEDULE)
    spec = ExpansionSpec(**SPEC)
    planned = plan_rewarmup(short, spec)
    said = notes(planned)
    assert any(
        "beta2 = 0.999" in n and "6.6" in n for n in remarks(planned, spec, {})
    )  # it calls for no decision
    assert not any("beta2" in n for n in said)
    assert any("only 50 remain" in n for n in said)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """No schedule, damaged JSON, another version, a missing field: each a message."""
    with pytest.raises(CheckpointError, match="no re-warmup schedule"):
        read_rewarmup(tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        read_rewarmup(tmp_path / "a.json")
    with pytest.raises(CheckpointError, match="format_version 9"):
        from_data({"format_version": 9}, "x")
    with pytest.raises(CheckpointError, match="KeyError"):
        from_data({"format_version": 1}, "x")
    with pytest.raises(CheckpointError, match="baseline: Field required"):
        from_data({"format_version": 2, "stages": []}, "x")


def version_1(curve: Curve, stage_curve: dict[str, Any], te: int) -> dict[str, Any]:
    """What version 0.1.0 wrote, its per-step arrays and notes left out."""
    names = ("type", "peak", "minimum", "initial", "warmup_steps", "total_steps", "decay_steps", "decay")
    old = {name: getattr(curve, name) for name in names}
    stage = {
        "stage": 1, "expansion_step": te, "rho": 1.3, "steps": 20, "eta_e": curve(te),
        "peak": 1.3 * curve(te), "curve": {**old, **stage_curve},
        "bias_correction": "inherit", "betas": [0.9, 0.95],
    }  # fmt: skip
    return {"format_version": 1, "expansion_step": te, "baseline": old, "stages": [stage], "curve_file": "x"}


def test_files_of_the_former_version() -> None:
    """They are read, with the curve that they were written with; else there is an error that says so."""
    te, rest = 100, {"warmup_steps": 20, "total_steps": 300}
    for kind in ("cosine", "linear", "constant"):
        base = Curve(kind, 1e-3, 1e-5, 0.0, 10, 400)  # type: ignore[arg-type]
        rates = {"initial": base(te), "peak": 1.3 * base(te)}
        found = from_data(version_1(base, {**rates, **rest}, te), "x")
        assert found == add_stage(None, base, te, rho=1.3, steps=20, betas=(0.9, 0.95))
    wsd = Curve("wsd", 1e-3, 1e-4, 0.0, 10, 400, 100)
    stored = version_1(wsd, {"initial": 1e-3, "peak": 1.3e-3, **rest}, te)
    with pytest.raises(CheckpointError, match=r"earlier version(.|\n)*--write"):
        from_data(stored, "x")
    assert from_data(stored, "x", replacing=True).baseline == wsd


def test_a_stated_peak_that_no_file_has_is_said(dense_checkpoint: Path, tmp_path: Path) -> None:
    """Neither the run's peak nor its rate at the expansion: a warning, which a later schedule takes out."""
    source = open_checkpoint(dense_checkpoint)
    for own in (None, *source.facts["base_lrs"], *source.facts["last_lrs"]):
        assert doubts(source, BaselineSpec(peak=own)) == ()
    (warning,) = doubts(source, BaselineSpec(peak=3e-4))
    assert warning.startswith("--peak-lr 0.0003: the checkpoint's own files have 0.004 and 0.00209712;")
    assert doubts(checkpoint(), BaselineSpec(peak=3e-4)) == ()
    made = sparkling_cli.expand(dense_checkpoint, tmp_path / "wide", axes={"ffn": 2}, peak_lr=3e-4)
    assert made.report is not None and warning in made.report.warnings
    write_schedule(tmp_path / "wide", {"baseline": {"peak": 0.004}})
    assert warning not in Report.read((tmp_path / "wide" / REPORT_JSON).read_bytes(), REPORT_JSON).warnings


@pytest.mark.parametrize(
    ("name", "kwargs", "field"),
    [
        ("inverse_sqrt", {"timescale": 0}, "timescale"),
        ("inverse_sqrt", {"timescale": -5000}, "timescale"),
        ("polynomial", {"power": -1}, "power"),
        ("cosine", {"num_cycles": -2}, "cycles"),
        ("cosine_with_min_lr", {"min_lr": -1e-4}, "minimum"),
        ("warmup_stable_decay", {"num_decay_steps": -100}, "decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 10, "num_stable_steps": -50}, "decay_start"),
        ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": -3}, "warmup"),
    ],
)
def test_numbers_that_make_no_schedule(name: str, kwargs: dict[str, Any], field: str) -> None:
    """Each is refused by its name, and what the hint says makes up for it."""
    source = source_of(name, kwargs, 1e-3, 10, 200, 50)
    with pytest.raises(SpecError, match=field) as caught:
        baseline_of(source, BaselineSpec())
    assert "describe what remains of it by --schedule" in str(caught.value.hint)
    curve, _ = baseline_of(source, BaselineSpec(type="constant", peak=1e-3, warmup_steps=0))
    assert curve(100) == 1e-3


def test_a_long_run_has_a_file_of_bounded_size() -> None:
    """All of the re-warmup, and what follows at even distances to the last step; as the JSON has it."""
    base = Curve("linear", 1e-3, 0.0, 0.0, 0, 10**9)
    made = add_stage(None, base, 1000, rho=1.3, steps=250)
    found = write.rows(made, limit=2000)
    steps = [int(row.split(",")[0]) for row in found[1:]]
    assert 1900 < len(steps) <= 2001 and steps == sorted(set(steps))
    assert steps[:1000] == list(range(1000, 2000)) and steps[-1] == 10**9
    assert {b - a for a, b in pairwise(steps[1000:-1])} == {-(-(10**9 - 2000) // 1000)}
    for row in (found[200], found[-2]):
        step, old, new, _ = row.split(",")
        assert (float(old), float(new)) == (base(int(step)), made.curves[0].eta_new(int(step)))
    short = add_stage(None, replace(base, total_steps=3000), 1000, rho=1.3, steps=250)
    assert len(write.rows(short, limit=2000)) == 2002 == len(write.rows(short))
    assert write.ROWS <= 10**6


def test_the_example_holds_the_last_rate_that_is_known() -> None:
    """Of the scheduler or the optimizer, of the log, of the arguments; where there is none, it says so."""
    log = [{"learning_rate": 3e-3, "step": 10}, {"learning_rate": 2e-3, "step": 20}, {"eval_loss": 1.0}]
    for facts, rate, words in (
        ({"last_lrs": [1e-3], "log_history": log}, 1e-3, "an example that holds the present rate"),
        (
            {"log_history": log, "schedule": {"peak": 4e-3}},
            2e-3,
            "an example that holds the last logged rate",
        ),
        ({"schedule": {"peak": 4e-3}}, 4e-3, "an example that holds the highest rate"),
        ({}, 1e-4, "an example; 0.0001 is only a placeholder"),
    ):
        source = checkpoint(global_step=20, **facts)
        assert example(source).peak == rate
        assert example_words(source) == words
        assert f"--peak-lr {rate:g}" in schedule_command(source, "wide")
