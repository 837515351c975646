"""What a config key probably sizes, from the root of its name.

These are hints, not knowledge: they choose readable axis names and sensible tiny sizes. What a key
really moves is measured on skeletons, and what a tensor's dims really mean is proved by logits.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sparkling_cli.layout.keys import Path, get_path

#: Parts of a transformers config that never size a tensor of a language model.
_LABELS = frozenset({"id2label", "label2id", "task_specific_params"})

#: First match wins. The order goes from the special to the general.
_HINTS: tuple[tuple[str, str], ...] = (
    ("layers", r"^(num|n)_(hidden_|decoder_|encoder_)?(layers?|blocks)$|^(de|en)coder_layers$"),
    ("shared_layers", r"^num_kv_shared_layers$"),
    ("multiple", r"multiple_of$"),
    ("vocab", r"vocab_size|_vocab$"),
    ("token", r"_(token_id|index|token_index|idx)$|_id$"),
    ("positions", r"position_embeddings$|^n_positions$|^n_ctx$|max_.*(length|positions|seq_len)$"),
    ("groups", r"^n_group$|topk_group|expert_group"),
    ("blocks", r"^o_groups$"),
    ("top_k", r"experts?_per_tok|top_?k|^moe_k$"),
    ("shared_experts", r"shared_experts?$|^n_shared|zero_expert"),
    ("experts", r"^(moe_)?(num|n)_(routed_|local_)?experts$"),
    ("shared_ffn", r"shared.*(intermediate|inner|ffn)"),
    ("expert_ffn", r"(moe|expert).*(intermediate|ffn|inner)|ffn_hidden_size_moe"),
    ("q_lora", r"q_lora"),
    ("kv_lora", r"kv_lora"),
    ("qk_nope", r"qk_nope_head_dim"),
    ("qk_rope", r"qk_rope_head_dim"),
    ("v_dim", r"v_head_dim"),
    ("rotary", r"^rotary_dim$"),
    ("window", r"window|chunk_size|local_attention|block_size"),
    ("kv_heads", r"key_value_heads|(num_kv|kv_n)_heads|num_query_groups|multi_query_group"),
    ("head_dim", r"head_dim|headdim|d_head$|kv_channels|dim_head|head_size"),
    ("heads", r"^((num|n)_)?(decoder_|encoder_)?(attention_)?heads?(_per_layer)?$"),
    (
        "ffn",
        r"intermediate|ffn|feed_forward|^n_inner$|^d_ff$|^dff$|^dim_ff$|^d_inner$|inner_hidden|mlp_dim",
    ),
    (
        "hidden",
        r"^hidden_size$|^d_model$|^n_embd$|^emb_dim$|^dim$|^model_dim$|^(input_|output_)?"
        r"embedding_size$|^lru_width$|word_embed_proj_dim|^attention_hidden_size$|^embedding_dim$|^embed_dim$",
    ),
)

#: Kinds of the axes that counts of heads are made of.
HEADS = frozenset({"heads", "kv_heads", "q_per_kv"})

#: Parts of a composite config that hold no language model.
OTHER_MODALITY = re.compile(r"vision|audio|image|img|speech|codec|depth")

#: Keys of such a part that say how wide its output is.
_OUTPUT = re.compile(
    r"^(out|output|proj|projection|projector|text|llm|lm|language)_|_output_dim$|^output_dims?$"
)

#: Tiny sizes: pairwise unambiguous, also their doubles and the usual products.
TINY_SIZES: Mapping[str, int] = {
    "layers": 2,
    "multiple": 1,
    "vocab": 97,
    "positions": 64,
    "top_k": 2,
    "shared_experts": 1,
    "experts": 10,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 8,
    "hidden": 72,
    "ffn": 56,
    "expert_ffn": 22,
    "shared_ffn": 34,
    "q_lora": 26,
    "kv_lora": 14,
    "qk_nope": 12,
    "qk_rope": 4,
    "v_dim": 18,
    "window": 8,
    "blocks": 2,
}


@functools.lru_cache(maxsize=4096)
def kind_of(key: str) -> str | None:
    """Return the kind that the name of a config key hints at, or None."""
    for kind, pattern in _HINTS:
        if re.search(pattern, key):
            return kind
    return None


def walk(config: Mapping[str, Any], prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every leaf of a nested config with its path; lists are leaves."""
    for key, value in config.items():
        if key in _LABELS:
            continue
        if isinstance(value, Mapping):
            yield from walk(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def tower_outputs(config: Mapping[str, Any], hidden: int) -> list[Path]:
    """Keys of parts for other modalities that give the width of what enters the text, where it is as wide."""
    inside = [path for path in tower_widths(config, hidden) if _is_output(config, path)]
    return inside + _beside_towers(config, hidden)


def _beside_towers(config: Mapping[str, Any], hidden: int) -> list[Path]:
    """Numbers beside a tower and a text part, each in a table of its own, that repeat the text's hidden size.

    PaliGemma has the width of what enters the text there, ``projection_dim``, and the width itself again.
    """
    tables = {path[0] for path, _ in walk(config) if len(path) > 1}
    towers = set(filter(OTHER_MODALITY.search, tables))
    texts = {path[0] for path, _ in walk(config) if len(path) > 1 and kind_of(path[-1]) == "vocab"}
    if not towers or not texts - towers:
        return []
    same = [key for key, value in config.items() if type(value) is int and value == hidden]
    return [(key,) for key in same if _OUTPUT.search(key) or kind_of(key) == "hidden"]


def tower_widths(config: Mapping[str, Any], hidden: int) -> list[Path]:
    """Keys of parts for other modalities with the text's hidden size as their value."""
    found = ((path, value) for path, value in walk(config) if type(value) is int and value == hidden)
    return [path for path, _ in found if OTHER_MODALITY.search(".".join(path[:-1]))]


def _is_output(config: Mapping[str, Any], path: Path) -> bool:
    """Whether the name says so; a part with a width of its own, ``embed_dim``, ends in ``hidden_size``."""
    inner = get_path(config, (*path[:-1], "embed_dim"))
    return bool(_OUTPUT.search(path[-1])) or (path[-1] == "hidden_size" and isinstance(inner, int))
