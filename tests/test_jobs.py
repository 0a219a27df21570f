"""Command lines as users meet them: one clear line and an exit code for each mistake."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml

from jobs import scan
from jobs.cli import parse, run_job
from pipeline.errors import UsageError
from pipeline.labels.examples import read_labels
from pipeline.training.fit import TrainConfig
from tests.conftest import small_plan
from tests.faults import Faults, fault_proxy


def run(job: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"jobs.{job}", *arguments]
    env = {key: value for key, value in (os.environ | environment).items() if value}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)


def refuse(*arguments: str) -> subprocess.CompletedProcess:
    """``jobs.scan`` in this process, for mistakes that it finds before Ray: a new interpreter imports torch first."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["jobs.scan", *arguments])
        with pytest.raises(SystemExit) as end:
            run_job("jobs.scan", scan.JobConfig, scan.run)
    return subprocess.CompletedProcess(arguments, end.value.code, out.getvalue(), err.getvalue())


def expect(result: subprocess.CompletedProcess, code: int, *words: str) -> None:
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


TORN_DOWN = """
import os

class Late:
    def __del__(self, write=os.write):
        write(2, b"torn down")

late = Late()
"""


def test_a_job_ends_before_the_interpreter_is_taken_from_threads_that_still_use_it(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(TORN_DOWN)
    path = f"{tmp_path}:{Path(__file__).parents[1]}"
    usual = [sys.executable, "-c", ""]
    plain = subprocess.run(usual, env=os.environ | {"PYTHONPATH": path}, capture_output=True, check=True)
    assert plain.stderr == b"torn down", "what a process says that ends in the usual way"
    expect(run("erase", "--output", str(tmp_path), PYTHONPATH=path), 2, "name what to erase with --image-id or --uri")
    (tmp_path / "out" / "runs" / "begun").mkdir(parents=True)
    done = run("erase", "--output", str(tmp_path / "out"), "--uri", "s3://b/7", PYTHONPATH=path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "no complete run holds it\n", "")


@pytest.fixture
def pictures(corpus: Path) -> str:
    return str(corpus)


def test_no_credentials(tmp_path):
    blank = {
        "AWS_ACCESS_KEY_ID": "",
        "AWS_SECRET_ACCESS_KEY": "",
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": "/nowhere",
    }
    expect(run("scan", "--source", "s3://some-bucket/x", "--output", str(tmp_path), **blank), 2, "no credentials")
    expect(
        run("scan", "--source", "/tmp", "--output", "s3://some-bucket/x", **blank),
        2,
        "cannot write to s3://",
        "redential",
    )


def test_wrong_endpoint(tmp_path):
    result = refuse("--source", "s3://b/x", "--output", str(tmp_path / "o"), "--endpoint-url", "http://127.0.0.1:9")
    expect(result, 2, "cannot list s3://b/x", "127.0.0.1:9")


def test_empty_prefix(s3_endpoint, tmp_path):
    from pipeline.storage import s3_client

    s3_client(s3_endpoint).create_bucket(Bucket="bare")
    result = refuse("--source", "s3://bare/x", "--output", str(tmp_path / "o"), "--endpoint-url", s3_endpoint)
    expect(result, 2, "s3://bare/x holds no images")


def test_missing_bucket(s3_endpoint, tmp_path):
    result = refuse("--source", "s3://nowhere/x", "--output", str(tmp_path / "o"), "--endpoint-url", s3_endpoint)
    expect(result, 2, "cannot list s3://nowhere/x", "NoSuchBucket")


def test_unwritable_output(pictures):
    expect(refuse("--source", pictures, "--output", "/proc/dorfman"), 2, "cannot write to /proc/dorfman")


def test_output_inside_source(pictures):
    expect(refuse("--source", pictures, "--output", f"{pictures}/out"), 2, "lies inside source")


def test_missing_folder(tmp_path):
    result = refuse("--source", str(tmp_path / "none"), "--output", str(tmp_path / "o"))
    expect(result, 2, "no such folder")


def test_plan_with_a_missing_model(pictures, tmp_path):
    plan = small_plan(tmp_path)
    plan.write_text(plan.read_text().replace("model: emblem", "model: no-such-net"))
    result = refuse("--source", pictures, "--output", str(tmp_path / "o"), "--plan", str(plan))
    expect(result, 2, "'no-such-net' is missing", "emblem-mini")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("rounds:\n  - 16\n  - 4", "rounds:\n  - 16\n  - 5", ("a round of 5 cannot follow one of 16",)),
        ("images: 32", "images: 33", ("window.images is 33", "not a multiple")),
        ("input_size:", "inputsize:", ("inputsize is no field", "input_size")),
        ("name:", "name: [", ("is not YAML",)),
    ],
)
def test_broken_plan(pictures, tmp_path, old, new, words):
    plan = small_plan(tmp_path)
    assert old in plan.read_text()
    plan.write_text(plan.read_text().replace(old, new))
    result = refuse("--source", pictures, "--output", str(tmp_path / "o"), "--plan", str(plan))
    expect(result, 2, *words)


def test_pools_that_do_not_fit_the_machine_fail_at_once(pictures, tmp_path):
    plan = small_plan(tmp_path, num_cpus=1000)
    result = run("scan", "--source", pictures, "--output", str(tmp_path / "o"), "--plan", str(plan))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "needs at least" in result.stderr and "lower num_cpus" in result.stderr


