"""A tiny config of the same class, with every kind of layer that the real one has.

The tiny instance stands for the real model in every test, so it must share its structure (layer kinds,
grouped queries, biases, ties, shared experts) and must not share an accident: its sizes are pairwise
unambiguous. What a class accepts is found by trying: candidates are built and run, first fit wins.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.keys import Path, get_path, set_path
from sparkling_cli.models.sizes import kind_of, walk
from sparkling_cli.models.skeleton import ConfigDict, ModelFactory, build_model, text_config, words_of
from sparkling_cli.models.tiny_config import (
    VARIANTS,
    Variant,
    candidate,
    kept_layers,
    layer_count,
)

Shapes = dict[str, tuple[int, ...]]

_MAX_LAYERS = 12
#: A tiny model must stay tiny, or its proof would take minutes.
_MAX_ENTRIES = 20_000_000
#: Beyond that a smaller one is looked for first.
_MANY_ENTRIES = 3_000_000
#: Layer counts that may fail before a variant is given up; some patterns need a third or fourth layer.
_PATIENCE = 2
#: Decoders whose input has a row for each codebook.
_CODEBOOKS = frozenset({"musicgen", "musicgen_decoder", "musicgen_melody", "musicgen_melody_decoder"})
_INDEXED = re.compile(r"\.(\d+)\.")


def shrink(config: Mapping[str, Any], *, factory: ModelFactory | None = None) -> ConfigDict:
    """Return a tiny config of the same class whose model builds and runs.

    Args:
        config: of the real model.
        factory: the user's own model.

    Raises:
        LayoutError: no candidate was accepted; the message holds what the class raised.
    """
    real = text_config(config, factory=factory)
    reasons: list[str] = []
    try:
        kinds = layer_kinds(build_model(real, factory=factory))
    except Exception as error:  # a class whose own defaults do not build: let tiny sizes try
        kinds = frozenset()
        reasons.append(f"the config itself: {type(error).__name__}: {error}".splitlines()[0])
    large: ConfigDict | None = None
    for variant in VARIANTS:
        failed = 0
        if large is not None and not variant.compact:
            continue
        for tiny in _with_layers(real, variant):
            if failed > _PATIENCE and layer_count(tiny) < _MAX_LAYERS:
                continue  # the last try has as many layers as a tiny model may have
            try:
                skeleton = build_model(tiny, factory=factory)
                if not kinds <= layer_kinds(skeleton):
                    continue
                entries = sum(p.numel() for p in skeleton.parameters())
                if entries > _MAX_ENTRIES:
                    reasons.append(f"it keeps {entries} entries: some of its sizes are not in its config")
                    break
                run(build_model(tiny, meta=False, factory=factory), tokens(tiny))
                tiny = _explicit(tiny, variant, factory)
                if large is None and entries > _MANY_ENTRIES:
                    large = tiny
                    break
            except Exception as error:  # any model code may raise anything
                reasons.append(" ".join(f"{type(error).__name__}: {error}".split())[:200])
                failed += 1
                continue
            return tiny
    if large is not None:
        return large
    if factory is None and _wants_decoder_input(real):
        raise LayoutError(
            f"{(real.get('architectures') or [real.get('model_type')])[0]} is an encoder-decoder model that "
            "does not run on input_ids alone: it needs decoder_input_ids beside them, and layouts are proved "
            "on input_ids only",
            hint="give a layout file (--layout FILE)",
        )
    why = "; ".join(dict.fromkeys(reasons)) or "not every kind of layer fits into few layers"
    raise LayoutError(
        f"no tiny model of {config.get('model_type', 'this class')!r} could be built and run: {why}",
        hint="give a layout file (--layout FILE)",
    )


def _wants_decoder_input(real: ConfigDict) -> bool:
    """Whether a tiny model of an encoder-decoder class runs once the decoder has input of its own."""
    if not real.get("is_encoder_decoder"):
        return False
    for variant in VARIANTS:
        tiny = candidate(real, variant, 2)
        with contextlib.suppress(Exception):  # any model code may raise anything
            ids = tokens(tiny)
            build_model(tiny, meta=False)(input_ids=ids, decoder_input_ids=ids, use_cache=False)
            return True
    return False


def tiny_configs(real: ConfigDict) -> Iterator[ConfigDict]:
    """Tiny configs of a class that build and run, whatever they can be told apart by; for what is known."""
    for variant in VARIANTS:
        for tiny in _with_layers(real, variant):
            try:
                run(build_model(tiny, meta=False), tokens(tiny))
            except Exception:  # any model code may raise anything
                continue
            yield tiny
            break


def layer_kinds(model: nn.Module) -> frozenset[frozenset[str]]:
    """The distinct sets of parameter names below one numbered layer, numbers blanked."""
    layers: dict[str, set[str]] = {}
    for name, value in model.state_dict().items():
        match = _INDEXED.search(name)
        if match:
            rest = _INDEXED.sub(".#.", name[match.end() - 1 :])
            layers.setdefault(name[: match.end()], set()).add(f"{rest}:{value.ndim}")
    return frozenset(frozenset(v) for v in layers.values())


def tokens(config: Mapping[str, Any], *, seed: int = 0) -> torch.Tensor:
    """Random token ids (1, 11) inside the vocabulary, clear of special ids; a row per codebook."""
    vocab = [v for p, v in walk(config) if kind_of(p[-1]) == "vocab" and isinstance(v, int) and v]
    books = [v for p, v in walk(config) if p[-1] == "num_codebooks" and isinstance(v, int)]
    generator = torch.Generator().manual_seed(seed)
    rows = books[0] if books and config.get("model_type") in _CODEBOOKS else 1
    return torch.randint(5, min(vocab, default=60), (rows, 11), generator=generator)


@torch.no_grad()
def run(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits (batch, tokens, vocab) of a plain forward pass, without gradients.

    Raises:
        LayoutError: the model returns no logits.
    """
    return forward(model, ids)


