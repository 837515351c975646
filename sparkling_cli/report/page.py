"""``sparkling/report.html``: the report as one page, from the template ``page.html.jinja``.

The template has the words, the structure and the drawings; here is what it asks for: number formats, and
which rows are shown. Equal facts give equal bytes.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemBytecodeCache, PackageLoader, StrictUndefined, Template
from jinja2.bccache import Bucket
from markupsafe import Markup, escape

from sparkling_cli.report import charts, figures
from sparkling_cli.report.command import places_in
from sparkling_cli.report.resume import snippet
from sparkling_cli.report.tensor_blocks import BLOCKS_AT_MOST, tensor_block
from sparkling_cli.results import numbers
from sparkling_cli.results.expansion import Report
from sparkling_cli.results.measured import DEVIATION_LIMIT, Activations
from sparkling_cli.results.verdict import LOCKED, judged, offenders, sentence
from sparkling_cli.storage.cache import directory

#: Rows of a table of activations, where something moved and where nothing did; report.json has all.
ROWS_AT_MOST, ROWS_WHEN_CALM = 12, 5

#: Widths of drawings, on a screen and on a phone.
WIDE, NARROW = 900.0, 350.0

SIGNS = {"good": "✓", "note": "i", "attention": "!"}

TREATMENTS = {
    "asymmetric": "old entries kept, new entries zero (Eq. 24)",
    "asymmetric-scaled": "old entries kept and scaled like their weights, new entries zero",
    "copy": "old entries kept, new entries copied",
    "drop": "all entries zero, step counters reset",
}


def render(data: Report) -> bytes:
    """The page."""
    source, output = places_in(data.command, data.destination)
    page = _template().render(
        data=data,
        verify=shlex.join(["sparkling", "verify", source, output]),
        snippet=snippet(data.provenance.format, output),
        locked=data.verdict.headline == LOCKED,
        signs=SIGNS,
        treatments=TREATMENTS,
        limit=DEVIATION_LIMIT,
        most=ROWS_AT_MOST,
        wide=WIDE,
        narrow=NARROW,
        # matrices first: a norm's drawing tells little
        drawn=sorted(data.tensors, key=lambda change: change.role == "elementwise")[:BLOCKS_AT_MOST],
        **_signal(data.activations),
        spec=json.dumps(data.spec, indent=2),
        facts=_facts(data),
    )
    return page.encode(errors="replace")  # file names may be no text


def _signal(measured: Activations | None) -> dict[str, Any]:
    """What the section on activations shows."""
    if measured is None:
        return {}
    entries = sorted(judged(measured)[0], key=lambda entry: -entry.moved)
    functions, layers = (
        [e for e in found if e.moved >= numbers.ROUNDING]
        for found in (sorted(measured.functions, key=lambda entry: -entry.moved), measured.worst())
    )
    off = len(offenders(measured))
    rows = ROWS_AT_MOST if off else ROWS_WHEN_CALM
    return {
        "entries": entries,
        "worst": entries[0] if entries else None,
        "off": off,
        "rows": rows,
        "functions": functions[:rows],
        "calm_functions": len(measured.functions) - len(functions),
        "layers": layers[: ROWS_WHEN_CALM if measured.functions else rows],
        "calm_layers": len(measured.layers) - len(layers),
    }


def _facts(data: Report) -> Markup:
    """The facts as JSON, safe inside a script element: a name that holds ``</script>`` must not end it."""
    text = json.dumps(data.model_dump(mode="json"), allow_nan=False, sort_keys=True)
    return Markup(text.replace("<", "\\u003c"))


class _Compiled(FileSystemBytecodeCache):
    """The template's code, kept between runs: to compile it takes longer than to fill it in.

    A cache that cannot be read or written is no error.
    """

    def load_bytecode(self, bucket: Bucket) -> None:
        """What was kept, if anything was."""
        with contextlib.suppress(OSError):
            super().load_bytecode(bucket)

    def dump_bytecode(self, bucket: Bucket) -> None:
        """Keep it."""
        with contextlib.suppress(OSError):
            Path(self.directory).mkdir(parents=True, exist_ok=True)
            super().dump_bytecode(bucket)


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=PackageLoader("sparkling_cli.report", ""),
        bytecode_cache=_Compiled(str(directory() / "page")),
    )
    own = ("count", "nbytes", "significant", "signed", "percent", "moved", "factor")
    environment.filters |= {name: getattr(numbers, name) for name in own}
    environment.filters |= {"breakable": breakable, "sentence": sentence, "short": _short}
    environment.globals |= {"figures": figures, "draw": charts.draw, "tensor_block": tensor_block}
    return environment.get_template("page.html.jinja")


def breakable(name: str) -> Markup:
    """A text whose dotted names may break behind their dots; a number, an option and a page do not."""
    text = re.sub(r"\.(?!md\b)(?=[^\W\d]|\{)", ".<wbr>", str(escape(name)))
    return Markup(re.sub(r"(?<!\S)(\(?)(--[a-z-]+)", r'\1<span class="option">\2</span>', text))


def _short(name: str) -> str:
    """The end of a name, enough to know the tensor."""
    parts = [part for part in name.split(".") if not part.startswith("{") and part != "weight"]
    return ".".join(parts[-2:])
