"""Per-entry learning rates against separate parameters in separate groups, 200 steps in float64."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from torch.optim import SGD, Adam, AdamW, Optimizer

from sparkling_cli.errors import LayoutError, SparklingError, SpecError
from sparkling_cli.training import rewarm, update
from tests.training import reference as ref

ELEMENTWISE: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adamw-loop": (AdamW, {"foreach": False, "weight_decay": 0.1}),
    "adamw-foreach": (AdamW, {"foreach": True, "weight_decay": 0.1}),
    "adamw-fused": (AdamW, {"fused": True, "weight_decay": 0.1}),
    "adamw-tensor-lr": (AdamW, {"lr": torch.tensor(1.0, dtype=torch.float64), "weight_decay": 0.1}),
    "adamw-amsgrad": (AdamW, {"amsgrad": True, "weight_decay": 0.1}),
    "adamw-maximize": (AdamW, {"maximize": True, "weight_decay": 0.1}),
    "adam-l2": (Adam, {"weight_decay": 0.1}),
    "adam-b2-0.95": (Adam, {"betas": (0.8, 0.95)}),
    "sgd": (SGD, {}),
    "sgd-momentum": (SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "sgd-dampened": (SGD, {"momentum": 0.9, "dampening": 0.5, "maximize": True, "foreach": True}),
    "sgd-tensor-lr": (SGD, {"lr": torch.tensor(1.0, dtype=torch.float64), "momentum": 0.9, "fused": True}),
    "sgd-nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "lion": (Lion, {"weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_200_steps_equal_separate_parameters(name: str) -> None:
    """Old and new entries move as if they were separate parameters with their own rates (1e-10)."""
    kind, options = ELEMENTWISE[name]

    def make(params: Any) -> Optimizer:
        return kind(params, **{"lr": ref.BASE.peak, **options})

    net, optimizer, sched = ref.expanded(make)
    split, reference, ref_sched = ref.split_reference(net, optimizer, make)
    before = ref.parameters(net)
    rewarm(optimizer, net, ref.history())
    ours = ref.steps(net, optimizer, sched, ref.TE, ref.TE + 200)
    theirs = ref.steps(split, reference, ref_sched, ref.TE, ref.TE + 200)
    for step, _ in zip(ours, theirs, strict=True):
        if step in (ref.TE, ref.TE + 1, ref.TE + 60):
            assert ref.distance(ref.parameters(net), split.whole()) < 1e-12
    assert ref.distance(ref.parameters(net), split.whole()) < 1e-10
    assert ref.distance(before, split.whole()) > 1e-3


@pytest.mark.parametrize(("kind", "decay"), [(AdamW, 0.05), (Adam, 0.0)])
def test_where_torch_says_nothing_the_class_tells_whose_decay_is_decoupled(
    kind: type[Optimizer], decay: float
) -> None:
    """Before torch 2.7 no group says it: AdamW's is, Adam's is in its gradient."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([param], lr=0.5, weight_decay=0.1)
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "decoupled_weight_decay"}
    assert update.AdamStep.of(optimizer, group, param, 1.0).decay == pytest.approx(decay)


def test_the_rates_make_a_difference() -> None:
    """The agreement with separate parameters would not survive without the hooks."""
    net, optimizer, sched = ref.expanded(adamw)
    split, reference, ref_sched = ref.split_reference(net, optimizer, adamw)
    ours = ref.steps(net, optimizer, sched, ref.TE, ref.TE + 40)
    for _ in zip(ours, ref.steps(split, reference, ref_sched, ref.TE, ref.TE + 40), strict=True):
        pass
    assert ref.distance(ref.parameters(net), split.whole()) > 1e-5


