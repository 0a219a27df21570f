"""What the documents tell people to type: every command is run, or checked by whoever would read it, and says why."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli

from pipeline.codes import CODES
from pipeline.errors import ReaderGone, RunError, RunStopped, RunSuspect, Terminated, UsageError
from pipeline.output import commit
from pipeline.output.policy import read_policy
from pipeline.plan import BankSpec, load_plan
from pipeline.reporting.runs import STATES
from pipeline.storage import s3_client
from pipeline.store import Store
from pipeline.tables.sql import open_tables, sql_session
from tests.conftest import QUICK as QUICK_PLAN
from tests.conftest import small_plan, upload
from tests.documents import (
    JOBS,
    PAGES,
    ROOT,
    Clone,
    Command,
    Fence,
    accept,
    calls,
    commands,
    fences,
    flags,
    name_of,
    spans,
)
from tests.outputs import judged, scan_by_hand, write_night

ALL = {name_of(page): list(fences(page)) for page in PAGES}
SHELL = ("sh", "cron")
LANGUAGES = {*SHELL, "text", "json", "python", "sql", "yaml"}

QUICK = (
    "README.md",
    "docs/scan.md",
    "docs/plan.md",
    "docs/custody.md",
    "docs/runbook.md",
    "docs/deploy/observe.md",
    "docs/tables.md",
    "docs/review.md",
)
"""Pages that are run from top to bottom, in this order, beside one store: each finds what those before it have left."""
SLOW = ("docs/getting-started.md",)
SLOW_COMMANDS = {"make scan"}
OUTPUT = "s3://my-results/dorfman"

HEAD = "needs a Ray head: tests/test_submit.py submits, follows and stops jobs on one"
CLUSTER = "needs a cluster of machines"
TRAINING = "takes hours of a GPU: docs/getting-started.md runs the same jobs on smaller pictures"
NOT_RUN = {
    "cp docs/deploy/nightly-aws.yaml nightly.yaml": "is done beforehand, for the parsers of what follows",
    "cp docs/deploy/plan.yaml plan.yaml": "is done beforehand, for the parsers of what follows",
    ".venv/bin/python -m jobs.submit --address http://localhost:8265 scan --config nightly.yaml --run-id 2026-11-24":
        HEAD,
    "cd /srv/dorfman && RAY_AUTH_MODE=token .venv/bin/python -m jobs.submit --address http://head:8265 scan "
    "--config nightly.yaml --run-id $(date -u +%F) >> nightly.log": HEAD,
    "cd /srv/dorfman && .venv/bin/python -m jobs.status --output s3://my-results/dorfman --prometheus "
    "> /var/lib/node_exporter/dorfman.prom.new && mv /var/lib/node_exporter/dorfman.prom.new "
    "/var/lib/node_exporter/dorfman.prom": "writes outside of any sandbox: the runbook's line for metrics is run",
    "ray get-auth-token --generate": "would write into the home of whoever runs the tests",
    "chmod 600 ~/.ray/auth_token": "would change the home of whoever runs the tests",
    "export RAY_AUTH_MODE=token": "sets a variable and nothing else: tests/test_submit.py has heads with tokens",
    "docker build --file docs/deploy/Dockerfile --tag dorfman:0.1.0 .": "needs docker: tests/test_deploy.py reads it",
    "cd docs/deploy": "belongs to the lines for kubectl",
    "kubectl create configmap dorfman-nightly --from-file=nightly.yaml --from-file=plan.yaml": CLUSTER,
    "kubectl create configmap dorfman-rayjob --from-file=rayjob.yaml=kuberay-rayjob.yaml": CLUSTER,
    "kubectl apply -f kuberay-cronjob.yaml": CLUSTER + ": tests/test_deploy.py checks the file",
    "pip install 'dorfman[iceberg]'": "needs a registry",
    ".venv/bin/python -m jobs.benchmark scale --idle --again --plan scale.yaml --keys 10000000 --repeats 1":
        "takes an hour: tests/test_bench_scale.py runs it on fewer keys",
    ".venv/bin/python -m jobs.review --output s3://my-results/dorfman --reviewer ann":
        "serves until somebody ends it: tests/test_review_page.py does what reviewers do",
    ".venv/bin/python -m jobs.calibrate --labels s3://my-labels/labels.parquet --models my-nets/mini.json "
    "my-nets/weapon-group.json my-nets/weapon-single.json my-nets/weapon-single.json@160 --categories weapon "
    "--output scores.parquet": TRAINING,
    ".venv/bin/python -m jobs.plan --scores scores.parquet --prevalence 0.001 --recall 0.95 --confidence 0.95 "
    "--max-fpr 0.005 --output plan.yaml": TRAINING,
    ".venv/bin/python -m jobs.scan --source s3://my-bucket/uploads/ --output s3://my-results/dorfman --plan plan.yaml":
        TRAINING,
    ".venv/bin/python -m jobs.train --name weapon-single --labels s3://my-labels/pictures/ --categories weapon "
    "--trunk resnet50 --init torchvision:DEFAULT --input-size 224 --views upright --output my-nets --gpu --bf16":
        TRAINING,
    ".venv/bin/python -m jobs.train --name weapon-group --labels s3://my-labels/pictures/ --categories weapon "
    "--trunk resnet50 --init my-nets/weapon-single.json --input-size 224 --views upright --output my-nets --gpu --bf16 "
    "--merge-points layer1:4 layer2:4 --group-shares 0.2 0.4 0.4 --frozen-statistics --hard-share 0.3": TRAINING,
    ".venv/bin/python -m jobs.quantise --name weapon-int8 --model my-nets/weapon-single.json "
    "--labels s3://my-labels/pictures/ --output my-nets": "wants the net above: tests/test_int8.py runs the job",
}  # fmt: skip
"""Commands that no test runs, and why. Each is still read by its parser, and the files that it names are there."""

RUN_ELSEWHERE = {("docs/tables.md", ""): "tests/test_tables_page.py::test_command_lines_of_the_page_run"}
"""Fences by page and kind that another test runs from the page itself."""


def shell(page: str) -> Iterator[Command]:
    for fence in ALL[page]:
        if fence.language in SHELL and (page, fence.kind) not in RUN_ELSEWHERE:
            yield from commands(fence)


EVERY = [command for page in ALL for command in shell(page)]


def words_of(text: str) -> list[str]:
    return [word.partition("=")[2] or word for word in shlex.split(text)]


def test_every_fence_says_what_it_holds():
    for found in (fence for page in ALL.values() for fence in page):
        # The plan of docs/scale.md is known by its page: test_plans_policies_and_banks_can_be_read loads it.
        assert found.language in LANGUAGES or found.page == "docs/scale.md", f"{found.page}:{found.line}"


def test_every_command_is_run_or_listed_with_a_reason():
    for command in EVERY:
        where = f"{command.page}:{command.line}: {command.text}"
        assert command.page in (*QUICK, *SLOW) or command.text in NOT_RUN, f"{where} is run by no test"
    there = {command.text for command in EVERY}
    assert set(NOT_RUN) <= there and there >= SLOW_COMMANDS, "a listed command is in no document any more"
    for test in RUN_ELSEWHERE.values():
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str, corpus: Path) -> Clone:
    """With the buckets that the pages name: 48 pictures, an empty output, runs that failed in part or are suspect."""
    made = Clone.make(tmp_path_factory.mktemp("clone"), s3_endpoint)
    for name in ("bucket", "reviews"):
        (made.folder / "out" / name).mkdir(parents=True)  # jobs.query wants its folders to be there
    (made.folder / "nightly.yaml").write_bytes((ROOT / "docs/deploy/nightly-aws.yaml").read_bytes())
    client = s3_client(s3_endpoint)
    upload(corpus, s3_endpoint, "my-bucket", 0)
    client.create_bucket(Bucket="my-results")
    pictures = sorted(path for path in corpus.rglob("*.*") if path.suffix != ".parquet")[:48]
    for path, key in zip(pictures, ["a.jpg", *(path.name for path in pictures[1:])], strict=True):
        client.upload_file(str(path), "my-bucket", f"uploads/{key}")
    plan = small_plan(made.folder, QUICK_PLAN)
    by_hand = partial(scan_by_hand, "s3://my-bucket/uploads/", OUTPUT, plan, endpoint_url=s3_endpoint)
    by_hand("2026-11-22", lambda name: "fetch_timeout" if name == pictures[1].name else "cleared")
    record = by_hand("2026-11-25", lambda name: "flagged" if name in ("a.jpg", pictures[2].name) else "cleared")
    odd = [{"gate": "flagged trefoil", "words": "flagged as automobile 4.17 %, 0.5 to 1.2 % were expected"}]
    commit.write_json(Store(OUTPUT, s3_endpoint), commit.record_key("2026-11-25"), record | {"suspect": odd})
    plan.write_bytes((ROOT / "docs/deploy/plan.yaml").read_bytes())
    return made


def write_reviews(clone: Clone) -> None:
    """What people say of the nights' findings and of what was drawn: that the nets were right."""
    store = Store(OUTPUT, clone.endpoint)
    nights = "run_id IN ('2026-11-23', '2026-11-24')"
    with sql_session(open_tables(store)) as session:
        flagged = session.sql(f"SELECT image_id, 'trefoil' AS category, 1 AS label FROM flagged WHERE {nights}")
        drawn = session.sql(f"SELECT image_id, 'trefoil' AS category, 0 AS label FROM audit WHERE {nights}")
        table = pa.concat_tables([flagged.to_arrow_table(), drawn.to_arrow_table()])
    assert 1 in table["label"].to_pylist(), "the first night has flagged nothing"
    pq.write_table(table, clone.folder / "reviews.parquet")


