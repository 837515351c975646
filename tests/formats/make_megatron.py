"""Checkpoints of a real GPT of megatron-core, by its own optimizers and its own saving, on CPUs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

HEADS, GROUPS, SIZE, VOCAB, LENGTH = 6, 2, 8, 68, 16
BUCKETS, BY_PARAMETER = "dp_reshardable", "fully_reshardable"


class World(NamedTuple):
    """How many processes there are, and how they share the model."""

    ranks: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1


class Sizes(NamedTuple):
    """Of a model."""

    hidden: int = 48
    ffn: int = 40
    groups: int = GROUPS
    experts: int = 0
    bf16: bool = True
    topk: int = 2
    layers: int = 2
    router: tuple[tuple[str, Any], ...] = ()

    @property
    def args(self) -> Namespace:
        """What Megatron's training script saves of them, among much else."""
        from megatron.core.transformer.enums import AttnBackend

        return Namespace(
            hidden_size=self.hidden, ffn_hidden_size=self.ffn, num_query_groups=self.groups,
            num_attention_heads=HEADS // GROUPS * self.groups, group_query_attention=True,
            kv_channels=SIZE, num_layers=self.layers, swiglu=True,
            num_experts=self.experts or None, moe_ffn_hidden_size=self.ffn if self.experts else None,
            moe_router_topk=self.topk, **dict(self.router),
            params_dtype=torch.bfloat16 if self.bf16 else torch.float32, attention_backend=AttnBackend.auto,
            untie_embeddings_and_output_weights=True, lr_warmup_init=0.0,
        )  # fmt: skip


class _OnCpu(TorchFunctionMode):
    """Megatron-core's optimizers ask for CUDA by name; on a CPU they compute the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        if name == "cuda":
            return args[0]
        found = func(*args, **kwargs)
        return found.replace("torch.", "torch.cuda.") if name == "type" and isinstance(found, str) else found


def gradient(key: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    """Of a whole tensor in a step."""
    seed = torch.Generator().manual_seed(1000 * step + crc32(key.encode()) % 997)
    return torch.randn(shape, generator=seed)


def ends(part: Any) -> tuple[int, ...]:
    """Where a part of a whole tensor ends, per dim."""
    sizes = (1,) * (len(part.global_shape) - len(part.local_shape)) + tuple(part.local_shape)
    return tuple(start + size for start, size in zip(part.global_offset, sizes, strict=True))


def flattened(value: Any) -> list[Any]:
    """What lies in lists and dictionaries."""
    if isinstance(value, (dict, list)):
        return [
            one for held in (value.values() if isinstance(value, dict) else value) for one in flattened(held)
        ]
    return [value]


def without_cuda() -> None:
    """Megatron-core asks for a GPU in many places, and needs none."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # of TransformerEngine, without which it is looked for all the same
    tensor_parallel.get_cuda_rng_tracker = lambda: SimpleNamespace(fork=nullcontext)
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.Stream = lambda *_, **__: None  # type: ignore[assignment,misc]
    for kind in ("FloatTensor", "HalfTensor", "BFloat16Tensor", "IntTensor"):
        setattr(torch.cuda, kind, getattr(torch, kind))
    _OnCpu().__enter__()


