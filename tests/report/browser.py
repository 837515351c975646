"""A real browser, headless: console messages, network requests and sizes of a page."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from html import escape
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-default-apps", "--enable-logging=stderr", "--virtual-time-budget=3000",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


def find_browser() -> str | None:
    """The first Chromium on the path."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass(frozen=True)
class Visit:
    """What happened while a page was open."""

    dom: str
    console: list[str]
    requests: list[str]


def visit(browser: str, page: Path, work: Path, *, width: int = 1400) -> Visit:
    """Open a page, wait, and report what it did."""
    log = work / "net.json"
    found = subprocess.run(
        [browser, *FLAGS, f"--user-data-dir={work / 'profile'}", f"--log-net-log={log}",
         f"--window-size={width},1000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = [line for line in found.stderr.splitlines() if "CONSOLE" in line]
    return Visit(found.stdout, console, _requests(log))


def _requests(log: Path) -> list[str]:
    """Every http(s) or ws(s) address that the page asked for, answered or not.

    What the browser asks on its own account has no origin as its initiator.
    """
    text = log.read_text(encoding="utf-8")
    try:
        data = json.loads(text)
    except ValueError:  # cut off at exit: close the list of events
        data = json.loads(text.rstrip().rstrip(",") + "]}")
    urls = []
    for event in data["events"]:
        parameters = event.get("params", {})
        url = str(parameters.get("url", ""))
        asked = parameters.get("initiator", "not an origin") != "not an origin"
        if url.startswith(("http:", "https:", "ws:", "wss:")) and asked:
            urls.append(url)
    return urls


def widths(browser: str, page: Path, work: Path, width: int) -> tuple[int, int]:
    """(width that the content needs, width that it has) in a frame of so many pixels."""
    probe = (
        "<script>onload = () => { const d = document.querySelector('iframe').contentDocument;"
        "document.title = 'needs ' + d.documentElement.scrollWidth + ' ' + d.body.children.length; }</script>"
    )
    frame = work / "frame.html"
    content = escape(page.read_text(encoding="utf-8"), quote=True)
    frame.write_text(
        f"<!doctype html><iframe width={width} height=2000 style='border:0' "
        f'srcdoc="{content}"></iframe>{probe}',
        encoding="utf-8",
    )
    dom = visit(browser, frame, work).dom
    words = dom[dom.index("needs ") :].split("<")[0].split()
    assert int(words[2]) > 0, "the page is empty"
    return int(words[1]), width


def print_pages(browser: str, page: Path, work: Path) -> bytes:
    """The page as PDF."""
    target = work / "page.pdf"
    subprocess.run(
        [browser, *FLAGS, f"--user-data-dir={work / 'profile'}", f"--print-to-pdf={target}", page.as_uri()],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    return target.read_bytes()
