"""Copies part from their sources under training from no state, or the tool has said that they would not.

Twenty real AdamW steps of the widened model, from files alone, for every axis, pair and kind of model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

from fixtures.tiny import CONFIGS
from sparkling_cli import api
from sparkling_cli.diagnostics.symmetry import measure_symmetry
from sparkling_cli.errors import SpecError
from sparkling_cli.layout.expr import COUNTED
from sparkling_cli.models.skeleton import build_model
from sparkling_cli.plan.symmetry import check_pair
from sparkling_cli.spec.choices import InitPair
from sparkling_cli.widening.geometry import Fill, Growth, Treatment

KINDS: Mapping[str, Mapping[str, Any]] = {
    "llama": CONFIGS["llama"],
    "llama, every head its own keys": {**CONFIGS["llama"], "num_key_value_heads": 4},
    "gpt2": CONFIGS["gpt2"],
    "qwen3_moe": CONFIGS["qwen3_moe"],
    "gemma2": CONFIGS["gemma2"],
    "phi3": CONFIGS["phi3"],
    "deepseek_v3": {
        **CONFIGS["llama"],
        "num_key_value_heads": 4,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 8,
        "v_head_dim": 14,
        "head_dim": 8,
    },
    "mamba2": {
        "vocab_size": 101,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_heads": 12,
        "head_dim": 8,
        "n_groups": 2,
        "state_size": 16,
        "expand": 2,
        "conv_kernel": 4,
        "chunk_size": 16,
        "tie_word_embeddings": False,
    },
}


#: The others take seconds, and are left to the long tests.
QUICK = {"llama", "gpt2", "qwen3_moe"}


@pytest.fixture(params=[pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in KINDS])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Weights of a small random model, without optimizer state."""
    kind = request.param.split(",")[0]
    torch.manual_seed(3)
    model: Any = build_model({**KINDS[request.param], "model_type": kind}, meta=False)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim < 2:
                tensor.add_(0.2 * torch.randn_like(tensor))
    folder = tmp_path / "small"
    model.save_pretrained(folder)
    return folder


def axes_of(folder: Path) -> Iterator[tuple[str, ...]]:
    """Every width that can grow, as the user asks for it, with those that must grow along."""
    layout = api.layout_of(folder)
    seen = set()
    for name, info in layout.axes.items():
        group = frozenset((name, *info.joint))
        if info.widenable and group not in seen and name not in COUNTED:
            seen.add(group)
            yield name, *info.joint


def trained(folder: Path, target: Path) -> dict[str, torch.Tensor]:
    """Twenty steps of a fresh AdamW; the weights are saved, and returned."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, eps=1e-6)
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        ids = torch.randint(0, 101, (2, 40), generator=generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    model.save_pretrained(target)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_copies_part_or_the_tool_says_that_they_will_not(small: Path, tmp_path: Path) -> None:
    """All axes and pairs; and nothing that was filled with zero stays there for ever."""
    wrong = []
    for axes in axes_of(small):
        for pair in get_args(InitPair):
            name = f"{axes[0]}-{pair}"
            asked = [{"axis": axis, "factor": 2} for axis in axes]
            try:
                result = api.expand(
                    small, tmp_path / name, axes=asked, init=pair, allow_locked=True, report="none", threads=1
                )
            except SpecError as error:
                assert pair.split("-")[0] in error.message, name
                assert "--init random-copy" in str(error.hint), name
                continue
            warned = any("stay equal for ever" in text for text in result.expansion.plan.warnings)
            weights = trained(tmp_path / name, tmp_path / f"{name}-trained")
            found = measure_symmetry(tmp_path / f"{name}-trained", tmp_path / name)
            for row in found.layers:
                if warned != (row.distance < 1e-3):
                    wrong.append(f"{name}: layer {row.layer} {row.axis} {row.distance:.1e}, warned: {warned}")
            wrong += [f"{name}: {key} is zero" for key, value in weights.items() if dead(value)]
    assert not wrong, "\n".join(wrong)


def dead(value: torch.Tensor) -> bool:
    """A tenth of the entries are exactly zero, which random weights never are."""
    return bool((value == 0).double().mean() > 0.1)


def test_more_query_heads_per_group_cannot_start_at_zero(tmp_path: Path) -> None:
    """Q is never zeroed and v does not grow: the refusal names what works, and that does work."""
    torch.manual_seed(3)
    model: Any = build_model({**CONFIGS["llama"], "model_type": "llama"}, meta=False)
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(SpecError, match="'zero' for producers is not possible") as caught:
        api.expand(
            tmp_path / "small", tmp_path / "wide", axes=[{"axis": "heads", "factor": 2}], init="zero-copy"
        )
    assert "widen kv_heads" in str(caught.value.hint)
    result = api.expand(
        tmp_path / "small", tmp_path / "wide", axes=[{"axis": "kv_heads", "factor": 2}], init="zero-copy"
    )
    assert not any(growth.copied for growth in result.expansion.plan.growth.values())


def test_a_fused_part_keeps_its_rule_whichever_factor_grows(tmp_path: Path) -> None:
    """(heads (k + v)): under zero fill new heads' keys are copies, their values zero."""
    torch.manual_seed(3)
    model: Any = build_model({**KINDS["deepseek_v3"], "model_type": "deepseek_v3"}, meta=False)
    model.save_pretrained(tmp_path / "small")
    api.expand(
        tmp_path / "small",
        tmp_path / "wide",
        axes=[{"axis": "heads", "factor": 2}],
        init="zero-copy",
        report="none",
    )
    before = dict(model.named_parameters())
    after = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "wide").named_parameters())
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    old, new = before[name].reshape(4, 24, 16), after[name].reshape(8, 24, 16)
    assert torch.equal(new[4:, :10], old[:, :10])
    assert not new[4:, 10:].any()
    name = "model.layers.0.self_attn.q_b_proj.weight"
    assert torch.equal(after[name], before[name].repeat(2, 1))


def test_parts_that_are_not_told_apart_are_not_zeroed(tmp_path: Path) -> None:
    """Where the layout does not say which half is the gate, zero would make both of them dead for ever."""
    model: Any = build_model({**CONFIGS["qwen3_moe"], "model_type": "qwen3_moe"}, meta=False)
    model.save_pretrained(tmp_path / "small")
    layout = api.layout_of(tmp_path / "small")
    growth = {"ffn": Growth(layout.sizes["ffn"], 2 * layout.sizes["ffn"])}
    zero = Treatment(Fill.ZERO)
    check_pair(growth, layout, zero)
    patterns = [replace(t, layout=t.layout.replace("(gate_up ffn)", "(2 ffn)")) for t in layout.tensors]
    unnamed = replace(layout, tensors=tuple(patterns))
    assert unnamed.tensors != layout.tensors
    with pytest.raises(SpecError, match=r"experts.gate_up_proj holds 2 parts, .* not say which is the gate"):
        check_pair(growth, unnamed, zero)
    check_pair(growth, unnamed, Treatment(Fill.RANDOM))
