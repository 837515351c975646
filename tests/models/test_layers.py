"""Growing the number of layers, held to the class's own forward pass, shapes and optimizer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from inference_support import logits, shake, small_layout, surveyed
from training_support import Trained, backward, in_double, reloaded, trained
from transformers import AutoModelForCausalLM, Trainer

from fixtures import training
from sparkling_cli import api
from sparkling_cli.errors import CheckpointError, SparklingError, SpecError
from sparkling_cli.forecast import Expansion, forecast, subject_of
from sparkling_cli.models.shrink import tokens
from sparkling_cli.models.skeleton import build_model
from sparkling_cli.spec.sources import make_spec
from sparkling_cli.training.history import read_history

TWICE = [{"axis": "layers", "factor": 2}]
SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "head_dim": 8,
}
MIXER = {"hidden_size": 32, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
         "pad_token_id": 0}  # fmt: skip
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL, "attention_bias": True, "mlp_bias": True},
    "norms behind": {"model_type": "olmo2", **SMALL},
    "sandwich, 1 + w": {"model_type": "gemma2", **SMALL, "layer_types": KINDS, "query_pre_attn_scalar": 8},
    "parallel": {"model_type": "gpt_neox", **SMALL},
    "transposed": {"model_type": "gpt2", "n_embd": 24, "n_layer": 3, "n_head": 4, "vocab_size": 61},
    "two matrices under one name": {"model_type": "ctrl", "n_embd": 24, "n_layer": 3, "n_head": 4, "dff": 20,
                                    "vocab_size": 61},
    "experts": {"model_type": "qwen3_moe", **SMALL, "num_experts": 6, "num_experts_per_tok": 2,
                "moe_intermediate_size": 10, "mlp_only_layers": [1]},
    "dense first": {"model_type": "glm4_moe", **SMALL, "n_routed_experts": 6, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 10, "first_k_dense_replace": 1},
    "lists": {"model_type": "smollm3", **SMALL, "no_rope_layers": [1, 0, 1], "layer_types": KINDS,
              "pad_token_id": 0, "use_sliding_window": True, "sliding_window": 4},
    "a hybrid, numbers": {"model_type": "bamba", **SMALL, **MIXER, "attn_layer_indices": [1]},
    "a hybrid, kinds": {"model_type": "granitemoehybrid", **SMALL, **MIXER, "num_local_experts": 4,
                        "num_experts_per_tok": 2, "shared_intermediate_size": 24,
                        "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "state spaces": {"model_type": "mamba", "hidden_size": 24, "num_hidden_layers": 3, "vocab_size": 61,
                     "state_size": 4},
}  # fmt: skip
#: what each class's lists and numbers are for the layers 0 0 1 1 2 2
LISTS: dict[str, dict[str, Any]] = {
    "sandwich, 1 + w": {"layer_types": [kind for kind in KINDS for _ in range(2)]},
    "experts": {"mlp_only_layers": [2, 3]},
    "dense first": {"first_k_dense_replace": 2},
    "a hybrid, numbers": {"attn_layer_indices": [2, 3]},
    "a hybrid, kinds": {
        "layer_types": [f"{kind}_attention" for kind in ("linear", "full", "linear") for _ in range(2)],
    },
    "lists": {
        "layer_types": [kind for kind in KINDS for _ in range(2)],
        "no_rope_layers": [1, 1, 0, 0, 1, 1],
    },
}


def numbered(name: str) -> tuple[str, int | None, str]:
    """A name up to its first number, that number, and the rest."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return name, None, ""
    return ".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :])


