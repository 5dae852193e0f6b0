"""`train(config)`: from a configuration to a trained checkpoint. The command line's way in."""

import atexit
import importlib.util
import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from transformers import TrainingArguments

from tidar.errors import TidarError
from tidar.families import need_causal
from tidar.families.fields import Json
from tidar.hf_config import TidarMeta, config_from_hf, config_to_hf
from tidar.mask_token import prepare_mask_token
from tidar.model import Transformer
from tidar.tokens import Tokenizer
from tidar.training.checkpoints import disk_errors, replace_text, start_point
from tidar.training.config import TrainConfig, parse_argument
from tidar.training.data import Batch, Encoding, RunData, TokenData, prepare
from tidar.training.loop import (
    EvaluateFirst,
    Interrupts,
    JointTrainer,
    ShowProgress,
    StopWhenAsked,
    close_group,
    use_one_gpu,
)
from tidar.training.objective import TrainingModel
from tidar.training.sources import Source
from tidar.weights import init_model, load_checkpoint, save_checkpoint

OnInterval = Callable[[Transformer, int], Mapping[str, float]]
"""`on_interval(net, step)`: measurements for the log, with the network in evaluation mode."""

WARM_UP_STEPS = 10
"""Steps left out of the reported throughput: compilation and first allocations."""


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


@dataclass(frozen=True, slots=True)
class _Start:
    """A model and what belongs to it, before training."""

    net: Transformer
    raw_config: Json
    generation_config: Json | None
    tokenizer_folder: Path
    meta: TidarMeta | None
    save_dtype: torch.dtype


def train(config: TrainConfig, *, on_interval: OnInterval | None = None) -> TrainResult:
    """Run the training that `config` describes, from the start or from where it was stopped.

    on_interval: called every `eval_every` steps (by the first process), with the uncompiled float32
    network in evaluation mode; neither it nor the held-out losses change the training.

    Raises TidarError for what the user can mend, TrainingInterrupted after Ctrl-C or SIGTERM.
    """
    out = config.out.expanduser().resolve()
    arguments = make_arguments(config, out)
    checkpoint = start_point(out, resume=config.resume) if arguments.process_index == 0 else None
    checkpoint = _agreed(checkpoint, arguments)
    start = _make_start(config, arguments.seed)
    data, held_out = _make_data(config, start, arguments)
    run = _make_run(data, arguments)
    model = _training_model(config, start.net, arguments)
    interrupts = Interrupts()
    trainer = JointTrainer(model, arguments, run, config, None)
    if held_out or on_interval is not None:
        trainer.run_evaluation = lambda step: evaluate(trainer, held_out, on_interval, step)
    for unwanted in _printers():
        trainer.remove_callback(unwanted)
    stop = StopWhenAsked(interrupts)
    trainer.add_callback(stop)
    trainer.add_callback(ShowProgress())
    trainer.add_callback(EvaluateFirst(trainer))
    if arguments.process_index == 0:
        _begin(out, config, trainer, checkpoint)
    with interrupts.watched(), model_errors():
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


def _make_start(config: TrainConfig, seed: int) -> _Start:
    """The model to train, with a mask token where the objective needs one, float32 on the CPU."""
    if config.base is not None:
        loaded = load_checkpoint(config.base, dtype=torch.float32)
        need_causal(loaded.config, f"Training for objective {config.objective!r}")
        net, raw, folder = loaded.model, loaded.raw_config, loaded.folder
        generation, meta = loaded.generation_config, loaded.meta
        named = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
        dtype = torch.bfloat16 if named.endswith("bfloat16") else torch.float32
    else:
        assert config.arch is not None
        assert config.tokenizer is not None
        net = init_model(config_from_hf(read_arch(config.arch)), seed)
        folder, generation, meta = config.tokenizer.expanduser(), None, None
        raw = config_to_hf(net.config)
        raw["eos_token_id"] = end_of_text(Tokenizer.load(folder), config.end_token, folder)
        dtype = torch.float32
    if config.tokenizer is not None:
        folder = config.tokenizer.expanduser()
    if config.save_dtype != "auto":
        dtype = torch.bfloat16 if config.save_dtype == "bfloat16" else torch.float32
    if config.objective == "tidar":
        mask_id = prepare_mask_token(net, raw, Tokenizer.load(folder))
        meta = TidarMeta(
            draft_lens=config.draft_lens,
            mask_token_id=mask_id,
            alpha=config.alpha,
            masking=config.masking,
        )
    return _Start(net, raw, generation, folder, meta, dtype)


def read_arch(path: Path) -> Json:
    """A config.json, or the same fields as YAML. Raises TidarError if it is neither."""
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml"):
            import yaml

            value = yaml.safe_load(text)
        else:
            value = json.loads(text)
    except OSError as error:
        raise TidarError(f"{path}: cannot be read ({error.strerror}).") from error
    except Exception as error:  # YAML's and JSON's own errors
        raise TidarError(f"{path}: not a readable architecture file ({error}).") from error
    if not isinstance(value, dict):
        raise TidarError(f"{path}: must hold an object with the fields of a config.json.")
    return cast("Json", value)


