"""The tensors that a model's own class has: what an output is held to.

The class is built from the output's config on the meta device; transformers says what is tied, what is a
buffer, and under which names a model is saved. To import it takes longer than many a small expansion, so the
class is asked beside the writing, in a process of its own unless transformers has been imported already, and
its answer is kept by config and versions.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import TypeAdapter

from sparkling_cli.errors import SparklingError
from sparkling_cli.formats.gc_pause import collector_running
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.storage import cache

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ClassTensors:
    """What a class says of its tensors; names are those in the module and, apart from them, those on disk.

    Attributes:
        name: of the class; "" if it could not be built.
        reason: why it could not be built.
        names: for each of the two, name -> shape of every parameter.
        buffers: for each, name -> shape of what is no parameter and may be saved or not.
        tied: groups of names that are one tensor: one of a group is enough.
        ignored: patterns of names that the class leaves aside when it loads a checkpoint.
    """

    name: str
    reason: str
    names: tuple[Shapes, Shapes]
    buffers: tuple[Shapes, Shapes]
    tied: tuple[tuple[str, ...], ...]
    ignored: tuple[str, ...]

    def faults(self, found: Shapes) -> dict[str, str]:
        """Weights that are not as the class has them: name -> what is wrong with it.

        Args:
            found: name -> shape of every weight of a checkpoint.
        """
        own = [len(names.keys() & found.keys()) for names in self.names]
        which = 1 if own[1] >= own[0] else 0
        names, buffers = self.names[which], self.buffers[which]
        faults = {}
        for name, shape in names.items():
            if name not in found:
                if not any(name in group and any(n in found for n in group) for group in self.tied):
                    faults[name] = f"is missing, {self.name} has it with shape {tuple(shape)}"
            elif tuple(found[name]) != tuple(shape):
                faults[name] = f"has shape {tuple(found[name])}, {self.name} has {tuple(shape)}"
        ignored = [re.compile(pattern) for pattern in self.ignored]
        for name in found:
            if name not in names and name not in buffers and not any(p.search(name) for p in ignored):
                faults[name] = f"is no tensor of {self.name}"
        return faults


@collector_running()
def ask_class(config: Mapping[str, Any]) -> ClassTensors:
    """Build the class of a config and ask it."""
    from sparkling_cli.models.disk import to_disk
    from sparkling_cli.models.skeleton import build_model, model_errors, shared_names
    from sparkling_cli.models.stored import ignored_by

    try:
        with model_errors(config):
            model = build_model(config)
            state = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
            tied = tuple(map(tuple, shared_names(model)))
            buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
            followers = {name for group in tied for name in group[1:]}
            plain = {k: v for k, v in state.items() if k not in buffers and k not in followers}
            kept = {k: v for k, v in state.items() if k in buffers or k in followers}
            names = (_shapes(plain), _shapes(to_disk(model, plain)))
            optional = (_shapes(kept), _shapes(to_disk(model, kept)))
    except (SparklingError, ImportError) as error:
        return ClassTensors("", str(error).partition("\n")[0], ({}, {}), ({}, {}), (), ())
    return ClassTensors(type(model).__name__, "", names, optional, tied, ignored_by(model))


def _shapes(state: Mapping[str, Any]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


_JSON = TypeAdapter(ClassTensors)


def weight_shapes(checkpoint: Checkpoint) -> Shapes:
    """Name -> shape of every tensor among a checkpoint's weights."""
    return {name: checkpoint.tensors[key].shape for name, key in checkpoint.stored_weights.items()}


class Asking:
    """A class that is being asked; a context manager that waits for nobody when it is left.

    Order of use: ``with Asking(config) as asked``, then ``answer``.

    Args:
        config: of the model.
    """

    def __init__(self, config: Mapping[str, Any] | None) -> None:
        self._config = config
        self._answer: ClassTensors | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._key = ""

    def __enter__(self) -> Asking:
        config = self._config
        if config is None or "model_type" not in config or not _transformers_is_there():
            return self
        self._key = cache.key_of("class", config)
        known = cache.load("classes", self._key)
        if known is not None:
            self._answer = _JSON.validate_python(known)
        elif "transformers" not in sys.modules:
            self._process = _started(config)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def missing(self) -> str:
        """Why the config's class could not be asked, waited for; "" if it was, or none is named."""
        if self._config is None or "model_type" not in self._config:
            return ""
        if not self._key:
            return "transformers is not installed"
        answer = self.answer()
        return "its process ended without an answer" if answer is None else answer.reason

    def answer(self) -> ClassTensors | None:
        """What the class says, waited for; None if nobody could be asked."""
        if self._answer is not None or not self._key:
            return self._answer
        if self._process is None:
            assert self._config is not None
            self._answer = ask_class(self._config)
        else:
            assert self._process.stdout is not None
            text = self._process.stdout.read()
            self._process.wait()
            self._process = None
            with contextlib.suppress(ValueError):
                self._answer = _JSON.validate_json(text)
        if self._answer is not None and self._answer.name:
            cache.store("classes", self._key, _JSON.dump_python(self._answer, mode="json"))
        return self._answer


def _transformers_is_there() -> bool:
    try:
        return find_spec("transformers") is not None
    except ModuleNotFoundError:  # an import hook that says so
        return False


def _started(config: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    """A process that asks the class; Ctrl-C is for this one alone."""
    package = Path(__file__).resolve().parents[2]
    paths = [str(package), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-m", "sparkling_cli.models.expected"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        start_new_session=True,
    )
    assert process.stdin is not None
    with contextlib.suppress(OSError), process.stdin:  # it begins at once, while the output is written
        process.stdin.write(json.dumps(config).encode())
    return process


def class_faults(
    answer: ClassTensors | None,
    found: Shapes,
    before: Callable[[], tuple[Mapping[str, Any] | None, Shapes]],
) -> list[str]:
    """Where an output is not what its class has; what was so in the source already is nobody's fault here.

    Args:
        answer: the class of the output's config.
        found: name -> shape of every weight of the output.
        before: the source's config and weights, looked at only if something is amiss.
    """
    if answer is None:
        return []
    faults = {"": answer.reason} if answer.reason else answer.faults(found)
    if not faults:
        return []
    config, weights = before()
    with Asking(config) as asked:
        source = asked.answer()
    if source is None or source.reason:
        return []
    if answer.reason:
        return [f"the config builds no {source.name}: {answer.reason}"]
    known = source.faults(weights)
    return [f"tensor {name!r} {fault}" for name, fault in faults.items() if name not in known]


def main() -> None:
    """Answer for the config on the standard input."""
    sys.stdout.write(_JSON.dump_json(ask_class(json.loads(sys.stdin.read()))).decode())


if __name__ == "__main__":
    main()
