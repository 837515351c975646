"""Every axis, pair and factor, on classes of every kind, against an expander written from formulas alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fixtures.tiny import CONFIGS
from sparkling_cli import api
from sparkling_cli.errors import SpecError
from sparkling_cli.models.skeleton import build_model
from sparkling_cli.spec.choices import InitPair
from tests.plan.expander import Widening, expanded
from tests.plan.test_parting import KINDS

#: kind -> config: sizes that 1.5x and 2.5x keep whole, hidden a multiple of the heads in Llama and Gemma 2
SMALL: dict[str, dict[str, Any]] = {
    "llama": {**CONFIGS["llama"], "hidden_size": 120, "intermediate_size": 48},
    "gemma2": {**CONFIGS["gemma2"], "hidden_size": 120, "intermediate_size": 48, "head_dim": 14}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3_moe": {**CONFIGS["qwen3_moe"], "num_experts": 6, "intermediate_size": 24},
    "deepseek_v3": {**KINDS["deepseek_v3"], "hidden_size": 40},
    "gpt_neox": {
        **CONFIGS["gpt_neox"],
        "hidden_size": 40,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    },
    "mamba2": {**KINDS["mamba2"], "hidden_size": 64, "num_heads": 16},
    "bamba": {
        **CONFIGS["llama"],
        "hidden_size": 64,
        "head_dim": 14,
        "intermediate_size": 48,
        "attn_layer_indices": [1],
        "mamba_n_heads": 16,
        "mamba_d_head": 8,
        "mamba_n_groups": 2,
        "mamba_d_state": 16,
        "mamba_expand": 2,
    },
    "gpt2": {**CONFIGS["gpt2"], "n_embd": 40, "n_inner": 48},
}
#: kind -> axes to ask for together, as ``{asked: {axis: size before}}``
GQA: dict[str, dict[str, int]] = {
    "hidden": {"hidden": 40},
    "kv_heads": {"kv_heads": 2},
    "heads": {"q_per_kv": 2},
}
AXES: dict[str, dict[str, dict[str, int]]] = {
    "llama": {**GQA, "hidden": {"hidden": 120}, "ffn": {"ffn": 48}},
    "gemma2": {**GQA, "hidden": {"hidden": 120}, "ffn": {"ffn": 48}},
    "qwen3_moe": {
        **GQA,
        "expert_ffn": {"expert_ffn": 24},
        "hidden expert_ffn": {"hidden": 40, "expert_ffn": 24},
    },
    "deepseek_v3": {
        "hidden": {"hidden": 40},
        "heads": {"heads": 4},
        "expert_ffn": {"expert_ffn": 24},
        "ffn": {"ffn": 40},
    },
    "gpt_neox": {"ffn": {"ffn": 48}, "heads hidden": {"heads": 4, "hidden": 40}},
    "mamba2": {"mamba_expand": {"mamba_expand": 2}, "hidden mamba_heads": {"hidden": 64, "mamba_heads": 4}},
    "bamba": {
        "ffn": {"ffn": 48},
        "heads": {"q_per_kv": 2},
        "kv_heads": {"kv_heads": 2},
        "mamba_expand": {"mamba_expand": 2},
        "hidden mamba_heads": {"hidden": 64, "mamba_heads": 4},
    },
    "gpt2": {"ffn": {"ffn": 48}, "heads hidden": {"heads": 4, "hidden": 40}},
}
SIZES: dict[str, dict[str, int]] = {
    kind: {axis: size for sizes in axes.values() for axis, size in sizes.items()}
    for kind, axes in AXES.items()
}


def cases() -> Iterator[tuple[str, str, str]]:
    """Kind, axes and pair."""
    for kind, axes in AXES.items():
        for asked in axes:
            for pair in get_args(InitPair):
                yield kind, asked, pair


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kind -> a small model on disk, all of its parameters random, each tensor with its own mean."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(2)
            model: Any = build_model({**SMALL[kind], "model_type": kind}, meta=False)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(0.2 * torch.randn_like(parameter) + 0.3 * torch.rand(()))
            made[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.mark.parametrize(("kind", "asked", "pair"), cases())
def test_weights_are_those_of_the_formulas(
    kind: str, asked: str, pair: InitPair, small: Any, tmp_path: Path
) -> None:
    """No entry differs by more than 1e-6; random ones are all different."""
    source = small(kind)
    old = load_file(source / "model.safetensors")
    fan_out, fan_in = pair.split("-")
    for factor in (1.5, 2, 2.5, 3):
        before = {**SIZES[kind], **AXES[kind][asked]}
        after = {axis: round(size * factor) for axis, size in AXES[kind][asked].items()}
        axes = [{"axis": axis, "factor": factor} for axis in asked.split()]
        target = tmp_path / str(factor)
        if asked == "heads" and kind != "deepseek_v3" and fan_out == "zero":
            with pytest.raises(SpecError, match="not possible"):
                api.expand(source, target, axes=axes, init=pair, report="none", threads=1)
            continue
        api.expand(source, target, axes=axes, init=pair, report="none", threads=1, allow_locked=True)
        new = load_file(target / "model.safetensors")
        assert new.keys() == old.keys()
        for name, (wanted, random) in expanded(kind, old, Widening(before, after, fan_out, fan_in)).items():
            found = new[name].double().numpy()
            assert found.shape == wanted.shape, name
            assert np.abs(found - wanted)[~random].max(initial=0) <= 1e-6, (name, factor)
            assert len(np.unique(found[random])) >= 0.99 * random.sum(), (name, factor)
