"""A user's own model is inferred and proved like a library class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import own_gpt
import pytest
import torch
from inference_support import shake, widen_state, widened_config
from safetensors.torch import load_file

from sparkling_cli import api
from sparkling_cli.errors import LayoutError
from sparkling_cli.models.infer import infer
from sparkling_cli.models.own_code import check_own_code

CONFIG: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 16,
    "d_ff": 24,
    "n_heads": 2,
    "head_dim": 6,
    "n_layers": 3,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize("factors", [{"ffn": 2}, {"heads": 3}, {"hidden": 2, "ffn": 2, "heads": 2}])
def test_a_hand_written_gpt_keeps_its_logits(factors: dict[str, int]) -> None:
    """Interleaved raw gate_up, fused qkv, a tied head: all found from the code alone."""
    layout = infer(CONFIG, model="own_gpt:build")
    small = shake(own_gpt.build(CONFIG))
    state = widen_state(layout, small.state_dict(), factors, on_disk=False)
    wide = own_gpt.build(widened_config(layout, CONFIG, factors)).eval()
    wide.load_state_dict(state)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before, after = small(ids), wide(ids)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


def test_its_packings_are_read_off_its_behaviour() -> None:
    """The gate lies first in every interleaved pair; the head shares the embedding's storage."""
    layout = infer(CONFIG, model_factory=own_gpt.build)
    assert layout.module_table.find("blocks.2.gate_up").layout == "hidden -> (ffn gate_up)"
    assert layout.module_table.find("blocks.0.qkv.weight").layout == "(qkv heads head_dim) <- hidden"
    assert layout.tied == (("tokens.weight", "head.weight"),)
    assert layout.config["d_ff"] == "ffn"


@pytest.mark.parametrize("reference", ["own_gpt", "own_gpt:nothing", "no_such_module:build", "own_gpt:F"])
def test_a_factory_that_is_none_is_refused(reference: str) -> None:
    """The error names what was given."""
    with pytest.raises(LayoutError, match=reference.split(":")[0]):
        infer(CONFIG, model=reference)


def test_a_model_without_logits_is_refused() -> None:
    """A forward that returns no tensor cannot be proved: the error says what is expected."""

    class Silent(torch.nn.Module):
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(config["vocab_size"], config["d_model"])

        def forward(self, input_ids: torch.Tensor) -> None:
            return None

    with pytest.raises(LayoutError, match="logits"):
        infer(CONFIG, model_factory=Silent)


UNUSUAL = {own: CONFIG[usual] for own, usual in own_gpt.UNUSUAL.items()}


@pytest.mark.parametrize(
    ("factory", "factors"),
    [
        (own_gpt.build_unusual, {"hidden": 2, "ffn": 3, "lookers": 2}),
        (own_gpt.build_divided, {"hidden": 3, "heads": 3, "ffn": 2}),
    ],
)
def test_names_of_its_own_in_the_config_are_measured(factory: Any, factors: dict[str, int]) -> None:
    """What each number sizes is found by doubling it; the widened config has the user's own keys."""
    config = {k: v for k, v in UNUSUAL.items() if k != "each" or factory is own_gpt.build_unusual}
    layout = infer(config, model_factory=factory)
    assert all(layout.axes[axis].widenable for axis in factors)
    assert "each" not in layout.axes or not layout.axes["each"].widenable
    small = shake(factory(config))
    state = widen_state(layout, small.state_dict(), factors, on_disk=False)
    changed = widened_config(layout, config, factors)
    assert changed.keys() == config.keys()
    wide = factory(changed).eval()
    wide.load_state_dict(state)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before, after = small(ids), wide(ids)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    assert factory is own_gpt.build_divided or layout.aliases["heads"] == "lookers"


def test_a_config_without_a_vocabulary_is_refused_with_what_was_tried() -> None:
    """Each number is named with what it moves, and a layout file is proposed."""

    def fixed(config: dict[str, Any]) -> torch.nn.Module:
        return own_gpt.build_unusual({**config, "symbols": 50, "reach": 32})

    config = {k: v for k, v in UNUSUAL.items() if k not in ("symbols", "reach")}
    with pytest.raises(LayoutError, match="its vocab") as caught:
        infer(config, model_factory=fixed)
    assert "breadth moves" in str(caught.value) and "depth adds" in str(caught.value)
    assert "--layout" in str(caught.value)


SCALED: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "dim_model_base": 16,
}  # fmt: skip
OWN_CODE: dict[str, Any] = {
    "architectures": ["ScaledForCausalLM"],
    "auto_map": {"AutoConfig": "code.ScaledConfig", "AutoModelForCausalLM": "code.ScaledForCausalLM"},
}


@pytest.mark.parametrize("axis", ["hidden", "ffn", "layers"])
@pytest.mark.parametrize("named", [True, False])
def test_code_in_a_checkpoint_is_not_taken_for_the_class_of_its_model_type(
    axis: str, named: bool, tmp_path: Path
) -> None:
    """Its code may multiply by the width: refused by every axis, and ``--model`` widens it as it is."""
    small = shake(own_gpt.build_scaled(SCALED))
    small.save_pretrained(tmp_path / "small")  # type: ignore[operator]
    written = tmp_path / "small" / "config.json"
    own = OWN_CODE if named else {"auto_map": OWN_CODE["auto_map"], "architectures": None}
    written.write_text(json.dumps({**json.loads(written.read_text()), **own}))
    with pytest.raises(LayoutError, match=r"no class 'ScaledForCausalLM'.*code\.ScaledForCausalLM") as caught:
        api.expand(tmp_path / "small", tmp_path / "wide", axis=axis, factor=2, report="none")
    assert "--model" in str(caught.value)
    api.expand(
        tmp_path / "small", tmp_path / "wide", axis=axis, factor=2, report="none", allow_locked=True,
        model="own_gpt:build_scaled", **({} if axis == "layers" else {"init": "copy-copy"}),
    )  # fmt: skip
    wide = own_gpt.build_scaled(json.loads((tmp_path / "wide" / "config.json").read_text())).eval()
    wide.load_state_dict(load_file(tmp_path / "wide" / "model.safetensors"))
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before, after = small(ids).logits, wide(ids).logits
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


@pytest.mark.parametrize(
    ("model_type", "name", "code"),
    [
        ("deepseek_v3", "DeepseekV3ForCausalLM", "modeling_deepseek.DeepseekV3ForCausalLM"),
        ("mpt", "MPTForCausalLM", "modeling_mpt.MPTForCausalLM"),
        ("phimoe", "PhiMoEForCausalLM", "modeling_slimmoe.PhiMoEForCausalLM"),
        ("llama", "LLaMAForCausalLM", None),
        ("llama", "OfAForkForCausalLM", None),
        ("phi3", None, "modeling_phi3.Phi3ForCausalLM"),
    ],
)
def test_a_class_that_the_library_has_is_the_librarys(
    model_type: str, name: str | None, code: str | None
) -> None:
    """As published: code of a class that came into the library later, older spellings, forks without code."""
    config = {"model_type": model_type, "architectures": name and [name]}
    check_own_code(config if code is None else {**config, "auto_map": {"AutoModelForCausalLM": code}})
