"""A reverse proxy before an S3 server that breaks a share of the requests, in the ways stores and networks do."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import Queue
from typing import Literal
from urllib.parse import unquote

import aiohttp
from aiohttp import web
from yarl import URL

Fault = Literal["503", "500", "403", "404", "reset", "lost", "short", "stall", "flip", "slow", "dribble"]
PASSING: tuple[Fault, ...] = ("503", "500", "reset", "lost", "short", "stall", "flip")
"""Faults after which the same request can succeed. ``lost``: the server did it, and nobody heard."""
STATUS_BODIES = {"503": "SlowDown", "500": "InternalError", "403": "AccessDenied", "404": "NoSuchKey"}


@dataclass
class Faults:
    """Which requests break, and how often they did."""

    share: dict[Fault, float] = field(default_factory=dict)
    """Of the requests that ``matches`` picks, by kind of fault."""
    matches: Callable[[str, str], bool] = lambda method, key: method == "GET"
    """Of (method, key within the bucket)."""
    watches: Callable[[web.Request], object] = lambda request: None
    """Sees every request."""
    stall_seconds: float = 30.0
    slow_seconds: float = 1.0
    """What a slow answer takes to begin, or a dribbling one to end."""
    refusal: str = ""
    """What a 403 says besides its code."""
    seed: int = 0
    forgets_conditions: bool = False
    """Whether a PUT loses its If-None-Match on the way, as in a store that does not know it."""
    refuses_conditions: bool = False
    """Whether a PUT under a condition is answered with 501, as by a store that says that it does not know it."""
    hides_checksums: bool = False
    """Whether answers lose the checksums that the server keeps, as in a store that keeps none."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Raw paths that the server has under another one."""
    hits: Counter[str] = field(default_factory=Counter)
    by_key: dict[str, list[Fault | None]] = field(default_factory=dict)
    """What was drawn for each request of a key."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def draw(self, method: str, key: str) -> Fault | None:
        if not self.matches(method, key):
            return None
        fault = self._draw()
        self.hits[fault or "passed"] += 1
        self.by_key.setdefault(key, []).append(fault)
        return fault

    def _draw(self) -> Fault | None:
        point = self.random.random()
        for fault, share in self.share.items():
            point -= share
            if point < 0:
                return fault
        return None


@contextmanager
def fault_proxy(upstream: str, faults: Faults) -> Iterator[str]:
    """The proxy's endpoint url. Raw path and Host go through as they are, so signatures stay valid."""
    address: Queue[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Queue()

    async def serve() -> None:
        stop = asyncio.Event()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:

            async def handle(request: web.Request) -> web.StreamResponse:
                return await _answer(request, session, upstream, faults)

            app = web.Application(client_max_size=1 << 30)
            app.router.add_route("*", r"/{path:[\s\S]*}", handle)  # "." is any character but a newline
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            address.put((f"http://127.0.0.1:{runner.addresses[0][1]}", asyncio.get_running_loop(), stop))
            await stop.wait()
            await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    url, loop, stop = address.get(timeout=20)
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)


async def _answer(
    request: web.Request, session: aiohttp.ClientSession, upstream: str, faults: Faults
) -> web.StreamResponse:
    body = await request.read()
    key = unquote(request.raw_path.partition("?")[0]).lstrip("/").partition("/")[2]
    faults.watches(request)
    fault = faults.draw(request.method, key)
    if fault in STATUS_BODIES:
        text = f"<Error><Code>{STATUS_BODIES[fault]}</Code><Message>injected</Message>{faults.refusal}</Error>"
        return web.Response(status=int(fault), text=text, content_type="application/xml")
    if faults.refuses_conditions and {"If-Match", "If-None-Match"} & set(request.headers):
        faults.hits["501"] += 1
        text = "<Error><Code>NotImplemented</Code><Message>A header you provided is not implemented</Message></Error>"
        return web.Response(status=501, text=text, content_type="application/xml")
    if fault == "reset":
        return _hang_up(request)
    # What a test finds in the server under another name: moto refuses some legal keys.
    path = faults.renamed.get(request.raw_path.partition("?")[0], request.raw_path)
    url = URL(upstream + path, encoded=True)
    dropped = ["transfer-encoding", *(["if-none-match"] if faults.forgets_conditions else [])]
    headers = {name: value for name, value in request.headers.items() if name.lower() not in dropped}
    async with session.request(request.method, url, headers=headers, data=body or None) as answer:
        payload = await answer.read()
        if fault == "lost":
            return _hang_up(request)
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in ("connection", "date")}
        if faults.hides_checksums:
            kept = {name: value for name, value in kept.items() if not name.lower().startswith("x-amz-checksum")}
        if request.method == "HEAD":
            return web.Response(status=answer.status, headers=kept)
        kept.pop("Transfer-Encoding", None)
        kept["Content-Length"] = str(len(payload))
        if fault == "flip" and payload:
            position = faults.random.randrange(len(payload))
            payload = payload[:position] + bytes([payload[position] ^ 0x40]) + payload[position + 1 :]
        if fault == "slow":
            await asyncio.sleep(faults.slow_seconds)
        response = web.StreamResponse(status=answer.status, headers=kept)
        await response.prepare(request)
        if fault in ("short", "stall") and payload:
            await response.write(payload[: len(payload) // 2])
            if fault == "stall":
                await asyncio.sleep(faults.stall_seconds)
            return _hang_up(request, response)
        with suppress(ConnectionError):
            if fault == "dribble":
                for start in range(0, len(payload), 1 + len(payload) // 100):
                    await response.write(payload[start : start + 1 + len(payload) // 100])
                    await asyncio.sleep(faults.slow_seconds / 100)
            else:
                await response.write(payload)
            await response.write_eof()
        return response


def _hang_up(request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return response or web.Response()
