"""Which format a path is of, from what lies there."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sparkling_cli.errors import CheckpointError, NoModelError
from sparkling_cli.formats.gc_pause import collector_paused
from sparkling_cli.formats.other_files import with_further
from sparkling_cli.storage.sidecar import DIGESTS, sidecar_root

if TYPE_CHECKING:
    from sparkling_cli.formats.model import Checkpoint, Format

#: ``https://...``, of which a path keeps one slash
_REMOTE = re.compile(r"^([a-z][a-z0-9+.-]*):/+", re.IGNORECASE)
#: the same on the hub: ``https://huggingface.co/ORG/NAME``, ``hf://ORG/NAME``
_ADDRESS_ON_HUB = re.compile(
    r"(?:https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)|hf:)/+([\w.-]+/[\w.-]+)(?:/.*)?"
)
#: ``organization/model``
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_DOWNLOAD = "a model on the Hugging Face hub is downloaded first: hf download {} --local-dir DIR"

_LOOKED_FOR = (
    "a transformers model or Trainer directory (model.safetensors, pytorch_model.bin, or their index)",
    "a torch.distributed.checkpoint directory (.metadata)",
    "a LitGPT directory (lit_model.pth and model_config.yaml)",
    "a step of nanochat (model_NNNNNN.pt, meta_NNNNNN.json)",
    "an iteration in Megatron's torch format (mp_rank_00/model_optim_rng.pt)",
    "an unsharded step of OLMo (model.pt and config.yaml)",
    "DeepSpeed's Universal Checkpoint (zero/<parameter>/fp32.pt)",
    "a torch file with a model's state dict (nanoGPT, Lightning, plain PyTorch)",
)


#: checkpoints of a folder that are named, the latest
_NAMED = 5


def formats() -> tuple[Format, ...]:
    """Every known format; those that are told by something special come first."""
    from sparkling_cli.formats.dcp import DcpFormat
    from sparkling_cli.formats.deepspeed import UniversalCheckpoint
    from sparkling_cli.formats.litgpt import LitGptDirectory
    from sparkling_cli.formats.megatron import MegatronLegacy
    from sparkling_cli.formats.nanochat import NanochatStep
    from sparkling_cli.formats.olmo import OlmoStep
    from sparkling_cli.formats.singlefile import SingleFile
    from sparkling_cli.formats.trainer import TrainerDirectory

    return (
        SingleFile(),
        DcpFormat(),
        LitGptDirectory(),
        MegatronLegacy(),
        NanochatStep(),
        OlmoStep(),
        UniversalCheckpoint(),
        TrainerDirectory(),
    )


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Recognize and open a checkpoint.

    Raises:
        CheckpointError: nothing there, no known format, almost one, or damaged.
        UnsafePickleError: a pickle that is not weights-only-safe.
    """
    root, form = recognized(path)
    with collector_paused(), _told(root):
        try:
            return with_further(form.open(root))
        except NoModelError as error:
            whole = _whole_of(root)
            if whole is not None:
                error.hint = f"it is one file of a checkpoint: give its folder, {_shell(whole)}"
            raise


def recognized(path: Path | str) -> tuple[Path, Format]:
    """The checkpoint's root and its format, from the names of a few files.

    Where a folder has several steps of a run, the path of one step's weights stands for that step.

    Raises:
        CheckpointError: nothing there, no known format, or almost one.
    """
    from sparkling_cli.formats.nanochat import NanochatStep, step_of_file

    root = Path(path)
    if root.name in ("", ".."):
        root = root.resolve()  # messages and outputs are named after it
    if not root.exists():
        shown = _REMOTE.sub(r"\1://", str(path))
        raise CheckpointError(f"{shown}: there is nothing of that name", hint=meant_by(root))
    with _told(root):
        step = step_of_file(root)
        if step is not None:
            return root.parent, NanochatStep(step)
        for form in formats():
            if form.claims(root):
                return root, form
        among, other = folder_of_checkpoints(root), _other_kind(root)
    if among is not None:
        raise among
    if other:
        raise CheckpointError(f"{root} is {other[0]}", hint=other[1])
    whole = _whole_of(root)
    if whole is not None:
        raise CheckpointError(
            f"{root} is no checkpoint by itself",
            hint=f"it is one file of a checkpoint: give its folder, {_shell(whole)}",
        )
    files = _torch_files_in(root)
    if files:
        raise CheckpointError(
            f"{root} is a folder of torch files: {', '.join(path.name for path in files[:5])}",
            hint=f"a checkpoint that is one file is given by that file: {_shell(_chosen(files))}",
        )
    raise CheckpointError(
        f"{root}: no known checkpoint format; looked for " + "; ".join(_LOOKED_FOR), hint=_holds(root)
    )


@contextmanager
def _told(root: Path) -> Iterator[None]:
    """What to do about a file that is not as it should be, where who found it knows nothing better."""
    try:
        yield
    except CheckpointError as error:
        error.hint = (
            error.hint or "if it was copied or downloaded, do that again; else take an earlier checkpoint"
        )
        raise
    except OSError as error:
        raise CheckpointError(
            f"cannot read {error.filename or root}: {error.strerror or error}",
            hint="check its permissions; if the disk fails, take a copy of the checkpoint",
        ) from error


def format_of(name: str) -> Format:
    """The format of that name.

    Raises:
        CheckpointError: there is none.
    """
    for form in formats():
        if form.name == name:
            return form
    raise CheckpointError(f"no checkpoint format is called {name!r}")


