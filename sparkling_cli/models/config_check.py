"""Whether a config can be the one of a checkpoint's tensors: asked before a model is built from it.

A contradiction would come to light later too, but only after a search that the wrong sizes make long, or
in the shape of a model with a million layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.layout.names import skeleton, skeletons
from sparkling_cli.models.sizes import kind_of, walk
from sparkling_cli.storage.tensors import FLOATING

if TYPE_CHECKING:
    from sparkling_cli.models.locate import Parameters

#: How plain weights are had of a scheme that transformers takes back while it loads.
_LOAD = (
    "load it by from_pretrained(SOURCE, quantization_config={}), save it by save_pretrained, and widen that"
)
#: Schemes whose rounding nothing takes back.
_ORIGINAL = "widen the checkpoint that it was made from, and quantize the wider one"
#: What quantization leaves in a checkpoint's names, the scheme, and how weights are had that can be widened.
_QUANTIZED = (
    (r"\.weight_scale_inv$", "FP8 with block scales", _LOAD.format("FineGrainedFP8Config(dequantize=True)")),
    (r"_proj_(blocks|scales)$", "mxfp4", _LOAD.format("Mxfp4Config(dequantize=True)")),
    (
        r"\.(absmax|quant_map|SCB)$|\.quant_state\.bitsandbytes__",
        "bitsandbytes",
        "load it by from_pretrained(SOURCE), call model.dequantize(), save it, and widen that",
    ),
    (r"\.g_idx$", "GPTQ", _ORIGINAL),
    (r"\.qweight$", "AWQ", _ORIGINAL),
    (
        r"\.(weight_packed|weight_scale|input_scale)$",
        "compressed-tensors",
        _LOAD.format("CompressedTensorsConfig(run_compressed=False)"),
    ),
    (r"[._]weight_qdata$|:_data$|\.weight\.(tensor_impl|int_data)", "torchao", _ORIGINAL),
)

#: config keys that count layers that predict further tokens
_PREDICTS = re.compile(r"nextn|(^|_)mtp_|num_mtp|multi_token")


def check_plain(checkpoint: Checkpoint) -> None:
    """The weights are numbers, not quantized ones: judged by the tensors, as configs outlive a conversion.

    Raises:
        CheckpointError: names the scheme, a tensor, and how weights are had that can be widened.
    """
    kinds = dict.fromkeys(skeletons(checkpoint.weights))
    for pattern, scheme, remedy in _QUANTIZED:
        kind = next((kind for kind in kinds if re.search(pattern, kind)), None)
        if kind is not None:
            name = next(name for name in checkpoint.weights if skeleton(name) == kind)
            raise CheckpointError(
                f"{checkpoint.root.name}: its weights are quantized ({scheme}: {name!r}), and "
                "new entries cannot be computed from rounded ones",
                hint=remedy,
            )


def check_counts(checkpoint: Checkpoint) -> None:
    """Layers and experts are no more than the tensors can hold.

    Raises:
        CheckpointError: with the key, its value and what there is.
    """
    count = len(checkpoint.tensors)
    shapes = {tensor.shape for tensor in checkpoint.tensors.values()}  # a few, of any number of tensors
    widest = max((max(shape, default=1) for shape in shapes), default=1)
    # every layer has at least one tensor; a router has a row for each expert, or each has tensors of its own
    limits = {"layers": count, "experts": max(count, widest)}
    for (*_, key), value in walk(checkpoint.config or {}):
        if type(value) not in (int, float):
            continue
        most = limits.get(kind_of(key) or "")
        if most is not None and not 0 <= value <= most:
            raise CheckpointError(
                f"{checkpoint.root.name}: {checkpoint.config_file} says {key} = {value}, but the checkpoint "
                f"holds {count} tensors, none of them longer than {widest}",
                hint="the config belongs to another model, or was damaged: restore it from a copy",
            )


def check_tensors(checkpoint: Checkpoint, model: Parameters) -> None:
    """Weights that the model has under the same name have the same sizes there; layers are equally many.

    The order of sizes does not matter here: some classes store a tensor transposed. Nor do kinds of
    tensors whose names are others on disk.

    Args:
        checkpoint: the tensors.
        model: the one that its config describes.

    Raises:
        CheckpointError: with the name and, if it is there, both shapes.
    """
    shapes = dict(model.shapes)
    ignored = [re.compile(pattern) for pattern in model.ignored]
    stored = {name for name in checkpoint.weights if not any(p.search(name) for p in ignored)}
    _check_layers(checkpoint, set(shapes), stored | (checkpoint.weights.keys() & shapes.keys()))
    for name, shape in shapes.items():
        if name not in checkpoint.weights:
            continue
        found = checkpoint.weight(name)
        if found.dtype in FLOATING and sorted(found.shape) != sorted(shape):
            raise CheckpointError(
                f"{checkpoint.root.name}: {checkpoint.config_file} and the tensors disagree: {name!r} has "
                f"shape {found.shape}, in the config's model it has {tuple(shape)}",
                hint="the config belongs to another model, or was damaged: restore it from a copy",
            )


def _check_layers(checkpoint: Checkpoint, model: set[str], stored: set[str]) -> None:
    """A kind of tensor that both have is there for the same layers."""
    if model == stored:
        return
    wanted = dict(zip(model, skeletons(list(model)), strict=True))
    found = dict(zip(stored, skeletons(list(stored)), strict=True))
    kinds = set(wanted.values()) & set(found.values())
    where = f"{checkpoint.root.name}: {checkpoint.config_file} and the tensors disagree"
    lacking = sorted(name for name in model - stored if wanted[name] in kinds)
    if lacking:
        raise CheckpointError(
            f"{where}: the config's model has {lacking[0]!r}, the checkpoint has only others of its kind",
            hint="a shard may be missing, or the config belongs to another model",
        )
    extra = sorted(name for name in stored - model if found[name] in kinds)
    _check_prediction(checkpoint, model, extra)
    if extra:
        raise CheckpointError(
            f"{where}: the checkpoint has {extra[0]!r}, the config's model has only others of its kind",
            hint="the config belongs to another model, or was damaged: restore it from a copy",
        )


def _check_prediction(checkpoint: Checkpoint, model: set[str], extra: Sequence[str]) -> None:
    """Layers behind the model's own are none that predict further tokens, as the config says there are."""
    count = next((v for p, v in walk(checkpoint.config or {}) if _PREDICTS.search(p[-1]) and v), None)
    if not extra or type(count) is not int:
        return
    own = {int(n) for name in model for n in re.findall(r"layers\.(\d+)\.", name)}
    behind = [re.search(r"^(.*?layers\.)(\d+)\.", name) for name in extra]
    last = max(own, default=0)
    if not all(found and last < int(found[2]) <= last + count for found in behind):
        return
    first = next(found for found in behind if found)
    prefix = f"{first[1]}{first[2]}."
    raise CheckpointError(
        f"{checkpoint.root.name}: it holds {count} layer(s) of multi-token prediction behind the model's own "
        f"{last + 1} ({prefix}*), which the class in transformers does not have: widening them is not "
        "supported",
        hint="widen a copy without them: model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype='auto'), "
        "then model.save_pretrained(COPY), which leaves them and optimizer state out; they fit no wider "
        "model, so train new ones",
    )
