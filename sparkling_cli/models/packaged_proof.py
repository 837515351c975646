"""The package's layout file of a class, proved as inference is: by the logits of tiny random models.

Files widen classes that inference cannot explain. What one says of a tiny instance of the class's default
config is measured like any hypothesis, at two and three times each axis.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.expr import COUNTED, Axis, atoms
from sparkling_cli.layout.keys import path_of
from sparkling_cli.layout.model import Compensation, ModelLayout
from sparkling_cli.layout.names import NameTemplate
from sparkling_cli.layout.packaged import packaged_data, packaged_names
from sparkling_cli.layout.parse import parse_expr
from sparkling_cli.layout.solve import solve_layout
from sparkling_cli.models.axes import TinyAxes, TinyAxis
from sparkling_cli.models.disk import to_disk
from sparkling_cli.models.parity import LogitParity
from sparkling_cli.models.shrink import changed, tiny_configs
from sparkling_cli.models.skeleton import ConfigDict, build_model, default_config, shared_names, text_config
from sparkling_cli.results.commands import ArchitectureAxis


@functools.cache
def _files() -> dict[str, str]:
    classes = ((name, packaged_data(name).get("classes", {})) for name in packaged_names())
    return {model_type: name for name, own in classes for model_type in own}


def file_of(model_type: str) -> str:
    """Name of the layout file that is for a class of transformers; empty where there is none."""
    return _files().get(model_type, "")


def proved_by_file(model_type: str) -> list[ArchitectureAxis]:
    """The axes of a class's file that keep the logits of a tiny model that it fits."""
    name = file_of(model_type)
    if not name:
        return []
    found: dict[str, ArchitectureAxis] = {}
    for tiny in _tiny_configs(text_config(default_config(model_type))):
        with suppress(LayoutError):
            found = {axis.name: axis for axis in _proved(name, tiny)} | found
        if found.keys() >= set(_widenable(name)):
            break
    return [found[axis] for axis in _widenable(name) if axis in found]


def _tiny_configs(real: ConfigDict) -> Iterator[ConfigDict]:
    """Those of the class, and, where the default config has no attention at all, with a layer of it."""
    for tiny in tiny_configs(real):
        yield tiny
        kinds = tiny.get("layer_types")
        if isinstance(kinds, list) and len(kinds) > 1 and set(kinds) == {"linear_attention"}:
            yield {**tiny, "layer_types": [kinds[0], "full_attention", *kinds[2:]]}
        if "attn_layer_indices" in tiny and not tiny["attn_layer_indices"]:
            yield {**tiny, "attn_layer_indices": [1]}


def _widenable(name: str) -> list[str]:
    axes = packaged_data(name)["axes"].items()
    return [axis for axis, info in axes if info.get("widenable") and axis not in COUNTED]


def _proved(name: str, tiny: ConfigDict) -> list[ArchitectureAxis]:
    data = packaged_data(name)
    model = build_model(tiny, meta=False)
    sizes = {tensor: tuple(value.shape) for tensor, value in model.state_dict().items()}
    followers = {other for group in shared_names(model) for other in group[1:]}
    disk = {key: tuple(value.shape) for key, value in to_disk(model, model.state_dict()).items()}
    stored = {key: shape for key, shape in disk.items() if key not in followers}
    own = {key: shape for key, shape in sizes.items() if key not in followers} if "disk" in data else {}
    layout = solve_layout(data, stored, own, tiny, f"packaged layout {name}")
    parity = LogitParity(_axes(layout, tiny, sizes))
    layouts = {tensor: layout.module_table.find(layout.canonical(tensor)).dims for tensor in sizes}
    factors = list(_factors(layout, sizes))
    roles = {axis: role for role, axis in data.get("aliases", {}).items()}
    found = []
    for axis in _widenable(name):
        joint = tuple(layout.axes[axis].joint) if axis in layout.axes else ()
        kept, error = parity.proves(layouts, [axis, *joint], factors) if axis in layout.axes else (False, 0.0)
        if kept:
            reason = f"by the package's {name}.toml, logits of a tiny random model kept at 2x and 3x "
            found.append(
                ArchitectureAxis(
                    name=axis,
                    role=roles.get(axis, axis),
                    proved=True,
                    reason=f"{reason}(relative error {error:.1e})",
                    joint=joint,
                    layout_file=f"{name}.toml",
                )
            )
    return found


def _axes(layout: ModelLayout, tiny: ConfigDict, sizes: dict[str, tuple[int, ...]]) -> TinyAxes:
    """The file's axes and config terms, as those that are found are written."""
    terms = {
        path_of(key): tuple(a.name if isinstance(a, Axis) else str(a.size) for a in atoms(parse_expr(text)))
        for key, text in layout.config.items()
    }
    now = {path_of(key): n for key, n in layout.config_sizes(layout.sizes).items()}
    axes = {name: TinyAxis(None, info.size) for name, info in layout.axes.items()}
    return TinyAxes(changed(tiny, now), axes, terms, sizes)


def _factors(layout: ModelLayout, names: dict[str, tuple[int, ...]]) -> Iterator[Compensation]:
    """The file's factors, on each tensor that they are for."""
    for factor in layout.compensations:
        template = NameTemplate(factor.tensor)
        yield from (replace(factor, tensor=n) for n in names if template.matches(layout.canonical(n)))
