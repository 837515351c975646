"""Files that transformers loads although their names are not those of the class: widened, and loaded again.

Truth is the class itself: ``from_pretrained`` of source and output, and their logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from training_support import reloaded, trained

from sparkling_cli import api
from sparkling_cli.errors import SparklingError

State = dict[str, torch.Tensor]
SMALL: dict[str, Any] = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48}
SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def gpt2() -> Any:
    """Names begin with ``transformer.``; a layout file of the package fits."""
    config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=100, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def neox() -> Any:
    """Names begin with ``gpt_neox.``; the head has another name than usual."""
    config = transformers.GPTNeoXConfig(**{**SMALL, "num_key_value_heads": 4}, max_position_embeddings=32)
    return transformers.GPTNeoXForCausalLM(config)


def llama() -> Any:
    """Names begin with ``model.``."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def stablelm() -> Any:
    """A class that has no layout file in the package."""
    return transformers.StableLmForCausalLM(transformers.StableLmConfig(**SMALL))


def deepseek() -> Any:
    """Latent attention, one dense layer and one of experts, which are apart on disk."""
    sizes = {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
    sizes |= {"q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
    sizes |= {"v_head_dim": 10, "first_k_dense_replace": 1, "topk_group": 1, "num_key_value_heads": 4}
    config = transformers.DeepseekV3Config(**{**SMALL, **sizes})
    return transformers.DeepseekV3ForCausalLM(config)


def saved(model: Any, folder: Path, change: Callable[[State], State]) -> Path:
    """The model as ``save_pretrained`` writes it, its tensors changed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    state = change(load_file(folder / "model.safetensors"))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def widened(source: Path, target: Path, *axes: str) -> State:
    """The widened file: the same names."""
    asked = [{"axis": axis, "factor": 2} for axis in axes]
    api.expand(source, target, axes=asked, allow_locked=True, report="none", threads=1)
    state = load_file(target / "model.safetensors")
    assert state.keys() == load_file(source / "model.safetensors").keys()
    return state


def logits(model_class: Any, folder: Path) -> torch.Tensor:
    """Of the class, loaded without anything missing."""
    model, loaded = model_class.from_pretrained(folder, output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["mismatched_keys"]
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits.double()
    return found


def check_same_logits(model_class: Any, source: Path, target: Path) -> None:
    """Relative to the largest."""
    before, after = logits(model_class, source), logits(model_class, target)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5


def masks(prefix: str, leaf: str) -> Callable[[State], State]:
    """Adds the causal masks that older versions saved."""

    def change(state: State) -> State:
        for i in range(2):
            state[f"{prefix}.{i}.{leaf}.bias"] = torch.tril(torch.ones(1, 1, 32, 32, dtype=torch.uint8))
            state[f"{prefix}.{i}.{leaf}.masked_bias"] = torch.tensor(-1e4)
        return state

    return change


def frequencies(state: State) -> State:
    """Adds the rotary frequencies that older versions saved."""
    for i in range(2):
        state[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.arange(4, dtype=torch.float32)
    return state


def without(prefix: str, then: Callable[[State], State] = dict) -> Callable[[State], State]:
    """Takes the base model's prefix off."""
    return lambda state: {name.removeprefix(prefix): t for name, t in then(state).items()}


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (gpt2, masks("transformer.h", "attn")),
        (gpt2, without("transformer.", masks("transformer.h", "attn"))),
        (neox, masks("gpt_neox.layers", "attention")),
        (llama, frequencies),
        (llama, without("model.", frequencies)),
        (stablelm, frequencies),
        (stablelm, without("model.")),
    ],
    ids=["gpt2-masks", "gpt2-hub", "neox-masks", "llama-old", "llama-base", "stablelm-old", "stablelm-base"],
)
def test_old_buffers_and_missing_prefixes(
    make: Callable[[], Any], change: Callable[[State], State], tmp_path: Path
) -> None:
    """Buffers stay as they are, whatever grows; names stay those of the file; logits stay."""
    model = make()
    source = saved(model, tmp_path / "small", change)
    coupled: dict[Any, tuple[str, ...]] = {gpt2: ("heads",), neox: ("heads",), stablelm: ("kv_heads",)}
    axes = ("hidden", *coupled.get(make, ()))
    for number, chosen in enumerate((("ffn",), axes)):
        state = widened(source, tmp_path / f"wide{number}", *chosen)
        for name, tensor in load_file(source / "model.safetensors").items():
            if name.endswith(("inv_freq", "masked_bias", ".attn.bias", ".attention.bias")):
                assert torch.equal(state[name], tensor)
        check_same_logits(type(model), source, tmp_path / f"wide{number}")


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_wrappers_in_names(wrapper: str, tmp_path: Path) -> None:
    """What compilation and data parallelism put in front stays in front; without it the class loads."""
    model = llama()
    source = saved(model, tmp_path / "small", lambda s: {wrapper + name: t for name, t in s.items()})
    widened(source, tmp_path / "wide", "hidden")
    for folder in (source, tmp_path / "wide"):
        state = load_file(folder / "model.safetensors")
        bare = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
        save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    check_same_logits(type(model), source, tmp_path / "wide")