class Run:
    """A model and its distributed optimizer on one of the processes.

    Args:
        rank: of the process.
        world: all of them.
        sizes: of the model.
        bucket: entries of a bucket; None for one bucket.
    """

    def __init__(self, rank: int, world: World, sizes: Sizes, bucket: int | None = None) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.module import Float16Module

        self.rank, self.world, self.sizes = rank, world, sizes
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(
                world.tensor, world.pipeline, expert_model_parallel_size=world.expert
            )
        experts: dict[str, Any] = {}
        if sizes.experts:
            experts = {
                "num_moe_experts": sizes.experts, "moe_ffn_hidden_size": sizes.ffn,
                "moe_router_topk": sizes.topk,
                "moe_token_dispatcher_type": "allgather", "expert_model_parallel_size": world.expert,
                **dict(sizes.router),
            }  # fmt: skip
        dtype = torch.bfloat16 if sizes.bf16 else torch.float32
        config = TransformerConfig(
            num_layers=sizes.layers, hidden_size=sizes.hidden, ffn_hidden_size=sizes.ffn, kv_channels=SIZE,
            num_attention_heads=HEADS // GROUPS * sizes.groups, num_query_groups=sizes.groups,
            gated_linear_unit=True, add_bias_linear=False, use_cpu_initialization=True,
            normalization="RMSNorm", hidden_dropout=0.0, attention_dropout=0.0, bias_dropout_fusion=False,
            activation_func=torch.nn.functional.silu, bf16=sizes.bf16, params_dtype=dtype,
            tensor_model_parallel_size=world.tensor, pipeline_model_parallel_size=world.pipeline,
            pipeline_dtype=dtype, **experts,
        )  # fmt: skip
        spec = get_gpt_layer_local_spec(num_experts=sizes.experts or None, normalization="RMSNorm")
        torch.manual_seed(2)
        self.model: Any = GPTModel(
            config, spec, vocab_size=VOCAB, max_sequence_length=LENGTH, position_embedding_type="none",
            share_embeddings_and_output_weights=False,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )  # fmt: skip
        for name, buffer in self.model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.normal_(std=0.2)
        options = DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, bucket_size=bucket,
            overlap_grad_reduce=bucket is not None,
        )  # fmt: skip
        inner = Float16Module(config, self.model) if sizes.bf16 else self.model
        self.wrapped = DistributedDataParallel(config, options, inner)
        adam = OptimizerConfig(
            optimizer="adam", lr=1e-2, use_distributed_optimizer=True, bf16=sizes.bf16, params_dtype=dtype,
            clip_grad=0.0,
        )  # fmt: skip
        self.optimizer = get_megatron_optimizer(adam, [self.wrapped])
        self.parts = [*self._parts(self.model.sharded_state_dict())]

    def logits(self, seed: int = 5) -> torch.Tensor:
        """Of some tokens."""
        ids = torch.randint(67, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
        found: torch.Tensor = self.wrapped(ids, torch.arange(LENGTH).expand(2, LENGTH), mask).float()
        return found

    def _parts(self, found: Any) -> Iterator[tuple[Any, Any]]:
        """Every parameter with what of a whole tensor it is, as Megatron says."""
        for saved in found.values() if isinstance(found, dict) else found:
            if isinstance(getattr(saved, "data", None), torch.nn.Parameter):
                for part in flattened(saved.build()) if hasattr(saved, "build") else [saved]:
                    yield saved.data, part
            elif isinstance(saved, (dict, list)):
                yield from self._parts(saved)

    def step(self, number: int, rate: float | None = None) -> None:
        """An update by made-up gradients, the same ones however the model is shared out."""
        self.wrapped.zero_grad_buffer()
        for parameter, part in self.parts:
            begin = (part.data.data_ptr() - parameter.data_ptr()) // parameter.element_size()
            whole = gradient(part.key, tuple(part.global_shape), number)
            own = whole[tuple(map(slice, part.global_offset, ends(part)))]
            parameter.main_grad.view(-1)[begin : begin + own.numel()] = own.flatten()
        for group in self.optimizer.param_groups if rate is not None else ():
            group["lr"] = rate
        self.optimizer.step()

    def state(self, kind: str, *, loading: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
        """What Megatron's training script asks to be saved or loaded, and what it says of that."""
        from megatron.core import parallel_state

        said: dict[str, Any] = {
            "distrib_optim_sharding_type": kind, "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
        }  # fmt: skip
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        metadata = {**said, "dp_cp_group": group}
        weights = self.model.sharded_state_dict(metadata=metadata)
        state = self.optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)
        return {"model": weights, "optimizer": state}, said

    def save(self, path: str, kind: str, step: int = 3) -> None:
        """A step's directory."""
        from megatron.core import dist_checkpointing

        if self.rank == 0:
            Path(path).mkdir(parents=True)
        dist.barrier()
        state, said = self.state(kind)
        clock = {
            "max_lr": 1e-2, "min_lr": 1e-3, "lr_warmup_steps": 16, "num_steps": 8 * step,
            "lr_decay_style": "cosine", "lr_decay_steps": 640,
        }  # fmt: skip
        state |= {"args": self.sizes.args, "checkpoint_version": 3.0, "iteration": step}
        dist_checkpointing.save({**state, "opt_param_scheduler": clock}, path, content_metadata=said)

    def load(self, path: str) -> dict[str, Any]:
        """A step's directory, by what it says of itself; gives what is saved once."""
        from megatron.core import dist_checkpointing
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        said = dist_checkpointing.load_content_metadata(path)
        self.step(0)
        state = dist_checkpointing.load(
            self.state(said["distrib_optim_sharding_type"], loading=True)[0], path
        )
        # torch's Adam counts per parameter; FusedAdam, which Megatron has on a GPU, counts in its groups.
        put, count = DistributedOptimizer._set_main_param_and_optimizer_states, float(state["iteration"])
        DistributedOptimizer._set_main_param_and_optimizer_states = lambda self, param, tensors: put(
            self, param, {**tensors, "step": torch.tensor(count)}
        )
        self.model.load_state_dict(state["model"])
        with torch.no_grad():
            self.optimizer.load_state_dict(state["optimizer"])
        DistributedOptimizer._set_main_param_and_optimizer_states = put
        for one in self.optimizer.chained_optimizers:  # which Megatron gives one counter for all
            for held in one.optimizer.state.values():
                held["step"] = torch.tensor(count)
        return state


def save_both(rank: int, root: str, world: World, sizes: Sizes, bucket: int | None) -> None:
    """Some steps, saved in buckets, and by parameter in a directory beside it.

    The latter by a run with one bucket: of several that are padded, Megatron shifts what it saves so.
    """
    without_cuda()
    for kind, size in ((BUCKETS, bucket), (BY_PARAMETER, None)):
        run = Run(rank, world, sizes, size)
        for number in range(3):
            run.step(number)
        run.save(f"{root}/{kind}", kind)
    if world[1:] == (1, 1, 1) and rank == 0:
        torch.save(run.logits().detach(), f"{root}/logits.pt")
    dist.barrier()


def load_wide(rank: int, root: str, path: str, world: World, sizes: Sizes, again: str) -> None:
    """Load a widened directory; logits go to a file, and what was loaded is saved once more."""
    without_cuda()
    run = Run(rank, world, sizes)
    run.load(path)
    if world[1:] == (1, 1, 1) and rank == 0:
        torch.save(run.logits().detach(), f"{root}/wide.pt")
    run.save(again, BY_PARAMETER)
