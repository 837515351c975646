"""Parameter counts against hand counts and against real modules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparkling_cli import api
from sparkling_cli.compute.flops import plan_compute, run_flops, share_saved, step_saving, train_flops
from sparkling_cli.compute.quantity import parse_count
from sparkling_cli.compute.shape import ModelShape, experts_per_token, shape_of
from sparkling_cli.errors import LayoutError, SpecError
from sparkling_cli.forecast import plan_run
from sparkling_cli.layout.model import AxisInfo, ModelLayout, TensorPattern
from sparkling_cli.models.infer import infer
from sparkling_cli.models.skeleton import build_model
from sparkling_cli.report.plan import parameter_counts
from sparkling_cli.results.numbers import count
from sparkling_cli.widening.geometry import Growth
from tests.compute.paper import PAPER_LAYOUT


def layout_of(axes: dict[str, int], tensors: dict[str, str], **more: object) -> ModelLayout:
    """A small layout."""
    return ModelLayout(
        "test",
        {name: AxisInfo(size) for name, size in axes.items()},
        tuple(TensorPattern(*item) for item in tensors.items()),
        **more,  # type: ignore[arg-type]
    )


def test_counts_equal_those_of_the_transformers_model() -> None:
    """The paper's layout at small sizes has as many parameters as the Qwen3-MoE model of that config."""
    transformers = pytest.importorskip("transformers")
    import torch

    config = transformers.Qwen3MoeConfig(
        hidden_size=48, moe_intermediate_size=20, intermediate_size=20, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=2, head_dim=10, num_experts=6, num_experts_per_tok=2,
        vocab_size=101, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    sizes = {"layers": 3, "hidden": 48, "ffn": 20, "q_per_kv": 4, "kv_heads": 2, "head_dim": 10,
             "experts": 6, "vocab": 101}  # fmt: skip
    layout = replace(PAPER_LAYOUT, axes={name: AxisInfo(size) for name, size in sizes.items()})
    count = shape_of(layout, config.to_dict()).count()
    assert count.total == sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert count.active == count.total - experts + experts * 2 // 6
    assert count.embedding == 101 * 48


_SIZES = {"hidden_size": 48, "vocab_size": 101, "num_attention_heads": 4, "num_key_value_heads": 2}
_LATENT = {
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
#: Classes with experts in some layers, with buffers among the weights, with biases of experts, with other
#: names for the numbers.
EXPERTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**_SIZES, **_LATENT, "num_key_value_heads": 4, "intermediate_size": 40, "n_group": 2}
    | {"num_hidden_layers": 5, "first_k_dense_replace": 2, "moe_intermediate_size": 24, "topk_group": 1}
    | {"n_routed_experts": 8, "num_experts_per_tok": 2},
    "glm4_moe": {**_SIZES, "intermediate_size": 40, "num_hidden_layers": 5, "first_k_dense_replace": 2}
    | {"head_dim": 12, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2}
    | {"n_group": 1, "topk_group": 1},
    "gpt_oss": {**_SIZES, "intermediate_size": 24, "num_hidden_layers": 2, "num_local_experts": 4}
    | {"head_dim": 12, "num_experts_per_tok": 2},
    "qwen3_moe": {**_SIZES, "intermediate_size": 40, "num_hidden_layers": 5, "mlp_only_layers": [1, 3]}
    | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_SIZES, "intermediate_size": 40, "num_hidden_layers": 4, "decoder_sparse_step": 2}
    | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    | {"shared_expert_intermediate_size": 32},
    "dbrx": {"d_model": 48, "n_heads": 4, "n_layers": 2, "vocab_size": 101, "max_seq_len": 64}
    | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}}
    | {"ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2}},
}  # fmt: skip


