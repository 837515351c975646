"""Learning-rate curves against the equations in high precision and against transformers' schedules."""

from __future__ import annotations

import csv
import io
import json
from decimal import Decimal, getcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from sparkling_cli.errors import CheckpointError, SpecError
from sparkling_cli.formats.model import Checkpoint, ParamState
from sparkling_cli.schedule.baseline import baseline_of
from sparkling_cli.schedule.curves import Curve, fresh_factor, rewarmed
from sparkling_cli.schedule.rewarmup import add_stage, from_data, read_rewarmup
from sparkling_cli.schedule.write import notes, plan_rewarmup, rewarmup_files
from sparkling_cli.spec.model import BaselineSpec, ExpansionSpec
from sparkling_cli.storage.sidecar import CURVE, REWARMUP

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
    new = rewarmed(base, te, rho, tau)
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


HF: list[tuple[str, dict[str, Any]]] = [
    ("cosine", {}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr": 2e-5}),
    ("linear", {}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("cosine_with_restarts", {}),
    ("polynomial", {}),
    ("warmup_stable_decay", {"num_decay_steps": 40}),
    ("warmup_stable_decay", {"num_decay_steps": 60, "decay_type": "linear", "min_lr_ratio": 0.05}),
    ("warmup_stable_decay", {"num_decay_steps": 30, "decay_type": "1-sqrt", "min_lr_ratio": 0.1}),
]


def checkpoint(**facts: Any) -> Checkpoint:
    """A checkpoint that knows these facts and nothing else."""
    state = ParamState("w", {"exp_avg": "a", "exp_avg_sq": "b"}, {"step": 50.0})
    return Checkpoint(
        Path("checkpoint-50"), "trainer", {}, {}, (state,), ({"betas": (0.9, 0.999)},), facts=facts
    )


@pytest.mark.parametrize(("name", "kwargs"), HF)
def test_baselines_are_transformers_schedules(name: str, kwargs: dict[str, Any]) -> None:
    """What is read of a run's facts gives the rates that transformers' own scheduler gives, step by step."""
    peak, warmup, total = 7e-4, 13, 200
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(name, optimizer, warmup, total, dict(kwargs))
    facts = {"type": name, "warmup_steps": warmup, "peak": peak, "minimum": None, "kwargs": kwargs}
    source = checkpoint(global_step=50, max_steps=total, schedule=facts)
    curve, step = baseline_of(source, BaselineSpec())
    assert step == 50
    for t in range(total + 1):
        assert curve(t) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-19)
        optimizer.step()
        scheduler.step()


def test_other_shapes_begin_anew() -> None:
    """Linear falls to emin, constant stays at rho eta_e, wsd keeps rho through its decay."""
    linear = rewarmed(Curve("linear", 1e-3, 1e-4, 0.0, 10, 110), 60, 1.3, 5)
    eta_e = 1e-4 + 9e-4 * 0.5
    assert linear(0) == pytest.approx(eta_e)
    assert linear(5) == pytest.approx(1.3 * eta_e)
    assert linear(27.5) == pytest.approx(1e-4 + (1.3 * eta_e - 1e-4) / 2)
    assert linear(50) == pytest.approx(1e-4)
    constant = rewarmed(Curve("constant", 1e-3, 0.0, 0.0, 10, 110), 60, 1.3, 5)
    assert constant(5) == constant(50) == pytest.approx(1.3e-3)
    base = Curve("wsd", 1e-3, 0.0, 0.0, 10, 110, 20)
    wsd = rewarmed(base, 60, 1.3, 5)
    for t in range(65, 110):
        assert wsd(t - 60) / base(t) == pytest.approx(1.3)
    inside = rewarmed(base, 100, 1.3, 4)
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
    """JSON and CSV agree with each other and with the equations, and read back as they were."""
    spec = ExpansionSpec(**SPEC, rewarmup={"rho": 1.3, "steps": 20, "bias_correction": "fresh"})
    made = plan_rewarmup(checkpoint(global_step=50, max_steps=200, schedule=SCHEDULE), spec)
    files = rewarmup_files(made)
    data = json.loads(files[REWARMUP])
    assert from_data(data, "x") == made
    rows = list(csv.DictReader(io.StringIO(files[CURVE].decode())))
    assert [int(r["step"]) for r in rows] == list(range(50, 201))
    for i, row in enumerate(rows):
        t = int(row["step"])
        assert float(row["eta_old"]) == data["curve"]["eta_old"][i] == made.baseline(t)
        assert float(row["eta_new"]) == data["curve"]["stages"]["1"]["eta_new"][i]
        assert float(row["ratio"]) == data["curve"]["stages"]["1"]["ratio"][i]
        assert float(row["correction"]) == fresh_factor(0.9, 0.999, i + 1)
        if float(row["eta_old"]) > 0:
            assert float(row["ratio"]) == float(row["eta_new"]) / float(row["eta_old"])
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
        assert both.ratio(both.stages[0], t) == first.ratio(first.stages[0], t)
    assert both.ratio(both.stages[1], 250) == 1.0
    assert both.stages[1].eta_new(260) == pytest.approx(1.5 * base(250))


def test_users_are_told() -> None:
    """Notes on b2 = 0.999 and on a re-warmup that outlasts the run."""
    short = checkpoint(global_step=150, max_steps=200, schedule=SCHEDULE)
    said = notes(plan_rewarmup(short, ExpansionSpec(**SPEC)))
    assert any("b2 = 0.999" in n and "6.6" in n for n in said)
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
