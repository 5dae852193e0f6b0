"""The laboratory on several GPUs: commands that wait for one another, and the same results as on one."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import ROOT
from safetensors.torch import load_file

sys.path.append(str(ROOT))  # `lab` is run from the root of the repository

from lab import plan, run
from lab.jobs import LIGHT_PLACES, Job, run_jobs, visible_gpus

from tidar.errors import TidarError

FAST = (sys.executable, "-I", "-S", "-c")


def job(name: str, code: str, *after: str) -> Job:
    return Job(name, (*FAST, code), frozenset(after))


def noted(path: Path, name: str) -> str:
    """Notes when a job begins and ends, and on which GPU."""
    note = f"open({str(path)!r}, 'a').write('{{}} {name} ' + os.environ['CUDA_VISIBLE_DEVICES'] + chr(10))"
    begin, end = (f"{note.replace('{}', word)}" for word in ("begin", "end"))
    return f"import os, time; {begin}; time.sleep(0.3); {end}"


def test_jobs_run_side_by_side_and_after_one_another(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    after = {"a": (), "b": (), "c": ("a",), "d": ("a", "b", "elsewhere"), "e": ()}
    jobs = [job(name, noted(notes, name), *before) for name, before in after.items()]
    assert run_jobs(jobs, ["0", "3"], tmp_path) == {}
    lines = [line.split() for line in notes.read_text().splitlines()]
    at = {(word, name): index for index, (word, name, _) in enumerate(lines)}
    assert len(at) == 10
    assert all(
        at["end", b] < at["begin", n] for n, before in after.items() for b in before if b in after
    )
    busy: list[str] = []
    most = 0
    for word, _, gpu in lines:
        if word == "begin":
            assert gpu not in busy
            busy.append(gpu)
        else:
            busy.remove(gpu)
        most = max(most, len(busy))
    assert most == 2
    assert {gpu for _, _, gpu in lines} == {"0", "3"}


def test_light_jobs_share_a_gpu_that_no_other_has(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    light = [f"light-{i}" for i in range(LIGHT_PLACES + 1)]
    jobs = [replace(job(name, noted(notes, name)), light=True) for name in light]
    jobs += [job("a", noted(notes, "a")), job("b", noted(notes, "b"), "a")]
    assert run_jobs(jobs, ["5"], tmp_path) == {}
    running: set[str] = set()
    most = 0
    for line in notes.read_text().splitlines():
        word, name, _ = line.split()
        (running.add if word == "begin" else running.remove)(name)
        assert running <= set(light) or len(running) == 1
        most = max(most, len(running))
    assert 2 <= most <= LIGHT_PLACES
    assert [line.split()[1] for line in notes.read_text().splitlines()][:4] == ["a", "a", "b", "b"]


def test_a_failure_stops_what_needs_it_and_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "done"
    jobs = [
        job("bad", "print('why', flush=True); raise SystemExit(3)"),
        job("needs", "pass", "bad"),
        job("needs-too", "pass", "needs"),
        job("other", f"open({str(done)!r}, 'w')"),
    ]
    failed = run_jobs(jobs, ["0"], tmp_path)
    assert list(failed) == ["bad", "needs", "needs-too"]
    assert failed["bad"].startswith("exit code 3")
    assert failed["needs-too"] == "not run, for want of needs"
    assert done.exists()
    assert (tmp_path / "bad.log").read_text() == "why\n"
    told = capfd.readouterr().out
    assert "FAILED bad" in told
    assert "done other" in told
    assert run.report_failures(failed) == 1
    assert run.report_failures({}) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_every_child(tmp_path: Path, number: signal.Signals) -> None:
    """Asked once; a child may finish what it is at, here by noting that it was asked."""
    child = (
        "import os, signal, sys, time; name = sys.argv[1]; "
        "signal.signal(signal.SIGTERM, lambda *_: (open(name + '.asked', 'w').close(), sys.exit(1))); "
        "open(name, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    jobs = [Job(n, (*FAST, child, str(tmp_path / n))) for n in ("one", "two")]
    helper = subprocess.Popen(
        [*FAST, "import os, sys, time\n"
         "while not all(os.path.exists(p) and os.path.getsize(p) for p in sys.argv[3:]): time.sleep(0.01)\n"
         "os.kill(int(sys.argv[1]), int(sys.argv[2]))",
         str(os.getpid()), str(int(number)), *(str(tmp_path / n) for n in ("one", "two"))],
    )  # fmt: skip
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_jobs(
            [*jobs, job("never", f"open({str(tmp_path / 'never')!r}, 'w')")], ["0", "1"], tmp_path
        )
    assert helper.wait() == 0
    assert time.monotonic() - began < 20
    for name in ("one", "two"):
        assert (tmp_path / f"{name}.asked").exists()
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / name).read_text()), 0)
    assert not (tmp_path / "never").exists()


def test_what_waits_for_an_end_runs_after_a_failure_too(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    jobs = [
        replace(job("last", noted(notes, "last")), behind=frozenset({"bad", "lost", "good"})),
        job("bad", "raise SystemExit(3)"),
        job("lost", noted(notes, "lost"), "bad"),
        job("good", noted(notes, "good")),
    ]
    assert set(run_jobs(jobs, ["0", "1"], tmp_path)) == {"bad", "lost"}
    told = [line.split()[:2] for line in notes.read_text().splitlines()]
    assert told == [["begin", "good"], ["end", "good"], ["begin", "last"], ["end", "last"]]


def test_the_graph_of_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run.predecessors()
    for name, stage in plan.STAGES.items():
        assert (stage.after or "tokenizer") in before[name]
    assert before["measure-speculative"] == {"ar", "draft"}
    assert before["bits-llada"] == {"llada"}
    assert before["schedules-forced"] == {"tidar"}
    assert before["speed-t0"] > {"eagle", "bits-llada", "schedules-free"}
    assert before["speed-t1"] == before["speed-t0"], (
        "each on a GPU of its own, when nothing else runs"
    )
    assert before["measure"] > {"speed-t0", "speed-t1"}
    jobs = run.stage_jobs(["measure", "table"], ["--out=x"])
    assert {each.name for each in jobs if not each.light} == {
        "speed-t0",
        "speed-t1",
        "measure",
        "table",
    }
    assert [each.name for each in jobs][-2:] == ["measure", "table"]
    assert {each.name for each in jobs[:-2]} == set(run.measurements()) <= jobs[-2].behind
    (alone,) = run.stage_jobs(["bits-ar"], [])
    assert alone.light
    assert jobs[0].command[1:] == ("-m", "lab.run", "--out=x", jobs[0].name)
    with pytest.raises(TidarError, match="in a circle: a, b"):
        run_jobs([job("a", "", "b"), job("b", "", "a")], ["0"], tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert visible_gpus(2) == ["4", "6"]
    for count, told in ((3, "this process sees 2"), (0, "at least 1")):
        with pytest.raises(TidarError, match=told):
            visible_gpus(count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus(1) == ["0"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert visible_gpus(3) == ["0", "1", "2"]
    assert run.main(["--out", str(tmp_path), "--gpus", "0", "corpus"]) == 2


def test_two_at_a_time_give_what_one_after_the_other_gives(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run.main(["--smoke", "--out", str(one), "corpus", "tokenizer", "base", "draft"]) == 0
    two.mkdir()
    for part in ("data", "tokenizer"):
        (two / part).symlink_to(one / part)
    command = [sys.executable, "-m", "lab.run", "--smoke", "--out", str(two), "--gpus", "2"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "base", "draft"], cwd=ROOT, env={**os.environ, **threads}, capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split()[1:3] for line in done.stdout.splitlines()]
    assert lines[:2] == [["start", "base"], ["start", "draft"]]
    for stage in ("base", "draft"):
        assert "3 steps" in (two / f"{stage}.log").read_text()
        mine, theirs = (
            load_file(out / stage / "model" / "model.safetensors") for out in (one, two)
        )
        assert all(mine[name].equal(theirs[name]) for name in {**mine, **theirs})