def test_wrong_flags(tmp_path):
    expect(refuse("--sauce", "x"), 2, "Unknown option", "--source")
    expect(refuse(), 2, "either --source", "--demo")
    expect(refuse("--demo", "--output", "s3://b/x"), 2, "writes to a local folder")
    expect(refuse("--source", "x", "--shard-size", "many"), 2, "--shard-size", "many")
    expect(refuse("--source", "x", "--shard-size", "0"), 2, "shard size is 0")
    expect(refuse("--source", "x", "--run-id", "../../etc"), 2, "run id")
    expect(refuse("--source", "ftp://x/y", "--output", str(tmp_path)), 2, "only s3:// and local paths")
    expect(refuse("--config", str(tmp_path / "none.yaml")), 2, "No such file")


def test_labels_that_are_no_labels(pictures, tmp_path):
    (tmp_path / "labels.parquet").write_bytes(b"no parquet")
    arguments = ("--source", pictures, "--output", str(tmp_path / "o"))
    expect(refuse(*arguments, "--labels", str(tmp_path / "labels.parquet")), 2, "wanted Parquet with uri")
    expect(refuse(*arguments, "--labels", str(tmp_path / "none.parquet")), 2, "no such file")


def test_help_names_every_field_and_the_exit_codes():
    result = run("scan", "--help")
    assert result.returncode == 0
    for flag in (
        "--source",
        "--output",
        "--endpoint-url",
        "--plan",
        "--labels",
        "--run-id",
        "--shard-size",
        "--exclude",
        "--config",
    ):
        assert flag in result.stdout
    assert "2 wrong usage" in " ".join(result.stdout.replace("│", " ").split())


def test_configuration_file_gives_values_that_flags_override(pictures, tmp_path):
    file = tmp_path / "nightly.yaml"
    file.write_text("source: s3://bucket/x\nshard-size: 77\nexclude: ['*.tmp']\n")
    config = parse("jobs.scan", scan.JobConfig, ["--config", str(file), "--shard-size", "5"])
    assert (config.source, config.shard_size, config.exclude) == ("s3://bucket/x", 5, ("*.tmp",))
    config = parse("jobs.scan", scan.JobConfig, ["--source", "y", "--exclude", "a", "b*"])
    assert config.exclude == ("a", "b*")


def test_a_configuration_file_runs_no_code(tmp_path):
    file = tmp_path / "nightly.yaml"
    file.write_text(f"source: !!python/object/apply:os.mkdir [{tmp_path}/ran]")
    expect(refuse("--config", str(file)), 2, "is not YAML", "could not determine a constructor")
    assert not (tmp_path / "ran").exists()
    file.write_text("deadline: '06:00'\ndeadline: '08:00'")
    expect(refuse("--config", str(file)), 2, "line 2, column 1: 'deadline' stands there twice; keep one")


def test_the_demo_draws_serves_and_scans_a_corpus(tmp_path):
    result = run(
        "scan", "--demo", "--demo-images", "64", "--demo-prevalence", "0.125", "--output", str(tmp_path / "out")
    )
    assert result.returncode == 0, result.stderr
    assert "recall" in result.stdout and "cost relative to testing every image" in result.stdout
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "out/runs").glob("*.json"))
    assert record["counts"]["listed"] == 64 and record["quality"]["positives"] == 8
    assert read_labels(str(tmp_path / "out/labels.parquet")).num_rows == 64
    report = (tmp_path / "out/runs" / record["run_id"] / "report.html").read_text()
    assert report.count("data:image/jpeg") == record["counts"]["flagged"] > 0


def test_a_demo_whose_output_cannot_be_written_draws_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "demo_corpus", None)  # which would be called to draw
    (tmp_path / "file").write_bytes(b"")
    expect(refuse("--demo", "--output", str(tmp_path / "file/out")), 2, "cannot write to", "file/out")


def test_a_corpus_or_a_net_that_storage_refuses_is_one_line(s3_endpoint, tmp_path):
    faults = Faults(share={"403": 1.0}, matches=lambda method, key: True)
    with fault_proxy(s3_endpoint, faults) as url:
        drawing = ["--output", "s3://denied/x", "--endpoint-url", url, "--images", "1", "--processes", "1"]
        expect(run("corpus", *drawing), 2, "storage:", "403")
        config = TrainConfig(name="n", labels=("x",), init="s3://denied/net.pth", endpoint_url=url)
        with pytest.raises(UsageError, match=r"storage: .*403"):
            config.build_net()


def test_a_demo_of_what_the_corpus_cannot_draw_is_refused(tmp_path):
    plan = small_plan(tmp_path, categories=["automobile"])
    content = yaml.safe_load(plan.read_text())
    content["stages"] = [
        {"name": "one", "model": "cifar-mini", "rounds": [1], "thresholds": {"automobile": [0.5]}, "input_size": 32}
    ]
    plan.write_text(yaml.safe_dump(content))
    result = refuse("--demo", "--plan", str(plan), "--output", str(tmp_path / "out"))
    expect(result, 2, "automobile", "trefoil, star, bolt")
