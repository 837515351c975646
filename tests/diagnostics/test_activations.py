"""Activations measured from files, against forward hooks on models loaded by transformers itself."""

from __future__ import annotations

import json
import shutil
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diagnostics_support import opened
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D

from fixtures.tiny import ARCHITECTURES, make_model
from sparkling_cli.diagnostics.activations import measure, measure_change
from sparkling_cli.diagnostics.data import Tokens
from sparkling_cli.diagnostics.probe import Probe
from sparkling_cli.errors import CheckpointError, LayoutError, MissingDependencyError
from sparkling_cli.results.measured import Measurement
from sparkling_cli.results.verdict import offenders, verdict_of_change
from sparkling_cli.storage.read import TensorSource


def rms(*tensors: torch.Tensor) -> float:
    """Root mean square over all entries of all tensors, in float64."""
    flat = torch.cat([t.detach().double().reshape(-1) for t in tensors])
    return float(flat.square().mean().sqrt())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function ``arch -> directory`` of a tiny untrained model, saved by ``save_pretrained``."""
    made: dict[str, Path] = {}

    def make(arch: str) -> Path:
        if arch not in made:
            made[arch] = tmp_path_factory.mktemp(arch)
            make_model(arch).save_pretrained(made[arch])
        return made[arch]

    return make


def reference(directory: Path) -> nn.Module:
    """The model as ``from_pretrained`` loads it."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def tokens_for(model: nn.Module, length: int = 12) -> Tokens:
    """A few random tokens."""
    generator = torch.Generator().manual_seed(1)
    vocab = model.config.get_text_config().vocab_size  # type: ignore[union-attr]
    return Tokens(torch.randint(0, vocab, (3, length), generator=generator), "test tokens")


def hooked(model: nn.Module, ids: torch.Tensor) -> tuple[dict[str, tuple[float, float]], Any]:
    """RMS(x) and RMS(y) of every linear module by plain forward hooks, and the model's output."""
    seen: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))

    def hook(name: str) -> Any:
        def record(_: nn.Module, args: Any, output: torch.Tensor) -> None:
            seen[name][0].append(args[0])
            seen[name][1].append(output)

        return record

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids, use_cache=False)
    return {name: (rms(*xs), rms(*ys)) for name, (xs, ys) in seen.items()}, output


