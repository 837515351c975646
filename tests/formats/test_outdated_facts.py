"""What a Trainer's directory says of the model at its old size does not come along into the output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sparkling_cli import api
from sparkling_cli.errors import CheckpointError
from tests.conftest import TinyCheckpoint

FFN = [{"axis": "ffn", "factor": 2}]


class Until(TrainerCallback):
    """Ends a run early, as if the machine had been taken away."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer after every step."""
        control.should_training_stop = state.global_step >= self.step


def trainer_of(model: Any, out: Path, until: int) -> Trainer:
    """Learns some rows by heart, at a high rate, and is evaluated on others: it gets worse and worse."""

    def rows(seed: int, count: int) -> list[dict[str, torch.Tensor]]:
        tokens = torch.randint(0, 64, (count, 16), generator=torch.Generator().manual_seed(seed))
        return [{"input_ids": row, "labels": row} for row in tokens]

    arguments = TrainingArguments(
        output_dir=str(out), max_steps=8, learning_rate=5e-2, per_device_train_batch_size=4, logging_steps=1,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=False, report_to=[], use_cpu=True,
        disable_tqdm=True, seed=1,
    )  # fmt: skip
    model_and_rows = {"model": model, "train_dataset": rows(0, 8), "eval_dataset": rows(99, 8)}
    return Trainer(args=arguments, callbacks=[Until(until)], **model_and_rows)


@pytest.fixture(scope="module")
def best_is_narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoint of step 4, whose best one is that of step 2."""
    out = tmp_path_factory.mktemp("best") / "run"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    trainer_of(LlamaForCausalLM(config), out, until=4).train()
    source = out / "checkpoint-4"
    assert json.loads((source / "trainer_state.json").read_text())["best_model_checkpoint"].endswith("-2")
    return source


def test_the_best_model_is_chosen_anew(best_is_narrow: Path, tmp_path: Path) -> None:
    """Resumed to its end with ``load_best_model_at_end``, the wide model stays wide."""
    target = tmp_path / "wide" / "checkpoint-4"
    result = api.expand(best_is_narrow, target, axes=FFN, report="none")
    before = json.loads((best_is_narrow / "trainer_state.json").read_text())
    after = json.loads((target / "trainer_state.json").read_text())
    names = ("best_model_checkpoint", "best_metric", "best_global_step")
    assert all(before[name] is not None and after[name] is None for name in names)
    assert {**before, **dict.fromkeys(names)} == after
    (note,) = [note for note in result.expansion.plan.notes if "best_metric" in note]
    assert "best_model_checkpoint checkpoint-2" in note and "load_best_model_at_end" in note
    assert str(best_is_narrow.parent) not in note  # nothing of the machine goes into the report
    api.verify(best_is_narrow, target)

    trainer = trainer_of(AutoModelForCausalLM.from_pretrained(target), tmp_path / "out", until=8)
    trainer.train(resume_from_checkpoint=str(target))
    assert trainer.model.model.layers[0].mlp.up_proj.weight.shape == (64, 16)
    assert trainer.state.best_global_step in (6, 8)
    assert str(tmp_path / "out") in trainer.state.best_model_checkpoint


def test_a_state_without_a_best_one_is_carried(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """Byte for byte, as there is nothing to clear."""
    source = tiny_checkpoint("llama")
    result = api.expand(source, tmp_path / "wide", axes=FFN, report="none")
    before, after = ((root / "trainer_state.json").read_bytes() for root in (source, tmp_path / "wide"))
    assert before == after
    assert not [note for note in result.expansion.plan.notes if "trainer_state" in note]


def test_adapters_beside_the_weights(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """One that transformers would load with the model is refused; one in its own folder is left out."""
    source = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("llama"), source)
    (source / "helper").mkdir()
    (source / "helper" / "adapter_config.json").write_text("{}")
    (source / "helper" / "adapter_model.safetensors").write_bytes(b"narrow")
    result = api.expand(source, tmp_path / "wide", axes=FFN, report="none")
    assert not (tmp_path / "wide" / "helper").exists()
    assert [note for note in result.expansion.plan.notes if note.startswith("helper/ is left out")]
    api.verify(source, tmp_path / "wide")
    (source / "helper" / "adapter_config.json").rename(source / "adapter_config.json")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json(.|\n)*merge_and_unload"):
        api.make_plan(source, spec=api.ExpansionSpec(axes=FFN))
