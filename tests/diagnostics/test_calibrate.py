"""Scaling ``calibrated``: every block adds to the stream what it added; the loss is no worse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.calibrated import Case, Texts, measured, moved, unwidened
from fixtures.tiny import make_model
from sparkling_cli import api
from sparkling_cli.diagnostics import calibrate as calibration
from sparkling_cli.errors import VerificationError
from sparkling_cli.plan.build import with_calibration
from sparkling_cli.plan.model import Calibration

#: checkpoint, axis, factor, pair; ``python -m benchmarks.calibrated`` goes over all of them, the long tests
#: over the first six
CASES = [
    ("dense-llama", "ffn", 1.5, "copy-copy"),
    ("dense-llama", "hidden", 1.25, "copy-copy"),
    ("moe-qwen3", "heads", 1.25, "copy-copy"),
    ("moe-qwen3", "ffn", 2, "random-copy"),
    ("dense-llama", "heads", 2, "random-copy"),
    ("moe-qwen3", "hidden", 2, "random-copy"),  # 2.6 % where embeddings' columns are as they are drawn
    ("dense-llama", "ffn", 2, "zero-copy"),
    ("dense-llama", "hidden", 2, "random-zero"),
    ("moe-qwen3", "hidden", 1.5, "copy-copy"),
    ("moe-qwen3", "heads", 2, "random-random"),
    ("moe-qwen3", "hidden", 2, "random-zero"),
    ("moe-qwen3", "heads", 2, "random-copy"),
    ("dense-llama", "hidden", 2, "random-copy"),
    ("dense-llama", "hidden", 2, "random-random"),
]


@pytest.mark.parametrize(
    ("checkpoint", "axis", "factor", "init"),
    [
        pytest.param(*c, marks=pytest.mark.slow if at < 6 else pytest.mark.survey)
        for at, c in enumerate(CASES)
    ],
)
def test_blocks_add_what_they_added(
    checkpoint: str, axis: str, factor: float, init: str, tmp_path: Path
) -> None:
    """R of every function within 2 % on held-out text, and the loss no worse than by the method's factors."""
    case = Case(checkpoint, axis, factor, init)
    texts = Texts.of(case.source, tmp_path)
    before = unwidened(case.source, texts.heldout)
    (rms,) = measured(case, "rms", texts, ["heldout"])
    fitted, heldout = measured(case, "calibrated", texts, ["fitted", "heldout"])
    assert moved(unwidened(case.source, texts.fitted), fitted) < 0.01
    assert moved(before, heldout) < 0.02
    assert None not in (rms.loss, heldout.loss)
    assert heldout.loss <= rms.loss + 1e-4  # type: ignore[operator]


@pytest.mark.parametrize(
    ("axis", "init", "giving"),
    [("hidden", "random-copy", ("o_proj", "down_proj")), ("ffn", "random-random", ("down_proj",))],
)
def test_new_entries_are_never_amplified(
    axis: str, init: str, giving: tuple[str, ...], tmp_path: Path
) -> None:
    """What is missing is made up for by old entries; new ones stay those of the method, or less."""
    asked: dict[str, Any] = {"axes": [{"axis": axis, "factor": 2}], "init": init}
    expanded("llama", tmp_path, **asked)
    api.expand(tmp_path / "small", tmp_path / "rms", report="none", **asked)
    old, rms, made = (load_file(tmp_path / f / "model.safetensors") for f in ("small", "rms", "wide"))
    raised = 0
    for name, before in old.items():
        if not name.endswith(tuple(f"{part}.weight" for part in giving)):
            continue
        rows, columns = before.shape
        new = torch.ones_like(made[name], dtype=torch.bool)
        new[:rows, :columns] = False
        factors = [float((made[name][of] / rms[name][of]).median()) for of in (~new, new)]
        raised += factors[0] > 1.05
        assert factors[1] == pytest.approx(min(factors[0], 1.0), rel=0.02), name
        for of, factor in zip((~new, new), factors, strict=True):
            assert torch.allclose(made[name][of], rms[name][of] * factor, rtol=1e-4, atol=1e-7), name
    assert raised


