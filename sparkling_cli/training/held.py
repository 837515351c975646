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
        #: counters that were loaded for the run that begins next; transformers sets it by its name
        self.resumed: dict[str, Any] = {}
        #: counters at the end of the last run: what is saved after it, and nothing for the next one
        self._ended: dict[str, Any] = {}

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
        loaded, self.resumed = self.resumed, {}
        self._take(loaded)

    def end(self) -> None:
        """Take the hooks off."""
        if self.rewarming is not None:
            self._ended = self.rewarming.state_dict()
            self.rewarming.remove()
            self.rewarming = None

    def figures(self) -> dict[str, float]:
        """For the framework's logger, as :meth:`Rewarming.figures`."""
        return {} if self.rewarming is None else self.rewarming.figures()

    def state_dict(self) -> dict[str, Any]:
        """The step counters, for the framework's checkpoint."""
        return (self.resumed or self._ended) if self.rewarming is None else self.rewarming.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, now or when the run begins."""
        if self.rewarming is None:
            self.resumed = dict(state)
        else:
            self._take(state)

    def _take(self, state: Mapping[str, Any]) -> None:
        """Counters over those that stand; not of a run before the expansion, which had an earlier one."""
        if (
            self.rewarming is not None
            and state
            and min(state["steps"]) >= self.history.rewarmup.expansion_step
        ):
            self.rewarming.load_state_dict(state)
