"""``rewarm`` called again, and runs one after another: every update is scaled once, by its step's ratio."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from sparkling_cli.errors import SpecError
from sparkling_cli.training import rewarm
from sparkling_cli.training.held import Held
from tests.training import reference as ref

pytestmark = pytest.mark.filterwarnings("ignore:SGD has no state")

AT = ref.TE + 10
MASKS = ref.new_masks()


def sgd(params: Any) -> Optimizer:
    """Every update is rate times gradient, so that two runs' updates divide to the factor."""
    return SGD(params, lr=ref.BASE(AT), momentum=0.9)


def update(net: ref.Tiny, optimizer: Optimizer) -> dict[str, Tensor]:
    """What one step changes."""
    before = ref.parameters(net)
    optimizer.zero_grad()
    net(ref.data(AT)).backward()
    optimizer.step()
    return {name: p - before[name] for name, p in ref.parameters(net).items()}


def ratios(found: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Updates of new and of old entries over those of a plain step, by parameter."""
    net = ref.model()
    plain = update(net, sgd(net.parameters()))
    shares = {name: (plain[name], found[name], mask) for name, mask in MASKS.items() if mask.any()}
    return {
        name: tuple(float(now[m].norm() / was[m].norm()) for m in (mask, ~mask))  # type: ignore[misc]
        for name, (was, now, mask) in shares.items()
        if not mask.all()
    }


def test_a_second_call_takes_the_place_of_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    """As in a notebook's cell that is run again; the line says so, and the first handle does no harm."""
    net = ref.model()
    optimizer = sgd(net.parameters())
    first = rewarm(optimizer, net, ref.history(), step=AT)
    second = rewarm([optimizer], net, ref.history(), step=AT)
    said = capsys.readouterr().err.splitlines()
    assert ["earlier call" in line for line in said] == [False, True]
    first.remove()
    wanted = ref.eta_new(AT) / ref.BASE(AT)
    found = ratios(update(net, optimizer))
    assert found.keys() == MASKS.keys() - {"inner.weight"} and wanted > 1.1
    for new, old in found.values():
        assert new == pytest.approx(wanted, rel=1e-9) and old == pytest.approx(1.0, rel=1e-9)
    assert (first.step, second.step) == (AT, AT + 1)


def test_calls_for_parts_of_one_optimizer_stay() -> None:
    """One call for each of several models, or for each part; the parts in one call replace both."""
    net = ref.model()
    optimizer = sgd(net.parameters())
    pairs = list(net.named_parameters())
    parts = [
        rewarm(optimizer, part, ref.history(), step=AT, announce=False) for part in (pairs[:3], pairs[3:])
    ]
    wanted = ref.eta_new(AT) / ref.BASE(AT)
    for new, _ in ratios(update(net, optimizer)).values():
        assert new == pytest.approx(wanted, rel=1e-9)
    assert [part.step for part in parts] == [AT + 1, AT + 1]
    with pytest.raises(SpecError, match=r"before for this SGD, for these parameters and for 2 more"):
        rewarm(optimizer, pairs[:1], ref.history(), step=AT)
    rewarm(optimizer, net, ref.history(), step=AT + 1)
    update(net, optimizer)
    assert [part.step for part in parts] == [AT + 1, AT + 1]


def test_where_a_second_call_goes_on_from_must_be_said() -> None:
    """After steps, without a step of its own it would begin the re-warmup again; nothing has changed then."""
    net = ref.model()
    optimizer = sgd(net.parameters())
    first = rewarm(optimizer, net, ref.history())
    rewarm(optimizer, net, ref.history())
    first = rewarm(optimizer, net, ref.history())
    update(net, optimizer)
    with pytest.raises(SpecError, match=f"stands at step {ref.TE + 1} now") as caught:
        rewarm(optimizer, net, ref.history())
    assert f"step={ref.TE + 1}" in str(caught.value.hint) and f"step={ref.TE}" in str(caught.value.hint)
    update(net, optimizer)
    assert first.step == ref.TE + 2
    assert rewarm(optimizer, net, ref.history(), step=ref.TE + 2).step == ref.TE + 2


def test_one_optimizer_is_given_once() -> None:
    """Twice in one call is twice the factor."""
    net = ref.model()
    optimizer = sgd(net.parameters())
    with pytest.raises(SpecError, match="given twice"):
        rewarm([optimizer, optimizer], net, ref.history())


def test_a_second_run_stands_where_its_checkpoint_does() -> None:
    """Counters at the end are what is saved; the next run begins at its own step, or at loaded counters."""
    net = ref.model()
    held = Held(ref.history())

    def begun(step: int) -> int:
        held.begin([sgd(net.parameters())], net, step)
        assert held.rewarming is not None
        return held.rewarming.step

    assert begun(ref.TE) == ref.TE
    assert held.rewarming is not None
    held.rewarming.load_state_dict({"steps": [AT]})
    held.end()
    assert held.state_dict() == {"steps": [AT]}
    assert begun(ref.TE) == ref.TE
    held.end()
    held.load_state_dict({"steps": [AT]})
    assert held.state_dict() == {"steps": [AT]}
    assert begun(AT + 2) == AT  # two steps were skipped
    held.end()
    assert begun(AT + 5) == AT + 5  # what was loaded was for the run before
    held.load_state_dict({"steps": [ref.TE - 1]})  # of a run before the expansion
    assert held.state_dict() == {"steps": [AT + 5]}


def test_counters_from_before_the_expansion_are_no_steps_of_it() -> None:
    """The curves begin at the expansion."""
    net = ref.model()
    optimizer = sgd(net.parameters())
    rewarming = rewarm(optimizer, net, ref.history())
    rewarming.load_state_dict({"steps": [ref.TE - 20]})
    assert rewarming.step == ref.TE
    assert torch.tensor(rewarming.metrics()["learning_rate_ratio"]) == 1.0
