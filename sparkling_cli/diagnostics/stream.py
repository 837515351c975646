"""The residual stream inside the blocks: what each function of a block adds to it.

A block's *function* f (attention, MLP, mixer) reads the stream h through a norm and adds its output to it:
h + f(Norm h). It is found by what happens, not by names of classes or tensors: the tensor that goes into a
block is the stream; where a torch call adds something to the stream, that something is the output of a
function, and the sum is the stream from then on. Where a block norms the sum and goes on with that (a norm
behind each function), the normed stream is the stream. The function is called after the submodule of the
block that gave it out last. Where a block adds several outputs at once (attention and MLP in parallel),
each is measured before they are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparkling_cli.diagnostics.measurement import root_mean

_STREAM = "_sparkling_stream"
_NORMED = "_sparkling_normed_stream"
_OUTPUTS = "_sparkling_outputs"

_ADDITIONS = {
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.__iadd__,
}
_MULTIPLICATIONS = {
    torch.mul,
    torch.Tensor.mul,
    torch.Tensor.mul_,
    torch.Tensor.__mul__,
    torch.Tensor.__rmul__,
    torch.Tensor.__imul__,
}
_CHOICES = {torch.topk, torch.Tensor.topk, torch.argmax, torch.Tensor.argmax}
_METHODS = (
    "to float double half bfloat16 type type_as view reshape view_as reshape_as flatten unflatten squeeze "
    "unsqueeze contiguous clone detach"
)
#: Calls whose result is still the stream.
_SAME = {getattr(torch.Tensor, name) for name in _METHODS.split()} | {torch.reshape, torch.flatten}


class Squares:
    """A running sum of squares, and of how many there were."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, tensor: torch.Tensor) -> None:
        """Add all entries of a tensor, in float64; a tensor that was seen before is not read again."""
        version = -1 if tensor.is_inference() else tensor._version  # inference tensors have none
        known = getattr(tensor, "_sparkling_squares", None)
        if known is None or known[0] != version or version < 0:
            norm = float(torch.linalg.vector_norm(tensor.detach().reshape(-1), dtype=torch.float64))
            known = (version, norm * norm)
            tensor._sparkling_squares = known  # type: ignore[attr-defined]
        self.total += known[1]
        self.count += tensor.numel()

    def merge(self, other: Squares) -> None:
        """Add another sum."""
        self.total += other.total
        self.count += other.count

    @property
    def rms(self) -> float:
        """Root of the mean square; 0 of nothing."""
        return root_mean(self.total, self.count)


