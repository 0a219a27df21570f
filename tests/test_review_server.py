"""The review page's server as others on the machine and other sites meet it, and the job that starts it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from jobs import review as job
from pipeline.errors import StoreError
from pipeline.review.decisions import read_standing, review_files
from pipeline.review.server import HEADERS, STATIC, ReviewServer
from pipeline.store import Store
from tests.outputs import run_here
from tests.review_pages import desk_of, night, served
from tests.test_jobs import expect

ROOT = Path(__file__).parents[1]


def ask(
    port: int, path: str, token: str | None, body: Any = None, method: str | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """One request, as the page would send it but for what ``headers`` change; an empty one is left out."""
    sent = {"Host": f"127.0.0.1:{port}", "Origin": f"http://127.0.0.1:{port}", "Content-Type": "application/json"}
    if token is not None:
        sent["Authorization"] = f"Bearer {token}"
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method or ("GET" if body is None else "POST"), path, skip_host=True)
    payload = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    for name, value in {**sent, "Content-Length": str(len(payload))}.items():
        if value:
            connection.putheader(name, value)
    connection.endheaders(payload)
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    connection.close()
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return night(tmp_path_factory.mktemp("served"), flagged=6, drawn=4)


@pytest.fixture(scope="module")
def server(store: Store) -> Iterator[ReviewServer]:
    with served(desk_of(store)) as server:
        yield server


API = [("/api/about", None), ("/api/next", {}), ("/api/undo", {"decision_id": "0" * 32}), ("/api/picture/0", None)]


@pytest.mark.parametrize("token", [None, "", "wrong", "é", "the right one, cut", "in the query"])
def test_nothing_is_told_without_the_whole_token(server, token):
    for path, body in API:
        sent = server.token[:-1] if token == "the right one, cut" else token
        query = ""
        if token == "in the query":
            query, sent = f"?token={server.token}", None
        status, _, said = ask(server.port, path + query, sent, body)
        assert (status, b"Open the address" in said) == (401, True), path
    assert ask(server.port, "/api/about", server.token)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "10.0.0.1:{port}"])
def test_a_name_that_was_made_to_point_here_reaches_nothing(server, host):
    for path in (*STATIC, "/api/about"):
        assert ask(server.port, path, server.token, Host=host.format(port=server.port))[0] == 421
    assert ask(server.port, "/", server.token, Host=f"localhost:{server.port}")[0] == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://evil.example:{port}", ""]
)
def test_another_site_cannot_decide_even_with_the_token(server, origin):
    sent = {"Origin": origin.format(port=server.port)}
    assert ask(server.port, "/api/next", server.token, {}, **sent)[0] == 403
    assert ask(server.port, "/api/about", server.token, Sec_Fetch_Site="cross-site")[0] == 403
    assert ask(server.port, "/", None, Sec_Fetch_Site="same-site")[0] == 403


def test_every_answer_carries_the_headers_that_keep_it_harmless(server):
    right = [("/", 200), ("/review.js", 200), ("/review.css", 200), ("/api/about", 200), ("/nothing", 404)]
    for path, status in [*right, ("/../pyproject.toml", 404), ("/review.py", 404)]:
        found, headers, _ = ask(server.port, path, server.token)
        assert found == status, path
        assert {name.lower(): value for name, value in HEADERS.items()}.items() <= headers.items()
        assert headers["server"] == "dorfman" and "set-cookie" not in headers
    for path, token, status in (("/api/about", "", 401), ("/api/decide", server.token, 405)):
        found, headers, _ = ask(server.port, path, token)
        assert (found, headers["content-security-policy"]) == (status, HEADERS["Content-Security-Policy"])
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "data:" not in policy


def test_the_page_is_fixed_files_without_inline_scripts_or_markup_from_text():
    page = (ROOT / "pipeline/review/review.html").read_text()
    assert re.findall(r"<script\b[^>]*>", page) == ['<script src="/review.js" defer>']
    assert not re.search(r"\son\w+=|style=|javascript:", page)
    code = (ROOT / "pipeline/review/review.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|srcdoc", code)


def test_it_listens_on_loopback_alone(server):
    assert server.runner.addresses == [("127.0.0.1", server.port)]
    assert server.address == f"http://127.0.0.1:{server.port}/#{server.token}" and len(server.token) >= 43


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"not JSON", 400),
        (b'{"id": "0"}', 400),
        (b'{"have": ["a", "b", "c", "d", "e"]}', 400),
        (b'{"surprise": 1}', 400),
        (b'{"have": ["' + b"a" * 20_000 + b'"]}', 413),
    ],
)
def test_what_the_page_would_not_send_is_refused(server, body, status):
    path = "/api/decide" if b"id" in body else "/api/next"
    assert ask(server.port, path, server.token, body)[0] == status
    assert ask(server.port, path, server.token, body, Content_Type="text/plain")[0] == 415


def test_a_store_that_is_down_is_said_and_nothing_is_lost(tmp_path, monkeypatch):
    store = night(tmp_path, flagged=2, drawn=0)
    with served(desk_of(store)) as server:
        (item,) = json.loads(ask(server.port, "/api/next", server.token, {})[2])["items"]
        assert ask(server.port, f"/api/picture/{item['id']}", server.token)[1]["content-type"] == "image/jpeg"
        sent = {"id": item["id"], "decision_id": uuid4().hex, "answer": "not violating", "revealed": True}
        with monkeypatch.context() as patch:
            patch.setattr(Store, "create", lambda *_: (_ for _ in ()).throw(StoreError("the bucket is not there")))
            status, _, said = ask(server.port, "/api/decide", server.token, sent)
        assert (status, json.loads(said)["error"]) == (503, "the bucket is not there") and not review_files(store)
        for _ in range(2):
            assert ask(server.port, "/api/decide", server.token, sent)[0] == 200
        assert len(review_files(store)) == 1
        status, _, said = ask(server.port, "/api/decide", server.token, sent | {"decision_id": uuid4().hex})
        assert (status, json.loads(said)["gone"]) == (409, True)


# The job


@contextmanager
def running(output: Path, *options: str) -> Iterator[tuple[subprocess.Popen, int, str, list[str]]]:
    """``jobs.review`` as a process, with its port, its token and what it printed before the address."""
    command = [sys.executable, "-m", "jobs.review", "--output", str(output), "--reviewer", "ann", *options]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = []
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/#(\S+)", said[-1] if said else "")):
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            said.append(line.strip())
        yield process, int(found[1]), found[2], said
    finally:
        process.kill()
        process.communicate()


def decide_next(port: int, token: str, answer: str) -> None:
    (item,) = json.loads(ask(port, "/api/next", token, {})[2])["items"]
    assert ask(port, f"/api/picture/{item['id']}", token)[0] == 200
    categories = ["gore"] if answer == "violating" else []
    sent = {"id": item["id"], "decision_id": uuid4().hex, "answer": answer, "categories": categories, "revealed": True}
    assert ask(port, "/api/decide", token, sent)[0] == 200


def test_what_was_answered_survives_a_kill_and_the_next_session_goes_on(tmp_path):
    store = night(tmp_path, flagged=4, drawn=2)
    with running(tmp_path / "out") as (process, port, token, said):
        assert said[0] == "mon: 6 images to review, 0 decided"
        decide_next(port, token, "violating")
        decide_next(port, token, "not violating")
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert sorted(read_standing(store).labels.values()) == [0, 1]
    with running(tmp_path / "out") as (process, port, token, said):
        assert said[0] == "mon: 6 images to review, 2 decided"
        # What the killed session had ahead is lent to it for minutes; the others are there.
        assert len(json.loads(ask(port, "/api/next", token, {"wanted": 4})[2])["items"]) >= 1
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (0, "") and "0 decisions of ann are in file://" in out
    assert not [key for key in store.sizes("reviews/_leases") if b"until" not in store.read(key)]
    with running(tmp_path / "out", "--kind", "second") as (*_, said):
        left_out = "2 that ann decided in another kind of review, 4 that no first review has judged"
        assert said[0] == f"mon: 0 images to review, 0 decided; left out: {left_out}"


def test_who_runs_the_job_reads_that_pictures_cannot_be_fetched(tmp_path):
    night(tmp_path, flagged=2, drawn=0)
    for picture in (tmp_path / "source").iterdir():
        # A link to itself cannot be read, whoever asks.
        picture.unlink()
        picture.symlink_to(picture.name)
    with running(tmp_path / "out") as (process, port, token, _):
        items = json.loads(ask(port, "/api/next", token, {"wanted": 2})[2])["items"]
        problems = [json.loads(ask(port, f"/api/picture/{item['id']}", token)[2]) for item in items]
        assert [(problem["may_pass"], problem["lost"]) for problem in problems] == [(True, False)] * 2
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (0, "")
        assert out.count("fetch_failed: pictures cannot be fetched, ") == out.count("pictures cannot be fetched") == 1


def test_wrong_usage_is_one_line(tmp_path, server, store):
    output = str(tmp_path / "out")
    Store(output).write("runs/begun/status.json", b"{}")
    expect(run_here(job, "--output", output, "--reviewer", "ann"), 2, "there is no complete run in")
    here = ("--output", store.name, "--reviewer")
    for options, words in (
        ((*here, "\n"), "1 to 64 printable characters"),
        ((*here, "ann", "--run-id", "tue"), "there is no complete run 'tue'"),
        ((*here, "ann", "--run-id", "mon", "mon"), "give each run once"),
        ((*here, "ann", "--kind", "appeal"), "was left unsure: name the images that somebody appealed about with"),
        ((*here, "ann", "--appeals", "x"), "the kind is first: give --kind appeal"),
        ((*here, "ann", "--kind", "appeal", "--appeals", str(tmp_path / "none")), "no such file"),
        ((*here, "ann", "--port", "99999"), "between 0 and 65535"),
        ((*here, "ann", "--port", str(server.port)), f"port {server.port}: "),
    ):
        expect(run_here(job, *options), 2, words)


def test_it_starts_without_torch_and_ray():
    code = "import sys, jobs.review; sys.exit(', '.join({'torch', 'ray', 'scipy'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
