"""``sparkling/report.html``: one page that needs nothing but itself.

Style, drawings and the facts as JSON are all inside; no script is needed to read it (the only one
switches the theme), nothing is fetched, and equal facts give equal bytes.
"""

from __future__ import annotations

import json
from functools import cache
from html import escape
from importlib import resources

from sparkling_cli.report import sections
from sparkling_cli.report.model import Level, ReportData
from sparkling_cli.report.svg import tag

SIGNS: dict[Level, tuple[str, str]] = {
    "good": ("✓", "good"),
    "note": ("i", "note"),
    "attention": ("!", "attention"),
}

_SCRIPT = """
const button = document.getElementById("theme"), root = document.documentElement;
const dark = () => root.dataset.theme ? root.dataset.theme === "dark"
  : matchMedia("(prefers-color-scheme: dark)").matches;
const label = () => { button.textContent = dark() ? "Light theme" : "Dark theme"; };
button.hidden = false;
button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; label(); });
label();
"""

_SYMBOLS = (
    '<svg id="symbols" aria-hidden="true"><defs><pattern id="new-entries" width="7" height="7" '
    'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="7" height="7" '
    'style="fill:var(--new-pale)"/><rect width="3" height="7" style="fill:var(--new-fill)"/></pattern>'
    "</defs></svg>"
)


@cache
def _style() -> str:
    return resources.files("sparkling_cli.report").joinpath("page.css").read_text(encoding="utf-8")


def render(data: ReportData) -> bytes:
    """The page."""
    title = f"{data.source} → {data.destination}"
    body = [
        _SYMBOLS,
        "<main>",
        _header(title, data),
        _verdict(data),
        sections.tiles(data),
        sections.widened(data),
        sections.activations(data),
        sections.learning_rate(data),
        sections.optimizer(data),
        sections.compute(data),
        sections.made(data),
        _footer(data),
        "</main>",
        _facts(data),
        f"<script>{_SCRIPT}</script>",
    ]
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # nothing may be fetched, whatever a name in the checkpoint says
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">",
        '<link rel="icon" href="data:,">',
        f"<title>{escape(title)}: sparkling report</title>",
        f"<style>\n{_style()}</style>",
    ]
    page = "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            *head,
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )
    return page.encode(errors="replace")  # file names may be no text


def _header(title: str, data: ReportData) -> str:
    axes = " and ".join(f"{a.axis} {a.before:,} → {a.after:,}" for a in data.axes)
    lead = f"{data.model}, widened: {axes}"
    return (
        f"<header><div><h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p></div>"
        '<button id="theme" type="button" hidden>Theme</button></header>'
    )


def _verdict(data: ReportData) -> str:
    items = []
    for finding in data.verdict.findings:
        sign, word = SIGNS[finding.level]
        mark = tag("span", sign, class_=f"sign {finding.level}", role="img", aria_label=word)
        items.append(f"<li>{mark}{sections.breakable(finding.text)}</li>")
    mark = tag("span", "i", class_="sign note", role="img", aria_label="note")
    items += [f"<li>{mark}{escape(_sentence(note))}</li>" for note in data.notes]
    return (
        f'<div class="verdict {data.verdict.level}"><h2>{escape(data.verdict.headline)}</h2>'
        f'<ul class="findings">{"".join(items)}</ul></div>'
    )


def _sentence(note: str) -> str:
    """A note with a capital, unless it begins with the name of something."""
    first = note.split(" ", 1)[0]
    return note[:1].upper() + note[1:] if first.isalpha() and first.islower() else note


def _footer(data: ReportData) -> str:
    return (
        f"<footer>Made by {escape(data.provenance.tool)} {escape(data.provenance.version)}. "
        "Method: Yu et al., “SPARKLING: Balancing Signal Preservation and Symmetry Breaking for "
        "Width-Progressive Learning”, arXiv 2602.02472. "
        "The facts of this page are in <code>report.json</code> beside it, "
        "and inside the page as JSON.</footer>"
    )


def _facts(data: ReportData) -> str:
    text = json.dumps(data.model_dump(mode="json"), allow_nan=False, sort_keys=True)
    # a name that holds "</script>" must not end the block
    safe = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="facts">{safe}</script>'