def test_fresh_bias_correction_equals_a_fresh_counter() -> None:
    """With ``fresh``, new entries move as separate parameters whose step counter begins at zero."""

    def make(params: Any) -> Optimizer:
        return AdamW(params, lr=ref.BASE.peak, weight_decay=0.1, eps=1e-30)

    net, optimizer, sched = ref.expanded(make)
    split, reference, ref_sched = ref.split_reference(net, optimizer, make)
    for p in split.new.values():
        reference.state[p]["step"] = torch.tensor(0.0)
    rewarm(optimizer, net, ref.history(bias_correction="fresh"))
    ours = ref.steps(net, optimizer, sched, ref.TE, ref.TE + 200)
    for _ in zip(ours, ref.steps(split, reference, ref_sched, ref.TE, ref.TE + 200), strict=True):
        pass
    assert ref.distance(ref.parameters(net), split.whole()) < 1e-9


def test_muon_is_scaled_after_orthogonalization() -> None:
    """For Muon the whole tensor's update is made as ever; the new entries' part of it is then scaled."""
    net = ref.model()
    matrices = {n: p for n, p in net.named_parameters() if p.ndim == 2}
    mirror = {n: p.detach().clone().requires_grad_() for n, p in matrices.items()}

    def make(params: Any) -> Optimizer:
        return torch.optim.Muon(params, lr=ref.BASE.peak, weight_decay=0.1)

    optimizer, reference = make(matrices.values()), make(mirror.values())
    sched, ref_sched = ref.scheduler(optimizer, ref.TE), ref.scheduler(reference, ref.TE)
    rewarm(optimizer, net, ref.history())
    masks = ref.new_masks()
    for step in range(ref.TE, ref.TE + 200):
        optimizer.zero_grad()
        net(ref.data(step)).backward()
        before = {n: p.detach().clone() for n, p in mirror.items()}
        for n, p in mirror.items():
            p.grad = matrices[n].grad.clone()
        optimizer.step()
        reference.step()
        for n, p in mirror.items():
            moved = before[n] + ref.eta_new(step) / ref.BASE(step) * (p.detach() - before[n])
            p.data = torch.where(masks[n], moved, p.detach())
        sched.step()
        ref_sched.step()
    assert ref.distance({n: p.detach() for n, p in matrices.items()}, mirror) < 1e-10


def test_bfloat16_adam_is_rounded_once() -> None:
    """In bfloat16 the new entries' step is made in float32 from their old values and rounded once."""

    def make(params: Any) -> Optimizer:
        return AdamW(params, lr=ref.BASE.peak, weight_decay=0.1, foreach=False)

    net, optimizer, sched = ref.expanded(make, torch.bfloat16)
    rewarm(optimizer, net, ref.history(rho=2.0, tau=0))
    masks = ref.new_masks()
    before = ref.parameters(net)
    for _ in ref.steps(net, optimizer, sched, ref.TE, ref.TE + 1):
        pass
    lr, wanted = 2.0 * ref.BASE(ref.TE), {}
    for name, p in net.named_parameters():
        state = optimizer.state[p]
        n = float(state["step"])
        denominator = (state["exp_avg_sq"].double() / (1 - 0.999**n)).sqrt() + 1e-8
        update = state["exp_avg"].double() / (1 - 0.9**n) / denominator
        exact = before[name].double() * (1 - lr * 0.1) - lr * update
        wanted[name] = torch.where(masks[name], exact, p.detach().double())
    for name, p in net.named_parameters():
        assert (
            torch.equal(p.detach(), wanted[name].to(torch.bfloat16))
            or ((p.detach().double() - wanted[name]).abs() <= wanted[name].abs() * 2**-8).all()
        )


def adamw(params: Any) -> Optimizer:
    """The usual optimizer."""
    return AdamW(params, lr=ref.BASE.peak, weight_decay=0.1)


