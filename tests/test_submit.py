"""Jobs on a cluster: a real head, real submissions, and what a submitter must survive."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from zipfile import ZipFile

import pyarrow.parquet as pq
import pytest
import yaml
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from jobs import scan
from jobs.cli import parse
from pipeline.errors import ReaderGone, RunError, Terminated, UsageError
from pipeline.run import follow, submission
from pipeline.run.endings import ended_by_name
from pipeline.run.follow import Follower, exit_code
from pipeline.run.head import Client
from pipeline.run.scan import new_run_id
from pipeline.run.submission import Job, pack, scan_job
from tests.conftest import QUICK, small_plan

ROOT = Path(__file__).resolve().parents[1]
PICTURES = 30
START_SECONDS = 180


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@dataclass(frozen=True)
class Head:
    address: str
    client: JobSubmissionClient

    def hold(self, run_id: str, submission_id: str) -> None:
        """A job that drives the run for as long as it is left alone."""
        self.client.submit_job(entrypoint="sleep 600", submission_id=submission_id, metadata={"run_id": run_id})


@pytest.fixture(scope="module")
def head(ray_session) -> Iterator[Head]:
    """A head of its own. It shares the token of the tests' Ray session, which has switched tokens on."""
    folder = tempfile.mkdtemp(prefix="head-")  # a short path: sockets lie below it
    port, dashboard = free_port(), free_port()
    command = [
        Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={port}",
        f"--temp-dir={folder}", f"--dashboard-port={dashboard}", "--include-dashboard=true",
        "--dashboard-agent-listen-port=0", f"--ray-client-server-port={free_port()}", "--disable-usage-stats",
    ]  # fmt: skip
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": ""}
    log = Path(folder, "start.log")
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        yield Head(address, _when_ready(address, process, log))
    finally:
        # Not `ray stop`: that ends every Ray on this machine.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _when_ready(address: str, process: subprocess.Popen, log: Path) -> JobSubmissionClient:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError, RuntimeError), pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_API_SERVER_ADDRESS", address)
            client = JobSubmissionClient(address)
            client.submit_job(entrypoint="true")
            return client
        time.sleep(0.5)
    raise AssertionError(f"the head did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def work(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working dir with the code, a plan and a configuration; Ray follows the links."""
    folder = tmp_path_factory.mktemp("work")
    source = tmp_path_factory.mktemp("source")
    for path in sorted((corpus / "0000").iterdir())[:PICTURES]:
        shutil.copy(path, source)
    for name in ("jobs", "pipeline", "models"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".gitignore").write_text("/ignored/\n")
    nightly = {"source": str(source), "output": str(tmp_path_factory.mktemp("out")), "plan": "plan.yaml"}
    # One test breaks the output for good: no use in waiting for it.
    (folder / "nightly.yaml").write_text(yaml.safe_dump(nightly | {"output-patience": 1}))
    small_plan(folder, QUICK)
    return folder


def run(address: str, working_dir: Path, *arguments: str) -> subprocess.CompletedProcess:
    """``jobs.submit`` in this process: a new interpreter imports torch first."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("RAY_API_SERVER_ADDRESS", address)
        patch.setattr(sys, "argv", ["jobs.submit", "--working-dir", str(working_dir), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("jobs.submit", run_name="__main__", alter_sys=True)
    return subprocess.CompletedProcess(arguments, end.value.code, out.getvalue(), err.getvalue())


def nightly(work: Path) -> dict[str, str]:
    return yaml.safe_load((work / "nightly.yaml").read_text())


def expect(result: subprocess.CompletedProcess, code: int, *words: str) -> None:
    """One line that says what is wrong."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == code, result.stdout + result.stderr
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture(scope="module")
def scanned(head: Head, work: Path) -> subprocess.CompletedProcess:
    return run(head.address, work, "scan", "--config", "nightly.yaml", "--run-id", "night")


def test_a_scan_on_a_cluster_ends_with_its_code_and_its_tables(scanned, head, work):
    assert scanned.returncode == 0, scanned.stdout + scanned.stderr
    assert scanned.stdout.count("run night: complete") == 1
    output = Path(nightly(work)["output"])
    ledger = pq.read_table(sorted(output.glob("ledger/scan_date=*/*.parquet")), partitioning=None)
    assert sorted(ledger["ordinal"].to_pylist()) == list(range(PICTURES))
    assert set(ledger["run_id"].to_pylist()) == {"night"}
    job = head.client.get_job_info("night-1")
    assert job.metadata["run_id"] == "night" and job.metadata["job"] == "scan" and job.metadata["version"]
    assert job.entrypoint == "python -m jobs.scan --config nightly.yaml --run-id night"
    assert set(job.runtime_env) <= {"working_dir", "_ray_commit"} and "env_vars" not in job.runtime_env


def test_a_complete_run_is_submitted_again_for_nothing_and_one_that_breaks_ends_with_1(scanned, head, work):
    record = Path(nightly(work)["output"], "runs/night.json")
    before = record.read_bytes()
    arguments = ("scan", "--config", "nightly.yaml", "--run-id", "night")
    result = run(head.address, work, *arguments)
    assert result.returncode == 0 and "job night-2 submitted" in result.stdout and not result.stderr
    assert record.read_bytes() == before
    # A folder where the report belongs: the run begins, and its output cannot be written.
    report = record.parent / "night/report.html"
    report.unlink()
    report.mkdir()
    result = run(head.address, work, *arguments)
    assert result.returncode == 1
    assert "run 'night' is complete, but could not be finished" in result.stdout
    assert result.stderr == "job night-3 ended with exit code 1: the end of its log says why\n"
    log = run(head.address, work, "--follow", "night").stdout
    assert log and result.stdout.endswith(log)


def test_wrong_usage_that_only_the_cluster_can_see_ends_with_2(head, work, tmp_path):
    result = run(
        head.address, work, "scan", "--source", str(tmp_path), "--output", f"{tmp_path}-out", "--plan", "quick.yaml"
    )
    expect(result, 2, "quick.yaml")
    result = run(head.address, work, "scan", "--config", "nightly.yaml", "--source", str(tmp_path))
    assert result.returncode == 2, result.stdout
    assert f"source {tmp_path} holds no images" in result.stdout
    (run_id,) = re.findall(r"--run-id (\S+)", result.stdout)
    assert head.client.get_job_info(f"{run_id}-1").metadata["run_id"] == run_id


def test_a_run_that_is_being_driven_is_not_driven_twice(head, work, monkeypatch):
    head.hold("held", "held-1")
    arguments = ("scan", "--config", "nightly.yaml", "--run-id", "held")
    expect(run(head.address, work, *arguments), 2, "run 'held' is being driven by job held-1", "--follow held")
    monkeypatch.setattr(submission, "jobs_of", lambda client, run_id: [])  # the other had not been there when we looked
    expect(run(head.address, work, *arguments), 2, "run 'held' is being driven by job held-1")
    monkeypatch.undo()
    head.client.stop_job("held-1")
    expect(run(head.address, work, "--follow", "held"), 1, "job held-1 was stopped")


def test_of_two_submitters_at_one_moment_one_wins(head, tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    package = pack(tmp_path / "package", tmp_path)
    both_have_looked = threading.Barrier(2)
    look = submission.jobs_of

    def look_and_wait(client: Client, run_id: str) -> list[JobDetails]:
        found = look(client, run_id)
        both_have_looked.wait(60)
        return found

    monkeypatch.setattr(submission, "jobs_of", look_and_wait)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)
    results: list[str | UsageError] = []

    def one() -> None:
        job = Job(name="scan", arguments=(), run_id="race")
        try:
            results.append(submission.submit(Client(head.address), head.address, job, package))
        except UsageError as error:
            results.append(error)

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [result for result in results if isinstance(result, UsageError)]
    assert len(results) == 2 and "race-1" in results
    assert ["run 'race' is being driven by job race-1" in str(error) for error in refused] == [True]


@contextmanager
def breaking(port: int, seconds: float) -> Iterator[int]:
    """A port that leads to another, and cuts every connection after a while."""

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)

    def serve() -> None:
        while True:
            try:
                near, _ = server.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", port))
            for ends in ((near, far), (far, near)):
                threading.Thread(target=pump, args=ends, daemon=True).start()
            for end in (near, far):
                threading.Timer(seconds, partial(end.shutdown, socket.SHUT_RDWR)).start()

    with socket.create_server(("127.0.0.1", 0)) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda args: None)  # a connection that has ended by itself
        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def test_a_log_is_printed_once_though_its_connection_breaks(head, monkeypatch):
    count = "for i in 1 2 3 4 5 6; do echo line $i; sleep 1; done; exit 7"
    head.client.submit_job(entrypoint=count, submission_id="counts")
    printed: list[str] = []
    with breaking(int(head.address.rsplit(":", 1)[1]), seconds=2) as port:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{port}")
        follower = Follower(Client(f"http://127.0.0.1:{port}"), head.address, "counts", printed.append)
        streams = []
        stream = follower._print_stream
        follower._print_stream = lambda: (streams.append(len(printed)), stream())
        assert follower.wait() == 7
    assert len(streams) > 1
    # Ray's own line about the entrypoint may come after the job's first.
    lines = [line for line in "".join(printed).splitlines() if line.startswith("line ")]
    assert lines == [f"line {number}" for number in range(1, 7)]
    assert "".join(printed) == head.client.get_job_logs("counts")


