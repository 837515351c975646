"""Models that see: the tower's last projection grows with the text, and what is said of an image stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from inference_support import shake

from sparkling_cli import api
from sparkling_cli.models import sizes
from sparkling_cli.models.infer import infer
from sparkling_cli.models.skeleton import build_model

Config = dict[str, Any]
Inputs = dict[str, torch.Tensor]

_TEXT: Config = {
    "hidden_size": 64, "vocab_size": 61, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LINEAR: Config = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_TOWER: Config = {"hidden_size": 32, "num_heads": 2, "num_attention_heads": 2, "intermediate_size": 40}
_TOKENS: Config = {
    "image_token_id": 7,
    "vision_start_token_id": 8,
    "vision_end_token_id": 9,
    "video_token_id": 10,
}
_ROPE: Config = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def _patches(size: int, grid: int = 4) -> Inputs:
    """Patches of one image, ``(grid squared, values)``, as the processors of the Qwen family cut them."""
    values = torch.randn(grid * grid, size, generator=torch.Generator().manual_seed(5))
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, grid, grid]])}


def _square(size: int) -> Inputs:
    """One image, ``(1, 3, size, size)``."""
    return {"pixel_values": torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(5))}


#: name -> (config, what an image is, how many tokens stand for it)
SEEING: dict[str, tuple[Config, Inputs, int]] = {
    "qwen3_5": (
        {
            "model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], **_TOKENS,
            "text_config": {"model_type": "qwen3_5_text", **_TEXT, **_LINEAR},
            "vision_config": {**_TOWER, "depth": 1, "out_hidden_size": 64},
        },
        _patches(3 * 2 * 16 * 16), 4,
    ),
    "qwen2_5_vl": (
        {
            "model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"], **_TOKENS,
            "text_config": {"model_type": "qwen2_5_vl_text", **_TEXT, "rope_parameters": _ROPE},
            "vision_config": {
                **_TOWER, "depth": 1, "out_hidden_size": 64, "fullatt_block_indexes": [0], "window_size": 56,
            },
        },
        _patches(3 * 2 * 14 * 14), 4,
    ),
    "qwen2_vl": (
        {
            "model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"], **_TOKENS,
            "text_config": {"model_type": "qwen2_vl_text", **_TEXT, "rope_parameters": _ROPE},
            "vision_config": {"embed_dim": 32, "num_heads": 2, "depth": 1, "hidden_size": 64, "mlp_ratio": 2},
        },
        _patches(3 * 2 * 14 * 14), 4,
    ),
    "gemma3": (
        {
            "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": {"model_type": "gemma3_text", **_TEXT, "query_pre_attn_scalar": 16},
            "vision_config": {
                "model_type": "siglip_vision_model", **_TOWER, "num_hidden_layers": 1, "image_size": 56,
                "patch_size": 14, "vision_use_head": False,
            },
            "mm_tokens_per_image": 4, "image_token_index": 7, "image_token_id": 7, "boi_token_index": 8,
            "eoi_token_index": 9,
        },
        _square(56), 4,
    ),
    "llava": (
        {
            "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 7,
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {
                "model_type": "clip_vision_model", **_TOWER, "num_hidden_layers": 2, "image_size": 28,
                "patch_size": 14, "projection_dim": 24,
            },
            "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
        },
        _square(28), 4,
    ),
    "paligemma": (
        {
            "model_type": "paligemma", "architectures": ["PaliGemmaForConditionalGeneration"],
            "image_token_index": 7, "projection_dim": 64, "hidden_size": 64,
            "text_config": {"model_type": "gemma", **_TEXT},
            "vision_config": {
                "model_type": "siglip_vision_model", **_TOWER, "num_hidden_layers": 1, "image_size": 28,
                "patch_size": 14, "vision_use_head": False, "projection_dim": 64,
            },
        },
        _square(28), 4,
    ),
}  # fmt: skip


@pytest.mark.survey
@pytest.mark.parametrize(
    ("name", "flat"), [*((n, False) for n in SEEING), ("qwen2_vl", True), ("qwen2_5_vl", True)]
)
def test_what_is_said_of_an_image_stays(name: str, flat: bool, tmp_path: Path) -> None:
    """Every axis of width doubled: logits after an image within 1e-5, and the image does matter.

    Flat: as first published, the text's sizes beside the tower's table, the head tied to the embedding.
    """
    config, image, tokens = SEEING[name]
    model: Any = shake(build_model({**config, "tie_word_embeddings": flat}, meta=False))
    model.save_pretrained(tmp_path / "small")
    if flat:
        written = tmp_path / "small" / "config.json"
        found = json.loads(written.read_text())
        written.write_text(json.dumps({**found.pop("text_config"), **found}))
    seen = said(model, image, tokens)
    other = said(model, {**image, "pixel_values": 0 * image["pixel_values"]}, tokens)
    assert float((seen - other).abs().max()) > 1e-3 * float(seen.abs().max())
    layout = api.layout_of(tmp_path / "small")
    grown = []
    for axis in ("ffn", "hidden", "heads", "kv_heads"):
        info = layout.axes.get(axis)
        if info is None or not info.widenable:
            continue
        asked = [{"axis": a, "factor": 2} for a in (axis, *info.joint)]
        target = tmp_path / axis
        api.expand(tmp_path / "small", target, axes=asked, report="none", allow_locked=True)
        wide, found = type(model).from_pretrained(target, output_loading_info=True)
        assert not found["missing_keys"] and not found["mismatched_keys"]
        after = said(wide.eval(), image, tokens)
        assert float((after - seen).abs().max()) < 1e-5 * float(seen.abs().max()), axis
        grown.append(axis)
    assert {"ffn", "hidden"} <= set(grown), {n: i.reason for n, i in layout.axes.items() if n not in grown}


def test_a_connection_that_stays_is_refused_by_what_the_class_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were no key known to size PaliGemma's projector, the projector itself would tell; other axes stay."""
    monkeypatch.setattr(sizes, "_beside_towers", lambda config, hidden: [])
    layout = infer(SEEING["paligemma"][0])
    assert not layout.axes["hidden"].widenable and "multi_modal_projector" in layout.axes["hidden"].reason
    assert layout.axes["ffn"].widenable


def said(model: Any, image: Inputs, tokens: int) -> torch.Tensor:
    """Logits after the image, in float64."""
    ids = torch.tensor([[11, 12, 8, *[7] * tokens, 9, 13, 14, 15]])
    kinds = (ids == 7).long()
    more = {"token_type_ids": kinds} if model.config.model_type in ("gemma3", "paligemma") else {}
    if "image_grid_thw" in image:
        more["mm_token_type_ids"] = kinds
    with torch.no_grad():
        logits = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **image, **more
        ).logits
    return logits[:, -3:].double()
