"""Layout files of the package for transformers classes: held to the classes' own code, like what is inferred.

A real AdamW step, widened through files; logits, state, gradients and activations of the widened model.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_every_class_trains import complaints, widenings
from training_support import reloaded, trained

from sparkling_cli import api
from sparkling_cli.errors import CheckpointError, SparklingError, SpecError
from sparkling_cli.layout.depth import silent_value
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.layout.packaged import packaged_data, packaged_names
from sparkling_cli.models import infer as infer_module
from sparkling_cli.models.locate import ask_model
from sparkling_cli.models.skeleton import build_model

MAMBA = {
    "mamba_n_heads": 16,
    "mamba_d_head": 8,
    "mamba_d_state": 5,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
    "time_step_limit": [0.0, 9.0],
}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 61}
DECODER = {**SIZES, **ATTENTION, "intermediate_size": 40}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
MIXED = ["linear_attention", "full_attention", "linear_attention"]
GRANITE = {
    "model_type": "granitemoehybrid",
    "architectures": ["GraniteMoeHybridForCausalLM"],
    **SIZES,
    **MAMBA,
    **ATTENTION,
    "layer_types": MIXED,
    "intermediate_size": 24,
    "shared_intermediate_size": 40,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.3,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mamba2": {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        **SIZES,
        "num_heads": 16,
        "head_dim": 8,
        "state_size": 5,
        "n_groups": 2,
        "expand": 2,
        "time_step_limit": [0.0, 9.0],
    },
    "bamba": {
        "model_type": "bamba",
        "architectures": ["BambaForCausalLM"],
        **SIZES,
        **MAMBA,
        **ATTENTION,
        "intermediate_size": 40,
        "attn_layer_indices": [1],
    },
    "xlstm": {
        "model_type": "xlstm",
        "architectures": ["xLSTMForCausalLM"],
        **SIZES,
        "hidden_size": 48,
        "num_heads": 4,
        "ffn_round_up_to_multiple_of": 1,
    },
    "helium": {
        "model_type": "helium",
        "architectures": ["HeliumForCausalLM"],
        **SIZES,
        **ATTENTION,
        "head_dim": 16,
        "intermediate_size": 40,
    },
    "llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **DECODER,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        **DECODER,
        "sliding_window": 8,
    },
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **DECODER},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **DECODER, "head_dim": 12},
    "granite": {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        **DECODER,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.3,
    },
    "olmo2": {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], **DECODER},
    "olmo3": {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], **DECODER, "sliding_window": 4},
    "mixtral": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        **DECODER,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        **DECODER,
        **EXPERTS,
        "moe_intermediate_size": 24,
        "head_dim": 16,
    },
    "olmoe": {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        **DECODER,
        **EXPERTS,
        "num_key_value_heads": 4,
        "clip_qkv": 3.0,
    },
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 61,
        "n_positions": 32,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        **SIZES,
        "num_attention_heads": 4,
        "intermediate_size": 40,
    },
    "phi3": {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], **DECODER, "pad_token_id": 0},
    "gemma": {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], **DECODER, "head_dim": 16},
    "gemma2": {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        **DECODER,
        "head_dim": 16,
        "sliding_window": 8,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        **DECODER,
        "head_dim": 16,
        "sliding_window": 8,
    },
    "granitemoehybrid": GRANITE,
    "granitemoehybrid without experts": {**GRANITE, "num_local_experts": 0},
    "granitemoehybrid without attention": {**GRANITE, "layer_types": ["linear_attention"] * 3},
}
#: Classes that inference cannot explain: their files are held to the code alone.
NOT_INFERRED = {"mamba2", "bamba", "helium", "granitemoehybrid", "xlstm"}
#: Classes of which a file is for tied models only, or for untied ones only.
ALWAYS = {"gemma": True, "gemma2": True, "gemma3_text": True, "gpt_neox": False, "xlstm": False}
#: A config, and whether its embedding is tied to its head.
MODELS = [
    pytest.param(which, tied, id=f"{which}{', tied' if tied else ''}")
    for which in CONFIGS
    for tied in (False, True)
    if ALWAYS.get(which, tied) is tied
]
#: Classes with state spaces take seconds: of each the default tests take one model.
SPACES = ("bamba", "mamba2", "granitemoehybrid")
QUICK_MODELS = [
    model
    if model.id in SPACES or not str(model.id).startswith(SPACES)
    else pytest.param(*model.values, id=model.id, marks=pytest.mark.slow)
    for model in MODELS
]


@pytest.mark.slow
@pytest.mark.parametrize(("which", "tied"), MODELS)
def test_state_gradients_and_activations_follow(which: str, tied: bool, tmp_path: Path) -> None:
    """Every axis of the file doubled, with those that grow along."""
    small = trained({**CONFIGS[which], "tie_word_embeddings": tied}, tmp_path / "small")
    layout = layout_in_package(small.folder)
    assert bool(layout.tied) is tied
    wrong = []
    for axes in widenings(layout):
        asked = [{"axis": axis, "factor": 2} for axis in axes]
        for treatment in ("asymmetric", "copy"):
            target = tmp_path / f"{axes[0]}-{treatment}"
            api.expand(
                small.folder, target, axes=asked, optimizer=treatment, allow_locked=True, report="none"
            )
            api.verify(small.folder, target)
        wrong += [f"{axes[0]}: {what}" for what in complaints(small, layout, tmp_path / axes[0])]
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize(("which", "tied"), QUICK_MODELS)
def test_all_axes_three_times_as_wide(which: str, tied: bool, tmp_path: Path) -> None:
    """The library loads the output from its own config, and it says what the source said."""
    small = trained({**CONFIGS[which], "tie_word_embeddings": tied}, tmp_path / "small")
    layout = layout_in_package(small.folder)
    once = {"q_per_kv"} if layout.divisible else set()  # three times as many heads, as hidden is as wide
    grown = [name for name, info in layout.axes.items() if info.widenable and name not in once]
    asked = [{"axis": name, "factor": 3} for name in grown]
    api.expand(small.folder, tmp_path / "wide", axes=asked, report="none")
    api.verify(small.folder, tmp_path / "wide")
    wide = reloaded(small, tmp_path / "wide")
    with torch.no_grad():
        before = reloaded(small, small.folder)(input_ids=small.ids, use_cache=False).logits
        after = wide(input_ids=small.ids, use_cache=False).logits[..., : before.shape[-1]]
    assert torch.allclose(after, before, rtol=1e-5, atol=1e-6 * float(before.abs().max()))
    ratio = sum(p.numel() for p in wide.parameters()) / sum(p.numel() for p in small.model.parameters())
    assert ratio > 2.5


@pytest.mark.slow
@pytest.mark.parametrize(("which", "tied"), MODELS)
def test_what_is_said_about_the_model(which: str, tied: bool, tmp_path: Path) -> None:
    """Parameters and active ones are the model's own; a tied head's input carries its factor."""
    small = trained({**CONFIGS[which], "tie_word_embeddings": tied}, tmp_path / "small")
    sizes = {name: p.numel() for name, p in small.model.named_parameters()}
    idle = sum(size // 2 for name, size in sizes.items() if ".experts." in name)  # two of four work
    hidden = api.layout_of(small.folder).axes["hidden"]
    asked = [{"axis": axis, "factor": 2} for axis in ("hidden", *hidden.joint)]
    found = api.expand(small.folder, tmp_path / "wide", axes=asked, report="full").report
    assert found is not None
    assert found.activations is not None
    assert found.before.parameters == sum(sizes.values())
    assert found.before.active == sum(sizes.values()) - idle
    measured = (*found.activations.layers, *found.activations.functions)
    assert measured and not [entry.name for entry in measured if entry.moved > 0.10]


def test_hidden_grows_with_the_mixers_heads(tmp_path: Path) -> None:
    """By half: counts in the config agree; hidden alone is refused with the axis that must come along."""
    small = trained(CONFIGS["mamba2"], tmp_path / "small")
    with pytest.raises(SpecError, match="couples hidden to mamba_heads"):
        api.expand(small.folder, tmp_path / "no", axes=[{"axis": "hidden", "factor": 2}])
    both = [{"axis": "hidden", "factor": 1.5}, {"axis": "heads", "factor": 1.5}]
    api.expand(small.folder, tmp_path / "wide", axes=both, report="none")
    config = json.loads((tmp_path / "wide/config.json").read_text())
    assert (config["hidden_size"], config["num_heads"], config["expand"]) == (96, 24, 2)
    assert torch.isfinite(reloaded(small, tmp_path / "wide")(input_ids=small.ids).logits).all()


def test_every_file_of_a_class_is_tried() -> None:
    """Each class that a file of the package is for has a config here."""
    types = {model_type for name in packaged_names() for model_type in packaged_data(name).get("classes", {})}
    assert types == {config["model_type"] for config in CONFIGS.values()}


def layout_in_package(folder: Path) -> ModelLayout:
    """The layout of a checkpoint, which a file of the package says and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer_module, "infer", _not_asked)
        return api.layout_of(folder)