def test_new_columns_of_embeddings_add_no_more_than_old_ones(tmp_path: Path) -> None:
    """A table in which tokens that occur have short rows: drawn entries have the deviation of all of it."""
    model = make_model("llama")
    ids = np.random.default_rng(0).integers(0, 50, 512)
    with torch.no_grad():
        model.model.embed_tokens.weight[:50] *= 0.2
    model.save_pretrained(tmp_path / "small")
    np.save(tmp_path / "tokens.npy", ids)
    api.expand(
        tmp_path / "small",
        tmp_path / "wide",
        axes=[{"axis": "hidden", "factor": 2}],
        init="random-copy",
        scaling="calibrated",
        data=tmp_path / "tokens.npy",
        report="none",
    )
    api.verify(tmp_path / "small", tmp_path / "wide")
    table = load_file(tmp_path / "wide" / "model.safetensors")["model.embed_tokens.weight"][ids].double()
    old, new = table.chunk(2, 1)
    assert float(new.square().mean().sqrt()) == pytest.approx(float(old.square().mean().sqrt()), rel=0.01)


def test_how_well_ratios_are_known() -> None:
    """The standard error of the mean of what a ratio's logarithm moved by, over batches."""
    moved = np.random.default_rng(0).normal(0.01, 0.03, 16)
    before = calibration._Pass(1.0, {"f": 0.5}, None, [{"f": 0.2}] * 16, [256] * 16)
    after = calibration._Pass(1.0, {"f": 0.5}, None, [{"f": 0.2 + x} for x in moved], [256] * 16)
    assert before.error(after) == pytest.approx(moved.std(ddof=1) / 4)


