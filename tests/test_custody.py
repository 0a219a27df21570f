"""What a run keeps and who may see it: erasure, litter, credentials, names, rights on the source."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import RunError, UsageError
from pipeline.output import commit
from pipeline.output.commit import Ledger
from pipeline.store import Store
from pipeline.tables.clean import find_abandoned, find_litter
from tests.conftest import QUICK, small_plan, upload
from tests.faults import Faults, fault_proxy
from tests.test_commit import Run
from tests.test_jobs import expect, refuse, run

DAY = timedelta(hours=24)


@pytest.fixture
def left_behind(tmp_path: Path) -> Run:
    """A run with one shard committed and one attempt that nobody will ask for, a week ago."""
    left = Run(tmp_path / "out")
    receipts = left.receipts(left.windows())
    left.ledger().add(receipts[0])
    left.store.write("_state/r/manifest-deadbeef/shard-00000.parquet", b"of a start that lost the race")
    commit.freeze(left.store, "r", {"shards": [{"key": shard.key} for shard in left.manifest.shards]})
    age(left.store)
    return left


def age(store: Store, seconds: float = 7 * 24 * 3600) -> None:
    for path in Path(store.uri.removeprefix("file://")).rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)


def test_cleaning_takes_dead_files_and_never_what_a_marker_names(left_behind):
    store = left_behind.store
    files = set(store.sizes(""))
    (litter,) = find_litter(store, DAY)
    named = {
        file[key]
        for path in store.sizes("_state/r/markers")
        for file in json.loads(store.read(path))["files"]
        for key in ("attempt", "path")
    }
    manifest = {shard.key for shard in left_behind.manifest.shards}
    assert len(named) == 8 and not named & set(litter.keys) and not manifest & set(litter.keys)
    assert "_state/r/manifest-deadbeef/shard-00000.parquet" in litter.keys and len(litter.keys) > 3
    output = store.uri.removeprefix("file://")
    listed = run("clean", "--output", output)
    assert listed.returncode == 0 and "would be removed; repeat with --delete" in listed.stdout
    assert set(store.sizes("")) == files
    done = run("clean", "--output", output, "--delete")
    assert done.returncode == 0 and f"{len(litter.keys)} files" in done.stdout
    assert set(store.sizes("")) == files - set(litter.keys)
    resumed = left_behind.ledger()
    for receipt in left_behind.receipts([window for window in left_behind.windows() if window.shard]):
        resumed.add(receipt)
    assert resumed.pending == [] and left_behind.table("ledger").num_rows == 80


@pytest.mark.parametrize("sign", ["_state/r/epochs/000009.json", "_attempts/r/shard-00001/00000002-x/ledger.parquet"])
def test_a_run_that_may_be_alive_is_left_alone(left_behind, sign):
    left_behind.store.write(sign, b"of a driver that has just taken it over, or of a worker in its first shard")
    (litter,) = find_litter(left_behind.store, DAY)
    assert litter.keys == () and litter.reason.startswith("left alone: written to at")
    with pytest.raises(UsageError, match="may have a living driver"):
        find_abandoned(left_behind.store, "r", DAY)
    expect(run("clean", "--output", "x", "--older-than", "0.5"), 2, "a living driver may need 1")


def test_a_run_can_be_given_up_by_name_and_a_complete_one_cannot(left_behind):
    output = left_behind.store.uri.removeprefix("file://")
    others = {f"ledger/scan_date=2026-01-01/{name}-shard-00000.parquet" for name in ("r2", "r-shard-x", "xr")}
    for key in others:
        left_behind.store.write(key, b"another run's")
    left_behind.ledger()
    expect(run("clean", "--output", output, "--abandon", "r"), 2, "'r' was written to at", "may have a living driver")
    age(left_behind.store)
    assert run("clean", "--output", output, "--abandon", "r", "--delete").returncode == 0
    assert set(left_behind.store.sizes("")) == others
    left_behind.store.write("runs/r3.json", b"{}")
    expect(run("clean", "--output", output, "--abandon", "r"), 2, "there is no run 'r'")
    expect(run("clean", "--output", output, "--abandon", "r3"), 2, "run 'r3' is complete: its tables stay")


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_a_run_that_says_it_has_ended_is_given_up_at_once_unless_somebody_goes_on_with_it(left_behind, state):
    store = left_behind.store
    left_behind.ledger()
    commit.write_json(store, commit.status_key("r"), {"status": "running"})
    with pytest.raises(UsageError, match="may have a living driver"):
        find_abandoned(store, "r", DAY)
    commit.write_json(store, commit.status_key("r"), {"status": state})
    assert "_state/r/run.json" in find_abandoned(store, "r", DAY).keys
    written = "_attempts/r/shard-00001/00000009-x/ledger.parquet"
    store.write(written, b"of a worker that outlives its driver by a moment")
    assert {"_state/r/run.json", written} <= set(find_abandoned(store, "r", DAY).keys)
    left_behind.ledger()
    with pytest.raises(UsageError, match="may have a living driver"):
        find_abandoned(store, "r", DAY)


def test_what_a_worker_writes_after_its_run_was_given_up_is_found_later(left_behind):
    """Before the files go, while they do and after: the next one finds the rest, and nothing is left in the end."""
    store = left_behind.store
    commit.write_json(store, commit.status_key("r"), {"status": "stopped"})
    given_up = find_abandoned(store, "r", DAY).keys
    late = [f"_attempts/r/shard-00001/0000000{number}-late/ledger.parquet" for number in (7, 8)]
    store.write(late[0], b"while the files are looked for")
    store.delete(list(given_up))
    store.write(late[1], b"when they are gone")
    assert sorted(store.sizes("")) == late
    (young,) = find_litter(store, DAY)
    assert young.keys == () and young.reason.startswith("left alone: written to at")
    age(store)
    (litter,) = find_litter(store, DAY)
    assert list(litter.keys) == late and litter.reason == "of drivers that are gone; there is no run to go on with"
    store.delete(list(litter.keys))
    assert find_litter(store, DAY) == [] and store.sizes("") == {}


CANARY = {"AWS_ACCESS_KEY_ID": "AKIACANARYCANARY1234", "AWS_SECRET_ACCESS_KEY": "canary/secret+value0123456789"}


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its logs: its sockets lie below, whose paths may have a hundred characters."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def scanned(corpus: Path, ray_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Source, output and the folder of both of a scan with hostile names, by a process with marked credentials."""
    folder = tmp_path_factory.mktemp("custody")
    source, output = folder / "source", folder / "deep" / "out"
    names = [
        "up%2F..%2F..%2Fescaped.jpg",
        "<script>alert(1)<script>.jpg",
        "a\nb.jpg",
        "-rf *.jpg",
        "$(touch pwned).jpg",
    ]
    pictures = sorted((corpus / "0000").iterdir())[: 40 + len(names)]
    source.mkdir()
    for path, name in zip(pictures, [*names, *(path.name for path in pictures[len(names) :])], strict=True):
        (source / name).write_bytes(path.read_bytes())
    (source / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    plan = small_plan(folder, QUICK)
    result = run(
        "scan", "--source", str(source), "--output", str(output), "--plan", str(plan), "--run-id", "r", "--salt", "s",
        "--report-thumbnails", RAY_TMPDIR=str(ray_folder), **CANARY,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (folder / "said.txt").write_text(result.stdout + result.stderr)
    return source, output, folder


def test_object_names_are_never_paths_or_commands(scanned):
    source, output, folder = scanned
    below = {path.relative_to(folder).parts[0] for path in folder.rglob("*")}
    assert below <= {"source", "deep", "plan.yaml", "said.txt"}
    expected = re.compile(
        r"(ledger|flagged|errors|audit)/scan_date=[\d-]+/r-shard-00000\.parquet|runs/r\.json|runs/r/(status\.json|report\.html)"
        r"|_state/r/(run\.json|manifest-\w+/shard-00000\.parquet|(epochs|heartbeats)/000001\.json|markers/shard-00000\.json"
        r"|listing/\w+\.json)"
    )
    files = [str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()]
    assert [name for name in files if not expected.fullmatch(name)] == []
    assert not list(Path.cwd().glob("pwned")) and not list(folder.rglob("pwned"))
    ledger = pq.read_table(next(output.glob("ledger/*/*.parquet")), partitioning=None)
    assert len(set(ledger["source_uri"].to_pylist())) == len(list(source.iterdir()))


def test_no_credential_is_in_any_file_or_line(scanned, ray_folder):
    _, _, folder = scanned
    places = [*folder.rglob("*"), *ray_folder.rglob("*")]
    files = [path for path in places if path.is_file() and not path.is_symlink()]
    assert len(files) > 50, "Ray's logs are among them"
    for path in files:
        body = path.read_bytes()
        for secret in CANARY.values():
            assert secret.encode() not in body, path


def test_a_server_that_repeats_credentials_puts_them_into_no_file_or_line(corpus, s3_endpoint, ray_folder, tmp_path):
    """Errors of S3 servers name the key id and the string that was signed: on pictures, on the output, on labels."""
    upload(corpus, s3_endpoint, "talkative", limit=60)
    signed = "AWS4-HMAC-SHA256/canary-string-to-sign"
    refusal = f"<AWSAccessKeyId>{CANARY['AWS_ACCESS_KEY_ID']}</AWSAccessKeyId><StringToSign>{signed}</StringToSign>"
    faults = Faults(share={"403": 1.0}, refusal=refusal)

    def refused(method: str, key: str) -> bool:
        """To read a tenth of the pictures, to write a worker's table at the first try, and the record at any."""
        if method == "PUT":
            return key.endswith("runs/r.json") or (key.endswith("ledger.parquet") and key not in faults.by_key)
        return key.endswith(("7.jpg", "labels.parquet"))

    faults.matches = refused
    with fault_proxy(s3_endpoint, faults) as url:
        scan = ["scan", "--source", "s3://talkative/all/", "--output", "s3://talkative/out", "--endpoint-url", url]
        scan += ["--plan", str(small_plan(tmp_path, QUICK)), "--run-id", "r", "--output-patience", "5"]
        labels = run(*scan, "--labels", "s3://talkative/labels.parquet", **CANARY)
        failed = run(*scan, RAY_TMPDIR=str(ray_folder), **CANARY)
    assert labels.returncode == 2 and "403 Forbidden" in labels.stderr
    assert failed.returncode == 1 and "403 Forbidden" in failed.stderr, failed.stderr
    kinds = {"ledger.parquet", "r.json"}
    assert kinds <= {key.rpartition("/")[2] for key, drawn in faults.by_key.items() if "403" in drawn}
    said = [text for result in (labels, failed) for text in (result.stdout, result.stderr)]
    store = Store("s3://talkative/out", s3_endpoint)
    kept = [store.read(key) for key in store.sizes("")]
    (errors,) = (pq.read_table(pa.BufferReader(store.read(key))).to_pylist() for key in store.sizes("errors"))
    assert len(errors) > 2 and all(error["error_code"] == "fetch_denied" for error in errors)
    said += [error["error_detail"] for error in errors]  # a search of compressed bytes would not find it
    said += [store.read("runs/r/failure.txt").decode()]
    logs = [path.read_bytes() for path in ray_folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(kept) > 3 and len(logs) > 50
    for body in [*(text.encode() for text in said), *kept, *logs]:
        for secret in (*CANARY.values(), "canary-string"):
            assert secret.encode() not in body, body[:2000]


def test_erasing_an_object_takes_it_out_of_everything(scanned, tmp_path):
    _, original, _ = scanned
    output = tmp_path / "out"
    subprocess.run(["cp", "-r", str(original), str(output)], check=True)
    flagged = pq.read_table(next(output.glob("flagged/*/*.parquet")), partitioning=None).to_pylist()
    broken = pq.read_table(next(output.glob("errors/*/*.parquet")), partitioning=None).to_pylist()
    victim, other = flagged[0], broken[0]
    erasing = ["--output", str(output), "--image-id", victim["image_id"], "--uri", other["source_uri"]]

    (output / "runs/r/failure.txt").write_text(f"of an earlier driver: {other['source_uri']}")
    # As if it had been judged by labels, and the other one missed.
    record = json.loads((output / "runs/r.json").read_text())
    record["quality"] = QUALITY | {"missed": [other["source_uri"], "file:///stays"]}
    (output / "runs/r.json").write_text(json.dumps(record))
    second = another_night(output, record)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    dry = run("erase", *erasing, "--dry-run")
    assert dry.returncode == 0 and "nothing was rewritten" in dry.stdout
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before

    done = run("erase", *erasing)
    assert done.returncode == 0, done.stderr
    for table, gone in (("ledger", 2), ("flagged", 1), ("errors", 1)):
        paths = list(output.glob(f"{table}/*/*.parquet"))
        assert len(paths) == 2
        assert all(f"{path.relative_to(output)}: {gone} rows removed" in done.stdout for path in paths)
    # Of the other run there is none.
    assert [line for line in done.stdout.splitlines() if "failure" in line] == ["runs/r/failure.txt: deleted"]
    assert "runs/r/report.html: made again" in done.stdout
    for path in output.rglob("*"):
        if path.is_file() and path.suffix != ".parquet":
            body = path.read_text()
            assert victim["image_id"] not in body and other["source_uri"] not in body, path
        elif path.is_file():
            table = pq.read_table(path, partitioning=None)
            names = table[next(name for name in ("source_uri", "uri") if name in table.column_names)].to_pylist()
            assert victim["source_uri"] not in names and other["source_uri"] not in names, path
    for run_id in ("r", second):
        record = json.loads((output / f"runs/{run_id}.json").read_text())
        assert record["quality"]["missed"] == ["file:///stays"]
        for file in record["files"]:
            assert hashlib.sha256((output / file["path"]).read_bytes()).hexdigest() == file["sha256"]
    (log,) = (json.loads(path.read_text()) for path in output.glob("erasures/*.json"))
    # Ledger, flagged and errors of both runs, and the manifest of the first.
    assert sum(file["rows_removed"] for file in log["files"]) == 2 * (2 + 1 + 1) + 2
    assert [file["path"] for file in log["files"] if file["deleted"]] == ["runs/r/failure.txt"]
    assert not (output / "runs/r/failure.txt").exists()
    assert "no complete run holds it" in run("erase", *erasing).stdout


QUALITY = {
    "recall": 0.5, "recall_interval": [0.0, 1.0], "positives": 2, "false_positive_rate": 0.0,
    "false_positive_rate_interval": [0.0, 1.0], "negatives": 44, "unlabelled": 0, "unlisted_positives": 0,
}  # fmt: skip


def another_night(output: Path, record: dict) -> str:
    """A second run over the same objects: the first one's tables and record under another name."""
    files = []
    for file in record["files"]:
        path = file["path"].replace("/r-shard-", "/r2-shard-")
        (output / path).write_bytes((output / file["path"]).read_bytes())
        files.append(file | {"path": path})
    (output / "runs/r2.json").write_text(json.dumps(record | {"run_id": "r2", "files": files}))
    return "r2"


@pytest.fixture
def copied(scanned, tmp_path) -> tuple[Path, dict]:
    """A copy of the output, and one of its flagged rows."""
    _, original, _ = scanned
    output = tmp_path / "out"
    subprocess.run(["cp", "-r", str(original), str(output)], check=True)
    return output, pq.read_table(next(output.glob("flagged/*/*.parquet")), partitioning=None).to_pylist()[0]


def check_erased(output: Path, uri: str) -> None:
    record = json.loads((output / "runs/r.json").read_text())
    for file in record["files"]:
        body = (output / file["path"]).read_bytes()
        assert hashlib.sha256(body).hexdigest() == file["sha256"]
        assert uri not in pq.read_table(output / file["path"], partitioning=None)["source_uri"].to_pylist()
    assert uri not in (output / "runs/r/report.html").read_text()


@pytest.mark.parametrize("writes", range(1, 9))
def test_an_erasure_that_was_interrupted_is_finished_by_the_next(copied, monkeypatch, writes):
    from pipeline.tables import erase as module

    output, victim = copied
    subject = module.Subject(uris=(victim["source_uri"],))
    left = iter(range(writes))

    def or_die(change: Callable) -> Callable:
        def changing(self: Store, *args: object) -> object:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return change(self, *args)

        return changing

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        for name in ("write", "replace"):
            patch.setattr(Store, name, or_die(getattr(Store, name)))
        module.erase(Store(str(output)), subject, dry_run=False)
    module.erase(Store(str(output)), subject, dry_run=False)
    check_erased(output, victim["source_uri"])
    assert module.erase(Store(str(output)), subject, dry_run=False) == []


def test_an_erasure_finds_a_run_whose_state_was_removed(copied):
    from pipeline.tables.erase import Subject, erase

    output, victim = copied
    subprocess.run(["rm", "-r", str(output / "_state")], check=True)
    assert erase(Store(str(output)), Subject(image_ids=(victim["image_id"],)), dry_run=False)
    check_erased(output, victim["source_uri"])


def test_an_erasure_does_not_vouch_for_a_table_that_somebody_changed(copied):
    from pipeline.tables.erase import Subject, erase

    output, victim = copied
    (path,) = output.glob("ledger/*/*.parquet")
    pq.write_table(pq.read_table(path, partitioning=None).slice(1), path)
    with pytest.raises(RunError, match=r"ledger/.* is not what the record of run 'r' says"):
        erase(Store(str(output)), Subject(uris=(victim["source_uri"],)), dry_run=False)


def test_nothing_is_erased_while_an_unfinished_run_lists_the_object(tmp_path):
    unfinished = Run(tmp_path / "out")
    commit.freeze(unfinished.store, "r", {"shards": []})
    Ledger(unfinished.store, "r", "2026-01-01", list(unfinished.manifest.shards))
    output = unfinished.store.uri.removeprefix("file://")
    expect(run("erase", "--output", output, "--uri", "s3://b/7"), 2, "run 'r' lists the object", "--abandon r")
    expect(run("erase", "--output", output), 2, "--image-id or --uri")


def test_a_password_in_an_address_is_refused_and_not_repeated(tmp_path):
    result = refuse("--source", "s3://b/x", "--output", str(tmp_path), "--endpoint-url", "https://u:pw@store.test")
    expect(result, 2, "endpoint url holds a user name or password")
    assert "pw" not in result.stderr.replace("password", "")


POLICY = re.compile(r"```json\n(.*?)```", re.DOTALL)


@pytest.mark.slow
def test_the_source_is_read_only_under_the_policy_of_the_docs(corpus, tmp_path):
    """The worker's policy of docs/custody.md, enforced by a server: it suffices for a scan and for nothing more."""
    page = (Path(__file__).parents[1] / "docs/custody.md").read_text()
    policy = POLICY.search(page)
    assert policy, "docs/custody.md shows no policy"
    command = [sys.executable, "-m", "tests.iam_scan", str(corpus), str(small_plan(tmp_path, QUICK)), policy.group(1)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, cwd=Path(__file__).parents[1]
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "listed": 60,
        "put": "AccessDenied",
        "delete": "AccessDenied",
        "other bucket": "AccessDenied",
    }
