"""The decoder's child process: reads files from shared memory, and leaves their pixels there.

Run as a script by ``decode.py``; it may hang, crash or be killed at any time without harm to anything
but itself. It imports as little as it can, so that a killed child is quickly replaced.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import signal
import struct
import sys
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from pipeline.steps.picture import PictureError, decode_picture

PR_SET_PDEATHSIG = 1
# Libraries complain of every broken file: enough for a last word, too little to fill a disk.
MAX_STDERR_BYTES = 1_000_000
READY = b"ready"
AHEAD = 3
"""Files that are with a child at one time: one at work, one waiting, one arriving."""
REQUEST = struct.Struct("<IQ")
"""A slot, and the bytes of the file in it."""


class Arena:
    """Memory that a decoder and its parent share: by slot a file of at most ``capacity`` bytes, and its pixels.

    ``pixels``: uint8 (AHEAD, side, side, 3). Pages that no file has reached take no memory.
    """

    def __init__(self, descriptor: int, side: int, capacity: int) -> None:
        self.capacity = capacity
        size = AHEAD * (side * side * 3 + capacity)
        if os.fstat(descriptor).st_size < size:
            os.ftruncate(descriptor, size)
        self.memory = mmap.mmap(descriptor, size)
        self.files = AHEAD * side * side * 3
        self.pixels = np.frombuffer(self.memory, np.uint8, self.files).reshape(AHEAD, side, side, 3)

    def put(self, slot: int, payload: bytes) -> None:
        if len(payload) > self.capacity:
            raise AssertionError(f"{len(payload):,} bytes are over max_megabytes; whoever fetches keeps to it")
        start = self.files + slot * self.capacity
        self.memory[start : start + len(payload)] = payload

    def get(self, slot: int, length: int) -> bytes:
        start = self.files + slot * self.capacity
        return self.memory[start : start + length]


def serve(
    connection: Connection, arena: Arena, side: int, max_pixels: int, max_frames: int, *, hashed: bool, as_shown: bool
) -> None:
    """Answers each file with [format, width, height, hash, quality] or [code, detail] until the parent hangs up.

    Without a hash asked for it is empty. Answers are JSON: the parent must never unpickle what a subverted decoder
    sends. The first is only that it is there.
    """
    connection.send_bytes(READY)
    while True:
        try:
            slot, length = REQUEST.unpack(connection.recv_bytes())
        except EOFError:
            return
        try:
            payload = arena.get(slot, length)
            picture = decode_picture(payload, side, max_pixels, max_frames, hashed=hashed, as_shown=as_shown)
        except PictureError as error:
            connection.send_bytes(json.dumps([error.code, error.detail]).encode())
            continue
        arena.pixels[slot] = picture.pixels
        answer = [picture.format, picture.width, picture.height, *(picture.pdq or ("", 0))]
        connection.send_bytes(json.dumps(answer).encode())


def _address_space() -> int:
    """Bytes of address space in use; 0 where the system does not tell (it has no such limit either)."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def main() -> None:
    told: dict[str, Any] = json.loads(sys.argv[1])
    if sys.platform == "linux":
        # Die with the parent, even when it is killed; it may have died before this line.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != told["parent"]:
        return
    arena = Arena(told["shared"], told["side"], told["capacity"])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_STDERR_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + told["memory"],) * 2)
    limits = {name: told[name] for name in ("side", "max_pixels", "max_frames", "hashed", "as_shown")}
    serve(Connection(told["connection"]), arena, **limits)


if __name__ == "__main__":
    main()
