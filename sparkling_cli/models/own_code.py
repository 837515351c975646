"""Checkpoints with a model's code of their own: it is not run, and no other class is taken for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparkling_cli.errors import LayoutError


def check_own_code(config: Mapping[str, Any]) -> None:
    """The library has the class of the config: it is not code that lies in the checkpoint (``auto_map``).

    Such a class may do with its widths what no class of its ``model_type`` does. One that was taken into the
    library later, maybe under another case (``MPTForCausalLM``), is the library's. Without ``auto_map`` there
    is no other code: every loader takes the class of ``model_type``.

    Raises:
        LayoutError: neither ``architectures`` nor, where that is empty, ``auto_map`` names a class of the
            library; says how the model's own code is given.
    """
    table = config.get("auto_map")
    table = table if isinstance(table, Mapping) else {}
    code = {key: str(ref) for key, ref in table.items() if key.startswith("AutoModel") and ref}
    named = [str(name) for name in config.get("architectures") or ()]
    named = named or [ref.rpartition(".")[2] for ref in code.values()]
    if not code or any(map(_in_library, named)):
        return
    reference = code.get("AutoModelForCausalLM") or next(iter(code.values()))
    raise LayoutError(
        f"the installed transformers has no class {named[0]!r}, which config.json names: the model's code is "
        f"{reference} (auto_map), and no code is run that lies in a checkpoint, nor is the class of "
        f"model_type {config.get('model_type')!r} taken for it",
        hint="give the model's own code, --model package.module:factory, with a function of yours that takes "
        "the config and builds that class (docs/how-to/own-model.md), or a layout file (--layout FILE)",
    )


def _in_library(class_name: str) -> bool:
    """The installed transformers has a class of that name, or a causal LM whose name differs in case only."""
    try:
        import transformers
    except ImportError:
        return False
    from sparkling_cli.models.skeleton import causal_lm_names  # imports torch

    causal = {name.lower() for name in causal_lm_names().values()}
    return hasattr(transformers, class_name) or class_name.lower() in causal
