"""Steps of tensors that carry a factor for the model's width, kept as they were before it grew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from sparkling_cli import api
from sparkling_cli.errors import SparklingError, SpecError
from sparkling_cli.layout.file import from_dict
from sparkling_cli.schedule.rewarmup import add_stage, read_rewarmup
from sparkling_cli.training import History, Piece, rewarm
from tests.training import reference as ref

CARRIED = (ref.H / ref.H0) ** -0.5


def history(tensor: str = "embed.weight", power: float = -0.5) -> History:
    """The reference's, whose model multiplies by a number that follows from hidden."""
    rewarmup = add_stage(None, ref.BASE, ref.TE, rho=1.3, steps=20, betas=(0.9, 0.999), keep_step=True)
    made = ref.history_of(rewarmup)
    compensate = [{"axis": "hidden", "tensor": tensor, "power": power}]
    return History(from_dict({**ref.LAYOUT, "compensate": compensate}, "test"), made.births, rewarmup)


@pytest.mark.parametrize("kind", [AdamW, Adam])
def test_100_steps_equal_a_rate_of_its_own(kind: type[Optimizer]) -> None:
    """Separate parameters in groups of their own, the embedding's at that part of the rate (1e-10)."""
    decay = 0.1 if kind is AdamW else 0.0

    def make(params: Any) -> Optimizer:
        return kind(params, lr=ref.BASE.peak, weight_decay=decay)

    net, optimizer, sched = ref.expanded(make)
    split, plain, _ = ref.split_reference(net, optimizer, make)
    groups, rates = [], []
    for half, rate in ((split.old, ref.BASE), (split.new, ref.eta_new)):
        for own in (False, True):
            params = [p for name, p in half.items() if (name == "embed/weight") == own]
            by = CARRIED if own else 1.0
            groups.append({"params": params, "weight_decay": decay / by, "initial_lr": 1.0})
            rates.append(lambda t, rate=rate, by=by: by * rate(t))
    reference = make(groups)
    reference.state.update(plain.state)
    ref_sched = LambdaLR(reference, rates, last_epoch=ref.TE - 1)
    rewarm(optimizer, net, history(), announce=False)
    ours = ref.steps(net, optimizer, sched, ref.TE, ref.TE + 100)
    for _ in zip(ours, ref.steps(split, reference, ref_sched, ref.TE, ref.TE + 100), strict=True):
        pass
    assert ref.distance(ref.parameters(net), split.whole()) < 1e-10


def test_of_a_matrix_that_muon_steps() -> None:
    """Both at once: the factor of the shape, and that of the width."""
    found = []
    for tensor in ("embed.weight", "down.weight"):
        net = ref.model()
        muon = torch.optim.Muon([net.down.weight], lr=1.0, weight_decay=0.0)
        muon.state[net.down.weight]["momentum_buffer"] = torch.ones_like(net.down.weight)
        rewarm(muon, net, history(tensor), announce=False)
        start = net.down.weight.detach().clone()
        net.down.weight.grad = torch.eye(ref.F, dtype=torch.float64)[: ref.H]
        muon.step()
        found.append(net.down.weight.detach() - start)
    assert torch.allclose(found[1], CARRIED * found[0], rtol=1e-12)


def test_other_optimizers_are_refused() -> None:
    """By the tensor's name; flat tensors too, and coarse ones."""
    net = ref.model()
    with pytest.raises(SparklingError, match=r"Lion steps embed\.weight, which carries a factor of 0\.791"):
        rewarm(Lion(net.parameters()), net, history())
    flat = nn.Parameter(torch.zeros(ref.V * ref.H))
    piece = Piece("embed.weight", (ref.V, ref.H), 0, ref.V * ref.H, flat, 0)
    with pytest.raises(SpecError, match=r"embed\.weight lies in a flat tensor"):
        rewarm(AdamW([flat]), [piece], history())
    coarse = ref.model(dtype=torch.bfloat16)
    with pytest.raises(SparklingError, match=r"AdamW steps torch\.bfloat16 parameters"):
        rewarm(AdamW(coarse.parameters()), coarse, history())


