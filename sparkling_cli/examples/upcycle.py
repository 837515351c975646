"""A dense run as a mixture of one expert: ``python -m sparkling_cli.examples.upcycle SOURCE OUT``.

The output is a checkpoint of the mixture's own class that computes what the dense model computes: its only
expert is the MLP, with the MLP's optimizer state, and takes every token. ``sparkling expand`` gives it
copies. Weights are held in memory here, as by transformers; what the Trainer saves beside them is copied.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

from sparkling_cli.errors import CheckpointError, SparklingError

#: dense class -> the mixture that differs from it in the MLP alone, and what its config says of one expert
MIXTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("mixtral", {"num_local_experts": 1, "num_experts_per_tok": 1}),
    "qwen3": (
        "qwen3_moe",
        {"num_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": True, "mlp_only_layers": []},
    ),
}
#: keys of a config that say what it is of
_OWN = {"model_type", "architectures", "transformers_version", "_name_or_path"}
#: largest difference of a logit, in units of the largest logit
TOLERANCE = 1e-5


def upcycle(source: Path, out: Path) -> Path:
    """Write the checkpoint of one expert.

    Args:
        source: a directory that transformers' Trainer saved, with or without ``optimizer.pt``.
        out: where the checkpoint goes; must not exist.

    Returns:
        ``out``.

    Raises:
        CheckpointError: no mixture computes what this class computes, or the optimizer is of another model.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists", hint="name a new folder")
    dense = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    torch.manual_seed(0)
    moe = AutoModelForCausalLM.from_config(_config_of(dense.config, source), dtype=dense.dtype)
    parts = {name: _parts(name) for name, _ in moe.named_parameters()}
    values = dict(dense.named_parameters())
    left = sorted(values.keys() - {part for some in parts.values() for part in some})
    if left:
        raise CheckpointError(
            f"{source}: {moe.config.model_type} has no place for {left[0]}",
            hint="such a model is no mixture of this class",
        )
    with torch.no_grad():
        for name, param in moe.named_parameters():
            if parts[name]:  # a router of one row decides nothing, and stays as the class draws it
                param.copy_(_joined([values[part] for part in parts[name]], param.shape))
    _check(dense, moe)
    moe.save_pretrained(out)
    if (source / "optimizer.pt").is_file():
        saved = torch.load(source / "optimizer.pt", map_location="cpu", weights_only=True)
        torch.save(_state(saved, dense, moe, parts, source), out / "optimizer.pt")
    for path in source.iterdir():
        weights = path.name.startswith(("model", "pytorch_model")) or path.suffix == ".safetensors"
        if path.is_file() and not weights and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)
    return out


def _config_of(dense: Any, source: Path) -> Any:
    """The mixture's config: what the dense one says, and one expert of the MLP's width."""
    if dense.model_type not in MIXTURES:
        raise CheckpointError(
            f"{source}: for {dense.model_type} no mixture is known that differs in the MLP alone",
            hint=f"known are {', '.join(f'{old} ({new})' for old, (new, _) in MIXTURES.items())}",
        )
    name, one = MIXTURES[dense.model_type]
    known, usual = AutoConfig.for_model(name).to_dict(), AutoConfig.for_model(dense.model_type).to_dict()
    given = {key: value for key, value in dense.to_dict().items() if key not in _OWN}
    width = "moe_intermediate_size" if "moe_intermediate_size" in known else "intermediate_size"
    shared = {key: value for key, value in given.items() if key in known or value != usual.get(key)}
    return AutoConfig.for_model(name, **{**shared, width: given["intermediate_size"], **one})


def _parts(name: str) -> tuple[str, ...]:
    """The dense parameters that one of the mixture is made of; () for a router."""
    mlp, found, leaf = name.partition(".mlp.")
    if not found:
        return (name,)
    own = {
        "gate.weight": (),
        "experts.gate_up_proj": ("gate_proj.weight", "up_proj.weight"),
        "experts.down_proj": ("down_proj.weight",),
    }
    return tuple(f"{mlp}.mlp.{part}" for part in own[leaf])


