"""Training loops of real frameworks around the reference's model: the table in docs/how-to/loops.md.

Every loop begins with the same expanded model and state at step TE, trains in float64 by the reference's
schedule, and may be left and taken up again from what the framework itself has written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

from sparkling_cli.manifest import AxisHistory, Manifest, SourceEntry
from sparkling_cli.schedule.rewarmup import to_data
from sparkling_cli.storage.sidecar import CURVE, MANIFEST, REWARMUP, sidecar_root
from sparkling_cli.training import rewarm
from tests.training import reference as ref

STEPS = 50
TAU = 20

#: from a folder and the steps of every leg to the parameters at the end
Run = Callable[[Path, "tuple[int, ...]"], "dict[str, Tensor]"]


def adamw(params: Any) -> Optimizer:
    """The optimizer of every loop."""
    return AdamW(params, lr=ref.BASE.peak, weight_decay=0.1)


def start() -> tuple[ref.Tiny, Optimizer, Any]:
    """Model, optimizer and schedule as an expansion leaves them."""
    return ref.expanded(adamw)


def legs(counts: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Number, first and last step of every leg."""
    first = ref.TE
    for number, count in enumerate(counts):
        yield number, first, first + count
        first += count


def history() -> Any:
    """Of the expansion."""
    return ref.history(tau=TAU)


def write_history(checkpoint: Path) -> None:
    """The files of the expansion that the reference assumes, where an expansion leaves them."""
    found = history()
    manifest = Manifest(
        format_version=2,
        tool={},
        spec={},
        layout=ref.LAYOUT,
        axes={name: AxisHistory(births=births) for name, births in found.births.items()},
        stages=(),
        source=SourceEntry(format="", name="", tensors={}, files={}),
        tensors={},
        files={},
    )
    root = sidecar_root(checkpoint)
    (root / MANIFEST).parent.mkdir(parents=True, exist_ok=True)
    (root / MANIFEST).write_text(manifest.model_dump_json())
    (root / CURVE).write_text("")
    (root / REWARMUP).write_text(json.dumps(to_data(found.rewarmup)))


def plain(folder: Path, counts: tuple[int, ...]) -> dict[str, Tensor]:
    """A loop of one's own."""
    for number, first, last in legs(counts):
        net, optimizer, sched = start()
        rewarming = rewarm(optimizer, net, history())
        if number:
            kept = torch.load(folder / "state.pt")
            net.load_state_dict(kept["net"])
            optimizer.load_state_dict(kept["optimizer"])
            sched.load_state_dict(kept["sched"])
            rewarming.load_state_dict(kept["rewarming"])
        for _ in ref.steps(net, optimizer, sched, first, last):
            pass
        parts = {"net": net, "optimizer": optimizer, "sched": sched, "rewarming": rewarming}
        torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "state.pt")
    return ref.parameters(net)


def accelerate(folder: Path, counts: tuple[int, ...]) -> dict[str, Tensor]:
    """Prepared by accelerate, its ``save_state`` and ``load_state``."""
    from accelerate import Accelerator

    for number, first, last in legs(counts):
        accelerator = Accelerator(cpu=True)
        net, optimizer, sched = accelerator.prepare(*start())
        rewarming = rewarm(optimizer, net, history())
        accelerator.register_for_checkpointing(rewarming)
        if number:
            accelerator.load_state(str(folder / "state"))
        for step in range(first, last):
            optimizer.zero_grad()
            accelerator.backward(net(ref.data(step)))
            optimizer.step()
            sched.step()
        accelerator.save_state(str(folder / "state"))
    return ref.parameters(accelerator.unwrap_model(net))


def zeroed(net: torch.nn.Module, optimizer: Optimizer) -> None:
    """New entries' state, as an expansion leaves it."""
    masks = ref.new_masks()
    for name, p in net.named_parameters():
        for value in optimizer.state[p].values():
            if isinstance(value, Tensor) and value.shape == p.shape:
                value[masks[name]] = 0


