"""Every causal-LM class of the installed transformers: what is proved also holds through files."""

from __future__ import annotations

from pathlib import Path

import pytest
from inference_support import logit_change_through_disk, small_config

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.expr import COUNTED
from sparkling_cli.models.infer import infer
from sparkling_cli.models.skeleton import build_model, causal_lm_names, default_config, text_config

pytestmark = pytest.mark.survey

#: Types whose tensors have layouts that the language cannot say.
UNEXPLAINED = {
    "inkling2_text": "numbers in .* on disk",  # counted from another layer than the module's
}


@pytest.mark.parametrize("model_type", sorted(causal_lm_names()))
def test_all_proved_axes_at_once_survive_saving_and_loading(model_type: str, tmp_path: Path) -> None:
    """Every proved axis of width doubled, written under the names on disk, reloaded: logits within 1e-4.

    Growing what is counted has tests of its own: new tokens change the shape of the logits.
    """
    config = small_config(model_type)
    try:
        layout = infer(config)
    except LayoutError as error:
        pytest.skip(f"refused: {error}"[:200])
    factors = {name: 2 for name, info in layout.axes.items() if info.widenable and name not in COUNTED}
    if not factors:
        pytest.skip("no axis is proved")
    assert logit_change_through_disk(config, layout, factors, tmp_path) < 1e-4


@pytest.mark.parametrize("model_type", sorted(causal_lm_names()))
def test_what_is_proved_on_a_tiny_model_holds_for_the_default_config(model_type: str) -> None:
    """In real sizes, where some are equal that are not in the proof, every tensor still has one layout.

    A default config that does not build, or has no small model, is skipped: it is no checkpoint's.
    """
    small_config(model_type)
    config = default_config(model_type)
    try:
        build_model(text_config(config))
    except Exception as error:  # the library's own defaults may raise anything
        pytest.skip(f"the default config: {error}"[:200])
    if model_type in UNEXPLAINED:
        with pytest.raises(LayoutError, match=UNEXPLAINED[model_type]):
            infer(config)
    else:
        infer(config)
