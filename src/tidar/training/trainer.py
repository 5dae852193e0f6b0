"""`train(config)`: from a configuration to a trained checkpoint. The command line's way in."""

import atexit
import importlib.util
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from tidar.errors import TidarError
from tidar.gpu_memory import OutOfMemory
from tidar.model import Transformer
from tidar.training.checkpoints import disk_errors, replace_text, start_point
from tidar.training.config import TrainConfig, parse_argument
from tidar.training.data import RunData, TokenData, prepare
from tidar.training.held_out import OnInterval, evaluate
from tidar.training.loop import (
    EvaluateFirst,
    Interrupts,
    KeepModels,
    ObjectiveTrainer,
    ShowProgress,
    StopWhenAsked,
    close_group,
    use_one_gpu,
)
from tidar.training.objective import Attention, Objective, TrainingModel
from tidar.training.sources import Source
from tidar.training.start import Start, make_encoding, make_start, read_as_base

WARM_UP_STEPS = 10
"""Steps left out of the reported throughput: compilation and first allocations."""

LOWER = (
    "Lower per_device_train_batch_size (and raise gradient_accumulation_steps by as much, which keeps the result), or "
    "set gradient_checkpointing."
)
"""What makes training take less memory."""


class TrainingInterrupted(KeyboardInterrupt):
    """The run was asked to stop and has saved a checkpoint; the message says how to resume."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a run did.

    model: folder of the checkpoint. loss: mean over this call's steps. tokens_per_second: median of
    clean tokens of all processes, without warm-up, evaluation and saving. mfu: None where the peak
    of the device is unknown.
    """

    model: Path
    steps: int
    clean_tokens: int
    loss: float
    tokens_per_second: float | None
    mfu: float | None


def train(config: TrainConfig, *, on_interval: OnInterval | None = None) -> TrainResult:
    """Run the training that `config` describes, from the start or from where it was stopped.

    on_interval: called every `eval_every` steps (by the first process), with what is trained, its network
    uncompiled, float32 and in evaluation mode; neither it nor the held-out losses change the training.

    Raises TidarError for what the user can mend, TrainingInterrupted after Ctrl-C or SIGTERM.
    """
    out = config.out.expanduser().resolve()
    arguments = make_arguments(config, out)
    checkpoint = start_point(out, resume=config.resume) if arguments.process_index == 0 else None
    checkpoint = _agreed(checkpoint, arguments)
    config = read_as_base(config)
    objective = config.objective_with(arguments.seed)
    start = make_start(config, objective, arguments.seed)
    data, held_out = _make_data(config, start, arguments)
    run = _make_run(data, arguments)
    model = _training_model(config, objective, start.net, arguments)
    model.prepare(data)
    interrupts = Interrupts()
    trainer = ObjectiveTrainer(model, arguments, run, config, None)
    if held_out or on_interval is not None:
        trainer.run_evaluation = lambda step: evaluate(trainer, held_out, on_interval, step)
    for unwanted in _printers():
        trainer.remove_callback(unwanted)
    stop = StopWhenAsked(interrupts)
    trainer.add_callback(stop)
    trainer.add_callback(ShowProgress())
    trainer.add_callback(EvaluateFirst(trainer))
    trainer.add_callback(KeepModels(trainer, start))
    if arguments.process_index == 0:
        _begin(out, config, trainer, checkpoint)
    memory = OutOfMemory("training", arguments.device, LOWER)
    with interrupts.watched(), memory:
        output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop.stopped:
            raise TrainingInterrupted(
                f"Stopped at step {trainer.state.global_step} of {arguments.max_steps}; a "
                f"checkpoint is in {out}. Give the same command with --resume to carry on."
            )
        return _finish(out, config, trainer, start, output.training_loss)


def make_arguments(config: TrainConfig, out: Path) -> TrainingArguments:
    """Our defaults, the user's values over them. Raises TidarError for a value that is refused."""
    cuda = torch.cuda.is_available() and not config.arguments.get("use_cpu")
    values: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1.0,
        "learning_rate": 1e-5,
        "warmup_steps": 0.01,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "bf16": cuda and torch.cuda.is_bf16_supported(),
        "use_cpu": not cuda,
        "logging_steps": 10,
        "save_strategy": "steps",
        "save_steps": 500,
        "save_total_limit": 2,
        "report_to": "tensorboard" if importlib.util.find_spec("tensorboard") else "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": cuda,
        "log_level": "warning",
    }
    if "lr_scheduler_type" not in config.arguments:
        values["lr_scheduler_type"] = "cosine_with_min_lr"
        values["lr_scheduler_kwargs"] = {"min_lr_rate": config.min_lr_ratio}
    values.update({name: parse_argument(name, value) for name, value in config.arguments.items()})
    try:
        arguments = TrainingArguments(
            output_dir=str(out),
            remove_unused_columns=False,
            eval_strategy="no",
            logging_nan_inf_filter=False,
            **values,
        )
    except (ValueError, TypeError) as error:
        raise TidarError(f"the training options do not work together: {error}") from error
    if arguments.device.type == "cuda":
        torch.cuda.set_device(arguments.device)
    use_one_gpu(arguments)
    if arguments.world_size > 1:
        # Not earlier: another run in this process may use the group. Left open, its threads can abort
        # the interpreter's end, and a good run would be reported as failed.
        atexit.register(close_group)
    return arguments


