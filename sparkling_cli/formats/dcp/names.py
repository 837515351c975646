"""What the entries of a ``torch.distributed.checkpoint`` are: weights, optimizer state, groups, the rest.

Every trainer nests differently: ``model.<fqn>`` and ``optimizer.state.<fqn>.exp_avg`` (Trainer with FSDP),
``optim.state...`` (OLMo-core), weights without any prefix (torchtitan), all of it once more under ``app``
(PyTorch's own tutorial). ``planner_data`` keeps the true nesting; without it, dots are all there is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.statedict import bare_names, without_attribute

Path = tuple[str, ...]

_MODEL = frozenset({"model", "module", "state_dict", "model_state_dict", "net"})
_OPTIMIZER = frozenset({"optimizer", "optim", "optimizers", "optimizer_state_dict", "opt"})
_STATE = re.compile(r"(?:[^.]+\.)?state\.(?P<param>.+)\.(?P<slot>[^.]+)")
#: Megatron turns it round; ``param`` is the fp32 master weight
_STATE_FIRST = re.compile(
    r"state\.(?P<slot>exp_avg|exp_avg_sq|fp32_param|momentum_buffer|param)\.(?P<param>.+)"
)
_TURNED_STATE = re.compile(r"state\.(?P<slot>[^.]+)\.(?P<param>.+)")
_TURNED = ("state.exp_avg.", "state.momentum_buffer.")
_GROUP = re.compile(r"(?:[^.]+\.)?param_groups\.(?P<group>.+)\.(?P<field>[^.]+)")
#: by which a checkpoint of composer is known
_COMPOSER = ("state", "timestamp")
#: what stands before the name of one of several optimizers of Megatron's
_CHAINED = re.compile(r"chained_\d+\.")


@dataclass(frozen=True)
class Roles:
    """Who is who.

    Attributes:
        weights: weight name -> fully qualified name in the checkpoint.
        states: parameter -> state name -> fully qualified name.
        groups: group (a number, or a parameter in flattened checkpoints) -> field -> name of bytes entry.
        others: everything else.
    """

    weights: Mapping[str, str]
    states: Mapping[str, Mapping[str, str]]
    groups: Mapping[str, Mapping[str, str]]
    others: tuple[str, ...]


def find_roles(paths: Mapping[str, Path], tensors: frozenset[str], where: str) -> Roles:
    """Sort all entries.

    Args:
        paths: fully qualified name -> its nesting.
        tensors: which of them are tensors.
        where: the directory, for messages.

    Raises:
        CheckpointError: there are no weights; the message lists what there is.
    """
    nested = _unwrapped(paths, tensors)
    optimizers = {p[0] for p in nested.values() if len(p) > 1 and _is_optimizer(p)}
    states: dict[str, dict[str, str]] = {}
    groups: dict[str, dict[str, str]] = {}
    left: dict[str, Path] = {}
    rests = {name: _optimizer_rest(path, optimizers) for name, path in nested.items()}
    turned = any(rest and rest.startswith(_TURNED) for rest in rests.values())
    firsts = {found["param"] for rest in rests.values() if turned and (found := _first(rest))}
    for name, path in nested.items():
        rest = rests[name]
        state = rest and ((turned and _first(rest, firsts)) or _STATE.fullmatch(rest))
        group = rest and _GROUP.fullmatch(rest)
        if state and name in tensors:
            states.setdefault(state["param"], {})[state["slot"]] = name
        elif group:
            groups.setdefault(group["group"], {})[group["field"]] = name
        elif rest is None:
            left[name] = path
    bare = bare_names(states) if states else {}
    states = {bare[param]: slots for param, slots in states.items()}
    weights = _weights({n: p for n, p in left.items() if n in tensors}, frozenset(states))
    if not weights:
        shown = ", ".join(sorted(paths)[:8])
        raise CheckpointError(
            f"{where} holds no model weights; its entries are: {shown}{', ...' if len(paths) > 8 else ''}",
            hint='save {"model": model_state_dict, "optimizer": optimizer_state_dict}',
        )
    if any(path[:2] == _COMPOSER for path in paths.values()):
        bare = without_attribute([*weights, *(name for name in states if name not in weights)])
        weights = {bare[name]: key for name, key in weights.items()}
        states = {bare[name]: slots for name, slots in states.items()}
    used = {*weights.values(), *(n for s in states.values() for n in s.values())}
    used |= {n for fields in groups.values() for n in fields.values()}
    return Roles(weights, states, groups, tuple(n for n in paths if n not in used))


def _first(rest: str | None, params: Collection[str] = ()) -> re.Match[str] | None:
    """State with its name in front: of a known name, or of a parameter that has such state."""
    found = _STATE_FIRST.fullmatch(rest or "")
    other = found or _TURNED_STATE.fullmatch(rest or "")
    return other if other and (found or other["param"] in params) else None


def _unwrapped(paths: Mapping[str, Path], tensors: frozenset[str]) -> dict[str, Path]:
    """Nesting without levels above the model (``app``, composer's ``state``)."""
    above = {paths[name][:at] for name in tensors if (at := _model_level(paths[name])) is not None}
    if len(above) == 1 and () not in above:
        (prefix,) = above
        cut = len(prefix)
        return {n: p[cut:] if p[:cut] == prefix and len(p) > cut else p for n, p in paths.items()}
    found = dict(paths)
    while True:
        firsts = {path[0] for path in found.values()}
        deep = all(len(path) > 2 for path in found.values())
        if len(firsts) != 1 or not deep or firsts & (_MODEL | _OPTIMIZER):
            return found
        found = {name: path[1:] for name, path in found.items()}


def _model_level(path: Path) -> int | None:
    """How deep the model's own level lies in a nesting; None without one."""
    return next((at for at, step in enumerate(path[:-1]) if step in _MODEL), None)


def _is_optimizer(path: Path) -> bool:
    rest = ".".join(path[1:])
    return path[0] not in _MODEL and bool(_STATE.fullmatch(rest) or _GROUP.fullmatch(rest))


def _optimizer_rest(path: Path, optimizers: set[str]) -> str | None:
    """What follows the optimizer's own level; None if the entry is not the optimizer's."""
    if len(path) > 1 and path[0] in optimizers:
        return ".".join(path[1:])
    flat = _CHAINED.sub("", ".".join(path), count=1)
    first, _, rest = flat.partition(".")
    if first in _OPTIMIZER and (_STATE.fullmatch(rest) or _GROUP.fullmatch(rest)):
        return rest
    if len(path) == 1 and flat.startswith(("state.", "param_groups.")):
        return flat
    return None


def _weights(candidates: Mapping[str, Path], params: frozenset[str]) -> dict[str, str]:
    """Weight name -> entry: the section that is the model, or all entries on the first level."""
    sections: dict[str, dict[str, str]] = {}
    for name, path in candidates.items():
        if len(path) > 1:
            sections.setdefault(path[0], {})[".".join(path[1:])] = name
        else:
            sections.setdefault("", {})[path[0]] = name
    chosen = next((s for s in sections if s in _MODEL), None)
    if chosen is None:
        by_state = [s for s, names in sections.items() if params & set(bare_names(names).values())]
        chosen = by_state[0] if len(by_state) == 1 else ("" if "" in sections else None)
    if chosen is None:
        return {}
    names = sections[chosen]
    bare = bare_names(names)
    if chosen == "" and params and not params & set(bare.values()):
        # Names with dots but without nesting: `model.` may be a section, or part of the names.
        cut = {n: n.removeprefix("model.") for n in names if n.startswith("model.")}
        if params & set(cut.values()):
            bare = cut
    return {bare[name]: names[name] for name in names if name in bare}