def forward(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The same with gradients, where they are on."""
    found = model(input_ids=ids, use_cache=False) if hasattr(model, "config") else model(ids)
    logits = getattr(found, "logits", found)
    if isinstance(logits, tuple):
        logits = logits[0]
    if not isinstance(logits, torch.Tensor):
        raise LayoutError("the model's forward(input_ids) returns neither logits nor .logits")
    return logits


def _with_layers(real: ConfigDict, variant: Variant) -> Iterator[ConfigDict]:
    """Candidates with ever more layers, until every kind of layer fits."""
    for count in range(max(2, len(kept_layers(real))), _MAX_LAYERS + 1):
        yield candidate(real, variant, count)


def _explicit(tiny: ConfigDict, variant: Variant, factory: ModelFactory | None) -> ConfigDict:
    """Write sizes that the config leaves to be derived, wherever the class honours them.

    A head_dim or an inner width that has no key of its own would tie axes together that the class can
    well tell apart.
    """
    for path in _derived(tiny):
        before = shapes(tiny, factory)
        for value in _explicit_values(path, tiny, variant):
            explicit = changed(tiny, {path: value})
            try:
                honoured = shapes(explicit, factory) != before or kind_of(path[-1]) == "kv_heads"
                if honoured:
                    run(build_model(explicit, meta=False, factory=factory), tokens(explicit))
            except Exception:  # not accepted: it stays derived
                continue
            if honoured:
                tiny = explicit
                break
    return tiny


def _derived(tiny: ConfigDict) -> list[Path]:
    """Keys that may be written although the config leaves them empty."""
    found = [p for p, v in walk(tiny) if v is None and kind_of(p[-1]) in ("ffn", "head_dim", "kv_heads")]
    for path, _ in walk(tiny):
        beside = (*path[:-1], "head_dim")
        if kind_of(path[-1]) == "heads" and get_path(tiny, beside) is None and beside not in found:
            found.append(beside)
    return found


def _explicit_values(path: Path, tiny: ConfigDict, variant: Variant) -> list[int]:
    kind = str(kind_of(path[-1]))
    if kind == "kv_heads":
        heads = [v for p, v in walk(tiny) if p[:-1] == path[:-1] and kind_of(p[-1]) == "heads"]
        return [v for v in heads[:1] if isinstance(v, int)]
    size = variant.sizes[kind]
    return [size, size + 4] if kind == "head_dim" else [size]


def shapes(config: ConfigDict, factory: ModelFactory | None) -> Shapes:
    """Shapes of the state dict, from a meta build."""
    return {k: tuple(v.shape) for k, v in build_model(config, factory=factory).state_dict().items()}


def moved_dims(before: Shapes, after: Shapes) -> dict[tuple[str, int], tuple[int, int]]:
    """(tensor, dim) -> its entries before and after, where these differ in a tensor that both models have."""
    return {
        (name, dim): (a, b)
        for name, shape in before.items()
        if len(after.get(name, ())) == len(shape)
        for dim, (a, b) in enumerate(zip(shape, after.get(name, ()), strict=True))
        if a != b
    }


def changed(config: Mapping[str, Any], values: Mapping[Path, Any]) -> ConfigDict:
    """A deep copy with other values; where a list was, all its entries are the new value."""
    found = copy.deepcopy(dict(config))
    for path, value in values.items():
        old = get_path(found, path)
        set_path(found, path, [value] * len(old) if isinstance(old, list) else value)
    return found


def tried_shapes(config: ConfigDict, factory: ModelFactory | None) -> Shapes | str:
    """The same, or what the class raises on the config; any model code may raise anything."""
    try:
        return shapes(config, factory)
    except Exception as error:
        return words_of(error)