def test_more_tokens_are_taken_where_ratios_differ(
    dense_checkpoint: Path, heldout_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as the standard error asks for, of what the file has; the plan's notes say how many."""
    monkeypatch.setattr(calibration, "SEQUENCES", 4)
    monkeypatch.setattr(calibration, "MOST", 9)
    axes = [{"axis": "ffn", "factor": 2}]
    plan = api.make_plan(dense_checkpoint, axes=axes, init="random-copy", scaling="calibrated").plan
    found = calibration.calibrate(plan, data=heldout_text, model=None, memory=1 << 28)
    note = with_calibration(plan, found).notes[-1]
    assert note.startswith(f"calibrated on {9 * 256:,} tokens")
    assert re.search(r"loss there 3\.\d+ before, 3\.\d+ widened, 3\.\d+ by --scaling rms$", note)


def expanded(kind: str, folder: Path, **asked: Any) -> dict[str, list[float]]:
    """A tiny model, calibrated: module -> RMS before and after, by its own hooks."""
    model = make_model(kind)
    model.save_pretrained(folder / "small")
    tokens = np.random.default_rng(0).integers(0, 101, (8, 64))
    np.save(folder / "tokens.npy", tokens.reshape(-1))
    api.expand(
        folder / "small",
        folder / "wide",
        scaling="calibrated",
        data=folder / "tokens.npy",
        report="none",
        allow_locked=True,
        **asked,
    )
    api.verify(folder / "small", folder / "wide")
    found: dict[str, list[float]] = {}
    for path in (folder / "small", folder / "wide"):
        wide = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        squares: dict[str, float] = {}

        def watch(name: str, found: Any, squares: dict[str, float] = squares) -> None:
            squares[name] = float((found[0] if isinstance(found, tuple) else found).square().mean())

        for name, module in wide.named_modules():
            if name.endswith((".attention", ".mlp", ".self_attn", "_feedforward_layernorm")):
                module.register_forward_hook(lambda _m, _a, out, name=name, watch=watch: watch(name, out))
            if re.search(r"layers\.\d+$", name):
                module.register_forward_pre_hook(lambda _m, a, name=name, watch=watch: watch(name, a))
        with torch.no_grad():
            wide(input_ids=torch.from_numpy(tokens))
        for name, square in squares.items():
            found.setdefault(name, []).append(square**0.5)
    return found


@pytest.mark.parametrize(("axis", "init"), [("ffn", "zero-copy"), ("heads", "random-zero")])
def test_functions_that_are_added_at_once_are_fitted_one_by_one(axis: str, init: str, tmp_path: Path) -> None:
    """GPT-NeoX adds attention and MLP to each other first: each adds what it added."""
    asked = [{"axis": axis, "factor": 2}] + [{"axis": "hidden", "factor": 2}] * (axis == "heads")
    found = expanded("gpt_neox", tmp_path, axes=asked, init=init)
    functions = [name for name in found if name.endswith((".attention", ".mlp"))]
    assert len(functions) == 4
    for name in functions:
        read = found[name.rpartition(".")[0]]
        ratios = [added / stream for added, stream in zip(found[name], read, strict=True)]
        assert ratios[1] == pytest.approx(ratios[0], rel=0.01), name


def test_what_a_norm_takes_out_again_is_left_alone(tmp_path: Path) -> None:
    """Gemma 2 norms what a function gives out: its weights get no factor, and what is added is kept."""
    found = expanded("gemma2", tmp_path, axes=[{"axis": "ffn", "factor": 2}], init="zero-copy")
    for name, (before, after) in found.items():
        if name.endswith("post_feedforward_layernorm"):
            assert after == pytest.approx(before, rel=1e-3)
    stage = json.loads((tmp_path / "wide" / "sparkling" / "manifest.json").read_text())["stages"][-1]
    assert stage["calibration"] == {}


def test_a_factor_on_a_norm_of_one_plus_w_is_on_the_whole_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tied head's factor goes into the final norm, here one that computes 1 + w; hidden stays."""
    name = "model.norm.weight"
    monkeypatch.setattr(calibration, "calibrate", lambda *_, **__: Calibration({name: 0.9}))
    expanded("gemma2", tmp_path, axes=[{"axis": "heads", "factor": 2}], init="random-copy")
    old, new = (load_file(tmp_path / f / "model.safetensors")[name].double() for f in ("small", "wide"))
    assert torch.allclose(1 + new, 0.9 * (1 + old), atol=1e-6)


@pytest.mark.parametrize(
    ("where", "words"), [("tensors", "down_proj"), ("manifest", "manifest.json was changed")]
)
def test_another_factor_is_found(
    where: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights with another factor than the manifest's, and a manifest with another than the weights'."""
    make_model("llama").save_pretrained(tmp_path / "small")
    np.save(tmp_path / "tokens.npy", np.arange(512) * 7 % 101)
    if where == "tensors":
        real = Calibration.of
        monkeypatch.setattr(Calibration, "of", lambda *args: real(*args) * 1.01)
    api.expand(
        tmp_path / "small",
        tmp_path / "wide",
        axes=[{"axis": "ffn", "factor": 2}],
        init="zero-copy",
        scaling="calibrated",
        data=tmp_path / "tokens.npy",
        report="none",
    )
    if where == "manifest":
        path = tmp_path / "wide" / "sparkling" / "manifest.json"
        data = json.loads(path.read_text())
        name = "model.layers.1.mlp.down_proj.weight"
        data["stages"][-1]["calibration"][name] *= 1.01
        path.write_text(json.dumps(data))
    with pytest.raises(VerificationError, match=words):
        api.verify(tmp_path / "small", tmp_path / "wide")


def test_factors_are_recorded_proved_and_the_same_again(
    moe_checkpoint: Path, heldout_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs are equal to the byte; verify finds the factors that the manifest records."""
    monkeypatch.setattr(calibration, "SEQUENCES", 8)
    for name in ("one", "two"):
        api.expand(
            moe_checkpoint,
            tmp_path / name,
            axes=[{"axis": "hidden", "factor": 1.5}, {"axis": "ffn", "factor": 1.5}],
            scaling="calibrated",
            data=heldout_text,
            report="none",
        )
    one, two = (
        {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
        for root in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two
    api.verify(moe_checkpoint, tmp_path / "one")
    data = json.loads((tmp_path / "one" / "sparkling" / "manifest.json").read_text())
    factors = data["stages"][-1]["calibration"]
    assert abs(factors["model.layers.0.mlp.experts.down_proj"] - 1) > 1e-4


def test_whole_factors_of_copies_are_left_alone(dense_checkpoint: Path, tmp_path: Path) -> None:
    """At 2x copy-copy nothing is to be made up for: the weights are those of ``rms``."""
    for scaling in ("rms", "calibrated"):
        asked = [{"axis": "ffn", "factor": 2}, {"axis": "hidden", "factor": 2}]
        api.expand(dense_checkpoint, tmp_path / scaling, axes=asked, scaling=scaling, report="none")
    name = "model.safetensors"
    assert (tmp_path / "rms" / name).read_bytes() == (tmp_path / "calibrated" / name).read_bytes()
