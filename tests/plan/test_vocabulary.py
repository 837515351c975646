"""Growing the vocabulary, held to the model's own forward pass, to torch's means and to the real Trainer."""

from __future__ import annotations

import json
import random
from math import log1p
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fixtures import training
from sparkling_cli import api
from sparkling_cli.errors import SparklingError, SpecError, VerificationError
from sparkling_cli.models.skeleton import build_model, causal_lm_names
from tests.models.inference_support import logits, shake, small_layout, surveyed

SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "intermediate_size": 40},
    "tied": {"model_type": "qwen3", **SMALL, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40,
             "tie_word_embeddings": True},
    "a bias in the head": {"model_type": "phi", **SMALL, "hidden_size": 32, "intermediate_size": 40},
    "its own names": {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 4, "vocab_size": 61},
}  # fmt: skip


def saved(config: dict[str, Any], folder: Path) -> Path:
    """A random model as the library writes it."""
    shake(build_model(config, meta=False)).save_pretrained(folder)
    return folder


def said(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the library's own class."""
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)


@pytest.mark.parametrize("case", CONFIGS)
def test_old_tokens_keep_their_logits_and_new_rows_are_means(case: str, tmp_path: Path) -> None:
    """Bit-equal logits of old tokens; new logits are the mean of the old ones, as the head is linear."""
    source = saved(CONFIGS[case], tmp_path / "small")
    api.expand(source, tmp_path / "wide", axes=[{"axis": "vocab"}], multiple_of=64, report="none")
    api.verify(source, tmp_path / "wide")
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(3))
    before, after = said(source, ids), said(tmp_path / "wide", ids)
    assert after.shape[-1] == json.loads((tmp_path / "wide/config.json").read_text())["vocab_size"] == 64
    assert torch.equal(after[..., :61], before)
    mean = before.mean(-1, keepdim=True).expand(*before.shape[:-1], 3)
    assert torch.allclose(after[..., 61:], mean, atol=1e-5 * float(before.abs().max()))
    rise = after.logsumexp(-1) - before.logsumexp(-1)
    assert float(rise.min()) > 0
    assert float(rise.max()) <= log1p(3 / 61) + 1e-6


