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


class Ended(KeyboardInterrupt):
    """Somebody outside ended the job, as with Ctrl-C. The code is a shell's: 128 and the number of the signal."""

    exit_code: ClassVar[int]


class Terminated(Ended):
    """By SIGTERM, as schedulers do."""

    exit_code: ClassVar[int] = 143


class ReaderGone(Ended):
    """Whoever read standard output has left, as ``head`` does, and needs to be told nothing."""

    exit_code: ClassVar[int] = 141


class StoreError(OSError):
    """A store did not do what it was asked, in spite of patience. The message is one line without credentials."""
