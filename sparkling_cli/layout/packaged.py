"""Layout files that come with the package: which one fits a checkpoint.

In such a file ``[[variants]]`` are further layouts, each with a name of its own, the entries in which it
differs from the file's, and in ``without`` the entries that it has not. Beside ``[assembly]`` the table
``[disk]`` has those names alone that tensors of the module are put together of; all others are the module's.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cache
from importlib.resources import files
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkling_cli.errors import LayoutError
from sparkling_cli.formats.optimizer_states import is_named
from sparkling_cli.layout.file import from_dict, read_toml
from sparkling_cli.layout.model import ModelLayout, PatternTable, TensorPattern
from sparkling_cli.layout.names import NameTemplate, skeletons
from sparkling_cli.layout.presence import NamesDifferError, Shapes
from sparkling_cli.layout.solve import is_open, solve_layout

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from sparkling_cli.formats.model import Checkpoint

#: a line of a table of tensors that does not end in ``?``
_NEEDED = re.compile(r'^"([^"]*[^"?])" *=', re.MULTILINE)


#: of a file's layout, or of a variant
_NAME = re.compile(r'^name = "(.+)"$', re.MULTILINE)


@cache
def _texts() -> tuple[str, ...]:
    """The layout files in the package."""
    folder = files("sparkling_cli").joinpath("layouts").iterdir()
    found = sorted((p for p in folder if p.name.endswith(".toml")), key=lambda p: p.name)
    return tuple(path.read_text(encoding="utf-8") for path in found)


def packaged_names() -> tuple[str, ...]:
    """Names of the layouts in the package, e.g. ``nanogpt``."""
    return tuple(sorted(name for text in _texts() for name in _NAME.findall(text)))


def packaged_data(name: str) -> dict[str, Any]:
    """The parsed layout file of that name.

    Raises:
        LayoutError: there is none.
    """
    if name not in packaged_names():
        known = ", ".join(packaged_names())
        raise LayoutError(f"no layout file {name!r} comes with the package (there are: {known})")
    return next(data for data in _layouts_in(_text(name)) if data["name"] == name)


def _text(name: str) -> str:
    """The file that has the layout of that name."""
    return next(text for text in _texts() if name in _NAME.findall(text))


def _layouts_in(text: str) -> list[dict[str, Any]]:
    data = tomllib.loads(text)
    varied = [_varied(data, one, set(one.pop("without", ()))) for one in data.pop("variants", ())]
    return [_with_all_of_disk(one) if "assembly" in one else one for one in (*varied, data)]


def _with_all_of_disk(data: dict[str, Any]) -> dict[str, Any]:
    """A layout whose ``disk`` has all names on disk: what is put together of others gives way to these."""
    own = {name.removesuffix("?"): (name, text) for name, text in data["disk"].items()}
    disk: dict[str, str] = {}
    for name, text in data["tensors"].items():
        parts = data["assembly"].get(name.removesuffix("?"))
        disk.update([(name, text)] if parts is None else [own[part] for part in parts])
    return {**data, "disk": disk}


def _varied(base: Mapping[str, Any], changes: Mapping[str, Any], without: Set[str]) -> dict[str, Any]:
    """A table with other values; whether a name may be missing (``?``) goes with its value."""
    new = {key.removesuffix("?"): (key, value) for key, value in changes.items()}
    varied = {}
    for key, value in base.items():
        if key not in without:
            other, given = new.pop(key.removesuffix("?"), (key, value))
            inner = isinstance(value, Mapping) and isinstance(given, Mapping)
            varied[other] = _varied(value, {} if given is value else given, without) if inner else given
    return {**varied, **dict(new.values())}


def _may_fit(text: str, kinds: Set[str], model_type: object) -> bool:
    """Whether the first tensor that a file needs, which is called alike on disk, is in a model of its types.

    To parse a file takes longer than to look.

    Args:
        text: the file.
        kinds: skeletons of the names on disk.
        model_type: of the checkpoint's config.
    """
    if "\n[classes]\n" in text and f"\n{model_type} = " not in text:
        return False
    needed = _NEEDED.search(text, text.index("\n[tensors]\n"))
    return needed is None or NameTemplate(needed[1]).key in kinds


def base_prefixes(model_type: object) -> tuple[str, ...]:
    """Prefixes of the base model's names in the files that are for a model type, with their dot."""
    found = set()
    for text in _texts():
        first = _NEEDED.search(text, text.index("\n[tensors]\n"))
        if first and "\n[classes]\n" in text and f"\n{model_type} = " in text:
            found.add(first[1].partition(".")[0] + ".")
    return tuple(sorted(found))