class Shaky:
    """A client whose head is away for some questions and then says how the job stands."""

    def __init__(self, *answers: JobDetails | Exception) -> None:
        self.answers = list(answers)

    def get_job_info(self, submission_id: str) -> JobDetails:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def tail_job_logs(self, submission_id: str):
        raise ConnectionError("away")
        yield

    def get_job_logs(self, submission_id: str) -> str:
        return "the last line"


def details(status: JobStatus, **more: object) -> JobDetails:
    return JobDetails(type=JobType.SUBMISSION, submission_id="x-1", status=status, entrypoint="", **more)


def test_a_head_that_is_away_for_a_while_is_waited_for(monkeypatch):
    monkeypatch.setattr(follow, "PAUSE_SECONDS", 0.01)
    printed: list[str] = []
    away = [ConnectionError("refused"), RuntimeError("Request failed with status code 500: starting")]
    client = Shaky(*away, details(JobStatus.RUNNING), *away, details(JobStatus.FAILED, driver_exit_code=2))
    assert Follower(client, "http://h:1", "x-1", printed.append).wait() == 2
    assert printed == ["the last line"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("refused"), ("not answered for 0.05 s", "refused", "--follow x-1")),
        (RuntimeError("Request failed with status code 404: Job x-1 does not exist"), ("forgotten job x-1", "again")),
    ],
)
def test_a_head_that_stays_away_or_has_forgotten_the_job_ends_the_wait(monkeypatch, error, words):
    monkeypatch.setattr(follow, "HEAD_PATIENCE", 0.05)
    monkeypatch.setattr(follow, "PAUSE_SECONDS", 0.01)
    with pytest.raises(RunError) as found:
        Follower(Shaky(error), "http://h:1", "x-1", print).wait()
    assert all(word in str(found.value) for word in words)


