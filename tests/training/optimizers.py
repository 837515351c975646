"""Optimizers of real packages, as the table in docs/how-to/optimizers.md has them.

Each makes its state with its package's own code, and is asked to go on from the widened state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, HIDDEN, FFN = 160, 64, 96

#: from matrices inside the model and all other parameters to an optimizer; also how its steps are made
Make = Callable[[list[nn.Parameter], list[nn.Parameter]], Any]


@dataclass(frozen=True)
class Case:
    """An optimizer.

    Attributes:
        name: as in the table.
        package: that must be installed.
        make: from the model's matrices and its other parameters.
        old: largest difference of old entries' first ten updates from the unwidened run's, in shares of the
            largest update; None where they depend on the whole tensor by the optimizer's own formula.
        refused: words of the error, where it cannot be widened.
        what: what its state is, and becomes.
        quantized: its moments are; see ``test_updates_of_quantized_state``.
        matrices: it is given the matrices alone.
        graph: its steps need the graph of the gradients.
        new: copies part from their sources without the re-warmup.
    """

    name: str
    package: str
    make: Make
    what: str
    old: float | None = 0.0
    refused: str = ""
    quantized: bool = False
    matrices: bool = False
    graph: bool = False
    new: bool = True


def of(module: str, name: str, **options: Any) -> Make:
    """An optimizer class with one group of all parameters."""

    def make(matrices: list[nn.Parameter], others: list[nn.Parameter]) -> Any:
        found = __import__(module, fromlist=[name])
        return getattr(found, name)([*matrices, *others], **options)

    return make


def grouped(module: str, name: str, first: dict[str, Any], second: dict[str, Any], **options: Any) -> Make:
    """An optimizer class with the matrices in one group and all others in another."""

    def make(matrices: list[nn.Parameter], others: list[nn.Parameter]) -> Any:
        found = __import__(module, fromlist=[name])
        groups = [{"params": matrices, **first}, {"params": others, **second}]
        return getattr(found, name)(groups, **options)

    return make


def lookahead(matrices: list[nn.Parameter], others: list[nn.Parameter]) -> Any:
    """pytorch_optimizer's Lookahead around AdamW."""
    import pytorch_optimizer

    return pytorch_optimizer.Lookahead(torch.optim.AdamW([*matrices, *others], lr=1e-3, weight_decay=0.0))


def model(config: LlamaConfig | None = None, seed: int = 0) -> LlamaForCausalLM:
    """A tiny Llama, the same every time."""
    torch.manual_seed(seed)
    own = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config or own)


def parameters(net: nn.Module, case: Case) -> dict[str, nn.Parameter]:
    """Names and parameters in the order of the optimizer's."""
    named = dict(net.named_parameters())
    inner = {
        name: p for name, p in named.items() if p.ndim == 2 and "embed" not in name and "head" not in name
    }
    rest = {} if case.matrices else {name: p for name, p in named.items() if name not in inner}
    return {**inner, **rest}


def optimizer(net: nn.Module, case: Case) -> Any:
    """The case's optimizer on a model."""
    named = parameters(net, case)
    inner = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name and "head" not in name]
    made = case.make(inner, [p for p in named.values() if all(p is not q for q in inner)])
    if hasattr(made, "train"):
        made.train()
    return made


def batch(step: int) -> Tensor:
    """(4, 16) token ids of a step."""
    return torch.randint(VOCAB, (4, 16), generator=torch.Generator().manual_seed(step))


def train(net: nn.Module, made: Any, case: Case, steps: Sequence[int]) -> list[float]:
    """Losses of the steps."""
    losses = []
    for step in steps:
        net.zero_grad()
        loss = net(input_ids=batch(step), labels=batch(step)).loss
        loss.backward(create_graph=case.graph)
        made.step()
        losses.append(float(loss))
    return losses


def save(net: LlamaForCausalLM, made: Any, case: Case, root: Path) -> Path:
    """A checkpoint directory; the parameters' names are in the optimizer's groups."""
    net.save_pretrained(root)
    state = made.state_dict()
    holder = state if "param_groups" in state else next(v for v in state.values() if "param_groups" in v)
    names = iter(parameters(net, case))
    for group in holder["param_groups"]:
        group["param_names"] = [next(names) for _ in group["params"]]
    torch.save(state, root / "optimizer.pt")
    return root


def loaded(root: Path) -> LlamaForCausalLM:
    """The model of a checkpoint."""
    net: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(root, attn_implementation="eager")
    return net


def resumed(root: Path, case: Case) -> tuple[LlamaForCausalLM, Any]:
    """Model and optimizer, loaded by their own code."""
    net = loaded(root)
    made = optimizer(net, case)
    state = torch.load(root / "optimizer.pt", weights_only=False)
    for group in state.get("param_groups", ()):
        group.pop("param_names", None)
    made.load_state_dict(state)
    return net, made