def numbers_of(model: Any) -> dict[str, int]:
    """Parameter -> its number in an optimizer that the Trainer makes for this model."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    names = [name for name, _ in model.named_parameters()]
    ordered = [n for n in names if n in decayed] + [n for n in names if n not in decayed]
    return {name: number for number, name in enumerate(ordered)}


def check_layers(small: Trained, folder: Path, order: list[int], *, silent: bool, copied: bool) -> int:
    """Weights and state of every layer against those of its source; how many tensors are silent."""
    wide = reloaded(small, folder)
    new = dict(wide.named_parameters())
    before = torch.load(small.folder / "optimizer.pt", weights_only=True)
    after = torch.load(folder / "optimizer.pt", weights_only=True)
    numbers = numbers_of(wide)
    own_numbers = [n for group in after["param_groups"] for n in group["params"]]
    assert own_numbers == list(range(len(new)))
    first = {source: order.index(source) for source in order}
    constants = 0
    for name, value in new.items():
        stack, layer, rest = numbered(name)
        source = name if layer is None else ".".join(filter(None, (stack, str(order[layer]), rest)))
        fresh = layer is not None and first[order[layer]] != layer
        old = small.values[source]
        if fresh and silent and not torch.allclose(value.double(), old, rtol=1e-6, atol=0):
            assert value.unique().numel() == 1 and value.flatten()[0].item() in (0.0, -1.0), name
            constants += 1
        else:
            assert torch.allclose(value.double(), old, rtol=1e-6, atol=0), name
        state = before["state"].get(small.numbers[source], {})
        assert after["state"].get(numbers[name], {}).keys() == state.keys(), name
        for slot, kept in state.items():
            zero = fresh and not copied and slot != "step"
            assert torch.equal(after["state"][numbers[name]][slot], torch.zeros_like(kept) if zero else kept)
    return constants


@pytest.mark.parametrize("case", CONFIGS)
def test_identity_keeps_every_bit_of_the_logits(case: str, tmp_path: Path) -> None:
    """Every class after reloading; weights, state, config; new layers learn from the first step on."""
    small = trained(CONFIGS[case], tmp_path / "small")
    found = api.expand(small.folder, tmp_path / "deep", axes=TWICE, report="none", threads=1)
    api.verify(small.folder, tmp_path / "deep")
    deep = reloaded(small, tmp_path / "deep")
    assert torch.equal(logits(deep, small.ids), logits(reloaded(small, small.folder), small.ids))
    assert check_layers(small, tmp_path / "deep", [0, 0, 1, 1, 2, 2], silent=True, copied=False) >= 3
    assert found.report is not None
    assert found.report.after.parameters == sum(p.numel() for p in deep.parameters())
    config = json.loads((tmp_path / "deep" / "config.json").read_text())
    assert config.get("num_hidden_layers", config.get("n_layer")) == 6
    for key, value in LISTS.get(case, {}).items():
        assert config[key] == value, key
    check_learning(deep, small.ids)


def check_learning(deep: Any, ids: torch.Tensor) -> None:
    """No silent tensor has a gradient of zero: a product of two zeros would have one for ever."""
    gradients = backward(deep, ids)
    for name, value in deep.named_parameters():
        if name in gradients and value.ndim and value.unique().numel() == 1 and value.numel() > 1:
            assert bool(gradients[name].any()), name


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({"layer_mode": "interleave"}, [0, 0, 1, 1, 2, 2]),
        ({"layer_mode": "stack"}, [0, 1, 2, 0, 1, 2]),
        ({"at": "end"}, [0, 1, 2, 0, 1, 2]),
        ({"at": [2, 0], "axes": [{"axis": "layers", "to": 6}]}, [0, 0, 0, 1, 2, 2]),
        ({"axes": [{"axis": "layers", "to": 5}]}, [0, 0, 1, 1, 2]),
        ({"axes": [{"axis": "layers", "to": 4}], "layer_mode": "stack"}, [0, 1, 2, 2]),
        ({"axes": [{"axis": "layers", "factor": 3}], "optimizer": "copy"}, [0, 0, 0, 1, 1, 1, 2, 2, 2]),
    ],
)
def test_where_new_layers_are(options: dict[str, Any], order: list[int], tmp_path: Path) -> None:
    """Modes, places and sizes; state by the treatment; the class's list of kinds with each layer."""
    small = trained(CONFIGS["sandwich, 1 + w"], tmp_path / "small")
    deep = tmp_path / "deep"
    api.expand(small.folder, deep, **{"axes": TWICE, **options}, report="none", threads=1)
    api.verify(small.folder, deep)
    silent = options.get("layer_mode", "identity") == "identity"
    constants = check_layers(small, deep, order, silent=silent, copied=options.get("optimizer") == "copy")
    assert constants == (2 * (len(order) - 3) if silent else 0)
    assert json.loads((deep / "config.json").read_text())["layer_types"] == [KINDS[i] for i in order]
    same = torch.equal(
        logits(reloaded(small, deep), small.ids), logits(reloaded(small, small.folder), small.ids)
    )
    assert same == silent
    births = read_births(deep)
    assert [stage > 0 for stage in births] == [i in order[:t] for t, i in enumerate(order)]


def source_of(name: str) -> str:
    """The parameter that an old one of the layers 0 0 1 1 2 2 was."""
    stack, layer, rest = numbered(name)
    return name if layer is None else f"{stack}.{layer // 2}.{rest}"


def read_births(folder: Path) -> list[int]:
    """The stage that every layer was born in, by the manifest."""
    manifest = json.loads((folder / "sparkling" / "manifest.json").read_text())
    return [stage for start, stop, stage in manifest["axes"]["layers"]["births"] for _ in range(start, stop)]


