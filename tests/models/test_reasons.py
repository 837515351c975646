"""Reasons of refusals, and factors on what is stored under other names: small configs of their classes."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from sparkling_cli import api
from sparkling_cli.errors import LayoutError, SpecError
from sparkling_cli.layout.model import Compensation
from sparkling_cli.layout.parse import parse_layout
from sparkling_cli.models.disk import DiskTensor
from sparkling_cli.models.infer import infer
from sparkling_cli.models.parity import LogitParity
from sparkling_cli.models.patterns import patterns_of
from sparkling_cli.models.prove import prove_axes
from sparkling_cli.models.real_layout import _compensations
from sparkling_cli.models.shrink import shrink
from sparkling_cli.models.skeleton import build_model
from tests.models.inference_support import shake

GEMMA = {
    "model_type": "gemma4_text", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16,
    "vocab_size": 211, "vocab_size_per_layer_input": 211, "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip


@pytest.mark.slow
def test_tables_of_the_same_tokens_grow_together() -> None:
    """Gemma 4 looks tokens up in two tables: a config key each, one axis."""
    layout = infer(GEMMA)
    assert layout.axes["vocab"].widenable
    assert layout.config["vocab_size"] == layout.config["vocab_size_per_layer_input"] == "vocab"
    tables = [p.name for p in layout.tensors if "vocab" in p.dims.axes()]
    assert any("per_layer" in name for name in tables)


def test_tables_of_different_sizes_are_two_axes() -> None:
    """A token beyond the second table would have no entry there."""
    layout = infer({**GEMMA, "model_type": "gemma3n_text", "vocab_size": 230})
    assert not layout.axes["vocab"].widenable


@pytest.mark.slow
def test_a_table_of_whole_numbers_refuses_its_axes() -> None:
    """DeepSeek-V4's first layers look experts up by token: what new tokens have there no weight says."""
    findings = prove_axes(shrink({"model_type": "deepseek_v4"}))
    for axis in ("vocab", "experts", "experts_per_token"):
        verdict = findings.verdicts[axis]
        assert not verdict.proved and "tid2eid is a table of whole numbers" in verdict.reason
    ratio = findings.verdicts["heavily_compressed_attention"]  # more than the tokens of the proof
    assert not ratio.proved and "logits of plain text do not depend on it" in ratio.reason


def test_what_a_wide_model_holds_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two hypotheses only what differs; the logits are as if all were written."""
    config = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 97}
    tiny = shrink(config)
    findings = prove_axes(tiny)
    parity = LogitParity(findings.found)
    layouts = {n: lay for f, lay in zip(findings.families, findings.layouts, strict=True) for n in f.names}
    factors = {"ffn": 2}
    assert parity.error(layouts, factors) <= parity.tolerance
    wrong = {n: parse_layout("(2 ffn) <- hidden") if "up_proj" in n else lay for n, lay in layouts.items()}
    wrong |= {n: parse_layout("ffn -> hidden") for n in layouts if "down_proj" in n}
    assert parity.error(wrong, factors) > parity.tolerance
    assert parity.error(layouts, factors) <= parity.tolerance
    written: list[str] = []
    monkeypatch.setattr(
        "sparkling_cli.models.parity.widened", lambda state, *rest: written.extend(state) or dict(state)
    )
    assert parity.error(layouts, factors) <= parity.tolerance
    assert not written


def test_an_infinite_error_has_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the axis or hypothesis before: Inkling 2's vocabulary was refused for its heads' sizes."""
    findings = prove_axes(shrink({"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 97}))
    parity = LogitParity(findings.found)
    layouts = {n: lay for f, lay in zip(findings.families, findings.layouts, strict=True) for n in f.names}
    wrong = {n: parse_layout("(2 ffn) <- hidden") if "up_proj" in n else lay for n, lay in layouts.items()}
    assert math.isinf(parity.error(wrong, {"ffn": 2}))
    assert "cannot reshape" in parity.raised
    monkeypatch.setitem(
        parity.state, "model.norm.weight", torch.full((findings.found.sizes["hidden"],), math.nan)
    )
    assert math.isinf(parity.error(layouts, {"ffn": 3}))
    assert parity.raised == "its logits are not finite"
    monkeypatch.setattr(parity, "logits", parity.logits[..., :90])
    assert math.isinf(parity.error(layouts, {"ffn": 2}))
    assert (
        "its logits have shape" in parity.raised
        and "97), and not" in parity.raised
        and "90)" in parity.raised
    )


def test_a_factor_on_what_has_another_name_in_every_layer() -> None:
    """On all parts of the tensor, in all layers; on the last layer's norm, on its alone."""
    shapes = {f"layers.{i}.{part}": 2 for i in range(3) for part in ("q.weight", "norm.weight")}
    names = {key: [n for n in shapes if n.endswith(key)] for key in ("q.weight", "norm.weight")}
    text = parse_layout("hidden <- hidden")

    def disk(source: str, *stored: str) -> list[DiskTensor]:
        return [DiskTensor(name, source, text, {}, at) for at, name in enumerate(stored)]

    findings: Any = SimpleNamespace(
        compensations=(
            *(Compensation("hidden", f"layers.{i}.q.weight", power=0.5) for i in range(3)),
            Compensation("hidden", "layers.2.norm.weight", fan_in=True),
        ),
        families=[SimpleNamespace(names=tuple(own)) for own in names.values()],
        disk=[
            *(t for i in range(3) for t in disk(f"layers.{i}.q.weight", f"h.{i}.qa", f"h.{i}.qb")),
            *(t for i in range(3) for t in disk(f"layers.{i}.norm.weight", f"h.{i}.ln")),
        ],
    )
    patterns = patterns_of({f"layers.{i}.{key}": text for key in names for i in range(8)})
    own = {"q.weight": ("qa", "qb"), "norm.weight": ("ln",)}
    assembly = {
        f"layers.{{layers}}.{key}": tuple(f"h.{{layers}}.{part}" for part in parts)
        for key, parts in own.items()
    }
    found = _compensations(cast(Any, findings), patterns, assembly)
    assert {(c.tensor, c.power, c.fan_in) for c in found} == {
        ("layers.{layers}.q.weight", 0.5, False), ("h.{layers}.qa", 0.5, False),
        ("h.{layers}.qb", 0.5, False), ("layers.7.norm.weight", 0.0, True), ("h.7.ln", 0.0, True),
    }  # fmt: skip


PHI = {
    "model_type": "phi3", "hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "partial_rotary_factor": 0.75, "vocab_size": 101,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
    "max_position_embeddings": 256, "original_max_position_embeddings": 64,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0, 2, 3, 4, 5, 6]},
}  # fmt: skip


def test_lists_by_the_width_of_a_head_couple_hidden_to_heads(tmp_path: Path) -> None:
    """Phi-4-mini's class holds its rotary factors against hidden over heads: the two grow together."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = shake(AutoModelForCausalLM.from_config(AutoConfig.for_model(**PHI)))
    model.save_pretrained(tmp_path / "narrow")
    with pytest.raises(SpecError, match="couples hidden to kv_heads") as caught:
        api.expand(tmp_path / "narrow", tmp_path / "wide", axes={"hidden": 2}, allow_locked=True)
    assert "--axis hidden --axis kv_heads --factor 2" in str(caught.value.hint)
    both = {"hidden": 2, "kv_heads": 2}
    api.expand(tmp_path / "narrow", tmp_path / "wide", axes=both, allow_locked=True, report="none")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    ids = torch.arange(100)[None]  # beyond the length from which on the long factors hold
    torch.testing.assert_close(wide(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_norms_of_each_head_are_named() -> None:
    """StableLM's have a module for each head: a wider model has tensors that no old one is."""
    sizes = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2}
    layout = infer({"model_type": "stablelm", "qk_layernorm": True, "vocab_size": 101, **sizes})
    assert layout.axes["ffn"].widenable
    for axis in ("hidden", "kv_heads", "q_per_kv"):
        assert not layout.axes[axis].widenable
        assert "layernorm.norms" in layout.axes[axis].reason


