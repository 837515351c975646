"""Between copies and random entries, on ``ffn``: noise on copies, or a share of the new channels drawn anew.

Made from an expansion by copy-copy, by changing its new channels and alpha. Without noise and with nothing
drawn it is copy-copy, with nothing but noise, or all drawn, random-random.

Alpha keeps the variance of ``W x`` under the assumptions of Eq. 14-17 (features of mean zero, independent,
of one variance). A noisy copy ``(w + sigma s e) / sqrt(1 + sigma^2)``, s the deviation of the old entries,
keeps their variance and has a correlation ``rho = 1/sqrt(1 + sigma^2)`` with its source. As that holds of
rows and of columns, the products of a source and its copy are correlated by ``rho^2``, those of two copies
by ``rho^4``, and n copies of a source beside it give ``1 + 2 n rho^2 + n + n (n-1) rho^4`` times its
variance; a channel drawn anew adds 1. At ``rho = 1`` that is Eq. 16-17, at 0, or all drawn, Eq. 14.
"""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def change(folder: Path, old: int, seed: int, *, noise: float = 0.0, mix: float = 0.0) -> None:
    """Change the weights of an expanded checkpoint in place.

    Args:
        folder: the checkpoint, of a class with ``up_proj``, ``gate_proj`` and ``down_proj``.
        old: width of ``ffn`` before; the new one is a multiple of it.
        seed: of what is drawn.
        noise: on copies, as a share of the standard deviation of the old entries.
        mix: share of the new channels that is drawn anew; the last ones.
    """
    path = folder / "model.safetensors"
    weights = load_file(path)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        rows = name.endswith(("up_proj.weight", "gate_proj.weight"))
        if not rows and not name.endswith("down_proj.weight"):
            continue
        wide = weight.double() if rows else weight.double().T
        kept = wide[:old] * (1 if rows else len(wide) / old)  # alpha of copies was old / new
        made = torch.cat([kept, _channels(kept, len(wide) - old, noise, mix, generator)])
        made *= 1 if rows else alpha(old, len(wide), noise, mix)
        weights[name] = (made if rows else made.T).to(weight.dtype).contiguous()
    save_file(weights, path, metadata={"format": "pt"})


def _channels(
    old: torch.Tensor, count: int, noise: float, mix: float, generator: torch.Generator
) -> torch.Tensor:
    """New channels, one a row, before alpha."""
    std, mean = old.std(correction=0), old.mean()
    numbers = torch.randn(count, old.shape[1], generator=generator, dtype=old.dtype)
    copies = old.repeat(count // len(old), 1)
    made = (copies + noise * std * numbers) / sqrt(1 + noise * noise)
    fresh = round(mix * count)
    made[count - fresh :] = mean + std * numbers[count - fresh :]
    return made


def alpha(old: int, new: int, noise: float, mix: float) -> float:
    """The fan-in factor."""
    fresh = round(mix * (new - old))
    rounds, extra = divmod(new - old - fresh, old)
    square = 1 / (1 + noise * noise)
    sizes = [(rounds + 1, extra), (rounds, old - extra)]
    variance = sum(c * (1 + 2 * n * square + n + n * (n - 1) * square**2) for n, c in sizes) + fresh
    return sqrt(old / variance)
