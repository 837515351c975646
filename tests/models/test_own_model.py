"""A user's own model is inferred and proved like a library class."""

from __future__ import annotations

from typing import Any

import own_gpt
import pytest
import torch
from inference_support import shake, widen_state, widened_config

from sparkling_cli.errors import LayoutError
from sparkling_cli.models.infer import infer

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