@pytest.mark.parametrize("code", [1, 2, 3, 4])
def test_a_job_ends_with_the_code_of_its_driver(code):
    """Ray knows success and failure only: a suspect run (3) is a job that failed, and must not end as 1."""
    assert exit_code(details(JobStatus.FAILED, driver_exit_code=code)) == code


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (details(JobStatus.STOPPED), "x-1 was stopped"),
        (details(JobStatus.FAILED, driver_exit_code=-9), "x-1: its driver was killed by signal 9"),
        (details(JobStatus.FAILED, message="Job supervisor actor died: node\nmore"), "Job supervisor actor died: node"),
        (details(JobStatus.FAILED), "Ray does not say why"),
    ],
)
def test_a_job_that_something_else_ended_is_said_to_have_failed(job, words):
    with pytest.raises(RunError, match=words) as found:
        exit_code(job)
    assert "\n" not in str(found.value)


def interrupt(_: str) -> None:
    raise KeyboardInterrupt


def terminate(_: str) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


def leave(_: str) -> None:
    raise ReaderGone("nobody reads")


@pytest.mark.parametrize(
    ("write", "raised", "code", "words"),
    [
        (interrupt, RunError, 1, "job x-1 goes on: follow it with "),
        (terminate, Terminated, 143, "terminated by SIGTERM; job x-1 goes on: follow it with "),
        (leave, ReaderGone, 141, "nobody reads; job x-1 goes on: follow it with "),
    ],
)
def test_who_is_ended_leaves_the_job_alone_and_keeps_the_code_of_the_signal(monkeypatch, write, raised, code, words):
    """While a line of the log is printed, within the loop that reads it."""

    async def tail(_: str) -> AsyncIterator[str]:
        yield "a line"

    client = Shaky(details(JobStatus.RUNNING))
    monkeypatch.setattr(client, "tail_job_logs", tail)
    with ended_by_name(), pytest.raises(raised) as found:
        Follower(client, "http://h:1", "x-1", write).wait()
    assert type(found.value) is raised and found.value.exit_code == code
    assert str(found.value).startswith(words) and "--follow x-1, or end it with ray job stop" in str(found.value)


