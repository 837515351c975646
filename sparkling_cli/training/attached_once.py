"""No parameter is scaled twice: a second call of ``rewarm`` takes the place of the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from weakref import WeakSet

from torch.optim import Optimizer

from sparkling_cli.errors import SpecError


class Attached(Protocol):
    """An optimizer with hooks: what has to be known of it here."""

    optimizer: Optimizer
    params: Any
    matrices: Any
    step: int
    handles: list[Any]


#: all whose hooks are on; dropped with their optimizers
_RUNNING: WeakSet[Any] = WeakSet()


def attach(attached: Sequence[Attached], step: int | None) -> int:
    """Put the hooks on, in the place of those of an earlier call for the same parameters.

    Calls for other optimizers, or for other parameters of the same one, stay as they are.

    Args:
        attached: all of this call, with ``before`` and ``after``.
        step: as the caller gave it.

    Returns:
        How many optimizers' hooks were taken off.

    Raises:
        SpecError: an optimizer is given twice, or an earlier call has more parameters than this one, or has
            made steps since and ``step`` is not given; nothing has changed then.
    """
    if len({id(one.optimizer) for one in attached}) < len(attached):
        raise SpecError("one optimizer is given twice", hint="give every optimizer once")
    replaced = [(old, new) for new in attached for old in _RUNNING if old.optimizer is new.optimizer]
    replaced = [(old, new) for old, new in replaced if _scaled(old) & _scaled(new)]
    for old, new in replaced:
        before = f"rewarm() was called before for this {type(old.optimizer).__name__}"
        if left := _scaled(old) - _scaled(new):
            raise SpecError(
                f"{before}, for these parameters and for {len(left)} more",
                hint="call remove() of the Rewarming that it returned, or give all parameters",
            )
        if step is None and old.step != new.step:
            raise SpecError(
                f"{before}, which stands at step {old.step} now",
                hint=f"to go on, keep what that call returned, or pass step={old.step}; to begin again with "
                f"the expanded checkpoint's weights and state, pass step={new.step}",
            )
    for old, _ in replaced:
        detach(old)
    for new in attached:
        hooks: Any = new
        new.handles = [
            new.optimizer.register_step_pre_hook(hooks.before),
            new.optimizer.register_step_post_hook(hooks.after),
        ]
        _RUNNING.add(new)
    return len(replaced)


def detach(attached: Attached) -> None:
    """Take the hooks off; nothing where they are off."""
    for handle in attached.handles:
        handle.remove()
    _RUNNING.discard(attached)


def _scaled(attached: Attached) -> set[int]:
    """Ids of the tensors that the hooks change: they are held, so ids stay their own."""
    maps: tuple[Mapping[int, Any], ...] = (attached.params, attached.matrices)
    return set().union(*maps)
