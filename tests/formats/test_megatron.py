"""Megatron's torch_dist format: a real GPT of megatron-core, saved, widened and loaded by it on a CPU."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sparkling_cli.checkpoint.dcp.names import find_roles
from sparkling_cli.errors import CheckpointError
from tests.formats.make_dcp import on_ranks
from tests.formats.widening import widen


def test_flat_optimizer_is_refused() -> None:
    """Buckets of the distributed optimizer are not carried along at the old size."""
    names = ["decoder.w", "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.exp_avg"]
    with pytest.raises(CheckpointError, match="fully-reshardable"):
        find_roles({name: (name,) for name in names}, frozenset(names), "x")


def test_state_before_parameter() -> None:
    """``optimizer.state.exp_avg.<parameter>`` is read as ``<parameter>``'s ``exp_avg``."""
    names = ["decoder.w", "optimizer.state.exp_avg.decoder.w"]
    roles = find_roles({name: (name,) for name in names}, frozenset(names), "x")
    assert roles.states == {"decoder.w": {"exp_avg": names[1]}}
    assert roles.weights == {"decoder.w": "decoder.w"}


def _model(hidden: int, ffn: int, gated: bool) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=2, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=6,
        num_query_groups=2, kv_channels=8, gated_linear_unit=gated, add_bias_linear=False,
        use_cpu_initialization=True, normalization="RMSNorm", hidden_dropout=0.0, attention_dropout=0.0,
        activation_func=torch.nn.functional.silu, bias_dropout_fusion=False,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    torch.manual_seed(2)
    return GPTModel(
        config, spec, vocab_size=67, max_sequence_length=16, position_embedding_type="none",
        share_embeddings_and_output_weights=False,
    )  # fmt: skip


def _save_and_load(rank: int, source: str, target: str, gated: bool, result: str) -> None:
    """Save a narrow model, or, if the widened directory is there, load it and compare the logits."""
    from megatron.core import dist_checkpointing, tensor_parallel

    tensor_parallel.get_cuda_rng_tracker = lambda: SimpleNamespace(fork=nullcontext)
    torch.cuda.synchronize = lambda *_: None  # megatron-core asks for a GPU, and needs none here
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    model = _model(48, 40, gated)
    ids = torch.randint(67, (2, 16), generator=torch.Generator().manual_seed(5))
    places = torch.arange(16).expand(2, 16)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    if not Path(target).exists():
        Path(source).mkdir()
        dist_checkpointing.save(model.sharded_state_dict(), source)
        torch.save(model(ids, places, mask).detach(), result)
    else:
        wide = _model(96, 80, gated)
        state = dist_checkpointing.load(wide.sharded_state_dict(), target)
        wide.load_state_dict(state)
        torch.testing.assert_close(wide(ids, places, mask), torch.load(result), rtol=1e-4, atol=1e-5)
        torch.save("compared", result)
    dist.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("gated", [True, False])
def test_weights(tmp_path: Path, gated: bool) -> None:
    """Stacked layers, gate and up as separate boxes: the widened model computes the same."""
    pytest.importorskip("megatron.core", reason="pip install megatron-core==0.16.1")
    source, target, result = (str(tmp_path / name) for name in ("iter", "wide", "result.pt"))
    on_ranks(1, _save_and_load, source, target, gated, result)
    widen(Path(source), Path(target), {"hidden": 2, "ffn": 2})
    assert (Path(target) / "common.pt").read_bytes() == (Path(source) / "common.pt").read_bytes()
    on_ranks(1, _save_and_load, source, target, gated, result)
    assert torch.load(result) == "compared"
