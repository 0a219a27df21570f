"""Jobs that ask or tend an output refuse one that is not there, and make none."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from jobs import audit, clean, compact, erase, iceberg, query, review, status
from pipeline.errors import StoreError, UsageError
from pipeline.output import commit
from pipeline.output.opening import open_output
from pipeline.storage import s3_client
from pipeline.store import Store
from tests.outputs import judged, run_here, write_night

JOBS: list[tuple[ModuleType, tuple[str, ...]]] = [
    (status, ()),
    (status, ("--prometheus",)),
    (status, ("--run-id", "r", "--follow")),
    (query, ("SELECT 1",)),
    (audit, ("--run-id", "r")),
    (clean, ()),
    (clean, ("--abandon", "r", "--delete")),
    (review, ("--reviewer", "ann")),
    (compact, ()),
    (erase, ("--uri", "s3://b/a.jpg")),
    (iceberg, ("--catalog", "c", "--namespace", "n")),
]
PYICEBERG = {"PYICEBERG_CATALOG__C__TYPE": "in-memory"}


@pytest.mark.parametrize(("job", "arguments"), JOBS, ids=lambda value: getattr(value, "__name__", None))
def test_an_output_that_is_not_there_is_refused_and_not_made(job, arguments, tmp_path, s3_endpoint, monkeypatch):
    for name, value in PYICEBERG.items():
        monkeypatch.setenv(name, value)
    mistyped = tmp_path / "otu"
    result = run_here(job, *arguments, "--output", str(mistyped))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"{job.__name__}: output {mistyped}: no such folder; give the --output of the scans\n"
    assert not mistyped.exists()

    (tmp_path / "out" / "pictures").mkdir(parents=True)
    for output, endpoint in ((str(tmp_path / "out"), ()), (bucket(s3_endpoint), ("--endpoint-url", s3_endpoint))):
        result = run_here(job, *arguments, "--output", output, *endpoint)
        assert (result.returncode, result.stdout) == (2, "")
        assert f"there is no run under {output}; give the --output of the scans" in result.stderr


@pytest.mark.parametrize(
    ("job", "arguments", "asked"),
    [(clean, ("--delete",), "objects"), (compact, (), "read_version"), (erase, ("--uri", "s3://b/a"), "read_version")],
)
def test_a_store_that_goes_away_in_the_middle_ends_with_1(job, arguments, asked, tmp_path, monkeypatch):
    """With 2, which says that nothing is changed, a half-done erasure would look like one that was not begun."""
    store = Store(str(tmp_path / "out"))
    write_night(store, "mon", 0, [judged("a", "flagged", "gore")])

    def gone(*_: object, **__: object) -> None:
        raise StoreError("the store has gone")

    monkeypatch.setattr(Store, asked, gone)
    result = run_here(job, *arguments, "--output", store.name)
    assert result.returncode == 1
    told = "storage: the store has gone; some of it may be done: start it again until it ends with 0"
    assert result.stderr == f"{job.__name__}: {told}\n"


def bucket(endpoint: str) -> str:
    """An output beside another one, whose name it begins with."""
    s3_client(endpoint).create_bucket(Bucket="outputs")
    Store("s3://outputs/night-shift", endpoint).write("runs/r.json", b"{}")
    return "s3://outputs/night"


def test_a_run_that_has_only_begun_makes_an_output_and_so_do_decisions_on_runs_that_are_gone(tmp_path):
    begun = (f"{commit.listing_prefix('r')}/0.json", commit.status_key("r"))
    for number, key in enumerate((*begun, "reviews/review_date=2026-01-01/a.parquet")):
        folder = tmp_path / str(number)
        Store(str(folder)).write(key, b"{}")
        assert open_output(str(folder), None).name == str(folder)


def test_only_writing_makes_a_folder(tmp_path):
    store = Store(str(tmp_path / "later"))
    assert (store.exists("x"), store.objects("runs"), store.folders("")) == (False, {}, [])
    for request in (store.read, store.read_version):
        with pytest.raises(FileNotFoundError):
            request("x")
    assert store.replace("x", b"1", "version") is None
    store.delete(["x"])
    assert not Path(tmp_path / "later").exists()
    store.write("x", b"1")
    assert store.read("x") == b"1" and store.sizes("") == {"x": 1}


def test_a_file_is_no_output(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="file: no such folder"):
        open_output(str(tmp_path / "file"), None)
