"""The inside of the sandbox: gives up its rights, then runs a program. A script of its own, started by `sandbox.py`.

Everything here is asked of the Linux kernel without privileges, for this process and for good:

- limits: CPU time, memory, file size, open files, no core dump;
- files: Landlock. Nothing can be written outside the folder, nothing read but it, the interpreter and system libraries;
- network: a system call filter; no socket can be made;
- processes: the filter again; no process can be started, replaced or signalled. Threads can.

Root gives up its capabilities first. What a kernel does not offer is reported, and where it was required the
program is not run. It needs the standard library alone: heavy imports would be paid for every program.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Any

SETUP_FAILED = 97
"""Exit code of a jail that did not run the program."""

# --- system calls ---

CALLS: dict[str, tuple[int | None, int | None]] = {
    "add_key": (248, 217), "bpf": (321, 280), "capset": (126, 91), "chmod": (90, None),
    "chown": (92, None), "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221),
    "execveat": (322, 281), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "fchown": (93, 55), "fchownat": (260, 54), "fork": (57, None), "fremovexattr": (199, 16),
    "fsetxattr": (190, 7), "futimesat": (261, None), "io_uring_setup": (425, 425),
    "keyctl": (250, 219), "kill": (62, 129), "landlock_add_rule": (445, 445),
    "landlock_create_ruleset": (444, 444), "landlock_restrict_self": (446, 446),
    "lchown": (94, None), "lremovexattr": (198, 15), "lsetxattr": (189, 6),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "mq_open": (240, 180),
    "msgget": (68, 186), "open": (2, None), "openat": (257, 56), "openat2": (437, 437),
    "perf_event_open": (298, 241), "pidfd_getfd": (438, 438), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "prlimit64": (302, 261), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "ptrace": (101, 117), "removexattr": (197, 14),
    "request_key": (249, 218), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "semget": (64, 190), "setns": (308, 268), "setpriority": (141, 140), "setxattr": (188, 5),
    "shmget": (29, 194), "socket": (41, 198), "tgkill": (234, 131), "tkill": (200, 130),
    "truncate": (76, 45), "unshare": (272, 97), "userfaultfd": (323, 282), "utime": (132, None),
    "utimensat": (280, 88), "utimes": (235, None), "vfork": (58, None),
}  # fmt: skip
"""Numbers on x86_64 and aarch64; None where an architecture has no such call."""

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Which column of `CALLS`, and the kernel's name of the architecture."""

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> int:
    """A system call by its name. Raises OSError."""
    number = CALLS[name][ARCHITECTURES[platform.machine()][0]]
    return _checked(_libc.syscall(ctypes.c_long(number or -1), *arguments), name)


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _prctl(option: int, value: int, pointer: object = None) -> None:
    _checked(_libc.prctl(option, ctypes.c_ulong(value), pointer, 0, 0), "prctl")


# --- system call filter ---

NETWORK = ("socket", "io_uring_setup")
"""io_uring would make sockets without a call of its own for each."""

PROCESSES = ("fork", "vfork", "execve", "execveat", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo",
             "pidfd_open", "pidfd_send_signal", "pidfd_getfd", "ptrace", "process_vm_readv",
             "process_vm_writev", "setns", "unshare", "setpriority")  # fmt: skip

FILES = ("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat", "setxattr",
         "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr", "utime", "utimes",
         "futimesat", "utimensat")  # fmt: skip
"""What Landlock leaves alone: who may use a file, and its dates."""

HIDDEN_MEMORY = ("memfd_create", "memfd_secret", "shmget", "msgget", "semget", "mq_open")
"""Memory that the limit on the address space does not count."""

KERNEL = ("bpf", "perf_event_open", "userfaultfd", "keyctl", "add_key", "request_key")
"""Large parts of the kernel that no such program needs."""

PATHS_IN_MEMORY = ("clone3", "openat2")
"""Their arguments lie in memory, where a filter cannot look; said to be unknown, so that callers use the older ones."""

_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_CLONE_THREAD, _O_ACCMODE, _O_TRUNC = 0x10000, 0o3, 0o1000


class _Filter:
    """Mutable: a seccomp program under construction."""

    def __init__(self) -> None:
        self._column, architecture = ARCHITECTURES[platform.machine()]
        self.code: list[tuple[int, int, int, int]] = [
            (_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0),
        ]  # fmt: skip
        if platform.machine() == "x86_64":  # the second set of numbers, of the x32 interface
            self.code += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]

    def deny(self, names: Sequence[str], code: int = errno.EPERM) -> None:
        """These calls fail with this error."""
        for name in names:
            if (number := CALLS[name][self._column]) is not None:
                self.code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | code)]

    def deny_where(self, name: str, argument: int, mask: int, value: int, *, equal: bool) -> None:
        """The call fails where the low half of an argument, masked, is `value` (or is not)."""
        if (number := CALLS[name][self._column]) is None:
            return
        self.code += [
            (_EQUAL, 0, 5, number),
            (_LOAD, 0, 0, 16 + 8 * argument),
            (_AND, 0, 0, mask),
            (_EQUAL, *((0, 1) if equal else (1, 0)), value),
            (_RETURN, 0, 0, _ERRNO | errno.EPERM),
            (_LOAD, 0, 0, 0),
        ]

    def install(self) -> None:
        """From here on it holds, in all threads to come. Raises OSError."""
        code = [*self.code, (_RETURN, 0, 0, _ALLOW)]
        raw = b"".join(struct.pack("=HBBI", *each) for each in code)
        buffer = ctypes.create_string_buffer(raw, len(raw))
        header = struct.pack("@HP", len(code), ctypes.addressof(buffer))
        _prctl(22, 2, ctypes.create_string_buffer(header, len(header)))  # PR_SET_SECCOMP, by filter


