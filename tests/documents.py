"""The documents as programs: their fenced commands, and a folder like a fresh clone to run them in."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from jobs import benchmark, submit
from jobs.cli import parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
JOBS = sorted({path.stem for path in (ROOT / "jobs").glob("[a-z]*.py")} - {"cli"})
CLONED = ("README.md", "Makefile", "pyproject.toml", "requirements.lock", "ray_cluster.yaml", ".gitignore",
          ".rayignore", "docs", "jobs", "models", "pipeline")  # fmt: skip
CRON = re.compile(r"^(?:\S+\s+){5}(?=\S)")
CALL = re.compile(r"(?:\S*python -m )jobs\.(\w+)")
OPERATORS = set("|&;<>()")


@dataclass(frozen=True)
class Fence:
    page: str
    line: int
    language: str
    """The first word behind the three ticks; "" where there is none."""
    kind: str
    text: str


@dataclass(frozen=True)
class Command:
    page: str
    line: int
    text: str
    """Continued lines joined, comments left out."""
    code: int
    """What it is to end with: a comment ``# ends with 3`` says so."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fences(page: Path) -> Iterator[Fence]:
    text = page.read_text()
    for found in re.finditer(r"^```([^\n`]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        language, _, kind = found[1].partition(" ")
        yield Fence(name_of(page), text[: found.start()].count("\n") + 2, language, kind, found[2])


def commands(fence: Fence) -> Iterator[Command]:
    """What a shell, or cron, would be given."""
    joined = re.sub(r"\\\n\s*", lambda cut: "\0" * cut[0].count("\n"), fence.text)
    line = fence.line
    for text in joined.split("\n"):
        words, _, comment = text.replace("\0", "").partition(" # ")
        words = "" if words.lstrip().startswith("#") else words.strip()
        if fence.language == "cron":
            words = CRON.sub("", words).replace("\\%", "%") if CRON.match(words) else ""
        if words:
            code = re.match(r"\s*ends with (\d)", comment)
            yield Command(fence.page, line, words, int(code[1]) if code else 0)
        line += 1 + text.count("\0")


def spans(page: Path) -> Iterator[str]:
    """Code in the prose: between single ticks, over line ends."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for found in re.finditer(r"(?<!`)`([^`]+)`(?!`)", prose):
        yield " ".join(found[1].split())


def calls(text: str) -> Iterator[tuple[str, list[str]]]:
    """The jobs that a command line calls, each with its arguments."""
    lexer = shlex.shlex(re.sub(r"\$\([^)]*\)", "NAME", text), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    words = list(lexer)
    for place, word in enumerate(words):
        if word == "-m" and place + 1 < len(words) and words[place + 1].startswith("jobs."):
            arguments = words[place + 2 :]
            end = next((index for index, each in enumerate(arguments) if set(each) <= OPERATORS), len(arguments))
            yield words[place + 1].removeprefix("jobs."), arguments[:end]


def config_type(job: str) -> type:
    module = importlib.import_module(f"jobs.{job}")
    found: type = getattr(module, "JobConfig", None) or typing.get_type_hints(module.run)["config"]
    return found


def flags(job: str, command: str = "") -> set[str]:
    """Every flag of a job, those of one of its commands where it has commands."""

    def of(config: type) -> Iterator[str]:
        hints = typing.get_type_hints(config)
        for entry in fields(config):
            if entry.name == "training":
                yield from of(hints[entry.name])
            flag = "--" + entry.name.replace("_", "-")
            yield from (flag, "--no-" + flag.removeprefix("--"))

    config = benchmark.COMMANDS[command][0] if job == "benchmark" else config_type(job)
    return {*of(config), "--config", "--help"}


def accept(job: str, arguments: list[str]) -> None:
    """Gives a command line to the job's own parser. Raises what that raises."""
    if job == "benchmark":
        parse(f"jobs.benchmark {arguments[0]}", benchmark.COMMANDS[arguments[0]][0], arguments[1:])
    elif job == "submit":
        place = submit.own_flags(arguments)
        parse("jobs.submit", submit.JobConfig, arguments[:place])
        if arguments[place:]:
            submit.build(*arguments[place:])
    else:
        parse(f"jobs.{job}", config_type(job), arguments)


@dataclass(frozen=True)
class Clone:
    """A copy of the project, with the environment that runs the tests, and the address of a store behind ``s3://``."""

    folder: Path
    endpoint: str

    @staticmethod
    def make(folder: Path, endpoint: str) -> Clone:
        for name in CLONED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, folder / name)
        (folder / ".venv").symlink_to(sys.prefix)
        return Clone(folder, endpoint)

    def run(self, text: str, seconds: float = 600) -> subprocess.CompletedProcess[str]:
        """As it stands in the document, but that stores are found at ``endpoint`` and make builds no environment."""
        if "s3://" in text:
            text = CALL.sub(lambda call: f"{call[0]} --endpoint-url {self.endpoint}", text)
        text = re.sub(r"^make ", "make --old-file=.venv/.installed ", text)
        path = f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", text], cwd=self.folder, capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHONPATH": str(self.folder), "PATH": path, "COLUMNS": "160"}, timeout=seconds,
        )  # fmt: skip
