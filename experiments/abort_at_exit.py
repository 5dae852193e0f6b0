#!/usr/bin/env python3
"""How often a process of a gloo group aborts at its end: group left open; closed but held; closed, then a wait.

    python experiments/abort_at_exit.py [RUNS]

Two processes reduce a few tensors and end. What `tidar.training.loop.close_group` does is the last way.
"""

import atexit
import os
import subprocess
import sys
import time

import torch
import torch.distributed

WAYS = ("left open", "closed, but held", "closed, held, then a wait")
HELD: list[torch.distributed.ProcessGroup | None] = []
"""As a trainer or a wrapped model holds the group: its threads live on."""


def take_part(way: str) -> None:
    """One process of a group."""

    def close() -> None:
        HELD.append(torch.distributed.group.WORLD)
        torch.distributed.destroy_process_group()
        if way == WAYS[2]:
            time.sleep(0.05)

    if way != WAYS[0]:
        atexit.register(close)
    torch.distributed.init_process_group("gloo")
    for _ in range(3):
        tensor = torch.ones(4096)
        work = torch.distributed.all_reduce(tensor, async_op=True)
        work.wait()


def main(runs: int) -> None:
    """Counts the runs that ended badly."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for way in WAYS:
        done = [
            subprocess.run(
                [*launch, __file__, "--work", way], capture_output=True, text=True, check=False,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for _ in range(runs)
        ]  # fmt: skip
        failed = [each for each in done if each.returncode]
        known = sum("terminate called without an active exception" in e.stderr for e in failed)
        print(f"{way}: {len(failed)} of {runs} failed, {known} of them aborted", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        take_part(sys.argv[2])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
