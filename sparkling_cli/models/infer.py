"""The layout of any model that can be built: inferred from its code, proved by its logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparkling_cli.errors import LayoutError
from sparkling_cli.formats.pause import collector_running
from sparkling_cli.layout.file import from_dict, to_dict
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.models import cache

#: Config keys that no tensor's shape and no layer's kind depends on.
_IRRELEVANT = frozenset(
    {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache", "id2label", "label2id"}
)


def infer(
    config: Mapping[str, Any],
    *,
    model: str | None = None,
    axes: Sequence[str] | None = None,
    model_factory: Any = None,
) -> ModelLayout:
    """Layout of the model of a config, each axis proved or refused with a reason.

    What was proved is kept in the cache.

    Args:
        config: the content of ``config.json``, or what the user's factory takes.
        model: ``package.module:factory`` of the user's own model.
        axes: axes that must be proved; None asks for nothing.
        model_factory: the factory itself, instead of ``model``.

    Returns:
        The layout, for module names and for names on disk.

    Raises:
        LayoutError: no tiny model runs, a tensor cannot be explained, or one of ``axes`` is refused.
    """
    own = model is not None or model_factory is not None
    kept = {k: v for k, v in config.items() if k not in _IRRELEVANT}
    key = cache.key_of("layout", kept)
    stored = None if own else cache.load("layouts", key)
    if stored is not None:
        layout = from_dict(stored, "cached layout")
    else:
        layout = _inferred(config, model, model_factory)
        if not own:
            cache.store("layouts", key, to_dict(layout))
    return _with(axes, layout)


def _with(axes: Sequence[str] | None, layout: ModelLayout) -> ModelLayout:
    """The layout, if it has all these axes proved."""
    for axis in axes or ():
        info = layout.axes.get(layout.aliases.get(axis, axis))
        if info is None or not info.widenable:
            raise LayoutError(f"axis {axis!r} of {layout.name}: {info.reason if info else 'there is none'}")
    return layout


@collector_running()
def _inferred(config: Mapping[str, Any], model: str | None, model_factory: Any) -> ModelLayout:
    import torch

    from sparkling_cli.models.court import judge
    from sparkling_cli.models.realize import realize
    from sparkling_cli.models.renamed import usual_names
    from sparkling_cli.models.shrink import shrink
    from sparkling_cli.models.skeleton import load_factory, model_errors, text_config

    factory = load_factory(model) if model is not None else model_factory
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    try:
        with model_errors(config, model):
            renamed = None if factory is None else usual_names(config, factory)
            if renamed is not None:
                config, factory = renamed.config, renamed.factory
            real = text_config(config, factory=factory)
            tiny = shrink(config, factory=factory)
            judged = judge(tiny, factory=factory)
            name = (real.get("architectures") or [model or "model"])[0]
            layout = realize(judged, config, real, name=name, factory=factory)
            return layout if renamed is None else renamed.restore(layout)
    finally:
        torch.set_num_threads(threads)
