"""Jobs that somebody ends from outside: one line or none, the code of the signal, and nothing of Python's or Ray's."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jobs import clean, query, status
from jobs.cli import run_job
from pipeline.errors import Terminated
from pipeline.run.endings import catch_sigterm, ended_by_name
from pipeline.store import Store
from tests.conftest import QUICK, small_plan
from tests.outputs import judged, write_night


@pytest.fixture
def output(tmp_path) -> str:
    night = write_night(Store(str(tmp_path)), "mon", 0, [judged("a", "cleared")], listed=1, images_per_s=1.0, errors={})
    Store(str(tmp_path)).write("runs/mon/status.json", json.dumps(night | {"stages": []}).encode())
    Store(str(tmp_path)).write("_attempts/mon/dead", b"")
    return str(tmp_path)


MANY = "SELECT range AS n FROM range(50000)"


@pytest.mark.parametrize(
    ("job", "arguments"),
    [
        (status, ()),
        (status, ("--json",)),
        (status, ("--run-id", "mon")),
        (clean, ("--older-than", "1")),
        (query, ("FROM ledger",)),
        (query, (MANY, "--format", "csv")),
        (query, (MANY, "--format", "json")),
        (query, ("SELECT 1", "--format", "csv")),
    ],
)
def test_a_job_whose_reader_has_left_says_nothing(job: ModuleType, arguments, output, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    err = io.StringIO()
    with open(writer, "w") as gone, redirect_stderr(err), monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", gone)
        patch.setattr(sys, "argv", [job.__name__, *arguments, "--output", output])
        with pytest.raises(SystemExit) as end:
            run_job(job.__name__, job.JobConfig, job.run)
    assert (end.value.code, err.getvalue()) == (141, "")


def test_a_shell_sees_of_a_pipe_what_it_sees_of_other_tools(output):
    command = (
        f'{sys.executable} -m jobs.query "{MANY}" --output {output} --format csv | head -n 1; echo ${{PIPESTATUS[0]}}'
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("n\n141\n", "")


def test_a_job_that_is_terminated_says_so_in_one_line(output):
    command = [sys.executable, "-c", "import jobs.query as job; print(flush=True); "
               "job.run_job('jobs.query', job.JobConfig, job.run)", "--output", output]  # fmt: skip
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as waiting:
        assert waiting.stdout is not None
        waiting.stdout.readline()
        until_caught(waiting.pid)
        waiting.send_signal(signal.SIGTERM)
        assert waiting.stderr is not None
        assert (waiting.stderr.read(), waiting.wait(60)) == ("jobs.query: terminated by SIGTERM\n", 143)


def until_caught(pid: int) -> None:
    """Waits until the process has a handler for SIGTERM."""
    end = time.monotonic() + 60
    while not _caught(pid) >> (signal.SIGTERM - 1) & 1:
        assert time.monotonic() < end, "SIGTERM was not caught in a minute"
        time.sleep(0.02)


def _caught(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("SigCgt")), 16)


def test_signals_are_those_of_the_caller_again_and_the_second_one_is_not_caught():
    before, meanwhile = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            catch_sigterm()  # as when Ray is shut down meanwhile
            meanwhile.append(signal.getsignal(signal.SIGTERM))

    with pytest.raises(Terminated, match="terminated by SIGTERM"), ended_by_name():
        work()
    assert meanwhile == [signal.SIG_DFL] and signal.getsignal(signal.SIGTERM) is before


def test_a_signal_while_flags_are_read_is_one_like_others(monkeypatch):
    def read(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    err = io.StringIO()
    monkeypatch.setattr("jobs.query.JobConfig.__post_init__", read)
    monkeypatch.setattr(sys, "argv", ["jobs.query", "SELECT 1", "--output", "x"])
    with redirect_stderr(err), pytest.raises(SystemExit) as end:
        run_job("jobs.query", query.JobConfig, query.run)
    assert (end.value.code, err.getvalue()) == (143, "jobs.query: terminated by SIGTERM\n")


def test_a_scan_that_is_terminated_says_how_to_go_on_and_prints_no_stack(corpus, tmp_path):
    """Under a Ray of its own, whose native handler prints one."""
    output, printed = tmp_path / "out", tmp_path / "stderr"
    command = [sys.executable, "-m", "jobs.scan", "--source", str(corpus), "--output", str(output), "--run-id", "night"]
    command += ["--plan", str(small_plan(tmp_path, QUICK, windows_per_call=1))]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with printed.open("w") as err, subprocess.Popen(command, env=environment, stdout=err, stderr=err) as scan:
        end = time.monotonic() + 300
        while not list(output.glob("_attempts/night/*")):
            assert scan.poll() is None and time.monotonic() < end, "nothing was judged in time"
            time.sleep(0.02)
        scan.send_signal(signal.SIGTERM)
        assert scan.wait(120) == 143
    told = printed.read_text()
    assert "***" not in told and "Traceback" not in told
    assert told.endswith("jobs.scan: terminated by SIGTERM; start it again with --run-id night to go on\n")
    left = json.loads((output / "runs/night/status.json").read_text())
    assert (left["status"], left["failure"]) == ("failed", "terminated by SIGTERM")
    assert not (output / "runs/night.json").exists()
