"""Which hypothesis is true: every combination that differs under an axis is tried on the bench."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sparkling_cli.layout.expr import Role, TensorLayout
from sparkling_cli.layout.model import Compensation
from sparkling_cli.layout.parse import parse_layout
from sparkling_cli.models.families import Family, Hypotheses, Options, Variable
from sparkling_cli.models.proof import Bench
from sparkling_cli.widening.reference import Rules, Wanted

_LIKELY = 3
Choice = dict[Variable, str]
Compensations = tuple[Compensation, ...]


@dataclass(frozen=True)
class Verdict:
    """What the court said about growing some axes together.

    Attributes:
        proved: logits survive 2x and 3x.
        error: the best relative error seen.
        tried: hypotheses tried.
        options: the variables' options that are left (all of them where not proved).
        compensations: that the proof needed.
    """

    proved: bool
    error: float
    tried: int
    options: Options
    compensations: Compensations = ()


def layouts_of(families: Sequence[Family], choice: Mapping[Variable, str]) -> dict[str, TensorLayout]:
    """Layout of every tensor under a choice."""
    return {name: f.layout(choice) for f in families for name in f.names}


def prove(
    bench: Bench,
    hyp: Hypotheses,
    options: Options,
    axes: Sequence[str],
    compensations: Sequence[Compensations] = ((),),
    *,
    limit: int,
) -> Verdict:
    """Search the options for a hypothesis under which ``axes`` grow together without a trace.

    ``limit`` bounds the layouts tried per compensation.
    """
    sizes = bench.found.sizes
    involved = [f for f in hyp.families if any(f.involves(a) for a in axes)]
    used = {v for f in involved for v in (f.way, *f.terms)}
    classes = {v: effects(v, options[v], involved, axes, sizes) for v in used}
    open_variables = [v for v in used if len(classes[v]) > 1]
    open_variables.sort(key=str)
    base = {v: o[0] for v, o in options.items()}
    best, tried = math.inf, 0
    factors = dict.fromkeys(axes, 2)
    for comps, choice in _trials(bench, hyp, base, open_variables, classes, axes, compensations, limit):
        layouts = layouts_of(hyp.families, choice)
        error = bench.error(layouts, factors, comps)
        tried += 1
        best = min(best, error)
        if error > bench.tolerance:
            continue
        proved, error = bench.proves(layouts, axes, comps)
        if proved:
            kept = {v: classes[v][_index(classes[v], choice[v])] for v in used}
            return Verdict(True, error, tried, {**options, **kept}, comps)
    return Verdict(False, best, tried, options)


def _trials(
    bench: Bench,
    hyp: Hypotheses,
    base: Choice,
    variables: Sequence[Variable],
    classes: Mapping[Variable, Sequence[tuple[str, ...]]],
    axes: Sequence[str],
    compensations: Sequence[Compensations],
    limit: int,
) -> Iterator[tuple[Compensations, Choice]]:
    """Every compensation with the likeliest layouts, then every layout with the likeliest of those."""
    for comps in compensations:
        yield comps, base
    if variables:
        for comps in compensations[:_LIKELY]:
            for choice in _choices(bench, hyp, base, variables, classes, axes, comps, limit):
                yield comps, choice


def effects(
    variable: Variable,
    options: Sequence[str],
    involved: Sequence[Family],
    axes: Sequence[str],
    sizes: Mapping[str, int],
) -> list[tuple[str, ...]]:
    """Options of a variable that do the same when the axes grow, grouped; order kept."""
    groups: dict[object, list[str]] = {}
    for option in options:
        groups.setdefault(_effect(variable, option, involved, axes, sizes), []).append(option)
    return [tuple(g) for g in groups.values()]


def _effect(
    variable: Variable,
    option: str,
    involved: Sequence[Family],
    axes: Sequence[str],
    sizes: Mapping[str, int],
) -> object:
    if variable[0] == "way":
        family = next(f for f in involved if f.way == variable)
        parsed = parse_layout(option.format(*(f"d{i}" for i in range(len(family.shape)))))
        grown = [any(a in m for a in axes) for m in family.moves]
        return tuple(d.role is Role.IN for d, g in zip(parsed.dims, grown, strict=True) if g)
    rules = Rules(sizes, {a: (sizes[a], 3 * sizes[a]) for a in axes})
    return tuple(Wanted(parse_layout(f"scale {option}"), rules, "float64").column.source.tolist())


def _index(classes: Sequence[tuple[str, ...]], option: str) -> int:
    return next(i for i, c in enumerate(classes) if option in c)


def _choices(
    bench: Bench,
    hyp: Hypotheses,
    base: Choice,
    variables: Sequence[Variable],
    classes: Mapping[Variable, Sequence[tuple[str, ...]]],
    axes: Sequence[str],
    comps: Compensations,
    limit: int,
) -> Sequence[Choice]:
    """All combinations, likeliest first; where there are too many, the end of a greedy descent."""
    total = math.prod(len(classes[v]) for v in variables)
    if total <= limit:
        indices = sorted(
            itertools.product(*(range(len(classes[v])) for v in variables)),
            key=lambda c: (_mixed(variables, c), sum(c), c),
        )
        return [
            {**base, **{v: classes[v][i][0] for v, i in zip(variables, combo, strict=True)}}
            for combo in indices
        ]
    if sum(len(classes[v]) for v in variables) > limit:
        return []
    return [_descend(bench, hyp, base, variables, classes, axes, comps)]


def _mixed(variables: Sequence[Variable], combo: Sequence[int]) -> int:
    """How many raw parameters point another way than the first: one model is written in one way.

    Two wrong directions can cancel on a path without a nonlinearity, so mixtures are tried last.
    """
    ways = [i for v, i in zip(variables, combo, strict=True) if v[0] == "way"]
    return sum(i != ways[0] for i in ways)


def _descend(
    bench: Bench,
    hyp: Hypotheses,
    base: Choice,
    variables: Sequence[Variable],
    classes: Mapping[Variable, Sequence[tuple[str, ...]]],
    axes: Sequence[str],
    comps: Compensations,
) -> Choice:
    """One variable at a time, keep what lowers the error; then pairs; until nothing helps."""
    factors = dict.fromkeys(axes, 2)
    choice = dict(base)
    best = bench.error(layouts_of(hyp.families, choice), factors, comps)
    for _ in range(3):
        before = best
        for variable in variables:
            for group in classes[variable]:
                trial = {**choice, variable: group[0]}
                error = bench.error(layouts_of(hyp.families, trial), factors, comps)
                if error < best:
                    best, choice = error, trial
            if best <= bench.tolerance:
                return choice
        if best == before:
            break
    return choice
