"""All that is known before the first byte is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparkling_cli.formats.model import OutputFile
from sparkling_cli.manifest import Manifest
from sparkling_cli.plan.model import Plan
from sparkling_cli.plan.totals import Totals
from sparkling_cli.schedule.rewarmup import Rewarmup
from sparkling_cli.spec.model import ExpansionSpec


@dataclass(frozen=True)
class Prepared:
    """A plan with all that its execution needs.

    Attributes:
        plan: what will be done.
        files: the output's files, laid out.
        totals: parameters and bytes before and after.
        previous: the source's own manifest, when it is an earlier output.
        spec: as asked for.
        schedule: the re-warmup, or None and why there is none.
        state: the source's files as they were before they were opened.
    """

    plan: Plan
    files: tuple[OutputFile, ...]
    totals: Totals
    previous: Manifest | None
    spec: ExpansionSpec
    schedule: tuple[Rewarmup | None, str]
    state: Mapping[str, tuple[int, int, int]]
