"""The bundled checkpoints are what they say, and the tiny ones are what a Trainer writes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fixtures import tiny, training

FIXTURES = Path(training.__file__).parent
BUNDLED = {"dense": "dense_checkpoint", "moe": "moe_checkpoint"}
CONVERTED = ("qwen3_moe", "olmoe", "mixtral")


def load(path: Path) -> PreTrainedModel:
    """Load a model and insist that every tensor was found and fitted."""
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object."""
    value: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return value


@pytest.fixture(params=["dense", "moe"])
def which(request: pytest.FixtureRequest) -> str:
    """Name of a bundled run."""
    return str(request.param)


@pytest.fixture
def checkpoint(which: str, request: pytest.FixtureRequest) -> Path:
    """Directory of a bundled run's checkpoint."""
    path: Path = request.getfixturevalue(BUNDLED[which])
    return path


def test_fixtures_are_small() -> None:
    """All that is kept in the repository stays within 12 MB."""
    files = [f for f in FIXTURES.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) <= 12_000_000


def test_checkpoint_is_complete(checkpoint: Path) -> None:
    """Every file that the Trainer writes is there, tokenizer included."""
    assert {f.name for f in checkpoint.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
        "training_args.bin",
    }


def test_no_file_tells_where_it_was_made() -> None:
    """No absolute path of the machine that made the fixtures is in any of them."""
    telltale = re.compile(rb"/tmp/|/work/|/home/|/root/|/Users/|" + re.escape(str(FIXTURES.parent).encode()))
    for file in FIXTURES.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert not telltale.search(file.read_bytes()), file


def test_stopped_at_half_of_the_schedule(checkpoint: Path, which: str) -> None:
    """Step counters of trainer, scheduler and optimizer agree, and are half of the whole."""
    state = read_json(checkpoint / "trainer_state.json")
    step = state["global_step"]
    assert checkpoint.name == f"checkpoint-{step}"
    assert state["max_steps"] == 2 * step == training.recipes()[which].max_steps
    assert not state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
    scheduler = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    assert scheduler["last_epoch"] == step
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert {float(entry["step"]) for entry in optimizer["state"].values()} == {float(step)}


def test_learning_rates_are_a_cosine_with_warmup(checkpoint: Path, which: str) -> None:
    """The logged learning rates are Eq. 25-26 of arXiv 2602.02472 for the recipe's numbers."""
    recipe = training.recipes()[which]
    floor = recipe.learning_rate * recipe.scheduler_kwargs.get("min_lr_rate", 0.0)
    for entry in read_json(checkpoint / "trainer_state.json")["log_history"]:
        t = entry["step"] - 1  # the rate that the step was taken with
        if t < recipe.warmup_steps:
            expected = recipe.learning_rate * t / recipe.warmup_steps
        else:
            progress = (t - recipe.warmup_steps) / (recipe.max_steps - recipe.warmup_steps)
            expected = floor + (recipe.learning_rate - floor) * (1 + math.cos(math.pi * progress)) / 2
        assert entry["learning_rate"] == pytest.approx(expected, rel=1e-9)


def test_every_parameter_has_moments_of_its_shape(checkpoint: Path, which: str, tmp_path: Path) -> None:
    """The optimizer's integer ids follow the Trainer's own grouping, and every shape fits."""
    trainer = training.build_trainer(which, tmp_path, model=load(checkpoint))
    groups = trainer.create_optimizer().param_groups
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    parameters = [p for group in groups for p in group["params"]]
    assert sorted(state) == list(range(len(parameters)))
    for index, parameter in enumerate(parameters):
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[index][key].shape == parameter.shape
            assert state[index][key].abs().sum() > 0


def test_the_model_has_learned_what_the_readme_says(checkpoint: Path) -> None:
    """The held-out loss, measured again, is the README's figure, well below where it started."""
    name = f"{checkpoint.parent.name}/{checkpoint.name}"
    readme = (FIXTURES / "README.md").read_text("utf-8")
    cells = next(line for line in readme.splitlines() if line.startswith(f"| `{name}`")).split("|")
    start, end = float(cells[6]), float(cells[7])
    model = load(checkpoint)
    assert model.num_parameters() == int(cells[2].replace(",", ""))
    assert training.heldout_loss(model) == pytest.approx(end, abs=2e-3)
    assert end < 0.6 * start
    assert start == pytest.approx(math.log(training.VOCAB_SIZE), abs=0.1)


def test_the_run_starts_as_it_was_logged(checkpoint: Path, which: str, tmp_path: Path) -> None:
    """Started again from nothing, the script's run takes the same first steps."""
    trainer = training.build_trainer(which, tmp_path, stop_at=3, save_strategy="no")
    trainer.train()
    logged = read_json(checkpoint / "trainer_state.json")["log_history"]
    for step, loss in training.losses(trainer).items():
        assert loss == pytest.approx(logged[step - 1]["loss"], abs=1e-3)