#: what is no checkpoint of a training run, by the end of a file's name: what it is, what to do
_OTHER_KINDS = {
    ".gguf": (
        "a GGUF file: weights for inference, without optimizer state and most often quantized",
        "give the checkpoint that it was converted from",
    ),
    ".onnx": ("an ONNX file: a model for inference", "give the checkpoint that it was exported from"),
    ".h5": ("a Keras or TensorFlow file", "load it with transformers and save_pretrained() it"),
    ".msgpack": ("a Flax file", "load it with transformers and save_pretrained() it"),
}
_ORBAX = (
    "a checkpoint of a JAX trainer (Orbax, tensorstore), which is not read",
    "export it to transformers by the trainer's own script, and expand that with --init random-copy: without "
    "the optimizer's state",
)
#: the same of folders, by a file in them
_OTHER_FOLDERS = {
    "adapter_config.json": (
        "an adapter (adapter_config.json): what was added to a model, and not the model",
        "merge it into its base first: PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(DIR)"
        "; a merged model has no optimizer state, so see the how-to on --init random-copy",
    ),
    "checkpoint_metadata.json": (
        "a checkpoint of nanotron (checkpoint_metadata.json), whose slices and flat pieces on many ranks are "
        "not read",
        "export it by nanotron's examples/llama/convert_nanotron_to_hf.py, expand that with --init "
        "random-copy (it has no optimizer state), and go back by convert_hf_to_nanotron.py",
    ),
    "_CHECKPOINT_METADATA": _ORBAX,
    "manifest.ocdbt": _ORBAX,
}


def _other_kind(root: Path) -> tuple[str, str] | None:
    """What a path without a checkpoint's files is, where its files' names tell it; and what to do."""
    names = [root.name] if root.is_file() else sorted(path.name for path in root.iterdir())
    told = next((mark for mark in _OTHER_FOLDERS if root.is_dir() and mark in names), None)
    if told is not None:
        return _OTHER_FOLDERS[told]
    found = {Path(name).suffix for name in names} & set(_OTHER_KINDS)
    if root.is_file() and not found:
        with root.open("rb") as file:
            found = {".gguf"} if file.read(4) == b"GGUF" else set()
    return _OTHER_KINDS[min(found)] if found else None


def meant_by(root: Path) -> str | None:
    """What to do about a path that leads nowhere."""
    text = str(root)
    address = _ADDRESS_ON_HUB.fullmatch(text)
    if address:
        return _DOWNLOAD.format(address[1])
    if _REMOTE.match(text):
        return "checkpoints are read from a disk: download it, or mount where it lies, and give the path"
    folder = next(path for path in (root, *root.parents) if path.exists())
    if not folder.is_dir():
        return f"{folder} is a file"
    lost = root.parts[len(folder.parts)]
    close = difflib.get_close_matches(lost, [path.name for path in folder.iterdir()], n=1)
    if close:
        return f"did you mean {_shell(folder / close[0])}?"
    if folder == Path() and _ON_HUB.fullmatch(text):
        return _DOWNLOAD.format(text)
    here = f"{folder.resolve()} is there, and holds no {lost!r}"
    return f"{here}; {_DOWNLOAD.format(lost)}" if folder == Path() and text == lost else here


def folder_of_checkpoints(root: Path, *, outputs: bool = False) -> CheckpointError | None:
    """The error for a folder that is no checkpoint and holds some; None where it holds none.

    Args:
        root: what was given.
        outputs: an output of ``sparkling expand`` is asked for, and not a checkpoint to widen.
    """
    inside = _checkpoints_in(root) or _checkpoints_in(root / "checkpoints")
    if not inside or _is_checkpoint(root):
        return None
    more = f", and {len(inside) - _NAMED} more" if len(inside) > _NAMED else ""
    return CheckpointError(
        f"{root} is a folder of checkpoints: {', '.join(path.name for path in inside[-_NAMED:])}{more}",
        hint=f"choose one: {_shell(_chosen(inside, outputs=outputs))}",
    )


def _chosen(found: list[Path], *, outputs: bool = False) -> Path:
    """The latest step of those that are, or are not, outputs of ``sparkling expand``; else of all."""
    alike = [path for path in found if (sidecar_root(path) / DIGESTS).is_file() == outputs]
    return (alike or found)[-1]


def _shell(path: Path) -> str:
    """A path as it is typed into a shell."""
    return shlex.quote(str(path))


def _checkpoints_in(root: Path) -> list[Path]:
    """The folders in a folder that are checkpoints, or called so, the latest step last."""

    def is_one(path: Path) -> bool:
        return path.name.startswith("checkpoint-") or _is_checkpoint(path)

    found = [path for path in root.iterdir() if path.is_dir() and is_one(path)] if root.is_dir() else []
    return sorted(found, key=_step_of)


def _is_checkpoint(path: Path) -> bool:
    try:
        return any(form.claims(path) for form in formats())
    except CheckpointError:
        return False


def _torch_files_in(root: Path) -> list[Path]:
    """Checkpoints of one file in a folder, the latest step last; none if they are parts of another kind."""
    from sparkling_cli.formats.singlefile import SUFFIXES

    files = [path for path in root.iterdir() if path.suffix in SUFFIXES] if root.is_dir() else []
    return [] if any("model_states" in path.name for path in files) else sorted(files, key=_step_of)


def _step_of(path: Path) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"\d+", path.name)], path.name


def _whole_of(root: Path) -> Path | None:
    """The checkpoint that a file is one of, or that a folder lies in."""
    try:
        around = (root.parent, root.parent.parent)
        return next((path for path in around if any(form.claims(path) for form in formats())), None)
    except CheckpointError:
        return None


def _holds(root: Path) -> str:
    if not root.is_dir():
        return "give the folder or the file that the training run wrote"
    found = sorted(path.name for path in root.iterdir())[:8]
    return (
        f"it holds: {', '.join(found)}" if found else "it is empty: check the path, or copy the files into it"
    )
