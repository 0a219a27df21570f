"""The ways a job ends other than well, and their exit codes."""

from typing import ClassVar


class UsageError(ValueError):
    """Wrong usage, configuration or input, found before the run began."""

    exit_code: ClassVar[int] = 2


class RunError(RuntimeError):
    """The run began and could not be completed."""

    exit_code: ClassVar[int] = 1


class RunSuspect(Exception):
    """The run is complete, and unlike the runs before it: somebody should look."""

    exit_code: ClassVar[int] = 3


class RunStopped(Exception):
    """The run stopped where its user had asked it to, and can go on."""

    exit_code: ClassVar[int] = 4


class StoreError(OSError):
    """A store did not do what it was asked, in spite of patience. The message is one line without credentials."""
