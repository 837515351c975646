"""``pytorch_model_fsdp.bin``: the weights once more, under the module's names, as FSDP resumes from them.

With full state dicts the Trainer writes a checkpoint of three files: ``model.safetensors`` for
``from_pretrained``, this one and ``optimizer.bin`` for resuming. All three are widened. This file's tensors
follow their parameters as optimizer state does that holds weights (``optimizer_states.FSDP_COPY``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.model import ParamState
from sparkling_cli.formats.optimizer_states import FSDP_COPY
from sparkling_cli.formats.statedict import weights_in
from sparkling_cli.formats.statefiles import read_weights_file
from sparkling_cli.formats.torchfile import TorchFile
from sparkling_cli.formats.weightfiles import FSDP_FULL, find_weights

_STEM = FSDP_FULL.removesuffix(".bin")


def check_alone(root: Path) -> None:
    """There is one model, and no rank's part of one.

    Raises:
        CheckpointError: local state dicts of single ranks, or a second model.
    """
    for path in sorted(root.glob(f"{_STEM}_*.bin")):
        if "_rank" in path.name:
            raise CheckpointError(
                f"{path.name}: one rank's flat part of the model, in which parameters cannot be told apart",
                hint="save with FSDP's FULL_STATE_DICT or SHARDED_STATE_DICT (through "
                "torch.distributed.checkpoint)",
            )
        raise CheckpointError(f"{root.name} holds more than one model: {path.name} beside {FSDP_FULL}")


def read_copy(root: Path, present: Sequence[str]) -> TorchFile | None:
    """The file, if it is a copy of weights that lie in other files too; else None.

    Raises:
        CheckpointError: damaged, or no state dict.
    """
    if FSDP_FULL not in present or find_weights(root) == FSDP_FULL:
        return None
    return read_weights_file(root, FSDP_FULL)


def with_copies(states: tuple[ParamState, ...], file: TorchFile) -> tuple[ParamState, ...]:
    """The optimizer's states with the copy of each weight; what has no state (frozen, buffers) behind.

    Args:
        states: by parameter name, as FSDP's optimizers have them.
        file: the copy.

    Raises:
        CheckpointError: the optimizer numbers its parameters.
    """
    numbered = next((state.param for state in states if state.param.isdigit()), None)
    if numbered is not None:
        raise CheckpointError(
            f"the optimizer knows its parameters by number ({numbered}), beside {FSDP_FULL}, which FSDP "
            "writes together with names",
            hint="one of the two is left over from another run: move it out of the directory",
        )
    owners: dict[str, str] = {}
    for name, key in weights_in(file, ()).items():
        owners.setdefault(key, name)  # tied names may share their bytes
    copies = {name: key for key, name in owners.items()}
    known = {state.param for state in states}
    return tuple(
        replace(state, tensors={**state.tensors, FSDP_COPY: copies[state.param]})
        if state.param in copies
        else state
        for state in states
    ) + tuple(ParamState(name, {FSDP_COPY: key}) for name, key in copies.items() if name not in known)
