"""Dry runs on checkpoints of real size, without their bytes: what comes out is what the class would build.

Every config of ``../shared/configs``, where that folder is; else small ones of our own.
"""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from sparkling_cli import api
from sparkling_cli.compute.shape import experts_per_token, shape_of
from sparkling_cli.errors import CheckpointError, LayoutError, SpecError
from sparkling_cli.layout.expr import COUNTED
from sparkling_cli.models.disk import to_disk
from sparkling_cli.models.skeleton import build_model
from sparkling_cli.spec.sources import make_spec

pytestmark = pytest.mark.survey

Shapes = dict[str, tuple[int, ...]]
PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "configs"
_PLAIN = {"hidden_size": 192, "vocab_size": 301, "num_attention_heads": 6, "num_key_value_heads": 2}
_MLP = {**_PLAIN, "intermediate_size": 320, "num_hidden_layers": 5}
_MOE = {**_MLP, "moe_intermediate_size": 128, "num_experts_per_tok": 2}
OWN: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_MLP},
    "gemma2": {"model_type": "gemma2", **_MLP, "head_dim": 32},
    "qwen3_moe": {"model_type": "qwen3_moe", **_MOE, "num_experts": 8, "mlp_only_layers": [1]},
    "glm4_moe": {"model_type": "glm4_moe", **_MOE, "n_routed_experts": 8, "first_k_dense_replace": 2},
    "gpt_oss": {"model_type": "gpt_oss", **_MLP, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"model_type": "gpt2", "n_embd": 192, "n_head": 6, "n_layer": 3, "vocab_size": 301},
    "bloom": {"model_type": "bloom", "hidden_size": 192, "n_head": 6, "n_layer": 3, "vocab_size": 301},
}
CONFIGS = {path.stem: path for path in sorted(PUBLISHED.glob("*.json"))} if PUBLISHED.is_dir() else dict(OWN)


#: Classes that round a share of hidden up, so that a factor may fit their shapes or not: their own class
#: says so before an output appears.
ROUNDS = {"xlstm"}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_class_builds_what_a_plan_says(name: str, tmp_path: Path) -> None:
    """Counts of the source; names, shapes and counts of each widened model, or a refusal with a reason."""
    config, model = sparse(name, tmp_path)
    try:
        layout = api.layout_of(tmp_path)
    except LayoutError as error:
        pytest.skip(f"refused: {error}"[:200])
    count = shape_of(layout, config).count()
    assert (count.total, count.active) == counted(model, experts_per_token(config))
    tried = 0
    for axis in ("ffn", "hidden", "heads", "kv_heads"):
        found_axis = layout.axes.get(axis)
        group = (axis, *(found_axis.joint if found_axis else ()))
        asked = [{"axis": name, "factor": 1.5} for name in group]
        rounded = 64 if len(group) == 1 and found_axis is not None and found_axis.size >= 64 else 1
        spec = make_spec({"axes": asked, "multiple_of": rounded, "allow_locked": True}, "test")
        try:
            plan = api.make_plan(tmp_path, spec=spec)
        except (SpecError, CheckpointError) as error:
            assert error.hint or isinstance(error, SpecError)
            continue
        tried += 1
        literals = {file.path: file.literals[0][1] for file in plan.files if file.path == "config.json"}
        wide = build_model(json.loads(literals["config.json"]))
        rows = {row.name: row.shape for row in plan.plan.rows}
        if config["model_type"] in ROUNDS and rows != on_disk(wide):
            continue
        assert rows == on_disk(wide), axis
        after = shape_of(layout, config).grown(plan.plan.growth).count()
        assert (after.total, after.active) == counted(wide, experts_per_token(config)), axis
    assert tried or not any(info.widenable for axis, info in layout.axes.items() if axis not in COUNTED)


def sparse(name: str, root: Path) -> tuple[dict[str, Any], Any]:
    """A checkpoint of real size whose bytes are no room on the disk; its config, and its class on meta."""
    found = CONFIGS[name]
    config: dict[str, Any] = json.loads(found.read_text()) if isinstance(found, Path) else found
    try:
        model = build_model(config)
    except LayoutError as error:
        pytest.skip(f"the class cannot be built: {error}"[:200])
    write_sparse(root / "model.safetensors", on_disk(model))
    (root / "config.json").write_text(json.dumps(config))
    return config, model


def on_disk(model: Any) -> Shapes:
    """Names and shapes as the library saves them: tied ones once."""
    followers = set(getattr(model, "all_tied_weights_keys", None) or {})
    state = {name: t for name, t in model.state_dict().items() if name not in followers}
    return {name: tuple(tensor.shape) for name, tensor in to_disk(model, state).items()}


def counted(model: Any, chosen: int | None) -> tuple[int, int]:
    """All parameters of a model, and those that work on one token."""
    total, idle = 0, Fraction(0)
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        inside = re.search(r"(?:^|\.)experts\.(\d+)?", name)
        if inside is not None and chosen is not None:
            listed = name[: inside.start(1)].rstrip(".") if inside[1] else ""
            count = len(model.get_submodule(listed)) if listed else parameter.shape[0]
            idle += parameter.numel() * Fraction(max(count - chosen, 0), count)
    return total, round(total - idle)


def write_sparse(path: Path, shapes: Shapes) -> None:
    """A safetensors file of bfloat16 zeros that takes no room: its header, and a length."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
