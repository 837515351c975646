"""A re-warmup that begins with a framework's run, and whose counters lie in the framework's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sparkling_cli.training.attach import Rewarming, rewarm
from sparkling_cli.training.history import History, read_history


class Held:
    """What the callbacks of all frameworks do; each says when, under its framework's names.

    Args:
        checkpoint: what ``sparkling expand`` wrote.
        measure_every: as in :func:`rewarm`.
    """

    def __init__(self, checkpoint: str | Path | History, *, measure_every: int | None = None) -> None:
        super().__init__()
        self.history = checkpoint if isinstance(checkpoint, History) else read_history(checkpoint)
        self.measure_every = measure_every
        self.rewarming: Rewarming | None = None
        self.resumed: dict[str, Any] = {}

    def begin(self, optimizers: Any, model: nn.Module, step: int) -> None:
        """Attach to the optimizers, after ``step`` steps or as many as the loaded counters say.

        Raises:
            SpecError: no checkpoint of the expanded run was loaded, ``step`` lies before the expansion.
        """
        if self.rewarming is not None:
            self.rewarming.remove()
        self.rewarming = rewarm(
            list(optimizers), model, self.history, step=step, measure_every=self.measure_every
        )
        if self.resumed and min(self.resumed["steps"]) >= self.history.rewarmup.expansion_step:
            self.rewarming.load_state_dict(self.resumed)

    def end(self) -> None:
        """Take the hooks off."""
        if self.rewarming is not None:
            self.resumed = self.rewarming.state_dict()
            self.rewarming.remove()
            self.rewarming = None

    def figures(self) -> dict[str, float]:
        """For the framework's logger, as :meth:`Rewarming.figures`."""
        return {} if self.rewarming is None else self.rewarming.figures()

    def state_dict(self) -> dict[str, Any]:
        """The step counters, for the framework's checkpoint."""
        return self.resumed if self.rewarming is None else self.rewarming.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, now or when the run begins."""
        self.resumed = dict(state)
        if self.rewarming is not None and self.resumed:
            self.rewarming.load_state_dict(self.resumed)
