"""Real LitGPT directories: its GPT, saved through Lightning Fabric as ``litgpt pretrain`` saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import save_config
from torch import nn

LLAMA: dict[str, Any] = {
    "name": "tiny", "block_size": 32, "n_layer": 2, "n_embd": 48, "n_head": 6, "n_query_groups": 2,
    "head_size": 8, "vocab_size": 67, "padded_vocab_size": 67, "rotary_percentage": 1.0,
    "parallel_residual": False, "bias": False, "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP", "intermediate_size": 40,
}  # fmt: skip
NEOX: dict[str, Any] = {
    **LLAMA, "n_query_groups": 6, "rotary_percentage": 0.25, "parallel_residual": True, "bias": True,
    "norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP", "lm_head_bias": True,
}  # fmt: skip
MIXTRAL: dict[str, Any] = {
    **LLAMA, "mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    **MIXTRAL, "moe_intermediate_size": 20, "n_shared_expert": 2, "norm_qk": True, "bias": True,
}  # fmt: skip
GROUPED: dict[str, Any] = {
    **EXPERTS, "n_expert": 6, "n_expert_groups": 3, "n_topk_groups": 2, "n_topk_scores_per_group": 2,
    "norm_topk_prob": True, "routed_scaling_factor": 2.5,
}  # fmt: skip
GROUPED_MIXTRAL: dict[str, Any] = {
    **GROUPED, "moe_intermediate_size": None, "n_shared_expert": None, "bias": False,
}  # fmt: skip
DENSE_FIRST: dict[str, Any] = {**GROUPED, "n_layer": 3, "first_k_dense_replace": 1}
PLAIN_DENSE_FIRST: dict[str, Any] = {**EXPERTS, "n_layer": 3, "first_k_dense_replace": 1}
LATENT: dict[str, Any] = {
    **LLAMA, "n_query_groups": 6, "latent_attention": {
        "q_lora_rank": 22, "kv_lora_rank": 18,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 10, "v_head_dim": 14,
    },
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    **DENSE_FIRST, "norm_qk": False, "bias": False, "n_query_groups": 6,
    "latent_attention": LATENT["latent_attention"],
}  # fmt: skip


def build(config: Config, *, tied: bool) -> tuple[Any, Any, Any]:
    """Fabric, model and optimizer, set up as in pre-training (without compilation)."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(5, verbose=False)
    model = GPT(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + 1.0 if "norm" in name or "ln_f" in name else noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    if tied:
        model.transformer.wte.weight = model.lm_head.weight
    wrapped = fabric.setup(model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(wrapped.parameters(), lr=2e-3))
    return fabric, wrapped, optimizer


def batch(step: int = 0) -> torch.Tensor:
    """Random tokens, the same for the same step."""
    return torch.randint(67, (2, 16), generator=torch.Generator().manual_seed(20 + step))


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Next-token loss."""
    return nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(fabric: Any, model: Any, optimizer: Any, steps: int) -> None:
    """Some real optimizer steps."""
    for step in range(steps):
        optimizer.zero_grad()
        fabric.backward(loss_of(model, batch(step)))
        optimizer.step()
    optimizer.zero_grad()


def make_litgpt(folder: Path, sizes: dict[str, Any], *, tied: bool = False, steps: int = 3) -> Any:
    """Train and save ``folder``; gives the model back."""
    config = Config(**sizes)
    fabric, model, optimizer = build(config, tied=tied)
    train(fabric, model, optimizer, steps)
    folder.mkdir(parents=True)
    state = {"model": model, "optimizer": optimizer, "iter_num": 12, "step_count": steps}
    fabric.save(folder / "lit_model.pth", state)
    save_config(config, folder)
    (folder / "hyperparameters.yaml").write_text("seed: 42\n")
    return model


def resume_litgpt(folder: Path, *, tied: bool = False) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Build from the directory's own config and load as LitGPT resumes."""
    with (folder / "model_config.yaml").open() as file:
        config = Config(**yaml.safe_load(file))
    fabric, model, optimizer = build(config, tied=tied)
    state = {"model": model, "optimizer": optimizer, "iter_num": 0, "step_count": 0}
    fabric.load(folder / "lit_model.pth", state)
    return fabric, model, optimizer, state
