"""Programs that a model writes are kept in: each kind of mischief is stopped and reported, or nothing is run at all."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tidar.errors import TidarError
from tidar.evaluation import jail
from tidar.evaluation import sandbox as sandbox_module
from tidar.evaluation.code_metric import CodeEval, pass_at_k, sandboxed, score_program
from tidar.evaluation.sandbox import REQUIRED, Limits, Outcome, Sandbox

QUICK = Limits(
    cpu_seconds=2, wall_seconds=20.0, memory_bytes=200 << 20, file_bytes=1 << 20, folder_bytes=4 << 20,
    files=50, output_bytes=1000,
)  # fmt: skip


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    """With all protections where the machine has them; else a weak one, after checking that it says so."""
    weak = Sandbox(QUICK, allow_weak=True)
    if not weak.missing:
        return Sandbox(QUICK)
    with pytest.raises(TidarError, match="--allow-weak-sandbox") as refusal:
        Sandbox(QUICK)
    for name in weak.missing:
        assert name in str(refusal.value)
    return weak


def run(sandbox: Sandbox, program: str, needs: str | None = None) -> Outcome | None:
    """The outcome; None on a machine without a protection that is needed to run it, where all is refused instead."""
    if needs in sandbox.missing:
        with pytest.raises(TidarError, match=needs):
            Sandbox(QUICK)
        return None
    return sandbox.run(program)


# --- what ends by itself ---


def test_ordinary_programs(sandbox: Sandbox) -> None:
    passed = sandbox.run("from math import sqrt\nprint('hello', sqrt(16))\nassert sqrt(16) == 4")
    assert (passed.verdict, passed.output, passed.detail) == ("passed", "hello 4.0\n", "")
    assert passed.passed
    failed = sandbox.run("assert 1 + 1 == 3, 'sums'")
    assert (failed.verdict, failed.detail) == ("failed", "AssertionError: sums")
    assert sandbox.run("def f(:").detail.startswith("SyntaxError")
    assert "RecursionError" in sandbox.run("def f(): f()\nf()").detail
    threads = (
        "import threading\nt = threading.Thread(target=print, args=('in',))\nt.start()\nt.join()"
    )
    assert sandbox.run(threads).output == "in\n"
    assert sandbox.run("import os\nprint(os.environ.get('HF_TOKEN'), input())").verdict == "failed"


FORGED = """
import os
for pipe in range(3, 1024):
    try: os.write(pipe, {lines!r}.encode())
    except OSError: pass
os._exit(0)
"""
"""Writes reports of its own into the pipe of the jail's."""


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "exit code 0"),
        ("import os; os.abort()", "SIGABRT"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        (FORGED.replace('{lines!r}', repr('{"error": 5}\n{"token": ""}\n[1]\n}{')), "exit code 0"),
        (FORGED.replace('{lines!r}', repr('{"error": 5}\n')), "5"),
    ],
)  # fmt: skip
def test_leaving_early_is_not_passing(sandbox: Sandbox, program: str, detail: str) -> None:
    outcome = sandbox.run(program)
    assert outcome.verdict == "failed"
    assert detail in outcome.detail


# --- what a limit stops ---


def test_endless_loop(sandbox: Sandbox) -> None:
    assert sandbox.run("while True: pass").verdict == "cpu"


def test_endless_sleep() -> None:
    box = Sandbox(Limits(wall_seconds=0.5), allow_weak=True)
    began = time.monotonic()
    outcome = box.run("import time\ntime.sleep(60)")
    assert (outcome.verdict, outcome.detail) == ("wall", "more than 0.5 seconds")
    assert time.monotonic() - began < 20


def test_memory_bomb(sandbox: Sandbox) -> None:
    assert sandbox.run("x = bytearray(10**11)").verdict == "memory"
    assert sandbox.run("x = []\nwhile True: x.append(bytearray(10**7))").verdict == "memory"


def test_giant_output(sandbox: Sandbox) -> None:
    outcome = sandbox.run("while True: print('x' * 1000)")
    assert (outcome.verdict, len(outcome.output)) == ("output", 1000)


def test_files_in_its_folder(sandbox: Sandbox) -> None:
    inside = "open('a', 'w').write('text')\nimport tempfile\nprint(open('a').read(), tempfile.gettempdir()[:1])"
    assert sandbox.run(inside).output == "text /\n"
    assert "File too large" in sandbox.run("open('a', 'wb').write(bytes(10**8))").detail
    wait = "\nimport time\ntime.sleep(60)"
    many = sandbox.run("for i in range(100): open(str(i), 'w').close()" + wait)
    assert many.verdict == "files"
    large = sandbox.run("for i in range(8): open(str(i), 'wb').write(bytes(10**6))" + wait)
    assert large.verdict == "files"


# --- what a protection stops ---


def test_fork_bomb_and_other_processes(sandbox: Sandbox) -> None:
    for program in (
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.system('true') == 0 or 1/0",
        "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', ''])",
        "import os\nos.kill(os.getppid(), 0)",
        "import os\nos.kill(-1, 0)",
    ):
        outcome = run(sandbox, program, needs="processes")
        assert outcome is None or outcome.verdict == "failed", program


