"""The JSON that each command prints with ``--json``, as models: the source of the published schemas.

Every document starts with ``schema`` (``sparkling/<command>``) and ``schema_version``. A field that is
added keeps the version; a field that goes or changes its meaning raises it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from sparkling_cli.cli.documents import Data, Document
from sparkling_cli.cli.schemas_inspect import Inspect
from sparkling_cli.report.model import ReportData
from sparkling_cli.schedule.curves import Curve
from sparkling_cli.schedule.rewarmup import RewarmupFile, StageData


class Change(Data):
    """A count before and after."""

    before: int
    after: int


class Bytes(Data):
    """Sizes in bytes."""

    before: Annotated[int, Field(description="tensor data of the source, optimizer state included")]
    after: Annotated[int, Field(description="tensor data of the output, optimizer state included")]
    to_write: Annotated[int, Field(description="all files with tensors in them, headers and config included")]
    free: Annotated[int, Field(description="on the disk that the output would lie on")]


class TensorKind(Data):
    """Tensors that differ only in their indices."""

    name: Annotated[str, Field(description="with * for indices")]
    slot: Annotated[str, Field(description="empty for weights, else the optimizer state's name")]
    count: int
    before: list[int]
    after: list[int]
    dtype: str
    scale: Annotated[list[float], Field(min_length=2, max_length=2, description="smallest, largest factor")]
    fill: list[Literal["copy", "random", "zero"]]
    zero: Annotated[bool, Field(description="the whole tensor becomes zero")]


class ExpandPlan(Document):
    """``sparkling expand --dry-run --json``."""

    schema_: Annotated[Literal["sparkling/expand"], Field(alias="schema")]
    dry_run: Literal[True]
    source: str
    destination: str
    format: str
    model: str
    axes: dict[str, Change]
    parameters: Change
    active_parameters: Change | None
    bytes: Bytes
    tensors: int
    widened: int
    config: Annotated[dict[str, Any], Field(description="config keys whose value changes")]
    kinds: list[TensorKind]
    notes: list[str]
    warnings: list[str]
    spec: dict[str, Any]


class ExpandResult(ReportData):
    """``sparkling expand --json``: the facts of the report."""

    schema_: Annotated[Literal["sparkling/expand"], Field(alias="schema")]
    schema_version: Literal[1]
    dry_run: Literal[False]


class Verify(Document):
    """``sparkling verify --json``, when everything holds; otherwise an error document."""

    schema_: Annotated[Literal["sparkling/verify"], Field(alias="schema")]
    ok: Literal[True]
    files: Annotated[int, Field(description="files of the output, every byte of which was read")]
    nbytes: int
    tensors: Annotated[int, Field(description="tensors whose bytes have the manifest's CRC-32")]
    derived: Annotated[int, Field(description="tensors worked out from the source and equal bit by bit")]
    moments: Annotated[int, Field(description="optimizer tensors with new entries exactly zero")]
    source: str
    extras: Annotated[tuple[str, ...], Field(description="harmless files that were not written with it")]


class Phase(Data):
    """One part of a run, between two expansions."""

    start_tokens: int
    stop_tokens: int
    sizes: dict[str, int]
    parameters: int
    active_parameters: int
    embedding_parameters: int
    flops: int
    checkpoint_bytes: int


class Flops(Data):
    """Training compute of three runs over the same tokens."""

    small: int
    scratch: int
    progressive: int


class ComputePlan(Document):
    """``sparkling plan --json``."""

    schema_: Annotated[Literal["sparkling/plan"], Field(alias="schema")]
    source: str
    model: str
    tokens: int
    phases: list[Phase]
    flops: Flops
    saved: Annotated[float, Field(description="share of the from-scratch compute")]
    bytes_assumed: str
    convention: str


class RewarmupStage(StageData):
    """One expansion's re-warmup (Eq. 27-28), and the rates that follow."""

    eta_e: Annotated[float, Field(description="the old entries' rate at the expansion")]
    peak: Annotated[float, Field(description="what new entries re-warm to")]


class CurvePoint(Data):
    """Learning rates at one step; ``new`` and ``ratio`` per expansion, null before it."""

    step: int
    old: float
    new: list[float | None]
    ratio: list[float | None]


class Schedule(Document):
    """``sparkling schedule --json``."""

    schema_: Annotated[Literal["sparkling/schedule"], Field(alias="schema")]
    expansion_step: int
    total_steps: int
    baseline: Curve
    stages: list[RewarmupStage]
    curve: list[CurvePoint]


class Layout(Document):
    """``sparkling layout --json``; the layout is that of the TOML file."""

    schema_: Annotated[Literal["sparkling/layout"], Field(alias="schema")]
    layout: dict[str, Any]


class ArchitectureAxis(Data):
    """One axis of one class."""

    name: str
    role: Annotated[str, Field(description="what kind of width it is: ffn, hidden, heads, ...")]
    proved: bool
    reason: Annotated[str, Field(description="how it was proved, or why it is refused")]
    joint: Annotated[list[str], Field(description="axes that grow by the same factor along with it")]


class Architecture(Data):
    """One model type of the installed transformers."""

    model_type: str
    class_name: str
    axes: list[ArchitectureAxis]
    failure: Annotated[str, Field(description="why no tiny model could be run; empty where one was")]
    experts: Annotated[bool, Field(description="whether the class has routed experts")]
    notes: list[str]
    layout_file: Annotated[
        list[str], Field(description="axes widened by a layout file of the package, which is asked first")
    ]


class Architectures(Document):
    """``sparkling architectures --json``."""

    schema_: Annotated[Literal["sparkling/architectures"], Field(alias="schema")]
    versions: Annotated[list[str], Field(description="of this program and the libraries it was made with")]
    proved_classes: Annotated[
        dict[str, int], Field(description="distinct classes with a proved axis: ffn, hidden, heads")
    ]
    architectures: list[Architecture]


class Error(Document):
    """What any command prints with ``--json`` when it fails; the exit code is the same number."""

    schema_: Annotated[Literal["sparkling/error"], Field(alias="schema")]
    error: str
    exit_code: int
    message: str
    hint: str | None


#: file name (without .json) -> model, of every document that a command prints
COMMANDS: dict[str, type[BaseModel]] = {
    "expand-plan": ExpandPlan,
    "expand": ExpandResult,
    "inspect": Inspect,
    "verify": Verify,
    "plan": ComputePlan,
    "schedule": Schedule,
    "layout": Layout,
    "architectures": Architectures,
    "error": Error,
}


def files() -> dict[str, type[BaseModel]]:
    """The same for every file that an expansion reads or writes."""
    from sparkling_cli.manifest import Manifest
    from sparkling_cli.spec.model import ExpansionSpec

    return {
        "spec-file": ExpansionSpec,
        "manifest-file": Manifest,
        "report-file": ReportData,
        "rewarmup-file": RewarmupFile,
    }


def schema(name: str, model: type[BaseModel]) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of one document."""
    mode: Literal["validation"] = "validation"
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"sparkling/{name}.json",
        **model.model_json_schema(mode=mode, by_alias=True),
    }
