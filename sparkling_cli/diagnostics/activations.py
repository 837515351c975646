"""Forward passes over a checkpoint, or over two in step, with every linear layer measured (Eq. 1, 3).

Weights are read from the files while they are used (``lazy``), so a model larger than memory can be
measured; everything is computed in float32, whatever the weights are stored in.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparkling_cli.checkpoint.model import Checkpoint
from sparkling_cli.diagnostics.data import LENGTH, SEQUENCES, Tokens, load_tokens
from sparkling_cli.diagnostics.measurement import (
    ActivationReport,
    LayerStat,
    LogitsChange,
    Measurement,
    StreamStat,
    compare,
    root_mean,
)
from sparkling_cli.errors import LayoutError, MissingDependencyError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from sparkling_cli.diagnostics.lazy import LazyWeights

#: Config keys that limit a sequence's length.
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "block_size", "seq_length")


@dataclass
class _Squares:
    """A running sum of squares."""

    total: float = 0.0
    count: int = 0

    def add(self, tensor: torch.Tensor) -> None:
        import torch

        norm = float(torch.linalg.vector_norm(tensor.detach().reshape(-1), dtype=torch.float64))
        self.total += norm * norm
        self.count += tensor.numel()

    @property
    def rms(self) -> float:
        return root_mean(self.total, self.count)


class Probe:
    """A checkpoint's model, measured while it runs.

    Order of use: construct, ``run`` any number of batches, ``result``, ``close``; or as a context
    manager.

    Args:
        checkpoint: with a config that names a transformers class, or use ``model``.
        model: ``package.module:factory`` of the user's own model.
        memory: bytes for weights; half of it is kept from batch to batch.

    Raises:
        LayoutError: no model can be built.
        CheckpointError: the weights do not fit the model.
        MissingDependencyError: transformers is needed and not installed.
    """

    def __init__(self, checkpoint: Checkpoint, *, model: str | None = None, memory: int = 1 << 29) -> None:
        from sparkling_cli.checkpoint.read import TensorSource
        from sparkling_cli.diagnostics.lazy import LazyWeights, load_buffers
        from sparkling_cli.diagnostics.parameters import parameter_reader

        self.checkpoint = checkpoint
        self.model = build_lazy(checkpoint, model)
        self._layers: dict[str, tuple[_Squares, _Squares, int]] = {}
        self._streams: dict[str, dict[str, _Squares]] = {}
        self._logits = _Squares()
        self._loss, self._predicted = 0.0, 0
        self._source = TensorSource(checkpoint)
        reader = parameter_reader(self.model, self._source)
        self.unused = reader.unused
        load_buffers(self.model, reader)
        self._labels = _labels(self.model, reader.names)
        self._weights: LazyWeights = LazyWeights(
            reader, self._observe, block=max(1, memory // 8), cache=memory // 2
        )
        for path, blocks in _block_lists(self.model):
            blocks[0].register_forward_pre_hook(self._before_blocks(path), with_kwargs=True)
            for i, block in enumerate(blocks):
                block.register_forward_hook(self._after_block(path, f"{path}.{i}"))

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
        from torch import nn

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

    def run(self, ids: torch.Tensor) -> torch.Tensor:
        """One forward pass over ids [sequences, tokens]; logits [sequences, tokens, vocab]."""
        import torch

        with torch.no_grad(), self._weights:
            if hasattr(getattr(self.model, "config", None), "to_dict"):
                found: Any = self.model(input_ids=ids, use_cache=False)
            else:
                found = self.model(ids)
        logits = getattr(found, "logits", found)
        if isinstance(logits, (tuple, list)):
            logits = logits[0]
        if not isinstance(logits, torch.Tensor) or logits.ndim != 3:
            raise LayoutError("the model's forward(ids) returns neither logits nor .logits")
        self._logits.add(logits)
        self._add_loss(logits, ids)
        return logits

    def result(self) -> Measurement:
        """What all passes so far amount to."""
        # The longest list that ran: a vision tower beside a language model did not.
        stream = max(self._streams.values(), key=len, default={})
        return Measurement(
            layers=tuple(
                LayerStat(name, x.rms, y.rms, calls) for name, (x, y, calls) in self._layers.items()
            ),
            stream=tuple(StreamStat(name, squares.rms) for name, squares in stream.items()),
            logits_rms=self._logits.rms,
            loss=self._loss / self._predicted if self._predicted else None,
            unused=self.unused,
        )

    def _sizes(self) -> Mapping[str, Any]:
        config: Any = getattr(self.model, "config", None)
        if hasattr(config, "get_text_config"):
            sizes: Mapping[str, Any] = config.get_text_config().to_dict()
            return sizes
        return self.checkpoint.config or {}

    def _observe(self, parameter: str, x: torch.Tensor, y: torch.Tensor) -> None:
        label = self._labels.get(parameter, parameter)
        ins, outs, calls = self._layers.get(label) or (_Squares(), _Squares(), 0)
        ins.add(x)
        outs.add(y)
        self._layers[label] = (ins, outs, calls + 1)

    def _before_blocks(self, path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._add_stream(path, "embeddings", (*args, *kwargs.values()))

        return hook

    def _after_block(self, path: str, name: str) -> Any:
        def hook(_: nn.Module, __: object, output: Any) -> None:
            self._add_stream(path, name, (output,))

        return hook

    def _add_stream(self, path: str, name: str, values: tuple[Any, ...]) -> None:
        hidden = _first_tensor(values)
        if hidden is not None:
            self._streams.setdefault(path, {}).setdefault(name, _Squares()).add(hidden)

    def _add_loss(self, logits: torch.Tensor, ids: torch.Tensor) -> None:
        from torch.nn import functional

        if logits.shape[1] != ids.shape[1]:
            return
        for row, targets in zip(logits, ids, strict=True):
            for part, wanted in zip(_pieces(row[:-1]), _pieces(targets[1:], row.shape[-1]), strict=True):
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
    try:
        import transformers  # noqa: F401
    except ImportError:
        if model is None:
            raise MissingDependencyError(
                "activations are measured on the model that transformers builds, and it is not installed",
                hint="pip install 'sparkling-cli[hf]'",
            ) from None
    from sparkling_cli.diagnostics.lazy import parameters_on_meta
    from sparkling_cli.inference import skeleton

    if model is not None:
        factory = skeleton.load_factory(model)
        with parameters_on_meta():
            return factory(dict(config)).eval()
    built = skeleton.config_object(config)
    with skeleton.quiet(), parameters_on_meta():
        made: nn.Module = skeleton.model_class(config, built)(built)
        tie: Any = getattr(made, "tie_weights", None)
        if tie is not None:
            tie()
    return made.eval()


def measure(
    checkpoint: Checkpoint,
    tokens: Tokens | None = None,
    *,
    data: Path | None = None,
    model: str | None = None,
    memory: int = 1 << 30,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    seed: int = 0,
) -> tuple[Measurement, Tokens]:
    """Measure one checkpoint; the tokens that were used come back with the result."""
    with Probe(checkpoint, model=model, memory=memory // 2) as probe:
        if tokens is None:
            tokens = _tokens_for(probe, data, sequences, length, seed)
        for batch in _batches(tokens.ids, probe.vocab, memory):
            probe.run(batch)
        return probe.result(), tokens


def measure_change(
    before: Checkpoint,
    after: Checkpoint,
    tokens: Tokens | None = None,
    *,
    data: Path | None = None,
    model: str | None = None,
    memory: int = 1 << 30,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    seed: int = 0,
) -> tuple[ActivationReport, Measurement, Measurement]:
    """Measure two checkpoints on the same tokens, in step, batch by batch.

    Args:
        before: the source.
        after: the widened one.
        tokens: what to run; None to choose by ``data``, ``sequences``, ``length`` and ``seed``.
        data: see :func:`~sparkling_cli.diagnostics.data.load_tokens`.
        model: ``package.module:factory`` of both.
        memory: budget in bytes for weights, activations and logits together, besides the interpreter.
        sequences: at most.
        length: tokens per sequence, at most; the models' own limit holds.
        seed: of random tokens.
    """
    with ExitStack() as stack:
        first = stack.enter_context(Probe(before, model=model, memory=memory // 4))
        second = stack.enter_context(Probe(after, model=model, memory=memory // 4))
        if tokens is None:
            tokens = _tokens_for(first, data, sequences, length, seed)
        change: _LogitsMeter | None = _LogitsMeter()
        for batch in _batches(tokens.ids, max(first.vocab, second.vocab), memory):
            old, new = first.run(batch), second.run(batch)
            if old.shape != new.shape:
                change = None
            if change is not None:
                change.add(old, new)
        one, two = first.result(), second.result()
    moved = None if change is None else change.result()
    report = compare(
        one, two, logits=moved, tokens=tokens.source, random=tokens.random, count=tokens.ids.numel()
    )
    return report, one, two


def _pieces(positions: torch.Tensor, vocab: int | None = None) -> tuple[torch.Tensor, ...]:
    """Positions of logits a few at a time, so that copies of them stay small."""
    import torch

    each = positions.shape[-1] if vocab is None else vocab
    pieces: tuple[torch.Tensor, ...] = torch.split(positions, max(1, (1 << 19) // each))
    return pieces


class _LogitsMeter:
    """Sums up how far logits moved, position by position."""

    def __init__(self) -> None:
        self.largest, self.reference = 0.0, 0.0
        self.difference, self.size = _Squares(), _Squares()

    def add(self, old: torch.Tensor, new: torch.Tensor) -> None:
        for a, b in zip(_pieces(old.flatten(0, 1)), _pieces(new.flatten(0, 1)), strict=True):
            moved = b.double() - a.double()
            self.largest = max(self.largest, float(moved.abs().max()))
            self.reference = max(self.reference, float(a.abs().max()))
            self.difference.add(moved)
            self.size.add(a)

    def result(self) -> LogitsChange:
        inf = float("inf")
        relative = self.largest / self.reference if self.reference else (inf if self.largest else 0.0)
        norm = self.difference.rms / self.size.rms if self.size.rms else relative
        return LogitsChange(self.largest, relative, norm)


def _tokens_for(probe: Probe, data: Path | None, sequences: int, length: int, seed: int) -> Tokens:
    root = probe.checkpoint.root
    return load_tokens(
        data,
        root if root.is_dir() else None,
        vocab=probe.vocab,
        sequences=sequences,
        length=min(length, probe.context or length),
        seed=seed,
    )


def _batches(ids: torch.Tensor, vocab: int, memory: int) -> tuple[torch.Tensor, ...]:
    """As many sequences at a time as leave their logits, and copies of them, in a quarter of the budget."""
    import torch

    each = ids.shape[1] * vocab * 4 * 4
    batches: tuple[torch.Tensor, ...] = torch.split(ids, max(1, memory // 4 // each))
    return batches


def _labels(model: nn.Module, names: Mapping[int, str]) -> dict[str, str]:
    """Parameter's name with a recipe -> what to call the layer: a tied head is not the embedding."""
    from torch import nn

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
    from torch import nn

    lists: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists.append((path, module))
    return lists


def _first_tensor(values: Any) -> torch.Tensor | None:
    """The first floating-point tensor of at least 3 dims: the hidden states."""
    import torch

    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= 3:
            return value
        if isinstance(value, (tuple, list)):
            found = _first_tensor(value)
            if found is not None:
                return found
    return None
