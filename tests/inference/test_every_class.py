"""Every causal-LM class of the installed transformers: what is proved also holds through files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from inference_support import logit_change_through_disk

from sparkling_cli.errors import LayoutError
from sparkling_cli.inference.infer import infer
from sparkling_cli.inference.shrink import shrink
from sparkling_cli.inference.skeleton import causal_lm_names, default_config

pytestmark = pytest.mark.survey


def small_config(model_type: str) -> dict[str, Any]:
    """A small config of the type, or skip: some defaults do not build, some classes want no text."""
    try:
        return shrink(default_config(model_type))
    except Exception as error:  # the library's own defaults may raise anything
        pytest.skip(f"no small model: {error}"[:200])


@pytest.mark.parametrize("model_type", sorted(causal_lm_names()))
def test_all_proved_axes_at_once_survive_saving_and_loading(model_type: str, tmp_path: Path) -> None:
    """Every proved axis doubled, written under the names on disk, reloaded: logits within 1e-4."""
    config = small_config(model_type)
    try:
        layout = infer(config)
    except LayoutError as error:
        pytest.skip(f"refused: {error}"[:200])
    factors = {name: 2 for name, info in layout.axes.items() if info.widenable}
    if not factors:
        pytest.skip("no axis is proved")
    assert logit_change_through_disk(config, layout, factors, tmp_path) < 1e-4
