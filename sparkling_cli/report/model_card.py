"""The section of a model card that says how a checkpoint was made.

It is part of the plan, not of the measurements: the README is an output file like any other, known
before a byte is written, listed in the manifest and verified. A README that the source has is kept,
front matter included, and extended; a section of an earlier expansion is replaced by one that lists
all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sparkling_cli import __version__
from sparkling_cli.errors import CheckpointError

if TYPE_CHECKING:
    from sparkling_cli.plan.model import Expansion

README = "README.md"
BEGIN = "<!-- sparkling: how this checkpoint was made -->"
END = "<!-- sparkling: end -->"


def with_card(expansion: Expansion) -> Expansion:
    """The expansion with the README among its output files.

    Only directories with a README or a ``config.json`` get one; in other formats nobody would look.

    Raises:
        CheckpointError: the source's README cannot be read as text.
    """
    from sparkling_cli.formats.model import OutputFile

    source = expansion.plan.source
    has_one = README in source.carried
    if source.root.is_file() or not (has_one or "config.json" in source.config_file):
        return expansion
    existing = ""
    if has_one:
        try:
            existing = (source.root / README).read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot extend {source.root / README}: {error}") from None
    front = front_matter(source.config)
    text = extended(existing, section(expansion), source.root.name, front).encode(errors="replace")
    carried = tuple(path for path in source.carried if path != README)
    readme = OutputFile(path=README, size=len(text), literals=((0, text),))
    plan = replace(expansion.plan, source=replace(source, carried=carried))
    return replace(expansion, plan=plan, files=(*expansion.files, readme))


#: what ``organization/model`` on the hub looks like
_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def front_matter(config: Mapping[str, Any] | None) -> str:
    """What the hub reads at the head of a new README: library, tags, and what the model came from."""
    lines = ["---", "tags:", "- sparkling", "- model-expansion"]
    if config and "model_type" in config:
        lines[1:1] = ["library_name: transformers", "pipeline_tag: text-generation"]
    base = (config or {}).get("_name_or_path")
    if isinstance(base, str) and _ON_HUB.fullmatch(base):
        lines[1:1] = [f"base_model: {base}"]
    return "\n".join([*lines, "---", "", ""])


def extended(existing: str, section: str, name: str, front: str = "") -> str:
    """A README with the section: in the place of an older one, else at the end."""
    if not existing.strip():
        return f"{front}# {name}, widened\n\n{section}"
    start, stop = existing.find(BEGIN), existing.find(END)
    if 0 <= start < stop:
        return existing[:start] + section.rstrip("\n") + existing[stop + len(END) :]
    return existing.rstrip("\n") + "\n\n" + section


def section(expansion: Expansion) -> str:
    """The section itself, between its marks."""
    plan = expansion.plan
    spec = plan.spec
    lines = [
        BEGIN,
        "## How this checkpoint was made",
        "",
        "It was widened in the middle of pre-training by "
        f"sparkling-cli {__version__}, after the method of Yu et "
        "al., *SPARKLING: Balancing Signal Preservation and Symmetry Breaking for Width-Progressive "
        "Learning* (arXiv 2602.02472).",
        "",
        "| expansion | step | axis | before | after | new weights | optimizer state |",
        "|---|---|---|---|---|---|---|",
        *_rows(expansion),
        "",
        f"- Source: `{plan.source.root.name}` ({plan.layout.name}).",
        f"- Scaling of fan-in weights: `{spec.scaling}`. Seed of random fills: {spec.seed}.",
        "- Re-warmup of new entries: `sparkling/rewarmup.json`, where a schedule is known.",
        "- What was measured: `sparkling/report.html`. Every tensor's origin and checksum: "
        "`sparkling/manifest.json`; `sparkling verify SOURCE THIS` proves them.",
        END,
        "",
    ]
    return "\n".join(lines)


def _rows(expansion: Expansion) -> Iterable[str]:
    plan, previous = expansion.plan, expansion.previous
    number = 0
    for stage in previous.stages if previous is not None else ():
        number = stage.stage
        for axis, (before, after) in sorted(stage.growth.items()):
            yield _row(number, stage.step, axis, before, after, stage.spec["init"], stage.spec["optimizer"])
    step = plan.source.facts.get("global_step")
    treatment = plan.spec.optimizer if plan.source.states else "none in the source"
    for axis, grown in sorted(plan.growth.items()):
        yield _row(number + 1, step, axis, grown.source, grown.target, plan.spec.init, treatment)


def _row(number: int, step: int | None, axis: str, before: int, after: int, init: str, optimizer: str) -> str:
    when = "" if step is None else f"{step:,}"
    return f"| {number} | {when} | {axis} | {before:,} | {after:,} | {init} | {optimizer} |"