def check_layers(found: Measurement, expected: dict[str, tuple[float, float]]) -> None:
    """Every expected layer was measured with these RMS."""
    layers = {layer.name: layer for layer in found.layers}
    assert set(expected) <= set(layers)
    for name, (x, y) in expected.items():
        assert layers[name].x_rms == pytest.approx(x, rel=1e-5), name
        assert layers[name].y_rms == pytest.approx(y, rel=1e-5), name
        assert layers[name].r == pytest.approx(y / x, rel=1e-5), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_linear_layers_against_hooks(saved: Any, arch: str) -> None:
    """Linear and Conv1D layers, logits and loss are those of the model that transformers loads."""
    model = reference(saved(arch))
    tokens = tokens_for(model)
    expected, output = hooked(model, tokens.ids)
    found, _ = measure(opened(saved(arch)), tokens)
    check_layers(found, expected)
    assert found.logits_rms == pytest.approx(rms(output.logits), rel=1e-5)
    shifted = functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), tokens.ids[:, 1:].flatten(), reduction="mean"
    )
    assert found.loss == pytest.approx(float(shifted), rel=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_matrix_is_measured(saved: Any, arch: str) -> None:
    """Every parameter of 2 or more dims but embedding tables is in the report, with finite numbers."""
    model = reference(saved(arch))
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    wanted = {
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in embeddings
    } | {name for name, module in model.named_modules() if module is head}
    found, _ = measure(opened(saved(arch)), tokens_for(model))
    assert {layer.name for layer in found.layers} == wanted
    text = json.dumps(found.model_dump(mode="json"), allow_nan=False)
    assert "null" not in text
    assert found.stream[0].name == "embeddings"
    assert len(found.stream) == 1 + model.config.get_text_config().num_hidden_layers
    assert found.unused == ()


@pytest.mark.parametrize("arch", ["mixtral", "olmoe", "qwen3_moe"])
def test_fused_experts_by_hand(saved: Any, arch: str) -> None:
    """RMS of stacked experts over exactly the tokens that the router sends to each."""
    model = reference(saved(arch))
    tokens = tokens_for(model)
    calls: dict[str, tuple[Any, ...]] = {}

    def keep(name: str) -> Any:
        return lambda _module, args: calls.__setitem__(name, args)

    stacks = {name: module for name, module in model.named_modules() if hasattr(module, "gate_up_proj")}
    assert stacks
    for name, module in stacks.items():
        module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        model(input_ids=tokens.ids, use_cache=False)
    found, _ = measure(opened(saved(arch)), tokens)
    expected: dict[str, tuple[float, float]] = {}
    for name, module in stacks.items():
        hidden, chosen = calls[name][0], calls[name][1]
        parts: list[list[torch.Tensor]] = [[], [], [], []]
        for token, experts in zip(hidden, chosen, strict=True):
            for expert in experts.tolist():
                gate_up = module.gate_up_proj[expert] @ token
                gate, up = gate_up.chunk(2)
                inner = functional.silu(gate) * up
                values = (token, gate_up, inner, module.down_proj[expert] @ inner)
                for part, value in zip(parts, values, strict=True):
                    part.append(value)
        expected[f"{name}.gate_up_proj"] = (rms(*parts[0]), rms(*parts[1]))
        expected[f"{name}.down_proj"] = (rms(*parts[2]), rms(*parts[3]))
    check_layers(found, expected)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_residual_stream(saved: Any, arch: str) -> None:
    """The stream is the model's own hidden states: what goes into the blocks and what each gives out."""
    model = reference(saved(arch))
    tokens = tokens_for(model)
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    outputs: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []
    blocks[0].register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    for block in blocks:
        block.register_forward_hook(
            lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        model(input_ids=tokens.ids, use_cache=False)
    found, _ = measure(opened(saved(arch)), tokens)
    expected = [rms(inputs[0]), *(rms(output) for output in outputs)]
    assert [place.rms for place in found.stream] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("arch", ["llama", "mixtral", "qwen3_moe", "gpt2", "gemma3_text"])
def test_small_pieces_change_nothing(saved: Any, arch: str) -> None:
    """With a budget of a few hundred bytes every weight comes in by rows or experts: same numbers."""
    checkpoint = opened(saved(arch))
    tokens = tokens_for(reference(saved(arch)))
    whole, _ = measure(checkpoint, tokens)
    pieces, _ = measure(checkpoint, tokens, memory=2048)
    for a, b in zip(whole.layers, pieces.layers, strict=True):
        assert (a.name, b.x_rms, b.y_rms) == (
            b.name,
            pytest.approx(a.x_rms, rel=1e-5),
            pytest.approx(a.y_rms, rel=1e-5),
        )
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-5)


def test_conversions_of_the_oldest_transformers(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 5.0 a conversion answers with its tensors and what went wrong; the numbers are the same."""
    checkpoint = opened(saved("mixtral"))
    tokens = tokens_for(reference(saved("mixtral")))
    expected, _ = measure(checkpoint, tokens)
    real = WeightConverter.convert
    called: list[str] = []

    def of_5_0(self: WeightConverter, layer_name: str, **options: Any) -> Any:
        called.append(layer_name)
        made = real(self, layer_name, **options)
        return made if isinstance(made, tuple) else (made, {})

    monkeypatch.setattr(WeightConverter, "convert", of_5_0)
    found, _ = measure(checkpoint, tokens)
    assert called
    assert found == expected


def test_experts_are_read_once(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a layer's experts would fit into the budget but others are kept, no layer is read per expert."""
    checkpoint = opened(saved("mixtral"))
    model = reference(saved("mixtral"))
    stacked = max(p.numel() * 4 for name, p in model.named_parameters() if "experts" in name)
    tokens = tokens_for(model, length=40)
    read: dict[str, int] = defaultdict(int)
    real = TensorSource.weight

    def counted(self: TensorSource, name: str, **options: Any) -> torch.Tensor:
        found = real(self, name, **options)
        read[name] += found.numel()
        return found

    monkeypatch.setattr(TensorSource, "weight", counted)
    with Probe(checkpoint, memory=8 * stacked) as probe:
        probe._weights._kept_bytes = 1 << 40  # as if others had taken the room
        probe.run(tokens.ids)
    experts = [name for name in read if "experts" in name]
    assert len(experts) > 8
    for name in experts:
        assert read[name] == torch.Size(checkpoint.weight(name).shape).numel(), name


def test_weights_in_half_precision(saved: Any, tmp_path: Path) -> None:
    """Weights stored as bfloat16 are computed with in float32, as after ``from_pretrained(...).float()``."""
    make_model("llama", "bfloat16").save_pretrained(tmp_path)
    model = reference(tmp_path).float()
    tokens = tokens_for(model)
    expected, _ = hooked(model, tokens.ids)
    check_layers(measure(opened(tmp_path), tokens)[0], expected)


def test_change_between_two_checkpoints(saved: Any, tmp_path: Path) -> None:
    """A head scaled by 1.5 shows as 50% more in r of the head, in the logits, and nowhere else."""
    shutil.copytree(saved("llama"), tmp_path / "b")
    weights = load_file(tmp_path / "b" / "model.safetensors")
    weights["lm_head.weight"] *= 1.5
    save_file(weights, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    tokens = tokens_for(reference(saved("llama")))
    report, one, two = measure_change(opened(saved("llama")), opened(tmp_path / "b"), tokens)
    worst = report.worst(1)[0]
    assert worst.name == "lm_head"
    assert worst.deviation == pytest.approx(0.5, rel=1e-5)
    assert report.logit_change == pytest.approx(0.5, rel=1e-5)
    assert report.logit_largest == pytest.approx(0.5, rel=1e-5)
    assert report.logits.deviation == pytest.approx(0.5, rel=1e-5)
    assert offenders(report) == []  # no block does anything else
    assert "RMS of the logits moved by +50%" in str(verdict_of_change(report))
    assert (report.loss_before, report.loss_after) == (one.loss, two.loss)
    assert max(layer.moved for layer in report.layers if layer.name != "lm_head") < 1e-6
    assert max(place.moved for place in report.residual) < 1e-6


def test_missing_weight_and_wrong_shape(saved: Any, tmp_path: Path) -> None:
    """A checkpoint that does not fit its config is refused by name, not measured as if it did."""
    weights = load_file(saved("llama") / "model.safetensors")
    shutil.copy(saved("llama") / "config.json", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    wrong = {**weights, name: weights[name][:-1].clone()}
    save_file(wrong, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.*has shape"):
        Probe(opened(tmp_path))
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.*not among"):
        Probe(opened(tmp_path))


def test_no_model_and_no_transformers(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a config there is no model; without transformers the message says what to install."""
    shutil.copy(saved("llama") / "model.safetensors", tmp_path)
    with pytest.raises(LayoutError, match="no model can be built"):
        measure(opened(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[hf\]'") as caught:
        measure(opened(saved("llama")))
    assert "pip install" in str(caught.value)


def test_models_that_cannot_be_measured(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized weights, a config that the class refuses, a forward pass that fails: each says so."""
    plain = opened(saved("llama"))
    config = dict(plain.config or {})
    with pytest.raises(LayoutError, match="quantized"):
        measure(replace(plain, config={**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(LayoutError, match="cannot be built"):
        measure(replace(plain, config={**config, "hidden_act": "no such function"}))

    def failing(_config: dict[str, Any]) -> nn.Module:
        model = nn.Sequential(nn.Embedding(11, 3))
        model.forward = lambda _ids: 1 / 0  # type: ignore[method-assign]
        return model

    save_file({"0.weight": torch.zeros(11, 3)}, tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 11}))
    monkeypatch.setattr(sys.modules[__name__], "failing", failing, raising=False)
    with pytest.raises(LayoutError, match="ZeroDivisionError"):
        measure(opened(tmp_path), model=f"{__name__}:failing")


class Products(nn.Module):
    """A user's own model that multiplies by raw parameters in every way there is."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["width"]
        self.table = nn.Embedding(config["vocab_size"], width)
        self.blocks = nn.ModuleList([nn.Identity()])
        for name in ("matmul", "method", "at", "addmm", "einsum", "view"):
            self.register_parameter(name, nn.Parameter(torch.randn(width, width)))
        for name in ("bmm", "baddbmm", "sliced"):
            self.register_parameter(name, nn.Parameter(torch.randn(2, width, width)))
        self.register_buffer("offset", torch.arange(width) / width, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [sequences, tokens, vocab]."""
        x = self.blocks[0](self.table(ids) + self.offset)
        y = torch.matmul(x, self.matmul) + x.matmul(self.method) + x @ self.at
        flat = x.flatten(0, 1)
        y = y + torch.addmm(self.offset, flat, self.addmm).view_as(x)
        y = y + torch.einsum("bth,hk->btk", x, self.einsum)
        y = y + functional.linear(x, self.view.t().contiguous().view_as(self.view))
        pair = flat.expand(2, -1, -1)
        y = y + (torch.bmm(pair, self.bmm) + torch.baddbmm(pair, pair, self.baddbmm)).sum(0).view_as(x)
        for part in self.sliced:
            y = y + x @ part
        return functional.linear(y, self.table.weight)


def test_raw_parameters_in_every_kind_of_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each raw parameter is one layer with the RMS that the arithmetic by hand gives."""
    torch.manual_seed(0)
    config = {"width": 6, "vocab_size": 11}
    model = Products(config)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys.modules[__name__], "built", Products, raising=False)
    ids = torch.randint(0, 11, (2, 5))
    for memory in (1 << 20, 64):
        found, _ = measure(opened(tmp_path), Tokens(ids, "test"), model=f"{__name__}:built", memory=memory)
        with torch.no_grad():
            x = model.table(ids) + model.offset
            plain = {
                name: (rms(x), rms(x @ model.get_parameter(name)))
                for name in ("matmul", "method", "at", "einsum")
            }
            plain["addmm"] = (rms(x), rms(x @ model.addmm + model.offset))
            plain["view"] = (rms(x), rms(x @ model.view))
            plain["bmm"] = (rms(x), rms(*(x @ w for w in model.bmm)))
            plain["baddbmm"] = (rms(x), rms(*(x @ w + x for w in model.baddbmm)))
            plain["sliced"] = (rms(x), rms(*(x @ w for w in model.sliced)))
            logits = model(ids)
        check_layers(found, plain)
        assert {layer.name for layer in found.layers} == {*plain, "table"}
        assert found.logits_rms == pytest.approx(rms(logits), rel=1e-5)
