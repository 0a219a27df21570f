"""From bytes to pixels, in a child process that can be killed.

An image file is written by whoever can upload: a decoder that hangs, eats all memory or crashes must
cost one error row and nothing else.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import get_args

import numpy as np

import pipeline.decode_child
from pipeline.bank import Banks
from pipeline.decode_child import READY
from pipeline.picture import ErrorCode
from pipeline.plan import Preparation
from pipeline.window import Image, Window, Work

START_SECONDS = 60
RECYCLED_AFTER = 2000
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

    ``banks``: hash matches that decide before any net does.
    """

    def __init__(self, operator: str, side: int, limits: Preparation, banks: Banks | None = None) -> None:
        self.operator = operator
        self.side = side
        self.limits = limits
        self.banks = banks
        self.hashes: dict[int, tuple[str, int]] = {}
        self.child: _Child | None = None
        self.timeouts, self.hung = 0, 0.0

    def __call__(self, windows: list[Window]) -> list[Window]:
        self.timeouts, self.hung = 0, 0.0
        for window in windows:
            began = time.perf_counter()
            undecided = window.undecided
            self.hashes = {}
            decoded = [self._decode(window.images[position]) for position in undecided]
            kept = [pixels for pixels in decoded if pixels is not None]
            window.pixels = np.stack(kept) if kept else None
            window.work.append(
                Work(
                    operator=self.operator,
                    images_in=len(undecided),
                    images_out=len(kept),
                    seconds=time.perf_counter() - began,
                )
            )
            if self.banks:
                self.banks.match(window, self.hashes)
        return windows

    def start(self) -> None:
        """Has the child ready before the first file, so that its start is on no batch's account. Raises EOFError."""
        self._fresh_enough().wait_until_ready()

    def _decode(self, image: Image) -> np.ndarray | None:
        """Pixels (side, side, 3), or None when the image has become an error."""
        assert image.payload is not None
        if self.hung >= HANGING_SECONDS:
            image.fail("decode_timeout", f"not tried: other files have hung for {self.hung:.0f} s")
            return None
        began = time.monotonic()
        try:
            answer, pixels = self._ask(image.payload)
        except TimeoutError:
            image.fail("decode_timeout", f"not decoded within {self._deadline():g} s")
            self.timeouts += 1
            self.hung += time.monotonic() - began
            return None
        except _Crash as crash:
            image.fail("decode_crash", str(crash))
            return None
        if pixels is None:
            code, detail = answer
            image.fail(code, detail)
            return None
        image.format, image.width, image.height, pdq, quality = answer
        if pdq:
            self.hashes[id(image)] = (pdq, quality)
        return pixels

    def _ask(self, payload: bytes) -> tuple[list, np.ndarray | None]:
        """A child's answer. One that dies may have been killed by somebody else: the file is tried once more."""
        last = ""
        for _ in range(CRASHES):
            child = self._fresh_enough()
            try:
                return child.decode(payload, self._deadline())
            except TimeoutError:
                self._drop_child()
                raise
            except (EOFError, OSError, ValueError, RecursionError):
                last = self._drop_child()
        raise _Crash(f"{CRASHES} decoders died on it, the last with {last}")

    def _fresh_enough(self) -> _Child:
        if self.child is not None and self.child.files >= RECYCLED_AFTER:
            self._drop_child()
        if self.child is None:
            self.child = _Child(self.side, self.limits, hashed=self.banks is not None)
        return self.child

    def _deadline(self) -> float:
        """Seconds for the next picture. Windows full of files that hang must not look like a stalled run."""
        seconds = self.limits.decode_seconds
        return seconds if self.timeouts < PATIENCE else min(seconds, 1.0)

    def _drop_child(self) -> str:
        """The child's exit status and last word."""
        assert self.child is not None
        last = self.child.kill()
        self.child = None
        return last

    def __del__(self) -> None:
        if self.child is not None:
            self.child.kill()


class _Crash(Exception):
    """The file kills its decoder."""


class _Child:
    def __init__(self, side: int, limits: Preparation, *, hashed: bool) -> None:
        self.side, self.limits, self.hashed = side, limits, hashed
        ours, theirs = socket.socketpair()
        size = side * side * 3
        with tempfile.TemporaryFile() as shared, theirs:
            os.ftruncate(shared.fileno(), size)
            self.pixels = mmap.mmap(shared.fileno(), size)
            memory = int(limits.decode_gigabytes * 1e9)
            arguments = [theirs.fileno(), shared.fileno(), size, memory, os.getpid()]
            root = str(Path(pipeline.decode_child.__file__).parents[1])
            self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed when the child is killed
            # A script with few imports, not multiprocessing's spawn: that would import Ray's worker again.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.decode_child", *map(str, arguments)],
                pass_fds=(theirs.fileno(), shared.fileno()),
                stdin=subprocess.DEVNULL,
                stderr=self.stderr,
                env=os.environ
                | {
                    "OPENBLAS_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
                },
            )
        # poll() waits for the first byte of an answer, these for the rest of it and for a child that does not read.
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", START_SECONDS, 0))
        self.connection = Connection(ours.detach())
        self.ready = False
        self.files = 0

    def decode(self, payload: bytes, seconds: float) -> tuple[list, np.ndarray | None]:
        """The child's answer, and the pixels when there are some.

        Raises TimeoutError when it takes too long, EOFError or OSError when it has died, ValueError
        when its answer is none.
        """
        self.wait_until_ready()
        self.files += 1
        request = [self.side, self.limits.max_megapixels * 1_000_000, self.limits.max_frames, self.hashed]
        self.connection.send_bytes(json.dumps(request).encode())
        self.connection.send_bytes(payload)
        if not self.connection.poll(seconds):
            raise TimeoutError
        answer = json.loads(self.connection.recv_bytes(MAX_ANSWER_BYTES))
        if not isinstance(answer, list) or tuple(map(type, answer)) not in (PICTURE, (str, str)):
            raise ValueError(f"the decoder answered {str(answer)[:100]!r}")
        if len(answer) == 2 and answer[0] not in get_args(ErrorCode):
            raise ValueError(f"the decoder answered with the unknown code {answer[0][:100]!r}")
        if len(answer) > 2 and not all(0 < side < MAX_SIDE for side in answer[1:3]):
            raise ValueError(f"the decoder answered with a picture of {answer[1:3]}")
        if len(answer) > 2 and not (HASH.fullmatch(answer[3]) and 0 <= answer[4] <= 100):
            raise ValueError(f"the decoder answered with the hash {answer[3][:100]!r} of quality {answer[4]}")
        if len(answer) == 2:
            return answer, None
        return answer, np.frombuffer(self.pixels, np.uint8).reshape(self.side, self.side, 3).copy()

    def wait_until_ready(self) -> None:
        """The interpreter's start is on no file's account. Raises EOFError."""
        if self.ready:
            return
        if not self.connection.poll(START_SECONDS) or self.connection.recv_bytes(MAX_ANSWER_BYTES) != READY:
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