def test_a_head_that_is_not_there_or_does_not_answer_is_one_line_and_soon(work, monkeypatch):
    began = time.monotonic()
    expect(run(f"http://127.0.0.1:{free_port()}", work, "--follow", "x"), 2, "no Ray head answers at http://127.0.0.1:")
    monkeypatch.setattr("pipeline.run.head.ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        expect(run(address, work, "--follow", "x"), 2, f"{address} does not answer as a Ray head does", "timed out")
    assert time.monotonic() - began < 20
    expect(run("127.0.0.1:8265", work, "--follow", "x"), 2, "'127.0.0.1:8265'", "http://HEAD:8265")


@pytest.mark.parametrize(("token", "words"), [("Bearer wrong", "Invalid"), ("", "Missing")])
def test_a_head_that_wants_another_token_is_one_line_with_the_remedy(head, work, monkeypatch, token, words):
    monkeypatch.setattr("pipeline.run.head.Client", partial(Client, headers={"Authorization": token}))
    expect(run(head.address, work, "--follow", "x"), 2, f"{words} authentication token", "RAY_AUTH_TOKEN")


def test_what_the_cluster_would_not_find_is_refused_before_anything_travels(work, tmp_path):
    nobody = f"http://127.0.0.1:{free_port()}"
    submit = partial(run, nobody, work, "scan", "--config", "nightly.yaml")
    expect(submit("--sauce", "x"), 2, "Unknown option", "--sauce")
    expect(submit("--shard-size", "0"), 2, "shard size is 0")
    expect(submit("--output", "out"), 2, "--output out is a relative path", "s3://")
    expect(submit("--labels", "none.parquet"), 2, "none.parquet: no such file in the working dir")
    outside = small_plan(tmp_path, QUICK)
    expect(submit("--plan", str(outside)), 2, "not named from the working dir")
    expect(submit("--plan", os.path.relpath(outside, work)), 2, "not named from the working dir")
    (work / "ignored").mkdir(exist_ok=True)
    shutil.copy(outside, work / "ignored/plan.yaml")
    expect(submit("--plan", "ignored/plan.yaml"), 2, "does not travel", ".gitignore")
    expect(run(nobody, work, "calibrate", "--labels=ignored/plan.yaml"), 2, "does not travel")
    expect(run(nobody, work, "scam"), 2, "'scam' is no job", "calibrate", "scan")
    expect(run(nobody, work), 2, "give a job to submit", "--follow")
    expect(run(nobody, work, "--follow", "x", "scan"), 2, "give a job to submit", "--follow")
    expect(run(nobody, work / "none", "scan"), 2, "is no folder")
    # And with nothing wrong it is the head that is missing.
    expect(submit(), 2, f"no Ray head answers at {nobody}")


def test_arguments_reach_the_job_as_they_are():
    words = ("--labels", "s3://bucket/with space/labels.parquet", "--exclude", "*.tmp", "$HOME")
    assert Job(name="calibrate", arguments=words).entrypoint == (
        "python -m jobs.calibrate --labels 's3://bucket/with space/labels.parquet' --exclude '*.tmp' '$HOME'"
    )


def test_the_package_holds_what_a_job_needs_and_is_small(tmp_path):
    package = pack(ROOT, tmp_path)
    names = ZipFile(package).namelist()
    assert package.stat().st_size < 20_000_000
    kept = {"jobs/scan.py", "pipeline/flow.py", "models/group_net.py", "pipeline/plans/emblem.yaml"}
    assert kept | {"models/zoo/emblem.json", "models/zoo/emblem.safetensors", "pyproject.toml"} <= set(names)
    left_out = (".git/", ".venv", "out/", "tests/", "docs/", ".ci/", "requirements.lock")
    assert [name for name in names if name.startswith(left_out) or "__pycache__" in name] == []


def test_a_package_that_no_cluster_takes_is_refused_by_its_largest_files(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/movie.bin").write_bytes(bytes(3000))
    monkeypatch.setattr(submission, "MAX_PACKAGE_BYTES", 1000)
    with pytest.raises(UsageError, match=r"at most 1,000.*\.rayignore.*movie\.bin"):
        pack(tmp_path / "work", tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "docs/deploy").glob("nightly-*.yaml")), ids=lambda path: path.name)
