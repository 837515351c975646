"""What the re-warmup's hooks cost: time per training step and memory, for a model of 100M parameters.

``python -m benchmarks.train_overhead [--rounds 5] [--tokens 1024] [--json FILE]``

Whole training steps (forward, backward, optimizer) without and with hooks, in alternating order, on the same
model and state, so that a busy machine troubles both alike. "hooks" is the median extra time of the
optimizer's step, and its share that of the whole step; "whole steps" is the ratio of neighbours, its median
and its quartiles, which has the noise of forward and backward in it. Times are the process's own CPU time on
one thread. Memory is the largest growth of the process's peak during an optimizer step with hooks, above that
of one without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim import SGD, AdamW, Muon, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from sparkling_cli.models.infer import infer
from sparkling_cli.schedule.curves import Curve
from sparkling_cli.schedule.rewarmup import add_stage
from sparkling_cli.training import History, Rewarming, rewarm

#: 10 layers, hidden 768, ffn 1024 -> 2048: 96M parameters after widening
CONFIG = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 16384,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


def history(config: LlamaConfig) -> History:
    """Half of ffn is new; the run is at the peak of the re-warmup."""
    layout = infer(config.to_dict(), axes=["ffn"])
    ffn = config.intermediate_size
    baseline = Curve("cosine", 1e-3, 1e-5, 0.0, 100, 10_000)
    rewarmup = add_stage(None, baseline, 5_000, rho=1.3, steps=0)
    return History(layout, {"ffn": [[0, ffn // 2, 0], [ffn // 2, ffn, 1]]}, rewarmup)


def peak_bytes(step: Any) -> int:
    """Peak of memory that torch's CPU allocator handed out during a call, above what it held before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    level = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


def measure(
    name: str, model: LlamaForCausalLM, found: History, ids: torch.Tensor, rounds: int
) -> dict[str, Any]:
    """Seconds of a step and of its parts, and the extra peak of memory in bytes."""
    optimizer = make(name, model)

    def timed(hooks: bool) -> tuple[float, float]:
        """Seconds of the whole step and of the optimizer's."""
        named = parameters(name, model)
        handle: Rewarming | None = rewarm(optimizer, named, found, announce=False) if hooks else None
        began = time.process_time()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        passed = time.process_time()
        optimizer.step()
        ended = time.process_time()
        if handle is not None:
            handle.remove()
        return ended - began, ended - passed

    timed(False)  # makes the state
    pairs = []
    for i in range(rounds):
        order = (False, True) if i % 2 else (True, False)
        both = {hooks: timed(hooks) for hooks in order}
        pairs.append((both[False], both[True]))
    without = peak_bytes(optimizer.step)
    handle = rewarm(optimizer, parameters(name, model), found, announce=False)
    with_hooks = peak_bytes(optimizer.step)
    handle.remove()
    ratios = [hooked[0] / plain[0] for plain, hooked in pairs]
    return {
        "whole": statistics.median(plain[0] for plain, _ in pairs),
        "optimizer": statistics.median(plain[1] for plain, _ in pairs),
        "hooks": statistics.median(hooked[1] - plain[1] for plain, hooked in pairs),
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4, method="inclusive")[::2],
        "extra_bytes": float(with_hooks - without),
    }


def parameters(name: str, model: LlamaForCausalLM) -> list[tuple[str, torch.Tensor]]:
    """What the optimizer takes: Muon matrices only."""
    return [(n, p) for n, p in model.named_parameters() if name != "muon" or p.ndim == 2]


def make(name: str, model: LlamaForCausalLM) -> Optimizer:
    """The optimizer of a row."""
    params = [p for _, p in parameters(name, model)]
    if name == "adamw-fused":
        return AdamW(params, lr=1e-3, fused=True)
    if name == "adamw-foreach":
        return AdamW(params, lr=1e-3, foreach=True)
    if name == "sgd-momentum":
        return SGD(params, lr=1e-3, momentum=0.9)
    return Muon(params, lr=1e-3)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the forward and backward pass")
    parser.add_argument("--optimizers", nargs="+", default=["adamw-fused", "adamw-foreach", "sgd-momentum"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = LlamaConfig(**CONFIG)
    model = LlamaForCausalLM(config)
    entries = sum(p.numel() for p in model.parameters())
    ids = torch.randint(config.vocab_size, (1, options.tokens))
    found = history(config)
    print(f"{entries / 1e6:.0f}M parameters, {options.tokens} tokens in a step, {options.rounds} rounds")
    print(
        f"{'optimizer':15}{'step':>9}{'optimizer':>11}{'hooks':>9}{'of the step':>13}"
        f"{'whole steps (quartiles)':>26}{'extra memory':>14}"
    )
    results: dict[str, Any] = {"parameters": entries, "tokens": options.tokens}
    for name in options.optimizers:
        row = measure(name, model, found, ids, options.rounds)
        share = row["hooks"] / row["whole"]
        memory = row["extra_bytes"] / (4 * entries)
        results[name] = {**row, "share_of_step": share, "share_of_parameters": memory}
        low, high = row["quartiles"]
        print(
            f"{name:15}{row['whole']:8.3f}s{row['optimizer']:10.3f}s{row['hooks']:8.3f}s{share:>13.2%}"
            f"{row['ratio']:>12.4f} ({low:.4f}-{high:.4f}){memory:>13.2%}",
            flush=True,
        )
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
