"""One candidate for a tiny config: layers that show every kind, sizes by kind, tables renumbered."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparkling_cli.layout.depth import FIRST, by_number, lists_layers, table_of
from sparkling_cli.layout.keys import Path, get_path, set_path
from sparkling_cli.models.sizes import OTHER_MODALITY, TINY_SIZES, kind_of, tower_outputs, walk
from sparkling_cli.models.skeleton import ConfigDict

#: widths inside of towers of other modalities: what text does not reach need not be as large as it is
_WIDTH, _WIDE = re.compile(r"(input|output|proj\w*)_dim$"), 1024
#: Sizes that some default configs leave open although the class needs them.
_FILLED = frozenset({"head_dim", "experts", "shared_experts", "kv_heads", "top_k"})
_FILLABLE = re.compile(r"_heads$|_head_dim$|_budget$|_ratio$|^clip_qkv$")


@dataclass(frozen=True)
class Variant:
    """One way to choose tiny sizes; tried in order until the class accepts one."""

    sizes: Mapping[str, int]
    coupled: bool = False
    """hidden = heads * head_dim, for classes without a head_dim of their own"""
    grouped: bool = True
    """keep fewer kv heads than heads where the real config has them"""
    filled: bool = False
    """give sizes that the config leaves empty a value from the start"""
    compact: bool = False
    """choose sizes of state-space mixers too, and keep a size that is the product of two others"""
    related: bool = False
    """keep products of the real config: a head size that is c * hidden / heads stays so"""


_POWERS = {
    **TINY_SIZES,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 16,
    "hidden": 64,
    "ffn": 96,
    "expert_ffn": 48,
    "shared_ffn": 80,
    "experts": 8,
    "v_dim": 16,
    "qk_nope": 16,
    "qk_rope": 8,
}
VARIANTS = (
    Variant(TINY_SIZES),
    Variant(TINY_SIZES, related=True),
    Variant(TINY_SIZES, filled=True),
    Variant(TINY_SIZES, coupled=True),
    Variant(_POWERS),
    Variant(_POWERS, related=True, filled=True),
    Variant(_POWERS, coupled=True),
    Variant(_POWERS, coupled=True, grouped=False),
    Variant(TINY_SIZES, compact=True),
    Variant(_POWERS, compact=True),
)


def layer_count(config: Mapping[str, Any]) -> int:
    """The largest number of layers that the config names, 0 for none."""
    leaves = list(walk(config))
    counts = [v for p, v in leaves if kind_of(p[-1]) == "layers" and isinstance(v, int)]
    # A class without such a number counts the entries of a list of kinds.
    lists = [
        len(v) for p, v in leaves if isinstance(v, list) and re.search(r"^layers?_(block_)?types?$", p[-1])
    ]
    return max(counts or lists, default=0)


def layer_table(path: Path) -> int | None:
    """The layer that a key of a table by layer number stands for (``per_layer.05.head_dim``)."""
    return next((int(key) for key in path if key.isdigit()), None)


def kept_layers(real: Mapping[str, Any]) -> list[int]:
    """Indices of layers that together show every value of everything that is set per layer."""
    total = layer_count(real)
    values: list[list[str]] = [[] for _ in range(total)]
    for path, value in walk(real):
        table = layer_table(path)
        if lists_layers(path[-1], value, total):
            for i in range(total):
                values[i].append(str(i in value))
        elif isinstance(value, list) and len(value) == total and total > 1:
            for i in range(total):
                values[i].append(repr(value[i]))
        elif table is not None and table < total:
            values[table].append(f"{path[-1]}={value}")
        elif kind_of(path[-1]) == "shared_layers" and isinstance(value, int) and 0 < value < total:
            for i in range(total):  # the last ones take keys and values from earlier ones
                values[i].append(str(i >= total - value))
    seen: dict[str, int] = {}
    for i in range(total if any(values) else 0):
        seen.setdefault(repr(values[i]), i)
    return sorted(seen.values())


def chosen_layers(real: Mapping[str, Any], count: int) -> list[int]:
    """The real layer that each of ``count`` layers of a tiny model stands for."""
    total, kept = layer_count(real), kept_layers(real)
    indices = sorted((kept + [i for i in range(total) if i not in kept])[:count])
    return indices + [total - 1] * (count - len(indices))


def real_path(path: Path, layers: Sequence[int]) -> Path:
    """A tiny config's path in the real one: keys of tables by layer number are renumbered."""
    return tuple(
        str(layers[int(key)]).zfill(len(key)) if key.isdigit() and int(key) < len(layers) else key
        for key in path
    )


