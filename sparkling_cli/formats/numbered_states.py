"""Which parameter each numbered piece of optimizer state belongs to, proved by shapes.

``optimizer.pt`` knows parameters by number only. The numbers follow the order in which the trainer gave its
parameters to the optimizer: the Trainer puts decayed parameters first, then the others, each in
``named_parameters()`` order, frozen ones left out. An assignment is used only if every state tensor has the
shape that its parameter gives it, and if no other assignment would do as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.model import Checkpoint, ParamState
from sparkling_cli.formats.optimizer_states import MOMENTS, fits, is_named, is_telling
from sparkling_cli.formats.statedict import bare_names

#: (name, shape) of a parameter.
Parameter = tuple[str, tuple[int, ...]]
#: Names in the order of one optimizer group, frozen parameters still among them.
Grouping = tuple[tuple[str, ...], ...]


def name_parameters(
    checkpoint: Checkpoint,
    parameters: Sequence[Parameter],
    decay: Set[str],
    vocabulary: Set[str] = frozenset(),
) -> Checkpoint:
    """The checkpoint with its optimizer state under parameter names.

    Args:
        checkpoint: its states may be numbered; if none is, it is returned as it is.
        parameters: name and shape, in ``named_parameters()`` order, tied ones once.
        decay: names that the trainer puts into its first group.
        vocabulary: embeddings and output head, which users of Muon leave to AdamW; empty if not known.

    Raises:
        CheckpointError: group sizes or shapes fit no known grouping, or fit several in different ways.
    """
    if not any(state.param.isdigit() for state in checkpoint.states):
        return checkpoint
    problem = _Problem.of(checkpoint, parameters)
    named = _given_names(checkpoint, problem)
    if named is None:
        named = _resolve(problem, [name for name, _ in parameters], decay, vocabulary)
    return checkpoint.renamed(named)


#: what prints the names for ``--param-order``
_PRINT = (
    "names = {p: n for n, p in model.named_parameters()}; "
    'print(*(names[p] for g in optimizer.param_groups for p in g["params"]), sep="\\n")'
)


def name_in_order(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], path: Path) -> Checkpoint:
    """The checkpoint with its optimizer state under the names that a file has, proved by shapes.

    Args:
        checkpoint: its states are numbered.
        shapes: of the model's parameters.
        path: the file: one name per line, group by group, in the optimizer's order.

    Raises:
        CheckpointError: it cannot be read, has another number of names, or one that does not fit.
    """
    try:
        given = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"cannot read the parameters' names in {path}: {why}",
            hint="give a text file with one name a line, in the order of optimizer.param_groups",
        ) from None
    bare = bare_names(given)
    names = [bare[name] for name in given]
    problem = _Problem.of(checkpoint, list(shapes.items()))
    numbers = [number for group in problem.groups for number in group]
    unknown = next((name for name in names if name not in shapes), None)
    if len(names) != len(numbers) or unknown is not None:
        found = f"{unknown!r} is no parameter" if unknown is not None else f"it has {len(names)} names"
        raise CheckpointError(
            f"{path}: expected the names of the optimizer's {len(numbers)} parameters, one per line, in its "
            f"own order; {found}",
            hint=f"in the training script, when the optimizer is made: {_PRINT}",
        )
    named = dict(zip(numbers, names, strict=True))
    wrong = next((number for number in problem.states if not problem.fits(number, named[number])), None)
    if wrong is not None:
        raise CheckpointError(
            f"{path}: {_mismatch(problem, wrong, named[wrong])}", hint=f"print it by {_PRINT}"
        )
    return checkpoint.renamed(named)


@dataclass(frozen=True)
class _Problem:
    """Numbers by group, the shapes of their state, and the parameters that they may be.

    Attributes:
        where: the checkpoint, for messages.
        groups: parameter numbers of every group, in order.
        states: number -> state name -> shape.
        shapes: parameter -> shape.
    """

    where: str
    groups: tuple[tuple[str, ...], ...]
    states: Mapping[str, Mapping[str, tuple[int, ...]]]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, checkpoint: Checkpoint, parameters: Sequence[Parameter]) -> _Problem:
        where = checkpoint.root.name
        for place, group in enumerate(checkpoint.param_groups):
            params = group.get("params", ())
            if not isinstance(params, (list, tuple)) or not all(isinstance(p, (int, str)) for p in params):
                raise CheckpointError(
                    f"{where}: params of optimizer group {place} must be a list of numbers, "
                    f"found {params!r:.80}"
                )
        groups = tuple(tuple(map(str, group.get("params", ()))) for group in checkpoint.param_groups)
        numbers = [number for group in groups for number in group]
        known = set(numbers)
        if len(known) != len(numbers):
            raise CheckpointError(f"{where}: a parameter is in two optimizer groups")
        states = {state.param: _shapes(checkpoint, state) for state in checkpoint.states}
        unknown = [number for number in states if number not in known]
        if unknown:
            raise CheckpointError(
                f"{where}: there is optimizer state of parameter {unknown[0]}, which is in no group"
            )
        return cls(where, groups, states, dict(parameters))

    def fits(self, number: str, name: str) -> bool:
        """Whether the state of a number has the shapes that a parameter would give it.

        Beside state whose shape tells the parameter, what has no known name says nothing.
        """
        shape, own = self.shapes[name], self.states.get(number, {})
        told = any(map(is_telling, own))
        return all(fits(slot, found, shape) for slot, found in own.items() if not told or is_named(slot))


def _shapes(checkpoint: Checkpoint, state: ParamState) -> dict[str, tuple[int, ...]]:
    return {slot: checkpoint.tensors[key].shape for slot, key in state.tensors.items()}


def _given_names(checkpoint: Checkpoint, problem: _Problem) -> dict[str, str] | None:
    """Names from the groups' own ``param_names``, if the optimizer was built from named parameters."""
    lists = [group.get("param_names") for group in checkpoint.param_groups]
    if not lists or not all(isinstance(names, list) for names in lists):
        return None
    named: dict[str, str] = {}
    for group, names in zip(problem.groups, lists, strict=True):
        if len(group) != len(names or ()):
            raise CheckpointError(f"{problem.where}: param_names and params of a group differ in length")
        named.update(zip(group, names or (), strict=True))
    for number, name in named.items():
        if name not in problem.shapes:
            raise CheckpointError(
                f"{problem.where}: the optimizer names {name!r}, which is no parameter of the model",
                hint="give the layout of the model that the optimizer was built for (--layout or --model)",
            )
        if not problem.fits(number, name):
            raise CheckpointError(_mismatch(problem, number, name))
    return named