def prediction_layer(state: State) -> State:
    """A layer that predicts one token more, as DeepSeek-V3's files have it."""
    first = {name: t for name, t in state.items() if name.startswith("model.layers.1.")}
    layer = {name.replace(".1.", ".61.", 1): tensor.clone() for name, tensor in first.items()}
    generator = torch.Generator().manual_seed(2)
    for name, shape in {
        "embed_tokens": (100, 32),
        "shared_head.head": (100, 32),
        "shared_head.norm": (32,),
        "enorm": (32,),
        "hnorm": (32,),
        "eh_proj": (32, 64),
    }.items():
        layer[f"model.layers.61.{name}.weight"] = torch.randn(shape, generator=generator)
    return {**state, **layer}


def joined(state: State) -> torch.Tensor:
    """What a prediction layer's block receives, of one token's embedding and last hidden state."""

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        scale = state[f"model.layers.61.{name}.weight"].double()
        return scale * x / x.square().mean(-1, keepdim=True).sqrt()

    token = normed(state["model.layers.61.embed_tokens.weight"][7].double(), "enorm")
    hidden = normed(state["model.embed_tokens.weight"][3].double(), "hnorm")
    return state["model.layers.61.eh_proj.weight"].double() @ torch.cat([token, hidden])


def test_a_prediction_layer_grows_with_the_others(tmp_path: Path) -> None:
    """Its block is widened as the model's own; its input and its head give what they gave."""
    model = deepseek()
    source = saved(model, tmp_path / "small", prediction_layer)
    before = load_file(source / "model.safetensors")
    for axis in ("expert_ffn", "hidden"):
        after = widened(source, tmp_path / axis, axis)
        for name, tensor in after.items():
            twin = name.replace(".61.", ".1.", 1)
            if ".61." in name and twin in after:
                assert torch.equal(tensor, after[twin]), name
        small, wide = joined(before), joined(after)
        assert torch.allclose(wide, small.repeat(len(wide) // 32), rtol=1e-5)
        head = "model.layers.61.shared_head.head.weight"
        logits_of = [state[head].double() @ x for state, x in ((before, small), (after, wide))]
        assert torch.allclose(logits_of[0], logits_of[1], rtol=1e-4, atol=1e-5)
        check_same_logits(type(model), source, tmp_path / axis)


def test_a_layer_that_the_class_would_not_leave_aside_is_still_refused(tmp_path: Path) -> None:
    """One layer more than the config says, in a class that loads no such layer."""

    def longer(state: State) -> State:
        more = {n.replace(".1.", ".2.", 1): t.clone() for n, t in state.items() if ".layers.1." in n}
        return {**state, **more}

    source = saved(stablelm(), tmp_path / "small", longer)
    with pytest.raises(SparklingError, match=r"layers\.2"):
        api.make_plan(source, spec=api.ExpansionSpec.model_validate({"axes": [{"axis": "ffn", "factor": 2}]}))


def test_layers_of_further_tokens_are_named_as_what_they_are(tmp_path: Path) -> None:
    """Behind layers that are not 61, as the class leaves aside: refused, and the hint works as it stands."""

    def longer(state: State) -> State:
        own = {n: t for n, t in state.items() if ".layers.1." in n}
        more = {n.replace(".1.", ".2.", 1): t.clone() for n, t in own.items()}
        return {**state, **more, "model.layers.2.eh_proj.weight": torch.randn(32, 64)}

    model = deepseek()
    assert model.config.num_hidden_layers == 2
    source = saved(model, tmp_path / "small", longer)
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_nextn_predict_layers": 1}))
    with pytest.raises(SparklingError, match=r"multi-token prediction.*model\.layers\.2\.\*") as caught:
        widened(source, tmp_path / "wide", "hidden")
    assert "AutoModelForCausalLM.from_pretrained(SOURCE" in str(caught.value)
    transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(tmp_path / "copy")
    widened(tmp_path / "copy", tmp_path / "wide", "hidden")
    check_same_logits(type(model), source, tmp_path / "wide")


def test_a_class_under_a_model_type_of_its_own(tmp_path: Path) -> None:
    """``kimi_k2`` is no type of the library; the class that ``architectures`` names is."""
    model = deepseek()
    source = saved(model, tmp_path / "small", dict)
    configs = [folder / "config.json" for folder in (source, tmp_path / "wide")]
    text = configs[0].read_text()
    configs[0].write_text(text.replace('"model_type": "deepseek_v3"', '"model_type": "kimi_k2"'))
    widened(source, tmp_path / "wide", "hidden")
    for path in configs:  # the class finds apart experts by the type's name alone
        assert json.loads(path.read_text())["model_type"] == "kimi_k2"
        path.write_text(path.read_text().replace("kimi_k2", "deepseek_v3"))
    check_same_logits(type(model), source, tmp_path / "wide")


def test_a_size_under_the_name_that_older_versions_wrote(tmp_path: Path) -> None:
    """BLOOM's ``n_embed`` goes before ``hidden_size``: as it was, the class would build the old width."""
    config = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61}
    small = trained(config, tmp_path / "small")
    path = small.folder / "config.json"
    written = json.loads(path.read_text())
    written["n_embed"] = written.pop("hidden_size")
    path.write_text(json.dumps(written))
    axes = dict.fromkeys(("hidden", "head_dim", "ffn"), 2)
    api.expand(small.folder, tmp_path / "wide", axes=axes, report="none", threads=1)
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["n_embed"] == 64
    models = [reloaded(small, folder) for folder in (small.folder, tmp_path / "wide")]
    with torch.no_grad():
        before, after = (model(input_ids=small.ids, use_cache=False).logits for model in models)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5