def find_packaged(checkpoint: Checkpoint, sizing: Sequence[str] = ()) -> ModelLayout | None:
    """The layout of a checkpoint, from the one packaged file that fits it; None if none does.

    Args:
        checkpoint: the source.
        sizing: config keys whose numbers size something, which a file of a class must know.

    Raises:
        LayoutError: the names are those of one file but the shapes contradict it, or several fit, or the one
            that fits does not tie what is the same in the checkpoint.
    """
    fitting, faults = _fitting(checkpoint, sizing, frozenset())
    loose = frozenset() if fitting or faults else checkpoint.loose
    if loose:
        fitting, faults = _fitting(checkpoint, sizing, loose)
    fitting = [layout for layout in fitting if _shared_is_tied(checkpoint, layout)]
    if len(fitting) > 1:
        names = ", ".join(layout.name for layout in fitting)
        raise LayoutError(
            f"{len(fitting)} packaged layouts fit this checkpoint: {names}",
            hint="choose one: pass it by --layout",
        )
    if not fitting and faults:
        raise faults[0]
    if fitting and checkpoint.format == "dcp":
        _refuse_unknown_ties(checkpoint, fitting[0])
    return fitting[0] if fitting else None


def _fitting(
    checkpoint: Checkpoint, sizing: Sequence[str], loose: Set[str]
) -> tuple[list[ModelLayout], list[LayoutError]]:
    """The layouts of all packaged files that fit, and what contradicts those whose names do.

    Args:
        checkpoint: see :func:`find_packaged`.
        sizing: see there.
        loose: weights that a file need not know.
    """
    weights, states = shapes_of(checkpoint)
    kinds = set(skeletons(weights))
    fitting: list[ModelLayout] = []
    faults: list[LayoutError] = []
    model_type = (checkpoint.config or {}).get("model_type")
    possible = [text for text in _texts() if _may_fit(text, kinds, model_type)]
    for data in sorted((data for text in possible for data in _layouts_in(text)), key=itemgetter("name")):
        apart = _unknown(data, loose)
        own = {weight: shape for weight, shape in weights.items() if weight not in apart}
        same = _same_weights(checkpoint)
        where = f"packaged layout {data['name']}"
        try:
            fitting.append(
                solve_layout(data, own, states, checkpoint.config, where, alike=same, sizing=sizing)
            )
        except NamesDifferError:
            continue
        except LayoutError as error:
            faults.append(error)
    return fitting, faults


def _unknown(data: Mapping[str, Any], names: Set[str]) -> set[str]:
    """Those of the names that no pattern of a parsed file stands for."""
    table = {p.removesuffix("?"): t for key in ("disk", "tensors") for p, t in data.get(key, {}).items()}
    patterns = PatternTable(TensorPattern(*item) for item in table.items())
    return {name for name in names if not patterns.has(name)}


def _same_weights(checkpoint: Checkpoint) -> Callable[[str, str], bool]:
    """Whether two weights are one: where a format stores tied ones twice (DCP) their values say so."""

    def same(one: str, other: str) -> bool:
        keys = checkpoint.weights[one], checkpoint.weights[other]
        return keys[0] == keys[1] or (checkpoint.format == "dcp" and checkpoint.alike(*keys))

    return same


def _refuse_unknown_ties(checkpoint: Checkpoint, layout: ModelLayout) -> None:
    """Names that models of other files tie must not share their values where the layout unties them.

    Raises:
        LayoutError: they do: one factor would have to fit a matrix that is both embedding and head.
    """
    tied = (group for name in packaged_names() for group in packaged_data(name).get("tied", ()))
    for group in set(map(frozenset, tied)) - {frozenset(group) for group in layout.tied}:
        first, *others = sorted(group)
        if group <= checkpoint.weights.keys() and all(
            checkpoint.alike(checkpoint.weights[first], checkpoint.weights[other]) for other in others
        ):
            names = " and ".join([first, *others])
            raise LayoutError(
                f"packaged layout {layout.name} is for models whose {names} are not tied, as they are here",
                hint="pass a layout in which they stand under tied by --layout",
            )


def _shared_is_tied(checkpoint: Checkpoint, layout: ModelLayout) -> bool:
    """Whether all names that share their bytes are tied in the layout."""
    owners: dict[str, str] = {}
    return len(set(checkpoint.weights.values())) == len(checkpoint.weights) or all(
        layout.canonical(owners.setdefault(key, name)) == layout.canonical(name)
        for name, key in checkpoint.weights.items()
    )


def layout_for(checkpoint: Checkpoint, path: Path) -> ModelLayout:
    """A user's layout file for a checkpoint, or the packaged one of that name; open sizes are solved.

    Args:
        checkpoint: the source.
        path: the file, or a name of :func:`packaged_names`.

    Raises:
        LayoutError: it cannot be read, is malformed, or does not fit the checkpoint.
    """
    if not path.exists() and str(path) in packaged_names():
        data = packaged_data(str(path))
    else:
        data = read_toml(path)
    if not is_open(data):
        return from_dict(data, str(path))
    weights, states = shapes_of(checkpoint)
    same = _same_weights(checkpoint)
    return solve_layout(data, weights, states, checkpoint.config, str(path), alike=same)


def shapes_of(checkpoint: Checkpoint) -> tuple[Shapes, Shapes]:
    """Shapes of the weights, and of the state of every parameter: that of its known state of most dims."""
    states: dict[str, tuple[int, ...]] = {}
    for state in checkpoint.states:  # numbers are named later, with the layout's help
        known = [key for slot, key in state.tensors.items() if is_named(slot)] or state.tensors.values()
        shapes = [checkpoint.tensors[key].shape for key in known]
        if shapes and not state.param.isdigit():
            states[state.param] = max(shapes, key=len)
    return checkpoint.shapes, states
