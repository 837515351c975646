"""The report in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparkling_cli.report.page import render
from tests.report.browser import find_browser, print_pages, visit, widths
from tests.report.samples import report

BROWSER = find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine"),
]
REPORTS = {
    "good": report(),
    "bad": report(good=False),
    "bare": report(bare=True),
    "one layer": report(layers=1),
}


def written(name: str, folder: Path) -> Path:
    """The page as a file."""
    page = folder / "report.html"
    page.write_bytes(render(REPORTS[name]))
    return page


@pytest.mark.parametrize("name", REPORTS)
def test_it_renders_without_console_messages_or_requests(name: str, tmp_path: Path) -> None:
    """Nothing is logged, nothing is fetched, and the script ran to its end."""
    seen = visit(str(BROWSER), written(name, tmp_path), tmp_path)
    assert seen.console == []
    assert seen.requests == []
    assert "Dark theme</button>" in seen.dom or "Light theme</button>" in seen.dom


def test_the_probe_sees_console_messages_and_requests(tmp_path: Path) -> None:
    """A page that logs and fetches is caught, so that the test above can fail."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><script>console.error('seen')</script><img src='http://127.0.0.1:9/x.png'>"
    )
    seen = visit(str(BROWSER), page, tmp_path)
    assert any("seen" in line for line in seen.console)
    assert any("127.0.0.1" in url for url in seen.requests)


@pytest.mark.parametrize("width", [400, 781, 1400])
@pytest.mark.parametrize("name", REPORTS)
def test_nothing_is_wider_than_the_window(name: str, width: int, tmp_path: Path) -> None:
    """No sideways scrolling on a phone or on a desk."""
    needed, there = widths(str(BROWSER), written(name, tmp_path), tmp_path, width)
    assert needed <= there


def test_it_prints(tmp_path: Path) -> None:
    """A PDF of a few pages."""
    pdf = print_pages(str(BROWSER), written("good", tmp_path), tmp_path)
    assert pdf.startswith(b"%PDF")
    assert 2 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") + pdf.count(b"/Type /Page/") <= 12
