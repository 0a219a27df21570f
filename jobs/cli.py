"""From a configuration dataclass to a command line, a YAML file and exit codes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, NoReturn

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Yaml
from rich.console import Console

from jobs import end
from pipeline.documents import parse_yaml
from pipeline.errors import RunError, RunStopped, RunSuspect, UsageError
from pipeline.reporting.events import Events, told_as_json
from pipeline.run.endings import ended_by_name

errors = Console(stderr=True, soft_wrap=True, highlight=False)


def run_command(job: str, commands: Mapping[str, tuple[type, Callable[[Any], None]]]) -> NoReturn:
    """``run_job`` with the command that the first argument names."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in commands:
        # A request for help is no error, but the answer is the same.
        code = 0 if name in ("-h", "--help") else 2
        _end(code, f"{job}: give one of {', '.join(commands)} (each has a --help), not {name or 'nothing'!r}")
    run_job(f"{job} {name}", *commands[name])


def run_job(job: str, config_type: type, run: Callable[[Any], None]) -> NoReturn:
    """Parses ``sys.argv`` into ``config_type``, runs the job and exits with the code that ``pipeline.errors`` gives.

    Every field is a flag; ``--config FILE.yaml`` gives values that flags override.
    """
    try:
        with ended_by_name():
            run(parse(job, config_type, sys.argv[1:]))
    except (CycloptsError, UsageError, RunError, RunStopped, RunSuspect) as error:
        _end(getattr(error, "exit_code", UsageError.exit_code), f"{job}: {error}")
    except KeyboardInterrupt as error:
        _end(getattr(error, "exit_code", RunError.exit_code), f"{job}: {error or 'interrupted'}")
    end(0)


def _end(code: int, message: str) -> NoReturn:
    if told_as_json():
        Events().tell("ended", message, level=logging.ERROR, exit_code=code)
    else:
        errors.print(message, style="red", markup=False)
    end(code)


def parse(job: str, config_type: type, arguments: list[str]) -> Any:
    """The configuration. Raises UsageError or CycloptsError; ``--help`` prints and exits 0."""

    def build(config: Any) -> Any:
        return config_type() if config is None else config

    # Without a required field there may be no flag at all, and cyclopts wants a default.
    optional = all(f.default is not MISSING or f.default_factory is not MISSING for f in fields(config_type))
    if optional:
        build.__defaults__ = (None,)
    annotation = config_type | None if optional else config_type
    build.__annotations__ = {"config": Annotated[annotation, Parameter(name="*")]}
    app = App(
        name=f"python -m {job}",
        help=config_type.__doc__,
        help_format="plaintext",
        version_flags=(),
        default_parameter=Parameter(consume_multiple=True, negative_iterable=(), negative_none=()),
        exit_on_error=False,
        result_action="return_value",
        print_error=False,
    )
    app.suppress_keyboard_interrupt = app.meta.suppress_keyboard_interrupt = False  # or it would end with 130
    app.default(build)

    def with_file(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)], config: Path | None = None
    ) -> Any:
        if config is not None:
            app.config = Yaml(_check_yaml(config), must_exist=True, search_parents=False)
        return app(tokens)

    app.meta.default(with_file)
    return app.meta(arguments) or sys.exit(0)  # nothing: --help has been printed


def _check_yaml(path: Path) -> Path:
    try:
        parse_yaml(path.read_text(), f"--config {path}")
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    return path
