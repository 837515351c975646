"""One checkpoint's model, built with its weights on disk and measured while it runs (Eq. 1, 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook

from sparkling_cli.diagnostics.lazy import LazyWeights, load_buffers, parameters_on_meta
from sparkling_cli.diagnostics.parameters import ParameterReader
from sparkling_cli.diagnostics.stream import Squares, StreamWatch
from sparkling_cli.errors import LayoutError, MissingDependencyError, SparklingError
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.results.measured import LayerStat, Measurement, StreamStat
from sparkling_cli.storage.read import TensorSource

#: Config keys that limit a sequence's length.
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "block_size", "seq_length")


class Probe:
    """A checkpoint's model, measured while it runs.

    Order of use: construct, ``run`` any number of batches, ``result``, ``close``; or as a context
    manager.

    Args:
        checkpoint: with a config that names a transformers class, or use ``model``.
        model: ``package.module:factory`` of the user's own model.
        memory: bytes for weights; a quarter of it is kept from batch to batch, since what is let go does
            not always return to the system at once.
        source: where its tensors are read, if not from its files.

    Raises:
        LayoutError: no model can be built.
        CheckpointError: the weights do not fit the model.
        MissingDependencyError: transformers is needed and not installed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        model: str | None = None,
        memory: int = 1 << 29,
        source: TensorSource | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.model = build_lazy(checkpoint, model)
        self._layers: dict[str, tuple[Squares, Squares, int]] = {}
        self._streams: dict[str, dict[str, Squares]] = {}
        self._logits = Squares()
        self._vocabulary = 0
        self._loss, self._predicted = 0.0, 0
        self._source = TensorSource(checkpoint) if source is None else source
        reader = ParameterReader(self.model, self._source)
        self.unused = reader.unused
        load_buffers(self.model, reader)
        self._labels = _labels(self.model, reader.names)
        lists = _block_lists(self.model)
        self.advance: Callable[[int], None] = lambda _count: None
        #: called with the list of blocks, the place in it and the residual stream there, when it is there
        self.streamed: Callable[[str, str, torch.Tensor], None] = lambda _path, _name, _hidden: None
        self.blocks = sum(len(blocks) for _, blocks in lists)
        self.block_bytes = sum(_bytes_of(block) for _, blocks in lists for block in blocks)
        self._watch = StreamWatch(
            self.model, {f"{path}.{i}": block for path, blocks in lists for i, block in enumerate(blocks)}
        )
        self._weights = LazyWeights(
            reader, self._observe, self._watch, block=max(1, memory // 8), cache=memory // 4
        )
        for path, blocks in lists:
            for i, block in enumerate(blocks):
                name = f"{path}.{i}"
                block.register_forward_pre_hook(
                    self._before_block(path, name, first=i == 0), with_kwargs=True
                )
                block.register_forward_hook(self._after_block(path, name))

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the checkpoint's files."""
        self._source.close()

    @property
    def vocab(self) -> int:
        """Entries of the vocabulary."""
        config = self._sizes()
        size = config.get("vocab_size")
        if isinstance(size, int):
            return size
        tables = [m.num_embeddings for m in self.model.modules() if isinstance(m, nn.Embedding)]
        if not tables:
            raise LayoutError("the model has no embedding, so its vocabulary is not known")
        return max(tables)

    @property
    def context(self) -> int | None:
        """Longest sequence that the model's config allows; None if it says nothing."""
        limits = [v for k, v in self._sizes().items() if k in _CONTEXT and isinstance(v, int) and v > 1]
        return min(limits, default=None)

    def sequence_bytes(self, length: int) -> int:
        """About what one sequence takes while it runs: four copies of its widest float32 activation."""
        widest = max((max(p.shape[-2:]) for p in self.model.parameters() if p.ndim >= 2), default=1)
        heads = self._sizes().get("num_attention_heads")
        scores = heads * length if isinstance(heads, int) else 0
        return 16 * length * max(self.vocab, widest, scores)

    def run(self, ids: torch.Tensor) -> torch.Tensor:
        """One forward pass over ids [sequences, tokens]; logits [sequences, tokens, vocab]."""
        self._watch.choices.clear()
        hook = register_module_forward_hook(self._watch.module_ended)
        try:
            with torch.no_grad(), self._weights:
                if hasattr(getattr(self.model, "config", None), "to_dict"):
                    found: Any = self.model(input_ids=ids, use_cache=False)
                else:
                    found = self.model(ids)
        except SparklingError:
            raise
        except Exception as error:  # whatever the model's own code raises
            raise LayoutError(
                f"the forward pass of {type(self.model).__name__} failed on {tuple(ids.shape)} tokens: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            hook.remove()
        logits = getattr(found, "logits", found)
        if isinstance(logits, (tuple, list)):
            logits = logits[0]
        if not isinstance(logits, torch.Tensor) or logits.ndim != 3:
            raise LayoutError("the model's forward(ids) returns neither logits nor .logits")
        self._logits.add(logits)
        self._vocabulary = logits.shape[-1]
        self._add_loss(logits, ids)
        return logits

    def result(self) -> Measurement:
        """What all passes so far amount to."""
        # The longest list that ran: a vision tower beside a language model did not.
        path = max(self._streams, key=lambda path: len(self._streams[path]), default="")
        stream = self._streams.get(path, {})
        functions = {n: f for n, f in self._watch.functions.items() if n.startswith(f"{path}.")}
        return Measurement(
            layers=_stats(self._layers),
            functions=_stats(functions),
            stream=tuple(StreamStat(name=name, rms=squares.rms) for name, squares in stream.items()),
            logits_rms=self._logits.rms,
            loss=self._loss / self._predicted if self._predicted else None,
            vocabulary=self._vocabulary,
            unused=self.unused,
        )

    @property
    def choices(self) -> Mapping[str, torch.Tensor]:
        """Block -> the sets of experts of the tokens of the last pass, [tokens, k]."""
        return self._watch.choices

    def squares(self) -> dict[str, tuple[float, float]]:
        """Function -> sums of squares so far: of the stream that it read, and of what it added."""
        found = self._watch.functions.items()
        return {name: (read.total, added.total) for name, (read, added, _) in found}

    def _sizes(self) -> Mapping[str, Any]:
        config: Any = getattr(self.model, "config", None)
        if hasattr(config, "get_text_config"):
            sizes: Mapping[str, Any] = config.get_text_config().to_dict()
            return sizes
        return self.checkpoint.config or {}

    def _observe(self, parameter: str, x: torch.Tensor, y: torch.Tensor) -> None:
        label = self._labels.get(parameter, parameter)
        ins, outs, calls = self._layers.get(label) or (Squares(), Squares(), 0)
        ins.add(x)
        outs.add(y)
        self._layers[label] = (ins, outs, calls + 1)
        self._watch.name_output(label, y)

    def _before_block(self, path: str, name: str, *, first: bool) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            hidden = _first_tensor((*args, *kwargs.values()))
            if hidden is None:
                return
            if first:
                self._add_stream(path, "embeddings", hidden)
            self._watch.enter(name, hidden)

        return hook

    def _after_block(self, path: str, name: str) -> Any:
        def hook(block: nn.Module, __: object, output: Any) -> None:
            self._watch.leave()
            self.advance(_bytes_of(block))
            hidden = _first_tensor((output,))
            if hidden is not None:
                self._add_stream(path, name, hidden)

        return hook

    def _add_stream(self, path: str, name: str, hidden: torch.Tensor) -> None:
        self._streams.setdefault(path, {}).setdefault(name, Squares()).add(hidden)
        self.streamed(path, name, hidden)

    def _add_loss(self, logits: torch.Tensor, ids: torch.Tensor) -> None:
        if logits.shape[1] != ids.shape[1]:
            return
        for row, targets in zip(logits, ids, strict=True):
            for part, wanted in zip(pieces(row[:-1]), pieces(targets[1:], row.shape[-1]), strict=True):
                self._loss += float(functional.cross_entropy(part.float(), wanted, reduction="sum"))
            self._predicted += len(targets) - 1


def build_lazy(checkpoint: Checkpoint, model: str | None) -> nn.Module:
    """The checkpoint's model with parameters on the meta device and real buffers, in eval mode.

    Raises:
        LayoutError: nothing says how to build one, or it cannot be built.
        MissingDependencyError: transformers is needed and not installed.
    """
    config = checkpoint.config
    if config is None or (model is None and "model_type" not in config):
        raise LayoutError(
            f"no model can be built for {checkpoint.root}: no config of a transformers class",
            hint="pass --model package.module:factory to measure activations",
        )
    if config.get("quantization_config"):
        raise LayoutError(
            f"the weights in {checkpoint.root} are quantized; activations are measured on plain weights only"
        )
    try:
        import transformers  # noqa: F401
    except ImportError:
        if model is None:
            raise MissingDependencyError(
                "activations are measured on the model that transformers builds, and it is not installed",
                hint="pip install '.[hf]' in the clone",
            ) from None
    from sparkling_cli.models.skeleton import build_model, load_factory, model_errors

    with model_errors(config, model), parameters_on_meta():
        if model is not None:  # transformers need not be there
            return load_factory(model)(dict(config)).eval()
        return build_model(config, meta=False)


def _bytes_of(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _stats(sums: Mapping[str, tuple[Squares, Squares, int]]) -> tuple[LayerStat, ...]:
    return tuple(LayerStat.of(name, x.rms, y.rms, calls) for name, (x, y, calls) in sums.items())


def _labels(model: nn.Module, names: Mapping[int, str]) -> dict[str, str]:
    """Parameter's name with a recipe -> what to call the layer: a tied head is not the embedding."""
    labels: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{path}.{leaf}" if path else leaf
            name = names[id(parameter)]
            if name not in labels or not isinstance(module, nn.Embedding):
                labels[name] = full.removesuffix(".weight")
    return labels


def _block_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The lists of blocks: those that lie in no other list (experts of a layer do)."""
    lists: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists.append((path, module))
    return lists


def _first_tensor(values: Any) -> torch.Tensor | None:
    """The first floating-point tensor of at least 3 dims: the hidden states."""
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= 3:
            return value
        if isinstance(value, (tuple, list)):
            found = _first_tensor(value)
            if found is not None:
                return found
    return None


def pieces(positions: torch.Tensor, vocab: int | None = None) -> tuple[torch.Tensor, ...]:
    """Positions of logits a few at a time, so that copies of them stay small."""
    each = positions.shape[-1] if vocab is None else vocab
    pieces: tuple[torch.Tensor, ...] = torch.split(positions, max(1, (1 << 19) // each))
    return pieces