def test_resuming_goes_on_where_the_run_stopped(checkpoint: Path, which: str, tmp_path: Path) -> None:
    """The unmodified Trainer resumes: old log kept, step and rate continued, loss in its range."""
    logged = read_json(checkpoint / "trainer_state.json")
    step = logged["global_step"]
    trainer = training.build_trainer(which, tmp_path, model=load(checkpoint), stop_at=step + 2)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    history = trainer.state.log_history
    assert history[:step] == logged["log_history"]
    assert [entry["step"] for entry in history[step : step + 2]] == [step + 1, step + 2]
    scheduler = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    assert history[step]["learning_rate"] == pytest.approx(scheduler["_last_lr"][0], rel=1e-12)
    recent = [entry["loss"] for entry in logged["log_history"][-100:]]
    assert min(recent) <= history[step]["loss"] <= max(recent)


def test_tokenizer_is_found_and_loses_nothing(checkpoint: Path, heldout_text: Path) -> None:
    """AutoTokenizer loads the checkpoint's tokenizer; any text survives it, and it is the script's."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = heldout_text.read_text("utf-8")[:5000] + " ünïcode\t🐋"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < training.VOCAB_SIZE
    assert tokenizer.get_vocab() == training.build_tokenizer().get_vocab()


def test_heldout_text_was_not_trained_on(heldout_text: Path) -> None:
    """No longer paragraph of the held-out text occurs in the training text."""
    seen = training.TRAIN_TEXT.read_text("utf-8")
    paragraphs = [p for p in heldout_text.read_text("utf-8").split("\n\n") if len(p) > 80]
    assert len(paragraphs) > 100
    assert not [p for p in paragraphs if p in seen]


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_tiny_checkpoint_loads_with_its_moments(arch: str, tiny_checkpoint: Any, tmp_path: Path) -> None:
    """Every tiny checkpoint reloads whole and has moments, none of them idle, for every parameter."""
    path = tiny_checkpoint(arch)
    state = read_json(path / "trainer_state.json")
    assert (state["global_step"], state["max_steps"]) == (3, 6)
    model = load(path)
    assert 20_000 <= model.num_parameters() <= 60_000
    groups = tiny.build_trainer(model, tmp_path).create_optimizer().param_groups
    moments = torch.load(path / "optimizer.pt", weights_only=True)["state"]
    parameters = [p for group in groups for p in group["params"]]
    assert sorted(moments) == list(range(len(parameters)))
    for index, parameter in enumerate(parameters):
        assert moments[index]["step"] == 3
        assert moments[index]["exp_avg"].shape == parameter.shape
        assert moments[index]["exp_avg_sq"].abs().sum() > 0


@pytest.mark.parametrize(
    ("arch", "optimizer"),
    [
        *((arch, "adamw_torch_fused") for arch in ("llama", "gpt2", "gpt_neox", *CONVERTED)),
        ("llama", "sgd"),
        ("mixtral", "lion"),
    ],
)
def test_tiny_run_resumes_as_if_never_stopped(
    arch: str, optimizer: str, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    """Six steps at once and three plus three, resumed from disk, have the same losses."""
    whole = tiny.build_trainer(tiny.make_model(arch), tmp_path / "whole", optimizer=optimizer)
    whole.train()
    path = tiny_checkpoint(arch, optimizer=optimizer)
    resumed = tiny.build_trainer(load(path), tmp_path / "resumed", optimizer=optimizer)
    resumed.train(resume_from_checkpoint=str(path))
    assert training.losses(resumed) == pytest.approx(training.losses(whole), abs=1e-5)
    assert len(training.losses(whole)) == 6


@pytest.mark.parametrize("optimizer", tiny.OPTIMIZERS)
def test_tiny_checkpoint_with_every_optimizer(optimizer: str, tiny_checkpoint: Any) -> None:
    """Every optimizer on offer writes state under its own names; plain SGD writes none."""
    keys: dict[str, set[str]] = {
        "sgd": {"momentum_buffer"},
        "muon": {"momentum_buffer"},
        "lion": {"exp_avg"},
        "amsgrad": {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
        "adafactor": {"step", "RMS", "exp_avg_sq_row", "exp_avg_sq_col"},
        "adafactor_torch": {"step", "row_var", "col_var"},
    }
    state = torch.load(tiny_checkpoint("llama", optimizer=optimizer) / "optimizer.pt", weights_only=True)[
        "state"
    ]
    if optimizer == "sgd_plain":
        assert state == {}
    else:
        assert set(state[0]) == keys.get(optimizer, {"step", "exp_avg", "exp_avg_sq"})


def test_tiny_checkpoint_in_shards_and_bfloat16(tiny_checkpoint: Any) -> None:
    """Weights come in several files with an index, in the dtype asked for, and load whole."""
    path = tiny_checkpoint("qwen3_moe", shard_size="20KB", dtype="bfloat16")
    files = set(read_json(path / "model.safetensors.index.json")["weight_map"].values())
    assert len(files) > 2
    assert all((path / file).is_file() for file in files)
    model = load(path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


def test_tiny_checkpoint_takes_config_overrides(tiny_checkpoint: Any) -> None:
    """An override reaches the saved config and the tensors."""
    model = load(tiny_checkpoint("llama", intermediate_size=31, attention_bias=True))
    assert model.model.layers[0].mlp.up_proj.out_features == 31
    assert model.model.layers[0].self_attn.q_proj.bias is not None
