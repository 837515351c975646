"""Optimizer state that no optimizer could go on with is refused; parameters without any are named."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from math import isfinite

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.model import Checkpoint, ParamState
from sparkling_cli.formats.optimizer_states import FSDP_COPY

#: Adam's moments, of which neither is of use without the other; Lion has the first alone
_PAIR = ("exp_avg", "exp_avg_sq")
#: the second one in factors: Adafactor, CAME
_FACTORED = {"exp_avg_sq_row", "exp_avg_sq_col"}
_EARLIER = "take an earlier checkpoint"


def check_numbers(checkpoint: Checkpoint) -> None:
    """Step counters and other numbers of the state are finite, and learning rates of the groups.

    Raises:
        CheckpointError: one is not.
    """
    where, hint = checkpoint.root.name, f"{_EARLIER}; --allow-nonfinite widens it all the same"
    for state in checkpoint.states:
        for name, value in state.scalars.items():
            if not isfinite(value):
                raise CheckpointError(
                    f"{where}: {name!r} in the state of {state.param!r} is {value}", hint=hint
                )
    for place, group in enumerate(checkpoint.param_groups):
        rate = group.get("lr")
        if isinstance(rate, float) and not isfinite(rate):
            raise CheckpointError(
                f"{where}: the learning rate of optimizer group {place} is {rate}", hint=hint
            )


def check_pairs(checkpoint: Checkpoint) -> None:
    """Where an optimizer keeps both of Adam's moments, each of its parameters has both or neither.

    Groups with the same options are one optimizer's; several may be mixed in a checkpoint. What is in none
    (DeepSpeed's Universal Checkpoints have none) is one optimizer's too.

    Raises:
        CheckpointError: a parameter has one of them alone.
    """
    options: dict[str, frozenset[str]] = {}
    for group in checkpoint.param_groups:
        own = frozenset(group) - {"params", "param_names"}
        options |= dict.fromkeys(_params(group.get("params")), own)
    optimizers: defaultdict[frozenset[str] | None, list[ParamState]] = defaultdict(list)
    for state in checkpoint.states:
        if not _FACTORED & state.tensors.keys():
            optimizers[options.get(state.param)].append(state)
    for members in optimizers.values():
        pairs = [[slot for slot in _PAIR if slot in state.tensors] for state in members]
        if list(_PAIR) not in pairs:
            continue
        for state, found in zip(members, pairs, strict=True):
            if len(found) == 1:
                lost = _PAIR[1 - _PAIR.index(found[0])]
                others = sum(pair == list(_PAIR) for pair in pairs)
                raise CheckpointError(
                    f"{checkpoint.root.name}: the optimizer's state of {state.param!r} has {found[0]!r} but "
                    f"no {lost!r}, which {others} other parameter(s) of this optimizer have",
                    hint=f"the optimizer's file is damaged: {_EARLIER}",
                )


def stateless_warning(checkpoint: Checkpoint) -> str | None:
    """The one sentence on parameters that the optimizer was given and has no state for; None if all have."""
    if not checkpoint.states:
        return None
    known = {state.param for state in checkpoint.states if state.scalars or set(state.tensors) - {FSDP_COPY}}
    given = [name for group in checkpoint.param_groups for name in _params(group.get("params"))]
    lost = [name for name in given if name not in known]
    if not lost:
        return None
    more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
    return (
        f"the optimizer has no state for {len(lost)} of its {len(given)} parameters: "
        f"{', '.join(lost[:3])}{more}. Right if they have never had a gradient; else its file is "
        f"damaged: {_EARLIER}"
    )


def _params(params: object) -> Iterator[str]:
    """A group's parameters, as ``ParamState.param`` has them."""
    if isinstance(params, (list, tuple)):
        yield from map(str, params)