def _resolve(
    problem: _Problem, names: Sequence[str], decay: Set[str], vocabulary: Set[str]
) -> dict[str, str]:
    """The trainer's own grouping if it fits; else the one other grouping that does, proved harder.

    Another grouping than the trainer's is a guess at what the user did. It is taken only if nothing is
    frozen, and if no two parameters of one shape are in different groups, so that they could be swapped.
    Groups of any other kind and number are told apart by shapes alone.
    """
    tried: list[str] = []
    found: dict[tuple[tuple[str, str], ...], str] = {}
    groupings = _groupings(len(problem.groups), names, decay, vocabulary, problem.shapes)
    for place, (label, grouping) in enumerate(groupings):
        outcome: dict[str, str] | str
        trainers = place == 0 or label == _OLDER_TRAINER
        try:
            outcome = _assign(problem, grouping, frozen=place == 0, twins=trainers)
        except _InDoubtError as error:
            outcome = str(error)
            tried = [f"{label}: {outcome}"]
            break
        if isinstance(outcome, str):
            tried.append(f"{label}: {outcome}")
        elif trainers:
            return outcome
        else:
            found.setdefault(tuple(sorted(outcome.items())), label)
    if len(problem.groups) > 1 and not found:
        alone = _by_shapes(problem, names)
        if not isinstance(alone, str):
            return alone
        known = "" if groupings else "groupings are known for one or two groups; "
        tried.append(f"{known}by shapes alone: {alone}")
    if len(found) == 1:
        return dict(next(iter(found)))
    tried += [f"{label}: fits, and so does another" for label in found.values()]
    sizes = ", ".join(str(len(group)) for group in problem.groups)
    raise CheckpointError(
        f"{problem.where}: the optimizer's parameters cannot be told apart beyond doubt. Its groups have "
        f"{sizes} parameters, the model has {len(names)}, {len(decay)} of them decayed.\n  "
        + "\n  ".join(tried),
        hint="was it another model or another grouping? Give the order by --param-order FILE, "
        f"printed when the optimizer is made: {_PRINT}",
    )


class _InDoubtError(Exception):
    """A grouping fits in several ways."""


#: of Trainers that decayed the scale of every norm but torch's LayerNorm
_OLDER_TRAINER = "all but biases, then biases (older Trainers')"