def test_rho_one_without_a_ramp_changes_what_the_curve_says() -> None:
    """At the expansion step itself the factor is 1: the first step is bit for bit the plain one."""
    net, optimizer, sched = ref.expanded(adamw)
    plain, plain_optimizer, plain_sched = ref.expanded(adamw)
    handle = rewarm(optimizer, net, ref.history())
    for _ in ref.steps(net, optimizer, sched, ref.TE, ref.TE + 1):
        pass
    for _ in ref.steps(plain, plain_optimizer, plain_sched, ref.TE, ref.TE + 1):
        pass
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert handle.step == ref.TE + 1


def test_old_entries_are_not_touched() -> None:
    """In one step from the same state, old entries end bit-equal with and without the hooks."""
    net, optimizer, sched = ref.expanded(adamw)
    plain, plain_optimizer, plain_sched = ref.expanded(adamw)
    rewarm(optimizer, net, ref.history(tau=0))
    for n, o, s in ((net, optimizer, sched), (plain, plain_optimizer, plain_sched)):
        for _ in ref.steps(n, o, s, ref.TE, ref.TE + 1):
            pass
    masks = ref.new_masks()
    for (name, a), b in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a[~masks[name]], b[~masks[name]])
        assert not masks[name].any() or not torch.equal(a[masks[name]], b[masks[name]])


def test_class_and_state_layout_stay() -> None:
    """The optimizer's class, groups and state are those of an optimizer without hooks."""
    net, optimizer, sched = ref.expanded(adamw)
    plain, plain_optimizer, plain_sched = ref.expanded(adamw)
    rewarm(optimizer, net, ref.history())
    for n, o, s in ((net, optimizer, sched), (plain, plain_optimizer, plain_sched)):
        for _ in ref.steps(n, o, s, ref.TE, ref.TE + 3):
            pass
    assert type(optimizer) is AdamW
    ours, theirs = optimizer.state_dict(), plain_optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert {k: sorted(v) for k, v in ours["state"].items()} == {
        k: sorted(v) for k, v in theirs["state"].items()
    }