def trainer(folder: Path, counts: tuple[int, ...]) -> dict[str, Tensor]:
    """The Trainer of transformers, from a checkpoint that it wrote at step TE."""
    from transformers import Trainer, TrainingArguments

    from sparkling_cli.training import SparklingCallback

    class Model(ref.Tiny):
        """The reference's model, as the Trainer calls one."""

        def forward(self, ids: Tensor) -> Any:
            """The batch is that of the step, whatever it is given."""
            return {"loss": super().forward(ref.data(self.at.global_step))}

    def fit(last: int, resume: Path | None, *callbacks: Any) -> tuple[Path, Any]:
        torch.manual_seed(0)
        net = Model().double()
        optimizer = adamw(net.parameters())
        arguments = TrainingArguments(
            str(folder), max_steps=last, per_device_train_batch_size=1, save_strategy="no", logging_steps=1,
            report_to="none", use_cpu=True, disable_tqdm=True, max_grad_norm=0.0, remove_unused_columns=False,
            dataloader_pin_memory=False, ignore_data_skip=True, seed=0,
        )  # fmt: skip
        made = Trainer(
            net, arguments, train_dataset=[{"ids": 0}] * 200, callbacks=list(callbacks),
            optimizers=(optimizer, ref.scheduler(optimizer, 0)),
        )  # fmt: skip

        class Clock:
            """The Trainer's step, outside the module's own state."""

            @property
            def global_step(self) -> int:
                """Steps done."""
                return int(made.state.global_step)

        net.at = Clock()
        made.train(resume_from_checkpoint=None if resume is None else str(resume))
        if resume is None:
            zeroed(net, optimizer)
        else:
            entry = next(e for e in made.state.log_history if e["step"] == last and "learning_rate" in e)
            assert entry["learning_rate_new"] == pytest.approx(rate(last - 1))
        made._save_checkpoint(net, None)
        return folder / f"checkpoint-{last}", net

    write_history(folder)
    path, net = fit(ref.TE, None)
    for _, _, last in legs(counts):
        path, net = fit(last, path, SparklingCallback(folder))
    return ref.parameters(net)


def lightning(folder: Path, counts: tuple[int, ...]) -> dict[str, Tensor]:
    """Lightning's ``Trainer``, from a checkpoint that it wrote at step TE."""
    import lightning.pytorch as pl

    from sparkling_cli.training.lightning import SparklingCallback

    class Module(ref.Tiny, pl.LightningModule):  # type: ignore[misc]
        """The reference's model; its parameters' names are the layout's."""

        def training_step(self, _: Tensor) -> Tensor:
            """One batch."""
            return self(ref.data(self.trainer.global_step))

        def configure_optimizers(self) -> Any:
            """As the reference."""
            optimizer = adamw(self.parameters())
            return [optimizer], [{"scheduler": ref.scheduler(optimizer, 0), "interval": "step"}]

    def fit(last: int, *callbacks: Any) -> tuple[Any, Any]:
        trainer = pl.Trainer(
            max_steps=last, accelerator="cpu", precision="64-true", logger=False, callbacks=list(callbacks),
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=str(folder),
        )  # fmt: skip
        torch.manual_seed(0)
        module = Module().double()
        path = folder / "last.ckpt"
        trainer.fit(module, DataLoader(range(200)), ckpt_path=str(path) if path.exists() else None)
        if not callbacks:
            zeroed(module, trainer.optimizers[0])
        trainer.save_checkpoint(path)
        return trainer, module

    fit(ref.TE)
    for _, _, last in legs(counts):
        trainer, module = fit(last, SparklingCallback(history()))
        found = trainer.callback_metrics["learning_rate_new"]
        assert float(found) == pytest.approx(rate(last - 1))
    return ref.parameters(module)


