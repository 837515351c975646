"""LitGPT directories: ``lit_model.pth`` (weights, perhaps the optimizer) beside ``model_config.yaml``."""

from __future__ import annotations

from pathlib import Path

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.directory import inside, list_files, read_yaml, rewritten_file
from sparkling_cli.formats.model import Checkpoint, OutputFile, OutputRequest
from sparkling_cli.formats.singlefile import SingleFile, find_sections, read_sections
from sparkling_cli.formats.torchfile import read_torch_file

WEIGHTS = "lit_model.pth"
CONFIG = "model_config.yaml"


class LitGptDirectory(SingleFile):
    """A LitGPT checkpoint directory. Order of calls: ``claims``, ``open``, ``outputs``."""

    name = "litgpt"

    def claims(self, root: Path) -> bool:
        """Both files.

        Raises:
            CheckpointError: one of them without the other.
        """
        present = [name for name in (WEIGHTS, CONFIG) if (root / name).is_file()]
        if len(present) == 1:
            missing = CONFIG if present == [WEIGHTS] else WEIGHTS
            raise CheckpointError(
                f"{root}: a LitGPT directory with {present[0]} but without {missing}",
                hint="name the directory that `litgpt pretrain` wrote, e.g. out/step-00001000",
            )
        return bool(present)

    def open(self, root: Path) -> Checkpoint:
        """Names, shapes and places; sizes from ``model_config.yaml``.

        Raises:
            CheckpointError: damaged or contradictory files.
            UnsafePickleError: the torch file is not weights-only-safe; it was not executed.
        """
        present = list_files(root)
        file = read_torch_file(inside(root, WEIGHTS, "the directory"), WEIGHTS)
        config = read_yaml(root, CONFIG)
        carried = tuple(name for name in present if name not in (WEIGHTS, CONFIG))
        files, sections = {WEIGHTS: file}, find_sections(file)
        return read_sections(
            root, self.name, files, sections, config=config, config_file=CONFIG, carried=carried
        )

    def outputs(self, checkpoint: Checkpoint, request: OutputRequest) -> tuple[OutputFile, ...]:
        """The torch file and the config, whose other lines stay as they are."""
        config = rewritten_file(checkpoint.root, CONFIG, request.config)
        return (*super().outputs(checkpoint, request), config)
