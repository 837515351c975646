"""The layout of any model that can be built: inferred from its code, proved by its logits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sparkling_cli.errors import LayoutError
from sparkling_cli.formats.gc_pause import collector_running
from sparkling_cli.layout.expr import axis_names
from sparkling_cli.layout.file import from_dict, to_dict
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.layout.parse import parse_expr
from sparkling_cli.models.own_code import check_own_code
from sparkling_cli.models.sizes import HEADS
from sparkling_cli.storage import cache

#: Config keys that no tensor's shape and no layer's kind depends on.
_IRRELEVANT = frozenset(
    {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache", "id2label", "label2id"}
)
#: Errors that another machine, or another package, would not have.
_PASSING = re.compile(r"ImportError|ModuleNotFoundError|MemoryError|No module named|library but it was not")


def infer(
    config: Mapping[str, Any],
    *,
    model: str | None = None,
    model_factory: Any = None,
) -> ModelLayout:
    """Layout of the model of a config, each axis proved or refused with a reason.

    What was proved is kept in the cache, and so is a refusal.

    Args:
        config: the content of ``config.json``, or what the user's factory takes.
        model: ``package.module:factory`` of the user's own model.
        model_factory: the factory itself, instead of ``model``.

    Returns:
        The layout, for module names and for names on disk.

    Raises:
        LayoutError: no tiny model runs, or a tensor cannot be explained.
    """
    own = model is not None or model_factory is not None
    if not own:
        check_own_code(config)
    kept = {k: v for k, v in config.items() if k not in _IRRELEVANT}
    key = cache.key_of("layout", kept)
    stored = None if own else cache.load("layouts", key)
    if stored is not None and "refused" in stored:
        raise LayoutError(stored["refused"], hint=stored["hint"])
    if stored is not None:
        return from_dict(stored, "cached layout")
    try:
        layout = _inferred(config, model, model_factory)
    except LayoutError as error:
        if not own and not _PASSING.search(error.message):
            cache.store("layouts", key, {"refused": error.message, "hint": error.hint})
        raise
    if not own:
        cache.store("layouts", key, to_dict(layout))
    return layout


def _divisible(config: Mapping[str, Any], layout: ModelLayout) -> tuple[tuple[str, str], ...]:
    """Counts of heads of which the class wants ``hidden`` to be a multiple: its config refuses another."""
    from sparkling_cli.models.skeleton import config_object

    width = layout.axes.get("hidden")
    found = []
    for key, term in layout.config.items():
        count = config.get(key)
        if width is None or type(count) is not int or not set(axis_names(parse_expr(term))) <= HEADS:
            continue
        groups = layout.axes["kv_heads"].size if "q_per_kv" in layout.axes else 1
        others = [n for n in range(count + groups, 3 * count + 3 * groups, groups) if width.size % n]
        if width.size % count == 0 and others:
            try:
                config_object({**config, key: others[0]})
            except LayoutError:
                found.append(("hidden", term))
    return tuple(found)


@collector_running()
def _inferred(config: Mapping[str, Any], model: str | None, model_factory: Any) -> ModelLayout:
    import torch

    from sparkling_cli.models.prove import prove_axes
    from sparkling_cli.models.real_layout import real_layout
    from sparkling_cli.models.renamed import usual_names
    from sparkling_cli.models.shrink import shrink
    from sparkling_cli.models.skeleton import load_factory, model_errors, text_part

    factory = load_factory(model) if model is not None else model_factory
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    try:
        with model_errors(config, model):
            renamed = None if factory is None else usual_names(config, factory)
            if renamed is not None:
                config, factory = renamed.config, renamed.factory
            real, prefix = text_part(config, factory=factory)
            tiny = shrink(config, factory=factory)
            findings = prove_axes(tiny, factory=factory)
            name = (real.get("architectures") or [model or "model"])[0]
            layout = real_layout(findings, config, real, prefix, name=name, factory=factory)
            if factory is None:
                layout = replace(layout, divisible=_divisible(config, layout))
            return layout if renamed is None else renamed.restore(layout)
    finally:
        torch.set_num_threads(threads)
