"""Real OLMo-core checkpoints: its Transformer, its train module and optimizer, its checkpointer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

NARROW: dict[str, Any] = {
    "vocab_size": 67,
    "d_model": 48,
    "n_layers": 2,
    "n_heads": 6,
    "n_kv_heads": 2,
    "ffn": 40,
    "qk_norm": True,
    "use_head_qk_norm": True,
    "block_name": "default",
}
EXPERTS: dict[str, Any] = {
    **{name: value for name, value in NARROW.items() if name not in ("ffn", "block_name")},
    "num_experts": 4,
    "top_k": 2,
    "expert_hidden_size": 24,
    "shared_expert_hidden_size": 20,
    "capacity_factor": 4.0,  # no token is dropped
}
HYBRID: dict[str, Any] = {**EXPERTS, "hybrid": True, "ffn": 40}


def gather_by_expert(x: Any, indices: Any, bins: Any, capacity: int, top_k: int) -> torch.Tensor:
    """OLMo-core's ``binned_gather``, whose kernel is for GPUs only, in plain torch."""
    rows = [
        torch.nn.functional.pad(part, (0, 0, 0, capacity - len(part)))
        for part in torch.tensor_split(x[indices // top_k], bins[:-1].long())
    ]
    return torch.stack(rows)


def scatter_by_expert(x: Any, indices: Any, weights: Any, bins: Any, top_k: int) -> torch.Tensor:
    """OLMo-core's ``binned_scatter``, whose kernel is for GPUs only, in plain torch."""
    counts = torch.diff(bins, prepend=bins.new_zeros(1)).tolist()
    parts = torch.cat([expert[:count] for expert, count in zip(x, counts, strict=True)])
    weighted = parts * weights[indices].unsqueeze(-1)
    return torch.zeros(len(indices) // top_k, x.shape[-1]).index_add(0, indices // top_k, weighted)


def config_of(sizes: dict[str, Any]) -> Any:
    """OLMo-core's own config object."""
    from olmo_core.nn.feed_forward import FeedForwardConfig
    from olmo_core.nn.transformer import TransformerConfig

    options = dict(sizes)
    overridden = options.pop("overridden", ())
    if "ffn" in sizes:
        options["feed_forward"] = FeedForwardConfig(hidden_size=options.pop("ffn"), bias=False)
    make = TransformerConfig.llama_like_moe if "num_experts" in sizes else TransformerConfig.llama_like
    config = make(**options)
    if overridden:  # as with_rope_scaling does: whole blocks, with all of their sizes
        config.block_overrides = {layer: config.block.copy() for layer in overridden}
    return config


def module_of(config: Any) -> Any:
    """A train module with random weights and OLMo-core's AdamW."""
    from olmo_core.optim import SkipStepAdamWConfig
    from olmo_core.train.train_module import TransformerTrainModule

    model = config.build(init_device="cpu")
    generator = torch.Generator().manual_seed(4)
    module = TransformerTrainModule(
        model=model,
        optim=SkipStepAdamWConfig(lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95)),
        rank_microbatch_size=32,
        max_sequence_length=16,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        for name, parameter in module.model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + 1.0 if "norm" in name else noise)
    return module


def batch(step: int = 0) -> torch.Tensor:
    """Random tokens, the same for the same step."""
    return torch.randint(67, (2, 16), generator=torch.Generator().manual_seed(70 + step))


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Next-token loss."""
    logits = model(ids)[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, ids[:, 1:].flatten())


def train(module: Any, steps: int) -> None:
    """Some real optimizer steps."""
    for step in range(steps):
        module.optim.zero_grad()
        loss = loss_of(module.model, batch(step))
        loss.backward()
        module.optim.latest_loss = loss.detach()
        module.optim.latest_grad_norm = torch.tensor(1.0)
        module.optim.step()
    module.optim.zero_grad()


def make_olmo_core(folder: Path, sizes: dict[str, Any], work: Path, *, steps: int = 3) -> Any:
    """Train and save ``folder`` as OLMo-core's trainer does; gives the train module."""
    from olmo_core.train.checkpoint import Checkpointer

    config = config_of(sizes)
    module = module_of(config)
    train(module, steps)
    state = {"global_step": steps, "max_steps": 50, "epoch": 1, "data_loader": {"seed": 3}}
    Checkpointer(work_dir=work).save(str(folder), module, state)
    text = json.dumps({"model": config.as_config_dict(), "run_name": "tiny"})
    (folder / "config.json").write_text(text)
    return module


def resume_olmo_core(folder: Path, work: Path) -> tuple[Any, dict[str, Any]]:
    """Build the model from the checkpoint's own config and load it with OLMo-core's checkpointer."""
    from olmo_core.nn.transformer import TransformerConfig
    from olmo_core.train.checkpoint import Checkpointer

    found = json.loads((folder / "config.json").read_text())["model"]
    module = module_of(TransformerConfig.from_dict(found))
    state = Checkpointer(work_dir=work).load(str(folder), module, load_trainer_state=True)
    assert state is not None
    return module, state
