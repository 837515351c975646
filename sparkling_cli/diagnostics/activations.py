"""Forward passes over a checkpoint, or over two in step, with every linear layer measured (Eq. 1, 3).

Weights are read from the files while they are used (``lazy``), so a model larger than memory can be
measured; everything is computed in float32, whatever the weights are stored in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from sparkling_cli.diagnostics.data import LENGTH, SEQUENCES, Tokens, load_tokens
from sparkling_cli.diagnostics.measurement import compare, split_name
from sparkling_cli.diagnostics.probe import Probe, pieces
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.layout.depth import Places
from sparkling_cli.results.measured import Activations, Measurement, Routing

if TYPE_CHECKING:
    from pathlib import Path

    import torch

#: begins a stage by its title and the bytes that it goes over (None: not known); called with bytes gone over
Begin = Callable[[str, "int | None"], Callable[[int], None]]


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
            tokens = tokens_for(probe, data, sequences, length, seed)
        for batch in batches_of(tokens.ids, probe.sequence_bytes(tokens.ids.shape[1]), memory):
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
    carried: Mapping[str, float] | None = None,
    widened: Collection[str] = (),
    experts: int | None = None,
    places: Places | None = None,
    begin: Begin | None = None,
) -> tuple[Activations, Measurement, Measurement]:
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
        carried: see :func:`~sparkling_cli.diagnostics.measurement.compare`.
        widened: see there.
        experts: of each router of the source, where those of the widened one are copies of them, in turn.
        places: where the source's layers are, where the other model is deeper.
        begin: is told of the models that are built, and of the bytes of weights that the tokens went through.
    """
    begin = begin or (lambda _title, _total: lambda _count: None)
    begin("building the models", None)
    with ExitStack() as stack:
        first = stack.enter_context(Probe(before, model=model, memory=memory // 4))
        second = stack.enter_context(Probe(after, model=model, memory=memory // 4))
        if tokens is None:
            tokens = tokens_for(first, data, sequences, length, seed)
        logits: _LogitsMeter | None = _LogitsMeter()
        routers = _RoutingMeter(experts)
        each = max(probe.sequence_bytes(tokens.ids.shape[1]) for probe in (first, second))
        batches = batches_of(tokens.ids, each, memory)
        advance = begin("measuring", len(batches) * (first.block_bytes + second.block_bytes))
        first.advance = second.advance = advance
        for batch in batches:
            old, new = first.run(batch), second.run(batch)
            own = first.choices
            routers.add({places.old(n): c for n, c in own.items()} if places else own, second.choices)
            if old.shape[:-1] != new.shape[:-1] or old.shape[-1] > new.shape[-1]:
                logits = None
            if logits is not None:
                logits.add(old, new[..., : old.shape[-1]])  # of the tokens that both have
        one, two = first.result(), second.result()
    report = compare(
        one,
        two,
        data=tokens.source,
        random=tokens.random,
        tokens=tokens.ids.numel(),
        logit_change=None if logits is None else logits.relative_rms,
        logit_largest=None if logits is None else logits.relative_largest,
        routing=routers.result(),
        carried=carried,
        widened=widened,
        places=places,
    )
    return report, one, two


class _LogitsMeter:
    """Sums up how far logits moved, position by position."""

    def __init__(self) -> None:
        from sparkling_cli.diagnostics.stream import Squares

        self.largest, self.reference = 0.0, 0.0
        self.difference, self.size = Squares(), Squares()

    def add(self, old: torch.Tensor, new: torch.Tensor) -> None:
        for a, b in zip(pieces(old.flatten(0, 1)), pieces(new.flatten(0, 1)), strict=True):
            moved = b.double() - a.double()
            self.largest = max(self.largest, float(moved.abs().max()))
            self.reference = max(self.reference, float(a.abs().max()))
            self.difference.add(moved)
            self.size.add(a)

    @property
    def relative_largest(self) -> float:
        """The value of max |after - before| / max |before|."""
        inf = float("inf")
        return self.largest / self.reference if self.reference else (inf if self.largest else 0.0)

    @property
    def relative_rms(self) -> float:
        """The value of ||after - before|| / ||before||."""
        return self.difference.rms / self.size.rms if self.size.rms else self.relative_largest


class _RoutingMeter:
    """Counts the tokens that every router sends, in the second model, to none but their experts in the first.

    Where as many are chosen in both, these are the same sets. A copy of an expert counts as the expert.
    """

    def __init__(self, experts: int | None = None) -> None:
        self.experts = experts
        self.counts: dict[str, tuple[int, int]] = {}

    def add(self, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> None:
        for name, before in old.items():
            after = new.get(name)
            if after is None or len(after) != len(before):
                continue
            if self.experts or after.shape == before.shape:
                same, total = self.counts.get(name, (0, 0))
                chosen = after % self.experts if self.experts else after
                known = (chosen[:, :, None] == before[:, None, :]).any(-1).all(-1)
                same += int(known.sum())
                self.counts[name] = (same, total + len(before))

    def result(self) -> tuple[Routing, ...]:
        return tuple(
            Routing(name=name, layer=split_name(name)[0], tokens=total, kept=same / total)
            for name, (same, total) in self.counts.items()
        )


def tokens_for(probe: Probe, data: Path | None, sequences: int, length: int, seed: int) -> Tokens:
    """The tokens that a checkpoint is measured on."""
    root = probe.checkpoint.root
    return load_tokens(
        data,
        root if root.is_dir() else None,
        vocab=probe.vocab,
        sequences=sequences,
        length=min(length, probe.context or length),
        seed=seed,
    )


def batches_of(ids: torch.Tensor, each: int, memory: int) -> tuple[torch.Tensor, ...]:
    """As many sequences at a time as fit into an eighth of the budget; their logits are held twice."""
    import torch

    batches: tuple[torch.Tensor, ...] = torch.split(ids, max(1, memory // 8 // each))
    return batches
