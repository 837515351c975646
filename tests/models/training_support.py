"""A real optimizer step, widened through files, against the widened model's own backward and forward.

Nothing here reads a layout. Where an entry of a widened parameter came from is found by its value, as no
two values are equal; what its gradient must be follows from the chain rule: if the widened model says the
same whatever the small one's weights are, then ``dL/dW[j] = c * sum of dL/dW'[i]`` over the copies i of j,
with ``W'[i] = c W[j] + b``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from inference_support import batch, shake
from transformers import Trainer

from sparkling_cli.models.skeleton import build_model

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Trained:
    """A small model after one step of AdamW, saved as a Trainer would.

    Attributes:
        model: the module after the step, in a dtype that it runs in.
        values: its parameters in float64, no two entries equal.
        folder: weights, config and ``optimizer.pt``.
        numbers: parameter -> its number in ``optimizer.pt``.
        ids: the batch, (2, L); with codebooks (2 books, L).
    """

    model: Any
    values: Tensors
    folder: Path
    numbers: Mapping[str, int]
    ids: torch.Tensor


@dataclass(frozen=True)
class Origin:
    """Where the entries of one widened parameter came from: ``W'.flatten() = c W.flatten()[source] + b``."""

    source: torch.Tensor
    c: torch.Tensor
    b: float


def trained(config: Mapping[str, Any], folder: Path) -> Trained:
    """One AdamW step on random tokens, in float64 where the class can; saved in float64."""
    model: Any = shake(build_model(config, meta=False))
    ids = batch(model)
    model = in_double(model, ids)
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    named = [(n, p) for n, p in model.named_parameters() if p.is_floating_point()]
    ordered = [n for n, _ in named if n in decayed] + [n for n, _ in named if n not in decayed]
    parameters = dict(named)
    groups = [
        {"params": [parameters[n] for n in ordered if (n in decayed) == decays], "weight_decay": weight}
        for decays, weight in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    backward(model, ids)
    optimizer.step()
    # Two entries of one value could not be told apart; float32 rounds none of this noise in.
    noise = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in parameters.values():
            fine = torch.rand(p.shape, generator=noise, dtype=torch.float64)
            p.data = p.data.double() * (1 + 1e-9 * fine)
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    values = values_of(model)
    return Trained(in_double(model, ids), values, folder, {n: i for i, n in enumerate(ordered)}, ids)


def reloaded(small: Trained, folder: Path) -> Any:
    """The widened model from its files, every tensor of it found there, in float64.

    Raises:
        AssertionError: names the tensors that are not.
    """
    found, info = type(small.model).from_pretrained(
        folder,
        dtype=torch.float64,
        output_loading_info=True,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["mismatched_keys"], info["mismatched_keys"]
    return found.eval()


def values_of(model: Any) -> Tensors:
    """Parameters, copied, in float64."""
    return {n: p.detach().double().clone() for n, p in model.named_parameters() if p.is_floating_point()}


def in_double(model: Any, ids: torch.Tensor) -> Any:
    """The model in float64, or in float32 where its code mixes dtypes."""
    try:
        with torch.no_grad():
            logits = model.double()(input_ids=ids, use_cache=False).logits
        assert torch.isfinite(logits).all()
    except (RuntimeError, TypeError, AssertionError):
        return model.float()
    return model


def backward(model: Any, ids: torch.Tensor) -> Tensors:
    """Gradients of the next-token loss, by parameter; those that the loss does not reach are absent."""
    for p in model.parameters():
        p.grad = None
    logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return {n: p.grad.detach().double().clone() for n, p in model.named_parameters() if p.grad is not None}


def origin(small: torch.Tensor, wide: torch.Tensor) -> Origin:
    """Find every entry of a widened parameter among the entries of the small one, by value.

    The first two entries are old ones: they tell the factor, and for norms that compute ``1 + w`` the
    offset. A few classes keep some parameters in float32 whatever they are asked for.

    Raises:
        AssertionError: some entry is no copy.
    """
    old, new = small.flatten(), wide.flatten()
    if len(old) == len(new) == 1:
        return Origin(torch.zeros(1, dtype=torch.long), torch.ones(1), float(new[0] - old[0]))
    rounding = 1e-6 if bool((new == new.float().double()).all()) else 1e-12
    if small.shape == wide.shape and float((wide - small).abs().max() / small.abs().max()) <= rounding:
        return Origin(torch.arange(len(old)), torch.ones(new.shape), 0.0)
    c, b = float(new[0] / old[0]), 0.0
    if abs(float(new[1]) - c * float(old[1])) > rounding * abs(c * float(old[1])):
        c = float((new[1] - new[0]) / (old[1] - old[0]))
        b = float(new[0] - c * old[0])
    source, error = nearest(old, (new - b) / c)
    if error > rounding and small.ndim == 2:
        return by_columns(small, wide)
    assert error <= rounding, f"entries that are no copies, off by {error:.1e}"
    return Origin(source, torch.full(new.shape, c), b)


def by_columns(small: torch.Tensor, wide: torch.Tensor) -> Origin:
    """The same where only some columns carry a factor: ratios inside a row or a column have none."""
    columns, first = nearest(small[1] / small[0], wide[1] / wide[0])
    rows, second = nearest(small[:, 0] / small[0, 0], wide[:, 0] / wide[0, 0])
    factors = (wide[0] / small[0][columns]).expand_as(wide)
    error = float((wide - factors * small[rows][:, columns]).abs().max() / wide.abs().max())
    assert max(first, second, error) < 1e-10, f"entries that are no copies, off by {error:.1e}"
    return Origin((rows[:, None] * small.shape[1] + columns).flatten(), factors.flatten(), 0.0)


def nearest(values: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Places of the nearest values, and the largest distance to them relative to the largest value."""
    ordered, order = values.sort()
    right = torch.searchsorted(ordered, wanted).clamp(1, len(ordered) - 1)
    below = (wanted - ordered[right - 1]).abs() < (wanted - ordered[right]).abs()
    found = torch.where(below, right - 1, right)
    return order[found], float((ordered[found] - wanted).abs().max() / values.abs().max())


def state_of(folder: Path) -> dict[int, Tensors]:
    """State by number, tensors of more than one entry."""
    found = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    return {
        number: {slot: t.double() for slot, t in slots.items() if slot != "step"}
        for number, slots in found.items()
    }


def outputs_by_module(model: Any, ids: torch.Tensor) -> Tensors:
    """The first float tensor that each module returns, by module."""
    found: Tensors = {}

    def watch(name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            for t in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel():
                    found[name] = t
                    return

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if n]
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def rms(tensor: torch.Tensor) -> float:
    """Root of the mean square (Eq. 1)."""
    return float(tensor.double().square().mean().sqrt())
