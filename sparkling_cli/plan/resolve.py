"""Spec against layout: which axis grows from what to what, or why it cannot.

Under grouped-query attention ``heads`` is no axis of its own but ``kv_heads x q_per_kv``: ``heads``
alone grows the queries inside each group (appending them would re-wire old heads), ``kv_heads`` alone
adds whole groups, both together set both counts. Where every group has one query, ``heads`` adds groups.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, isclose

from sparkling_cli.errors import SpecError
from sparkling_cli.layout.depth import LAYERS, Order, ordered
from sparkling_cli.layout.expr import Axis, Expr, axis_names, size_of
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.layout.names import compress
from sparkling_cli.layout.parse import parse_expr
from sparkling_cli.spec.choices import ALL, LayerKey
from sparkling_cli.spec.model import AxisSpec, ExpansionSpec
from sparkling_cli.widening.geometry import Growth, shared_out

#: names of axes that other models have, and the names that their like here may have
_ELSEWHERE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("ffn", "expert_ffn", "shared_ffn"), ("expert_ffn", "ffn")),
    **dict.fromkeys(("heads", "kv_heads", "q_per_kv"), ("heads", "kv_heads")),
    **dict.fromkeys(("head_dim", "experts", "experts_per_token", "layers", "hidden", "vocab"), ()),
}
_HEAD_AXES = frozenset({"heads", "kv_heads", "q_per_kv"})
#: what people call an axis, beside the config's own keys
_CALLED = {
    "ffn": ("mlp", "ff", "dff", "feedforward", "inner", "intermediate", "n_inner", "ffn_dim", "hidden_dim"),
    "hidden": ("width", "dim", "model", "dmodel", "embd", "n_embd", "embed", "embedding", "residual"),
    "heads": ("head", "n_head", "attention", "attn", "self_attn", "attention_heads", "query_heads"),
    "kv_heads": ("kv", "kv_head", "groups", "query_groups", "n_kv_heads"),
    "head_dim": ("head_size", "head_dims", "headdim", "headsize", "d_head", "dim_head"),
    "vocab": ("vocabulary", "tokens", "vocab_dim"),
    "layers": ("layer", "depth", "n_layer", "n_layers", "num_layers", "blocks", "block"),
    "experts": ("expert", "moe", "n_experts", "num_experts"),
}
_AXIS_CALLED = {word: axis for axis, words in _CALLED.items() for word in words}
#: axes that ``multiple_of`` does not round
_COUNTS = _HEAD_AXES | {"experts", "experts_per_token", LAYERS}


def resolve_growth(spec: ExpansionSpec, layout: ModelLayout) -> dict[str, Growth]:
    """Axis of the layout -> its growth.

    Raises:
        SpecError: the axis, the value, what is allowed and the nearest thing that works.
    """
    wanted: dict[str, AxisSpec] = {}
    for axis in spec.axes:
        name = layout.aliases.get(axis.axis, axis.axis)
        if name in wanted:
            raise SpecError(f"axes.{axis.axis}: the same axis as {wanted[name].axis!r} here; give it once")
        wanted[name] = axis
    if _grouped(layout):
        growth = _grouped_growth(wanted, spec, layout)
    else:
        growth = {name: _growth(name, axis, spec, layout) for name, axis in wanted.items()}
    for name in growth:
        _check_widenable(name, layout)
    if "vocab" in growth:
        growth["vocab"] = _with_means(growth["vocab"], spec, layout)
    elif spec.vocab_from:
        raise SpecError("vocab_from: the vocabulary does not grow", hint="add --axis vocab --to SIZE")
    if LAYERS in growth:
        growth[LAYERS] = replace(growth[LAYERS], order=_order(growth[LAYERS], spec, layout))
    elif spec.layer_mode != "identity" or spec.at != "even":
        raise SpecError(
            "layer_mode and at: the number of layers does not grow", hint="add --axis layers --factor 2"
        )
    if "experts" in growth:
        growth["experts"] = _with_copies(growth, spec, layout)
    elif spec.copies or spec.expert_load:
        raise SpecError(
            f"{'copies' if spec.copies else 'expert_load'}: the number of experts does not grow",
            hint="add --axis experts --to NUMBER",
        )
    if spec.router_noise and ("experts" not in growth or all_chosen(growth)):
        raise SpecError(
            "router_noise: only where experts grow and experts_per_token does not, or by less; else every "
            "copy is chosen with its source, and noise would change what they do together",
            hint="leave out --router-noise",
        )
    _check_joint(growth, layout, spec.multiple_of)
    _check_divisible(growth, layout)
    return growth


def _order(layers: Growth, spec: ExpansionSpec, layout: ModelLayout) -> Order:
    """The layer that each one of the deeper model is read from.

    Raises:
        SpecError: there is no such layer to put new ones behind, or names stand in the way.
    """
    before, after = layers.source, layers.target
    far = [
        p.name
        for p in layout.tensors
        for axis, only in p.template.placeholders
        if axis == LAYERS and only is not None and max(only) >= before
    ]
    if far:
        raise SpecError(
            f"axes.layers: {far[0]!r} has the number of a new layer: the model's own end at {before - 1}",
            hint="take what is beside the model (layers that predict further tokens) out of the checkpoint",
        )
    if spec.scaling == "calibrated":
        raise SpecError(
            "scaling 'calibrated' fits every block to one of the source, which new layers do not have",
            hint="expand twice: the widths with --scaling calibrated, then --axis layers",
        )
    if spec.layer_mode == "identity" and not layout.silent:
        raise SpecError(
            f"axes.layers: layout {layout.name} does not say which tensors make a layer silent",
            hint="add them to the layout file under [silent], or pass --layer-mode interleave or stack",
        )
    stacked = any(LAYERS in p.dims.axes() for p in layout.tensors)
    if stacked and spec.layer_mode == "identity" and any(layout.silent.values()):
        raise SpecError(
            f"axes.layers: {layout.name} has all layers in one tensor, of which new ones can be silent by "
            "zeros alone, and the layout says other numbers",
            hint="pass --layer-mode stack",
        )
    behind = spec.layer_mode == "stack" or spec.at == "end" or spec.at == (before - 1,)
    if (layout.numbered or stacked) and not behind:
        why = "depends on its number" if layout.numbered else "stands in tensors of all layers by its number"
        raise SpecError(
            f"axes.layers: what a layer of {layout.name} is {why}, so old ones keep theirs",
            hint=f"put new ones behind them: --at end, --layer-mode stack, or --at {before - 1}",
        )
    if not isinstance(spec.at, str) and max(spec.at) >= before:
        raise SpecError(
            f"at: there is no layer {max(spec.at)}: they are 0 to {before - 1}",
            hint=f"behind the last one: --at {before - 1}",
        )
    return ordered(before, after, spec.layer_mode, spec.at)


def all_chosen(growth: Mapping[str, Growth]) -> bool:
    """Whether every token goes to all copies of each expert that it went to."""
    if "experts" not in growth:
        return True
    experts, chosen = growth["experts"], growth.get("experts_per_token")
    orders = experts.by_layer or (experts.sources,)
    even = all(len(set(Counter(order).values())) <= 1 for order in orders)
    return even and chosen is not None and chosen.target * experts.source == experts.target * chosen.source


def asked_copies(spec: ExpansionSpec, experts: int) -> dict[LayerKey, tuple[int, ...]]:
    """How many there shall be of each expert, by layer or for all: as the spec says, or by its load.

    Args:
        spec: what is asked for.
        experts: after the growth.
    """
    by_load = {key: shared_out(load, experts) for key, load in spec.expert_load.items()}
    return by_load or dict(spec.copies)


def _with_copies(growth: Mapping[str, Growth], spec: ExpansionSpec, layout: ModelLayout) -> Growth:
    """The growth of the experts, with how many there shall be of each where the spec says it.

    Raises:
        SpecError: the numbers are not of these experts or layers, or add up to another number of experts.
    """
    experts = growth["experts"]
    size, target = experts.source, experts.target
    _check_keys("expert_load", spec.expert_load, size, layout)
    _check_keys("copies", spec.copies, size, layout)
    copies = asked_copies(spec, target)
    if not copies:
        if target % size:
            nearest = ceil(target / size) * size
            raise SpecError(
                f"axes.experts: {target} experts are no whole number of copies of {size}",
                hint=f"the nearest that works is --axis experts --to {nearest}; or say how many of each "
                "there shall be: --copies FILE, or --expert-load FILE",
            )
        return experts
    for key, counts in copies.items():
        if sum(counts) != target:
            raise SpecError(
                f"copies.{key}: they add up to {sum(counts)} experts, the axis grows from {size} to {target}",
                hint="how many there shall be of each expert, the old one included; in each layer as many as "
                "the axis is asked to have",
            )
    layers = layout.axes[LAYERS].size if LAYERS in layout.axes else 0
    order = growth[LAYERS].order if LAYERS in growth else range(layers)
    return experts.with_copies(copies, order)


def _check_keys(
    field: str, given: Mapping[LayerKey, Sequence[object]], size: int, layout: ModelLayout
) -> None:
    """Numbers for each expert of each layer that has some.

    Raises:
        SpecError: too many or too few, or of a layer that has none.
    """
    for key, values in given.items():
        if len(values) != size:
            raise SpecError(
                f"{field}.{key}: {len(values)} numbers, the model has {size} experts",
                hint="give one for each expert, in order",
            )
    if given.keys() <= {ALL}:
        return
    having: set[int] = set()
    for pattern in layout.tensors:
        if "experts" in pattern.axes:
            only = dict(pattern.template.placeholders)
            if LAYERS not in only or LAYERS not in layout.axes:
                raise SpecError(
                    f"{field}: {pattern.name!r} is not of one layer, so layers cannot differ here",
                    hint='give numbers for all layers, under "all"',
                )
            having |= set(only[LAYERS] or range(layout.axes[LAYERS].size))
    text = f"layers {compress(having)} have experts (the first of all is 0)"
    far = next((key for key in given if key != ALL and key not in having), None)
    if far is not None:
        raise SpecError(f"{field}.{far}: this layer has no experts", hint=text)
    lacking = having - given.keys()
    if lacking and ALL not in given:
        raise SpecError(
            f"{field}: nothing is said of layers {compress(lacking)}",
            hint=f'{text}; numbers under "all" are for those that are not named',
        )


def _with_means(vocab: Growth, spec: ExpansionSpec, layout: ModelLayout) -> Growth:
    """The growth of the vocabulary, with the old tokens that each new one is the mean of.

    Raises:
        SpecError: a token id is no new one, or no old one; rows are not on the leading dim of some tensor.
    """
    for new, old in spec.vocab_from.items():
        if not vocab.source <= new < vocab.target:
            raise SpecError(
                f"vocab_from: {new} is no new token: they are {vocab.source} to {vocab.target - 1}",
                hint=f"ids of new tokens begin at {vocab.source}, the size of the vocabulary now",
            )
        if max(old) >= vocab.source:
            raise SpecError(f"vocab_from.{new}: {max(old)} is no old token: they end at {vocab.source - 1}")
    for pattern in (*layout.tensors, *(layout.disk or ())):
        dims = pattern.dims.dims
        if "vocab" in pattern.dims.axes() and replace(dims[0].expr, label=None) != Axis("vocab"):
            raise SpecError(
                f"axes.vocab: {pattern.name!r} does not have a row for each token: {pattern.layout}",
                hint="resize it with the trainer's own tools",
            )
    given = range(vocab.source, vocab.target) if spec.vocab_from else ()
    return replace(vocab, means=tuple(spec.vocab_from.get(new, ()) for new in given))


def _grouped(layout: ModelLayout) -> bool:
    return "heads" not in layout.axes and {"kv_heads", "q_per_kv"} <= set(layout.axes)


def _grouped_growth(
    wanted: dict[str, AxisSpec], spec: ExpansionSpec, layout: ModelLayout
) -> dict[str, Growth]:
    """Translate ``heads`` into groups and queries per group."""
    growth = {name: _growth(name, axis, spec, layout) for name, axis in wanted.items() if name != "heads"}
    if "heads" not in wanted:
        return growth
    kv, per_kv = layout.axes["kv_heads"].size, layout.axes["q_per_kv"].size
    if "q_per_kv" in growth:
        raise SpecError("axes.q_per_kv: give heads or q_per_kv, not both: heads = kv_heads * q_per_kv")
    heads = _target("heads", wanted["heads"], kv * per_kv, spec, 1)
    if per_kv == 1 and "kv_heads" not in growth:  # every head has keys and values of its own, and keeps them
        return {**growth, "kv_heads": Growth(kv, heads)}
    groups = growth["kv_heads"].target if "kv_heads" in growth else kv
    if heads % groups or heads // groups < per_kv:
        least = groups * per_kv
        nearest = max(least, round(heads / groups) * groups)
        raise SpecError(
            f"axes.heads: {heads} query heads cannot be spread over {groups} key/value heads with at least "
            f"{per_kv} each (now {kv * per_kv} over {kv})",
            hint=f"the nearest that works is --axis heads --to {nearest}",
        )
    if heads // groups > per_kv:
        growth["q_per_kv"] = Growth(per_kv, heads // groups)
    return growth


def _growth(name: str, axis: AxisSpec, spec: ExpansionSpec, layout: ModelLayout) -> Growth:
    if name not in layout.axes:
        raise _unknown(axis.axis, layout)
    _check_widenable(name, layout)
    info = layout.axes[name]
    return Growth(info.size, _target(axis.axis, axis, info.size, spec, info.multiple_of))


def _target(name: str, axis: AxisSpec, size: int, spec: ExpansionSpec, multiple: int) -> int:
    if axis.to is not None:
        target = axis.to
        if target <= size:
            raise SpecError(
                f"axes.{name}.to: {target} does not widen: the axis has {size} entries",
                hint=f"give a size above {size}, e.g. --to {2 * size}",
            )
    else:
        exact = size * (axis.factor or 1.0)
        step = spec.multiple_of if spec.multiple_of and name not in _COUNTS else None
        target = ceil(exact / step - 1e-9) * step if step else round(exact)
        if step and target > 2 * exact:
            raise SpecError(
                f"axes.{name}: {size} x {axis.factor:g} = {exact:g} would become {target}, more than twice "
                f"what was asked for, to be a multiple of {step}",
                hint=f"give this axis its size instead of a factor: --axis {name} --to {ceil(exact)}",
            )
        if not step and not isclose(exact, target, rel_tol=1e-9):
            above = f"--to {int(exact) + 1}"
            sizes = f"size is {above}" if int(exact) == size else f"sizes are --to {int(exact)} and {above}"
            raise SpecError(
                f"axes.{name}.factor: {size} x {axis.factor:g} = {exact:g} is no whole number",
                hint=f"the nearest {sizes}; or round up by --multiple-of",
            )
        if target == size:
            raise SpecError(
                f"axes.{name}: its {size} entries are a multiple of {step} already"
                if step
                else f"axes.{name}.factor: {axis.factor!r} does not widen: {size} entries stay {size}",
                hint=f"give it a size, e.g. --axis {name} --to {size + step if step else 2 * size}",
            )
    if target % multiple:
        up = ceil(target / multiple) * multiple
        raise SpecError(
            f"axes.{name}: {target} is not a multiple of {multiple}, as this architecture needs",
            hint=f"the nearest that works is --to {up}",
        )
    return target


def _check_widenable(name: str, layout: ModelLayout) -> None:
    info = layout.axes[name]
    if not info.widenable:
        possible = offered_axes(layout)
        raise SpecError(
            f"axes.{name}: cannot be widened in {layout.name}: {info.reason or 'not proved'}",
            hint=f"axes that can be widened here: {', '.join(possible) or 'none'}",
        )


def _check_joint(growth: dict[str, Growth], layout: ModelLayout, multiple_of: int | None) -> None:
    """Axes that the class couples grow by the same factor; experts per token may grow by a smaller one."""
    for name, grown in growth.items():
        joint = layout.axes[name].joint
        for other in joint:
            before, after = _sizes(other, growth, layout)
            fewer = before * grown.target < after * grown.source
            if fewer and (name, other) == ("experts_per_token", "experts"):
                continue  # the function moves, less than where as many are chosen as before
            if before * grown.target != after * grown.source:
                factor = grown.target / grown.source
                asked = " ".join(f"--axis {axis}" for axis in (name, *joint))
                apart = ", without --multiple-of, which rounds each by itself" if multiple_of else ""
                raise SpecError(
                    f"axes.{name}: {layout.name} couples {name} to {other}; {name} grows "
                    f"{grown.source} -> {grown.target} but {other} {before} -> {after}",
                    hint=f"widen {'all' if joint[1:] else 'both'} by the same factor: {asked} "
                    f"--factor {factor:g}{apart}",
                )


def _check_divisible(growth: dict[str, Growth], layout: ModelLayout) -> None:
    """Sizes that the class wants to be multiples of others are so afterwards."""
    after = {**layout.sizes, **{name: grown.target for name, grown in growth.items()}}
    for whole, part in layout.divisible:
        dividend, divisor = parse_expr(whole), parse_expr(part)

        def fits(changed: dict[str, int], dividend: Expr = dividend, divisor: Expr = divisor) -> bool:
            sizes = {**after, **changed}
            return size_of(dividend, sizes) % size_of(divisor, sizes) == 0

        if fits({}):
            continue
        found = []
        for name in sorted(growth.keys() & {*axis_names(dividend), *axis_names(divisor)}):
            target, most = growth[name].target, 2 * size_of(dividend, after)
            above = next((n for n in range(target, most) if fits({name: n})), None)
            below = next((n for n in range(target, growth[name].source, -1) if fits({name: n})), None)
            heads = name == "q_per_kv" and _grouped(layout)
            each = after["kv_heads"] if heads else 1
            found += [
                f"--axis {'heads' if heads else name} --to {n * each}"
                for n in (below, above)
                if n is not None
            ]
        raise SpecError(
            f"axes: {layout.name} wants {whole} to be a multiple of {part}, and "
            f"{size_of(dividend, after)} is none of {size_of(divisor, after)}",
            hint=f"what works: {', or '.join(found)}" if found else None,
        )


def whole_heads(growth: dict[str, Growth], layout: ModelLayout) -> Growth | None:
    """Query heads where they grow and are no axis of their own: groups times queries in each."""
    if not _grouped(layout) or not growth.keys() & _HEAD_AXES:
        return None
    return Growth(*_sizes("heads", growth, layout))


def _sizes(axis: str, growth: dict[str, Growth], layout: ModelLayout) -> tuple[int, int]:
    if axis == "heads" and _grouped(layout):
        kv, per_kv = _sizes("kv_heads", growth, layout), _sizes("q_per_kv", growth, layout)
        return kv[0] * per_kv[0], kv[1] * per_kv[1]
    size = layout.axes[axis].size
    return (size, growth[axis].target) if axis in growth else (size, size)


def _unknown(name: str, layout: ModelLayout) -> SpecError:
    offered = offered_axes(layout)
    plain = name.lower().replace("-", "_")
    axis = _AXIS_CALLED.get(plain) or _AXIS_CALLED.get(plain.replace("_", "").removesuffix("size"), "")
    for part in plain.split(".")[-2:]:  # a module's name, or a tensor's
        axis = axis or _AXIS_CALLED.get(part, "")
    close = [axis] if axis in offered else difflib.get_close_matches(plain, offered, n=1)
    if plain in _ELSEWHERE:  # well spelled, of another model
        close = [other for other in _ELSEWHERE[plain] if other in offered][:1]
    hint = f"did you mean {close[0]!r}?" if close else "choose one of these; sparkling layout CKPT shows each"
    if axis in layout.axes and axis not in offered:
        hint = f"{axis!r} cannot be widened here: {layout.axes[axis].reason or 'not proved'}"
    if name in layout.config:
        term = " ".join(part for part in layout.config[name].strip("()").split())
        axis = "heads" if term == "kv_heads q_per_kv" else term
        if axis in offered:
            hint = f"that is the config's name for the axis {axis!r}: --axis {axis}"
        elif axis in layout.axes:
            reason = layout.axes[axis].reason or "not proved"
            hint = f"that is the config's name for {axis!r}, which cannot be widened: {reason}"
    return SpecError(
        f"axes.{name}: no such axis in {layout.name}, which has {', '.join(offered) or 'none'}", hint=hint
    )


def offered_axes(layout: ModelLayout) -> list[str]:
    """Every name that an axis can be asked for by, aliases included, in alphabetical order."""
    offered = [name for name, info in layout.axes.items() if info.widenable]
    if _grouped(layout) and layout.axes["q_per_kv"].widenable:
        offered.append("heads")
    offered += [alias for alias, axis in layout.aliases.items() if axis in offered]
    return sorted(offered)
