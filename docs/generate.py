"""Writes the pages of the reference that follow from the code: ``python docs/generate.py``.

``tests/docs/test_generated_pages.py`` fails when a committed page differs from what this makes.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).resolve().parent / "reference"
NOTICE = "<!-- made by docs/generate.py; do not edit -->\n\n"

#: Public objects, by the module that users import them from.
API = {
    "sparkling_cli": ("expand", "make_plan", "plan_run", "verify", "inspect", "layout_of", "write_schedule",
                      "ExpansionResult"),
    "sparkling_cli.api": ("open_source", "default_destination"),
    "sparkling_cli.diagnostics.inspect": ("inspect_checkpoint",),
    "sparkling_cli.spec.model": ("ExpansionSpec", "AxisSpec", "RewarmupSpec", "BaselineSpec"),
    "sparkling_cli.results.expansion": ("Report", "LearningRate"),
    "sparkling_cli.results.measured": ("Inspection", "Activations", "LayerActivation", "ResidualPoint"),
    "sparkling_cli.results.base": ("Verdict",),
    "sparkling_cli.training": ("rewarm", "Rewarming", "SparklingCallback"),
    "sparkling_cli.forecast": ("subject_of", "forecast", "Expansion"),
    "sparkling_cli.layout.model": ("ModelLayout", "AxisInfo"),
    "sparkling_cli.plan.model": ("Expansion", "Plan", "Invocation"),
    "sparkling_cli.manifest": ("read_manifest", "Manifest"),
    "sparkling_cli.schedule.rewarmup": ("read_rewarmup", "Rewarmup"),
    "sparkling_cli.errors": ("SparklingError", "SpecError", "CheckpointError", "LayoutError",
                             "UnsafePickleError", "OutputError", "VerificationError",
                             "MissingDependencyError"),
}  # fmt: skip


def pages() -> dict[str, str]:
    """Path under ``reference/`` -> content, of every generated file."""
    from sparkling_cli.manifest import Manifest
    from sparkling_cli.results.commands import DOCUMENTS, schema
    from sparkling_cli.results.expansion import Report
    from sparkling_cli.schedule.rewarmup import RewarmupFile
    from sparkling_cli.spec.model import ExpansionSpec

    made = {"cli.md": cli_page(), "api.md": api_page(), "spec.md": spec_page(), "exit-codes.md": exit_page()}
    schemas = {name: document.schema(name) for name, document in DOCUMENTS.items()}
    schemas["spec-file"] = schema("spec-file", ExpansionSpec, "validation")
    schemas["manifest-file"] = schema("manifest-file", Manifest, "validation")
    for name, model in (("report-file", Report), ("rewarmup-file", RewarmupFile)):
        schemas[name] = schema(name, model)
    return made | {f"schemas/{name}.json": json.dumps(s, indent=1) + "\n" for name, s in schemas.items()}


def cli_page() -> str:
    """Every command with its arguments, options and examples, from the command objects."""
    import typer

    from sparkling_cli.cli.app import app

    group: Any = typer.main.get_command(app)
    lines = [
        "# Command line",
        "",
        "Generated from the commands themselves; `sparkling COMMAND --help` says the same.",
        "",
    ]
    for name, command in group.commands.items():
        text = inspect.cleandoc((command.help or "").replace("\b", ""))
        text, _, examples = re.sub(r"^Example:", "Examples:", text, flags=re.M).partition("Examples:")
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = " ".join(_metavar(a) for a in arguments)
        lines += [
            f"## sparkling {name}",
            "",
            text.strip(),
            "",
            "```text",
            f"sparkling {name} [OPTIONS] {usage}",
            "```",
            "",
        ]
        if arguments:
            lines += ["| argument | |", "|---|---|"]
            lines += [f"| `{_metavar(a)}` | {_cell(getattr(a, 'help', '') or '')} |" for a in arguments] + [
                ""
            ]
        for panel in dict.fromkeys(o.rich_help_panel for o in options if o.rich_help_panel):
            lines += [f"| {panel} | value | default | |", "|---|---|---|---|"]
            lines += [
                f"| {_flags(o)} | {_value(o)} | {_default(o)} | {_cell(o.help or '')} |"
                for o in options
                if o.rich_help_panel == panel
            ] + [""]
        if examples.strip():
            lines += ["```text", inspect.cleandoc("\n" + examples.strip("\n")), "```", ""]
    return NOTICE + "\n".join(lines).rstrip() + "\n"


def _metavar(argument: Any) -> str:
    name = str(argument.metavar or argument.name.upper())
    several = "..." if argument.nargs == -1 else ""
    return (name if argument.required else f"[{name}]") + several


def _flags(option: Any) -> str:
    return ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))


def _default(option: Any) -> str:
    return f"`{option.show_default}`" if isinstance(option.show_default, str) else ""


def _value(option: Any) -> str:
    return f"`{_cell(option.metavar)}`" if option.metavar else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def api_page() -> str:
    """Signatures and docstrings of the public objects."""
    import importlib

    lines = [
        "# Python API",
        "",
        "Generated from the code. The command line is a thin layer on these functions.",
        "",
    ]
    for module, names in API.items():
        found = importlib.import_module(module)
        lines += [f"## {module}", ""]
        for name in names:
            lines += _object(name, getattr(found, name))
    return NOTICE + "\n".join(lines).rstrip() + "\n"


def _object(name: str, thing: Any) -> list[str]:
    kind = "class" if inspect.isclass(thing) else "def"
    lines = [
        f"### {name}",
        "",
        "```python",
        f"{kind} {_signature(name, thing)}",
        "```",
        "",
        *_prose(thing.__doc__),
        "",
    ]
    if not inspect.isclass(thing):
        return lines
    if hasattr(thing, "model_fields"):
        lines += [*_fields(thing), ""]
    for method, value in vars(thing).items():
        if method.startswith("_") or not (inspect.isfunction(value) or isinstance(value, property)):
            continue
        if isinstance(value, property):
            lines += [f"- `{method}`: {_first(value.__doc__)}"]
        elif method not in ("model_post_init", "on_train_begin", "on_save", "on_train_end"):
            lines += [f"- `{_signature(method, value, short=True)}`: {_first(value.__doc__)}"]
    return [*lines, ""]


def _signature(name: str, thing: Any, *, short: bool = False) -> str:
    try:
        if hasattr(thing, "model_rebuild"):  # a model that nobody has used yet does not know its fields
            thing.model_rebuild()
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return name
    parameters = [
        p.replace(annotation=_bare(p.annotation) if isinstance(p.annotation, str) else p.empty)
        for p in signature.parameters.values()
        if p.name != "self"
    ]
    result = signature.return_annotation if isinstance(signature.return_annotation, str) else signature.empty
    text = str(signature.replace(parameters=parameters, return_annotation=result)).replace("'", "")
    if short or len(name + text) < 90:
        return f"{name}{text}"
    inner = ",\n    ".join(str(p).replace("'", "") for p in _starred(parameters))
    tail = "" if result is signature.empty else f" -> {result}"
    return f"{name}(\n    {inner},\n){tail}"


def _bare(annotation: str) -> str:
    """A type without what says how it is validated."""
    return re.sub(r"Annotated\[(.+?), (?:_[A-Z]+|Field\([^)]*\))\]", r"\1", annotation)


def _starred(parameters: Iterable[inspect.Parameter]) -> Iterable[object]:
    keyword = False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword:
            keyword = True
            yield "*"
        yield parameter


def _prose(doc: str | None) -> list[str]:
    """A docstring as markdown: sections become lists."""
    lines: list[str] = []
    section = False
    for line in inspect.cleandoc(doc or "").splitlines():
        head = re.fullmatch(r"(Args|Returns|Raises|Attributes):", line)
        if head:
            lines += ["", f"**{head[1]}**", ""]
            section = True
        elif section and re.match(r"    \S", line):
            lines.append("- " + re.sub(r"^(\S+):", r"`\1`:", line.strip()))
        elif section and line.startswith("     "):
            lines[-1] += " " + line.strip()
        else:
            section = section and line.startswith("    ")
            lines.append(line)
    return [_plain(line) for line in lines]


def _plain(text: str) -> str:
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`")


def _first(doc: str | None) -> str:
    return _plain(inspect.cleandoc(doc or "").split("\n\n")[0].replace("\n", " "))


def _fields(model: Any) -> list[str]:
    lines = ["| field | default | |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else f"`{_json(field.default)}`"
        lines.append(f"| `{name}` | {default} | {_cell(field.description or '')} |")
    return lines


def _json(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    data = value.model_dump(mode="json") if hasattr(value, "model_dump") else value
    return json.dumps(data, default=str)


def spec_page() -> str:
    """Fields of the expansion spec."""
    from sparkling_cli.spec.model import AxisSpec, BaselineSpec, ExpansionSpec, RewarmupSpec

    lines = [
        "# Expansion spec", "",
        "What `sparkling expand` is asked for: by options, by a file (`--spec`; YAML, TOML or JSON), or by "
        "both; options win. Unknown fields are refused. "
        "The schema: [spec-file.json](schemas/spec-file.json).", "",
    ]  # fmt: skip
    for model, where in (
        (ExpansionSpec, ""),
        (AxisSpec, "axes[]"),
        (RewarmupSpec, "rewarmup"),
        (BaselineSpec, "baseline"),
    ):
        lines += [f"## {where or 'The spec'}", "", *_prose(model.__doc__), "", *_spec_fields(model), ""]
    lines += ["## Example", "", "```yaml", *_EXAMPLE.splitlines(), "```", ""]
    return NOTICE + "\n".join(lines).rstrip() + "\n"


_EXAMPLE = """axes:
  - {axis: ffn, factor: 2}
  - {axis: hidden, to: 1536}
