"""What of a config no layout depends on, as far as that is known; all else must be as it was proved.

The ranges are those whose ends are tried when an entry is made. A key outside of its range, or of another
type, makes a config unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: Written beside a model's own keys; a model's class does not see them, or nothing of it depends on them.
UNSEEN = frozenset(
    {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "architectures", "model_type"}
    | {"use_cache", "id2label", "label2id"}
)
#: Numbers that scale or regularize: lowest and highest value that are tried.
NUMBERS: tuple[tuple[str, float, float], ...] = (
    (r"(^|_)(eps|epsilon)$", 1e-12, 1e-3),
    (r"^(initializer_range|init_std|initializer_factor)$", 1e-4, 1.0),
    (r"dropout(_prob)?$|_pdrop$|^layerdrop$", 0.0, 0.5),
    (r"(loss|aux|z)_(loss_)?coef(ficient)?$|^router_jitter_noise$|^input_jitter_noise$", 0.0, 1.0),
    (r"^embedding_multiplier$", 1.0, 64.0),
    (r"^residual_multiplier$", 0.1, 1.0),
    (r"^attention_multiplier$", 0.005, 1.0),
    (r"^logits_scaling$", 0.5, 32.0),
    (r"^logit_scale$", 0.03, 2.0),
    (r"^routed_scaling_factor$", 0.5, 16.0),
    (r"^query_pre_attn_scalar$", 16, 1024),
    (r"^max_window_layers$", 1, 512),
)
#: Switches between ways to compute or to report, both of which are tried.
SWITCHES = frozenset({"norm_topk_prob", "output_router_logits"})
#: Keys of rotary embeddings, by type: those that must be there, those that may. All are numbers.
ROPE: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "llama3": (frozenset({"factor", "low_freq_factor", "high_freq_factor"}), _ORIGINAL := frozenset(
        {"original_max_position_embeddings"}
    )),
    "yarn": (
        frozenset({"factor"}),
        frozenset({"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}) | _ORIGINAL,
    ),
}  # fmt: skip
#: Whether a bound of a rotary type is rounded.
_ROUNDED: Mapping[str, set[str]] = {"yarn": {"truncate"}}
_FACTOR = "partial_rotary_factor"
_TOKEN = re.compile(r"_token_id$")


def number_range(key: str) -> tuple[float, float] | None:
    """Lowest and highest value of a number that no layout depends on; None for other keys."""
    return next(((low, high) for pattern, low, high in NUMBERS if re.search(pattern, key)), None)


def is_token(key: str) -> bool:
    """Whether a key holds the number of a token, or several."""
    return _TOKEN.search(key) is not None


def within(key: str, value: Any, default: Any, vocab: int) -> bool:
    """Whether an irrelevant key has a value that cannot matter, of the type of the default."""
    if key in SWITCHES:
        return isinstance(value, bool)
    if is_token(key):
        tokens = value if isinstance(value, list) and isinstance(default, list) else [value]
        return value is None or all(_whole(t) and 0 <= t < vocab for t in tokens)
    span = number_range(key)
    if span is None or type(value) is not type(default):
        return False
    return bool(span[0] <= value <= span[1])


def is_irrelevant(key: str, default: Any) -> bool:
    """Whether a key of a class is one that no layout depends on, if its value is :func:`within` bounds."""
    if key in SWITCHES:
        return isinstance(default, bool)
    number = isinstance(default, (int, float)) and not isinstance(default, bool)
    return is_token(key) or (number and number_range(key) is not None)


def plain_rope(value: Any) -> tuple[str, Any] | dict[str, str] | None:
    """Rotary parameters as far as they could matter: the type and the rotated part, checked for form.

    Returns:
        Both, or a mapping of :func:`rope_text` where layers differ, or None if something is unknown.
    """
    if not isinstance(value, Mapping):
        return None
    if value and all(isinstance(v, Mapping) for v in value.values()):
        inner = {k: plain_rope(v) for k, v in sorted(value.items())}
        texts = {k: rope_text(*v) for k, v in inner.items() if isinstance(v, tuple)}
        return texts if len(texts) == len(inner) else None
    kind = value.get("rope_type", value.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE or value.get("type", kind) != kind:
        return None
    needed, possible = ROPE[kind]
    keys = set(value) - {"rope_type", "type", "rope_theta", _FACTOR} - _ROUNDED.get(kind, set())
    numbers = [value[k] for k in keys | ({"rope_theta"} & set(value))]
    if not isinstance(value.get("truncate", False), bool):
        return None
    if not needed <= keys <= needed | possible or not all(_positive(n) for n in numbers):
        return None
    return kind, value.get(_FACTOR)


def rope_text(kind: str, part: Any) -> str:
    """Type and rotated part as one word: a list or mapping would be taken for something per layer."""
    return kind if part is None else f"{kind} {part}"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e12
