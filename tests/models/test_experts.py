"""Growing the number of experts, held to the class's own forward pass and to the real Trainer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from inference_support import shake, small_layout, surveyed
from safetensors.torch import load_file
from training_support import Trained, reloaded, state_of, trained
from transformers import AutoModelForCausalLM

from fixtures import training
from sparkling_cli import api
from sparkling_cli.errors import SpecError
from sparkling_cli.models.skeleton import build_model

BOTH = [{"axis": "experts", "factor": 2}, {"axis": "experts_per_token", "factor": 2}]
HELD = BOTH[:1]
SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "num_experts_per_tok": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"model_type": "qwen3_moe", **SMALL, "num_experts": 6, "moe_intermediate_size": 10,
                  "head_dim": 8},
    "mixtral": {"model_type": "mixtral", **SMALL, "num_local_experts": 6, "intermediate_size": 10},
    "biases and sinks": {"model_type": "gpt_oss", **SMALL, "num_local_experts": 6, "intermediate_size": 10,
                         "head_dim": 8},
    "shared experts": {"model_type": "qwen2_moe", **SMALL, "num_experts": 6, "moe_intermediate_size": 10,
                       "shared_expert_intermediate_size": 14},
    "a correction bias": {"model_type": "glm4_moe", **SMALL, "n_routed_experts": 6,
                          "moe_intermediate_size": 10, "intermediate_size": 20, "first_k_dense_replace": 1,
                          "head_dim": 8},
}  # fmt: skip


def change(small: Trained, folder: Path) -> float:
    """Largest change of a logit after reloading, relative to the largest."""
    with torch.no_grad():
        before = reloaded(small, small.folder)(input_ids=small.ids, use_cache=False).logits.double()
        after = reloaded(small, folder)(input_ids=small.ids, use_cache=False).logits.double()
    return float((after - before).abs().max() / before.abs().max())


def check_copies(small: Trained, folder: Path) -> int:
    """Every parameter and its state, entry by entry: copies stand behind the old ones; how many grew."""
    wide = {name: p.detach().double() for name, p in reloaded(small, folder).named_parameters()}
    old_state, new_state = state_of(small.folder), state_of(folder)
    grown = 0
    for name, value in small.values.items():
        after = wide[name]
        old = value.to(after.dtype)
        copied = after.shape != old.shape
        grown += copied
        assert after.shape == ((2 * len(old), *old.shape[1:]) if copied else old.shape), name
        wanted = torch.cat([old, old]) if copied else old
        assert torch.allclose(after, wanted, rtol=1e-6, atol=0), name
        for slot, before in old_state.get(small.numbers.get(name, -1), {}).items():
            kept = new_state[small.numbers[name]][slot]
            zero = torch.cat([before, torch.zeros_like(before)]) if copied else before
            assert torch.equal(kept, zero), f"{name}: {slot}"
    return grown


@pytest.mark.parametrize("case", CONFIGS)
def test_doubled_together_everything_stays(case: str, tmp_path: Path) -> None:
    """Logits after reloading, weights and optimizer state, names and numbers in the config."""
    small = trained(CONFIGS[case], tmp_path / "small")
    found = api.expand(small.folder, tmp_path / "wide", axes=BOTH, report="none", threads=1)
    api.verify(small.folder, tmp_path / "wide")
    sizes = {name: p.numel() for name, p in reloaded(small, tmp_path / "wide").named_parameters()}
    idle = sum(size * 2 // 3 for name, size in sizes.items() if ".experts." in name)  # 4 of 12 work
    assert found.report is not None
    assert found.report.after.parameters == sum(sizes.values())
    assert found.report.after.active == sum(sizes.values()) - idle
    assert change(small, tmp_path / "wide") < 1e-5
    assert check_copies(small, tmp_path / "wide") >= 3
    old, new = (json.loads((f / "config.json").read_text()) for f in (small.folder, tmp_path / "wide"))
    changed = {key for key in old if old[key] is not None and new[key] != old[key]}
    assert len(changed) == 2 and all("experts" in key and new[key] == 2 * old[key] for key in changed)


@pytest.mark.parametrize("case", ["qwen3_moe", "mixtral"])
def test_experts_with_names_of_their_own(case: str, tmp_path: Path) -> None:
    """Weights alone, as the library writes them: each copy of an expert gets the next number."""
    shake(build_model(CONFIGS[case], meta=False)).save_pretrained(tmp_path / "small")
    result = api.expand(
        tmp_path / "small", tmp_path / "wide", axes=BOTH, report="none", threads=1, allow_locked=True
    )
    api.verify(tmp_path / "small", tmp_path / "wide")
    old, new = (load_file(tmp_path / f / "model.safetensors") for f in ("small", "wide"))
    extra = new.keys() - old.keys()
    assert len(extra) == 2 * 6 * 3  # layers, experts, matrices
    for name in extra:
        number = next(int(part) for part in name.split(".experts.")[1].split("."))
        assert torch.equal(new[name], old[name.replace(f".experts.{number}.", f".experts.{number - 6}.")])
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(tmp_path / f, experts_implementation="eager")(ids).logits
            for f in ("small", "wide")
        )
    assert torch.allclose(after, before, atol=1e-5 * float(before.abs().max()))
    assert result.report is not None
    assert sum(t.numel() for t in new.values()) == result.report.after.parameters


def test_held_the_router_may_have_noise(tmp_path: Path) -> None:
    """Experts alone: what is active stays; noise is on new router rows alone, of the size asked for."""
    config = {**CONFIGS["qwen3_moe"], "hidden_size": 128, "num_experts": 32}
    small = trained(config, tmp_path / "small")
    plain = api.expand(small.folder, tmp_path / "plain", axes=HELD, threads=1)
    found = api.expand(
        small.folder, tmp_path / "noisy", axes=HELD, router_noise=0.05, report="none", threads=1
    )
    api.verify(small.folder, tmp_path / "noisy")
    check_copies(small, tmp_path / "plain")
    assert plain.report is not None and plain.report.activations is not None
    first, second = plain.report.activations.routing
    assert first.kept == 1.0  # all chosen are copies of those chosen before; behind it the stream has moved
    assert second.kept > 0.97
    router = 2 * 32 * 128
    assert plain.report.after.active == plain.report.before.active + router  # type: ignore[operator]
    assert change(small, tmp_path / "plain") > 1e-3
    assert any("experts_per_token stays" in note for note in found.expansion.plan.notes)
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("plain", "noisy"))
    for name, value in one.items():
        if not name.endswith("mlp.gate.weight"):
            assert torch.equal(two[name], value), name
            continue
        assert torch.equal(two[name][:32], value[:32])
        noise = (two[name][32:] - value[32:]).double()
        spread = 0.05 * float(value[:32].double().std(correction=0))
        assert float(noise.std()) == pytest.approx(spread, rel=0.05)
        assert abs(float(noise.mean())) < 0.1 * spread


def test_copies_part_under_the_real_trainer(moe_checkpoint: Path, tmp_path: Path) -> None:
    """Kept and zero state makes copies of experts differ at once; copied state keeps them equal for ever."""
    apart = {}
    for treatment in ("asymmetric", "copy"):
        folder = tmp_path / treatment / "checkpoint-600"
        api.expand(
            moe_checkpoint,
            folder,
            axes=BOTH,
            optimizer=treatment,
            allow_locked=True,
            report="none",
            threads=1,
        )
        model = AutoModelForCausalLM.from_pretrained(folder)
        trainer = training.build_trainer("moe", tmp_path / f"{treatment}-run", model=model, stop_at=602)
        trainer.train(resume_from_checkpoint=str(folder))
        assert trainer.state.global_step == 602
        stacks = [p.detach() for name, p in model.named_parameters() if name.endswith("experts.down_proj")]
        assert len(stacks) == 3
        apart[treatment] = max(float((p[:16] - p[16:]).abs().max() / p.abs().max()) for p in stacks)
    assert apart["asymmetric"] > 1e-4
    assert apart["copy"] < 1e-6


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "groups": (
        {"model_type": "deepseek_v3", **SMALL, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
         "moe_intermediate_size": 10, "intermediate_size": 20, "first_k_dense_replace": 1, "kv_lora_rank": 8,
         "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
         "num_key_value_heads": 4},
        {"axes": BOTH},
        "first chooses among groups of experts",
    ),
    "per token alone": (CONFIGS["mixtral"], {"axes": BOTH[1:]}, "couples experts_per_token to experts"),
    "other factors": (
        CONFIGS["mixtral"],
        {"axes": [{"axis": "experts", "factor": 2}, {"axis": "experts_per_token", "factor": 3}]},
        "couples experts_per_token to experts",
    ),
    "a part of them": (CONFIGS["mixtral"], {"axes": [{"axis": "experts", "to": 9}]}, "no whole number"),
    "noise": (CONFIGS["mixtral"], {"axes": BOTH, "router_noise": 0.1}, "router_noise"),
    "a router for two": (
        {"model_type": "phimoe", **SMALL, "num_local_experts": 6, "intermediate_size": 10},
        {"axes": BOTH},
        "experts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused(case: str, tmp_path: Path) -> None:
    """Each in words that name what stands against it."""
    config, options, words = WRONG[case]
    shake(build_model(config, meta=False)).save_pretrained(tmp_path / "small")
    with pytest.raises(SpecError, match=words):
        api.expand(tmp_path / "small", tmp_path / "wide", report="none", allow_locked=True, **options)


#: Of all classes, which the survey goes over, the default tests take a few.
DRAWN = set(random.Random(5).sample(["granitemoe", "olmoe", "jamba", "minimax", "dots1", "ernie4_5_moe"], 2))


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(t, marks=() if t in DRAWN else pytest.mark.survey) for t in surveyed(DRAWN)],
)
def test_every_class_with_experts(model_type: str, tmp_path: Path) -> None:
    """A step of AdamW, doubled together, reloaded: logits within 1e-5 and all state; or refused in words."""
    config, layout = small_layout(model_type)
    if "experts" not in layout.axes:
        pytest.skip("no experts")
    if not layout.axes["experts"].widenable:
        assert len(layout.axes["experts"].reason) > 20
        pytest.skip(f"refused: {layout.axes['experts'].reason}"[:200])
    small = trained(config, tmp_path / "small")
    if model_type in BY_FILE:
        with pytest.raises(SpecError, match=r"axes\.experts: cannot be widened"):
            api.expand(small.folder, tmp_path / "wide", axes=BOTH, report="none", threads=1)
        return
    api.expand(small.folder, tmp_path / "wide", axes=BOTH, report="none", threads=1)
    assert change(small, tmp_path / "wide") < 1e-5
    assert check_copies(small, tmp_path / "wide")


#: Classes whose layout is a file of the package, in which the number of experts does not grow.
BY_FILE = {"granitemoehybrid"}


@pytest.mark.parametrize("names", ["module", "disk"])
@pytest.mark.parametrize("init", ["random-copy", "random-zero", "copy-copy"])
def test_copied_experts_copy_their_random_channels_too(init: str, names: str, tmp_path: Path) -> None:
    """Doubled with an inner width that is drawn: the same function as of the inner width alone."""
    small = trained(CONFIGS["mixtral"], tmp_path / "small")
    inner = [{"axis": "ffn", "factor": 2}]
    for folder, axes in (("inner", inner), ("both", [*inner, *BOTH])):
        to = tmp_path / folder
        api.expand(small.folder, to, axes=axes, init=init, names=names, report="none", threads=1)
        api.verify(small.folder, to)
    alone, both = (load_file(tmp_path / folder / "model.safetensors") for folder in ("inner", "both"))
    for name, tensor in both.items():
        if ".experts.gate_up_proj" in name or ".experts.down_proj" in name:
            assert torch.equal(tensor, torch.cat([alone[name], alone[name]])), name
        elif ".experts." in name:
            head, number, tail = name.split(".experts.")[0], *name.split(".experts.")[1].split(".", 1)
            assert torch.equal(tensor, alone[f"{head}.experts.{int(number) % 6}.{tail}"]), name
    with torch.no_grad():
        one, other = (
            reloaded(small, tmp_path / folder)(input_ids=small.ids).logits.double()
            for folder in ("inner", "both")
        )
    assert (one - other).abs().max() < 1e-6 * one.abs().max()
