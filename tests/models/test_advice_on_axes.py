"""What a refusal of an axis advises, followed to the letter, over published configs.

Every config is asked for every axis that a model may have. Advice that is followed must get on: it is
accepted, or what refuses then lies in the model. A sample by a fixed seed, or all
with ``SPARKLING_ALL_CONFIGS=1``.
"""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import pytest

from sparkling_cli import api
from sparkling_cli.errors import LayoutError, SpecError
from sparkling_cli.plan.resolve import offered_axes
from sparkling_cli.spec.sources import make_spec
from tests.models.test_whole_models import CONFIGS, sparse

pytestmark = pytest.mark.survey

SAMPLE = 10
EVERYWHERE = (
    "ffn", "expert_ffn", "shared_ffn", "hidden", "heads", "kv_heads", "q_per_kv", "head_dim", "experts",
    "experts_per_token", "vocab", "layers", "mamba_heads", "mamba_expand", "fnn", "hiden", "depth",
)  # fmt: skip
#: numbers of the tiny model, words of its search, and of code: none of them says what to do
NO_REASONS = re.compile(r"answers \{|no hypothesis ran|Traceback|not proved$|: None$")


def chosen() -> list[str]:
    """All of a few, else a sample."""
    names = sorted(CONFIGS)
    if os.environ.get("SPARKLING_ALL_CONFIGS") or len(names) <= SAMPLE:
        return names
    return sorted(random.Random(14).sample(names, SAMPLE))


def asked(root: Path, axes: dict[str, dict[str, float]]) -> SpecError | None:
    """What refuses a dry run; None if nothing does."""
    wanted = [{"axis": axis, **size} for axis, size in axes.items()]
    try:
        api.make_plan(root, spec=make_spec({"axes": wanted, "allow_locked": True}, "test"))
    except SpecError as error:
        return error
    return None


def advised(axis: str, hint: str) -> list[dict[str, dict[str, float]]]:
    """The requests that a hint proposes, word by word."""
    listed = re.fullmatch(r"axes that can be widened here: (.*)", hint)
    if listed is not None:
        return [{one: {"factor": 2.0}} for one in listed[1].split(", ") if one != "none"]
    meant = re.fullmatch(r"did you mean '(\w+)'\?", hint)
    if meant is not None:
        return [{meant[1]: {"factor": 2.0}}]
    if hint.startswith("choose one of these") or "cannot be widened" in hint:
        return []
    if "config's name for the axis" in hint:
        return [{one: {"factor": 2.0}} for one in re.findall(r"--axis (\w+)", hint)]
    joint = re.search(r"((?:--axis \w+ )+)--factor (\S+)$", hint)
    if joint is not None:
        return [{one: {"factor": float(joint[2])} for one in re.findall(r"--axis (\w+)", joint[1])}]
    sizes = re.findall(r"--axis (\w+) --to (\d+)", hint)
    if sizes:
        return [{one: {"to": int(size)}} for one, size in sizes]
    raise AssertionError(f"{axis}: it is not known how to follow {hint!r}")


@pytest.mark.parametrize("name", chosen())
def test_advice_is_followed(name: str, tmp_path: Path) -> None:
    """From every refusal one step leads on, or a second one that is about joint growth or a size."""
    sparse(name, tmp_path)
    try:
        layout = api.layout_of(tmp_path)
    except LayoutError as error:
        assert error.hint and not NO_REASONS.search(error.message)
        pytest.skip(f"refused: {error}"[:200])
    offered = offered_axes(layout)
    known: dict[str, SpecError | None] = {}  # most refusals advise the same

    def tried(request: dict[str, dict[str, float]]) -> SpecError | None:
        key = json.dumps(request)
        if key not in known:
            known[key] = asked(tmp_path, request)
        return known[key]

    for axis in dict.fromkeys((*EVERYWHERE, *layout.axes)):
        error = tried({axis: {"factor": 2.0}})
        assert (error is None) <= (axis in offered), axis
        if error is None:
            continue
        assert not NO_REASONS.search(error.message), error.message
        assert error.hint
        if "no such axis" in error.message:
            assert all(one in error.message for one in offered)
        for request in advised(axis, error.hint):
            then = tried(request)
            if then is not None:
                assert then.hint and re.search(r"couples|multiple of|spread over", then.message), then
                assert all(tried(more) is None for more in advised(axis, then.hint)), then