def _data_seed(arguments: TrainingArguments) -> int:
    """The seed of the order of the data: 0 is one too."""
    return arguments.data_seed if arguments.data_seed is not None else arguments.seed


def _agreed(checkpoint: Path | None, arguments: TrainingArguments) -> Path | None:
    """What the first process found, in all processes."""
    if arguments.world_size == 1:
        return checkpoint
    box = [checkpoint]
    torch.distributed.broadcast_object_list(box, device=arguments.device)
    return box[0]


def _make_data(
    config: TrainConfig, start: Start, arguments: TrainingArguments
) -> tuple[TokenData, dict[str, TokenData]]:
    """Training data and held-out data; the first process prepares them while the others wait."""
    if config.seq_len > start.net.config.max_positions:
        raise TidarError(
            f"seq_len is {config.seq_len}; the model has positions for "
            f"{start.net.config.max_positions}."
        )
    encoding = make_encoding(start.net, start.tokenizer_folder, config.end_token)
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    cache = (config.cache_dir or home / "tidar" / "tokens").expanduser()

    def prepared(sources: tuple[Source, ...], seed: int) -> TokenData:
        return prepare(
            sources,
            encoding,
            cache=cache,
            seq_len=config.seq_len,
            seed=seed,
            text_field=config.text_field,
            progress=arguments.process_index == 0,
        )

    with arguments.main_process_first(local=False, desc="preparing data"):
        data = prepared(config.data, _data_seed(arguments))
        held_out = {name: prepared((source,), 0) for name, source in config.eval_data}
    return data, held_out


def _make_run(data: TokenData, arguments: TrainingArguments) -> RunData:
    """All sequences of the run; turns a number of epochs into `max_steps`."""
    per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps
    per_step *= arguments.world_size
    if arguments.max_steps <= 0:
        arguments.max_steps = max(1, math.ceil(arguments.num_train_epochs * len(data) / per_step))
    return RunData(data, seed=_data_seed(arguments), total=arguments.max_steps * per_step)


def _training_model(
    config: TrainConfig, objective: Objective, net: Transformer, arguments: TrainingArguments
) -> TrainingModel:
    cuda = arguments.device.type == "cuda"
    attention: Attention = "flex" if cuda else "dense"
    if config.attention != "auto":
        attention = config.attention
    if attention == "flex" and not cuda:
        raise TidarError("attention 'flex' needs a CUDA device; use dense on a CPU.")
    net.gradient_checkpointing = config.gradient_checkpointing
    fast = cuda if config.compile == "auto" else config.compile == "on"
    return objective.model(net, attention=attention, fast=fast)


def _printers() -> list[Any]:
    """Trainer's own displays; ours replaces them."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    return [PrinterCallback, ProgressCallback]


def _begin(
    out: Path, config: TrainConfig, trainer: ObjectiveTrainer, checkpoint: Path | None
) -> None:
    """Record the configuration; on resuming, say what differs and cut the log back."""
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        record = out / "run.json"
        now = config.to_json()
        if checkpoint is not None and record.is_file():
            before = json.loads(record.read_text())
            ignored = ("resume", "out")
            changed = [k for k in now if k not in ignored and now[k] != before.get(k)]
            if changed:
                print(f"Resuming with other values of: {', '.join(changed)}.", file=sys.stderr)
        replace_text(record, json.dumps(now, indent=1) + "\n")
        # Without a checkpoint the measurement before the first step is taken again, too.
        step = int(checkpoint.name.split("-")[1]) if checkpoint else -1
        trainer.json_log.truncate_after(step)
    if config.resume:
        origin = f"from {checkpoint}" if checkpoint else "at step 0 (no whole checkpoint was found)"
        print(f"Resuming {origin}.", file=sys.stderr)


def _finish(
    out: Path, config: TrainConfig, trainer: ObjectiveTrainer, start: Start, loss: float
) -> TrainResult:
    """Write the model folder and sum the run up."""
    if trainer.is_world_process_zero():
        trainer.learner.save(out / "model", start)
    trainer.accelerator.wait_for_everyone()
    median = trainer.times.median(skip=WARM_UP_STEPS)
    speed = trainer.speed(median) if median else {}
    steps = trainer.state.global_step
    return TrainResult(
        model=out / "model",
        steps=steps,
        clean_tokens=steps * trainer.tokens_per_step,
        loss=loss,
        tokens_per_second=speed.get("tokens_per_second"),
        mfu=speed.get("mfu"),
    )
