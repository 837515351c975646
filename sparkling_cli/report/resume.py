"""What the user's trainer has to say to go on from an output, by the format of the checkpoint."""

from __future__ import annotations

import json

from sparkling_cli.plan.advice import TRAINER

MODULE = "sparkling_cli.training"


def call(form: str, where: str, module: str = "") -> str:
    """The call that applies the re-warmup.

    Args:
        form: the checkpoint's format.
        where: the output.
        module: stands before the name, with its dot.
    """
    name = json.dumps(where)
    if form == TRAINER:
        return f"Trainer(..., callbacks=[{module}SparklingCallback({name})])"
    return f"{module}rewarm(optimizer, model, {name})"


def snippet(form: str, where: str) -> str:
    """Two lines of Python: the import and the call."""
    name = "SparklingCallback" if form == TRAINER else "rewarm"
    return f"from {MODULE} import {name}\n{call(form, where)}"
