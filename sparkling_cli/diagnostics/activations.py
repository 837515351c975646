"""Forward passes over a checkpoint, or over two in step, with every linear layer measured (Eq. 1, 3).

Weights are read from the files while they are used (``lazy``), so a model larger than memory can be
measured; everything is computed in float32, whatever the weights are stored in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from math import inf, nan, sqrt

import torch

from sparkling_cli.diagnostics.data import USUAL, Sample, Tokens, load_tokens
from sparkling_cli.diagnostics.measurement import UNCHANGED, Enlarged, compare, split_name
from sparkling_cli.diagnostics.probe import Probe, pieces
from sparkling_cli.diagnostics.stream import Squares
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.layout.depth import Places
from sparkling_cli.results.measured import Activations, Measurement, Routing
from sparkling_cli.widening.geometry import Growth

#: begins a stage by its title and the bytes that it goes over (None: not known); called with bytes gone over
Begin = Callable[[str, "int | None"], Callable[[int], None]]


def measure(
    checkpoint: Checkpoint,
    on: Tokens | Sample = USUAL,
    *,
    model: str | None = None,
    memory: int = 1 << 30,
) -> tuple[Measurement, Tokens]:
    """Measure one checkpoint; the tokens that were used come back with the result."""
    with Probe(checkpoint, model=model, memory=memory // 2) as probe:
        tokens = tokens_for(probe, on)
        for batch in batches_of(tokens.ids, probe.sequence_bytes(tokens.ids.shape[1]), memory):
            probe.run(batch)
        return probe.result(), tokens


def measure_change(
    before: Checkpoint,
    after: Checkpoint,
    on: Tokens | Sample = USUAL,
    *,
    model: str | None = None,
    memory: int = 1 << 30,
    done: Enlarged = UNCHANGED,
    begin: Begin | None = None,
) -> tuple[Activations, Measurement, Measurement]:
    """Measure two checkpoints on the same tokens, in step, batch by batch.

    Args:
        before: the source.
        after: the widened one.
        on: tokens, or which to take.
        model: ``package.module:factory`` of both.
        memory: budget in bytes for weights, activations and logits together, besides the interpreter.
        done: to the source.
        begin: is told of the models that are built, and of the bytes of weights that the tokens went through.
    """
    begin = begin or (lambda _title, _total: lambda _count: None)
    begin("building the models", None)
    with ExitStack() as stack:
        first = stack.enter_context(Probe(before, model=model, memory=memory // 4))
        second = stack.enter_context(Probe(after, model=model, memory=memory // 4))
        tokens, places = tokens_for(first, on), done.places
        logits: _LogitsMeter | None = _LogitsMeter()
        routers = _RoutingMeter(done.experts)
        streams = _StreamMeter(memory // 8 // (first.blocks + 1), places)
        first.streamed, second.streamed = streams.keep, streams.compare
        each = max(probe.sequence_bytes(tokens.ids.shape[1]) for probe in (first, second))
        batches = batches_of(tokens.ids, each, memory)
        advance = begin("measuring", len(batches) * (first.block_bytes + second.block_bytes))
        first.advance = second.advance = advance
        for batch in batches:
            old, new = first.run(batch), second.run(batch)
            streams.kept.clear()
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
        done,
        streams.result(),
        data=tokens.source,
        random_tokens=tokens.random,
        tokens=tokens.ids.numel(),
        logit_change=None if logits is None else logits.relative_rms,
        logit_largest=None if logits is None else logits.relative_largest,
        routing=routers.result(),
    )
    return report, one, two


class _LogitsMeter:
    """Sums up how far logits moved, position by position."""

    def __init__(self) -> None:
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


class _StreamMeter:
    """Sums up how far the residual stream moved at every place, in the entries that both models have.

    Those of the first model come first in the second one, so nothing has to be known of what else it has.

    Args:
        memory: bytes for the stream of one pass at one place; of more tokens an even selection is compared.
        places: see :class:`~sparkling_cli.diagnostics.measurement.Enlarged`.
    """

    def __init__(self, memory: int, places: Places | None = None) -> None:
        self.kept: dict[tuple[str, str], torch.Tensor] = {}
        self._memory, self._places = memory, places
        #: list of blocks -> place -> sums of (after - before)^2, before^2, after^2, after * before
        self._sums: dict[str, dict[str, torch.Tensor]] = {}

    def keep(self, path: str, name: str, hidden: torch.Tensor) -> None:
        """The stream at one place of the first model."""
        positions = hidden.flatten(0, -2)
        some = min(len(positions), max(1, self._memory // (4 * positions.shape[-1])))
        place = self._places.old(name) if self._places else name
        self.kept[path, place] = _spread(positions, some).float()

    def compare(self, path: str, name: str, hidden: torch.Tensor) -> None:
        """The stream at one place of the second model; behind a new layer, with that before it."""
        before = self.kept.get((path, self._places.behind(name) or name if self._places else name))
        if before is None or hidden.shape[-1] < before.shape[-1]:
            return
        after = _spread(hidden.flatten(0, -2)[:, : before.shape[-1]], len(before)).double()
        old = before.double()
        pairs = ((after - old, after - old), (old, old), (after, after), (after, old))
        sums = torch.stack([(a * b).sum() for a, b in pairs])
        found = self._sums.setdefault(path, {})
        found[name] = found[name] + sums if name in found else sums

    def result(self) -> dict[str, tuple[float, float]]:
        """Place -> RMS of the change / RMS before, and the cosine between before and after."""
        longest = max(self._sums.values(), key=len, default={})
        return {
            name: (
                sqrt(apart / old) if old else inf if apart else 0.0,
                dot / sqrt(old * new) if old * new else nan,
            )
            for name, (apart, old, new, dot) in ((n, s.tolist()) for n, s in longest.items())
        }


def _spread(positions: torch.Tensor, count: int) -> torch.Tensor:
    """A copy of so many rows, evenly spread."""
    return positions[torch.linspace(0, len(positions) - 1, count).long()]


class _RoutingMeter:
    """Counts the tokens that every router sends, in the second model, to none but their experts in the first.

    Where as many are chosen in both, these are the same sets. A copy of an expert counts as the expert.
    """

    def __init__(self, experts: Growth | None = None) -> None:
        self.experts = experts
        self.sources: dict[int | None, torch.Tensor] = {}
        self.counts: dict[str, tuple[int, int]] = {}

    def add(self, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> None:
        for name, before in old.items():
            after = new.get(name)
            if after is None or len(after) != len(before):
                continue
            if self.experts or after.shape == before.shape:
                same, total = self.counts.get(name, (0, 0))
                chosen = self._sources(name)[after] if self.experts else after
                known = (chosen[:, :, None] == before[:, None, :]).any(-1).all(-1)
                same += int(known.sum())
                self.counts[name] = (same, total + len(before))

    def _sources(self, name: str) -> torch.Tensor:
        """The expert that each one of a router of the second model is a copy of."""
        assert self.experts is not None
        layer = split_name(name)[0]
        if layer not in self.sources:
            growth = self.experts if layer is None else self.experts.in_layer(layer)
            self.sources[layer] = torch.tensor(growth.sources)
        return self.sources[layer]

    def result(self) -> tuple[Routing, ...]:
        return tuple(
            Routing(name=name, layer=split_name(name)[0], tokens=total, kept=same / total)
            for name, (same, total) in self.counts.items()
        )


def tokens_for(probe: Probe, on: Tokens | Sample) -> Tokens:
    """The tokens that a checkpoint is measured on."""
    if isinstance(on, Tokens):
        return on
    root, length = probe.checkpoint.root, min(on.length, probe.context or on.length)
    return load_tokens(replace(on, length=length), root if root.is_dir() else None, probe.vocab)


def batches_of(ids: torch.Tensor, each: int, memory: int) -> tuple[torch.Tensor, ...]:
    """As many sequences at a time as fit into an eighth of the budget; their logits are held twice."""
    batches: tuple[torch.Tensor, ...] = torch.split(ids, max(1, memory // 8 // each))
    return batches