def updates(
    net: nn.Module, made: Any, case: Case, grads: Callable[[int, str, torch.Size], Tensor]
) -> list[dict[str, Tensor]]:
    """Ten updates of every parameter, by gradients that are given."""
    found = []
    for step in range(10):
        named = parameters(net, case)
        before = {name: p.detach().clone() for name, p in named.items()}
        for name, p in named.items():
            p.grad = grads(step, name, p.shape)
        made.step()
        found.append({name: p.detach() - before[name] for name, p in named.items()})
    return found


W0 = {"weight_decay": 0.0}
PO = "pytorch_optimizer"
HB = "heavyball"
AO = "torchao.optim"
BNB = "bitsandbytes"
MOMENTS = "moments: zero where new"
BLOCKS = "moments in blocks: zero where new, a block that moves quantized anew"

CASES = [
    Case("AdamW (torch)", "torch", of("torch.optim", "AdamW", lr=1e-3, **W0), MOMENTS),
    Case("Muon (torch)", "torch", of("torch.optim", "Muon", lr=1e-3, **W0), MOMENTS, old=None, matrices=True),
    Case(
        "Adafactor (torch)", "torch", of("torch.optim", "Adafactor", lr=1e-3, **W0),
        "row and column means: the mean of the old ones where new", old=None,
    ),
    Case(
        "Adafactor (transformers)", "transformers",
        of("transformers.optimization", "Adafactor", lr=1e-3, relative_step=False, scale_parameter=False,
           clip_threshold=1e9),
        "row and column means: the mean of the old ones where new", old=1e-5,
    ),
    Case(
        "Adafactor with first moment (transformers)", "transformers",
        of("transformers.optimization", "Adafactor", lr=1e-3, relative_step=False, scale_parameter=False,
           beta1=0.9, clip_threshold=1e9),
        "as Adafactor; the first moment zero where new", old=1e-5,
    ),
    Case("Lion", "lion_pytorch", of("lion_pytorch", "Lion", lr=1e-4), MOMENTS),
    Case("CAME", "came_pytorch", of("came_pytorch", "CAME", lr=1e-3, **W0),
         "factors of two second moments: the mean where new", old=None),
    Case("schedule-free AdamW", "schedulefree", of("schedulefree", "AdamWScheduleFree", lr=1e-3, **W0),
         "z is a copy of the weight; moments zero where new", old=None),
    Case("schedule-free SGD", "schedulefree", of("schedulefree", "SGDScheduleFree", lr=1e-2, **W0),
         "z is a copy of the weight", old=None, new=False),
    Case("Prodigy", "prodigyopt", of("prodigyopt", "Prodigy", lr=1.0), "p0 is a copy of the weight",
         old=None),
    Case("Prodigy, sliced", "prodigyopt", of("prodigyopt", "Prodigy", lr=1.0, slice_p=11), "", refused="'s'"),
    Case("GrokAdamW", "grokadamw", of("grokadamw", "GrokAdamW", lr=1e-3),
         "moments: zero where new; its package does not find its state again after loading",
         old=None, new=False),
    Case("Muon (Keller Jordan's)", "muon",
         grouped("muon", "SingleDeviceMuonWithAuxAdam",
                 {"use_muon": True, "lr": 0.02, "momentum": 0.95, "weight_decay": 0.0},
                 {"use_muon": False, "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}),
         MOMENTS, old=None),
    Case("GaLore AdamW", "galore_torch",
         grouped("galore_torch", "GaLoreAdamW",
                 {"rank": 8, "update_proj_gap": 20, "scale": 0.25, "proj_type": "std"}, {}, lr=1e-3),
         "", refused="GaLoreProjector"),
    Case("APOLLO AdamW", "apollo_torch",
         grouped("apollo_torch", "APOLLOAdamW",
                 {"rank": 8, "update_proj_gap": 20, "scale": 1.0, "scale_type": "channel", "proj": "random",
                  "proj_type": "std"}, {}, lr=1e-3),
         "", refused="GradientProjector"),
    Case("AdamW, 32 bit", BNB, of("bitsandbytes.optim", "AdamW32bit", lr=1e-3, **W0), MOMENTS),
    Case("AdamW, paged, 32 bit", BNB, of("bitsandbytes.optim", "PagedAdamW32bit", lr=1e-3, **W0), MOMENTS),
    Case("Lion, 32 bit", BNB, of("bitsandbytes.optim", "Lion32bit", lr=1e-4, **W0), MOMENTS),
    Case("AdEMAMix (bitsandbytes)", BNB, of("bitsandbytes.optim", "AdEMAMix", lr=1e-3, **W0),
         "two first moments in one tensor: zero where new", old=1e-5),
    Case("AdamW, 8 bit", BNB, of("bitsandbytes.optim", "AdamW8bit", lr=1e-3, **W0), BLOCKS, quantized=True),
    Case("AdamW, paged, 8 bit", BNB, of("bitsandbytes.optim", "PagedAdamW8bit", lr=1e-3, **W0), BLOCKS,
         quantized=True),
    Case("Lion, 8 bit", BNB, of("bitsandbytes.optim", "Lion8bit", lr=1e-4, **W0), BLOCKS, quantized=True),
    Case("AdEMAMix, 8 bit", BNB, of("bitsandbytes.optim", "AdEMAMix8bit", lr=1e-3, **W0), BLOCKS,
         quantized=True),
    Case("AdamW, 8 bit (torchao)", AO, of(AO, "AdamW8bit", lr=1e-3, **W0), BLOCKS, quantized=True),
    Case("AdamW, 4 bit (torchao)", AO, of(AO, "AdamW4bit", lr=1e-3, **W0), BLOCKS, quantized=True),
    Case("AdamW, fp8 (torchao)", AO, of(AO, "AdamWFp8", lr=1e-3, **W0), BLOCKS, quantized=True),
    Case("AdEMAMix", PO, of(PO, "AdEMAMix", lr=1e-3), MOMENTS),
    Case("Adan", PO, of(PO, "Adan", lr=1e-3), MOMENTS),
    Case("SophiaH", PO, of(PO, "SophiaH", lr=1e-3), MOMENTS, old=None, graph=True),
    Case("Ranger", PO, of(PO, "Ranger", lr=1e-3), "slow_buffer is a copy of the weight", old=None),
    Case("Lookahead", PO, lookahead, "", refused="expected an optimizer's state dict"),
    Case("Muon (Moonlight's, of pytorch_optimizer)", PO,
         grouped(PO, "Muon", {"use_muon": True}, {"use_muon": False}, lr=1e-3), MOMENTS, old=None),
    Case("NorMuon", PO, grouped(PO, "NorMuon", {"use_muon": True}, {"use_muon": False}, lr=1e-3),
         "moments zero, the second moment's factor the mean where new", old=None),
    Case("SOAP", PO, of(PO, "SOAP", lr=1e-3, precondition_frequency=5),
         "preconditioners: the old block kept, new directions fresh", old=None),
    Case("Shampoo", PO, of(PO, "Shampoo", lr=1e-3, preconditioning_compute_steps=5),
         "preconditioners: the old block kept, new directions fresh", old=None),
    Case("Shampoo in blocks (ScalableShampoo)", PO, of(PO, "ScalableShampoo", lr=1e-3), "",
         refused="PreConditioner"),
    Case("SM3", PO, of(PO, "SM3", lr=1e-2), "a moment, and accumulators of rows and columns: zero where new",
         old=1e-5),
    Case("LAMB", PO, of(PO, "Lamb", lr=1e-3), MOMENTS, old=None),
    Case("GaLore (pytorch_optimizer's)", PO,
         grouped(PO, "GaLore",
                 {"rank": 8, "update_proj_gap": 20, "scale": 0.25, "projection_type": "std"}, {}, lr=1e-3),
         "", refused="GaLoreProjector"),
    Case("Dion", "dion",
         grouped("dion", "Dion", {"algorithm": "dion"}, {"algorithm": "adamw"}, lr=1e-3, rank_fraction=0.25,
                 weight_decay=0.0),
         "moments, and directions in which the momentum lies: zero where new; the rank stays", old=None),
    Case("Dion (its simple class)", "dion",
         grouped("dion", "DionSimple", {"algorithm": "dion"}, {"algorithm": "adamw"}, lr=1e-3, rank=16,
                 weight_decay=0.0),
         "as Dion, of columns always", old=None),
    Case("AdamW (heavyball)", HB, of(HB, "AdamW", lr=1e-3), MOMENTS),
    Case("AdEMAMix (heavyball)", HB, of(HB, "AdEMAMix", lr=1e-3), MOMENTS),
    Case("LaProp (heavyball)", HB, of(HB, "LaProp", lr=1e-3), MOMENTS),
    Case("schedule-free AdamW (heavyball)", HB, of(HB, "SFAdamW", lr=1e-3),
         "z is a copy of the weight; moments zero where new", old=None),
    Case("Muon (heavyball)", HB, of(HB, "Muon", lr=1e-3), MOMENTS, old=None),
    Case("SOAP (heavyball)", HB, of(HB, "SOAP", lr=1e-3),
         "preconditioners: the old block kept, new directions fresh", old=None),
]  # fmt: skip
