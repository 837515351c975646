"""Run as a process of its own: the Trainer of transformers with the callback, alone or under ZeRO.

Usage: trainer_run.py OUT STAGE; writes ``trainer-STAGE-<run>.pt`` with the parameters. Stage 0 is without
DeepSpeed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.training import loops
from tests.training import reference as ref


def train(folder: Path, last: int, resume: Path | None, stage: int, *callbacks: Any) -> tuple[Path, Any]:
    """To step ``last`` at a constant rate; the checkpoint, and the model."""
    from transformers import Trainer, TrainingArguments

    class Model(ref.Tiny):
        """The reference's model, as the Trainer calls one."""

        def forward(self, ids: torch.Tensor) -> Any:
            """The batch is that of the step, whatever it is given."""
            return {"loss": super().forward(ref.data(trainer.state.global_step))}

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    kind: dict[str, Any] = {"deepspeed": config} if stage else {"use_cpu": True}
    arguments = TrainingArguments(
        str(folder), max_steps=last, per_device_train_batch_size=1, save_steps=last, logging_steps=1,
        report_to="none", disable_tqdm=True, max_grad_norm=0.0, remove_unused_columns=False, seed=0,
        learning_rate=ref.BASE.peak, lr_scheduler_type="constant", weight_decay=0.1, optim="adamw_torch",
        dataloader_pin_memory=False, ignore_data_skip=True, **kind,
    )  # fmt: skip
    torch.manual_seed(0)
    net = Model()
    trainer = Trainer(net, arguments, train_dataset=[{"ids": 0}] * 200, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    wrapped = "DeepSpeedOptimizerWrapper" if stage else "AcceleratedOptimizer"
    assert type(trainer.optimizer).__name__ == wrapped
    if callbacks:
        entry = next(e for e in trainer.state.log_history if e["step"] == last and "learning_rate" in e)
        ratio = loops.rate(last - 1) / ref.BASE(last - 1)
        assert abs(entry["learning_rate_new"] / (ref.BASE.peak * ratio) - 1) < 1e-9
    return folder / f"checkpoint-{last}", net


def main(out: Path, stage: int) -> None:
    """Whole, left and resumed, and without the callback; all from the same checkpoint of step TE."""
    from sparkling_cli.training import SparklingCallback

    folder = out / f"stage-{stage}"
    loops.write_history(folder)
    source, _ = train(folder, ref.TE, None, stage)
    for run, stops in {"whole": (80,), "legs": (50, 80), "plain": (80,)}.items():
        path = source
        for stop in stops:
            callbacks = () if run == "plain" else (SparklingCallback(folder),)
            path, net = train(folder, stop, path, stage, *callbacks)
        torch.save(ref.parameters(net), out / f"trainer-{stage}-{run}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)