def test_with_widths_and_once_more(tmp_path: Path) -> None:
    """Layers and widths in one call, and again: the function stays; which entries re-warm, stage by stage."""
    small = trained(CONFIGS["llama"], tmp_path / "small")
    axes = [{"axis": "layers", "factor": 2}, {"axis": "ffn", "factor": 2}, {"axis": "hidden", "factor": 2}]
    baseline = {"type": "constant", "peak": 1e-3, "expansion_step": 10, "total_steps": 99, "warmup_steps": 2}
    first, second = tmp_path / "first", tmp_path / "second"
    options: dict[str, Any] = {"baseline": baseline, "report": "none", "threads": 1}
    api.expand(small.folder, first, axes=axes, **options)
    api.verify(small.folder, first)
    baseline["expansion_step"] = 20
    api.expand(first, second, axes=TWICE, at=[5], **options)
    api.verify(first, second)
    before, after = (logits(reloaded(small, folder), small.ids) for folder in (small.folder, second))
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5
    assert read_births(second) == [0, 1, 0, 1, 0, 1, 2, 2, 2, 2, 2, 2]
    history = read_history(second)
    model = reloaded(small, second)
    for name, parameter in model.named_parameters():
        layer = numbered(name)[1]
        region = history.region(name, tuple(parameter.shape))
        if layer is not None and layer % 2 and layer < 6:
            assert region.count(1) == parameter.numel(), name
        elif layer is not None and layer >= 6:
            assert region.count(2) == parameter.numel(), name
        else:
            assert region.count(2) == 0 and region.count(0) == small.values[source_of(name)].numel(), name


def test_the_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    """Threads and memory do not matter; a byte that is changed does, also in a new layer."""
    small = trained(CONFIGS["experts"], tmp_path / "small")
    folders = [tmp_path / "one", tmp_path / "three"]
    for folder, threads, memory in zip(folders, (1, 3), ("1G", "64M"), strict=True):
        api.expand(small.folder, folder, axes=TWICE, report="none", threads=threads, memory=memory)
    one, three = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders)
    assert one.keys() == three.keys()
    assert [str(path) for path in one if one[path] != three[path] and path.parent.name != "sparkling"] == []
    path = folders[0] / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(SparklingError, match="not what was written"):
        api.verify(small.folder, folders[0])


