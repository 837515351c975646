"""The re-warmup inside OLMo-core's ``Trainer``."""

from __future__ import annotations

from olmo_core.train.callbacks import Callback

from sparkling_cli.training.held import Held


class SparklingCallback(Held, Callback):  # type: ignore[misc]
    """``trainer.add_callback("sparkling", SparklingCallback(path))``, with ``load_path`` the same."""

    def pre_train(self) -> None:
        """The checkpoint has been loaded."""
        module = self.trainer.train_module
        self.begin([module.optim], module.model, self.trainer.global_step)

    def post_train_batch(self) -> None:
        """Log under OLMo-core's names."""
        for name, value in self.figures().items():
            self.trainer.record_metric(f"optim/{name}", value)

    def post_train(self) -> None:
        """Take the hooks off."""
        self.end()