def composer(folder: Path, counts: tuple[int, ...]) -> dict[str, Tensor]:
    """Composer's ``Trainer``, from a checkpoint that it wrote at step TE."""
    from composer import Trainer
    from composer.core import Precision
    from composer.loggers import InMemoryLogger
    from composer.models import ComposerModel

    from sparkling_cli.training.composer import SparklingCallback

    class Model(ref.Tiny, ComposerModel):  # type: ignore[misc]
        """The reference's model."""

        def forward(self, _: Any) -> Tensor:
            """Its loss is its output."""
            return super().forward(ref.data(int(self.held.state.timestamp.batch)))

        def loss(self, outputs: Tensor, _: Any) -> Tensor:
            """As it is."""
            return outputs

    def fit(last: int, *callbacks: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        net = Model().double()
        optimizer, path, log = adamw(net.parameters()), folder / "last.pt", InMemoryLogger()
        trainer = Trainer(
            model=net, train_dataloader=DataLoader(range(200)), max_duration=f"{last}ba",
            optimizers=optimizer, schedulers=ref.scheduler(optimizer, 0), device="cpu",
            precision=Precision.FP32, progress_bar=False, callbacks=list(callbacks), loggers=[log],
            run_name="tiny", step_schedulers_every_batch=True, load_path=str(path) if path.exists() else None,
        )  # fmt: skip
        object.__setattr__(net, "held", trainer)
        trainer.fit()
        if not callbacks:
            zeroed(net, optimizer)
        trainer.save_checkpoint(str(path))
        trainer.close()
        return net, log

    fit(ref.TE)
    for _, _, last in legs(counts):
        net, log = fit(last, SparklingCallback(history()))
        *_, (_, found) = log.data["learning_rate_new"]
        assert float(found) == pytest.approx(rate(last - 1))
    return ref.parameters(net)


def olmo_core(folder: Path, counts: tuple[int, ...]) -> dict[str, Tensor]:
    """OLMo-core's ``Trainer`` and checkpointer, from a checkpoint that they wrote at step TE."""
    from olmo_core.data.data_loader import DataLoaderBase
    from olmo_core.train import Duration, Trainer
    from olmo_core.train.callbacks import Callback
    from olmo_core.train.checkpoint import Checkpointer
    from olmo_core.train.train_module import EvalBatchSizeUnit, EvalBatchSpec, TrainModule
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    from sparkling_cli.training.olmo_core import SparklingCallback

    class Module(TrainModule):  # type: ignore[misc]
        """The reference's model, optimizer and schedule, by OLMo-core's names."""

        def __init__(self) -> None:
            super().__init__()
            self.model = ref.model()
            self.optim = adamw(self.model.parameters())

        @property
        def eval_batch_spec(self) -> Any:
            """Never asked for."""
            return EvalBatchSpec(1, EvalBatchSizeUnit.instances)

        def state_dict(self, *, optim: bool | None = None) -> dict[str, Any]:
            """As its own train modules make it."""
            model, found = get_state_dict(self.model, self.optim)
            return {"model": model, "optim": found}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Likewise."""
            set_state_dict(
                self.model,
                self.optim,
                model_state_dict=state_dict["model"],
                optim_state_dict=state_dict["optim"],
            )

        def train_batch(self, batch: Any, dry_run: bool = False) -> None:
            """Gradients of the step's batch."""
            if not dry_run:
                self.model(ref.data(self.trainer.global_step - 1)).backward()

        def eval_batch(self, batch: Any, labels: Any = None) -> Any:
            """Never asked for."""

        def optim_step(self) -> None:
            """The rate, then the step."""
            for group in self.optim.param_groups:
                group["lr"] = ref.BASE(self.trainer.global_step - 1)
            self.optim.step()

        def zero_grads(self) -> None:
            """After the step."""
            self.optim.zero_grad()

        def num_flops_per_token(self, seq_len: int) -> int | None:
            """Unknown."""
            return None

        def global_num_flops_in_batch(self, batch: Any) -> int | None:
            """Unknown."""
            return None

    class Loader(DataLoaderBase):  # type: ignore[misc]
        """Counts; the batches are the reference's."""

        total_batches = 200

        def state_dict(self) -> dict[str, Any]:
            """Nothing that the step does not say."""
            return {"batches": self.batches_processed, "epoch": self._epoch}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Likewise."""
            self.batches_processed, self._epoch = state_dict["batches"], state_dict["epoch"]

        def reshuffle(self, epoch: int | None = None, **_: Any) -> None:
            """In order."""
            self._epoch = epoch or 1

        def _iter_batches(self) -> Iterator[dict[str, Any]]:
            for step in range(self.batches_processed, self.total_batches):
                yield {"step": torch.tensor([step])}

        def get_mock_batch(self) -> dict[str, Any]:
            """Not used."""
            return {"step": torch.tensor([0])}

    class Log(Callback):  # type: ignore[misc]
        """What any of its loggers is given."""

        rates: dict[int, float]

        def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
            """One step's."""
            if "optim/learning_rate_new" in metrics:
                self.rates[step] = metrics["optim/learning_rate_new"]

    def fit(last: int, path: Path | None, **callbacks: Any) -> tuple[Path, Any]:
        module = Module()
        (log := Log()).rates = {}
        trainer = Trainer(
            work_dir=folder, train_module=module, data_loader=Loader(work_dir=folder, global_batch_size=1),
            device=torch.device("cpu"), save_folder=str(folder / f"run{last}"),
            checkpointer=Checkpointer(work_dir=folder, save_overwrite=True), save_overwrite=True,
            callbacks={"log": log, **callbacks}, max_duration=Duration.steps(last),
            load_path=None if path is None else str(path),
        )  # fmt: skip
        trainer.fit()
        if path is None:
            # its own first steps differ: saving a new optimizer's state counts as a step
            net, optimizer, _ = start()
            module.model.load_state_dict(net.state_dict())
            module.optim.load_state_dict(optimizer.state_dict())
        else:
            assert log.rates[last] == pytest.approx(rate(last - 1))
        return Path(trainer.save_checkpoint()), module

    path, module = fit(ref.TE, None)
    for _, _, last in legs(counts):
        path, module = fit(last, path, sparkling=SparklingCallback(history()))
    return ref.parameters(module.model)


def masters(folder: Path, counts: tuple[int, ...]) -> dict[str, Tensor]:
    """A bfloat16 model whose masters the optimizer holds: the masters are re-warmed."""
    for number, first, last in legs(counts):
        held, optimizer, sched = start()
        net = ref.model(dtype=torch.bfloat16)
        rewarming = rewarm(optimizer, held.named_parameters(), history())
        if number:
            kept = torch.load(folder / "state.pt")
            held.load_state_dict(kept["held"])
            optimizer.load_state_dict(kept["optimizer"])
            sched.load_state_dict(kept["sched"])
            rewarming.load_state_dict(kept["rewarming"])
        for step in range(first, last):
            low_precision_step(net, held, optimizer, step)
            sched.step()
        parts = {"held": held, "optimizer": optimizer, "sched": sched, "rewarming": rewarming}
        torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "state.pt")
    return ref.parameters(held)


