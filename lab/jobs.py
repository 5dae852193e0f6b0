"""Commands that wait for one another, on the GPUs that there are: the graph of a laboratory's run.

A command that fails takes with it those that wait for it; the others finish.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from lab import ROOT
from tidar.errors import TidarError

POLL_SECONDS: Final = 0.05
LIGHT_PLACES: Final = min(5, os.cpu_count() or 1)
"""Light commands at a time on a GPU that no other has."""

GRACE_SECONDS: Final = 60.0
"""How long a command that was asked to stop may take: training writes a checkpoint first."""


@dataclass(frozen=True, slots=True)
class Job:
    """A command. after: names of those that must have succeeded; behind: of those that must have ended, however.

    Names of no job count as done.
    light: it waits for its processor more than for its GPU, so several may share one. (Not with one that is
    not: a GPU that processes share by time leaves either waiting.)
    """

    name: str
    command: tuple[str, ...]
    after: frozenset[str] = frozenset()
    behind: frozenset[str] = frozenset()
    light: bool = False


@dataclass(slots=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    gpu: str
    began: float


def visible_gpus(count: int) -> list[str]:
    """The first `count` GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them.

    Without any the numbers are names of places alone, for runs on the CPU. Raises TidarError where there are fewer: a
    job without its GPU would take the CPU.
    """
    if count < 1:
        raise TidarError(f"--gpus is {count}; it must be at least 1.")
    here = torch.cuda.device_count()
    if 0 < here < count:
        raise TidarError(f"--gpus is {count}, and this process sees {here}.")
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not here or told is None:
        return [str(index) for index in range(count)]
    return [name.strip() for name in told.split(",")][:count]


def run_jobs(jobs: Iterable[Job], gpus: Sequence[str], logs: Path) -> dict[str, str]:
    """Runs all jobs, in the order given where nothing keeps one waiting; what failed, and why.

    gpus: each has room for one job at a time, or for `LIGHT_PLACES` light ones, which wait while another job could
    run; a job sees its GPU alone. logs: folder of NAME.log, both outputs of each job. A line on stdout tells of
    every start and end. Ctrl-C and SIGTERM stop all that runs (KeyboardInterrupt).
    Raises TidarError, before anything runs, for jobs that wait for each other in a circle.
    """
    waiting = {job.name: job for job in jobs}
    _check_order(waiting)
    names = frozenset(waiting)
    logs.mkdir(parents=True, exist_ok=True)
    running = dict[str, _Running]()
    done: set[str] = set()
    failed: dict[str, str] = {}
    with _terminated_as_interrupted():
        try:
            while waiting or running:
                for job in list(waiting.values()):
                    if lost := sorted(job.after & failed.keys()):
                        failed[waiting.pop(job.name).name] = f"not run, for want of {lost[0]}"
                ready = [
                    job
                    for job in waiting.values()
                    if (job.after & names) <= done
                    and not job.behind & (waiting.keys() | running.keys())
                ]
                for job in sorted(ready, key=lambda each: each.light):
                    gpu = _place(job, gpus, running)
                    if gpu is None and not job.light:
                        break  # no light job takes a place that it could have
                    if gpu is not None:
                        running[job.name] = _start(waiting.pop(job.name), gpu, logs)
                for name, each in list(running.items()):
                    if (code := each.process.poll()) is None:
                        continue
                    del running[name]
                    spent = time.monotonic() - each.began
                    if code == 0:
                        done.add(name)
                        _tell(f"done {name}, {spent:.0f} s")
                    else:
                        failed[name] = f"exit code {code}, see {logs / f'{name}.log'}"
                        _tell(f"FAILED {name} after {spent:.0f} s: {failed[name]}")
                time.sleep(POLL_SECONDS)
        finally:
            _stop([each.process for each in running.values()])
    return failed


def _place(job: Job, gpus: Sequence[str], running: Mapping[str, _Running]) -> str | None:
    """The GPU on which a job may start now; None where there is none."""
    on = {gpu: [each.job.light for each in running.values() if each.gpu == gpu] for gpu in gpus}
    if not job.light:
        return next((gpu for gpu in gpus if not on[gpu]), None)
    free = [gpu for gpu in gpus if all(on[gpu]) and len(on[gpu]) < LIGHT_PLACES]
    return min(free, key=lambda gpu: len(on[gpu]), default=None)


def _check_order(jobs: Mapping[str, Job]) -> None:
    left = dict(jobs)
    while left:
        ready = [name for name, job in left.items() if not (job.after | job.behind) & left.keys()]
        if not ready:
            raise TidarError(f"these jobs wait for each other in a circle: {', '.join(left)}.")
        for name in ready:
            del left[name]


def _start(job: Job, gpu: str, logs: Path) -> _Running:
    """Starts a job in a session of its own, so that a Ctrl-C reaches it by way of `_stop` alone."""
    _tell(f"start {job.name} on GPU {gpu}")
    with (logs / f"{job.name}.log").open("ab") as log:
        process = subprocess.Popen(
            job.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu},
        )  # fmt: skip
    return _Running(job, process, gpu, time.monotonic())


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Asks them to end; kills what has not ended in time, or at a second Ctrl-C."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    end = time.monotonic() + GRACE_SECONDS
    try:
        for process in processes:
            process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        print("killing what does not end", file=sys.stderr)
    finally:
        for process in processes:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To its whole session: a job may have workers of its own."""
    if process.poll() is None:
        os.killpg(process.pid, number)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt meanwhile, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)
