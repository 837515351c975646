"""Results of the smaller commands, and the table of all JSON documents with their schemas.

Every document that a command prints starts with ``schema`` (``sparkling/<command>``) and
``schema_version``. A field that is added keeps the version; a field that goes or changes its meaning
raises it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from sparkling_cli.results.base import Result
from sparkling_cli.results.expansion import Report
from sparkling_cli.results.measured import Inspection
from sparkling_cli.results.plan import ExpansionPlan
from sparkling_cli.schedule.curves import Curve
from sparkling_cli.schedule.rewarmup import Stage


class Verification(Result):
    """A verification that found nothing wrong; otherwise an error is printed."""

    ok: Literal[True] = True
    files: Annotated[int, Field(description="files of the output, every byte of which was read")]
    nbytes: int
    tensors: Annotated[int, Field(description="tensors whose bytes have the manifest's CRC-32")]
    derived: Annotated[int, Field(description="tensors worked out from the source and equal bit by bit")]
    moments: Annotated[int, Field(description="optimizer tensors with new entries exactly zero")]
    source: Annotated[str, Field(description="the source's name; empty if only the output was looked at")]
    model: Annotated[
        str,
        Field(description="class whose names and shapes the weights have; empty if not asked"),
    ] = ""
    model_missing: Annotated[str, Field(description="why the class that the config names was not asked")] = ""
    extras: Annotated[tuple[str, ...], Field(description="harmless files that were not written with it")] = ()

    def summary(self) -> str:
        """One line for people."""
        text = f"ok: {self.files} files ({self.nbytes:,} bytes) and {self.tensors} tensors are as written"
        if not self.source:
            return f"{text}; not compared with a source"
        text += f"; {self.derived} follow bit by bit from {self.source}"
        text += f", {self.moments} optimizer tensors reset where new" if self.moments else ""
        if self.model_missing:
            return f"{text}; not compared with the model's own class: {self.model_missing}"
        return text + (f"; names and shapes are those of {self.model}" if self.model else "")


class Phase(Result):
    """One part of a run, between two expansions."""

    start_tokens: int
    stop_tokens: int
    sizes: dict[str, int]
    parameters: int
    active_parameters: int
    embedding_parameters: int
    flops: int
    checkpoint_bytes: int


class Flops(Result):
    """Training compute of three runs over the same tokens."""

    small: int
    scratch: int
    progressive: int


class RunPlan(Result):
    """What a progressive run costs."""

    source: str
    model: str
    tokens: int
    phases: tuple[Phase, ...]
    flops: Flops
    saved: Annotated[float, Field(description="share of the from-scratch compute")]
    bytes_assumed: str
    convention: str
    notes: Annotated[
        tuple[str, ...],
        Field(description="how near each expansion is to measured ones, and how far old entries step"),
    ] = ()
    warnings: Annotated[tuple[str, ...], Field(description="of every expansion, as its plan says them")] = ()


class RewarmupStage(Stage):
    """One expansion's re-warmup (Eq. 27-28), and the rates that follow."""

    eta_e: Annotated[float, Field(description="the old entries' rate at the expansion")]
    peak: Annotated[float, Field(description="what new entries re-warm to")]


class CurvePoint(Result):
    """Learning rates at one step; ``new`` and ``ratio`` per expansion, null before it."""

    step: int
    old: float
    new: tuple[float | None, ...]
    ratio: tuple[float | None, ...]


class Schedule(Result):
    """The re-warmup of an output, at a selection of steps."""

    expansion_step: int
    total_steps: int
    baseline: Curve
    stages: tuple[RewarmupStage, ...]
    curve: tuple[CurvePoint, ...]


class Layout(Result):
    """The layout of a checkpoint, as in the TOML file."""

    layout: dict[str, Any]


class ArchitectureAxis(Result):
    """One axis of one class."""

    name: str
    role: Annotated[str, Field(description="what kind of width it is: ffn, hidden, heads, ...")]
    proved: bool
    reason: Annotated[str, Field(description="how it was proved, or why it is refused")]
    joint: Annotated[
        tuple[str, ...], Field(description="axes that grow by the same factor along with it")
    ] = ()
    layout_file: Annotated[
        str,
        Field(description="the layout file of the package that it is proved by, where it is not inferred"),
    ] = ""


class Architecture(Result):
    """One model type of the installed transformers."""

    model_type: str
    class_name: str
    axes: tuple[ArchitectureAxis, ...] = ()
    failure: Annotated[str, Field(description="why no tiny model could be run; empty where one was")] = ""
    experts: Annotated[bool, Field(description="whether the class has routed experts")] = False
    notes: tuple[str, ...] = ()

    def proved(self, roles: Iterable[str]) -> tuple[str, ...]:
        """Names of the proved axes of some kinds of width."""
        wanted = frozenset(roles)
        return tuple(axis.name for axis in self.axes if axis.proved and axis.role in wanted)


class Architectures(Result):
    """What the installed transformers offers, and what is proved."""

    versions: Annotated[
        tuple[str, ...], Field(description="of this program and the libraries it was made with")
    ]
    proved_classes: Annotated[
        dict[str, int], Field(description="distinct classes with a proved axis: ffn, hidden, heads")
    ]
    architectures: tuple[Architecture, ...]


class Failure(Result):
    """What any command prints with ``--json`` when it fails; the exit code is the same number."""

    error: str
    exit_code: int
    message: str
    hint: str | None


@dataclass(frozen=True)
class Document:
    """A JSON document of the command line.

    Attributes:
        command: stands in ``schema``.
        model: its facts.
        version: raised when a field changes its meaning or goes.
        extra: constant fields beside the facts.
    """

    command: str
    model: type[BaseModel]
    version: int = 1
    extra: dict[str, Any] = field(default_factory=dict)

    def data(self, facts: BaseModel) -> dict[str, Any]:
        """The document of these facts."""
        return {**self.head, **facts.model_dump(mode="json")}

    def schema(self, name: str) -> dict[str, Any]:
        """Its JSON Schema."""
        found = schema(name, self.model)
        constants = {key: {"const": value, "title": key} for key, value in self.head.items()}
        found["properties"] = {**constants, **found["properties"]}
        found["required"] = [*self.head, *found.get("required", ())]
        return found

    @property
    def head(self) -> dict[str, Any]:
        """What is the same in every such document."""
        return {"schema": f"sparkling/{self.command}", "schema_version": self.version, **self.extra}


#: file name of the schema (without .json) -> the document that a command prints
DOCUMENTS: dict[str, Document] = {
    "expand-plan": Document("expand", ExpansionPlan),
    "expand": Document("expand", Report, extra={"dry_run": False}),
    "inspect": Document("inspect", Inspection, version=2),
    "verify": Document("verify", Verification),
    "plan": Document("plan", RunPlan),
    "schedule": Document("schedule", Schedule),
    "layout": Document("layout", Layout),
    "architectures": Document("architectures", Architectures),
    "error": Document("error", Failure),
}


def document(facts: BaseModel) -> dict[str, Any]:
    """The facts with what every document of their kind starts with."""
    return next(found for found in DOCUMENTS.values() if isinstance(facts, found.model)).data(facts)


def schema(
    name: str, model: type[BaseModel], mode: Literal["validation", "serialization"] = "serialization"
) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of what is printed, or (``validation``) of what is read."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"sparkling/{name}.json",
        **model.model_json_schema(mode=mode),
    }
