"""The table of trainers: what it says is held by the tests that it names."""

from __future__ import annotations

import re

from tests.docs.blocks import ROOT

PAGE = (ROOT / "docs" / "how-to" / "pretraining.md").read_text(encoding="utf-8")
#: what a test's text has that holds a column
HELD = {
    "weights": "widen",
    "state": "exp_avg|check_moments|slots|shadow",
    "resumed": "train|resume|api.expand",
}


def test_every_row_is_held_by_its_tests() -> None:
    """The file is there, and does what the columns say; re-warmed are those whose test re-warms."""
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", PAGE, re.M)
    ]
    assert len(rows) >= 8
    for row in rows:
        named = dict(zip(head, row, strict=True))
        text = "".join((ROOT / path).read_text("utf-8") for path in re.findall("`(.+?)`", named["held by"]))
        assert text, named["trainer"]
        for column, pattern in HELD.items():
            assert not named[column] or re.search(pattern, text), (named["trainer"], column)
        if "schedule read" in named["re-warmed"]:
            assert "rewarm(" in text, named["trainer"]