def _groupings(
    count: int,
    names: Sequence[str],
    decay: Set[str],
    vocabulary: Set[str],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[tuple[str, Grouping]]:
    """The groupings in use for that many groups, the trainer's own first."""
    if count == 1:
        return [("one group in the model's order", (tuple(names),))]

    def split(chosen: Sequence[bool], label: str) -> tuple[str, Grouping]:
        first = tuple(name for name, own in zip(names, chosen, strict=True) if own)
        second = tuple(name for name, own in zip(names, chosen, strict=True) if not own)
        return label, (first, second)

    if count == 2:
        matrices = [len(shapes[name]) >= 2 for name in names]
        known = [
            split([name in decay for name in names], "decayed parameters, then the others (the Trainer's)"),
            split([not name.endswith("bias") for name in names], _OLDER_TRAINER),
            split([name not in decay for name in names], "undecayed parameters, then the others"),
            split(matrices, "matrices, then vectors"),
            split([not m for m in matrices], "vectors, then matrices"),
        ]
        if vocabulary:
            hidden = [m and name not in vocabulary for m, name in zip(matrices, names, strict=True)]
            known += [
                split(hidden, "matrices but embeddings and head, then the others (Muon's)"),
                split([not h for h in hidden], "embeddings, head and vectors, then the other matrices"),
            ]
        return known
    return []


def _by_shapes(problem: _Problem, names: Sequence[str]) -> dict[str, str] | str:
    """Groups of any kind, each in the model's order: all parameters of one shape are in one group.

    Which group a parameter is in then follows from its shape, and its number from the order of those that
    have the same shape. Nothing may be frozen that has the shape of something that is not.
    """
    numbers: dict[tuple[int, ...], list[str]] = {}
    home: dict[tuple[int, ...], int] = {}
    for index, group in enumerate(problem.groups):
        for number in group:
            found = [f for s, f in problem.states.get(number, {}).items() if s in MOMENTS]
            if not found:
                return f"parameter {number} has no state of its own shape"
            if home.setdefault(found[0], index) != index:
                twins = ", ".join(repr(n) for n in names if problem.shapes[n] == found[0])
                return f"groups {home[found[0]]} and {index} both have the shape {found[0]} of {twins}"
            numbers.setdefault(found[0], []).append(number)
    named: dict[str, str] = {}
    for shape, same in numbers.items():
        alike = [name for name in names if problem.shapes[name] == shape]
        if len(alike) != len(same):
            return f"{len(same)} parameters have the shape {shape}, in the model {len(alike)}"
        named.update(zip(same, alike, strict=True))
    places = {name: place for place, name in enumerate(names)}
    for index, group in enumerate(problem.groups):
        if sorted(group, key=lambda number: places[named[number]]) != list(group):
            return f"group {index} is not in the model's order"
    wrong = next((n for n, name in named.items() if not problem.fits(n, name)), None)
    return named if wrong is None else _mismatch(problem, wrong, named[wrong])


def _assign(problem: _Problem, grouping: Grouping, *, frozen: bool, twins: bool) -> dict[str, str] | str:
    """Numbers to names under a grouping, or why it does not work.

    Args:
        problem: the numbers, and the names' shapes.
        grouping: the names.
        frozen: a group may have fewer numbers than names; which ones must follow from the shapes.
        twins: parameters of one shape may be in different groups.
    """
    home: dict[tuple[int, ...], tuple[int, str]] = {}
    for index, name in ((index, name) for index, names in enumerate(grouping) for name in names):
        other, twin = home.setdefault(problem.shapes[name], (index, name))
        if other != index and not twins:
            return f"{name!r} and {twin!r} have one shape and would be in different groups"
    pairs = list(enumerate(zip(problem.groups, grouping, strict=True)))
    for index, (numbers, names) in pairs:
        if len(numbers) > len(names) or (len(numbers) < len(names) and not frozen):
            return f"group {index} has {len(numbers)} parameters, {len(names)} expected"
    named: dict[str, str] = {}
    for index, (numbers, names) in pairs:
        if len(numbers) == len(names):
            for number, name in zip(numbers, names, strict=True):
                if not problem.fits(number, name):
                    return _mismatch(problem, number, name)
            named.update(zip(numbers, names, strict=True))
            continue
        outcome = _embed(problem, numbers, names)
        if isinstance(outcome, str):
            return f"group {index} has {len(numbers)} of {len(names)} parameters (frozen ones?): {outcome}"
        named.update(outcome)
    return named


def _embed(problem: _Problem, numbers: Sequence[str], names: Sequence[str]) -> dict[str, str] | str:
    """The one way to lay ``numbers`` into ``names`` in order, with some names left out.

    Earliest and latest possible places are found greedily; there is exactly one way if they agree.

    Raises:
        _InDoubtError: there are several ways.
    """
    earliest: list[int] = []
    at = 0
    for number in numbers:
        while at < len(names) and not problem.fits(number, names[at]):
            at += 1
        if at == len(names):
            return f"no parameter is left whose shape fits the state of {number}"
        earliest.append(at)
        at += 1
    at = len(names) - 1
    for place, number in reversed(list(enumerate(numbers))):
        while not problem.fits(number, names[at]):
            at -= 1
        if at != earliest[place]:
            raise _InDoubtError(
                f"the state of {number} may be that of {names[earliest[place]]!r} or of {names[at]!r}"
            )
        at -= 1
    return {number: names[place] for number, place in zip(numbers, earliest, strict=True)}


def _mismatch(problem: _Problem, number: str, name: str) -> str:
    shapes: Any = problem.states[number]
    slot, found = next((s, f) for s, f in shapes.items() if not fits(s, f, problem.shapes[name]))
    return (
        f"state {slot!r} of parameter {number} has shape {found}; {name!r}, which the number stands for, has "
        f"{problem.shapes[name]}"
    )