def test_writing_outside(sandbox: Sandbox, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("kept")
    mine.chmod(0o600)
    for program in (
        f"open({str(mine)!r}, 'w')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.remove({str(mine)!r})",
        f"import os; os.rename({str(mine)!r}, 'here')",
        f"import os; os.truncate({str(mine)!r}, 0)",
        f"import os; os.open({str(mine)!r}, os.O_RDONLY | os.O_TRUNC)",
        f"import os; os.chmod({str(mine)!r}, 0o777)",
        f"import os; os.utime({str(mine)!r})",
        f"import os; os.link({str(mine)!r}, 'link')\nopen('link', 'w')",
        f"import os; os.symlink({str(mine)!r}, 'link')\nopen('link', 'w')",
        f"import os; os.mkdir({str(tmp_path / 'new')!r})",
    ):
        outcome = run(sandbox, program, needs="files")
        assert outcome is None or outcome.verdict == "failed", program
    assert mine.read_text() == "kept"
    assert mine.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_reading_secrets(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    for program in (f"open({str(tmp_path / 'secret')!r})", "import os; os.listdir('/')",
                    "open('/etc/passwd')", "open('/proc/self/environ')"):  # fmt: skip
        outcome = run(sandbox, program, needs="files")
        assert outcome is None or "PermissionError" in outcome.detail, program


def test_network(sandbox: Sandbox) -> None:
    for program in (
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9', timeout=1)",
        "import socket; socket.socket()",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    ):
        outcome = run(sandbox, program, needs="network")
        assert outcome is None or "Operation not permitted" in outcome.detail, program
    # Event loops talk to themselves over a pair of sockets that leads nowhere.
    loop = "import asyncio\nasync def f(): print('ran')\nasyncio.run(f())"
    assert sandbox.run(loop).output == "ran\n"


# --- machines that cannot keep a program in ---

WITHOUT = """
import errno
from tidar.evaluation import jail
from tidar.evaluation.sandbox import Sandbox, TidarError
jail.CALLS["prctl"] = (157, 167)
jail._prctl(38, 1)
absent = jail._Filter()
{deny}
absent.install()
try:
    Sandbox()
    print("ran")
except TidarError as error:
    print(error)
weak = Sandbox(allow_weak=True)
print(weak.active, weak.run("print(1)").verdict)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="system call filters are Linux's")
@pytest.mark.parametrize(
    ("deny", "missing", "active"),
    [
        ("absent.deny(('landlock_create_ruleset',), errno.ENOSYS)", ("files",),
         "('limits', 'network', 'processes')"),
        ("absent.deny_where('prctl', 0, 0xFFFFFFFF, 22, equal=True)", REQUIRED, "('limits',)"),
    ],
)  # fmt: skip
def test_kernels_that_lack_something_are_refused(
    deny: str, missing: tuple[str, ...], active: str
) -> None:
    """A kernel without Landlock, and one without filters, made by a filter around the whole process."""
    try:
        jail.landlock_version()
    except (OSError, KeyError):
        pytest.skip("this kernel lacks it already; the other tests have seen the refusal")
    program = WITHOUT.format(deny=deny)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    refusal, weak = done.stdout.strip().splitlines()
    assert all(f"{name}: the kernel refuses" in refusal for name in missing), done
    assert "--allow-weak-sandbox" in refusal
    assert weak == f"{active} passed"


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert set(jail.lock("/tmp")) == set(REQUIRED)
    monkeypatch.undo()
    monkeypatch.setattr(jail.platform, "machine", lambda: "riscv64")
    assert "x86_64 and aarch64" in jail.lock("/tmp")["network"]


def test_a_jail_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "JAIL", Path("/nonexistent/jail.py"))
    with pytest.raises(TidarError, match="cannot be run on this system"):
        Sandbox()


def test_rights_by_version() -> None:
    """Each version of Landlock knows more rights; one that is not known here has at least those of the last."""
    sizes = [jail.all_rights(version).bit_length() for version in (1, 2, 3, 4, 5, 6, 99)]
    assert sizes == [13, 14, 15, 15, 16, 16, 16]


# --- the metric of the harness ---


def test_pass_at_k() -> None:
    assert pass_at_k(1, 1, 1) == 1.0
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)
    assert pass_at_k(4, 2, 4) == 1.0


def test_code_eval(sandbox: Sandbox) -> None:
    scores, results = CodeEval(sandbox).compute(
        references=["assert add(2, 3) == 5", "assert inc(1) == 2"],
        predictions=[["def add(a, b): return a * b", "def add(a, b): return a + b"],
                     ["def inc(a): return a + 1", "def inc(a): return a"]],
        k=[1, 2, 5],
    )  # fmt: skip
    assert scores == {"pass@1": 0.5, "pass@2": 1.0}  # there are no five candidates
    assert [r["passed"] for _, r in results[0]] == [False, True]
    assert results[0][0][1]["result"] == "failed: AssertionError"


def test_the_harness_never_gets_the_bare_metric(sandbox: Sandbox) -> None:
    """Its own humaneval and mbpp files, imported as its task manager does, score in the sandbox; no network."""
    names = ("lm_eval.tasks.humaneval.utils", "lm_eval.tasks.mbpp.utils")
    saved = {name: sys.modules.pop(name, None) for name in names}
    try:
        with sandboxed(sandbox):
            from lm_eval.tasks.humaneval import utils as human_eval
            from lm_eval.tasks.mbpp import utils as mbpp

            assert isinstance(human_eval.compute_, CodeEval)
            assert isinstance(mbpp.pass_at_k, CodeEval)
            good, bad = "def f(): return 1", "def f(): return 2"
            test = "assert f() == 1"
            assert human_eval.pass_at_k([test], [[good]], k=[1]) == {"pass@1": 1.0}
            assert mbpp.pass_at_1([test], [[bad]]) == 0.0
            doc = {"prompt": "def f():\n", "test": "def check(f): assert f() == 1", "entry_point": "f"}  # fmt: skip
            assert score_program(doc, ["    return 1\n"]) == {"pass@1": 1.0}
            assert score_program(doc, [["    return 2\n"]]) == {"pass@1": 0.0}
    finally:
        for name, module in saved.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
