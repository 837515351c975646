"""Megatron's torch_dist format: a real GPT of megatron-core, saved, widened and loaded by it on a CPU."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sparkling_cli.formats.dcp.names import find_roles
from sparkling_cli.formats.megatron import facts_in
from sparkling_cli.formats.torchfile import read_torch_file
from sparkling_cli.schedule.curves import Curve
from tests.formats.make_dcp import on_ranks
from tests.formats.make_megatron import without_cuda
from tests.formats.widening import check_moments, tensors_of, widen


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
    from megatron.core import dist_checkpointing

    without_cuda()
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
    widen(Path(source), Path(target), {"hidden": 2, "ffn": 2}, allow_locked=True)
    assert (Path(target) / "common.pt").read_bytes() == (Path(source) / "common.pt").read_bytes()
    on_ranks(1, _save_and_load, source, target, gated, result)
    assert torch.load(result) == "compared"


def _resume(rank: int, source: str, target: str, sharded: bool, result: str) -> None:
    """Train and save with the optimizer, or, if the widened directory is there, load it and train on."""
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    without_cuda()
    # torch's Adam counts per parameter; FusedAdam, which Megatron has on a GPU, counts in its groups.
    set_state = DistributedOptimizer._set_main_param_and_optimizer_states
    DistributedOptimizer._set_main_param_and_optimizer_states = lambda self, param, tensors: set_state(
        self, param, {"step": torch.tensor(3.0), **tensors}
    )
    wide = Path(target).exists()
    model = _model(96, 80, True) if wide else _model(48, 40, True)
    options = DistributedDataParallelConfig(use_distributed_optimizer=sharded)
    wrapped = DistributedDataParallel(model.config, options, model)
    config = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=sharded)
    optimizer = get_megatron_optimizer(config, [wrapped])
    places = torch.arange(16).expand(2, 16)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)

    def step(number: int) -> float:
        ids = torch.randint(67, (2, 16), generator=torch.Generator().manual_seed(number))
        wrapped.zero_grad_buffer()
        logits = wrapped(ids, places, mask).float()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        wrapped.finish_grad_sync()
        optimizer.step()
        return float(loss.detach())

    metadata = {"metadata": {"distrib_optim_sharding_type": "fully_reshardable"}} if sharded else {}
    if wide:
        step(0)
        state: dict[str, Any] = {"model": model.sharded_state_dict()}
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=True, **metadata)
        state = dist_checkpointing.load(state, target)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.save([step(3), step(4)], result)
        return
    for number in range(3):
        step(number)
    Path(source).mkdir()
    weights = model.sharded_state_dict()
    moments = optimizer.sharded_state_dict(weights, **metadata)
    dist_checkpointing.save({"model": weights, "optimizer": moments}, source)
    torch.save([step(3), step(4)], result)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_optimizer(tmp_path: Path, sharded: bool) -> None:
    """Moments by parameter, also of the distributed optimizer saved fully reshardable: training goes on."""
    pytest.importorskip("megatron.core", reason="pip install megatron-core==0.16.1")
    source, target = tmp_path / "iter", tmp_path / "wide"
    on_ranks(1, _resume, str(source), str(target), sharded, str(tmp_path / "old.pt"))
    widen(source, target, {"hidden": 2, "ffn": 2})
    old, new = tensors_of(source), tensors_of(target)
    moments = [key for key in old if ".exp_avg" in key]
    assert len(moments) == 18
    for key in moments:
        check_moments({key: old[key]}, new, key)
    on_ranks(1, _resume, str(source), str(target), sharded, str(tmp_path / "new.pt"))
    before, after = torch.load(tmp_path / "old.pt"), torch.load(tmp_path / "new.pt")
    assert after[0] == pytest.approx(before[0], abs=1e-5)
    assert after[1] == pytest.approx(before[1], abs=0.05)


@pytest.mark.parametrize(
    ("style", "ending"),
    [
        ("cosine", None),
        ("linear", None),
        ("constant", None),
        ("WSD", "linear"),
        ("WSD", "cosine"),
        ("WSD", "minus_sqrt"),
    ],
)
def test_schedule(tmp_path: Path, style: str, ending: str | None) -> None:
    """The curve that is read gives the rates of Megatron's own scheduler, which counts samples."""
    pytest.importorskip("megatron.core", reason="pip install megatron-core==0.16.1")
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    each, step = 8, 11
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[{}]), init_lr=1e-5, max_lr=1e-3, min_lr=1e-4,
        lr_warmup_steps=10.0 * each, lr_decay_steps=100 * each, lr_decay_style=style,
        start_wd=0.1, end_wd=0.1, wd_incr_steps=100, wd_incr_style="constant",
        wsd_decay_steps=30 * each, lr_wsd_decay_style=ending,
    )  # fmt: skip
    scheduler.step(each * step)
    args = Namespace(lr_warmup_init=1e-5, lr_wsd_decay_iters=30, lr_wsd_decay_style=ending)
    saved = {"args": args, "iteration": step, "opt_param_scheduler": scheduler.state_dict()}
    torch.save(saved, tmp_path / "common.pt")
    facts = facts_in(read_torch_file(tmp_path / "common.pt", "common.pt").tree)
    found = facts["schedule"]
    curve = Curve(
        **{"minimum": 0.0, "initial": 0.0, **found["kwargs"]}, peak=found["peak"],
        warmup_steps=found["warmup_steps"], total_steps=facts["max_steps"],
    )  # fmt: skip
    for at in range(101):
        scheduler.num_steps = each * at
        assert curve(at) == pytest.approx(scheduler.get_lr({}), rel=1e-12), at
