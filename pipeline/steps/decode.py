"""From bytes to pixels, in a child process that can be killed.

An image file is written by whoever can upload: a decoder that hangs, eats all memory or crashes must
cost one error row and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, get_args

import numpy as np

import pipeline.steps.decode_child
from pipeline.plan import Preparation
from pipeline.steps.bank import Banks
from pipeline.steps.decode_child import AHEAD, READY, REQUEST, Arena
from pipeline.steps.picture import ErrorCode
from pipeline.window import Image, Window, Work

START_SECONDS = 60
# Of a child. glibc would give a picture's memory back to the system after each, and have it cleared for the next.
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}
RECYCLED_AFTER = 10_000
"""Files that one child decodes before a fresh one takes its place: a leak in a library stays small."""
CRASHES = 2
"""Children that must die on a file before the file is to blame."""
PATIENCE = 4
"""Files of one call that may use up their whole deadline; after them the others get a second each."""
HANGING_SECONDS = 240.0
"""What files that hang may cost one call in all; those after them are not even tried. A stalled run ends at 420."""
MAX_ANSWER_BYTES = 65_536
MAX_SIDE = 2**31
PICTURE = (str, int, int, str, int)
HASH = re.compile(r"([0-9a-f]{64})?")


class Decoder:
    """``windows -> windows``: pixels at one size for every undecided image that has a payload.

    A few files are with the child at a time, so that it never waits for the next one. ``banks``: hash matches that
    decide before any net does. ``as_shown``: images get the width and height of the upright picture.
    """

    def __init__(
        self, operator: str, side: int, limits: Preparation, banks: Banks | None = None, *, as_shown: bool = False
    ) -> None:
        self.operator = operator
        self.side = side
        self.limits = limits
        self.banks = banks
        self.as_shown = as_shown
        self.child: _Child | None = None
        self.timeouts, self.hung = 0, 0.0

    def __call__(self, windows: list[Window]) -> list[Window]:
        self.timeouts, self.hung = 0, 0.0
        for window in windows:
            began = time.perf_counter()
            images = [window.images[position] for position in window.undecided]
            with _patient_thread():
                window.pixels, hashes = self._decode(images)
            window.work.append(
                Work(
                    operator=self.operator,
                    images_in=len(images),
                    images_out=0 if window.pixels is None else len(window.pixels),
                    seconds=time.perf_counter() - began,
                )
            )
            if self.banks:
                self.banks.match(window, hashes)
        return windows

    def start(self) -> None:
        """Has the child ready before the first file, so that its start is on no batch's account. Raises EOFError."""
        self._fresh_child().wait_until_ready()

    def _decode(self, images: list[Image]) -> tuple[np.ndarray | None, dict[int, tuple[str, int]]]:
        """Pixels (images without an error, side, side, 3), None when there are none; PDQ hashes by id of the image.

        Images that cannot be decoded get their error.
        """
        pixels_NSS3 = np.empty((len(images), self.side, self.side, 3), np.uint8)
        rows = 0
        hashes: dict[int, tuple[str, int]] = {}
        waiting, flying = deque(images), deque[Image]()
        deaths: Counter[int] = Counter()
        while waiting or flying:
            if self.hung >= HANGING_SECONDS:
                for image in (*flying, *waiting):
                    image.fail("decode_timeout", f"not tried: other files have hung for {self.hung:.0f} s")
                self._drop_child()
                break
            began = time.monotonic()
            try:
                self._send(waiting, flying)
                assert self.child is not None
                answer, pixels = self.child.receive(self._deadline())
            except TimeoutError:
                image = flying.popleft()
                image.fail("decode_timeout", f"not decoded within {self._deadline():g} s")
                self.timeouts += 1
                self.hung += time.monotonic() - began
                self._drop_child()
            except (EOFError, OSError, ValueError, RecursionError):
                # A child that dies may have been killed by somebody else: the file is tried once more.
                last = self._drop_child()
                image = flying[0]
                deaths[id(image)] += 1
                if deaths[id(image)] == CRASHES:
                    flying.popleft()
                    image.fail("decode_crash", f"{CRASHES} decoders died on it, the last with {last}")
            else:
                image = flying.popleft()
                if pixels is None:
                    image.fail(*answer)
                    continue
                image.format, image.width, image.height, pdq, quality = answer
                pixels_NSS3[rows] = pixels
                rows += 1
                if pdq:
                    hashes[id(image)] = (pdq, quality)
                continue
            # What else the child had been given goes to the next one, in its order.
            waiting.extendleft(reversed(flying))
            flying.clear()
        return pixels_NSS3[:rows] if rows else None, hashes

    def _send(self, waiting: deque[Image], flying: deque[Image]) -> None:
        """Gives a child as many files as it takes ahead. Raises OSError or EOFError when it has died."""
        if self.child is not None and self.child.files >= RECYCLED_AFTER and not flying:
            self._drop_child()
        child = self._fresh_child()
        while waiting and len(flying) < AHEAD and (child.files < RECYCLED_AFTER or not flying):
            image = waiting.popleft()
            flying.append(image)
            assert image.payload is not None
            child.send(image.payload)

    def _fresh_child(self) -> _Child:
        if self.child is None:
            self.child = _Child(self.side, self.limits, hashed=self.banks is not None, as_shown=self.as_shown)
        return self.child

    def _deadline(self) -> float:
        """Seconds for the next picture. Windows full of files that hang must not look like a stalled run."""
        seconds = self.limits.decode_seconds
        return seconds if self.timeouts < PATIENCE else min(seconds, 1.0)

    def _drop_child(self) -> str:
        """The child's exit status and last word."""
        if self.child is None:
            return ""
        last = self.child.kill()
        self.child = None
        return last

    def __del__(self) -> None:
        self._drop_child()


