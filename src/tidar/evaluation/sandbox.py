"""Runs programs that a model wrote, each in a jail of its own (`jail.py`), and says how they ended."""

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from tidar.errors import TidarError

Verdict = Literal["passed", "failed", "cpu", "wall", "memory", "output", "files"]
"""How a program ended: all of it ran; an error or an early end; or the limit that stopped it."""

REQUIRED = ("files", "network", "processes")
"""Protections without which nothing is run, unless the caller says that it may be."""

JAIL = Path(__file__).with_name("jail.py")
"""Run, never imported: on systems that it is not for, everything but the sandbox still works."""

_POLL = 0.05  # seconds between looks at the folder's size


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use. Times in seconds, sizes in bytes; files: how many in its folder."""

    cpu_seconds: int = 3
    wall_seconds: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    folder_bytes: int = 32 << 20
    files: int = 1000
    open_files: int = 64
    output_bytes: int = 64 << 10

    def of_process(self) -> dict[str, int]:
        """Those that the kernel holds, by their names in `resource`."""
        return {
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """detail: the error, or the limit, in words. output: what it printed, cut. seconds: wall clock."""

    verdict: Verdict
    detail: str
    output: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


class Sandbox:
    """Runs programs. active: the protections that hold here; missing: the others, and why.

    allow_weak: run programs even where one of `REQUIRED` is missing. Raises TidarError for such a machine
    otherwise, and where not even a jail can be started.
    """

    def __init__(self, limits: Limits | None = None, *, allow_weak: bool = False) -> None:
        self.limits = limits or Limits()
        self._required: tuple[str, ...] = ()
        self.missing = self._probe()
        self.active = ("limits", *(name for name in REQUIRED if name not in self.missing))
        if self.missing and not allow_weak:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.missing.items())
            raise TidarError(
                f"Programs that a model writes are not run here, because they could not be kept in ({reasons}). "
                "Linux 5.13 or newer has what is needed, in most containers too. To run them with "
                f"{', '.join(self.active)} alone, on a machine where nothing can be lost: --allow-weak-sandbox."
            )
        self._required = () if allow_weak else REQUIRED

    def to_json(self) -> dict[str, Any]:
        """For the record: what held."""
        return {
            "active": list(self.active),
            "missing": self.missing,
            "limits": asdict(self.limits),
        }

    def run(self, program: str) -> Outcome:
        """Runs one program to its end, or to the first limit it meets."""
        outcome, missing = self._run(program)
        if missing is None:
            raise TidarError(f"The sandbox could not be set up: {outcome.detail or outcome.output}")
        refused = [name for name in self._required if name in missing]
        if refused:  # it held when asked first: never run a program with less
            raise TidarError(f"The sandbox lost its protection of {', '.join(refused)}.")
        return outcome

    def _probe(self) -> dict[str, str]:
        """What this machine cannot protect."""
        outcome, missing = self._run("")
        if missing is None or not outcome.passed:
            raise TidarError(
                f"Programs that a model writes cannot be run on this system: {outcome.detail} {outcome.output}"
            )
        return missing

    def _run(self, program: str) -> tuple[Outcome, dict[str, str] | None]:
        """How the program ended, and which protections it had to do without; None if no jail came up."""
        with tempfile.TemporaryDirectory(
            prefix="tidar-sandbox-", ignore_cleanup_errors=True
        ) as name:
            folder = os.path.realpath(name)
            order = {
                "program": program, "folder": folder, "limits": self.limits.of_process(),
                "required": self._required, "token": secrets.token_hex(16),
            }  # fmt: skip
            began = time.monotonic()
            with _started(folder) as (process, status):
                watch = _Watch(process, status, Path(folder), self.limits)
                stopped = watch.until_end(json.dumps(order).encode(), began)
            seconds = time.monotonic() - began
            lines = [_object(line) for line in watch.status.splitlines()]
            missing = lines[0].get("missing") if lines else None
            verdict, detail = _judge(stopped, lines[1:], process.returncode, str(order["token"]))
            output = watch.output.decode("utf-8", "replace")
            return Outcome(verdict, detail, output, seconds), missing


@contextlib.contextmanager
def _started(folder: str) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """A jail that waits for its order, and the pipe of its reports; gone afterwards, with all it started."""
    read, write = os.pipe()
    environment = {
        "PATH": os.defpath, "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    with open(read, "rb", buffering=0) as status:
        try:
            process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-B", str(JAIL), str(write)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
                pass_fds=(write,),
                start_new_session=True,
            )
        finally:
            os.close(write)
        try:
            yield process, status
        finally:
            _kill(process)
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):  # what it had not read is lost with it
                    pipe.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends the jail, and in a weak one the processes of its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class _Watch:
    """Mutable: reads what a jail says until it ends or meets a limit."""

    def __init__(
        self, process: subprocess.Popen[bytes], status: IO[bytes], folder: Path, limits: Limits
    ) -> None:
        self.process, self.folder, self.limits = process, folder, limits
        self._status = status
        self.status, self.output = b"", b""

    def until_end(self, order: bytes, began: float) -> tuple[Verdict, str] | None:
        """Gives the order and waits; the limit that it met, None if it ended by itself."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(
            BrokenPipeError
        ):  # a jail that never came up says so by its output
            self.process.stdin.write(order)
            self.process.stdin.close()
        with selectors.DefaultSelector() as pipes:
            pipes.register(self.process.stdout, selectors.EVENT_READ)
            pipes.register(self._status, selectors.EVENT_READ)
            while pipes.get_map():
                ended = self.process.poll() is not None
                ready = pipes.select(0 if ended else _POLL)
                if ended and not ready:
                    break  # a weak jail may leave processes behind that hold the pipes
                for key, _ in ready:
                    if not self._read(key.fd, is_status=key.fileobj is self._status):
                        pipes.unregister(key.fileobj)
                if (met := self._limit(began)) is not None:
                    return met
        return self._wait(began)

    def _read(self, pipe: int, *, is_status: bool) -> bool:
        piece = os.read(pipe, 1 << 16)
        if is_status:
            self.status = (self.status + piece)[: 1 << 16]
        else:
            # One byte more than allowed tells that there was more.
            self.output = (self.output + piece)[: self.limits.output_bytes + 1]
        return bool(piece)

    def _wait(self, began: float) -> tuple[Verdict, str] | None:
        """Waits for a jail that has closed its pipes."""
        while self.process.poll() is None:
            if (met := self._limit(began)) is not None:
                return met
            time.sleep(_POLL)
        return self._limit(began, ended=True)

    def _limit(self, began: float, *, ended: bool = False) -> tuple[Verdict, str] | None:
        """The first limit that is passed."""
        limits = self.limits
        if len(self.output) > limits.output_bytes:
            self.output = self.output[: limits.output_bytes]
            return "output", f"more than {limits.output_bytes} bytes of output"
        count, size = _used(self.folder)
        if count > limits.files or size > limits.folder_bytes:
            return "files", f"{count} files of {size} bytes in its folder"
        if not ended and time.monotonic() - began > limits.wall_seconds:
            return "wall", f"more than {limits.wall_seconds:g} seconds"
        return None


def _used(folder: Path) -> tuple[int, int]:
    """How many files are in a folder that changes meanwhile, and how many bytes they take."""
    count = size = 0
    waiting = [str(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    count += 1
                    size += entry.stat(follow_symlinks=False).st_size
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except FileNotFoundError:
            continue  # removed since it was listed
    return count, size


def _object(line: bytes) -> dict[str, Any]:
    """A line of the reports; nothing for one that is no JSON object: programs can write there too."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _judge(
    stopped: tuple[Verdict, str] | None, lines: list[dict[str, Any]], code: int, token: str
) -> tuple[Verdict, str]:
    """What the reports and the exit code mean."""
    if stopped is not None:
        return stopped
    told = lines[-1] if lines else {}
    if told.get("token") == token:
        return "passed", ""
    if "error" in told:
        detail = ": ".join(filter(None, (str(told["error"]), str(told.get("text", "")))))
        return ("memory" if told["error"] == "MemoryError" else "failed"), detail
    if code == -signal.SIGXCPU:
        return "cpu", "its processor time was used up"
    if code < 0:
        return "failed", f"ended by {signal.Signals(-code).name}"
    return "failed", f"left with exit code {code} before its end"