def _other_order(before: int, after: int) -> tuple[int, ...]:
    return tuple(min(target // 2 + target % 2, before - 1) for target in range(after))


FAULTS = {
    "other sources": ("sparkling_cli.layout.depth.spread", _other_order),
    "not silent": ("sparkling_cli.plan.build.silent_value", lambda layout, name: None),
    "old layers all": ("sparkling_cli.plan.build.is_new", lambda pattern, name, order: False),
    "another config": ("sparkling_cli.plan.config.deeper_config", lambda config, counts, order: {}),
    "births behind": (
        "sparkling_cli.manifest._births_in",
        lambda order, before, stage: [(0, 3, 0), (3, 6, stage)],
    ),
    "kinds in another order": (
        "sparkling_cli.plan.config.deeper_config",
        lambda config, counts, order: {"layer_types": config["layer_types"] * 2},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_finds_faults(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that were made wrongly, and agree with their own checksums."""
    small = trained(CONFIGS["sandwich, 1 + w"], tmp_path / "small")
    with monkeypatch.context() as patch:
        patch.setattr(*FAULTS[fault])
        if fault == "another config":
            patch.setattr("sparkling_cli.api._check_opens", lambda *args: None)
        api.expand(small.folder, tmp_path / "deep", axes=TWICE, report="none", threads=1)
    with pytest.raises(SparklingError):
        api.verify(small.folder, tmp_path / "deep")


def test_the_trainer_goes_on(dense_checkpoint: Path, tmp_path: Path) -> None:
    """The real Trainer resumes with the source's optimizer: new layers leave silence, old state counts."""
    folder = tmp_path / "deep" / "checkpoint-600"
    api.expand(dense_checkpoint, folder, axes=TWICE, report="none", threads=1)
    start, model = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    trainer = training.build_trainer("dense", tmp_path / "run", model=model, stop_at=602)
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == 602
    silent = [n for n, p in start.named_parameters() if not bool(p.any())]
    assert len(silent) == 3 * 2
    assert all(bool(dict(model.named_parameters())[name].any()) for name in silent)


def test_kinds_by_number_stay_in_their_places(tmp_path: Path) -> None:
    """A class whose layers depend on their number: whole periods behind the others; elsewhere refused."""
    config = {"model_type": "jamba", **SMALL, **MIXER, "num_hidden_layers": 4, "num_experts": 4,
              "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "num_experts_per_tok": 2, "expert_layer_offset": 1, "use_mamba_kernels": False}  # fmt: skip
    small = trained(config, tmp_path / "small")
    with pytest.raises(SpecError, match="depends on its number"):
        api.expand(small.folder, tmp_path / "deep", axes=TWICE, report="none")
    api.expand(small.folder, tmp_path / "deep", axes=TWICE, at="end", report="none", threads=1)
    api.verify(small.folder, tmp_path / "deep")
    one, two = (logits(reloaded(small, f), small.ids) for f in (small.folder, tmp_path / "deep"))
    assert torch.equal(one, two)


def test_what_a_plan_says(tmp_path: Path) -> None:
    """Parameters of the deeper model as the class has them, dense layers first and all."""
    config = build_model(CONFIGS["dense first"]).config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = make_spec({"axes": [{"axis": "layers", "to": 5}]})
    found = forecast(subject_of(tmp_path / "config.json"), [Expansion(500, spec)], 1000)
    for phase, changed in zip(
        found.phases, ({}, {"num_hidden_layers": 5, "first_k_dense_replace": 2}), strict=True
    ):
        model = build_model({**config, **changed})
        assert phase.parameters == sum(p.numel() for p in model.parameters())


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "norms on the stream itself": (
        {"model_type": "bert", **SMALL, "is_decoder": True},
        {"axes": TWICE},
        "still changes the logits",
    ),
    "no such layer": (CONFIGS["llama"], {"axes": TWICE, "at": [3]}, "no layer 3"),
    "places of their own": (CONFIGS["llama"], {"axes": TWICE, "at": [1], "layer_mode": "stack"}, "at places"),
    "nothing grows": (CONFIGS["llama"], {"axes": [{"axis": "ffn", "factor": 2}], "at": "end"}, "not grow"),
    "fitted on tokens": (CONFIGS["llama"], {"axes": TWICE, "scaling": "calibrated"}, "calibrated"),
    "dense ones first": (CONFIGS["dense first"], {"axes": TWICE, "layer_mode": "stack"}, "first_k_dense"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused(case: str, tmp_path: Path) -> None:
    """Each in words that name what stands against it."""
    config, options, words = WRONG[case]
    shake(build_model(config, meta=False)).save_pretrained(tmp_path / "small")
    with pytest.raises(SparklingError, match=words):
        api.expand(tmp_path / "small", tmp_path / "deep", report="none", **options)
    assert not (tmp_path / "deep").exists()


def test_experts_that_hand_on_their_input_are_refused() -> None:
    """Which only tokens that are routed to them can show."""
    _, layout = small_layout("longcat_flash")
    assert "still changes the logits" in layout.axes["layers"].reason
    assert not layout.axes["layers"].widenable


def test_copies_of_weights_elsewhere_are_refused(tmp_path: Path) -> None:
    """An average of the weights has no place for new layers."""
    small = trained(CONFIGS["llama"], tmp_path / "small")
    torch.save({name: value.clone() for name, value in small.values.items()}, small.folder / "ema.pt")
    with pytest.raises(CheckpointError, match=r"ema\.pt.*is of one layer"):
        api.expand(small.folder, tmp_path / "deep", axes=TWICE, report="none")


#: Of all classes, which the survey goes over, the default tests take a few.
DRAWN = set(random.Random(3).sample(["falcon", "stablelm", "exaone4", "jetmoe", "dbrx", "phi", "glm4"], 2))


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(t, marks=() if t in DRAWN else pytest.mark.survey) for t in surveyed(DRAWN)],
)
def test_every_class(model_type: str, tmp_path: Path) -> None:
    """Identity: the same logits bit by bit; interleaved and stacked: the class's own names and shapes."""
    config, layout = small_layout(model_type)
    layers = layout.axes.get("layers")
    if layers is None or not layers.widenable:
        assert layers is None or len(layers.reason) > 20
        pytest.skip(f"refused: {layers.reason if layers else 'no layers in its names'}"[:200])
    model: Any = shake(build_model(config, meta=False))
    ids = tokens(config)
    model = in_double(model, ids)
    model.save_pretrained(tmp_path / "small")
    small = Trained(model, {}, tmp_path / "small", {}, ids)
    before = logits(in_double(reloaded(small, small.folder), ids), ids)
    ways: list[dict[str, Any]] = [{"layer_mode": "interleave"}, {"layer_mode": "stack"}]
    ways += [{"at": "end"}, {"at": [layers.size - 1]}] if layout.numbered else [{"at": "even"}]
    kept = 0
    for number, options in enumerate(ways):
        folder = tmp_path / str(number)
        try:
            api.expand(small.folder, folder, axes=TWICE, report="none", threads=1, **options)
        except SparklingError as error:  # another kind of layer stands in that place, or first ones are apart
            told = "own class" in error.message or " layers apart" in error.message
            assert told or layout.numbered, error
            continue
        deep = in_double(reloaded(small, folder), ids)
        if "at" in options:
            assert torch.equal(logits(deep, ids), before)
            kept += 1
    assert kept