def candidate(real: ConfigDict, variant: Variant, count: int) -> ConfigDict:
    """A config with ``count`` layers that show every kind, and the variant's sizes."""
    tiny = copy.deepcopy(real)
    total = layer_count(real)
    indices = chosen_layers(real, count)
    used: dict[tuple[str, Any], int] = {}
    for path, value in walk(real):
        key = path[-1]
        if lists_layers(path[-1], value, total):
            set_path(tiny, path, [new for new, old in enumerate(indices) if old in value])
        elif isinstance(value, list) and total > 1 and len(value) == total:
            set_path(tiny, path, [_element(key, value[i], variant) for i in indices])
        elif kind_of(key) == "shared_layers" and isinstance(value, int):
            set_path(tiny, path, sum(i >= total - value for i in indices))
        elif FIRST.search(key) and isinstance(value, int) and value > 0:
            set_path(tiny, path, 1)
        elif type(value) is int:
            new = _integer(real, path, value, variant, count, used)
            if new is not None:
                set_path(tiny, path, new)
        elif value is None and variant.filled and kind_of(key) in _FILLED:
            set_path(tiny, path, variant.sizes[str(kind_of(key))])
        elif value is None and variant.filled and _FILLABLE.search(key):
            set_path(tiny, path, 8 if key.endswith(("dim", "qkv")) else 1 if "kv" in key else 2)
        elif value is None and key == "default_language" and real.get("languages"):
            set_path(tiny, path, real["languages"][0])
        elif key == "is_decoder" and value is False and variant.filled:
            set_path(tiny, path, True)
        elif value is None and key == "layer_types" and variant.filled:
            set_path(tiny, path, ["full_attention"] * count)
    if variant.related:
        _relate(real, tiny)
    if variant.compact:
        _compact(real, tiny)
    if variant.filled:
        for inner in (v for v in tiny.values() if isinstance(v, dict) and "model_type" in v):
            inner.setdefault("rope_theta", 10000.0)
        if tiny.get("rope_parameters") == {}:
            kinds = tiny.get("layer_types") or ()
            tiny["rope_parameters"] = {
                kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in kinds
            }
    main = _main_hidden(real)
    if main is not None:
        for path in tower_outputs(real, get_path(real, main)):
            set_path(tiny, path, get_path(tiny, main))
    _renumber(tiny, indices)
    _plain_rope(real, tiny)
    return tiny


def _main_hidden(real: Mapping[str, Any]) -> Path | None:
    """The key of the text's hidden size: the one beside the vocabulary."""
    text = {p[:-1] for p, _ in walk(real) if kind_of(p[-1]) == "vocab"}
    found = [p for p, v in walk(real) if kind_of(p[-1]) == "hidden" and p[:-1] in text and isinstance(v, int)]
    return found[0] if found else None


