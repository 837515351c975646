"""Which layout holds for a checkpoint, and which parameter each piece of optimizer state belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparkling_cli.errors import LayoutError
from sparkling_cli.formats.gc_pause import collector_running
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.layout.expr import Role, axis_names
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.models.own_code import check_own_code
from sparkling_cli.models.sizes import kind_of, walk
from sparkling_cli.models.stored import buffers_in, fitted_to, ignored_by
from sparkling_cli.storage import cache

if TYPE_CHECKING:
    from sparkling_cli.manifest import Manifest


class Parameters(NamedTuple):
    """What a class says of its parameters.

    Attributes:
        shapes: names and shapes, in ``named_parameters()`` order.
        decayed: names of those that the Trainer decays.
        ignored: patterns of names that the class leaves aside when it loads a checkpoint.
    """

    shapes: list[tuple[str, tuple[int, ...]]]
    decayed: set[str]
    ignored: tuple[str, ...]


#: What config keys hold that a packaged layout must know, by the roots of their names.
_WIDTHS = frozenset(
    {"hidden", "ffn", "expert_ffn", "shared_ffn", "heads", "kv_heads", "head_dim", "experts"}
    | {"shared_experts", "q_lora", "kv_lora", "qk_nope", "qk_rope", "v_dim"}
)


def find_layout(
    checkpoint: Checkpoint,
    *,
    layout_path: Path | None = None,
    model: str | None = None,
    previous: Manifest | None = None,
) -> ModelLayout:
    """The layout: a given file, an earlier manifest, a file of the package, or inference, in this order.

    Raises:
        LayoutError: none of them yields one; says what can be done.
    """
    if layout_path is not None and model is not None:
        raise LayoutError("--layout and --model both say what the model is; give one")
    from sparkling_cli.models.config_check import check_counts, check_plain, check_tensors

    check_plain(checkpoint)
    if layout_path is not None:
        from sparkling_cli.layout.packaged import layout_for

        return layout_for(checkpoint, layout_path)
    shapes = checkpoint.shapes
    if model is None and previous is not None:
        return fitted_to(shapes, previous.model_layout())
    if model is None:
        packaged = packaged_layout(checkpoint)
        named = (checkpoint.config or {}).get("architectures")  # a packaged file knows its class by that
        if checkpoint.config is not None and (packaged is None or not named):
            check_own_code(checkpoint.config)
        if packaged is not None:
            return fitted_to(shapes, packaged)
    if checkpoint.config is None or (model is None and "model_type" not in checkpoint.config):
        own = "pass --layout FILE (docs: layout language) or --model package.module:factory"
        bare = checkpoint.config is None and checkpoint.root.is_dir()
        raise LayoutError(
            f"nothing says what model {checkpoint.root} holds: no config of a transformers class, and no "
            "layout file of the package fits its tensors",
            hint=f"of a transformers model, copy its config.json into it; else {own}" if bare else own,
        )
    from sparkling_cli.models.infer import infer

    if model is None:
        check_counts(checkpoint)
        check_tensors(checkpoint, model_parameters(checkpoint.config, None))
    return fitted_to(shapes, infer(checkpoint.config, model=model))


def packaged_layout(checkpoint: Checkpoint) -> ModelLayout | None:
    """The packaged layout that fits; names alone (those of GPT-2, say) do not overrule a config's class.

    Names may lack the base model's prefix, and there may be old buffers: see ``models.stored.fitted_to``.
    """
    from sparkling_cli.layout.packaged import base_prefixes, find_packaged

    config = checkpoint.config or {}
    sizing = [
        ".".join(path)
        for path, value in walk(config)
        if (kind_of(path[-1]) in _WIDTHS and type(value) is int) or _is_rotary_table(path[-1], value)
    ]
    buffers = buffers_in(checkpoint.shapes)
    own = {name: key for name, key in checkpoint.weights.items() if name not in buffers}
    named = [own]
    for prefix in base_prefixes(config.get("model_type")):
        if not any(name.startswith(prefix) for name in own):
            named.append({name if name == "lm_head.weight" else prefix + name: own[name] for name in own})
    for weights in named:
        source = replace(checkpoint, weights=weights)
        try:
            found = find_packaged(source, sizing)
        except LayoutError:
            if "model_type" not in config:
                raise
            continue
        if found is not None:
            return found
    return None


def _is_rotary_table(key: str, value: object) -> bool:
    """Whether it has an entry for every rotary frequency: what a head may become depends on its length."""
    return key.endswith("_factor") and isinstance(value, list)


def named_states(
    checkpoint: Checkpoint,
    layout: ModelLayout,
    *,
    model: str | None = None,
    param_order: Path | None = None,
) -> Checkpoint:
    """The checkpoint with optimizer state under parameter names, proved by shapes.

    Formats that name their parameters are returned as they are. Numbers are resolved in the order of
    the model's own parameters where its class is known, else of the weights in the file.

    Args:
        checkpoint: the source.
        layout: its layout.
        model: a user's own model.
        param_order: a file with the names in the optimizer's order, which is proved by shapes too.

    Raises:
        CheckpointError: the numbers cannot be resolved beyond doubt.
    """
    if not any(state.param.isdigit() for state in checkpoint.states):
        return checkpoint
    from sparkling_cli.formats.numbered_states import name_in_order, name_parameters

    if param_order is not None:
        return name_in_order(checkpoint, layout.parameters(), param_order)
    config = checkpoint.config or {}
    if model is None and (layout.ordered or "model_type" not in config):
        followers = {name for group in layout.tied for name in group[1:]}
        in_file = [(name, shape) for name, shape in checkpoint.shapes.items() if name not in followers]
        parameters = list(layout.parameters().items()) if layout.ordered else in_file
        decayed = {name for name, shape in parameters if len(shape) > 1}
        return name_parameters(checkpoint, parameters, decayed, vocabulary_of(layout, parameters))
    if model is None:
        from sparkling_cli.models.config_check import check_counts

        check_counts(checkpoint)
    known = model_parameters(config, model)
    return name_parameters(checkpoint, known.shapes, known.decayed, vocabulary_of(layout, known.shapes))


def vocabulary_of(layout: ModelLayout, parameters: Iterable[tuple[str, tuple[int, ...]]]) -> frozenset[str]:
    """Embeddings and output heads: matrices on the vocabulary, or on an axis that no tensor produces.

    Such an axis (positions) is looked up in, not computed.
    """
    produced, consumed = (
        {
            axis
            for pattern in layout.tensors
            for dim in pattern.dims.dims
            if dim.role is role
            for axis in axis_names(dim.expr)
        }
        for role in (Role.OUT, Role.IN)
    )
    looked_up = {"vocab"} | (consumed - produced)
    return frozenset(
        name
        for name, shape in parameters
        if len(shape) > 1 and layout.module_table.find(layout.canonical(name)).dims.axes() & looked_up
    )


def model_parameters(config: Mapping[str, Any], model: str | None) -> Parameters:
    """What the class of a config, or the user's factory, says of its parameters; kept like layouts."""
    key = cache.key_of(config, model)
    found = cache.load("parameters", key) if model is None else None
    if found is None:
        found = ask_model(config, model)
        if model is None:
            cache.store("parameters", key, found)
    shapes = [(name, tuple(shape)) for name, shape in found["parameters"]]
    return Parameters(shapes, set(found["decayed"]), tuple(found["ignored"]))


@collector_running()
def ask_model(config: Mapping[str, Any], model: str | None) -> dict[str, Any]:
    """Parameters and decayed names as the model itself, built on the meta device, says them."""
    from sparkling_cli.models.skeleton import build_model, load_factory, model_errors

    factory = None if model is None else load_factory(model)
    with model_errors(config, model):
        from transformers import Trainer

        built = build_model(config, factory=factory)
    decayed = Trainer.get_decay_parameter_names(None, built)  # uses no state of the trainer
    return {
        "parameters": [[name, list(p.shape)] for name, p in built.named_parameters()],
        "decayed": sorted(decayed),
        "ignored": list(ignored_by(built)),
    }
