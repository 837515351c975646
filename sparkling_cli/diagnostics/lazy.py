"""A model whose weights stay in the checkpoint's files and come into memory while they are used.

The model is built with its parameters on the meta device and its buffers real. During the forward pass
a function mode sees every torch call; where a parameter is among the arguments, its values are read,
used, and let go. Large embeddings are read row by row, large linear layers in blocks of rows, stacked
experts one expert at a time, so that the peak is a block, not a module. The same place sees every
matrix product with a parameter, whatever module it is written in, and reports it.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sparkling_cli.diagnostics.parameters import ParameterReader, nbytes_of
from sparkling_cli.diagnostics.stream import StreamWatch, tensors_in

Observer = Callable[[str, torch.Tensor, torch.Tensor], None]

_TAG = "_sparkling_parameter"

#: Where the two factors stand among the arguments, and under which keywords.
_PRODUCTS: Mapping[Any, tuple[tuple[int, int], tuple[str, str]]] = {
    functional.linear: ((0, 1), ("input", "weight")),
    torch.matmul: ((0, 1), ("input", "other")),
    torch.mm: ((0, 1), ("input", "mat2")),
    torch.bmm: ((0, 1), ("input", "mat2")),
    torch.addmm: ((1, 2), ("mat1", "mat2")),
    torch.baddbmm: ((1, 2), ("batch1", "batch2")),
    torch.Tensor.matmul: ((0, 1), ("input", "other")),
    torch.Tensor.mm: ((0, 1), ("input", "mat2")),
    torch.Tensor.bmm: ((0, 1), ("input", "mat2")),
    torch.Tensor.addmm: ((1, 2), ("mat1", "mat2")),
    torch.Tensor.baddbmm: ((1, 2), ("batch1", "batch2")),
    torch.Tensor.__matmul__: ((0, 1), ("input", "other")),
    torch.Tensor.__rmatmul__: ((0, 1), ("input", "other")),
    torch.einsum: ((1, 2), ("", "")),
    functional.bilinear: ((0, 2), ("input1", "weight")),
}


def _methods(words: str) -> set[Any]:
    return {getattr(torch.Tensor, word) for word in words.split() if hasattr(torch.Tensor, word)}


def _getters(words: str) -> set[Any]:
    return {getattr(torch.Tensor, word).__get__ for word in words.split() if hasattr(torch.Tensor, word)}


#: Calls whose result is still the parameter: a part of it, another view of it, another dtype.
_VIEWS = (
    _methods(
        "__getitem__ t transpose permute view view_as reshape reshape_as to float double half bfloat16 "
        "type type_as chunk unbind split contiguous squeeze unsqueeze detach expand narrow select clone "
        "flatten unflatten movedim swapaxes index_select cpu split_with_sizes"
    )
    | _getters("T mT data")
    | {torch.transpose, torch.permute, torch.chunk, torch.split, torch.unbind, torch.narrow, torch.t}
    | {torch.select, torch.index_select, torch.squeeze, torch.unsqueeze, torch.reshape, torch.flatten}
    | {torch.clone}
)

#: Questions about a parameter that need no values.
_QUESTIONS = _getters(
    "shape dtype ndim requires_grad is_leaf layout grad grad_fn names itemsize nbytes"
) | _methods(
    "size dim numel stride is_floating_point is_complex is_contiguous element_size __len__ ndimension "
    "nelement requires_grad_ data_ptr storage_offset __hash__ is_set_to"
)
_DEVICE = torch.Tensor.device.__get__
_PLACE = _getters("is_meta is_cuda is_cpu is_mkldnn is_quantized is_sparse")


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """While this is open, every module's parameters go to the meta device; buffers stay real."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def load_buffers(model: nn.Module, reader: ParameterReader) -> None:
    """Fill the buffers that the checkpoint has values for."""
    for path, module in model.named_modules():
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            name = f"{path}.{leaf}" if path else leaf
            if buffer is not None and name in reader.recipes:
                setattr(module, leaf, _computable(reader.whole(name)))


