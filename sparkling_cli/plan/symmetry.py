"""Which axes' new entries are copies of their sources, and whether they will part from them.

Two equal channels get equal gradients (Eq. 20, 40); where their optimizer state is equal too, they stay
equal for ever. That and the fan-in factor follow from the fills used in the tensors that meet on an axis,
which need not be the pair asked for: q, k and gate are copied where zero is asked for, and under more query
heads per group v does not grow at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sparkling_cli.errors import SpecError
from sparkling_cli.layout.expr import COUNTED, UNSHAPED, Fixed, Role, axis_names, factors
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.layout.names import block_of
from sparkling_cli.spec.model import ExpansionSpec
from sparkling_cli.widening.geometry import FUSED, Fill, Growth, Treatment, fills_on

#: treatments under which new entries start from other optimizer state than their sources
PARTING = frozenset({"asymmetric", "asymmetric-scaled"})


def treatment_of(spec: ExpansionSpec) -> Treatment:
    """The spec's initialization pair and scaling as geometry rules."""
    fan_out, fan_in, vocab = (Fill[name.upper()] for name in (*spec.init.split("-"), spec.vocab_fill))
    return Treatment(fan_out, fan_in, spec.scaling, vocab, noisy=spec.router_noise > 0)


def parting_inits(growth: Mapping[str, Growth], layout: ModelLayout, spec: ExpansionSpec) -> tuple[str, ...]:
    """Initialization pairs under which the new entries of every axis differ from their sources.

    None under scaling ``function``, which these pairs do not keep.
    """
    found = []
    for name in ("zero-copy", "random-copy") if spec.scaling != "function" else ():
        tried = treatment_of(spec.model_copy(update={"init": name}))
        try:
            check_pair(growth, layout, tried)
        except SpecError:
            continue
        if not any(grown.copied for grown in with_fills(growth, layout, tried).values()):
            found.append(name)
    return tuple(found)


def with_fills(growth: Mapping[str, Growth], layout: ModelLayout, treatment: Treatment) -> dict[str, Growth]:
    """The growth with ``copied`` as the fills on each axis say; of one on no tensor, as all others'."""
    found = {axis: _fills(axis, layout, treatment) for axis in growth}
    copied = {a: all(f <= {Fill.COPY} for f in fills) for a, fills in found.items() if any(fills)}
    rest = all(copied.values())
    return {axis: replace(grown, copied=copied.get(axis, rest)) for axis, grown in growth.items()}


def check_pair(growth: Mapping[str, Growth], layout: ModelLayout, treatment: Treatment) -> None:
    """Every axis can have the initialization pair.

    Raises:
        SpecError: in some block nothing that produces an axis takes the fill asked for, or it is not known
            what must be spared from zero; or new columns of zeros do not keep the function.
    """
    for axis in (axis for axis in growth if axis not in COUNTED):
        if treatment.scaling == "function" and treatment.fan_in is Fill.ZERO:
            _check_apart(axis, layout)
        if treatment.fan_out is Fill.ZERO:
            _check_parts(axis, layout)
        *produced, _ = _fills(axis, layout, treatment)
        if treatment.fan_out is Fill.COPY or all(treatment.fan_out in fills for fills in produced):
            continue  # or nothing has the axis, which is a number that another one is divided by
        wanted = treatment.fan_out.name.lower()
        also = ", or widen kv_heads, with which v grows" if axis == "q_per_kv" else ""
        raise SpecError(
            f"axes.{axis}: init {wanted!r} for producers is not possible in {layout.name}: all that produces "
            "this axis is copied (q, k and gate are never zeroed, and no v or up grows along), so its new "
            "entries would be copies",
            hint=f"use --init random-copy, or copy-copy with the optimizer's state{also}",
        )


def _check_apart(axis: str, layout: ModelLayout) -> None:
    """Old entries of an axis do not see the new ones before the columns that read them.

    A norm on the axis divides by the size of all, and so does the residual stream's, which has tokens'
    embeddings; a tied head reads it with no columns of its own.
    """
    for pattern in layout.tensors:
        mixed = any(dim.role is Role.SCALE and axis in axis_names(dim.expr) for dim in pattern.dims.dims)
        if mixed or {axis, "vocab"} <= pattern.dims.axes():
            raise SpecError(
                f"axes.{axis}: scaling 'function' does not keep the function under random rows here: "
                f"{pattern.name} belongs to what goes through a norm together with its old entries",
                hint="use --scaling calibrated, or --init copy-copy",
            )


def _check_parts(axis: str, layout: ModelLayout) -> None:
    """Gate and up, or q, k and v, are told apart in what produces the axis.

    Zeroing all of them would leave products of zeros, whose gradient is zero for ever.
    """
    for pattern in layout.tensors:
        for dim in pattern.dims.dims:
            if dim.role in (Role.OUT, Role.BIAS) and axis in axis_names(dim.expr):
                fused = [
                    f for f in factors(dim.expr) if isinstance(f, Fixed) and f.size in FUSED and not f.label
                ]
                if fused:
                    raise SpecError(
                        f"axes.{axis}: init 'zero' for producers is not possible in {layout.name}: "
                        f"{pattern.name} holds {fused[0].size} parts, and its layout '{pattern.layout}' does "
                        "not say which is the gate, or q, k and v, which must not be zero",
                        hint="use --init random-copy; or name the parts in a layout file (--layout): "
                        "gate_up for (gate, up), (q:1 + k:1 + v:1), in their order",
                    )


def _fills(axis: str, layout: ModelLayout, treatment: Treatment) -> list[set[Fill]]:
    """Fills of an axis's new entries: a set per block that produces it, and last one of all consumers."""
    produced: dict[str, set[Fill]] = {}
    consumed: set[Fill] = set()
    for pattern in layout.tensors:
        if axis in pattern.dims.axes():
            out, into = fills_on(pattern.dims, axis, layout.sizes, treatment)
            consumed |= into
            if out:
                produced.setdefault(block_of(pattern.name), set()).update(out)
    return [*produced.values(), consumed]


def locked_within(growth: Mapping[str, Growth], layout: ModelLayout) -> dict[str, tuple[str, ...]]:
    """Layers or experts that are new -> widths whose copies stay equal to their sources inside them.

    All that a new layer or expert has is new, so no optimizer state tells a copied channel from its source
    there. An axis that other tensors have too (hidden) parts by what these do.

    Args:
        growth: of a plan: with the fills that are used.
        layout: of the model before.
    """
    found = {}
    for outer in (axis for axis in ("layers", "experts") if axis in growth):
        without = {axis for p in layout.tensors if outer not in p.axes for axis in p.dims.axes()}
        inside = {axis for p in layout.tensors if outer in p.axes for axis in p.dims.axes()} - without
        locked = tuple(a for a, g in growth.items() if a in inside - COUNTED and g.copied)
        if locked:
            found[outer] = locked
    return found


def locked_axes(growth: Mapping[str, Growth], optimizer: str | None) -> tuple[str, ...]:
    """Axes whose copies and sources get equal updates, and so stay equal for ever.

    Args:
        growth: of a plan: with the fills that are used.
        optimizer: the treatment of the optimizer's state; None where there is none.
    """
    if optimizer in PARTING:
        return ()
    return tuple(axis for axis, grown in growth.items() if grown.copied and axis not in UNSHAPED)