class _Child:
    """A decoder process. Files and pixels pass through shared memory, requests and answers through a socket."""

    def __init__(self, side: int, limits: Preparation, *, hashed: bool, as_shown: bool) -> None:
        ours, theirs = socket.socketpair()
        capacity = limits.max_megabytes * 1_000_000
        with _shared_memory() as shared, theirs:
            arguments = {
                "connection": theirs.fileno(),
                "shared": shared.fileno(),
                "side": side,
                "capacity": capacity,
                "memory": int(limits.decode_gigabytes * 1e9),
                "parent": os.getpid(),
                "max_pixels": limits.max_megapixels * 1_000_000,
                "max_frames": limits.max_frames,
                "hashed": hashed,
                "as_shown": as_shown,
            }
            self.arena = Arena(shared.fileno(), side, capacity)
            root = str(Path(pipeline.steps.decode_child.__file__).parents[2])
            self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed when the child is killed
            # A script with few imports, not multiprocessing's spawn: that would import Ray's worker again.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.steps.decode_child", json.dumps(arguments)],
                pass_fds=(theirs.fileno(), shared.fileno()),
                stdin=subprocess.DEVNULL,
                stderr=self.stderr,
                env=os.environ
                | ENVIRONMENT
                | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
            )
        # A poll waits for the first byte of an answer, these for the rest of it and for a child that does not read.
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", START_SECONDS, 0))
        self.connection = Connection(ours.detach())
        # Made once: the connection's own poll makes a selector for each answer.
        self.answers_come = select.poll()
        self.answers_come.register(self.connection, select.POLLIN)
        self.ready = False
        self.files = self.answers = 0

    def send(self, payload: bytes) -> None:
        """Gives the child a file more, at most AHEAD before their answers. Raises OSError or EOFError: it has died."""
        self.wait_until_ready()
        slot = self.files % AHEAD
        self.files += 1
        self.arena.put(slot, payload)
        self.connection.send_bytes(REQUEST.pack(slot, len(payload)))

    def receive(self, seconds: float) -> tuple[list, np.ndarray | None]:
        """The answer to the oldest file without one, and its pixels when there are some: valid until the next ``send``.

        Raises TimeoutError when it takes too long, EOFError or OSError when the child has died, ValueError
        when its answer is none.
        """
        if not self.answers_come.poll(seconds * 1000):
            raise TimeoutError
        answer = json.loads(self.connection.recv_bytes(MAX_ANSWER_BYTES))
        slot = self.answers % AHEAD
        self.answers += 1
        if not isinstance(answer, list) or tuple(map(type, answer)) not in (PICTURE, (str, str)):
            raise ValueError(f"the decoder answered {str(answer)[:100]!r}")
        if len(answer) == 2 and answer[0] not in get_args(ErrorCode):
            raise ValueError(f"the decoder answered with the unknown code {answer[0][:100]!r}")
        if len(answer) > 2 and not all(0 < side < MAX_SIDE for side in answer[1:3]):
            raise ValueError(f"the decoder answered with a picture of {answer[1:3]}")
        if len(answer) > 2 and not (HASH.fullmatch(answer[3]) and 0 <= answer[4] <= 100):
            raise ValueError(f"the decoder answered with the hash {answer[3][:100]!r} of quality {answer[4]}")
        return answer, None if len(answer) == 2 else self.arena.pixels[slot]

    def wait_until_ready(self) -> None:
        """The interpreter's start is on no file's account. Raises EOFError."""
        if self.ready:
            return
        if not self.answers_come.poll(START_SECONDS * 1000) or self.connection.recv_bytes(MAX_ANSWER_BYTES) != READY:
            raise EOFError
        self.ready = True

    def kill(self) -> str:
        """Its exit status and the last line that it wrote."""
        self.process.kill()
        self.connection.close()
        status = self.process.wait()
        with self.stderr:
            self.stderr.seek(max(0, self.stderr.tell() - MAX_ANSWER_BYTES))
            lines = self.stderr.read().decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"status {status}: {said[:200]}" if said else f"status {status}"


@contextmanager
def _patient_thread() -> Iterator[None]:
    """Has this thread wait for a processor when it could run again, instead of taking the child's at each answer.

    On one core that halves how often the two take turns. Where the system has no such policy, or forbids it, it is as
    it was.
    """
    if not hasattr(os, "SCHED_BATCH") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield  # whoever chose another policy knows why
        return
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _shared_memory() -> IO[bytes]:
    """A file without a name: in memory where the system can (a disk would write back what is only passed on)."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("dorfman-decode"), "w+b")
    return tempfile.TemporaryFile()
