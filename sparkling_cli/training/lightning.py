"""The re-warmup inside Lightning's ``Trainer``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sparkling_cli.training.held import Held


class SparklingCallback(Held, Callback):  # type: ignore[misc]
    """``Trainer(..., callbacks=[SparklingCallback("wide.ckpt")])``, then ``fit(ckpt_path="wide.ckpt")``."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizers have their state now. Lightning counts the steps of all of them together."""
        self.begin(trainer.optimizers, pl_module, trainer.global_step // len(trainer.optimizers))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log as ``LightningModule.log`` does."""
        pl_module.log_dict(self.figures())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off."""
        self.end()
