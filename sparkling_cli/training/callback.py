"""The re-warmup inside transformers' ``Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from sparkling_cli.errors import SpecError
from sparkling_cli.training.expected_loss import LossForecast, losses
from sparkling_cli.training.held import Held
from sparkling_cli.training.history import carry_history


class SparklingCallback(Held, TrainerCallback, ExportableState):  # type: ignore[misc]
    """``Trainer(..., callbacks=[SparklingCallback("checkpoint-1000-ffn2x")])``.

    Order of calls: ``on_train_begin`` attaches the hooks; ``on_save`` copies the expansion's history into
    every checkpoint, for a second expansion; ``on_log`` adds ``learning_rate_new`` to what is logged, and
    ``loss_above_forecast``: the logged loss less that of :class:`LossForecast`, where the log from before the
    expansion gives one; ``on_train_end`` takes the hooks off. The counter of steps is kept in
    ``trainer_state.json`` and found there on resume, whatever ``restore_callback_states_from_checkpoint``
    says.

    Args:
        directory: what ``sparkling expand`` wrote.
        measure_every: as in :func:`rewarm`; all of :meth:`Rewarming.metrics` is logged too.
    """

    def __init__(self, directory: str | Path, *, measure_every: int | None = None) -> None:
        super().__init__(directory, measure_every=measure_every)
        self.directory = str(directory)
        self.forecast: LossForecast | None = None

    def state(self) -> dict[str, Any]:
        """What goes into ``trainer_state.json``."""
        args = {"directory": self.directory, "measure_every": self.measure_every}
        return {"args": args, "attributes": {"resumed": self.state_dict()}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Attach to the optimizer that this run trains with."""
        te = self.history.rewarmup.expansion_step
        if state.global_step < te:
            raise SpecError(
                f"training begins at step {state.global_step}, the expansion was made at step {te}",
                hint=f"resume: trainer.train(resume_from_checkpoint={self.directory!r})",
            )
        self.resumed = self._stored(state) or self.resumed
        self.begin([optimizer], model, state.global_step)
        self.forecast = LossForecast.of(losses(state.log_history), te)
        # a checkpoint from before the expansion does not know this callback, and saving looks it up
        if isinstance(state.stateful_callbacks, dict):
            state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def _stored(self, state: TrainerState) -> dict[str, Any] | None:
        """The counters in the checkpoint that the run was resumed from, if this callback wrote it."""
        callbacks: Any = state.stateful_callbacks or {}  # a mapping once it was loaded from a file
        if not state.global_step:  # nothing was loaded: the state is made of the callbacks as they stand
            return None
        stored = callbacks.get(type(self).__name__)
        if isinstance(stored, list):
            stored = stored[0] if stored else None
        return stored["attributes"]["resumed"] if isinstance(stored, dict) else None

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Copy the history into the checkpoint just written."""
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir() and folder != Path(self.directory):
            carry_history(self.directory, folder)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Log the figures too: in the history, and for callbacks after this one."""
        if self.rewarming is None or logs is None or "learning_rate" not in logs:
            return
        ours = self.figures()
        if self.forecast is not None and "loss" in logs:
            ours["loss_above_forecast"] = logs["loss"] - self.forecast.at(state.global_step)
        logs.update(ours)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(ours)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take the hooks off."""
        self.end()
