"""All axes of one tiny model, each proved or refused with a reason; names, labels, disk layouts."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.expr import COUNTED, Axis, Expr, Fixed, Product, Role, TensorLayout
from sparkling_cli.layout.model import Compensation
from sparkling_cli.layout.names import NUMBER, skeleton
from sparkling_cli.layout.parse import parse_layout
from sparkling_cli.models.attention import split_fused, split_heads
from sparkling_cli.models.axes import FROZEN, PER_TOKEN, TinyAxes, TinyAxis, find_axes, grows
from sparkling_cli.models.compensate import hypotheses_for
from sparkling_cli.models.depth import Depth, find_depth
from sparkling_cli.models.disk import DiskTensor, disk_tensors, to_disk
from sparkling_cli.models.families import Family, Hypotheses, Options, _tied_heads, hypotheses
from sparkling_cli.models.labels import label
from sparkling_cli.models.parity import LogitParity, widened
from sparkling_cli.models.readings import further, head_scales, usual
from sparkling_cli.models.search import Outcome, effects, layouts_of, prove
from sparkling_cli.models.shrink import moved_dims, tried_shapes
from sparkling_cli.models.sizes import HEADS, OTHER_MODALITY, kind_of, walk
from sparkling_cli.models.skeleton import ConfigDict, ModelFactory, build_model, shared_names
from sparkling_cli.models.stored import ignored_by

#: Kinds of the axes that people widen; for these the search tries many layouts, for others a few.
WIDTHS = frozenset({"hidden", "ffn", "expert_ffn", "shared_ffn", "heads", "kv_heads", "q_per_kv"})
MANY, FEW = 64, 8
#: Names of parameters that make the text's entries out of another modality's, or are added to them.
_MADE = re.compile(rf"{OTHER_MODALITY.pattern}|visual|multi_?modal|mm_|_bias$|_embed$")


@dataclass(frozen=True)
class AxisVerdict:
    """Proved or refused, with what a reader needs to check it."""

    proved: bool
    reason: str
    joint: tuple[str, ...] = ()


@dataclass(frozen=True)
class Findings:
    """What was found out on a tiny model.

    Attributes:
        found: its axes and config keys.
        families: tensor families.
        layouts: layout of each family, same order.
        verdicts: axis -> proved or refused.
        compensations: of all proved axes.
        disk: tensors on disk, or None where names and layouts are the module's.
        tied: groups of names that share a storage.
        notes: what a reader of the layout should know.
        buffers: skeletons of the names of tensors that are saved and are no parameters.
        ignored: patterns of names that the class leaves aside when it loads a checkpoint.
        depth: whether and how layers can be added.
    """

    found: TinyAxes
    families: tuple[Family, ...]
    layouts: tuple[TensorLayout, ...]
    verdicts: dict[str, AxisVerdict]
    compensations: tuple[Compensation, ...]
    disk: tuple[DiskTensor, ...] | None
    tied: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = field(default=())
    buffers: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()
    depth: Depth = field(default_factory=lambda: Depth("not looked for"))

    @property
    def by_skeleton(self) -> dict[str, list[TensorLayout]]:
        """Layouts of the tensors of every name skeleton."""
        found: dict[str, list[TensorLayout]] = {}
        for family, layout in zip(self.families, self.layouts, strict=True):
            found.setdefault(skeleton(family.names[0]), []).append(layout)
        return found

    def layout_of(self, tensor: str) -> TensorLayout:
        """The layout of a tensor of the tiny model."""
        layouts = zip(self.families, self.layouts, strict=True)
        return next(layout for family, layout in layouts if tensor in family.names)


def prove_axes(tiny: ConfigDict, *, factory: ModelFactory | None = None) -> Findings:
    """Prove every axis of a tiny config's class, under the reading of its heads that proves most.

    Raises:
        LayoutError: the tiny model cannot be run.
    """
    found = usual(find_axes(tiny, factory=factory))
    parity = LogitParity(found, factory=factory)
    unreached = parity.unreached()
    best = _proved(parity, unreached)
    for reading in further(found, factory) if _left(best) else ():
        parity.found = reading
        other = _proved(parity, unreached)
        if _left(other) < _left(best):
            best = other
        if not _left(best):
            break
    return best


def _left(findings: Findings) -> int:
    """How many of the kinds of width that have to do with heads are proved for no axis."""
    axes, verdicts = findings.found.axes, findings.verdicts
    proved = {axes[name].kind for name, verdict in verdicts.items() if verdict.proved}
    return ("hidden" in axes and "hidden" not in proved) + (
        "heads" in {axis.kind for axis in axes.values()} and "heads" not in proved
    )


def _proved(parity: LogitParity, unreached: frozenset[str]) -> Findings:
    found = parity.found
    hyp = hypotheses(found, build_model(found.config, factory=parity.factory))
    verdicts: dict[str, AxisVerdict] = {}
    compensations: tuple[Compensation, ...] = ()
    options = _settled(hyp, unreached)
    order = list(found.axes)
    for name in sorted(found.axes.keys() - {PER_TOKEN}, key=lambda n: (n != "hidden", order.index(n))):
        verdict, outcome = _proved_alone(parity, hyp, options, name, unreached)
        verdicts[name] = verdict
        if outcome is not None:
            options = outcome.options
            compensations += outcome.compensations
    for name in found.coupled:
        hidden = verdicts["hidden"]
        reason = hidden.reason if hidden.proved else f"couples to hidden, which is refused: {hidden.reason}"
        others = (other for other in found.coupled if other != name)
        verdicts[name] = AxisVerdict(hidden.proved, reason, ("hidden", *others))
    if PER_TOKEN in found.axes:
        experts = verdicts["experts"]
        verdicts[PER_TOKEN] = AxisVerdict(experts.proved, experts.reason, ("experts",))
    choice = {v: o[0] for v, o in options.items()}
    choice |= split_fused(parity, hyp.families, options, choice)
    layouts = split_heads(parity, hyp.families, [f.layout(choice) for f in hyp.families])
    layouts = _inner_width(parity, layouts, verdicts)
    proved = [n for n, v in verdicts.items() if v.proved]
    grown = WIDTHS | ({"head_dim"} if "head_dim" in found.coupled else set())
    widths = [n for n in proved if parity.found.axes[n].kind in grown and n != "hidden"]
    layouts = label(parity, hyp.families, layouts, widths)
    by_name = {n: lay for f, lay in zip(hyp.families, layouts, strict=True) for n in f.names}
    verdicts = _together(parity, by_name, verdicts, compensations)
    notes = _unreached_notes(hyp, unreached, proved)
    disk = _disk(parity, by_name, verdicts, compensations, notes)
    return Findings(
        parity.found,
        hyp.families,
        tuple(layouts),
        verdicts,
        compensations,
        disk,
        _tied_groups(parity),
        tuple(notes),
        frozenset(skeleton(name) for name, _ in parity.model.named_buffers()),
        ignored_by(parity.model),
        find_depth(parity, by_name),
    )


def _inner_width(
    parity: LogitParity, layouts: Sequence[TensorLayout], verdicts: dict[str, AxisVerdict]
) -> list[TensorLayout]:
    """Name what code makes ``n hidden`` wide, by one matrix, and uses up, by another: it is ``ffn``.

    It has no key, and grows with hidden only.
    """
    found = parity.found
    kinds = {axis.kind for axis in found.axes.values()}
    times = None if kinds & {"ffn", "expert_ffn", "shared_ffn"} else _times_hidden(layouts)
    hidden = verdicts.get("hidden")
    if times is None or hidden is None:
        return list(layouts)
    ffn = TinyAxis("ffn", times * found.sizes["hidden"])
    along = ("hidden", *found.coupled)
    parity.found = replace(found, axes={**found.axes, "ffn": ffn}, coupled=(*found.coupled, "ffn"))
    for name in along:
        verdicts[name] = replace(verdicts[name], joint=(*verdicts[name].joint, "ffn"))
    reason = hidden.reason if hidden.proved else f"couples to hidden, which is refused: {hidden.reason}"
    verdicts["ffn"] = AxisVerdict(hidden.proved, reason, along)
    return [
        layout.with_terms(
            {i: Axis("ffn") for i, dim in enumerate(layout.dims) if _factor_of_hidden(dim.expr) == times}
        )
        for layout in layouts
    ]


def _times_hidden(layouts: Sequence[TensorLayout]) -> int | None:
    """The number n of an inner width that is ``(n hidden)``: made by one matrix, used up by another."""
    found: dict[int, set[Role]] = {}
    for layout in layouts:
        for dim in layout.dims if len(layout.dims) == 2 else ():
            number = _factor_of_hidden(dim.expr)
            if number is not None:
                found.setdefault(number, set()).add(dim.role)
    return next((n for n, directions in found.items() if {Role.OUT, Role.IN} <= directions), None)


def _factor_of_hidden(expr: Expr) -> int | None:
    factors = expr.factors if isinstance(expr, Product) else ()
    numbers = [f.size for f in factors if isinstance(f, Fixed)]
    return numbers[0] if len(factors) == 2 and len(numbers) == 1 and Axis("hidden") in factors else None


def _settled(hyp: Hypotheses, unreached: frozenset[str]) -> Options:
    """The options without directions in which parameters that text does not reach would use up what grows.

    A single vector is added or multiplied; what leads from another modality into the text makes its entries,
    whatever its own input is.
    """
    options = dict(hyp.options)
    for family in hyp.families:
        vector = sum(n > 1 for n in family.shape) == 1
        if set(family.names) <= unreached and (vector or all(map(_MADE.search, family.names))):
            made = [o for o in options[family.direction] if not _uses_up(o, family)]
            options[family.direction] = tuple(made) or options[family.direction]
    return options


def _uses_up(direction: str, family: Family) -> bool:
    parsed = parse_layout(direction.format(*(f"d{i}" for i in range(len(family.shape)))))
    return any(dim.role is Role.IN and moved for dim, moved in zip(parsed.dims, family.moves, strict=True))


def _proved_alone(
    parity: LogitParity, hyp: Hypotheses, options: Options, name: str, unreached: frozenset[str]
) -> tuple[AxisVerdict, Outcome | None]:
    found = parity.found
    axis = found.axes[name]
    if axis.kind in FROZEN and name not in COUNTED:
        return AxisVerdict(False, FROZEN[str(axis.kind)]), None
    if name in found.coupled:
        return AxisVerdict(False, "grows with hidden only"), None
    if not grows(found, name):
        why = _grows_not(found, name).splitlines()[0][:300]
        divides = axis.kind in HEADS and found.coupled
        return AxisVerdict(False, why + (_positions(parity.model, found.config) if divides else "")), None
    groups = [v for p, v in walk(found.config) if kind_of(p[-1]) == "groups" and type(v) is int and v > 1]
    if name == "experts" and groups:
        why = "its router first chooses among groups of experts: copies would be in other groups"
        return AxisVerdict(False, why), None
    axes = _along(found, name)
    table = _table(parity, axes)
    if table is not None:
        why = f"{table} is a table of whole numbers: what it says of new entries cannot be computed"
        return AxisVerdict(False, why), None
    moved = [f for f in hyp.families if any(f.involves(a) for a in axes)]
    if all(set(f.names) <= unreached for f in moved):
        why = f"nothing can be proved about {moved[0].names[0]}: logits of plain text do not depend on it"
        return AxisVerdict(False, why), None
    for family in moved:
        unknown = _unprovable(parity, family, hyp, options, axes, unreached)
        if unknown is not None:
            return AxisVerdict(False, unknown), None
    comps: list[tuple[Compensation, ...]] = [()]
    if name == "hidden":
        likeliest = layouts_of(hyp.families, {v: o[0] for v, o in options.items()})
        plain = hypotheses_for(parity, axes, likeliest)
        scales = head_scales(found, _attention_tensors(hyp, options, found.sizes[name]))
        comps = [(*own, *scale) for own in plain for scale in scales]
    limit = MANY if axis.kind in WIDTHS else FEW
    outcome = prove(parity, hyp, options, axes, comps, limit=limit)
    joint = tuple(axes[1:]) if name == "hidden" else ()
    if outcome.proved:
        chosen = layouts_of(hyp.families, {v: o[0] for v, o in outcome.options.items()})
        tensor = parity.unreached_growth(chosen, axes, outcome.compensations)
        if tensor is not None:
            return AxisVerdict(
                False, f"no width: text does not reach the new entries of {tensor}", joint
            ), None
        reason = f"logits of a tiny random model kept at 2x and 3x (relative error {outcome.error:.1e})"
        return AxisVerdict(True, reason, joint), outcome
    best = f"best relative error {outcome.error:.1e}"
    if math.isinf(outcome.error):
        best = parity.raised
    reason = f"none of {outcome.tried} hypotheses keeps the logits of a tiny random model ({best})"
    if name == "hidden":
        reason += _positions(parity.model, found.config)
    return AxisVerdict(False, reason, joint), None


def _attention_tensors(hyp: Hypotheses, options: Options, hidden: int) -> list[tuple[str, bool]]:
    """Tensors that make queries, keys and values as one, and (True) the square ones that use values up."""
    own = [f for f in hyp.families if any("head_dim" in options[term][0] for term in f.terms)]
    fitting = [f for f in own if f.shape == (hidden, hidden) or f.shape[0] == 3 * hidden]
    return [(name, family.shape == (hidden, hidden)) for family in fitting for name in family.names]


def _positions(model: nn.Module, config: ConfigDict) -> str:
    """What is known of a class whose positions no weight says, and which change with its width."""
    kinds = {type(module) for module in model.modules()}
    own = [kind for kind in kinds if not kind.__module__.startswith("torch.")]
    names = {kind.__name__ for kind in own}.union(
        *(dir(sys.modules[k.__module__]) for k in own), *map(vars, own)
    )
    if any("sinusoid" in n.lower() or n in ("positional_encoding", "positional_embedding") for n in names):
        return "; its positions come from a table of sines, whose entries depend on the width"
    off = any(path[-1] == "alibi" and value is False for path, value in walk(config))
    if not off and any("alibi" in name.lower() for name in names):
        return "; its positions come from ALiBi, whose slopes depend on the number of heads"
    return ""


def _grows_not(found: TinyAxes, name: str) -> str:
    """Why doubling the axis gives no wider model."""
    shapes = found.moved.get(name)
    if shapes is None:
        return f"the class refuses twice as many: {found.refused.get(name)}"
    other = sorted(shapes.keys() ^ found.shapes.keys())
    if other:
        return f"a config with twice as many builds a model with other tensors, e.g. {other[0]}"
    if found.axes[name].kind in HEADS and not found.keys("head_dim"):
        return "hidden is divided by the number of heads: more of them are smaller, and no tensor is wider"
    smaller = [n for (n, _), (a, b) in moved_dims(found.shapes, shapes).items() if a > b]
    if smaller:
        return f"something is divided by it: twice as many make {smaller[0]} smaller, and widen no tensor"
    return "no tensor's shape depends on it"


def _along(found: TinyAxes, name: str) -> list[str]:
    """An axis, and those that grow along in its proof: copies of experts are chosen with their sources."""
    if name == "experts":
        return [name, *({PER_TOKEN} & found.axes.keys())]
    return [name, *found.coupled] if name == "hidden" else [name]


def _table(parity: LogitParity, axes: Sequence[str]) -> str | None:
    """A tensor of whole numbers that the axes make larger; None if there is none."""
    found = parity.found
    tables = [name for name, tensor in parity.state.items() if not tensor.is_floating_point()]
    if not tables:
        return None
    after = found.moved[axes[0]] if len(axes) == 1 else None
    if after is None:
        tried = tried_shapes(found.resized(dict.fromkeys(axes, 2)), parity.factory)
        after = {} if isinstance(tried, str) else tried
    return next((n for n in tables if n in after and after[n] != found.shapes[n]), None)


def _worked_out(config: ConfigDict) -> str:
    """What to do where the config tells the class to round a width, after a rule of its own."""
    keys = [path[-1] for path, value in walk(config) if path[-1].startswith("block_auto_adjust") and value]
    if not keys:
        return ""
    return (
        f"; the class works the width out, as {keys[0]} is true: the same model with {keys[0]} = false, "
        "intermediate_size = the width that its tensors have, and no block_ff_dim in its config.json widens"
    )


def _unprovable(
    parity: LogitParity,
    family: Family,
    hyp: Hypotheses,
    options: Options,
    axes: Sequence[str],
    unreached: frozenset[str],
) -> str | None:
    """Why logits can say nothing about a family, or None.

    Tensors that plain text does not reach (a pooler, cross attention) are widened as their module types
    say; where those leave a choice, the axis is refused.
    """
    for tensor in family.names:
        why = [w for a, w in hyp.unexplained.get(tensor, {}).items() if a in axes]
        if why:
            return f"{tensor}: {why[0]}{_worked_out(parity.found.config)}"
    if not set(family.names) & unreached:
        return None
    for variable in (family.direction, *family.terms):
        if len(effects(variable, options[variable], [family], axes, parity.found.sizes)) > 1:
            tensor = sorted(set(family.names) & unreached)[0]
            return f"nothing can be proved about {tensor}: logits of plain text do not depend on it"
    return None


def _together(
    parity: LogitParity,
    layouts: Mapping[str, TensorLayout],
    verdicts: dict[str, AxisVerdict],
    compensations: tuple[Compensation, ...],
) -> dict[str, AxisVerdict]:
    """All proved axes at once, under the one layout that is left; each alone only if that fails."""
    proved = [n for n, v in verdicts.items() if v.proved]
    if not proved or parity.error(layouts, dict.fromkeys(proved, 2), compensations) <= parity.tolerance:
        return verdicts
    result = dict(verdicts)
    for name in proved:
        axes = [*_along(parity.found, name), *verdicts[name].joint]
        kept, error = parity.proves(layouts, axes, compensations)
        if not kept:
            reason = f"its proof needs a layout that contradicts another axis (error {error:.1e})"
            result[name] = AxisVerdict(False, reason, verdicts[name].joint)
    together = ["hidden", *parity.found.coupled] if "hidden" in proved else []
    for name in proved:
        if together and name not in together and result[name].proved:
            axes = [*together, *_along(parity.found, name), *verdicts[name].joint]
            error = parity.error(layouts, dict.fromkeys(axes, 2), compensations)
            if error > parity.tolerance:
                result[name] = AxisVerdict(False, f"not together with hidden (error {error:.1e})")
    return result


def _unreached_notes(hyp: Hypotheses, unreached: frozenset[str], proved: Sequence[str]) -> list[str]:
    reached = [
        f.names[0] for f in hyp.families if set(f.names) & unreached and any(f.involves(a) for a in proved)
    ]
    if not reached:
        return []
    return [
        f"plain text does not reach {len(reached)} kind(s) of tensor, e.g. {reached[0]}: they are widened as "
        "their module types say"
    ]


def _tied_groups(parity: LogitParity) -> tuple[tuple[str, ...], ...]:
    heads = _tied_heads(parity.model)
    first = {name for name, _ in parity.model.named_parameters()}
    groups = shared_names(parity.model)
    return tuple(tuple(sorted(group, key=lambda n: (n not in first, n not in heads))) for group in groups)


def _disk(
    parity: LogitParity,
    layouts: Mapping[str, TensorLayout],
    verdicts: dict[str, AxisVerdict],
    compensations: tuple[Compensation, ...],
    notes: list[str],
) -> tuple[DiskTensor, ...] | None:
    """Disk layouts, checked by converting a widened model; refusing axes that do not survive it."""
    proved = [n for n, v in verdicts.items() if v.proved]
    try:
        tensors = disk_tensors(parity.model, parity.state, layouts, parity.found.sizes)
        if all(t.name == t.source and t.layout == layouts[t.source] for t in tensors):
            return None
        factors = dict.fromkeys(proved, 2)
        inside = widened(parity.state, layouts, parity.found.sizes, factors, compensations)
        truth = to_disk(parity.wide(factors), inside)
        own = to_disk(parity.model, parity.state)
        renamed = [one for c in compensations for one in _on_disk(c, tensors)]
        there = widened(own, {t.name: t.layout for t in tensors}, parity.found.sizes, factors, renamed)
        for name, tensor in truth.items():
            if not torch.equal(
                there[_source_name(name, parity.found) if name not in there else name], tensor
            ):
                raise LayoutError(f"{name!r} widened on disk is not what the module would write")
    except (LayoutError, RuntimeError, KeyError) as error:
        what = str(error).splitlines()[0]
        for name in proved:
            verdicts[name] = AxisVerdict(False, f"on disk: {what}", verdicts[name].joint)
        notes.append(f"names on disk could not be explained: {what}")
        return None
    return tuple(tensors)


def _source_name(name: str, found: TinyAxes) -> str:
    """The tensor on disk whose copy has a name of its own: of an expert that has a number in the name."""
    count = found.sizes.get("experts", 1 << 30)
    return NUMBER.sub(lambda number: str(int(number[0]) % count), name)


def _on_disk(c: Compensation, tensors: list[DiskTensor]) -> list[Compensation]:
    """The factor under the names of the tensor's parts on disk."""
    names = [t.name for t in tensors if t.source == c.tensor] or [c.tensor]
    return [replace(c, tensor=name) for name in names]
