"""The decoder's child process: reads files from a socket, leaves pixels in shared memory.

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
import sys
from multiprocessing.connection import Connection

from pipeline.picture import PictureError, decode_picture

PR_SET_PDEATHSIG = 1
# Libraries complain of every broken file: enough for a last word, too little to fill a disk.
MAX_STDERR_BYTES = 1_000_000
READY = b"ready"


def serve(connection: Connection, pixels: mmap.mmap) -> None:
    """Answers each payload with [format, width, height, hash, quality] or [code, detail] until the parent hangs up.

    Without a hash asked for it is empty. Answers are JSON: the parent must never unpickle what a subverted decoder
    sends. The first is only that it is there.
    """
    connection.send_bytes(READY)
    while True:
        try:
            side, max_pixels, max_frames, hashed = json.loads(connection.recv_bytes())
            payload = connection.recv_bytes()
        except EOFError:
            return
        try:
            picture = decode_picture(payload, side, max_pixels, max_frames, hashed=hashed)
        except PictureError as error:
            connection.send_bytes(json.dumps([error.code, error.detail]).encode())
            continue
        pixels[: side * side * 3] = picture.pixels.tobytes()
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
    connection_fd, pixels_fd, pixels_bytes, memory_bytes, parent = (int(argument) for argument in sys.argv[1:])
    if sys.platform == "linux":
        # Die with the parent, even when it is killed; it may have died before this line.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    pixels = mmap.mmap(pixels_fd, pixels_bytes)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_STDERR_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + memory_bytes,) * 2)
    serve(Connection(connection_fd), pixels)


if __name__ == "__main__":
    main()