def _relate(real: Mapping[str, Any], tiny: ConfigDict) -> None:
    """Keep ``size = c * hidden`` and ``size = c * hidden / heads`` where the real config has them."""
    main = next((p for p, _ in walk(real) if kind_of(p[-1]) == "hidden"), None)
    if main is None:
        return
    hidden, small = get_path(real, main), get_path(tiny, main)
    beside = [(p, v) for p, v in walk(real) if p[:-1] == main[:-1]]
    paths = [p for p, v in beside if type(v) is int]
    for path in paths:
        value = get_path(real, path)
        wide = re.search(r"hidden_size$|_dim$|_width$", path[-1]) and kind_of(path[-1]) != "head_dim"
        if path != main and wide and value % hidden == 0 and value // hidden in (1, 2, 3, 4):
            set_path(tiny, path, value // hidden * small)
    counts = [p for p in paths if re.search(r"heads$|n_head$", p[-1]) and get_path(real, p) > 1]
    for path in paths:
        if kind_of(path[-1]) not in ("head_dim", "v_dim") or get_path(real, path) <= 1:
            continue
        fits = [n for n in counts if get_path(real, path) * get_path(real, n) % hidden == 0]
        for heads in sorted(fits, key=lambda n: -_shared_words(n[-1], path[-1]))[:1]:
            times = get_path(real, path) * get_path(real, heads) // hidden
            number = min(get_path(tiny, heads), 6)
            set_path(tiny, heads, number)
            if 1 <= times <= 4 and times * small % number == 0:
                set_path(tiny, path, times * small // number)


#: Tiny sizes of state-space mixers, by the key.
_MIXER = (
    (re.compile(r"^(mamba_n|mamba_num|n_mamba)_heads$"), 4),
    (re.compile(r"(^|_)(d_state|state_size)$"), 12),
)


def _compact(real: Mapping[str, Any], tiny: ConfigDict) -> None:
    """Make state-space mixers small, and keep ``size = heads * head size`` where the real config has it."""
    numbers = {p: v for p, v in walk(real) if type(v) is int and v > 1}
    for path, value in numbers.items():
        small = next((size for key, size in _MIXER if key.search(path[-1])), None)
        if small is not None:
            set_path(tiny, path, min(value, small))
        elif re.search(r"(^|_)n?_?groups$", path[-1]):
            set_path(tiny, path, min(value, 2))
    heads = [p for p in numbers if _MIXER[0][0].search(p[-1])]
    for count in heads:
        beside = [p for p in numbers if p[:-1] == count[:-1] and kind_of(p[-1]) == "head_dim"]
        width = max(beside, key=lambda p: _shared_words(p[-1], count[-1]), default=None)
        if width is None:
            continue
        for whole, value in numbers.items():
            if (
                whole[:-1] == count[:-1]
                and value == numbers[count] * numbers[width]
                and kind_of(whole[-1]) is None
            ):
                set_path(tiny, whole, get_path(tiny, count) * get_path(tiny, width))


def _shared_words(a: str, b: str) -> int:
    return len(set(a.split("_")) & set(b.split("_")))


def _renumber(tiny: ConfigDict, indices: list[int]) -> None:
    """Tables by layer number follow the layers that were kept."""
    for key, value in tiny.items():
        if by_number(value):
            tiny[key] = copy.deepcopy(table_of(value, indices))
        elif isinstance(value, dict):
            _renumber(value, indices)


def _element(key: str, value: Any, variant: Variant) -> Any:
    kind = kind_of(key)
    if type(value) is int and kind in variant.sizes and value:
        return variant.sizes[str(kind)]
    return value


def _integer(
    real: Mapping[str, Any],
    path: Path,
    value: int,
    variant: Variant,
    count: int,
    used: dict[tuple[str, Any], int],
) -> int | None:
    """The tiny value of one integer key, or None to keep it."""
    kind = kind_of(path[-1])
    if kind == "layers":
        return count if value > 0 else value
    if kind == "token":
        return min(value, 3)
    if kind == "groups":
        return min(value, 2 if path[-1].startswith("n") else 1)
    if kind == "rotary":
        return min(value, 4)
    if (
        kind is None
        and value >= _WIDE
        and _WIDTH.search(path[-1])
        and OTHER_MODALITY.search(".".join(path[:-1]))
    ):
        return _inside_tower(real, path, value, used)
    if kind is None or kind not in variant.sizes or value <= 0:
        return None
    if kind == "kv_heads":
        if _equal_heads(real, path, value):
            kind = "heads"  # one count for both, in every layer that has it
        else:
            return 1 if value == 1 else variant.sizes["kv_heads" if variant.grouped else "heads"]
    if kind == "hidden" and variant.coupled:
        return variant.sizes["heads"] * variant.sizes["head_dim"]
    if kind == "head_dim":
        derived = _latent_head_dim(real, path, value, variant)
        if derived is not None:
            return derived
    if kind in ("top_k", "shared_experts", "positions", "window", "blocks"):
        return min(value, variant.sizes[kind])
    return used.setdefault((kind, value), _another(kind, variant.sizes[kind], _known(kind, used)))


def _known(kind: str, used: Mapping[tuple[str, Any], int]) -> int:
    """How many sizes of a kind the tiny config has already."""
    return sum(other == kind for other, _ in used)


def _inside_tower(
    real: Mapping[str, Any], path: Path, value: int, used: dict[tuple[str, Any], int]
) -> int | None:
    """The tiny value of a width inside a tower that no other name of its config hints at; None to keep it."""
    beside = [v for p, v in walk(real) if p[:-1] == path[:-1] and p != path and kind_of(p[-1]) is not None]
    if value in beside:  # it may have to be the same
        return None
    return used.setdefault(("tower", value), 64 + 8 * _known("tower", used))


def _another(kind: str, base: int, nth: int) -> int:
    """A further size of a kind; of streams no multiple, as classes leave out a projection between equals."""
    if kind != "hidden" or nth == 0:
        return base * (1 + nth)
    unit = base // 3 if base % 3 == 0 else base // 2
    return unit * (5, 7, 11, 13)[min(nth, 4) - 1]


def _latent_head_dim(real: Mapping[str, Any], path: Path, value: int, variant: Variant) -> int | None:
    """A head size that repeats the rotary part, or both parts, of a latent attention's heads."""
    rope = get_path(real, (*path[:-1], "qk_rope_head_dim"))
    if not isinstance(rope, int):
        return None
    parts = [v for p, v in walk(real) if p[-1] == "qk_nope_head_dim" and isinstance(v, int)]
    for nth, nope in enumerate(dict.fromkeys(parts)):
        if value == rope + nope:
            return variant.sizes["qk_rope"] + variant.sizes["qk_nope"] * (1 + nth)
    return variant.sizes["qk_rope"] if value == rope else None


def _equal_heads(real: Mapping[str, Any], path: Path, value: int) -> bool:
    """Whether a kv-head count equals the count of query heads beside it."""
    beside = path[-1].replace("key_value_heads", "attention_heads").replace("kv_heads", "heads")
    heads = None if beside == path[-1] else get_path(real, (*path[:-1], beside))
    return bool((heads or get_path(real, (*path[:-1], "num_attention_heads"))) == value)


def _plain_rope(real: Mapping[str, Any], tiny: ConfigDict) -> None:
    """Replace rotary scaling, whose tables are as long as the real head_dim, by plain rotary."""
    for key, value in list(tiny.items()):
        if key in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            nested = [k for k, v in value.items() if isinstance(v, dict)]
            for inner in [value[k] for k in nested] or [value]:
                _plain(inner, _head_dim(real), _head_dim(tiny))
        elif isinstance(value, dict):
            _plain_rope(real.get(key) or {}, value)


def _head_dim(config: Mapping[str, Any]) -> int:
    """Entries of an attention head; 0 where the config does not say."""
    hidden, heads, given = (config.get(k) for k in ("hidden_size", "num_attention_heads", "head_dim"))
    if isinstance(given, int):
        return given
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else 0


def _plain(rope: ConfigDict, real: int, tiny: int) -> None:
    """Tables of the real head's length go, shares of a head shrink with it; scalars fit every size.

    Args:
        rope: parameters of rotary embeddings, changed.
        real: entries of a head, 0 where that is not known.
        tiny: those of the tiny model.
    """
    lists = [k for k, v in rope.items() if isinstance(v, list)]
    for key in lists:
        shares = rope.pop(key)
        if key.endswith("_section") and real and tiny:
            parts = [n * tiny // real for n in shares]
            parts[0] += sum(shares) * tiny // real - sum(parts)
            rope[key] = parts
    if lists:
        rope["rope_type"] = "default"
