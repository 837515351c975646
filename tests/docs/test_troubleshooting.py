"""The troubleshooting page quotes messages that exist."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.docs.blocks import ROOT

PAGE = ROOT / "docs" / "how-to" / "troubleshooting.md"
#: Headings that are symptoms, and quote nothing.
SYMPTOMS = {
    "The loss jumps at the boundary",
    "The loss is as before, and stays where the narrow model's was",
}
QUOTED = [
    heading
    for heading in re.findall(r"^### (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    if heading not in SYMPTOMS
]


@cache
def messages() -> tuple[str, ...]:
    """Every text in the package that is no docstring, what is filled in replaced by ``…``."""
    found = []
    for path in (ROOT / "sparkling_cli").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and id(node) not in documentation:
                found.append(str(node.value))
    return tuple(found)


@pytest.mark.parametrize("quoted", QUOTED)
def test_the_message_exists(quoted: str) -> None:
    """Word for word, in one piece of the package's text."""
    assert any(quoted in message for message in messages()), "no message says this any more"


def test_the_page_is_read() -> None:
    """A message that does not exist would be noticed."""
    assert len(QUOTED) > 20
    assert not any("Which format a path is of" in message for message in messages())
