"""Quantized weights are recognized by their tensors, and the refusal says how plain ones are had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.models.locate import find_layout

SIZES = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
PROJECTION = "model.layers.0.mlp.up_proj"
#: scheme, what a file of it has in place of a projection, and what the way out must name
SCHEMES = [
    (
        "FP8",
        {"weight": (torch.float8_e4m3fn, (40, 24)), "weight_scale_inv": (torch.float32, (1, 1))},
        "FP8Config",
    ),
    (
        "bitsandbytes",
        {"weight": (torch.uint8, (480, 1)), "weight.absmax": (torch.uint8, (15,))},
        "dequantize",
    ),
    ("bitsandbytes", {"weight": (torch.int8, (40, 24)), "SCB": (torch.float32, (40,))}, "dequant"),
    ("GPTQ", {"qweight": (torch.int32, (3, 40)), "g_idx": (torch.int32, (24,))}, "made from"),
    ("AWQ", {"qweight": (torch.int32, (24, 5)), "qzeros": (torch.int32, (1, 5))}, "made from"),
    ("compressed-tensors", {"weight_packed": (torch.int32, (40, 3))}, "CompressedTensorsConfig"),
    ("torchao", {"_weight_qdata": (torch.int8, (40, 24))}, "made from"),
]


@pytest.mark.parametrize(("scheme", "stored", "remedy"), SCHEMES, ids=lambda value: str(value)[:12])
def test_a_quantized_checkpoint_is_named(
    scheme: str, stored: dict[str, tuple[torch.dtype, tuple[int, ...]]], remedy: str, tmp_path: Path
) -> None:
    """One sentence with the scheme and a tensor; the hint has the way to weights that can be widened."""
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state[f"{PROJECTION}.weight"]
    state |= {f"{PROJECTION}.{n}": torch.zeros(shape).to(dtype) for n, (dtype, shape) in stored.items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"quantized .{scheme}") as caught:
        find_layout(open_checkpoint(tmp_path))
    assert caught.value.hint is not None
    assert remedy in caught.value.hint


def test_a_config_that_outlived_the_conversion_is_no_obstacle(tmp_path: Path) -> None:
    """The tensors are plain: what the config says of quantization is not about them."""
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("{", '{"quantization_config": {"quant_method": "fp8"},', 1))
    assert find_layout(open_checkpoint(tmp_path)).axes["hidden"].widenable