def low_precision_step(net: torch.nn.Module, held: torch.nn.Module, optimizer: Optimizer, step: int) -> None:
    """Gradients of the bfloat16 copy of what ``held`` holds, and a step of the masters."""
    with torch.no_grad():
        for low, high in zip(net.parameters(), held.parameters(), strict=True):
            low.copy_(high)
            low.grad = None
    net(ref.data(step)).backward()
    for low, high in zip(net.parameters(), held.parameters(), strict=True):
        high.grad = low.grad.to(high.dtype)
    optimizer.step()


@cache
def separate(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Old and new entries as separate parameters, after the same steps."""
    net, optimizer, _ = ref.expanded(adamw, dtype)
    split, reference, sched = ref.split_reference(net, optimizer, adamw, rate)
    for _ in ref.steps(split, reference, sched, ref.TE, ref.TE + STEPS):
        pass
    return {name: value.detach() for name, value in split.whole().items()}


def rate(step: int) -> float:
    """Of new entries."""
    return ref.eta_new(step, tau=TAU)


@cache
def separate_masters(dtype: torch.dtype = torch.float64, ranks: int = 1) -> dict[str, Tensor]:
    """The same with gradients of a bfloat16 copy, each rank's of its share of the batch."""
    net, optimizer, _ = ref.expanded(adamw, dtype)
    split, reference, sched = ref.split_reference(net, optimizer, adamw, rate)
    low = ref.model(dtype=torch.bfloat16)
    for step in range(ref.TE, ref.TE + STEPS):
        with torch.no_grad():
            for name, value in split.whole().items():
                low.get_parameter(name).copy_(value)
        low.zero_grad()
        for share in ref.data(step).chunk(ranks):
            (low(share) / ranks).backward()
        for name, mask in split.masks.items():
            gradient = low.get_parameter(name).grad.to(dtype)
            split.old[name.replace(".", "/")].grad = gradient.masked_fill(mask, 0)
            split.new[name.replace(".", "/")].grad = gradient.masked_fill(~mask, 0)
        reference.step()
        sched.step()
    return {name: value.detach() for name, value in split.whole().items()}


@dataclass(frozen=True)
class Exactness:
    """How near to separate parameters: the largest difference, relative to a tensor's norm, and in words."""

    limit: float
    words: str


FLOAT64 = Exactness(1e-10, "to rounding (float64)")
FLOAT32 = Exactness(3e-6, "to rounding (float32)")
BFLOAT16 = Exactness(0.01, "as near as without re-warming: gradients are rounded to bfloat16")


@dataclass(frozen=True)
class Case:
    """A loop.

    Attributes:
        name: as in the table.
        package: that must be installed.
        adapter: what the user writes.
        run: trains so many steps leg by leg, each leg in new objects that load what the one before saved.
        reference: separate parameters after the same steps.
    """

    name: str
    package: str
    adapter: str
    run: Run
    reference: Callable[[], dict[str, Tensor]] = separate


CALLBACK = "`SparklingCallback` of `sparkling_cli.training.{}`"

CASES = [
    Case("a loop of one's own", "torch", "`rewarm`", plain),
    Case("bfloat16 model, masters in the optimizer", "torch", "`rewarm` with the masters by name", masters,
         reference=separate_masters),
    Case("transformers' Trainer", "transformers", "`SparklingCallback` of `sparkling_cli.training`", trainer),
    Case("accelerate", "accelerate", "`rewarm`, registered for checkpointing", accelerate),
    Case("Lightning", "lightning", CALLBACK.format("lightning"), lightning),
    Case("composer", "composer", CALLBACK.format("composer"), composer),
    Case("OLMo-core", "olmo_core", CALLBACK.format("olmo_core"), olmo_core),
]  # fmt: skip
