"""``python -m sparkling_cli`` and the ``sparkling`` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    from sparkling_cli.cli.app import app
    from sparkling_cli.cli.console import run

    sys.exit(run(app))


if __name__ == "__main__":
    main()
