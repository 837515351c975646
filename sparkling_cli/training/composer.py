"""The re-warmup inside composer's ``Trainer``."""

from __future__ import annotations

from composer.core import Callback, State
from composer.loggers import Logger

from sparkling_cli.training.held import Held


class SparklingCallback(Held, Callback):  # type: ignore[misc]
    """``Trainer(..., load_path="wide.pt", callbacks=[SparklingCallback("wide.pt")])``."""

    def fit_start(self, state: State, logger: Logger) -> None:
        """The checkpoint has been loaded."""
        self.begin(state.optimizers, state.model, int(state.timestamp.batch))

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log where composer's ``LRMonitor`` does."""
        logger.log_metrics(self.figures())

    def fit_end(self, state: State, logger: Logger) -> None:
        """Take the hooks off."""
        self.end()
