"""The main promise, end to end: widened by copies at whole factors, a model computes what it did.

Every checkpoint is the real Trainer's, with optimizer state from real steps; every output is loaded by
``from_pretrained`` and run; nothing of the package is used to judge it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer

from fixtures.tiny import ARCHITECTURES
from sparkling_cli import api
from sparkling_cli.errors import SpecError
from sparkling_cli.results.verdict import offenders, verdict_of_change
from tests.conftest import TinyCheckpoint

#: relative to the largest logit, float32
TOLERANCE = 1e-5


def loaded(path: Path) -> nn.Module:
    """The model as a user loads it; no weight may be missing, unexpected or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[problem], f"{path.name}: {problem}: {info[problem]}"
    result: nn.Module = model.eval()
    return result


def logits(model: nn.Module) -> torch.Tensor:
    """Float32 logits on a few random sequences, the same for models of one vocabulary."""
    vocab = model.config.get_text_config().vocab_size  # type: ignore[union-attr]
    ids = torch.randint(0, vocab, (3, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found.float()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest change relative to the largest logit."""
    return float((a - b).abs().max() / a.abs().max())


def with_partners(source: Path, *axes: str) -> list[str]:
    """The axes and those that the class demands to be widened along with them."""
    known = api.layout_of(source).axes
    return list(dict.fromkeys(name for axis in axes for name in (axis, *known[axis].joint)))


def widened(source: Path, folder: Path, factor: float, axes: list[str], **options: Any) -> Path:
    """Widen by the API, without measuring."""
    target = folder / "wide"
    chosen = [{"axis": axis, "factor": factor} for axis in axes]
    api.expand(source, target, axes=chosen, report="none", **options)
    return target


@pytest.mark.parametrize("axes", [("ffn",), ("hidden",), ("ffn", "hidden")], ids="+".join)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_doubling_keeps_the_logits(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, arch: str, axes: tuple[str, ...]
) -> None:
    """At 2x the reloaded model gives the source's logits within 1e-5, tied or not, experts or not."""
    source = tiny_checkpoint(arch)
    target = widened(source, tmp_path, 2, with_partners(source, *axes))
    before, after = loaded(source), loaded(target)
    assert sum(p.numel() for p in after.parameters()) > sum(p.numel() for p in before.parameters())
    assert difference(logits(before), logits(after)) < TOLERANCE


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "gpt2"])
def test_tripling_keeps_the_logits(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, arch: str) -> None:
    """Every whole factor keeps the function."""
    source = tiny_checkpoint(arch)
    target = widened(source, tmp_path, 3, with_partners(source, "ffn", "hidden"))
    assert difference(logits(loaded(source)), logits(loaded(target))) < TOLERANCE


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_half_precision_keeps_the_loss(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, arch: str) -> None:
    """With bfloat16 weights the loss changes by less than 0.01 at 2x of everything."""
    source = tiny_checkpoint(arch, dtype="bfloat16")
    target = widened(source, tmp_path, 2, with_partners(source, "ffn", "hidden"))
    losses = []
    for path in (source, target):
        model = loaded(path)
        assert next(model.parameters()).dtype == torch.bfloat16
        vocab = model.config.get_text_config().vocab_size  # type: ignore[union-attr]
        ids = torch.randint(0, vocab, (4, 24), generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            losses.append(float(model.float()(input_ids=ids, labels=ids, use_cache=False).loss))
    assert abs(losses[1] - losses[0]) < 0.01


def numbered(saved: dict[str, Any], model: nn.Module) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
    """(name, parameter, state) of an ``optimizer.pt``, numbered as the Trainer numbers parameters."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    parameters = dict(model.named_parameters())
    order = [n for n in parameters if n in decayed] + [n for n in parameters if n not in decayed]
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    for name, i in zip(order, ids, strict=True):
        yield name, parameters[name].detach(), saved["state"][i]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_moments_lie_where_their_weights_lie(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, arch: str
) -> None:
    """Old moments are bit-equal at the places of their weights, new ones exactly zero.

    The source's first moments are replaced by its weights, and said to be moments all the same. Then,
    after widening, a moment that is not zero must equal the weight at its place but for the one factor of
    its tensor.
    """
    made = tiny_checkpoint(arch)
    source = tmp_path / made.name
    source.mkdir()
    for file in made.iterdir():
        if file.name != "optimizer.pt":
            (source / file.name).write_bytes(file.read_bytes())
    saved = torch.load(made / "optimizer.pt", weights_only=True)
    old: dict[str, torch.Tensor] = {}
    for name, parameter, state in numbered(saved, loaded(made)):
        old[name] = parameter
        state["exp_avg"].copy_(parameter)
    torch.save(saved, source / "optimizer.pt")

    axes = with_partners(source, "ffn", "hidden")
    target = widened(source, tmp_path, 2, axes, state={"exp_avg": "moment"})
    saved = torch.load(target / "optimizer.pt", weights_only=True)
    for name, parameter, state in numbered(saved, loaded(target)):
        moment = state["exp_avg"]
        assert moment.shape == parameter.shape == state["exp_avg_sq"].shape
        kept = moment != 0
        assert torch.equal(moment[kept].sort().values, old[name][old[name] != 0].sort().values), name
        assert int(torch.count_nonzero(state["exp_avg_sq"])) <= old[name].numel()
        if parameter.ndim >= 2:
            factors = parameter[kept] / moment[kept]
            assert float(factors.max() - factors.min()) < 1e-6 * float(factors.max()), name


FRACTIONAL = [("dense_checkpoint", 1.25), ("dense_checkpoint", 1.5), ("dense_checkpoint", 2.5)]
FRACTIONAL += [("moe_checkpoint", 1.25), ("moe_checkpoint", 1.5), ("moe_checkpoint", 2.5)]


def measured(source: Path, target: Path, data: Path) -> Any:
    """Activations of both on the fixtures' own text."""
    from sparkling_cli.diagnostics.activations import measure_change
    from sparkling_cli.diagnostics.data import Sample
    from sparkling_cli.formats.detect import open_checkpoint

    sample = Sample(data, sequences=16)
    report, _, _ = measure_change(open_checkpoint(source), open_checkpoint(target), sample)
    assert not report.random_tokens
    return report


@pytest.mark.parametrize(("checkpoint", "factor"), FRACTIONAL)
def test_fractional_factors_keep_the_signal(
    checkpoint: str, factor: float, tmp_path: Path, heldout_text: Path, request: pytest.FixtureRequest
) -> None:
    """At 1.25x, 1.5x and 2.5x ffn, copy-copy, r of Eq. 3 stays within 10% in every widened layer."""
    source: Path = request.getfixturevalue(checkpoint)
    report = measured(source, widened(source, tmp_path, factor, ["ffn"]), heldout_text)
    widened_layers = [c for c in report.layers if "mlp" in c.name and not c.name.endswith("mlp.gate")]
    assert len(widened_layers) >= 6
    assert {c.name: c.deviation for c in widened_layers if c.moved > 0.10} == {}


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        (["hidden"], {}),
        (["ffn"], {"init": "zero-copy"}),
        (["ffn"], {"init": "random-copy"}),
        (["ffn"], {"init": "random-zero"}),
        (["ffn"], {"init": "random-random"}),
    ],
    ids=["hidden", "zero-copy", "random-copy", "random-zero", "random-random"],
)
def test_other_widenings_are_reported(
    axes: list[str], options: dict[str, Any], tmp_path: Path, dense_checkpoint: Path, heldout_text: Path
) -> None:
    """Where the signal may move, every layer's and function's deviation is in the report.

    Functions of blocks whose ratio moved by more than 10% are named by kind, with the worst of each.
    """
    target = widened(dense_checkpoint, tmp_path, 1.5, with_partners(dense_checkpoint, *axes), **options)
    report = measured(dense_checkpoint, target, heldout_text)
    model = loaded(target)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {change.name for change in report.layers} == linear
    blocks = {name.rpartition(".")[0] for name in linear if "layers" in name}
    assert {change.name for change in report.functions} == blocks
    for entry in (*report.layers, *report.functions):
        moved = entry.y_after / entry.x_after / (entry.y_before / entry.x_before) - 1
        assert entry.deviation == pytest.approx(moved, abs=1e-9)
    far = [e for e in report.functions if abs(e.r_after / e.r_before - 1) > 0.10]
    assert {e.name for e in offenders(report)} == {e.name for e in far}
    verdict = verdict_of_change(report)
    assert (verdict.level == "attention") >= bool(far)
    for entry in far:
        assert f"{entry.role} in " in verdict.findings[0].text