SIZES = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip
#: class, its own options, the tensor that carries a factor, and how far the same step moves what it makes
MODELS: dict[str, tuple[dict[str, Any], str, float]] = {
    "gemma": ({"head_dim": 8, "num_key_value_heads": 2}, "model.embed_tokens.weight", 2**0.5),
    "minicpm3": (
        {
            "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4, "v_head_dim": 8, "dim_model_base": 16,
        },
        "lm_head.weight",
        0.5,
    ),
}  # fmt: skip


def trained(name: str, root: Path) -> Path:
    """A checkpoint of a real class after two steps of AdamW."""
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**SIZES, **MODELS[name][0]))
    made = AdamW(net.parameters(), lr=1e-3)
    for step in range(2):
        tokens = torch.randint(101, (2, 8), generator=torch.Generator().manual_seed(step))
        net(input_ids=tokens, labels=tokens).loss.backward()
        made.step()
        made.zero_grad()
    net.save_pretrained(root)
    torch.save(made.state_dict(), root / "optimizer.pt")
    return root


def moved(root: Path, tensor: str, by: float) -> float:
    """RMS by which what the tensor makes moves when the narrow model's entries of it move by that much."""
    net = AutoModelForCausalLM.from_pretrained(root, attn_implementation="eager", dtype=torch.float64)
    tokens = torch.arange(6)[None]
    seen: list[Tensor] = []
    if "head" not in tensor:
        first = net.model.layers[0]
        first.register_forward_pre_hook(lambda _m, args: seen.append(args[0][..., : SIZES["hidden_size"]]))
    outputs = []
    for change in (0.0, by):
        with torch.no_grad():
            net.get_parameter(tensor)[:, : SIZES["hidden_size"]] += change
            logits = net(input_ids=tokens).logits
        outputs.append(seen.pop() if seen else logits)
    return float((outputs[1] - outputs[0]).square().mean().sqrt())


@pytest.mark.parametrize("name", MODELS)
def test_real_models(name: str, tmp_path: Path) -> None:
    """The note has the number that their forward passes have; the step is kept where it was asked for."""
    _, tensor, further = MODELS[name]
    source = trained(name, tmp_path / "narrow")
    schedule = {"type": "constant", "warmup_steps": 0, "peak": 1e-3, "total_steps": 99, "expansion_step": 2}
    found = api.expand(
        source, tmp_path / "wide", axes={"hidden": 2}, scaling="function", report="none", baseline=schedule,
        keep_step=True,
    )  # fmt: skip
    notes = [note for note in found.report.notes if "follows from its width" in note]
    assert len(notes) == 1 and tensor in notes[0] and f"moves it {further:.2f} times" in notes[0]
    ratio = moved(tmp_path / "wide", tensor, 1e-3) / moved(source, tensor, 1e-3)
    assert ratio == pytest.approx(further, rel=1e-4)

    assert read_rewarmup(tmp_path / "wide").kept_since == 1
    steps = []
    for keep in (False, True):
        net = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", attn_implementation="eager")
        made = AdamW(net.parameters(), lr=1e-3, weight_decay=0.0)
        made.load_state_dict(torch.load(tmp_path / "wide" / "optimizer.pt"))
        if keep:
            rewarm(made, net, tmp_path / "wide", announce=False)
        start = net.get_parameter(tensor).detach().clone()
        tokens = torch.randint(101, (2, 8), generator=torch.Generator().manual_seed(9))
        net(input_ids=tokens, labels=tokens).loss.backward()
        made.step()
        steps.append((net.get_parameter(tensor).detach() - start)[:, : SIZES["hidden_size"]])
    decayed = start[:, : SIZES["hidden_size"]] * 1e-3 * made.param_groups[0]["weight_decay"]
    assert torch.allclose(steps[1] + decayed, (steps[0] + decayed) / further, rtol=1e-3, atol=1e-7)