def _joined(parts: list[torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """Parts behind each other on their first dim, as the only expert of a stack where there is one."""
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(shape)


def _check(dense: Any, moe: Any) -> None:
    """Both models give the same logits.

    Raises:
        CheckpointError: they do not.
    """
    moe.config._experts_implementation = "eager"  # the others need rows of whole 16 bytes
    ids = torch.randint(0, dense.config.vocab_size, (1, 16))
    with torch.no_grad():
        old, new = (model.eval()(ids, use_cache=False).logits.double() for model in (dense, moe))
    apart = float((new - old).abs().max() / old.abs().max())
    limit = TOLERANCE if dense.dtype in (torch.float32, torch.float64) else 4 * torch.finfo(dense.dtype).eps
    if not apart <= limit:
        raise CheckpointError(
            f"as {moe.config.model_type} the model computes something else: logits differ by {apart:.2g} of "
            f"the largest, at most {limit:g} was expected"
        )


def _in_order(model: Any) -> list[list[str]]:
    """Names of the parameters in the order in which the Trainer gives them to the optimizer, by group."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    return [[n for n in names if n in decayed], [n for n in names if n not in decayed]]


def _state(
    saved: Mapping[str, Any], dense: Any, moe: Any, parts: Mapping[str, tuple[str, ...]], source: Path
) -> dict[str, Any]:
    """The optimizer's state with the mixture's parameters: joined as these are, zero for routers.

    Raises:
        CheckpointError: it is not of this model's parameters in the Trainer's order.
    """
    old, new = _in_order(dense), _in_order(moe)
    groups = saved["param_groups"]
    if [len(names) for names in old] != [len(group["params"]) for group in groups]:
        raise CheckpointError(
            f"{source}/optimizer.pt has groups of {[len(group['params']) for group in groups]} parameters, "
            f"the Trainer makes {[len(names) for names in old]}",
            hint="take a checkpoint of transformers' Trainer with its own optimizer",
        )
    of = {
        name: saved["state"].get(number, {})
        for names, group in zip(old, groups, strict=True)
        for name, number in zip(names, group["params"], strict=True)
    }
    for name, param in dense.named_parameters():
        slots = of.get(name, {}).items()
        odd = [slot for slot, one in slots if torch.is_tensor(one) and one.dim() and one.shape != param.shape]
        if odd or not slots:
            raise CheckpointError(
                f"{source}/optimizer.pt: {f'{odd[0]!r} of' if odd else 'it has no state of'} {name}"
                f"{' is not of its shape' if odd else ''}: only state of Adam's kind is carried over",
                hint="take optimizer.pt out of a copy of the checkpoint, for weights alone",
            )
    shapes = {name: param.shape for name, param in moe.named_parameters()}
    names = [name for group in new for name in group]
    state = {}
    for number, name in enumerate(names):
        some = [of[part] for part in parts[name]] or [next(iter(of.values()))]
        state[number] = {
            slot: value
            if not torch.is_tensor(value) or not value.dim()
            else _joined([one[slot] for one in some], shapes[name])
            if parts[name]
            else torch.zeros(shapes[name], dtype=value.dtype)
            for slot, value in some[0].items()
        }
    starts = (0, len(new[0]), len(names))
    places = [list(range(starts[at], starts[at + 1])) for at in range(len(new))]
    return {
        "state": state,
        "param_groups": [{**group, "params": own} for group, own in zip(groups, places, strict=True)],
    }


def main() -> None:
    """Write a dense checkpoint as a mixture of one expert."""
    parser = argparse.ArgumentParser("python -m sparkling_cli.examples.upcycle", description=main.__doc__)
    parser.add_argument("source", type=Path, help="a dense checkpoint of transformers' Trainer")
    parser.add_argument("out", type=Path, help="where the mixture goes")
    given = parser.parse_args()
    try:
        print(f"written  {upcycle(given.source, given.out)}")
    except SparklingError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
