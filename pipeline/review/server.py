"""The review page on loopback: static files without data, and an API that wants the session's token.

The token is in the address's fragment, which no browser sends anywhere; the page sends it in a header. So no cookie
exists that another program on 127.0.0.1 would be sent, and no other site can ask anything in the reviewer's name. Names
of hosts are checked, so that a name which is made to point here (DNS rebinding) reaches nothing.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web
from pydantic import Field, ValidationError

from pipeline.documents import Strict
from pipeline.errors import UsageError
from pipeline.review.desk import MOST_AHEAD, Desk
from pipeline.review.rules import Refused
from pipeline.storage import reason

HOST = "127.0.0.1"
REFRESH_SECONDS = 15.0
MAX_BODY = 16_384
STATIC = {
    "/": ("review.html", "text/html"),
    "/review.css": ("review.css", "text/css"),
    "/review.js": ("review.js", "text/javascript"),
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob:; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
T = TypeVar("T", bound=Strict)


class NextRequest(Strict):
    have: list[str] = Field(default=[], max_length=MOST_AHEAD)
    category: str | None = None
    wanted: int = Field(default=1, ge=1, le=MOST_AHEAD)
    again: bool = False


class DecideRequest(Strict):
    id: str
    decision_id: str
    answer: str
    categories: tuple[str, ...] = ()
    revealed: bool


class UndoRequest(Strict):
    decision_id: str


class SkipRequest(Strict):
    id: str


class ReviewServer:
    """``address``: what to open, once it has started. ``port`` 0: any that is free."""

    def __init__(self, desk: Desk, port: int = 0) -> None:
        self.desk = desk
        self.port = port
        self.token = secrets.token_urlsafe(32)
        files = {path: (Path(__file__).with_name(name).read_bytes(), kind) for path, (name, kind) in STATIC.items()}
        self.files = files
        # Requests are few and small; what may be long is the queue, and that never travels.
        self.app = web.Application(middlewares=[self._guard, _errors], client_max_size=MAX_BODY)
        self.app.on_response_prepare.append(_add_headers)
        self.app.add_routes([web.get(path, self._static) for path in files])
        self.app.add_routes(
            [
                web.get("/api/about", self._about),
                web.get("/api/picture/{id}", self._picture),
                web.post("/api/next", self._next),
                web.post("/api/decide", self._decide),
                web.post("/api/undo", self._undo),
                web.post("/api/skip", self._skip),
                web.post("/api/history", self._history),
            ]
        )
        self.runner = web.AppRunner(self.app, access_log=None)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}/#{self.token}"

    async def start(self) -> None:
        """Raises UsageError when the port is taken."""
        await self.runner.setup()
        try:
            site = web.TCPSite(self.runner, HOST, self.port)
            await site.start()
        except OSError as error:
            await self.runner.cleanup()
            raise UsageError(f"port {self.port}: {error.strerror}; give another --port, or none") from error
        self.port = self.runner.addresses[0][1]

    async def stop(self) -> None:
        await self.runner.cleanup()
        await asyncio.to_thread(self.desk.close)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Who asks, through which name, and from where."""
        names = [f"{host}:{self.port}" for host in (HOST, "localhost")]
        if request.headers.get("Host") not in names:
            raise web.HTTPMisdirectedRequest(text="this server answers to the address that jobs.review printed")
        if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            raise web.HTTPForbidden(text="another site asks")
        if not request.path.startswith("/api/"):
            return await handler(request)
        if request.method != "GET" and request.headers.get("Origin") not in [f"http://{name}" for name in names]:
            raise web.HTTPForbidden(text="another site asks")
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, self.token.encode()):
            raise web.HTTPUnauthorized(
                text="Open the address that jobs.review printed, with all of its last part. Nothing was recorded."
            )
        return await handler(request)

    async def _static(self, request: web.Request) -> web.Response:
        body, kind = self.files[request.path]
        return web.Response(body=body, content_type=kind, charset="utf-8")

    async def _about(self, request: web.Request) -> web.Response:
        return web.json_response(self.desk.about())

    async def _picture(self, request: web.Request) -> web.Response:
        shown = await asyncio.to_thread(self.desk.picture, request.match_info["id"])
        if shown.jpeg is None:
            return web.json_response({"problem": shown.problem, "may_pass": shown.may_pass, "lost": shown.lost})
        return web.Response(body=shown.jpeg, content_type="image/jpeg")

    async def _next(self, request: web.Request) -> web.Response:
        asked = await _body(request, NextRequest)
        return await _answer(self.desk.next, asked.have, asked.category, asked.wanted, again=asked.again)

    async def _decide(self, request: web.Request) -> web.Response:
        asked = await _body(request, DecideRequest)
        return await _answer(
            self.desk.decide, asked.id, asked.decision_id, asked.answer, asked.categories, revealed=asked.revealed
        )

    async def _undo(self, request: web.Request) -> web.Response:
        asked = await _body(request, UndoRequest)
        return await _answer(self.desk.undo, asked.decision_id)

    async def _skip(self, request: web.Request) -> web.Response:
        asked = await _body(request, SkipRequest)
        return await _answer(self.desk.skip, asked.id)

    async def _history(self, request: web.Request) -> web.Response:
        return await _answer(self.desk.history_of_last)


async def _answer(ask: Callable[..., Any], *arguments: Any, **options: Any) -> web.Response:
    """The desk's files are written in a thread: a store that is slow must not hold the pictures up."""
    return web.json_response(await asyncio.to_thread(ask, *arguments, **options))


async def _body(request: web.Request, model: type[T]) -> T:
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text="JSON is asked for")
    try:
        return model.model_validate_json(await request.read())
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise web.HTTPBadRequest(text=f"{place}: {error.errors()[0]['msg']}") from error


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What cannot be done is said in a sentence; what the store cannot do now may be asked again."""
    try:
        return await handler(request)
    except Refused as error:
        return web.json_response({"error": str(error), "gone": error.gone}, status=409)
    except (OSError, UsageError) as error:
        return web.json_response({"error": reason(error)}, status=503)


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
    response.headers["Server"] = "dorfman"


async def serve(desk: Desk, port: int, started: Callable[[str], None]) -> None:
    """Serves until the process is interrupted or terminated. Raises UsageError when the port is taken."""
    server = ReviewServer(desk, port)
    await server.start()
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    started(server.address)
    refreshing = asyncio.create_task(_refresh(desk))
    await ended.wait()
    refreshing.cancel()
    await server.stop()


async def _refresh(desk: Desk) -> None:
    while True:
        await asyncio.sleep(REFRESH_SECONDS)
        # A store that does not answer now is asked again; decisions say so themselves.
        with suppress(OSError, UsageError):
            await asyncio.to_thread(desk.refresh)