class AskedError(Exception):
    """Inference was asked."""


def _not_asked(*_: Any, **__: Any) -> ModelLayout:
    raise AskedError


def saved(config: dict[str, Any], folder: Path) -> Path:
    """A random model's weights as the library writes them, and exactly this config."""
    build_model(config, meta=False).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


PLAIN = CONFIGS["llama"]
LLAMA = {key: value for key, value in PLAIN.items() if not key.endswith("_bias")}
#: Structures that a file leaves open, by what is special about them.
VARIANTS: dict[str, dict[str, Any]] = {
    **{which: CONFIGS[which] for which in CONFIGS if CONFIGS[which]["model_type"] not in NOT_INFERRED},
    "no count of key/value heads": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
    "one key/value head": {**LLAMA, "num_key_value_heads": 1},
    "a width of heads": {**LLAMA, "head_dim": 12},
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "qwen2 with windows": {
        **CONFIGS["qwen2"],
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3 with biases": {**CONFIGS["qwen3"], "attention_bias": True},
    "olmo2 with biases": {**CONFIGS["olmo2"], "attention_bias": True},
    "gpt2 untied": {**CONFIGS["gpt2"], "n_inner": 40, "tie_word_embeddings": False},
    "gpt_neox in sequence": {**CONFIGS["gpt_neox"], "attention_bias": False, "use_parallel_residual": False},
}
#: Of these, the default tests look at some.
QUICK = {"llama", "qwen3_moe", "gpt2", "gemma2", "no count of key/value heads", "tied"}


@pytest.mark.parametrize(
    "which", [pytest.param(w, marks=() if w in QUICK else pytest.mark.slow) for w in VARIANTS]
)
def test_a_file_says_what_inference_finds(which: str, tmp_path: Path) -> None:
    """Tensors, sizes, what may grow, ties, factors and config keys; order and decay of parameters."""
    config = VARIANTS[which]
    found, truth = layout_in_package(saved(config, tmp_path)), infer_module.infer(config)
    single = "heads" in truth.axes and "heads" not in found.axes

    def plain(term: str) -> str:
        """Where every key/value head has one query head, inference calls the pair ``heads``."""
        return term.replace("kv_heads q_per_kv", "heads").replace("kv_heads", "heads") if single else term

    def texts(layout: ModelLayout) -> dict[str, tuple[str, tuple[int, ...]]]:
        pairs = [(name, layout.module_table.find(name)) for name in truth_shapes]
        return {name: (plain(pattern.layout), layout.shape_of(pattern)) for name, pattern in pairs}

    truth_shapes = dict(ask_model(config, None)["parameters"])
    assert texts(found) == texts(truth)
    assert [silent_value(found, n) for n in truth_shapes] == [silent_value(truth, n) for n in truth_shapes]
    assert {axis for axis, info in truth.axes.items() if info.widenable} == {
        plain(axis)
        for axis, info in found.axes.items()
        if info.widenable and not (single and axis == "q_per_kv")
    }
    assert {a: i.joint for a, i in truth.axes.items() if i.joint} == {
        a: i.joint for a, i in found.axes.items() if i.joint
    }
    assert found.tied == truth.tied
    followers = {name for group in truth.tied for name in group[1:]}
    assert {c for c in found.compensations if c.tensor not in followers} == {
        c for c in truth.compensations if c.tensor not in followers
    }
    own = {key: plain(term).strip("()") for key, term in found.config.items()}
    assert {k: v for k, v in own.items() if k in truth.config} == {
        key: term.strip("()") for key, term in truth.config.items()
    }
    assert found.name == truth.name
    if found.ordered:
        assert [[name, list(shape)] for name, shape in found.parameters().items()] == ask_model(config, None)[
            "parameters"
        ]
        decayed = {name for name, shape in found.parameters().items() if len(shape) > 1}
        assert decayed == set(ask_model(config, None)["decayed"]) - followers


#: What is changed in a Llama's config -> why a file must not answer.
NOT_KNOWN: dict[str, dict[str, Any]] = {
    "a key that names a width": {"moe_intermediate_size": 64},
    "a nested key that names one": {"extra": {"hidden_size": 64}},
    "another class of the same names": {"model_type": "phimoe"},
    "no class": {"model_type": None},
    "heads that the shapes contradict": {"num_key_value_heads": 1},
    "no count of heads": {"num_attention_heads": None},
    "tied, and two matrices are stored": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("why", NOT_KNOWN)
def test_where_a_file_may_be_wrong_it_does_not_answer(why: str, tmp_path: Path) -> None:
    """Inference decides, or an error says what is missing."""
    saved(LLAMA, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **NOT_KNOWN[why]}))
    with pytest.raises((AskedError, SparklingError)):
        layout_in_package(tmp_path)