def test_named_old_tokens_and_joint_width(tmp_path: Path) -> None:
    """``vocab_from`` by options, a token that it does not name, and hidden twice as wide at once."""
    source = saved(CONFIGS["llama"], tmp_path / "small")
    pieces = {"61": [3, 4], "63": [7]}
    axes = [{"axis": "vocab", "to": 64}, {"axis": "hidden", "to": 48}]
    found = api.expand(
        source, tmp_path / "wide", axes=axes, vocab_from=pieces, report="none", allow_locked=True
    )
    api.verify(source, tmp_path / "wide")
    old, new = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "wide"))
    for name, factor in (("model.embed_tokens.weight", 1.0), ("lm_head.weight", 0.5)):
        rows = old[name].double()
        wanted = torch.stack([rows[[3, 4]].mean(0), rows.mean(0), rows[7]]).repeat(1, 2) * factor
        assert torch.allclose(new[name][61:].double(), wanted, rtol=1e-6, atol=1e-12), name
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(3))
    before, after = said(source, ids), said(tmp_path / "wide", ids)
    assert torch.allclose(after[..., :61], before, atol=1e-5 * float(before.abs().max()))
    bound = next(note for note in found.expansion.plan.notes if "at most" in note)
    most = 1 / 61 + 1  # token 7 is all of one new token's mean, and a part of another's
    assert f"{log1p(most):.4g}" in bound
    rise = after.logsumexp(-1) - before.logsumexp(-1)
    assert float(rise.max()) <= log1p(most)
    swapped = said(tmp_path / "wide", torch.full((1, 3), 63)), said(source, torch.full((1, 3), 7))
    assert torch.allclose(swapped[0][..., :61], swapped[1], atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("fill", ["random", "zero"])
def test_other_fills(fill: str, tmp_path: Path) -> None:
    """Zero rows, or rows of the old ones' mean and deviation; no bound is claimed."""
    source = saved(CONFIGS["llama"], tmp_path / "small")
    axes = [{"axis": "vocab", "to": 4000}]
    found = api.expand(source, tmp_path / "wide", axes=axes, vocab_fill=fill, report="none")
    api.verify(source, tmp_path / "wide")
    assert not any("at most" in note for note in found.expansion.plan.notes)
    old, new = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "wide"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = new[name][61:].double()
        assert torch.equal(new[name][:61], old[name])
        spread = float(old[name].double().std(correction=0)) if fill == "random" else 0.0
        assert float(rows.std(correction=0)) == pytest.approx(spread, rel=0.02)


@pytest.fixture(scope="module")
def widened(dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled run with 88 more tokens."""
    target = tmp_path_factory.mktemp("vocab") / "checkpoint-600"
    api.expand(dense_checkpoint, target, axes=[{"axis": "vocab", "to": 600}], report="none")
    return target


def test_state_of_new_rows_is_zero_and_old_rows_keep_theirs(dense_checkpoint: Path, widened: Path) -> None:
    """In ``optimizer.pt`` as the Trainer reads it; nothing else grows."""
    old = torch.load(dense_checkpoint / "optimizer.pt", weights_only=True)["state"]
    new = torch.load(widened / "optimizer.pt", weights_only=True)["state"]
    assert old.keys() == new.keys()
    grown = 0
    for number, slots in old.items():
        for slot, before in slots.items():
            after = new[number][slot]
            if before.shape[:1] == (512,) and after.shape[:1] == (600,):
                grown += 1
                assert not after[512:].any()
                after = after[:512]
            assert torch.equal(after, before)
    assert grown == 4  # two moments, of embedding and head


def test_the_trainer_goes_on_with_new_tokens(widened: Path, tmp_path: Path) -> None:
    """The real Trainer resumes with the source's optimizer; what a new token meets, its rows learn."""
    model = AutoModelForCausalLM.from_pretrained(widened)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = training.build_trainer("dense", tmp_path, model=model, stop_at=602)
    trainer.train_dataset = _with_new_token(trainer.train_dataset)
    trainer.train(resume_from_checkpoint=str(widened))
    assert trainer.state.global_step == 602
    state = trainer.optimizer.state  # type: ignore[union-attr]
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    assert float(state[head]["step"]) == 602
    assert state[embedding]["exp_avg"][600 - 1].abs().sum() > 0
    assert moved["model.embed_tokens.weight"][599].abs().sum() > 0
    assert torch.isfinite(torch.stack([p.abs().max() for p in moved.values()])).all()


def _with_new_token(data: Any) -> Any:
    """The same examples, the last new token at a place of each."""
    first = data[0]
    key = "input_ids" if isinstance(first, dict) else 0

    class Changed(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int) -> Any:
            found = {k: torch.as_tensor(v).clone() for k, v in data[index].items()}
            for value in found.values():
                if value.dtype == torch.long:
                    value[3] = 599
            return found

    assert key == "input_ids"
    return Changed()


def test_the_same_bytes_again_and_a_changed_mean_is_found(
    dense_checkpoint: Path, widened: Path, tmp_path: Path
) -> None:
    """Determinism over thread counts and memory; ``verify`` works every mean out for itself."""
    axes = [{"axis": "vocab", "to": 600}]
    again = tmp_path / widened.parent.name / "checkpoint-600"
    api.expand(dense_checkpoint, again, axes=axes, report="none", threads=3, memory=64 << 20)
    for path in sorted(p.relative_to(widened) for p in widened.rglob("*") if p.is_file()):
        if path.suffix not in (".html", ".md"):
            assert (again / path).read_bytes() == (widened / path).read_bytes(), path
    tensors = load_file(again / "model.safetensors")
    tensors["lm_head.weight"][599, 5] += 1e-6
    save_file(tensors, again / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"lm_head|model\.safetensors"):
        api.verify(dense_checkpoint, again)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an old id": ({"axes": [{"axis": "vocab", "to": 64}], "vocab_from": {60: [1]}}, "60 is no new token"),
    "no old id": ({"axes": [{"axis": "vocab", "to": 64}], "vocab_from": {61: [61]}}, "61 is no old token"),
    "nothing grows": ({"axes": [{"axis": "ffn", "factor": 2}], "vocab_from": {61: [1]}}, "does not grow"),
    "a multiple already": ({"axes": [{"axis": "vocab"}], "multiple_of": 61}, "are a multiple of 61 already"),
    "neither": ({"axes": [{"axis": "vocab"}]}, "neither given"),
    "both fills": (
        {"axes": [{"axis": "vocab", "to": 64}], "vocab_from": {61: [1]}, "vocab_fill": "zero"},
        "does not go with",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused(case: str, tmp_path: Path) -> None:
    """Each in words that name the value."""
    options, words = WRONG[case]
    with pytest.raises(SpecError, match=words):
        api.expand(saved(CONFIGS["llama"], tmp_path / "small"), tmp_path / "wide", report="none", **options)


#: Of all classes, which the survey goes over, the default tests take a few.
DRAWN = set(random.Random(21).sample(sorted(causal_lm_names()), 5)) | {"gemma3n_text"}


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(t, marks=() if t in DRAWN else pytest.mark.survey) for t in surveyed(DRAWN)],
)
def test_every_class_keeps_the_logits_of_old_tokens(model_type: str, tmp_path: Path) -> None:
    """Weights as the library writes them, grown, reloaded by the library: bit for bit; or refused."""
    config, layout = small_layout(model_type)
    if "vocab" not in layout.axes or not layout.axes["vocab"].widenable:
        assert "vocab" not in layout.axes or len(layout.axes["vocab"].reason) > 20
        assert model_type in REFUSED, layout.axes.get("vocab")
        return
    model = shake(build_model(config, meta=False))
    model.save_pretrained(tmp_path / "small")
    size = layout.axes["vocab"].size
    try:
        api.expand(
            tmp_path / "small", tmp_path / "wide", axes=[{"axis": "vocab", "to": size + 31}], report="none"
        )
    except SparklingError as error:
        assert model_type in REFUSED, f"{model_type}: {error}"
        return
    wide, info = type(model).from_pretrained(tmp_path / "wide", output_loading_info=True)
    small = type(model).from_pretrained(tmp_path / "small")
    assert not info["missing_keys"] and not info["mismatched_keys"]
    ids = torch.randint(5, min(size, 50), (2, 9), generator=torch.Generator().manual_seed(3))
    before, after = logits(small, ids), logits(wide, ids)
    assert after.shape[-1] == size + 31
    assert torch.equal(after[..., :size], before)


#: Classes whose vocabulary cannot grow, which say why (DeepSeek-V4: a table of integers, one row per token).
REFUSED = {"cpmant", "deepseek_v4", "gemma3n_text", "gemma4", "gemma4_text"}