def end_of_text(tokenizer: Tokenizer, end_token: str | None, folder: Path) -> int:
    """The token that ends a document: the one named, else the lowest of the tokenizer's own."""
    if end_token is not None:
        if end_token not in tokenizer.vocab:
            raise TidarError(f"end_token {end_token!r} is not in the vocabulary of {folder}.")
        return tokenizer.vocab[end_token]
    if not tokenizer.eos_ids:
        raise TidarError(
            f"the tokenizer in {folder} has no end-of-text token; name one: end_token."
        )
    return min(tokenizer.eos_ids)


def make_encoding(net: Transformer, folder: Path, end_token: str | None) -> Encoding:
    """How text becomes tokens of this model. Raises TidarError without an end-of-text token."""
    from tokenizers import Tokenizer as Backend

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise TidarError(f"{folder} has no tokenizer.json, which training needs for its speed.")
    return Encoding(
        tokenizer=Backend.from_file(str(file)),
        end_id=end_of_text(Tokenizer.load(folder), end_token, folder),
        vocab_size=net.config.vocab_size,
        mask_id=net.config.mask_token_id,
    )


def _make_data(
    config: TrainConfig, start: _Start, arguments: TrainingArguments
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
    config: TrainConfig, net: Transformer, arguments: TrainingArguments
) -> TrainingModel:
    cuda = arguments.device.type == "cuda"
    attention: Literal["dense", "flex"] = "flex" if cuda else "dense"
    if config.attention != "auto":
        attention = config.attention
    if attention == "flex" and not cuda:
        raise TidarError("attention 'flex' needs a CUDA device; use dense on a CPU.")
    net.gradient_checkpointing = config.gradient_checkpointing
    return TrainingModel(
        net,
        config.objective_with(arguments.seed),
        attention=attention,
        fast=cuda if config.compile == "auto" else config.compile == "on",
    )


def _printers() -> list[Any]:
    """Trainer's own displays; ours replaces them."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    return [PrinterCallback, ProgressCallback]


def _begin(out: Path, config: TrainConfig, trainer: JointTrainer, checkpoint: Path | None) -> None:
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


@contextmanager
def model_errors() -> Iterator[None]:
    """GPU memory running out, as a TidarError that says what to change."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise TidarError(
            "the GPU's memory is full. Lower per_device_train_batch_size (and raise "
            "gradient_accumulation_steps by as much, which keeps the result), or set "
            f"gradient_checkpointing. ({str(error).splitlines()[0]})"
        ) from error


def _finish(
    out: Path, config: TrainConfig, trainer: JointTrainer, start: _Start, loss: float
) -> TrainResult:
    """Write the model folder and sum the run up."""
    if trainer.is_world_process_zero():
        with trainer.joint.plain() as net:
            save_checkpoint(
                out / "model",
                net,
                meta=start.meta,
                raw_config=start.raw_config,
                tokenizer_source=start.tokenizer_folder,
                generation_config=start.generation_config,
                dtype=start.save_dtype,
            )
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


def evaluate(
    trainer: JointTrainer,
    held_out: Mapping[str, TokenData],
    on_interval: OnInterval | None,
    step: int,
) -> dict[str, float]:
    """Held-out losses in nats per token, then the caller's measurements; randomness is put back."""
    logs: dict[str, float] = {}
    with _randomness_kept():
        for name, data in held_out.items():
            logs.update(_losses(trainer, name, data))
        if on_interval is not None:
            if trainer.is_world_process_zero():
                with trainer.joint.plain() as net:
                    was_training = net.training
                    net.eval()
                    try:
                        logs.update({k: float(v) for k, v in on_interval(net, step).items()})
                    finally:
                        net.train(was_training)
            trainer.accelerator.wait_for_everyone()
    return logs


def _losses(trainer: JointTrainer, name: str, data: TokenData) -> dict[str, float]:
    """Mean clean and mask loss, against the tokens, of the first `eval_sequences` sequences.

    Batches have the shape of training batches, and gradients stay on although none is taken, so
    that the compiled graphs of training serve here too.
    """
    args = trainer.args
    size = args.per_device_train_batch_size
    count = min(len(data), trainer.config.eval_sequences)
    total = torch.zeros(4, device=args.device)
    for begin in range(args.process_index * size, count, args.world_size * size):
        batch = _padded_batch(data, begin, min(begin + size, count), size)
        inputs = {key: value.to(args.device) for key, value in batch.items()}
        with trainer.joint.hard_labels():
            total += trainer.joint(**inputs)["stats"]
    clean, mask, items, _ = trainer.accelerator.reduce(total).tolist()
    losses = {f"eval/{name}/clean_loss": clean / max(items, 1.0)}
    if trainer.config.objective == "tidar":
        losses[f"eval/{name}/mask_loss"] = mask / max(items, 1.0)
    return losses


def _padded_batch(data: TokenData, begin: int, end: int, size: int) -> Batch:
    """Sequences `begin` to `end`, filled up to `size` with rows that carry no label."""
    batch = data.batch([min(index, end - 1) for index in range(begin, begin + size)])
    batch["document"][end - begin :] = torch.arange(data.meta.seq_len)
    return batch


@contextmanager
def _randomness_kept() -> Iterator[None]:
    """Put every generator back to where it was."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
