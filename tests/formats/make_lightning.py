"""Real Lightning checkpoints: a ``LightningModule`` around a GPT, trained by Lightning's own ``Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from tests.formats.make_nanogpt import GPT, GPTConfig, batch, loss_of, scatter


class Module(lightning.LightningModule):
    """Sizes are hyper-parameters, as Lightning users keep them."""

    def __init__(self, n_embd: int = 24, n_head: int = 3, n_layer: int = 2, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.sizes = GPTConfig(n_embd=n_embd, n_head=n_head, n_layer=n_layer)
        torch.manual_seed(5)
        self.model = GPT(self.sizes)
        scatter(self.model)
        self.losses: list[float] = []

    def training_step(self, ids: torch.Tensor) -> torch.Tensor:
        """One batch."""
        loss = loss_of(self.model, ids)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        """One group, in the order of the parameters, and a schedule."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.hparams["lr"])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def loader(sizes: GPTConfig, count: int = 12) -> DataLoader[torch.Tensor]:
    """The same batches in every run."""
    return DataLoader([batch(sizes, step) for step in range(count)], batch_size=None)


def run(
    module: Module, steps: int, folder: Path, resume: Path | None = None, save: Path | None = None
) -> lightning.Trainer:
    """Train up to so many steps, from a checkpoint if there is one."""
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    trainer.fit(module, loader(module.sizes), ckpt_path=None if resume is None else str(resume))
    if save is not None:
        trainer.save_checkpoint(save)
    return trainer
