"""What the installed transformers offers, and which axes of each class are proved.

Each class is judged on a tiny instance of its default config; results are cached one by one, so an
interrupted survey goes on where it stopped.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from sparkling_cli.errors import MissingDependencyError, SpecError
from sparkling_cli.formats.gc_pause import collector_running
from sparkling_cli.results.commands import Architecture, ArchitectureAxis, Architectures
from sparkling_cli.storage import cache

if TYPE_CHECKING:
    from rich.table import Table

    from sparkling_cli.models.prove import Findings

#: Up to so many rows the terminal's table shows every reason.
_FEW = 12

#: Axis roles in the order of the table's columns.
COLUMNS: tuple[tuple[str, frozenset[str]], ...] = (
    ("ffn", frozenset({"ffn", "expert_ffn", "shared_ffn"})),
    ("hidden", frozenset({"hidden"})),
    ("heads", frozenset({"heads", "kv_heads", "q_per_kv"})),
)


#: What a class has not that has no key for a column.
_ABSENT = {"ffn": "an inner width", "heads": "heads: its mixers have none"}

#: What is known of classes whose refusal no measurement explains.
_KNOWN = {
    "gemma4_assistant": "it drafts with the keys and values of the model that it assists, and text alone "
    "does not run it; its default config contradicts itself",
    "gemma4_unified_assistant": "it drafts with the keys and values of the model that it assists, and text "
    "alone does not run it",
    "prophetnet": "its class reads the position biases of heads and tokens in each other's order: with more "
    "heads, or another order of them, every head gets other biases",
    "reformer": "it hashes what it attends to by random rotations, and its positions are concatenated of two "
    "tables that share hidden between them",
    "blt": "its bytes are grouped by the entropies of a model of its own; four stacks of other widths read "
    "each other, and no small instance of them was found that runs",
}


@collector_running()
def survey(
    model_types: Sequence[str] | None = None, *, progress: Callable[[str], None] | None = None
) -> tuple[Architecture, ...]:
    """Judge every causal-LM model type of the installed transformers (or some of them).

    Args:
        model_types: None for all.
        progress: called with a line per finished model type.

    Raises:
        SpecError: a model type that the library does not have.
        MissingDependencyError: there is no such library.
    """
    from sparkling_cli.models.skeleton import causal_lm_names

    try:
        names = causal_lm_names()
    except ImportError as error:
        raise MissingDependencyError(
            f"what transformers offers is asked of it, and it cannot be imported: {error}",
            hint="pip install '.[hf]' in the clone; docs/architectures.md has the list as it was made",
        ) from error
    unknown = [m for m in model_types or () if m not in names]
    if unknown:
        kinds = {**{name: name for name in names}, **{kind: name for name, kind in names.items()}}
        near = difflib.get_close_matches(unknown[0], kinds, n=1)
        close = [kinds[found] for found in near]
        raise SpecError(
            f"the installed transformers has no causal language model of type {unknown[0]!r}",
            hint=f"did you mean {close[0]!r}?" if close else "run `sparkling architectures` for all",
        )
    rows = []
    for model_type in model_types if model_types is not None else sorted(names):
        row = _cached_row(model_type, names[model_type])
        rows.append(row)
        if progress is not None:
            proved = [a.name for a in row.axes if a.proved]
            progress(f"{model_type}: {', '.join(proved) or row.failure or 'nothing proved'}")
    return tuple(rows)


def _cached_row(model_type: str, class_name: str) -> Architecture:
    from sparkling_cli.layout.packaged import packaged_data
    from sparkling_cli.models.packaged_proof import file_of

    file = file_of(model_type)
    key = cache.key_of("survey", model_type, packaged_data(file) if file else None)
    stored = cache.load("survey", key)
    if stored is not None:
        return Architecture.model_validate(stored)
    row = _with_file(_judged_row(model_type, class_name))
    cache.store("survey", key, row.model_dump(mode="json"))
    return row


def _with_file(row: Architecture) -> Architecture:
    """The row with what a layout file of the package proves in columns in which inference proves nothing."""
    from sparkling_cli.models.packaged_proof import proved_by_file

    missing = [roles for _, roles in COLUMNS if not row.proved(roles)]
    found = proved_by_file(row.model_type) if missing else []
    new = [axis for axis in found if axis.name not in {a.name for a in row.axes if a.proved}]
    answered = {axis.name for axis in new}.union(
        *(roles for roles in missing if any(axis.role in roles for axis in new))
    )
    kept = [axis for axis in row.axes if axis.proved or not {axis.name, axis.role} & answered]
    return row.model_copy(update={"axes": (*new, *kept), "failure": "" if new else row.failure})


def _judged_row(model_type: str, class_name: str) -> Architecture:
    from sparkling_cli.models.prove import prove_axes
    from sparkling_cli.models.shrink import shrink
    from sparkling_cli.models.skeleton import default_config

    try:
        findings = prove_axes(shrink(default_config(model_type)))
    except Exception as error:  # the library's code may raise anything on its own defaults
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Architecture(model_type=model_type, class_name=class_name, failure=text[:300])
    axes = findings.found.axes
    rows = [
        ArchitectureAxis(
            name=name, role=axes[name].kind or "", proved=v.proved, reason=v.reason, joint=v.joint
        )
        for name, v in findings.verdicts.items()
    ]
    rows += _absent(findings)
    experts = any(a.kind == "experts" for a in axes.values())
    return Architecture(
        model_type=model_type,
        class_name=class_name,
        axes=tuple(rows),
        experts=experts,
        notes=findings.notes,
    )


def _absent(findings: Findings) -> list[ArchitectureAxis]:
    """A refused row, with the reason, for every column in which the class has no axis at all."""
    kinds = {axis.kind for axis in findings.found.axes.values()}
    rows = []
    for name, members in COLUMNS:
        if kinds & members:
            continue
        reason = f"no key of its config sizes {_ABSENT.get(name, name)}"
        rows.append(ArchitectureAxis(name=name, role=name, proved=False, reason=reason))
    return rows


def counts(rows: Iterable[Architecture]) -> dict[str, int]:
    """Number of distinct classes with a proved axis, per column."""
    found: dict[str, set[str]] = {name: set() for name, _ in COLUMNS}
    for row in rows:
        for name, roles in COLUMNS:
            if row.proved(roles):
                found[name].add(row.class_name)
    return {name: len(classes) for name, classes in found.items()}


def result(rows: Sequence[Architecture]) -> Architectures:
    """What ``sparkling architectures`` shows."""
    return Architectures(versions=cache.versions(), proved_classes=counts(rows), architectures=tuple(rows))


def to_table(rows: Sequence[Architecture]) -> Table:
    """The survey for a terminal; reasons for a few classes, counts for many."""
    from rich.table import Table

    totals = ", ".join(f"{name} {count}" for name, count in counts(rows).items())
    table = Table(title=f"{len(rows)} model types; classes with the axis proved: {totals}")
    table.add_column("model type")
    table.add_column("proved", style="green")
    table.add_column("refused", style="red")
    few = len(rows) <= _FEW
    for row in rows:
        refused = [f"{a.name}: {a.reason}" if few else a.name for a in row.axes if not a.proved]
        proved = [_axis_cell(a) for a in row.axes if a.proved]
        reasons = ("\n" if few else ", ").join(refused)
        table.add_row(row.model_type, ", ".join(proved), row.failure or reasons)
    return table


def to_markdown(rows: Sequence[Architecture]) -> str:
    """The page ``docs/architectures.md``."""
    classes = {row.class_name for row in rows}
    totals = counts(rows)
    lines = [
        "# Architectures",
        "",
        f"Made by `sparkling architectures --markdown > docs/architectures.md` with "
        f"{', '.join(cache.versions()[1:3])}; a test fails when it is stale. "
        f"{len(rows)} model types, {len(classes)} classes. Each was judged on a tiny random instance of its "
        "default config: an axis is *proved* if widening it 2x and 3x keeps the logits, and refused with the "
        "reason otherwise. What inference cannot explain may be in a layout file of the package, and is "
        "proved in the same way. A checkpoint's own config is judged so too when it is widened, unless a "
        "layout file of the package fits it.",
        "",
        "Classes with the axis proved: " + ", ".join(f"{n} {c}" for n, c in totals.items()) + ".",
        "",
        "| model type | class | ffn | hidden | heads | other proved axes |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_table_line(row) for row in rows]
    lines += ["", "## Refused, and why", ""]
    for row in rows:
        lines += _refusals(row)
    return "\n".join(lines) + "\n"


def _table_line(row: Architecture) -> str:
    cells = []
    for _, roles in COLUMNS:
        axes = [a for a in row.axes if a.role in roles]
        proved = [_axis_cell(a) for a in axes if a.proved]
        cells.append(", ".join(proved) or ("refused" if axes or row.failure else "none"))
    core = frozenset().union(*(roles for _, roles in COLUMNS))
    others = [_axis_cell(a) for a in row.axes if a.proved and a.role not in core]
    return f"| {row.model_type} | {row.class_name} | {' | '.join(cells)} | {', '.join(others)} |"


def _axis_cell(axis: ArchitectureAxis) -> str:
    said = [f"with {', '.join(axis.joint)}"] if axis.joint else []
    said += ["layout file"] if axis.layout_file else []
    return f"{axis.name} ({'; '.join(said)})" if said else axis.name


def _refusals(row: Architecture) -> list[str]:
    """Lines for what the class refuses, leaving out axes that are no widths anywhere."""
    from sparkling_cli.models.axes import FROZEN

    known = _KNOWN.get(row.model_type)
    lines = [f"- **{row.model_type}**: {known}"] if known else []
    if row.failure:
        return [*lines, f"- **{row.model_type}**: {row.failure}"]
    for axis in row.axes:
        if not axis.proved and axis.reason not in FROZEN.values():
            lines.append(f"- **{row.model_type}** `{axis.name}`: {' '.join(axis.reason.split())}")
    return lines
