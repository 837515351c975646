"""``zero/optimizer_state.pt`` of a Universal Checkpoint: options, and under ZeRO-3 the one step counter.

ZeRO 1 and 2 have a ``step.pt`` in every parameter's folder. ZeRO-3 has none: on loading, DeepSpeed takes the
step of the first state in this file for all parameters. Converted from ZeRO-3, the file also holds one rank's
flat partitions, at the old width; loading reads none of them, so they are left out of a widened file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkling_cli.errors import CheckpointError, UnsafePickleError
from sparkling_cli.formats.directory import inside
from sparkling_cli.formats.model import Further
from sparkling_cli.formats.other_files import further_in
from sparkling_cli.formats.statedict import Place, is_optimizer, optimizer_in, removed
from sparkling_cli.formats.torchfile import REMOVED, TorchFile, TreePath, plain, read_torch_file

OPTIMIZER = "zero/optimizer_state.pt"
_STATES = "optimizer_state_dict"
_FLAT = "fp32_flat_groups"
#: objects that DeepSpeed keeps beside plain data; they stay inert
_OWN = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "torch._tensor._rebuild_from_type_v2",  # flat partitions with marks on them
    }
)


@dataclass(frozen=True)
class SharedStep:
    """The step counters of a file converted from ZeRO-3.

    Attributes:
        file: the file.
        value: of the first state, which DeepSpeed takes for all parameters.
        places: of all counters: they are dropped together.
        partitions: flat ones: those on their own, and those beside the steps.
    """

    file: TorchFile
    value: float
    places: tuple[Place, ...]
    partitions: tuple[TreePath, ...]

    @property
    def edits(self) -> dict[TreePath, Any]:
        """The file's tree without flat partitions."""
        return dict.fromkeys(self.partitions, REMOVED)

    @property
    def further(self) -> list[Further]:
        """Every tensor of the file; flat partitions are left out of the output."""
        gone = removed(self.file, self.edits)
        found = [item._replace(left_out=item.key in gone, key="") for item in further_in(self.file, ())]
        flat = Further(f"{OPTIMIZER}: {_FLAT}", OPTIMIZER, "", None, left_out=True)
        return [*found, flat] if _FLAT in self.file.tree else found


def read_options(
    root: Path, present: tuple[str, ...], *, partitioned: bool
) -> tuple[tuple[Mapping[str, Any], ...], SharedStep | None]:
    """The optimizer's groups, and under ZeRO-3 its step.

    Args:
        root: the checkpoint.
        present: its files.
        partitioned: whether it was converted from ZeRO-3.

    Raises:
        CheckpointError: ZeRO-3 without the file or without a step in it: DeepSpeed could not load it.
        UnsafePickleError: ZeRO-3, and the file is not weights-only-safe; it was not executed.
    """
    if OPTIMIZER not in present:
        if partitioned:
            raise CheckpointError(f"{root}: {OPTIMIZER} is missing: the conversion was not finished")
        return (), None
    try:
        file = read_torch_file(
            inside(root, OPTIMIZER, "the directory"), OPTIMIZER, allow=_OWN, without=(_FLAT,)
        )
    except UnsafePickleError:
        if partitioned:
            raise
        return (), None  # it is carried over as it is: nothing in it is read by size
    groups = file.tree.get("param_groups") if isinstance(file.tree, dict) else None
    held = [plain(group) for group in groups] if isinstance(groups, list) else []
    # their parameters are the flat partitions, by number
    options = tuple({key: value for key, value in group.items() if key != "params"} for group in held)
    return options, _shared_step(root, file) if partitioned else None


def _shared_step(root: Path, file: TorchFile) -> SharedStep:
    held = is_optimizer(file.tree.get(_STATES) if isinstance(file.tree, dict) else None)
    states = optimizer_in(file, (_STATES,)).states if held else ()
    counted = [state for state in states if "step" in state.places]
    if not counted:
        raise CheckpointError(
            f"{root / OPTIMIZER}: there is no optimizer_state_dict.state with a step in it, by which "
            "DeepSpeed resumes under ZeRO-3",
            hint="convert the checkpoint again: python -m deepspeed.checkpoint.ds_to_universal",
        )
    beside = [file.paths[key] for state in states for key in state.tensors.values()]
    return SharedStep(
        file,
        counted[0].scalars["step"],
        tuple(place for state in counted for place in state.places["step"]),
        (*[(_FLAT,)] * (_FLAT in file.tree), *beside),
    )