def test_widths_inside_a_tower_are_tiny() -> None:
    """Llama 4's adapter is 4096 wide by a key of its own: text does not reach it, so it need not be."""
    own = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": {}, "vision_config": {}}
    model = build_model(shrink({"model_type": "llama4", **own}))
    assert max(max(p.shape) for n, p in model.named_parameters() if "vision_adapter" in n) < 1024


@pytest.mark.parametrize(
    ("axis", "config", "said"),
    [
        (
            "heads",
            {"model_type": "bloom", "hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 61},
            "ALiBi",
        ),
        (
            "hidden",
            {
                "model_type": "xglm", "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4,
                "vocab_size": 61, "max_position_embeddings": 64,
            },
            "a table of sines",
        ),
    ],
)  # fmt: skip
def test_positions_that_no_weight_says_are_named(axis: str, config: dict[str, Any], said: str) -> None:
    """What grows with the width or the heads in the class's own code is the likely reason, and is said."""
    info = infer(config).axes[axis]
    assert not info.widenable and said in info.reason


def test_a_width_that_the_class_works_out_widens_once_it_is_written(tmp_path: Path) -> None:
    """LFM2's key is made two thirds and rounded; the hint, followed to the letter, gives the same model."""
    config = {
        "model_type": "lfm2", "architectures": ["Lfm2ForCausalLM"], "hidden_size": 64, "vocab_size": 61,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "block_ff_dim": 100,
        "block_multiple_of": 8, "layer_types": ["conv", "full_attention"],
    }  # fmt: skip
    info = infer(config).axes["ffn"]
    assert not info.widenable
    assert "block_auto_adjust_ff_dim = false" in info.reason and "no block_ff_dim" in info.reason
    width = build_model(config).model.layers[0].feed_forward.w1.weight.shape[0]
    written = {**config, "block_auto_adjust_ff_dim": False, "intermediate_size": width}
    del written["block_ff_dim"]
    assert build_model(written).model.layers[0].feed_forward.w1.weight.shape[0] == width
    layout = infer(written)
    assert layout.axes["ffn"].widenable and layout.config["intermediate_size"] == "ffn"


def test_an_encoder_decoder_that_needs_two_inputs_is_refused_as_such() -> None:
    """T5's decoder has no input of its own making; BART shifts what the encoder reads, and is proved."""
    t5 = {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": 101,
        "d_model": 36,
    }
    with pytest.raises(
        LayoutError, match=r"T5ForConditionalGeneration is an encoder-decoder.*decoder_input_ids"
    ):
        shrink({**t5, "d_kv": 10, "d_ff": 59, "num_layers": 2, "num_heads": 3})
    bart = {"model_type": "bart", "architectures": ["BartForConditionalGeneration"], "d_model": 36}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 3}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "vocab_size": 101}
    assert shrink({**bart, **heads, **layers})


def test_a_refusal_does_not_say_that_it_keeps_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hypothesis that keeps them at 2x and not at 3x: the error is that at 3x."""
    error = LogitParity.error

    def at_three(self: LogitParity, layouts: Any, factors: Any, compensations: Any = ()) -> float:
        return 0.25 if 3 in factors.values() else error(self, layouts, factors, compensations)

    monkeypatch.setattr(LogitParity, "error", at_three)
    verdict = prove_axes(shrink({"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 97})).verdicts
    assert not verdict["ffn"].proved and "best relative error 2.5e-01" in verdict["ffn"].reason
