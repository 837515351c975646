"""Which hypothesis is true: every combination that differs under an axis is tried by logit parity."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sparkling_cli.layout.expr import COUNTED, Role, TensorLayout
from sparkling_cli.layout.model import Compensation
from sparkling_cli.layout.parse import parse_layout
from sparkling_cli.models.families import Family, Hypotheses, Options, Variable
from sparkling_cli.models.parity import LogitParity
from sparkling_cli.widening.reference import Rules, Wanted

#: Compensations that every layout is tried with: both offsets of a norm, with multipliers inside and without.
_LIKELY = 4
Choice = dict[Variable, str]
Compensations = tuple[Compensation, ...]


@dataclass(frozen=True)
class Outcome:
    """What the search found about growing some axes together.

    Attributes:
        proved: logits are kept at 2x and 3x.
        error: the best relative error, of 2x and 3x the larger; inf where no hypothesis could be run.
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


@dataclass(frozen=True)
class Search:
    """The hypotheses under which some axes may grow together, and what decides between them.

    Attributes:
        parity: decides.
        families: of all tensors.
        axes: that grow together.
        base: the likeliest option of every variable.
        classes: variable of a tensor that grows -> its options, grouped by what they do when the axes grow.
        limit: most layouts tried per compensation.
    """

    parity: LogitParity
    families: Sequence[Family]
    axes: Sequence[str]
    base: Choice
    classes: Mapping[Variable, Sequence[tuple[str, ...]]]
    limit: int

    @property
    def open(self) -> list[Variable]:
        """Variables with options that differ."""
        return sorted((v for v, classes in self.classes.items() if len(classes) > 1), key=str)

    def error(self, choice: Choice, comps: Compensations) -> float:
        """Relative error of the logits at 2x."""
        return self.parity.error(layouts_of(self.families, choice), dict.fromkeys(self.axes, 2), comps)

    def trials(self, compensations: Sequence[Compensations]) -> Iterator[tuple[Compensations, Choice]]:
        """Every compensation with the likeliest layouts, then every layout with the likeliest of those."""
        for comps in compensations:
            yield comps, self.base
        if self.open:
            for comps in compensations[:_LIKELY]:
                for choice in self._choices(comps):
                    yield comps, choice

    def options_of(self, choice: Choice) -> Options:
        """For every variable the options that do the same as the chosen one."""
        return {v: next(c for c in classes if choice[v] in c) for v, classes in self.classes.items()}

    def _choices(self, comps: Compensations) -> Sequence[Choice]:
        """All combinations, likeliest first; where there are too many, the end of a greedy descent."""
        variables = self.open
        total = math.prod(len(self.classes[v]) for v in variables)
        if total <= self.limit:
            indices = sorted(
                itertools.product(*(range(len(self.classes[v])) for v in variables)),
                key=lambda c: (_mixed(variables, c), sum(c), c),
            )
            return [
                {**self.base, **{v: self.classes[v][i][0] for v, i in zip(variables, combo, strict=True)}}
                for combo in indices
            ]
        if sum(len(self.classes[v]) for v in variables) > self.limit:
            return []
        return [self._descend(comps)]

    def _descend(self, comps: Compensations) -> Choice:
        """One variable at a time, keep what lowers the error, until nothing does."""
        choice = dict(self.base)
        best = self.error(choice, comps)
        for _ in range(3):
            before = best
            for variable in self.open:
                for group in self.classes[variable]:
                    trial = {**choice, variable: group[0]}
                    error = self.error(trial, comps)
                    if error < best:
                        best, choice = error, trial
                if best <= self.parity.tolerance:
                    return choice
            if best == before:
                break
        return choice


def prove(
    parity: LogitParity,
    hyp: Hypotheses,
    options: Options,
    axes: Sequence[str],
    compensations: Sequence[Compensations] = ((),),
    *,
    limit: int,
) -> Outcome:
    """Search the options for a hypothesis under which ``axes`` grow together and the logits stay.

    ``limit`` bounds the layouts tried per compensation.
    """
    involved = [f for f in hyp.families if any(f.involves(a) for a in axes)]
    used = {v for f in involved for v in (f.direction, *f.terms)}
    classes = {v: effects(v, options[v], involved, axes, parity.found.sizes) for v in used}
    search = Search(parity, hyp.families, axes, {v: o[0] for v, o in options.items()}, classes, limit)
    best, tried = math.inf, 0
    for comps, choice in search.trials(compensations):
        error = search.error(choice, comps)
        tried += 1
        if error <= parity.tolerance:
            proved, error = parity.proves(layouts_of(hyp.families, choice), axes, comps)
            if proved:
                return Outcome(True, error, tried, {**options, **search.options_of(choice)}, comps)
        best = min(best, error)
    return Outcome(False, best, tried, options)


def effects(
    variable: Variable,
    options: Sequence[str],
    involved: Sequence[Family],
    axes: Sequence[str],
    sizes: Mapping[str, int],
) -> list[tuple[str, ...]]:
    """Options of a variable that do the same when the axes grow, grouped; order kept.

    What is counted has no factor: its growth tells no directions apart.
    """
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
    if variable[0] == "direction":
        family = next(f for f in involved if f.direction == variable)
        parsed = parse_layout(option.format(*(f"d{i}" for i in range(len(family.shape)))))
        grown = [any(a in m for a in set(axes) - COUNTED) for m in family.moves]
        return tuple(d.role is Role.IN for d, g in zip(parsed.dims, grown, strict=True) if g)
    return copied(option, axes, sizes)


def copied(term: str, axes: Iterable[str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The entry that each entry of a term copies when axes triple."""
    rules = Rules(sizes, {a: (sizes[a], 3 * sizes[a]) for a in axes})
    return tuple(Wanted(parse_layout(f"scale {term}"), rules, "float64").column.source.tolist())


def _mixed(variables: Sequence[Variable], combo: Sequence[int]) -> int:
    """How many raw parameters have another direction than the first: one model is written in one style.

    Two wrong directions can cancel on a path without a nonlinearity, so mixtures are tried last.
    """
    directions = [i for v, i in zip(variables, combo, strict=True) if v[0] == "direction"]
    return sum(i != directions[0] for i in directions)