@pytest.mark.parametrize("which", ["gemma2", "qwen3_moe"])
def test_other_structures_of_a_class_are_inferred(which: str, tmp_path: Path) -> None:
    """An untied Gemma (its head takes no multiplier), a layer without experts."""
    other: dict[str, Any] = {"gemma2": {"tie_word_embeddings": False}, "qwen3_moe": {"mlp_only_layers": [0]}}
    with pytest.raises(AskedError):
        layout_in_package(saved({**CONFIGS[which], **other[which]}, tmp_path))


def test_a_missing_head_is_no_tied_one(tmp_path: Path) -> None:
    """A shard is missing: the config says that the head is a matrix of its own."""
    saved(LLAMA, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(AskedError):
        layout_in_package(tmp_path)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_without_one_of_its_tensors_is_damaged(bias: bool, tmp_path: Path) -> None:
    """Every layer has what any has, optional tensors included."""
    saved({**LLAMA, "attention_bias": bias}, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[f"model.layers.1.self_attn.q_proj.{'bias' if bias else 'weight'}"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="a shard may be missing"):
        layout_in_package(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"of_its_own": 1, "auto_map": {"AutoModel": "x.Y"}, "is_llama_config": True},
        {"hidden_act": "gelu", "rope_scaling": None, "pretraining_tp": 1, "pad_token_id": -1},
    ],
    ids=["keys of others", "numerics"],
)
def test_what_sizes_nothing_does_not_matter(change: dict[str, Any], tmp_path: Path) -> None:
    """Keys as published configs have them."""
    saved(LLAMA, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **change}))
    assert layout_in_package(tmp_path).sizes["hidden"] == 64


