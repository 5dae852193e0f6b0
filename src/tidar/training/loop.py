"""Hugging Face's `Trainer` with our loss, data order, logs, interruption and whole checkpoints."""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tidar.errors import TidarError
from tidar.training.checkpoints import PARTIAL, disk_errors, publish
from tidar.training.config import TrainConfig
from tidar.training.data import InOrder, RunData
from tidar.training.metrics import JsonLog, StepTimes, device_peak, peak_memory_gib
from tidar.training.objective import TrainingModel
from tidar.training.optimizers import MuonAdamW, adamw
from tidar.training.start import Start

Evaluate = Callable[[int], dict[str, float]]
"""Called with the step every `eval_every` steps, by all processes; what it measured."""


class Interrupts:
    """Ctrl-C and SIGTERM asking for a checkpoint and an end; a second one ends at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("Stopping after this step, with a checkpoint ...", file=sys.stderr, flush=True)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Handle the signals meanwhile (in the main thread, where Python allows it)."""
        if threading.current_thread() is threading.main_thread():
            for number in (int(signal.SIGINT), int(signal.SIGTERM)):
                self._before[number] = signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before.clear()


class StopWhenAsked(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Ends the run with a checkpoint after an interrupt; all processes agree on the step."""

    def __init__(self, interrupts: Interrupts) -> None:
        self.interrupts = interrupts
        self.stopped = False

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        asked = self.interrupts.asked
        if args.world_size > 1:
            flag = torch.tensor(float(asked), device=args.device)
            torch.distributed.all_reduce(flag)
            asked = bool(flag.item())
        if asked and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True


class ShowProgress(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """A progress bar on a terminal, and one line per logging step anywhere."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        from tqdm.auto import tqdm

        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit=" steps", disable=None
            )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is None or not logs or "train_runtime" in logs:
            return
        parts = [f"{key} {_short(value)}" for key, value in logs.items() if key != "epoch"]
        line = f"step {state.global_step}/{state.max_steps}  " + "  ".join(parts)
        self.bar.write(line, file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def _short(value: Any) -> str:
    if isinstance(value, float) and abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class ObjectiveTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    """`Trainer` over a `TrainingModel` and a `RunData` (one long epoch)."""

    def __init__(
        self,
        model: TrainingModel,
        args: TrainingArguments,
        run: RunData,
        config: TrainConfig,
        evaluate: Evaluate | None,
    ) -> None:
        self.config = config
        self.learner = model
        self.times = StepTimes()
        self.json_log = JsonLog(config.out.expanduser().resolve() / "log.jsonl")
        self.run_evaluation = evaluate
        self.run_length = len(run)
        self._logged = 0  # durations that earlier log rows have covered
        self._evaluated = -1
        self._visible_per_step = 0.0
        self._stats: Tensor | None = None
        self._stats_steps = 0
        super().__init__(model=model, args=args, train_dataset=run, data_collator=_already_a_batch)
        self.peak = config.peak_tflops * 1e12 or device_peak(args.device)
        self.tokens_per_step = (
            args.per_device_train_batch_size
            * args.gradient_accumulation_steps
            * args.world_size
            * run.data.meta.seq_len
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> InOrder:
        return InOrder(self.run_length)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            if "optim" in self.config.arguments and self.config.optimizer == "adamw":
                return super().create_optimizer(model)
            make = MuonAdamW if self.config.optimizer == "muon" else adamw
            self.optimizer = make(
                list((model or self.learner).named_parameters()),
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's own, which scales for averaging over processes; keeps the sums for the log."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        stats = outputs["stats"]
        self._stats = stats if self._stats is None else self._stats + stats
        self._last_loss = loss.detach()
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """The gradient norm as a number: the one wait for the device in a step.

        Raises TidarError, before the optimizer has touched a weight, if it is not finite.
        """
        norm: Any = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        value = norm.item() if isinstance(norm, Tensor) else float(norm)
        if not math.isfinite(value):
            raise TidarError(
                f"step {self.state.global_step + 1}: the gradient norm is {value} "
                f"(loss {self._last_loss.item():.4g}, learning rate "
                f"{self._get_learning_rate():.3g}). The step was not taken. Resume from the last "
                "checkpoint with a lower learning_rate or max_grad_norm, a longer warm-up, or "
                "without the data that came last."
            )
        self.times.mark(time.perf_counter())
        self._stats_steps += 1
        return value

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log and save as Trainer does, then our evaluation, once per step."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        step, every = self.state.global_step, self.config.eval_every
        last = step >= self.state.max_steps
        if self.run_evaluation is None or not every or self._evaluated == step:
            return
        if step % every == 0 or last:
            self._evaluated = step
            self.log(self.run_evaluation(step))
            self.times.interrupt()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's loggers and `log.jsonl`; rows with a loss get our numbers as well."""
        if "loss" in logs:
            logs.update(self._interval())
        super().log(logs, start_time)
        if self.is_world_process_zero() and "train_runtime" not in logs:
            row = {key: value for key, value in logs.items() if key != "epoch"}
            self.json_log.write({"step": self.state.global_step, **row})

    def _interval(self) -> dict[str, float]:
        """Losses and speed since the last log row."""
        row: dict[str, float] = {}
        if self._stats is not None:
            stats = self.accelerator.reduce(self._stats)
            row.update(self.learner.means(stats))
            self._visible_per_step = stats[-1].item() / max(self._stats_steps, 1)
            self._stats, self._stats_steps = None, 0
        row["clean_tokens"] = float(self.state.global_step * self.tokens_per_step)
        durations = self.times.durations[self._logged :]
        self._logged = len(self.times.durations)
        if durations:
            row.update(self.speed(sum(durations) / len(durations)))
        memory = peak_memory_gib(self.args.device)
        if memory is not None:
            row["memory_gib"] = memory
        return row

    def speed(self, seconds: float) -> dict[str, float]:
        """Clean tokens per second of all processes, and MFU where the device's peak is known."""
        row = {"tokens_per_second": self.tokens_per_step / seconds}
        if self.peak:
            flops = self.learner.flops(self.tokens_per_step, self._visible_per_step)
            row["mfu"] = flops / seconds / (self.peak * self.args.world_size)
        return row

    def _get_output_dir(self, trial: Any) -> str:
        out = Path(str(self.args.output_dir))
        return str(out / PARTIAL if self._saving else out)

    _saving = False

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint under another name; rename it when all processes are done."""
        out = Path(str(self.args.output_dir))
        self._saving = True
        try:
            with disk_errors(out):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    name = f"checkpoint-{self.state.global_step}"
                    publish(out, name, self.args.save_total_limit)
                self.accelerator.wait_for_everyone()
        finally:
            self._saving = False
            self.times.interrupt()


class EvaluateFirst(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Measures before the first step as well, so that a log begins with what the run began with."""

    def __init__(self, trainer: ObjectiveTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        measure = self.trainer.run_evaluation
        if measure is not None and self.trainer.config.eval_every and state.global_step == 0:
            self.trainer.log(measure(0))


class KeepModels(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Writes the model alone, OUT/model-STEP, after the steps that `keep_models` names.

    A run that is resumed from before such a step writes the same model again.
    """

    def __init__(self, trainer: ObjectiveTrainer, start: Start) -> None:
        self.trainer, self.start = trainer, start

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        config = self.trainer.config
        if state.global_step not in config.keep_models:
            return
        if state.is_world_process_zero:
            out = config.out.expanduser().resolve()
            with disk_errors(out):
                self.trainer.learner.save(out / f"model-{state.global_step}", self.start)
        self.trainer.accelerator.wait_for_everyone()
        self.trainer.times.interrupt()


def close_group() -> None:
    """Ends the group of processes, where one is open still, and lets its threads put down what they hold.

    The trainer holds the group too, so its threads live on. One that still holds a tensor of Python's needs the
    interpreter's lock to put it down; once the interpreter ends, asking for that lock aborts the process
    (pytorch/pytorch#179291).
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(0.05)  # gives up the lock


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Keep Trainer from spreading one process over all GPUs with `nn.DataParallel`.

    Our loss, batches and compiled layers are those of one device per process.
    """
    if arguments.n_gpu > 1:
        print(
            f"{arguments.n_gpu} GPUs are here and this process uses one. To train on all of them: "
            f"torchrun --nproc-per-node {arguments.n_gpu} -m tidar train ...",
            file=sys.stderr,
        )
        arguments._n_gpu = 1


def _already_a_batch(batch: Any) -> dict[str, Tensor]:
    """`RunData` answers with whole batches."""
    return cast("dict[str, Tensor]", batch)