@pytest.mark.parametrize("model_type", EXPERTS)
def test_what_works_on_one_token_is_what_the_class_has(model_type: str) -> None:
    """Every tensor in the layers that it occurs in; buffers aside; of experts those that are chosen."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = {"model_type": model_type, **EXPERTS[model_type]}
    model = build_model(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    every = {"deepseek_v3": 8, "glm4_moe": 8, "dbrx": 6}.get(model_type, 4)
    found = shape_of(infer(config), config).count()
    assert experts > 0
    assert found.total == sum(sizes.values())
    assert found.active == found.total - experts + experts * 2 // every


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_beside_the_embedding_counts_if_it_is_another(equal: bool, tmp_path: Path) -> None:
    """The config says tied: what transformers has after loading is the truth, before and after widening."""
    config = LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    weights = load_file(tmp_path / "small" / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.clone() if equal else embedding + 1
    save_file(weights, tmp_path / "small" / "model.safetensors", {"format": "pt"})
    api.expand(
        tmp_path / "small", tmp_path / "wide", axis="hidden", factor=2, report="none", allow_locked=True
    )

    def true(name: str) -> int:
        return int(LlamaForCausalLM.from_pretrained(tmp_path / name).num_parameters())

    planned = plan_run(tmp_path / "small", "1B", axis="hidden", factor=2, expand_at="50%")
    assert [phase.parameters for phase in planned.phases] == [true("small"), true("wide")]
    counts = parameter_counts(
        api.make_plan(tmp_path / "small", axis="hidden", factor=2, allow_locked=True).plan
    )
    assert [count.total for count in counts[:2]] == [true("small"), true("wide")]


def test_stacked_and_named_experts_count_the_same() -> None:
    """An expert axis counts alike in names and stacked in front of a tensor."""
    axes = {"experts": 6, "ffn": 5, "hidden": 7}
    named = layout_of(axes, {"e.{experts}.up": "ffn <- hidden"})
    stacked = layout_of(axes, {"e.up": "experts | ffn <- hidden"})
    counts = [shape_of(layout, top_k=2).count() for layout in (named, stacked)]
    assert counts[0] == counts[1]
    assert (counts[0].total, counts[0].active) == (6 * 35, 2 * 35)


def test_router_and_its_bias_are_active() -> None:
    """A router scores every expert for every token, so all of it works."""
    layout = layout_of(
        {"experts": 6, "hidden": 7}, {"r.weight": "experts <- hidden", "r.bias": "bias experts"}
    )
    count = ModelShape(layout, {"experts": 2}).count()
    assert count.active == count.total == 6 * 7 + 6


def test_restricted_layers_count_only_their_own() -> None:
    """A placeholder that names some layers stands for that many tensors."""
    layout = layout_of(
        {"layers": 9, "hidden": 2}, {"l.{layers=0,4-7}.a": "scale hidden", "l.{layers}.b": "scale hidden"}
    )
    assert shape_of(layout).count().total == 5 * 2 + 9 * 2


def test_experts_without_a_known_number_per_token_are_refused() -> None:
    """Active parameters are not guessed."""
    with pytest.raises(LayoutError, match="how many work on one token"):
        shape_of(PAPER_LAYOUT, {})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_experts_per_tok": 8}, 8),
        ({"text_config": {"top_k_experts": 4}}, 4),
        ({"moe_topk": [2, 2]}, 2),
        ({"moe_topk": [2, 3]}, None),
        ({"top_k": True}, None),
        ({"hidden_size": 8}, None),
    ],
)
def test_experts_per_token_is_found_in_configs(config: dict[str, object], expected: int | None) -> None:
    """Under several names, nested, or per layer if equal; never guessed."""
    assert experts_per_token(config) == expected


@given(st.integers(2, 9), st.integers(1, 5), st.integers(2, 30))
def test_stages_add_up(width: int, times: int, tokens: int) -> None:
    """A run cut into stages that do not widen costs what the whole run costs; doubling adds up."""
    layout = layout_of({"ffn": width, "hidden": 3}, {"up": "ffn <- hidden"})
    shape = shape_of(layout)
    growths = []
    size = width
    for _ in range(times):
        growths.append({"ffn": Growth(size, 2 * size)})
        size *= 2
    moments = [i * tokens for i in range(1, times + 1)]
    flops = run_flops(plan_compute(shape, list(zip(moments, growths, strict=True)), tokens * (times + 1)))
    by_hand = sum(6 * (3 * width * 2**i) * tokens for i in range(times + 1))
    assert flops.progressive == by_hand
    assert flops.scratch == train_flops(3 * width * 2**times, tokens * (times + 1))
    assert 0 < share_saved(flops.progressive, flops.scratch) < 1


@pytest.mark.parametrize("moments", [[0], [100], [60, 60], [60, 40], [120]])
def test_moments_outside_or_out_of_order_are_refused(moments: list[int]) -> None:
    """Each expansion lies inside the run, after the one before."""
    layout = layout_of({"ffn": 2}, {"up": "scale ffn"})
    growths = [{"ffn": Growth(2 * 2**i, 4 * 2**i)} for i in range(len(moments))]
    with pytest.raises(SpecError, match="in order"):
        plan_compute(shape_of(layout), list(zip(moments, growths, strict=True)), 100)


def test_saving_by_steps_equals_saving_by_tokens() -> None:
    """With equal batches, steps and tokens give the same share."""
    layout = layout_of({"ffn": 4}, {"up": "scale ffn", "rest": "scale 3"})
    flops = run_flops(plan_compute(shape_of(layout), [(600, {"ffn": Growth(4, 8)})], 1000))
    assert step_saving(7, 11, 60, 100) == pytest.approx(
        share_saved(flops.progressive, flops.scratch), rel=1e-12
    )


@pytest.mark.parametrize(
    ("text", "count"),
    [("200B", 200 * 10**9), ("1.5t", 1500 * 10**9), ("2e11", 2 * 10**11), ("7", 7), ("1_000", 1000),
     ("1,000 M", 10**9), ("12k", 12000)],
)  # fmt: skip
def test_counts_are_read_as_people_write_them(text: str, count: int) -> None:
    """Units are decimal; whole numbers are exact."""
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "B", "-3B", "1.2.3", "200 billion", "0", "1e999"])
def test_other_texts_are_no_counts(text: str) -> None:
    """Refused with the field's name."""
    with pytest.raises(SpecError, match="tokens"):
        parse_count(text, "tokens")


@pytest.mark.parametrize(
    ("value", "text"),
    [(449_452_032, "449M"), (9_995_000_000, "10.0B"), (999_600, "1.00M"), (12, "12")],
)
def test_counts_are_written_with_three_digits(value: int, text: str) -> None:
    """Rounding carries into the next unit."""
    assert count(value) == text
