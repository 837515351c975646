"""Widen a language model in the middle of pre-training, optimizer state included.

The public functions are ``expand``, ``make_plan``, ``inspect``, ``verify``, ``layout_of`` and
``write_schedule`` (see :mod:`sparkling_cli.api`), ``plan_run`` (:mod:`sparkling_cli.forecast`) and the
spec (:mod:`sparkling_cli.spec.model`); the training side is :mod:`sparkling_cli.training`. They are
imported when they are first used.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as in ``typing``, which a command has no time for before it can be interrupted

__version__ = "0.1.0"

if TYPE_CHECKING:
    from typing import Any

    from sparkling_cli.api import (
        ExpansionResult,
        expand,
        inspect,
        layout_of,
        make_plan,
        verify,
        write_schedule,
    )
    from sparkling_cli.errors import SparklingError
    from sparkling_cli.forecast import plan_run
    from sparkling_cli.spec.model import ExpansionSpec

__all__ = [
    "ExpansionResult",
    "ExpansionSpec",
    "SparklingError",
    "__version__",
    "expand",
    "inspect",
    "layout_of",
    "make_plan",
    "plan_run",
    "verify",
    "write_schedule",
]

_HOMES = {
    "ExpansionSpec": "sparkling_cli.spec.model",
    "SparklingError": "sparkling_cli.errors",
    "plan_run": "sparkling_cli.forecast",
}
#: what the commands are called here where that is something else
_CALLED = {
    "plan": "make_plan (what expand would do) or plan_run (what a run costs)",
    "layout": "layout_of",
    "schedule": "write_schedule",
    "widen": "expand",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        meant = f"; did you mean {_CALLED[name]}?" if name in _CALLED else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{meant}")
    import importlib

    found = getattr(importlib.import_module(_HOMES.get(name, "sparkling_cli.api")), name)
    if name.islower():
        from sparkling_cli.api import in_python

        found = in_python(found)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
