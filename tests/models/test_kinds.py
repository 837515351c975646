"""Growing layers of classes that make kinds of layers of their numbers, held to the class's own logits."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inference_support import batch, logits, shake, small_config, surveyed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sparkling_cli import api
from sparkling_cli.errors import LayoutError, SparklingError, VerificationError
from sparkling_cli.models import kinds
from sparkling_cli.models.packaged_proof import file_of
from sparkling_cli.models.skeleton import build_model, causal_lm_names

TWICE = {"layers": 2}
SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "head_dim": 8,
    "sliding_window": 3,
    "pad_token_id": 0,
}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
#: Lists that older versions of transformers do not write.
LISTS = (
    "layer_types",
    "layer_rope_theta",
    "no_rope_layers",
    "moe_layers",
    "mlp_layer_types",
    "attention_layers",
)
#: Model type -> what makes its layers of different kinds, by their numbers.
PATTERNS: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    "olmo3": {},
    "cohere2": {"sliding_window_pattern": 2},
    "smollm3": {"no_rope_layer_interval": 2},
    "exaone4": {"sliding_window_pattern": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "no_rope_layer_interval": 2,
                    "attention_chunk_size": 3, "intermediate_size_mlp": 28, "interleave_moe_layer_step": 1},
    "afmoe": {**MOE, "hidden_size": 32, "num_dense_layers": 1, "global_attn_every_n_layers": 2, "n_group": 1,
              "topk_group": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 2},
}  # fmt: skip
#: Of these the default tests take a few.
DRAWN = {"gemma2", "llama4_text", "smollm3"}


def saved(config: dict[str, Any], folder: Path) -> Any:
    """A random model of a config, written without the lists that its class derives."""
    model: Any = shake(build_model(config, meta=False))
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    bare = {key: value for key, value in written.items() if key not in LISTS}
    bare |= {key: value for key, value in config.items() if "pattern" in key or "interval" in key}
    (folder / "config.json").write_text(json.dumps(bare))
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    if any(info.values()):
        pytest.skip("without its lists the class makes other layers")
    return again.eval()


def deepened(model: Any, folder: Path, **options: Any) -> Any:
    """The deeper model, proved by files and loaded by its class."""
    api.expand(folder / "small", folder / "deep", axes=TWICE, report="none", threads=1, **options)
    api.verify(folder / "small", folder / "deep")
    return type(model).from_pretrained(folder / "deep").eval()


@pytest.mark.parametrize(
    "model_type", [pytest.param(t, marks=() if t in DRAWN else pytest.mark.survey) for t in PATTERNS]
)
def test_a_config_without_the_list_of_kinds(model_type: str, tmp_path: Path) -> None:
    """Old layers stay what they were, among new ones: every logit is equal to the last bit."""
    small = saved({"model_type": model_type, **SMALL, **PATTERNS[model_type]}, tmp_path / "small")
    ids = batch(small)
    deep = deepened(small, tmp_path)
    assert torch.equal(logits(deep, ids), logits(small, ids))
    assert deep.config.num_hidden_layers == 8


def test_copies_are_of_the_kind_of_their_sources(tmp_path: Path) -> None:
    """Stacked layers of a class that sets the first ones apart by a number."""
    config = {"model_type": "qwen3", **SMALL, **PATTERNS["qwen3"]}
    small = saved(config, tmp_path / "small")
    deep = deepened(small, tmp_path, layer_mode="stack")
    windows = [layer.self_attn.sliding_window for layer in deep.model.layers]
    assert windows == [None, None, 3, 3, None, None, 3, 3]


def test_right_outputs_get_no_list(tmp_path: Path) -> None:
    """Where the class derives what the sources are, the config says no more than before."""
    small = saved({"model_type": "gemma2", **SMALL, **PATTERNS["gemma2"]}, tmp_path / "small")
    deepened(small, tmp_path, at="end")
    assert "layer_types" not in json.loads((tmp_path / "deep" / "config.json").read_text())


def test_verify_asks_the_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output without the list, which its own config does not contradict."""
    small = saved({"model_type": "gemma2", **SMALL, **PATTERNS["gemma2"]}, tmp_path / "small")
    monkeypatch.setattr(kinds, "written_kinds", lambda *_: {})
    with pytest.raises(VerificationError, match="layer_types"):
        deepened(small, tmp_path)


def test_a_list_that_the_class_does_not_take_is_refused() -> None:
    """Named, with what can be done."""
    config = {"model_type": "jamba", "num_hidden_layers": 16}
    layout: Any = SimpleNamespace(config={"num_hidden_layers": "layers"})
    even = tuple(target // 2 for target in range(32))
    with pytest.raises(LayoutError, match="own class makes kinds of layers by their numbers") as caught:
        kinds.written_kinds(config, layout, even)
    assert "--at end" in str(caught.value.hint)
    assert kinds.written_kinds(config, layout, (*range(16), *range(16))) == {}


@pytest.mark.parametrize("model_type", sorted(kinds.PLAIN | kinds.SWITCHED.keys()))
def test_classes_that_are_not_asked(model_type: str) -> None:
    """Their configs have no list of layers that are not all alike."""
    assert file_of(model_type)
    assert not kinds.derives_kinds({"model_type": model_type})
    built = CONFIG_MAPPING[model_type](num_hidden_layers=14)
    for name in dir(built):
        value = None if name.startswith("_") else getattr(built, name, None)
        assert not (isinstance(value, list) and len(value) == 14 and len(set(map(str, value))) > 1), name


def test_attention_divided_by_the_number_of_the_layer(tmp_path: Path) -> None:
    """GPT-2 has a switch for it: old layers keep their numbers, or it is refused."""
    config = {"model_type": "gpt2", "n_embd": 24, "n_layer": 3, "n_head": 4, "vocab_size": 61,
              "scale_attn_by_inverse_layer_idx": True}  # fmt: skip
    small = saved(config, tmp_path / "small")
    ids = batch(small)
    with pytest.raises(SparklingError, match="depends on its number"):
        deepened(small, tmp_path)
    assert torch.equal(logits(deepened(small, tmp_path, at="end"), ids), logits(small, ids))


@pytest.mark.survey
@pytest.mark.parametrize("model_type", surveyed(set()))
def test_every_class(model_type: str, tmp_path: Path) -> None:
    """With four layers and no lists: the same logits bit by bit, or refused."""
    config = small_config(model_type)
    if "num_hidden_layers" not in config:
        pytest.skip("its layers are counted elsewhere")
    bare = {key: value for key, value in config.items() if key not in LISTS}
    for key in [key for key, value in bare.items() if isinstance(value, int) and "pattern" in key]:
        bare[key] = 2
    assert model_type in causal_lm_names()
    try:
        small = saved({**bare, "num_hidden_layers": 4}, tmp_path / "small")
        ids = batch(small)
        before = logits(small, ids)
    except Exception as error:  # the class's own code may raise anything
        pytest.skip(f"no model of four layers without lists: {error}"[:200])
    try:
        deep = deepened(small, tmp_path)
    except VerificationError:
        raise
    except SparklingError as error:
        pytest.skip(f"refused: {error}"[:200])
    assert torch.equal(logits(deep, ids), before)
