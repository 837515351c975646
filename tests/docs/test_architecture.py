"""The picture of rooms is the house as it stands, and the places that the page names are there."""

from __future__ import annotations

import re

from tests.docs.blocks import ROOT
from tests.test_structure import LEVELS

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def floors() -> list[set[str]]:
    """The rooms of the picture, from the foundation up."""
    (picture,) = re.findall(r"^```\n(.+?)\n```$", PAGE, flags=re.M | re.S)
    return [{line.split()[0] for line in floor.strip().splitlines()} for floor in re.split(r"─+\n", picture)][
        ::-1
    ]


def test_the_picture_shows_every_room_at_its_level() -> None:
    """The same floors as those that hold imports (``__main__`` only starts the command line)."""
    assert floors() == [level for level in LEVELS if level != {"__main__"}]


def test_the_picture_is_one_screen() -> None:
    """As high and as wide as a terminal that is not small."""
    (picture,) = re.findall(r"^```\n(.+?)\n```$", PAGE, flags=re.M | re.S)
    assert len(picture.splitlines()) <= 50
    assert max(map(len, picture.splitlines())) <= 120


def test_places_exist() -> None:
    """Every path in code style is a file or folder of the package, of the tests, or of the repository."""
    named = set(re.findall(r"`([\w./-]+/[\w./-]*)(?:::[\w.]+)?`", PAGE))
    assert len(named) > 20
    for path in named - {"sparkling/manifest.json", "sparkling/"}:
        assert (ROOT / "sparkling_cli" / path).exists() or (ROOT / path).exists(), path
