"""A slow expander, written from the formulas of the method and the classes' own shapes alone.

It knows nothing of layouts, views or kernels: each class's tensors are written down by hand, index by index.
Equations are those of arXiv 2602.02472.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import product
from math import prod, sqrt
from typing import NamedTuple

import numpy as np
import torch

#: an axis, a fixed size, or parts with labels behind each other
Item = str | int | tuple[tuple[str, int], ...]
COPY, RANDOM, ZERO = "copy", "random", "zero"


class Dim(NamedTuple):
    """A dim: what it does (out, in, bias, keep), its axes flattened row-major, and its label."""

    does: str
    items: tuple[Item, ...]
    label: str = ""


def out(*items: Item, label: str = "") -> Dim:
    """Rows of a producer."""
    return Dim("out", items, label)


def into(*items: Item) -> Dim:
    """Columns of a consumer."""
    return Dim("in", items)


def keep(*items: Item) -> Dim:
    """Elementwise, or nothing that grows."""
    return Dim("keep", items)


class Entry(NamedTuple):
    """One index of a widened dim: where it comes from, whether and how it is new, its factor."""

    source: int
    new: bool
    label: str
    factor: float


class Widening(NamedTuple):
    """Axis sizes before, and after where they grow; the pair, ``fan-out`` and ``fan-in``."""

    before: Mapping[str, int]
    after: Mapping[str, int]
    fan_out: str
    fan_in: str

    def alpha(self, axis: str) -> float:
        """Eq. 14, and the general form of Eq. 16-17: d / sum of squared multiplicities."""
        d, wide = self.before[axis], self.after[axis]
        if (self.fan_out, self.fan_in) != (COPY, COPY):
            return sqrt(d / wide)
        times = [sum(1 for t in range(wide) if t % d == j) for j in range(d)]
        return sqrt(d / sum(m * m for m in times))

    def entries(self, dim: Dim, scaled: bool) -> list[Entry]:
        """All indices of a widened dim, in order."""
        choices: list[list[tuple[int, int, bool, str, float]]] = []
        for item in dim.items:
            if isinstance(item, tuple):
                labels = [label for label, size in item for _ in range(size)]
                choices.append([(i, len(labels), False, label, 1.0) for i, label in enumerate(labels)])
                continue
            d = self.before[item] if isinstance(item, str) else item
            wide = self.after.get(item, d) if isinstance(item, str) else d
            factor = self.alpha(item) if scaled and isinstance(item, str) and item in self.after else 1.0
            choices.append([(t % d, d, t >= d, dim.label, factor) for t in range(wide)])
        found = []
        for chosen in product(*choices):
            source, new, label, factor = 0, False, dim.label, 1.0
            for index, size, is_new, part, own in chosen:
                source, new, label, factor = source * size + index, new or is_new, part or label, factor * own
            found.append(Entry(source, new, label, factor))
        return found

    def fill(self, dim: Dim, entry: Entry) -> str:
        """How a new index is filled: q, k and gate are never zeroed."""
        if not entry.new or dim.does == "keep":
            return COPY
        if dim.does == "in":
            return self.fan_in
        return COPY if self.fan_out == ZERO and entry.label in ("q", "k", "gate") else self.fan_out

    def tensor(self, value: torch.Tensor, dims: Sequence[Dim]) -> tuple[np.ndarray, np.ndarray]:
        """The widened tensor, and which of its entries are random (NaN in it)."""
        sides = [self.entries(dim, dim.does == "in") for dim in dims]
        picked = value.double().numpy()[np.ix_(*([entry.source for entry in side] for side in sides))]
        fills = np.zeros(picked.shape, dtype=int)
        for axis, (dim, side) in enumerate(zip(dims, sides, strict=True)):
            shape = [1] * len(dims)
            shape[axis] = -1
            picked = picked * np.array([entry.factor for entry in side]).reshape(shape)
            order = [(COPY, RANDOM, ZERO).index(self.fill(dim, entry)) for entry in side]
            fills = np.maximum(fills, np.array(order).reshape(shape))
        picked[fills == 2] = 0
        return picked, fills == 1


def in_blocks(
    asked: Widening, value: torch.Tensor, blocks: Sequence[tuple[Dim, ...]]
) -> tuple[np.ndarray, np.ndarray]:
    """A tensor of blocks of rows behind each other, each widened by itself."""
    sizes = [prod(asked.before[i] if isinstance(i, str) else int(i) for i in b[0].items) for b in blocks]  # type: ignore[arg-type]
    made = [asked.tensor(part, dims) for part, dims in zip(value.split(sizes), blocks, strict=True)]
    return np.concatenate([entries for entries, _ in made]), np.concatenate([random for _, random in made])


HEADS: dict[str, tuple[Dim, ...]] = {
    r"self_attn\.q_proj\.weight": (out("kv_heads", "q_per_kv", 14, label="q"), into("hidden")),
    r"self_attn\.k_proj\.weight": (out("kv_heads", 14, label="k"), into("hidden")),
    r"self_attn\.v_proj\.weight": (out("kv_heads", 14, label="v"), into("hidden")),
    r"self_attn\.o_proj\.weight": (out("hidden"), into("kv_heads", "q_per_kv", 14)),
}
MLP: dict[str, tuple[Dim, ...]] = {
    r"mlp\.gate_proj\.weight": (out("ffn", label="gate"), into("hidden")),
    r"mlp\.up_proj\.weight": (out("ffn", label="up"), into("hidden")),
    r"mlp\.down_proj\.weight": (out("hidden"), into("ffn")),
}
EXPERTS: dict[str, tuple[Dim, ...]] = {
    r"mlp\.experts\.\d+\.gate_proj\.weight": (out("expert_ffn", label="gate"), into("hidden")),
    r"mlp\.experts\.\d+\.up_proj\.weight": (out("expert_ffn", label="up"), into("hidden")),
    r"mlp\.experts\.\d+\.down_proj\.weight": (out("hidden"), into("expert_ffn")),
}
AROUND: dict[str, tuple[Dim, ...]] = {
    r"embed_tokens\.weight": (keep(101), out("hidden")),
    r"lm_head\.weight": (keep(101), into("hidden")),
    r"layernorm\.weight|model\.norm\.weight": (keep("hidden"),),
    r"[qk]_norm\.weight": (keep(14),),
}
#: channels of Mamba 2: two groups, heads of eight
CHANNELS: tuple[Item, ...] = (2, "mamba_expand", "mamba_heads", 8)
#: tensors of blocks: z, x, B, C, dt behind each other; what goes through a nonlinearity is a gate
BLOCKS: dict[str, tuple[tuple[Dim, ...], ...]] = {
    r"in_proj\.weight": (
        (out(*CHANNELS, label="gate"), into("hidden")),
        (out(*CHANNELS), into("hidden")),
        (keep(32), into("hidden")),
        (keep(32), into("hidden")),
        (out(*CHANNELS[:3], label="gate"), into("hidden")),
    ),
    r"conv1d\.weight": tuple((keep(*items), keep(1), keep(4)) for items in (CHANNELS, (32,), (32,))),
    r"conv1d\.bias": ((out(*CHANNELS),), (keep(32),), (keep(32),)),
}
#: kinds that have them
MAMBA = ("mamba2", "bamba")
#: kind -> pattern of a name -> its dims
TENSORS: dict[str, dict[str, tuple[Dim, ...]]] = {
    "llama": {**HEADS, **MLP, **AROUND},
    "gemma2": {**HEADS, **MLP, **AROUND},
    "qwen3_moe": {**HEADS, **EXPERTS, r"mlp\.gate\.weight": (keep(6), into("hidden")), **AROUND},
    "deepseek_v3": {
        r"q_a_proj\.weight": (keep(24), into("hidden")),
        r"q_a_layernorm\.weight": (keep(24),),
        r"q_b_proj\.weight": (out("heads", (("q", 10), ("q", 8))), keep(24)),
        r"kv_a_proj_with_mqa\.weight": (keep(24), into("hidden")),
        r"kv_a_layernorm\.weight": (keep(16),),
        r"kv_b_proj\.weight": (out("heads", (("k", 10), ("v", 14))), keep(16)),
        r"o_proj\.weight": (out("hidden"), into("heads", 14)),
        **EXPERTS,
        r"shared_experts\.(gate|up)_proj\.weight": (out("expert_ffn", label="by name"), into("hidden")),
        r"shared_experts\.down_proj\.weight": (out("hidden"), into("expert_ffn")),
        **MLP,
        r"mlp\.gate\.weight": (keep(4), into("hidden")),
        r"e_score_correction_bias": (keep(4),),
        **AROUND,
    },
    "gpt_neox": {
        r"embed_in\.weight": (keep(101), out("hidden")),
        r"embed_out\.weight": (keep(101), into("hidden")),
        r"(layernorm|layer_norm)\.(weight|bias)": (keep("hidden"),),
        r"query_key_value\.weight": (out("heads", (("q", 1), ("k", 1), ("v", 1)), 10), into("hidden")),
        r"query_key_value\.bias": (out("heads", (("q", 1), ("k", 1), ("v", 1)), 10),),
        r"attention\.dense\.weight": (out("hidden"), into("heads", 10)),
        r"dense_h_to_4h\.weight": (out("ffn"), into("hidden")),
        r"dense_h_to_4h\.bias": (out("ffn"),),
        r"dense_4h_to_h\.weight": (out("hidden"), into("ffn")),
        r"(dense|dense_4h_to_h)\.bias": (out("hidden"),),
    },
    "mamba2": {
        r"embeddings\.weight": (keep(101), out("hidden")),
        r"lm_head\.weight": (keep(101), into("hidden")),
        r"mixer\.norm\.weight": (keep(*CHANNELS),),
        r"(norm|norm_f)\.weight": (keep("hidden"),),
        r"dt_bias|A_log|D": (keep(*CHANNELS[:3]),),
        r"out_proj\.weight": (out("hidden"), into(*CHANNELS)),
    },
    "bamba": {
        **HEADS,
        **{pattern.replace("mlp", "feed_forward"): dims for pattern, dims in MLP.items()},
        r"mamba\.norm\.weight": (keep(*CHANNELS),),
        r"dt_bias|A_log|D": (keep(*CHANNELS[:3]),),
        r"out_proj\.weight": (out("hidden"), into(*CHANNELS)),
        **AROUND,
    },
    "gpt2": {
        r"wte\.weight": (keep(101), out("hidden")),
        r"wpe\.weight": (keep(43), out("hidden")),
        r"ln_\w\.(weight|bias)": (keep("hidden"),),
        r"c_attn\.weight": (into("hidden"), out((("q", 1), ("k", 1), ("v", 1)), "heads", 10)),
        r"c_attn\.bias": (out((("q", 1), ("k", 1), ("v", 1)), "heads", 10),),
        r"attn\.c_proj\.weight": (into("heads", 10), out("hidden")),
        r"c_fc\.weight": (into("hidden"), out("ffn")),
        r"c_fc\.bias": (out("ffn"),),
        r"mlp\.c_proj\.weight": (into("ffn"), out("hidden")),
        r"c_proj\.bias": (out("hidden"),),
    },
}


def expanded(
    kind: str, weights: Mapping[str, torch.Tensor], asked: Widening
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every tensor of a widened model: its entries, and which of them are random."""
    result = {}
    tied = not {"lm_head.weight", "embed_out.weight"} & weights.keys()
    for name, value in weights.items():
        blocks = next((b for p, b in BLOCKS.items() if kind in MAMBA and re.search(rf"\.{p}$", name)), None)
        if blocks is not None:
            result[name] = in_blocks(asked, value, blocks)
            continue
        pattern = next(p for p in TENSORS[kind] if re.search(rf"(^|[._])({p})$", name))
        dims = TENSORS[kind][pattern]
        if dims[0].label == "by name":
            dims = (dims[0]._replace(label="gate" if "gate_proj" in name else "up"), *dims[1:])
        made, random = asked.tensor(value, dims)
        if "hidden" in asked.after:
            growth = asked.after["hidden"] / asked.before["hidden"]
            final = re.search(r"(^model\.norm|ln_f)\.", name) is not None
            if kind == "gemma2":  # embeddings are multiplied by sqrt(hidden); norms compute 1 + w
                made = made / sqrt(growth) if "embed_tokens" in name else made
                made = (made + 1) * asked.alpha("hidden") * sqrt(growth) - 1 if final else made
            elif tied and final:  # App. D.1
                made = made * asked.alpha("hidden")
        result[name] = made, random
    return result
