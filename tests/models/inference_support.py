"""An end-to-end check that shares no code with the proof: save, widen the files, reload, compare logits."""

from __future__ import annotations

import copy
import json
import math
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparkling_cli.layout.model import Compensation, ModelLayout
from sparkling_cli.layout.names import NameTemplate
from sparkling_cli.models.infer import infer
from sparkling_cli.models.shrink import shrink
from sparkling_cli.models.skeleton import causal_lm_names, default_config
from sparkling_cli.widening.geometry import Fill, Growth, Treatment, view_of
from tests.widening.whole import widen_tensor


def shake(model: torch.nn.Module, seed: int = 7) -> torch.nn.Module:
    """Give every parameter and float buffer values without any symmetry."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                size = 0.25 if tensor.ndim < 2 else 1 / math.sqrt(max(tensor.shape[-2:]))
                noise = torch.randn(tensor.shape, generator=generator) * size
                tensor.copy_((tensor if tensor.ndim < 2 else 0 * tensor) + noise)
    return model.eval()


def widen_state(
    layout: ModelLayout, state: Mapping[str, torch.Tensor], factors: Mapping[str, int], *, on_disk: bool
) -> dict[str, torch.Tensor]:
    """Copy-copy widening of named tensors, from the layout alone."""
    growth = {a: Growth(layout.axes[a].size, layout.axes[a].size * f) for a, f in factors.items()}
    table = layout.disk_table if on_disk else layout.module_table
    result = {}
    for name, tensor in state.items():
        factors_on = [c for c in layout.compensations if c.tensor and c.axis in growth]
        own = [c for c in factors_on if NameTemplate(c.tensor).matches(layout.canonical(name))]
        pattern = table.find(layout.canonical(name))
        consumed = frozenset(c.axis for c in own if c.fan_in)
        copies = Treatment(vocab=Fill.COPY)
        view = view_of(pattern.dims, layout.sizes, growth, copies, consumed=consumed)
        offset = max((c.offset for c in own), default=0.0)
        scale = math.prod(multiplier(c, growth[c.axis].source, growth[c.axis].target) for c in own)
        result[name] = widen_tensor(tensor + offset, view, scale=scale, offset=-offset)
    return result


def multiplier(factor: Compensation, before: int, after: int) -> float:
    """What a tensor is multiplied by when an axis grows; roots in bfloat16 are torch's own."""
    if not factor.rounded:
        return float((after / before) ** factor.power)
    roots = torch.tensor([before, after], dtype=torch.float64).sqrt().bfloat16().double()
    return float((roots[1] / roots[0]) ** (2 * factor.power))


def widened_config(
    layout: ModelLayout, config: Mapping[str, Any], factors: Mapping[str, int]
) -> dict[str, Any]:
    """The config with every key of the layout written."""
    sizes = {a: n * factors.get(a, 1) for a, n in layout.sizes.items()}
    result = copy.deepcopy(dict(config))
    for key, value in layout.config_sizes(sizes).items():
        inner = result
        *path, last = key.split(".")
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = [value] * len(inner[last]) if isinstance(inner.get(last), list) else value
    return result


def logit_change_through_disk(
    config: Mapping[str, Any], layout: ModelLayout, factors: Mapping[str, int], folder: Path
) -> float:
    """Largest change of an old token's logit, relative to the largest, after widening a model's files."""
    from sparkling_cli.models.skeleton import build_model

    model: Any = shake(build_model(config, meta=False))
    ids = batch(model)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits.double()
    model.save_pretrained(folder / "small")
    written = json.loads((folder / "small" / "config.json").read_text())
    (folder / "wide").mkdir()
    state: dict[str, torch.Tensor] = {}
    for file in sorted((folder / "small").glob("*.safetensors")):
        state |= load_file(file)
    wide = {k: v.contiguous() for k, v in widen_state(layout, state, factors, on_disk=True).items()}
    save_file(wide, folder / "wide" / "model.safetensors", metadata={"format": "pt"})
    (folder / "wide" / "config.json").write_text(json.dumps(widened_config(layout, written, factors)))
    # the same attention, which of Gemma 2 is another function in some versions of transformers
    attention = model.config._attn_implementation
    reloaded, info = type(model).from_pretrained(
        folder / "wide", attn_implementation=attention, output_loading_info=True
    )
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["mismatched_keys"], info["mismatched_keys"]
    with torch.no_grad():
        after = reloaded.eval()(input_ids=ids, use_cache=False).logits.double()
    after = after[..., : before.shape[-1]]
    return float((after - before).abs().max() / before.abs().max())


def batch(model: Any) -> torch.Tensor:
    """Random ids of two texts, (2, 9); of a decoder of codebooks two times a row for each, (2 books, 9)."""
    books = getattr(model.config.get_text_config(decoder=True), "num_codebooks", None)
    rows = 2 * books if books and "musicgen" in model.config.model_type else 2
    return torch.randint(5, 50, (rows, 9), generator=torch.Generator().manual_seed(3))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of a plain forward pass, to be compared bit for bit.

    Weights are laid anew, as the last bits depend on where in memory they lie (a file's header may put them
    anywhere); experts go by the class's own code, which takes every size.
    """
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


def small_config(model_type: str) -> dict[str, Any]:
    """A small config of the type, or skip: some defaults do not build, some classes want no text."""
    try:
        return shrink(default_config(model_type))
    except Exception as error:  # the library's own defaults may raise anything
        pytest.skip(f"no small model: {error}"[:200])


def small_layout(model_type: str) -> tuple[dict[str, Any], ModelLayout]:
    """A small config and what inference finds of it, or skip: it may refuse the class, with a reason."""
    config = small_config(model_type)
    try:
        return config, infer(config)
    except Exception as error:  # the library's own code may raise anything
        pytest.skip(f"no layout: {error}"[:200])


def surveyed(drawn: set[str]) -> list[str]:
    """Types of the library that a survey goes over: 60 by a fixed seed, all with ``SPARKLING_EVERY_CLASS=1``.

    Args:
        drawn: types that are among them in any case.
    """
    names = sorted(causal_lm_names())
    if os.environ.get("SPARKLING_EVERY_CLASS"):
        return names
    return sorted(drawn | set(random.Random(17).sample(names, 60)))