@pytest.mark.parametrize(
    ("arch", "axis"),
    [("llama", "ffn"), ("gpt2", "ffn"), ("qwen3_moe", "ffn"), ("llama", "heads"), ("qwen3_moe", "heads")],
)
def test_columns_of_zeros_keep_the_logits_over_two_stages(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, arch: str, axis: str
) -> None:
    """Whatever the new rows are; a later expansion by copies doubles what there is."""
    source = tiny_checkpoint(arch)
    first, second = tmp_path / "first", tmp_path / "second"
    layout = api.layout_of(source)
    size = layout.axes[layout.aliases.get("expert_ffn", "ffn")].size + 4
    asked = [{"axis": axis, **({"to": size} if axis == "ffn" else {"factor": 2})}]
    api.expand(source, first, axes=asked, init="random-zero", scaling="function", report="none")
    api.expand(first, second, axes=[{"axis": axis, "factor": 2}], scaling="function", report="none")
    before = logits(loaded(source))
    for wide, narrow in ((first, source), (second, first)):
        assert difference(before, logits(loaded(wide))) < TOLERANCE
        api.verify(narrow, wide)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_columns_of_zeros_are_refused_behind_a_norm(tiny_checkpoint: TinyCheckpoint, arch: str) -> None:
    """It would divide by the size of random channels too; what the hint says works."""
    source = tiny_checkpoint(arch)
    asked = [{"axis": name, "factor": 2} for name in with_partners(source, "hidden")]
    with pytest.raises(SpecError, match="norm") as caught:
        api.make_plan(source, axes=asked, init="random-zero", scaling="function")
    assert caught.value.hint == "use --scaling calibrated, or --init copy-copy"
    api.make_plan(source, axes=asked, init="random-zero", scaling="calibrated")
    api.make_plan(source, axes=asked, init="copy-copy", scaling="function")


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3_moe"])
def test_padding_keeps_the_logits_and_every_new_channel_learns(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, arch: str
) -> None:
    """The recipe: to a size that is no multiple, random reads, zero writes, old entries as they are."""
    source = tiny_checkpoint(arch)
    layout = api.layout_of(source)
    axis = layout.aliases.get("expert_ffn", "ffn")
    size = layout.axes[axis].size + 4  # grouped products want multiples of 16 bytes
    options = {"init": "random-zero", "scaling": "function", "report": "none"}
    api.expand(source, tmp_path / "padded", axes=[{"axis": axis, "to": size}], **options)
    before, after = loaded(source), loaded(tmp_path / "padded")
    assert difference(logits(before), logits(after)) <= TOLERANCE
    ids = torch.arange(24)[None] % 50
    after(input_ids=ids, labels=ids).loss.backward()
    outputs = {"llama": "down_proj.weight", "gpt2": "mlp.c_proj.weight", "qwen3_moe": "experts.down_proj"}
    moved = [p.grad for name, p in after.named_parameters() if name.endswith(outputs[arch])]
    assert moved
    for gradient in moved:
        new = gradient[-4:] if arch == "gpt2" else gradient[..., -4:]
        assert new.abs().max() > 0