def test_heads_with_keys_of_their_own_keep_them(tmp_path: Path) -> None:
    """Where every query head has a key/value head, ``heads`` adds whole heads; groups stay groups."""
    small = trained(VARIANTS["no count of key/value heads"], tmp_path / "small")
    api.expand(small.folder, tmp_path / "wide", axes=[{"axis": "heads", "factor": 2}], report="none")
    config = json.loads((tmp_path / "wide/config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (8, 8, 16)


def test_heads_that_do_not_divide_hidden_are_refused(tmp_path: Path) -> None:
    """The class would not build from such a config; each way out that is named works."""
    small = trained(LLAMA, tmp_path / "small")
    with pytest.raises(SpecError, match="multiple of") as caught:
        api.expand(small.folder, tmp_path / "no", axes=[{"axis": "heads", "factor": 1.5}])
    offered = re.findall(r"--axis (\w+) --to (\d+)", caught.value.hint or "")
    assert offered
    for n, (axis, size) in enumerate(offered):
        target = tmp_path / str(n)
        api.expand(small.folder, target, axes=[{"axis": axis, "to": int(size)}], report="none")
        assert torch.isfinite(reloaded(small, target)(input_ids=small.ids).logits).all()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_first_plan_imports_neither_torch_nor_transformers(
    kind: str, dense_checkpoint: Path, moe_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``expand --dry-run`` with nothing in the cache; afterwards there is still nothing in it."""
    checkpoint = dense_checkpoint if kind == "dense" else moe_checkpoint
    monkeypatch.setenv("SPARKLING_CACHE_DIR", str(tmp_path / "cache"))
    code = (
        "import sys\n"
        "from sparkling_cli.cli.app import app\n"
        "from sparkling_cli.cli.console import run\n"
        "status = run(app)\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else status)\n"
    )
    asked = ["expand", str(checkpoint), str(tmp_path / "out"), "--axis", "ffn", "--factor", "2", "--dry-run"]
    done = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache").exists()
