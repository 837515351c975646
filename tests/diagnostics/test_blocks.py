"""What blocks add to the residual stream, against arithmetic on the models that transformers loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diagnostics_support import opened
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from fixtures.tiny import ARCHITECTURES, make_model
from sparkling_cli.diagnostics.activations import measure, measure_change
from sparkling_cli.diagnostics.data import Tokens

#: Submodule of a block whose input is the stream between its two functions.
SECOND = {"gpt2": "ln_2", "gemma2": "pre_feedforward_layernorm", "gemma3_text": "pre_feedforward_layernorm",
          "olmo2": "mlp"}  # fmt: skip


def rms(tensor: torch.Tensor) -> float:
    """Root mean square over all entries, in float64."""
    return float(tensor.detach().double().square().mean().sqrt())


def first(value: Any) -> torch.Tensor:
    """A tensor, or the first of a tuple."""
    found: torch.Tensor = value[0] if isinstance(value, tuple) else value
    return found


def streams(directory: Path, arch: str, ids: torch.Tensor) -> list[tuple[float, float]]:
    """(RMS(h), RMS(f)) of every function, in order, from the inputs and outputs of modules alone."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    seen: dict[tuple[int, str], torch.Tensor] = {}
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _m, args, i=i: seen.__setitem__((i, "in"), args[0]))
        block.register_forward_hook(lambda _m, _a, out, i=i: seen.__setitem__((i, "out"), first(out)))
        for name, child in block.named_children():
            child.register_forward_pre_hook(
                lambda _m, args, i=i, name=name: seen.__setitem__(
                    (i, f"to {name}"), args[0] if args else None
                )
            )
            child.register_forward_hook(
                lambda _m, _a, out, i=i, name=name: seen.__setitem__((i, f"of {name}"), first(out))
            )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    found = []
    for i in range(len(blocks)):
        start, stop = seen[i, "in"], seen[i, "out"]
        if arch == "gpt_neox":  # both read the same stream
            outputs = [seen[i, "of mlp"], seen[i, "of attention"]]
            assert torch.allclose(start + sum(outputs), stop, atol=1e-5)
            found += [(rms(start), rms(output)) for output in outputs]
        else:
            middle = seen[i, f"to {SECOND.get(arch, 'post_attention_layernorm')}"]
            found += [(rms(start), rms(middle - start)), (rms(middle), rms(stop - middle))]
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_functions_of_blocks(arch: str, tmp_path: Path) -> None:
    """RMS of the stream and of what is added to it, whatever the class: norms before, behind, parallel."""
    make_model(arch).save_pretrained(tmp_path)
    ids = torch.randint(0, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    found, _ = measure(opened(tmp_path), Tokens(ids, "test tokens"))
    expected = streams(tmp_path, arch, ids)
    assert len(found.functions) == len(expected) == 2 * (len(found.stream) - 1)
    for function, (stream, added) in zip(found.functions, expected, strict=True):
        assert function.x_rms == pytest.approx(stream, rel=1e-4), function.name
        assert function.y_rms == pytest.approx(added, rel=1e-4), function.name
        assert function.r == pytest.approx(added / stream, rel=1e-4)
    names = {function.name.rpartition(".")[2] for function in found.functions}
    assert names in ({"self_attn", "mlp"}, {"attn", "mlp"}, {"attention", "mlp"})


def linear(width: int) -> nn.Linear:
    """A square matrix."""
    return nn.Linear(width, width, bias=False)


class Flat(nn.Module):
    """Matrices directly in the block, the sum made in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix, self.up, self.down = (
            nn.LayerNorm(width),
            linear(width),
            *map(linear, 2 * [width]),
        )

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """H + f(Norm h), twice."""
        h = h + self.mix(self.norm(h))
        out = self.down(functional.gelu(self.up(self.norm(h))))
        out += h
        return out


class Inside(nn.Module):
    """The submodule adds to the stream itself, as DBRX's and BLOOM's do, and scales what it adds."""

    class Part(nn.Module):
        """A norm, a matrix and the residual sum."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm, self.matrix = nn.LayerNorm(width), linear(width)

        def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """The stream, and something else."""
            return h + 0.5 * self.matrix(self.norm(h)), h

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = self.Part(width), self.Part(width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Two of them."""
        return self.two(self.one(h)[0])[0]


class Behind(nn.Module):
    """Norms behind the sums: the normed sum is the stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two, self.norm = linear(width), linear(width), nn.LayerNorm(width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Norm(h + f(h)), twice."""
        h = self.norm(h + self.one(h))
        return self.norm(h + self.two(h))


KINDS = {"flat": Flat, "inside": Inside, "behind": Behind}


class Own(nn.Module):
    """A user's model of two such blocks."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.table = nn.Embedding(config["vocab_size"], config["width"])
        self.blocks = nn.ModuleList(KINDS[config["kind"]](config["width"]) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits by the table itself."""
        h = self.table(ids)
        for block in self.blocks:
            h = block(h)
        return functional.linear(h, self.table.weight)


def own(config: dict[str, Any]) -> nn.Module:
    """The factory for ``--model``."""
    torch.manual_seed(0)
    return Own(config)


def by_hand(kind: str, block: Any, h: torch.Tensor) -> tuple[torch.Tensor, list[tuple[float, float]]]:
    """What a block gives out, and (RMS(h), RMS(f)) of its two functions, from the formulas."""
    if kind == "flat":
        first = block.mix(block.norm(h))
        middle = h + first
        second = block.down(functional.gelu(block.up(block.norm(middle))))
        return middle + second, [(rms(h), rms(first)), (rms(middle), rms(second))]
    if kind == "inside":
        first = 0.5 * block.one.matrix(block.one.norm(h))
        middle = h + first
        second = 0.5 * block.two.matrix(block.two.norm(middle))
        return middle + second, [(rms(h), rms(first)), (rms(middle), rms(second))]
    first = block.one(h)
    middle = block.norm(h + first)
    second = block.two(middle)
    return block.norm(middle + second), [(rms(h), rms(first)), (rms(middle), rms(second))]


@pytest.mark.parametrize("kind", KINDS)
def test_functions_in_a_class_of_ones_own(kind: str, tmp_path: Path) -> None:
    """Nothing is known of the class: no names, no submodules, the sum wherever it is made."""
    config = {"vocab_size": 11, "width": 6, "kind": kind}
    model = own(config)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = torch.arange(22).reshape(2, 11) % 11
    sys.modules.setdefault("test_blocks", sys.modules[__name__])
    found, _ = measure(opened(tmp_path), Tokens(ids, ""), model=f"{__name__}:own")
    expected = []
    with torch.no_grad():
        h = model.table(ids)
        for block in model.blocks:
            h, pairs = by_hand(kind, block, h)
            expected += pairs
    assert [(f.x_rms, f.y_rms) for f in found.functions] == [pytest.approx(e, rel=1e-5) for e in expected]


@pytest.mark.parametrize("arch", ["mixtral", "olmoe", "qwen3_moe"])
def test_routing_by_hand(arch: str, tmp_path: Path) -> None:
    """Share of tokens with the same top-k set, from the logits of the routers of both models."""
    paths = [tmp_path / "a", tmp_path / "b"]
    make_model(arch).save_pretrained(paths[0])
    make_model(arch).save_pretrained(paths[1])
    weights = load_file(paths[1] / "model.safetensors")
    torch.manual_seed(3)
    gate = next(name for name in weights if name.endswith("gate.weight") and ".0." in name)
    weights[gate] = weights[gate] + 0.3 * weights[gate].std() * torch.randn_like(weights[gate])
    save_file(weights, paths[1] / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(0, 60, (4, 32), generator=torch.Generator().manual_seed(2))
    sets = []
    for path in paths:
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        k = model.config.num_experts_per_tok
        with torch.no_grad():
            logits = model(input_ids=ids, output_router_logits=True, use_cache=False).router_logits
        sets.append([[frozenset(row.topk(k).indices.tolist()) for row in layer] for layer in logits])
    report, _, _ = measure_change(opened(paths[0]), opened(paths[1]), Tokens(ids, ""))
    expected = [
        sum(a == b for a, b in zip(one, two, strict=True)) / len(one) for one, two in zip(*sets, strict=True)
    ]
    assert [router.kept for router in report.routing] == pytest.approx(expected)
    assert all(router.tokens == ids.numel() for router in report.routing)
    assert 0.1 < expected[0] < 1
