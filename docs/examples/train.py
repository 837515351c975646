"""Train a small language model on the bundled text, or go on from a checkpoint."""

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

parser = argparse.ArgumentParser()
parser.add_argument("--resume", help="checkpoint to go on from")
parser.add_argument("--stop-at", type=int, default=200, help="stop and save at this step")
parser.add_argument("--out", default="runs/tutorial", help="directory for checkpoints")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained("fixtures/dense-llama/checkpoint-600")
text = Path("fixtures/text/train.txt").read_text()
tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
rows = tokens[: len(tokens) // 64 * 64].view(-1, 64)
data = [{"input_ids": row, "labels": row} for row in rows]

if options.resume:
    model = AutoModelForCausalLM.from_pretrained(options.resume)
else:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        )
    )


class StopAt(TrainerCallback):
    """Stop and save at one step, as if the machine had been taken away."""

    def on_step_end(self, args, state, control, **kwargs):
        """Called by the Trainer after every step."""
        if state.global_step == options.stop_at:
            control.should_save = control.should_training_stop = True


callbacks = [StopAt()]
if options.resume and Path(options.resume, "sparkling").is_dir():
    from sparkling_cli.training import SparklingCallback

    callbacks.append(SparklingCallback(options.resume))

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=options.out,
        max_steps=200,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        per_device_train_batch_size=8,
        adam_beta2=0.95,
        weight_decay=0.1,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=data,
    data_collator=default_data_collator,
    callbacks=callbacks,
    processing_class=tokenizer,
)
trainer.train(resume_from_checkpoint=options.resume)