class StreamWatch:
    """Follows the residual stream of a model while its blocks run.

    Args:
        model: whose submodules give the functions their names.
        blocks: path of every block -> the block.

    Attributes:
        functions: name of a function -> (sum over the stream that it read, sum over what it added, calls).
        normed: names of functions whose output goes through a norm before it is added.
        choices: block -> sets of experts of the tokens of the last pass, [tokens, k], sorted.
        adjust: called with a function's name, the stream and the output before this is added; it may change
            the output in place. Outputs that are added to each other first are shown one by one.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
        self.functions: dict[str, tuple[Squares, Squares, int]] = {}
        self.choices: dict[str, torch.Tensor] = {}
        self.normed: set[str] = set()
        self.adjust: Callable[[str, torch.Tensor, torch.Tensor], None] | None = None
        self._paths = {
            id(module): path
            for path, module in model.named_modules()
            if any(parameter.ndim >= 2 for parameter in module.parameters())
        }
        self._experts = {path: _expert_counts(block) for path, block in blocks.items()}
        self._block: str | None = None
        self._stream: torch.Tensor | None = None

    def enter(self, block: str, hidden: torch.Tensor) -> None:
        """A block begins with this stream."""
        self._block, self._stream = block, hidden
        setattr(hidden, _STREAM, block)

    def leave(self) -> None:
        """The block has ended."""
        self._block = self._stream = None

    def module_ended(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook of all modules: what a submodule gives out is called after it."""
        if self._block is None:
            return
        path = self._paths.get(id(module))
        if path is None and isinstance(output, torch.Tensor):  # no matrix in it: a norm
            if any(map(self._is_stream, tensors_in(args))):
                setattr(output, _NORMED, self._block)
            elif any(True for _ in module.parameters()):
                self.normed |= {name for x in tensors_in(args) for name in getattr(x, _OUTPUTS, None) or ()}
        if path is not None and path != self._block:
            for tensor in tensors_in((output,)):
                if not self._is_stream(tensor) and not self._is_normed(tensor):
                    setattr(tensor, _OUTPUTS, {path: None})

    def name_output(self, parameter: str, output: torch.Tensor) -> None:
        """What a product with a parameter gives out is called after it, until its module ends."""
        if self._block is not None:
            setattr(output, _OUTPUTS, {parameter: None})

    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Look at a torch call, before it runs; what comes back is given to :meth:`done` with its result."""
        if self._block is None:
            return None
        tensors = [*tensors_in(args), *tensors_in(kwargs.values())]
        if func in _ADDITIONS and len(tensors) == 2:
            streams = [self._is_stream(tensor) for tensor in tensors]
            if not any(streams) and hasattr(tensors[0], _OUTPUTS) != hasattr(tensors[1], _OUTPUTS):
                streams = [self._is_normed(tensor) for tensor in tensors]
            if any(streams):
                if not all(streams):
                    self._add(tensors[streams.index(True)], tensors[streams.index(False)])
                return _STREAM
            return self._sum(tensors)
        if func in _SAME and tensors and self._is_stream(tensors[0]):
            return _STREAM
        if func in _MULTIPLICATIONS:
            # by a number, or by one per channel that is learned; a norm's factor is one per token
            scale = len(tensors) == 1 or any(tensor.numel() == 1 or tensor.ndim == 1 for tensor in tensors)
            if any(map(self._is_stream, tensors)):
                return _STREAM if scale else None
            if scale and any(map(self._is_normed, tensors)):
                return _NORMED
        if func in _CHOICES:
            return None
        outputs: dict[str, Squares | None] = {}
        for tensor in tensors:
            outputs |= getattr(tensor, _OUTPUTS, None) or {}
        return outputs or None

    def done(self, func: Any, args: Sequence[Any], found: Any, result: Any) -> None:
        """Mark the result of a call with what :meth:`call` made of its arguments."""
        if self._block is None:
            return
        if func in _CHOICES:
            self._choose(args, result)
        elif isinstance(found, str):
            if isinstance(result, torch.Tensor):
                setattr(result, found, self._block)
                self._stream = result if found == _STREAM else self._stream
        elif found:
            for tensor in tensors_in((result,)):
                # a product with a parameter is named already
                if not self._is_stream(tensor) and (func in _ADDITIONS or not hasattr(tensor, _OUTPUTS)):
                    setattr(tensor, _OUTPUTS, found)

    def _is_stream(self, tensor: torch.Tensor) -> bool:
        return getattr(tensor, _STREAM, None) == self._block

    def _is_normed(self, tensor: torch.Tensor) -> bool:
        return getattr(tensor, _NORMED, None) == self._block

    def _add(self, stream: torch.Tensor, output: torch.Tensor) -> None:
        if output.shape != stream.shape:
            return
        outputs: dict[str, Squares | None] = getattr(output, _OUTPUTS, None) or {str(self._block): None}
        if len(outputs) > 1 and None in outputs.values():  # a module that mixes several of its own
            outputs = {next(reversed(outputs)): None}
        if self.adjust is not None and len(outputs) == 1:
            self.adjust(next(iter(outputs)), stream, output)
        for name, squares in outputs.items():
            read, added, calls = self.functions.get(name) or (Squares(), Squares(), 0)
            read.add(stream)
            if squares is None:
                added.add(output)
            else:
                added.merge(squares)
            self.functions[name] = (read, added, calls + 1)

    def _sum(self, tensors: list[torch.Tensor]) -> dict[str, Squares | None] | None:
        """Outputs of several functions that are added to each other first."""
        parts = [getattr(tensor, _OUTPUTS, None) or {} for tensor in tensors]
        if not all(parts) or parts[0].keys() == parts[1].keys():
            return parts[0] or parts[1] or None
        found: dict[str, Squares | None] = {}
        for tensor, outputs in zip(tensors, parts, strict=True):
            for name, squares in outputs.items():
                if squares is None:
                    if self.adjust is not None and self._stream is not None and len(outputs) == 1:
                        self.adjust(name, self._stream, tensor)
                    squares = Squares()
                    squares.add(tensor)
                found[name] = squares
        return found

    def _choose(self, args: Sequence[Any], result: Any) -> None:
        """The sets of experts that a router chose."""
        block = str(self._block)
        scores = args[0]
        if not isinstance(scores, torch.Tensor) or scores.shape[-1] not in self._experts[block]:
            return
        chosen = result[1] if isinstance(result, tuple) else result[..., None]
        chosen = chosen.reshape(-1, chosen.shape[-1]).sort(-1).values.to(torch.int32)
        known = self.choices.get(block)
        if known is not None and known.shape[-1] == chosen.shape[-1]:
            chosen = torch.cat([known, chosen])
        self.choices[block] = chosen


def _expert_counts(block: nn.Module) -> set[int]:
    """How many experts a block may have: lengths of its lists, first dims of its stacked parameters."""
    lists = {len(module) for module in block.modules() if isinstance(module, nn.ModuleList)}
    return lists | {parameter.shape[0] for parameter in block.parameters() if parameter.ndim >= 3}


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """All tensors among arguments, in containers too."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())
