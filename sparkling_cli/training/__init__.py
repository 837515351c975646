"""Per-entry learning rates inside the user's own training loop.

Two lines, after the optimizer (and its state) is there::

    from sparkling_cli.training import rewarm
    rewarming = rewarm(optimizer, model, "checkpoint-1000-ffn2x")

or, for transformers' ``Trainer``, ``callbacks=[SparklingCallback("checkpoint-1000-ffn2x")]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparkling_cli.training.attach import Rewarming, rewarm
from sparkling_cli.training.history import History, carry_history, read_history
from sparkling_cli.training.slices import Piece

if TYPE_CHECKING:
    from sparkling_cli.training.callback import SparklingCallback

__all__ = [
    "History",
    "Piece",
    "Rewarming",
    "SparklingCallback",
    "carry_history",
    "read_history",
    "rewarm",
]


def __getattr__(name: str) -> Any:
    # transformers is imported only by those who use its Trainer
    if name == "SparklingCallback":
        from sparkling_cli.training.callback import SparklingCallback

        return SparklingCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