def test_nightly_configurations_are_read_and_hold_no_secret(path, tmp_path, monkeypatch):
    shutil.copy(ROOT / "docs/deploy/plan.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    config = parse("jobs.scan", scan.JobConfig, ["--config", str(path)])
    assert config.source.startswith("s3://") and config.output.startswith("s3://")
    assert (config.endpoint_url is None) == ("aws" in path.name)
    job = scan_job(config, ("--config", "nightly.yaml"), "2026-11-24")
    assert job.arguments == ("--config", "nightly.yaml", "--run-id", "2026-11-24") and job.files == ("plan.yaml",)
    text = path.read_text()
    assert re.findall(r"AKIA[0-9A-Z]{16}|(?i:secret_access_key|password|token)\s*[:=]\s*\S", text) == []


def test_there_are_two_nightly_configurations():
    assert {path.name for path in (ROOT / "docs/deploy").glob("*.yaml") if path.name.startswith("nightly-")} == {
        "nightly-aws.yaml",
        "nightly-s3-compatible.yaml",
    }


def test_run_ids_sort_by_time_and_differ():
    first, second = new_run_id(), new_run_id()
    assert first != second and first[:16] <= second[:16]
    assert parse("jobs.scan", scan.JobConfig, ["--source", "x", "--run-id", first]).run_id == first


def _until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow  # two more scans; the quick tests have one
def test_rays_own_command_line_scans_too_and_an_interrupted_submitter_leaves_its_run_going(head, work, tmp_path):
    environment = os.environ | {"RAY_API_SERVER_ADDRESS": head.address}
    output = tmp_path / "own"
    command = [Path(sys.executable).with_name("ray"), "job", "submit", "--address", head.address, "--working-dir", work]
    command += ["--", "python", "-m", "jobs.scan", "--config", "nightly.yaml", "--output", output, "--run-id", "own"]
    assert subprocess.run(command, env=environment, check=False, timeout=400).returncode == 0
    ledger = pq.read_table(sorted(output.glob("ledger/scan_date=*/*.parquet")), partitioning=None)
    assert ledger.num_rows == PICTURES == len(set(ledger["image_id"].to_pylist()))

    output = tmp_path / "interrupted"
    command = [sys.executable, "-m", "jobs.submit", "--working-dir", work, "scan", "--config", "nightly.yaml"]
    command += ["--output", output, "--run-id", "interrupted"]
    log = tmp_path / "log"
    with log.open("w") as out:
        submitter = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True)
        _until(lambda: "scanning 30 images" in log.read_text(), 200)
        submitter.send_signal(signal.SIGINT)
        _, errors = submitter.communicate(timeout=100)
    assert submitter.returncode == 1 and "job interrupted-1 goes on" in errors and "Traceback" not in errors
    result = run(head.address, work, "--follow", "interrupted")
    assert result.returncode == 0 and "run interrupted: complete" in result.stdout
    assert (output / "runs/interrupted.json").is_file()
