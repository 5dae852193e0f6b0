"""Measurements between training steps: held-out losses, and what the caller measures besides."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from tidar.training.data import Batch, TokenData
from tidar.training.loop import ObjectiveTrainer
from tidar.training.objective import TrainingModel

OnInterval = Callable[[TrainingModel, int], Mapping[str, float]]
"""`on_interval(learner, step)`: measurements for the log, with its network uncompiled and in evaluation mode."""


def evaluate(
    trainer: ObjectiveTrainer,
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
                learner = trainer.learner
                with learner.plain() as net:
                    was_training = net.training
                    net.eval()
                    try:
                        logs.update({k: float(v) for k, v in on_interval(learner, step).items()})
                    finally:
                        net.train(was_training)
            trainer.accelerator.wait_for_everyone()
    return logs


def _losses(trainer: ObjectiveTrainer, name: str, data: TokenData) -> dict[str, float]:
    """Mean losses, against the tokens, of the first `eval_sequences` sequences.

    Batches have the shape of training batches, and gradients stay on although none is taken, so
    that the compiled graphs of training serve here too.
    """
    args = trainer.args
    size = args.per_device_train_batch_size
    count = min(len(data), trainer.config.eval_sequences)
    learner = trainer.learner
    total = torch.zeros(learner.stats_size, device=args.device)
    for begin in range(args.process_index * size, count, args.world_size * size):
        batch = _padded_batch(data, begin, min(begin + size, count), size)
        inputs = {key: value.to(args.device) for key, value in batch.items()}
        with learner.hard_labels():
            total += learner(**inputs)["stats"]
    means = learner.means(trainer.accelerator.reduce(total))
    return {f"eval/{name}/{loss}": value for loss, value in means.items()}


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