def test_accumulated_gradients_count_as_one_step() -> None:
    """Several backward passes before a step are one step of the schedule."""
    net, optimizer, sched = ref.expanded(adamw)
    handle = rewarm(optimizer, net, ref.history())
    for step in range(ref.TE, ref.TE + 4):
        for part in range(3):
            net(ref.data(3 * step + part)).backward()
        optimizer.step()
        sched.step()
        optimizer.zero_grad()
    assert handle.step == ref.TE + 4


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_gradscaler_skips_do_not_count(fused: bool) -> None:
    """Inf in the gradients: no parameter moves, no counter moves; fused AdamW skips inside its kernel."""
    net, optimizer, _ = ref.expanded(
        lambda params: AdamW(params, lr=ref.BASE.peak, weight_decay=0.1, fused=fused), torch.float32
    )
    handle = rewarm(optimizer, net, ref.history(tau=0))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = ref.parameters(net)
    scaler.scale(net(ref.data(0))).backward()
    net.norm.grad[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert handle.step == ref.TE
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name])
    optimizer.zero_grad()
    scaler.scale(net(ref.data(1))).backward()
    scaler.step(optimizer)
    assert handle.step == ref.TE + 1
    assert ref.distance(ref.parameters(net), before) > 0


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_step_counters_are_read_when_they_are_not_one_further(
    options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read at first, after state is loaded, and after another's step; what is counted is what is there."""
    net = ref.model()
    optimizer = AdamW(net.parameters(), **options)
    read: list[int] = []
    monkeypatch.setattr(
        update, "_read", lambda counters: read.append(len(counters)) or list(map(float, counters))
    )
    counts = update.StepCounts()
    params = list(net.parameters())

    def step(*, without: int | None = None) -> list[float]:
        optimizer.zero_grad()
        net(ref.data(0)).backward()
        if without is not None:
            params[without].grad = None
        optimizer.step()
        held = [p for i, p in enumerate(params) if i != without]
        found = counts.of(optimizer, held)
        assert found == [float(optimizer.state[p]["step"]) for p in held]
        return found

    step()
    step()
    step(without=2)
    assert read == [len(params), 0, 0]
    step()  # the third parameter's counter has not moved meanwhile: one further
    optimizer.step()  # without being counted
    step()
    assert read[3:] == [0, len(params)]
    state = optimizer.state_dict()
    for one in state["state"].values():
        one["step"] = torch.tensor(70.0)
    optimizer.load_state_dict(state)
    assert step() == [71.0] * len(params)
    assert read[5:] == [len(params)]


def test_parameters_without_gradients_stay() -> None:
    """A parameter that took no part in the step is not moved by the correction."""
    net, optimizer, _ = ref.expanded(adamw)
    rewarm(optimizer, net, ref.history(tau=0))
    net(ref.data(0)).backward()
    net.experts.grad = None
    kept = net.experts.detach().clone()
    optimizer.step()
    assert torch.equal(net.experts, kept)


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_nothing_is_kept_where_the_state_tells_the_update(
    kind: type[Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW and SGD with momentum need no copy of any entry; what would be kept is never asked for."""
    options = {"momentum": 0.9} if kind is SGD else {}
    net, optimizer, sched = ref.expanded(lambda params: kind(params, lr=ref.BASE.peak, **options))
    plain, plain_optimizer, plain_sched = ref.expanded(
        lambda params: kind(params, lr=ref.BASE.peak, **options)
    )
    rewarm(optimizer, net, ref.history(tau=0))
    monkeypatch.setattr("sparkling_cli.training.attach.keep", None)
    for n, o, s in ((net, optimizer, sched), (plain, plain_optimizer, plain_sched)):
        for _ in ref.steps(n, o, s, ref.TE, ref.TE + 1):
            pass
    assert ref.distance(ref.parameters(net), ref.parameters(plain)) > 0


def test_compiled_models_and_wrappers_are_seen_through() -> None:
    """``torch.compile`` and DDP prefix names; the parameters are found all the same."""
    net, optimizer, sched = ref.expanded(adamw)
    same, same_optimizer, same_sched = ref.expanded(adamw)
    rewarm(optimizer, torch.compile(net), ref.history())
    rewarm(same_optimizer, [(f"module._orig_mod.{n}", p) for n, p in same.named_parameters()], ref.history())
    for n, o, s in ((net, optimizer, sched), (same, same_optimizer, same_sched)):
        for _ in ref.steps(n, o, s, ref.TE, ref.TE + 5):
            pass
    assert ref.distance(ref.parameters(net), ref.parameters(same)) == 0


def test_several_optimizers_share_one_model() -> None:
    """Matrices under Muon, the rest under AdamW: one call serves both."""
    net = ref.model()
    named = dict(net.named_parameters())
    muon = torch.optim.Muon([p for p in named.values() if p.ndim == 2], lr=ref.BASE.peak)
    adam = AdamW([p for p in named.values() if p.ndim != 2], lr=ref.BASE.peak)
    handle = rewarm([muon, adam], net, ref.history(tau=0))
    plain = ref.model()
    plain_named = dict(plain.named_parameters())
    others = (
        torch.optim.Muon([p for p in plain_named.values() if p.ndim == 2], lr=ref.BASE.peak),
        AdamW([p for p in plain_named.values() if p.ndim != 2], lr=ref.BASE.peak),
    )
    for n, optimizers in ((net, (muon, adam)), (plain, others)):
        n(ref.data(0)).backward()
        for o in optimizers:
            o.step()
    for name, mask in ref.new_masks().items():
        moved, usual = (
            named[name] - ref.model().get_parameter(name),
            plain_named[name] - ref.model().get_parameter(name),
        )
        assert torch.allclose(moved[mask], 1.3 * usual[mask], rtol=1e-9)
        assert torch.equal(moved[~mask], usual[~mask])
    assert handle.state_dict() == {"steps": [ref.TE + 1, ref.TE + 1]}


def test_hooks_come_off() -> None:
    """After ``remove`` the optimizer steps as if nothing had been."""
    net, optimizer, sched = ref.expanded(adamw)
    plain, plain_optimizer, plain_sched = ref.expanded(adamw)
    rewarm(optimizer, net, ref.history(tau=0)).remove()
    for n, o, s in ((net, optimizer, sched), (plain, plain_optimizer, plain_sched)):
        for _ in ref.steps(n, o, s, ref.TE, ref.TE + 2):
            pass
    assert ref.distance(ref.parameters(net), ref.parameters(plain)) == 0


def test_a_scheduler_that_leaves_the_baseline_is_reported() -> None:
    """One warning when the group's rate is not the one that the ratios were computed from."""
    net, optimizer, _ = ref.expanded(adamw)
    rewarm(optimizer, net, ref.history())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(ref.data(0)).backward()
        optimizer.step()
    optimizer.param_groups[0]["lr"] *= 0.5
    has = f"is {0.5 * ref.BASE(ref.TE):.6g}; rewarmup.json has {ref.BASE(ref.TE + 1):.6g} there"
    first, now = ref.BASE(ref.TE) / ref.BASE(ref.TE), 0.5 * ref.BASE(ref.TE) / ref.BASE(ref.TE + 1)
    with pytest.warns(UserWarning, match="not the one in rewarmup.json") as caught:
        optimizer.step()
    text = str(caught[0].message)
    assert has in text and f"changed from {first:.3g} to {now:.3g} since step {ref.TE}" in text


@pytest.mark.filterwarnings("error")
def test_a_rate_of_zero_is_no_other_scheduler() -> None:
    """A group that is frozen for some steps and then trained on does not contradict the baseline."""
    net, optimizer, sched = ref.expanded(adamw)
    rewarm(optimizer, net, ref.history(), announce=False)
    optimizer.param_groups[0]["lr"] = 0.0
    net(ref.data(ref.TE)).backward()
    optimizer.step()
    optimizer.zero_grad()
    sched.step()
    for _ in ref.steps(net, optimizer, sched, ref.TE + 1, ref.TE + 5):
        pass


def test_one_line_and_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    """What begins, counted here from the parameters; and the rate and ratio that a step has used."""
    net, optimizer, sched = ref.expanded(adamw)
    rewarming = rewarm(optimizer, net, ref.history())
    history = ref.history()
    regions = {n: history.region(n, tuple(p.shape)) for n, p in net.named_parameters()}
    counts = [region.count(1) for region in regions.values() if region.count(1)]
    expected = f"re-warming {sum(counts):,} entries in {len(counts)} tensors until step {ref.TE + 20}: 1.3 x"
    assert capsys.readouterr().err == f"{expected}, then as the rest\n"
    first = rewarming.metrics()
    assert (first["learning_rate_new"], first["learning_rate_ratio"]) == (ref.BASE(ref.TE), 1.0)
    for step in ref.steps(net, optimizer, sched, ref.TE, ref.TE + 40):
        found = rewarming.metrics()
        assert found["learning_rate_new"] == pytest.approx(ref.eta_new(step), rel=1e-12)
        assert found["learning_rate_ratio"] == pytest.approx(ref.eta_new(step) / ref.BASE(step), rel=1e-12)
    rewarm(optimizer, net, history, step=ref.TE + 40)
    assert f"past step {ref.TE + 20}: 1.3 x" in capsys.readouterr().err


def test_metrics_have_the_share_of_locked_copies_and_their_cosine() -> None:
    """All of them at first; fewer by what is changed: one new row of ``up.weight``, of all new entries."""
    net = ref.model()
    hidden, ffn = torch.arange(ref.H) % ref.H0, torch.arange(ref.F) % ref.F0
    inner = (2 * ffn[:, None] + torch.arange(2)).flatten()
    blocks = torch.cat([ffn, ref.F + ffn])
    with torch.no_grad():
        net.embed.weight.copy_(net.embed.weight[:, hidden])
        net.up.weight.copy_(net.up.weight[ffn][:, hidden])
        net.up.bias.copy_(net.up.bias[ffn])
        net.mixed.weight.copy_(net.mixed.weight[inner][:, hidden])
        net.down.weight.copy_(net.down.weight[hidden][:, ffn])
        net.experts.copy_(net.experts[:, blocks][:, :, hidden])
        net.norm.copy_(net.norm[hidden])
    rewarming = rewarm(adamw(net.parameters()), net, ref.history())
    first = rewarming.metrics()
    assert (first["share_locked"], first["cosine_of_copies"]) == (1.0, pytest.approx(1.0, rel=1e-9))
    masks = ref.new_masks()
    sources = {name: p.detach().clone()[masks[name]] for name, p in net.named_parameters() if name in masks}
    with torch.no_grad():
        net.up.weight[ref.F0 + 1] += 1.0
    found = rewarming.metrics()
    new = {name: net.get_parameter(name).detach()[masks[name]] for name in sources}
    assert found["share_locked"] == pytest.approx(1 - ref.H / sum(map(len, new.values())), rel=1e-12)
    dot, norm = (sum(float(x[n] @ y[n]) for n in new) for x, y in ((sources, new), (sources, sources)))
    wanted = dot / (norm * sum(float(one @ one) for one in new.values())) ** 0.5
    assert 0.5 < wanted < 0.99 and found["cosine_of_copies"] == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("kind", [AdamW, Lion])
def test_metrics_have_the_updates_of_new_and_old_entries(kind: type[Optimizer]) -> None:
    """In every third step of the whole run: the root mean squares of what the masks select."""
    net, optimizer, sched = ref.expanded(lambda params: kind(params, lr=ref.BASE.peak))
    rewarming = rewarm(optimizer, net, ref.history(tau=0, rho=2.0), announce=False, measure_every=3)
    masks = {name: mask for name, mask in ref.new_masks().items() if mask.any()}
    before, wanted = ref.parameters(net), {}
    for step in ref.steps(net, optimizer, sched, ref.TE, ref.TE + 7):
        if (step + 1) % 3 == 0:
            moved = [(net.get_parameter(n).detach() - before[n], mask) for n, mask in masks.items()]
            new = torch.cat([update[mask] for update, mask in moved])
            old = torch.cat([update[~mask] for update, mask in moved])
            rms = (float(new.square().mean().sqrt()), float(old.square().mean().sqrt()))
            wanted = dict(zip(("update_rms_new", "update_rms_old"), rms, strict=True))
        found = {k: v for k, v in rewarming.metrics().items() if k.startswith("update")}
        assert found == pytest.approx(wanted, rel=1e-12), step
        before = ref.parameters(net)
    assert wanted
    with pytest.raises(SpecError, match="counts steps from 1"):
        rewarm(optimizer, net, ref.history(), measure_every=0)


def test_measuring_changes_no_step() -> None:
    """The parameters end bit for bit as without it."""
    found = []
    for every in (None, 2):
        net, optimizer, sched = ref.expanded(adamw)
        rewarm(optimizer, net, ref.history(tau=0), measure_every=every)
        for _ in ref.steps(net, optimizer, sched, ref.TE, ref.TE + 5):
            pass
        found.append(ref.parameters(net))
    assert ref.distance(*found) == 0


def test_what_is_no_torch_optimizer_is_refused() -> None:
    """By its class's name, with what to pass instead."""

    class Engine:
        """Holds one, as DeepSpeed's and Apex's optimizers do."""

        def __init__(self, optimizer: Optimizer | None) -> None:
            self.optimizer = optimizer

    net, optimizer, _ = ref.expanded(adamw)
    with pytest.raises(SpecError, match=r"Engine is no torch\.optim\.Optimizer(.|\n)*the AdamW that"):
        rewarm(Engine(optimizer), net, ref.history())  # type: ignore[arg-type]
    for wrong in (Engine(None), [optimizer, None], "adamw", None):
        with pytest.raises(SpecError, match=r"no torch\.optim\.Optimizer"):
            rewarm(wrong, net, ref.history())  # type: ignore[arg-type]


def test_model_and_optimizer_in_each_others_place() -> None:
    """Said, with the order that they have."""
    net, optimizer, _ = ref.expanded(adamw)
    with pytest.raises(SpecError, match=r"rewarm\(optimizer, model, checkpoint\)"):
        rewarm(net, optimizer, ref.history())  # type: ignore[arg-type]


def test_copies_in_the_hosts_memory_are_refused() -> None:
    """The optimizer of torchao would overwrite the re-warmed entries by its own at the next step."""
    offload = pytest.importorskip("torchao.optim", reason="pip install torchao").CPUOffloadOptimizer
    net = ref.model()
    made = offload.__new__(offload)  # its own __init__ asks for an accelerator
    made.param_d2h_map = {p: p.detach().clone() for p in net.parameters()}
    with pytest.raises(SpecError, match="CPUOffloadOptimizer steps copies of the parameters"):
        rewarm(made, net, ref.history())


def test_what_no_optimizer_holds_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """The line counts what is re-warmed, and names what has new entries and is not."""
    net = ref.model()
    held = [p for p in net.parameters() if p.ndim == 2]
    rewarm(torch.optim.Muon(held), net, ref.history())
    masks = {n: int(mask.sum()) for n, mask in ref.new_masks().items() if mask.any()}
    matrices = [count for n, count in masks.items() if net.get_parameter(n).ndim == 2]
    line = capsys.readouterr().err
    assert line.startswith(f"re-warming {sum(matrices)} entries in {len(matrices)} tensors until")
    assert line.endswith(
        f"; {len(masks) - len(matrices)} more are in none of these optimizers (experts, …)\n"
    )


def test_an_optimizer_without_state_is_reported() -> None:
    """One warning at the first step where copies would stay copies; none for SGD, which has no state."""
    net = ref.model()
    fresh = adamw(net.parameters())
    rewarm(fresh, net, ref.history())
    net(ref.data(0)).backward()
    with pytest.warns(UserWarning, match="has no state at step 30"):
        fresh.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.step()
        plain = SGD(ref.model().parameters(), lr=ref.BASE.peak)
        for p in plain.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        rewarm(plain, zip(ref.parameters(net), plain.param_groups[0]["params"], strict=True), ref.history())
        plain.step()


def test_wrong_models_and_optimizers_are_refused() -> None:
    """Another shape, another name, another optimizer, an earlier step: each with what to do."""
    net, optimizer, _ = ref.expanded(adamw)
    with pytest.raises(LayoutError, match="after the expansion"):
        rewarm(optimizer, [("norm", torch.zeros(H_BEFORE))], ref.history())
    with pytest.raises(LayoutError, match="matches no pattern"):
        rewarm(optimizer, [("nonsense", net.norm)], ref.history())
    with pytest.raises(SparklingError, match="none of the model's parameters"):
        rewarm(adamw([torch.nn.Parameter(torch.zeros(1))]), net, ref.history())
    with pytest.raises(SpecError, match="before the expansion"):
        rewarm(optimizer, net, ref.history(), step=3)
    with pytest.raises(SpecError, match="fresh"):
        rewarm(SGD(net.parameters(), lr=0.1), net, ref.history(bias_correction="fresh"))


H_BEFORE = ref.H0


def test_replaced_parameters_are_noticed() -> None:
    """Parameters exchanged after the call (sharding, say) are an error, not a silent plain run."""
    net, optimizer, _ = ref.expanded(adamw)
    rewarm(optimizer, net, ref.history(tau=0))
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.zeros(ref.V, ref.H))
    with pytest.raises(SparklingError, match="call rewarm"):
        optimizer.step()