def test_every_job_takes_its_commands(clone: Clone, monkeypatch: pytest.MonkeyPatch):
    """The parsers of the jobs themselves read every line, run or not."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    read = 0
    with chdir(clone.folder):
        for command in EVERY:
            for job, arguments in calls(command.text):
                accept(job, arguments)
                read += 1
    assert read >= 30


def test_files_that_commands_name_are_there(clone: Clone):
    deploy = clone.folder / "docs/deploy"
    for command in EVERY:
        for word in words_of(command.text):
            if re.match(r"(docs|pipeline|tests)/\S+\.\w+$", word):
                assert (clone.folder / word).exists(), f"{command.page}:{command.line}: {word}"
        if command.text.startswith("kubectl"):
            named = {word for word in words_of(command.text) if word.endswith(".yaml")} - {"nightly.yaml"}
            named = {name.rpartition("=")[2] for name in named}
            assert named and all((deploy / name).exists() for name in named), command.text


def test_other_programs_know_what_they_are_asked():
    make = (ROOT / "Makefile").read_text()
    extras = (ROOT / "pyproject.toml").read_text()
    asked = 0
    for page in PAGES:
        for text in [*(command.text for command in shell(name_of(page))), *spans(page)]:
            if target := re.match(r"make ([a-z-]+)", text):
                assert re.search(rf"^{target[1]}:", make, re.MULTILINE), text
            if ray := re.match(r"ray ((?:job )?[a-z-]+)", text):
                group = ray_cli
                for word in ray[1].split():
                    group = group.commands[word]
                known = {name for entry in group.params for name in (*entry.opts, *entry.secondary_opts)}
                # What comes behind `--` is the job's.
                assert set(re.findall(r"(?<!\S)--[a-z-]+", text.split(" -- ")[0])) <= known, text
            for name in re.findall(r"dorfman\[(\w+)\]", text):
                assert f"\n{name} = [" in extras, text
            asked += bool(target or ray)
    assert asked > 10


def test_jobs_and_flags_that_the_prose_names_are_there():
    named = 0
    for page in PAGES:
        for text in spans(page):
            for job, command, rest in re.findall(r"\bjobs\.([a-z]+)\b(?!\.py)(?: ([a-z]+))?([^|]*)", text):
                assert job in JOBS, f"{name_of(page)}: {text}"
                inner = command if job == "submit" and command in JOBS else job
                known = flags(job, command if job == "benchmark" and command else "scan") | flags(inner, "scan")
                assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)) <= known, f"{name_of(page)}: {text}"
                named += 1
    assert named > 60


def run_page(page: str, clone: Clone, left_out: set[str]) -> int:
    """How many commands of the page were run."""
    done = 0
    for command in shell(page):
        if command.text in NOT_RUN or command.text in left_out:
            continue
        result = clone.run(command.text)
        where = f"{command.page}:{command.line}: {command.text}"
        assert result.returncode == command.code, f"{where}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
        assert "Traceback" not in result.stdout + result.stderr, where
        done += 1
    return done


@pytest.mark.timeout(1800)
def test_commands_of_the_pages_run_from_top_to_bottom(clone: Clone, monkeypatch: pytest.MonkeyPatch):
    warehouse = clone.folder / "warehouse"
    for name, value in {
        "TYPE": "sql",
        "URI": f"sqlite:///{clone.folder}/catalog.db",
        "WAREHOUSE": f"file://{warehouse}",
    }.items():
        monkeypatch.setenv(f"PYICEBERG_CATALOG__GLUE__{name}", value)
    # The demo that README's first query asks is a slow command: what it leaves is an output like any other.
    write_night(
        Store(str(clone.folder / "out")), "demo", 0, [judged("a", "flagged", "trefoil"), judged("b", "cleared")]
    )
    for page in QUICK:
        if page == "docs/plan.md":
            write_reviews(clone)
        assert run_page(page, clone, SLOW_COMMANDS) == sum(
            command.text not in NOT_RUN and command.text not in SLOW_COMMANDS for command in shell(page)
        )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_of_the_readme_runs(tmp_path: Path, s3_endpoint: str):
    fresh = Clone.make(tmp_path, s3_endpoint)
    result = fresh.run("make scan", seconds=1800)
    assert result.returncode == 0, result.stderr
    for words in ("complete", "8,000", "of 120", "false-positive rate"):
        assert words in result.stdout, result.stdout
    query = next(command for command in shell("README.md") if "flagged_latest" in command.text)
    assert fresh.run(query.text).stdout.count("s3://dorfman-demo/pictures/") == 5


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("page", SLOW)
def test_a_walk_with_training_runs(page: str, tmp_path: Path, s3_endpoint: str):
    fresh = Clone.make(tmp_path, s3_endpoint)
    assert run_page(page, fresh, set()) >= 10


def kinds(language: str, kind: str) -> list[Fence]:
    return [fence for page in ALL.values() for fence in page if (fence.language, fence.kind) == (language, kind)]


def test_plans_policies_and_banks_can_be_read(tmp_path: Path):
    plans = kinds("yaml", "plan") + [fence for fence in ALL["docs/scale.md"] if fence.language in ("", "yaml")]
    for number, fence in enumerate(plans):
        path = tmp_path / f"{number}.yaml"
        path.write_text(fence.text)
        assert load_plan(str(path)).stages, f"{fence.page}:{fence.line}"
    for fence in kinds("yaml", "policy"):
        (tmp_path / "policy.yaml").write_text(fence.text)
        categories = tuple(yaml.safe_load(fence.text)["categories"])
        assert read_policy(str(tmp_path / "policy.yaml"), categories, None)["name"]
    for fence in kinds("yaml", "banks"):
        assert [BankSpec(**bank) for bank in yaml.safe_load(fence.text)["banks"]]
    assert kinds("yaml", "policy") and kinds("yaml", "banks") and plans
    assert all(
        fence.kind in ("plan", "policy", "banks", "")
        for page in ALL.values()
        for fence in page
        if fence.language == "yaml"
    )


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{name_of(page)}: {target}"
        if anchor:
            assert anchor in anchors(place), f"{name_of(page)}: {target}"


def test_every_page_is_reached_from_the_index():
    index = (ROOT / "docs/README.md").read_text()
    for page in PAGES:
        if page.is_relative_to(ROOT / "docs") and page.name != "README.md":
            assert f"]({page.relative_to(ROOT / 'docs')})" in index, page.name


RUNBOOK = (ROOT / "docs/runbook.md").read_text()


def section(head: str) -> str:
    found = re.search(rf"^### {re.escape(head)}\n(.+?)(?=^##)", RUNBOOK + "\n## ", re.MULTILINE | re.DOTALL)
    assert found, f"docs/runbook.md has no section {head!r}"
    return found[1]


def test_the_runbook_has_every_exit_code_and_job():
    codes = {0, *(kind.exit_code for kind in (UsageError, RunError, RunSuspect, RunStopped))}
    there = {int(code) for code in re.findall(r"^### Exit code (\d)$", RUNBOOK, re.MULTILINE)}
    assert there == codes
    for code in sorted(codes):
        assert "**Means" in section(f"Exit code {code}") and "**Do" in section(f"Exit code {code}")
    told = {
        job
        for row in re.findall(r"^\| (`.+`) \|", section("Exit code 1"), re.MULTILINE)
        for job in re.findall(r"`(\w+)`", row)
    }
    assert told == set(JOBS)


def test_the_runbook_has_every_state_of_a_run():
    first_look = RUNBOOK.split("## First look\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", first_look, re.MULTILINE) == list(STATES)


def test_the_runbook_has_every_class_that_ends_a_job():
    """A new way to end is a class of its own in pipeline/errors.py."""
    named = set(
        re.findall(
            r"^class (\w+)\(.*\):(?:\n.*?){1,4}?exit_code", (ROOT / "pipeline/errors.py").read_text(), re.MULTILINE
        )
    )
    ended = {"Ended", "Terminated", "ReaderGone"}
    assert named == {"UsageError", "RunError", "RunSuspect", "RunStopped"} | ended
    codes = set(re.findall(r"^\| (1\d\d) \|", RUNBOOK.split("## Exit codes\n")[1].split("\n### ")[0], re.MULTILINE))
    assert codes == {str(kind.exit_code) for kind in (Terminated, ReaderGone)} | {"137"}


def test_the_runbook_has_every_alert():
    rules = yaml.safe_load((ROOT / "docs/deploy/prometheus-rules.yaml").read_text())["groups"]
    alerts = {rule["alert"]: rule["labels"]["severity"] for group in rules for rule in group["rules"]}
    assert set(re.findall(r"^### (Dorfman\w+)$", RUNBOOK, re.MULTILINE)) == set(alerts)
    for name, severity in alerts.items():
        text = section(name)
        assert f"**Means ({severity}):**" in text and "**Do:**" in text, name


def test_the_runbook_has_every_error_code_and_says_whether_it_may_pass():
    part = RUNBOOK.split("## Error codes\n")[1].split("## Situations")[0]
    assert set(re.findall(r"^### (\w+)$", part, re.MULTILINE)) == set(CODES)
    for name, code in CODES.items():
        text = " ".join(section(name).split())
        assert f"Retry: {'yes' if code.may_pass else 'no'}" in text, name
        assert ("Outage." in text) == code.outage, name
        assert "**Do:**" in text, name


def test_tests_and_files_that_pages_name_are_there():
    for page in PAGES:
        for path, name in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", page.read_text()):
            text = (ROOT / path).read_text()
            assert not name or re.search(rf"^def {name}\(", text, re.MULTILINE), f"{name_of(page)}: {path}::{name}"
        for path in re.findall(r"`((?:pipeline|models|jobs|docs)/[\w/]+\.\w+)`", page.read_text()):
            assert (ROOT / path).exists() or "NAME" in path, f"{name_of(page)}: {path}"


def test_pictures_are_what_their_script_draws(tmp_path: Path):
    script = ROOT / "docs/pictures/draw.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    drawn = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name: path.read_text() for path in script.parent.glob("*.svg")} and len(drawn) == 6


OF_OTHERS = {"ExpiredToken", "Missing authentication token", "Invalid authentication token"}
"""What a store and a Ray head say, not we."""


def test_lines_that_the_runbook_quotes_are_said_somewhere():
    sources = "".join(path.read_text() for path in sorted((ROOT / "pipeline").rglob("*.py")))
    said = re.sub(r'"\s*\n\s*f?"', "", sources)
    rows = re.findall(
        r"^\| (`.+?) \|",
        section("Exit code 2") + RUNBOOK.split("## Reasons of a failed scan")[1].split("## Alerts")[0],
        re.MULTILINE,
    )
    quoted = {
        piece.strip(" ;:")
        for row in rows
        for phrase in re.findall(r"`([^`]+)`", row)
        for piece in re.split(r"\.\.\.|420 s|NODE", phrase)
    }
    assert len(quoted) > 25
    for piece in sorted(quoted - OF_OTHERS - {""}):
        assert piece in said, piece
