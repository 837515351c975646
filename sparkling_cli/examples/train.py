"""A small training run: ``python -m sparkling_cli.examples.train``.

An ordinary script for transformers' ``Trainer``: a model of some 150,000 parameters, the text that comes
with the package, a cosine over 200 steps that is left at its half, as if the machine had been taken away.
Resumed from what ``sparkling expand`` wrote, it trains the wider model to the end.
"""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from sparkling_cli.training import SparklingCallback

STEPS = 200


class StopAt(TrainerCallback):  # type: ignore[misc]
    """Saves and stops after one step; the schedule stays that of the whole run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Called by the Trainer after every step."""
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def new_model(*, moe: bool = False) -> Any:
    """A Llama, or a Qwen3-MoE with eight experts, two for each token; the same weights every time."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 384,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if not moe:
        return LlamaForCausalLM(LlamaConfig(intermediate_size=176, **sizes))
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**experts, **sizes))


def make_trainer(model: Any, out: str | Path, *, stop_at: int = STEPS // 2) -> Any:
    """The run's ``Trainer``: ``train()`` starts it, ``train(resume_from_checkpoint=...)`` goes on.

    Args:
        model: a new one, or ``AutoModelForCausalLM.from_pretrained`` of a checkpoint of this run.
        out: folder for ``checkpoint-N``.
        stop_at: save and stop after this step.
    """
    tokenizer = ByT5Tokenizer()  # bytes as tokens
    text = resources.files("sparkling_cli.diagnostics").joinpath("sample.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    rows = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=STEPS,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        per_device_train_batch_size=8,
        adam_beta2=0.95,
        weight_decay=0.1,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[StopAt(stop_at)],
    )


def main() -> None:
    """Train from the beginning, or go on."""
    parser = argparse.ArgumentParser("python -m sparkling_cli.examples.train", description=main.__doc__)
    parser.add_argument("--out", default="example", help="folder for checkpoints (%(default)s)")
    parser.add_argument("--resume", metavar="CKPT", help="go on from this checkpoint, widened or not")
    parser.add_argument("--stop-at", type=int, metavar="STEP", help="save and stop here (100; resumed, 200)")
    parser.add_argument("--moe", action="store_true", help="a mixture of experts in place of a dense model")
    given = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(given.resume) if given.resume else new_model(moe=given.moe)
    stop_at = given.stop_at or (STEPS if given.resume else STEPS // 2)
    trainer = make_trainer(model, given.out, stop_at=stop_at)
    if given.resume and Path(given.resume, "sparkling").is_dir():
        trainer.add_callback(SparklingCallback(given.resume))  # new entries get their own learning rate
    trainer.train(resume_from_checkpoint=given.resume)
    print(f"written  {Path(given.out, f'checkpoint-{stop_at}')}")


if __name__ == "__main__":
    main()