def filter_calls(landlock: int) -> None:
    """No sockets, no processes, no signals to others. landlock: its version here, 0 without. Raises OSError."""
    own = os.getpid()
    wanted = _Filter()
    wanted.deny(NETWORK + PROCESSES + FILES + HIDDEN_MEMORY + KERNEL)
    wanted.deny(PATHS_IN_MEMORY, errno.ENOSYS)
    wanted.deny_where("clone", 0, _CLONE_THREAD, _CLONE_THREAD, equal=False)
    for name in ("kill", "tgkill"):  # to itself, for abort() and raise()
        wanted.deny_where(name, 0, 0xFFFFFFFF, own, equal=False)
    wanted.deny_where("prlimit64", 0, 0xFFFFFFFF, 0, equal=False)
    if landlock < 3:  # it does not know truncation yet
        wanted.deny(("truncate",))
        for name, place in (("open", 1), ("openat", 2)):
            wanted.deny_where(name, place, _O_TRUNC | _O_ACCMODE, _O_TRUNC, equal=True)
    wanted.install()


# --- files ---

_READ = 1 << 2 | 1 << 3
_FILE_RIGHTS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
"""Rights that a rule about a single file may name."""

SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/lib32", "/usr/local/lib", "/usr/share/zoneinfo", "/lib", "/lib64",
          "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/urandom")  # fmt: skip


def landlock_version() -> int:
    """The kernel's version of Landlock. Raises OSError where there is none."""
    return _call("landlock_create_ruleset", None, ctypes.c_size_t(0), ctypes.c_uint32(1))


def all_rights(version: int) -> int:
    """Everything that this version can forbid about files, as bits."""
    return (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1


def restrict_files(folder: str, version: int) -> None:
    """Only `folder` can be written; only it, the interpreter and system libraries can be read. Raises OSError."""
    rights = all_rights(version)
    header = struct.pack("=Q", rights)
    if version >= 4:
        header += struct.pack("=Q", 0b11)  # neither bind nor connect over TCP
    if version >= 6:
        header += struct.pack(
            "=Q", 0b11
        )  # neither abstract sockets nor signals of processes outside
    rules = _call("landlock_create_ruleset", ctypes.create_string_buffer(header, len(header)),
                  ctypes.c_size_t(len(header)), ctypes.c_uint32(0))  # fmt: skip
    for path, allowed in _allowed(folder, rights):
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # a folder that this system does not have
        if not os.path.isdir(path):
            allowed &= _FILE_RIGHTS
        rule = struct.pack("=Qi", allowed & rights, place)
        _call("landlock_add_rule", ctypes.c_int(rules), ctypes.c_uint32(1),
              ctypes.create_string_buffer(rule, len(rule)), ctypes.c_uint32(0))  # fmt: skip
        os.close(place)
    _call("landlock_restrict_self", ctypes.c_int(rules), ctypes.c_uint32(0))
    os.close(rules)


def _allowed(folder: str, rights: int) -> Iterator[tuple[str, int]]:
    """Paths and what may be done below them."""
    yield folder, rights
    yield "/dev/null", _READ | 1 << 1
    prefixes = {sys.prefix, sys.base_prefix, os.path.dirname(os.path.dirname(os.__file__))}
    for path in sorted(prefixes - {"/"}) + list(SYSTEM):
        yield path, _READ


# --- all of it ---


def limit(limits: dict[str, int]) -> None:
    """Resource limits by their names, as hard limits, never above those that hold already."""
    for name, value in limits.items():
        kind = getattr(resource, name)
        ceiling = resource.getrlimit(kind)[1]
        value = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        # A second more, so that the processor's time ends in a signal that has a name.
        hard = value + 1 if name == "RLIMIT_CPU" and ceiling == resource.RLIM_INFINITY else value
        resource.setrlimit(kind, (value, hard))


def lock(folder: str) -> dict[str, str]:
    """Gives up all rights that can be given up; what is missing, and why."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        why = f"only known for Linux on {' and '.join(ARCHITECTURES)}"
        return dict.fromkeys(("files", "network", "processes"), why)
    missing = {}
    _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlives who waits for it
    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS: asked for by both mechanisms
    nothing = ctypes.create_string_buffer(struct.pack("=6I", *[0] * 6), 24)
    version3 = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
    _call("capset", version3, nothing)
    version = 0
    try:
        version = landlock_version()
        restrict_files(folder, version)
    except OSError as error:
        missing["files"] = f"the kernel refuses Landlock ({error.strerror})"
    try:
        filter_calls(version)
    except OSError as error:
        refusal = f"the kernel refuses a system call filter ({error.strerror})"
        missing |= dict.fromkeys(("files", "network", "processes"), refusal)
    return missing


def _flush() -> None:
    """Lets out what was printed, as far as the program has left the streams usable."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def main() -> None:
    """Reads the order from standard input, locks itself up, runs the program and says how it ended."""
    order: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    status = int(sys.argv[1])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(order["folder"])

    def tell(**values: object) -> None:
        os.write(status, json.dumps(values).encode() + b"\n")

    limit(order["limits"])
    missing = lock(order["folder"])
    tell(missing=missing)
    if any(name in missing for name in order["required"]):
        os._exit(SETUP_FAILED)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that is too long is an OSError
    token = order.pop("token")
    try:
        code = compile(order["program"], "<program>", "exec", dont_inherit=True)
        exec(code, {"__name__": "__main__", "__builtins__": __builtins__})
    except BaseException as error:  # SystemExit too: a program that leaves early has not passed
        tell(error=type(error).__name__, text=str(error)[:500])
        _flush()
        os._exit(1)
    _flush()
    tell(token=token)
    os._exit(0)  # what the program left behind (threads, exit handlers) has no say


if __name__ == "__main__":
    main()