init: copy-copy
scaling: rms
optimizer: asymmetric
rewarmup: {rho: 1.3, steps: 250}
"""


def _spec_fields(model: Any) -> list[str]:
    schema: Mapping[str, Any] = model.model_json_schema()
    lines = ["| field | values | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        shape = schema["properties"][name]
        default = "required" if field.is_required() else f"`{_json(field.default)}`"
        if hasattr(field.default, "model_dump"):
            default = "see below"
        lines.append(f"| `{name}` | {_cell(_values(shape))} | {default} | {_cell(field.description or '')} |")
    return lines


def _values(shape: Mapping[str, Any]) -> str:
    if "enum" in shape:
        return ", ".join(f"`{v}`" for v in shape["enum"])
    if "anyOf" in shape:
        return " or ".join(_values(part) for part in shape["anyOf"] if part.get("type") != "null")
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    found = [f"{sign} {shape[key]}" for key, sign in limits.items() if key in shape]
    kind = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "array": "list",
        "boolean": "yes or no",
    }
    return " ".join([kind.get(shape.get("type", ""), "table"), *found])


def exit_page() -> str:
    """Exit codes and the errors behind them."""
    from sparkling_cli import errors

    lines = [
        "# Exit codes", "",
        "Every command ends with one of these. With `--json` a failure prints a document of the schema "
        "[error.json](schemas/error.json) with the same number.", "",
        "| code | name | when |", "|---|---|---|",
    ]  # fmt: skip
    said = {
        errors.ExitCode.OK: "Done.",
        errors.ExitCode.BUG: "A bug: please report it with the traceback.",
        errors.ExitCode.USAGE: "An option or argument of the command line is wrong.",
        errors.ExitCode.INTERRUPTED: "Ctrl-C or SIGTERM; nothing that looks finished was left behind.",
    }
    for kind in vars(errors).values():
        if (
            inspect.isclass(kind)
            and issubclass(kind, errors.SparklingError)
            and kind is not errors.SparklingError
        ):
            said.setdefault(kind.exit_code, _first(kind.__doc__))
    lines += [f"| {int(code)} | {code.name} | {_cell(said[code])} |" for code in errors.ExitCode]
    return NOTICE + "\n".join(lines) + "\n"


def main() -> None:
    """Write all pages that changed."""
    for name, content in pages().items():
        path = REFERENCE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
            print(f"written  {path.relative_to(REFERENCE.parent)}")


if __name__ == "__main__":
    main()