class LazyWeights(TorchFunctionMode):
    """Brings parameters in when they are used, and reports every matrix product with one.

    Args:
        reader: of the checkpoint.
        observe: called with (parameter's name, x, y) for every ``y = x W``, also for slices of W.
        watch: is shown every torch call.
        block: bytes of the largest piece of a parameter to hold at a time, where it can be cut.
        cache: bytes of parameters to keep for the next batch.
    """

    def __init__(
        self,
        reader: ParameterReader,
        observe: Observer,
        watch: StreamWatch,
        *,
        block: int = 64 << 20,
        cache: int = 0,
    ) -> None:
        super().__init__()
        self.reader = reader
        self.observe = observe
        self.watch = watch
        self.block = block
        self.cache = cache
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._kept_bytes = 0

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _QUESTIONS:
            return func(*args, **kwargs)
        found = self.watch.call(func, args, kwargs)
        result = self._run(func, args, kwargs)
        self.watch.done(func, args, found, result)
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [*tensors_in(args), *tensors_in(kwargs.values())]
        if any(self._name(t) is not None for t in tensors):
            return self._with_parameter(func, args, kwargs)
        result = func(*args, **kwargs)
        if any(_tag(t) is not None for t in tensors):
            self._follow(func, args, kwargs, result)
        return result

    def _with_parameter(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that has a parameter that is not in memory among its arguments."""
        if func is _DEVICE:
            return torch.device("cpu")
        if func in _PLACE:
            return func(torch.empty(0))
        special = self._in_parts(func, args, kwargs)
        if special is not None:
            return special
        args = _replace(args, self._load)
        kwargs = {key: _replace(value, self._load) for key, value in kwargs.items()}
        result = func(*args, **kwargs)
        self._follow(func, args, kwargs, result)
        return result

    def _in_parts(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Embeddings, linear layers and experts that are large: without holding all of the weight."""
        if func is functional.linear:
            bound = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            if self._cut(bound["weight"]):
                return self._linear(bound["input"], bound["weight"], bound.get("bias"))
        elif func is functional.embedding:
            bound = dict(zip(("input", "weight", "padding_idx", "max_norm"), args, strict=False)) | kwargs
            if self._cut(bound["weight"]) and bound.get("max_norm") is None:
                return self._embedding(bound["input"], bound["weight"])
        elif func is torch.Tensor.__getitem__ and self._passing(args[0]):
            index = args[1]
            if isinstance(index, torch.Tensor) and index.ndim == 0 and not index.is_floating_point():
                index = int(index)
            if isinstance(index, int) and not isinstance(index, bool):
                name = str(self._name(args[0]))
                index %= args[0].shape[0]
                return self._tagged(name, self._rows(name, index, index + 1)[0])
        return None

    def _cut(self, parameter: torch.Tensor) -> bool:
        """Whether this is a parameter that had better not be held whole."""
        return self._divisible(parameter) and nbytes_of(parameter) > min(self.block, self.cache)

    def _passing(self, parameter: torch.Tensor) -> bool:
        """Whether this is a parameter that is not kept: experts are asked for one after the other."""
        return self._divisible(parameter) and self._kept_bytes + nbytes_of(parameter) > self.cache

    def _divisible(self, parameter: torch.Tensor) -> bool:
        """Whether this is a parameter on disk of which rows can be read."""
        name = self._name(parameter)
        return name is not None and name not in self._kept and self.reader.recipes[name].sliceable

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        name = str(self._name(weight))
        rows = weight.shape[0]
        step = max(1, self.block // (nbytes_of(weight) // rows))
        y = x.new_empty(*x.shape[:-1], rows)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            y[..., start:stop] = functional.linear(x, self._rows(name, start, stop))
        if bias is not None:
            y += self._load(bias)
        self.observe(name, x, y)
        return y

    def _embedding(self, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        name = str(self._name(weight))
        present, inverse = torch.unique(ids, return_inverse=True)
        table = torch.cat([self._rows(name, i, i + 1) for i in present.tolist()])
        return functional.embedding(inverse, table)

    def _rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return _computable(self.reader.rows(name, start, stop))

    def _name(self, tensor: object) -> str | None:
        """The name of a parameter that is not in memory, None for everything else."""
        if isinstance(tensor, nn.Parameter) and tensor.is_meta:
            return self.reader.names[id(tensor)]
        return None

    def _load(self, value: Any) -> Any:
        name = self._name(value)
        if name is None:
            return value
        kept = self._kept.get(name)
        if kept is not None:
            self._kept.move_to_end(name)
            return kept
        tensor = self._tagged(name, _computable(self.reader.whole(name)))
        self._keep(name, tensor)
        return tensor

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        """Keep what comes first, up to the limit: the next pass asks in the same order."""
        if self._kept_bytes + tensor.nbytes <= self.cache:
            self._kept[name] = tensor
            self._kept_bytes += tensor.nbytes

    def _tagged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        setattr(tensor, _TAG, name)
        return tensor

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Report a product with a parameter; keep track of its views."""
        if func in _VIEWS:
            name = next((t for t in map(_tag, tensors_in(args)) if t is not None), None)
            for tensor in tensors_in((result,)):
                if name is not None and _tag(tensor) is None:
                    self._tagged(name, tensor)
        elif func in _PRODUCTS and isinstance(result, torch.Tensor):
            places, words = _PRODUCTS[func]
            if func is torch.einsum and len(args) == 2:
                args = (args[0], *args[1])
            factors = [
                args[place] if place < len(args) else kwargs.get(word)
                for place, word in zip(places, words, strict=True)
            ]
            named = [(_tag(f), f) for f in factors if isinstance(f, torch.Tensor)]
            weights = [name for name, _ in named if name is not None]
            inputs = [factor for name, factor in named if name is None]
            if len(weights) == 1 and len(inputs) == 1:
                self.observe(weights[0], inputs[0], result)


def _computable(tensor: torch.Tensor) -> torch.Tensor:
    """Float32, whatever a floating-point tensor is stored as; others as they are."""
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


def _tag(tensor: object) -> str | None:
    return getattr(tensor, "__dict__", {}).get(_TAG) if isinstance(tensor, torch.Tensor) else None


def _replace(value: Any, load: Callable[[Any], Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return load(value)
    if type(value) in (list, tuple):
        return type(value)(_replace(item, load) for item in value)
    return value
