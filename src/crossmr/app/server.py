"""The server of the page: who may ask, and what is answered.

It listens on this computer only, unless told otherwise. Every path begins with a random token, which is printed when it
starts, so that neither another user of the computer nor a page from elsewhere can ask for anything. The name by which
it is called must be this computer's (DNS rebinding), a change must come from the page itself (Origin), and the page may
ask nobody else for anything (Content-Security-Policy). Scans lie in a temporary folder of the user's alone.
"""

import asyncio
import contextlib
import ipaddress
import json
import platform
import secrets
import signal
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crossmr.app.downloads import KINDS, files_of, stream_zip
from crossmr.app.jobs import Job, Queue
from crossmr.app.sessions import Session, Sessions
from crossmr.app.uploads import Limits, Refused
from crossmr.display import Display
from crossmr.errors import ConfigError, CrossmrError
from crossmr.files import temporary_folder

PAGES = Path(__file__).parent / "pages"
VIEWER = Path(__file__).parents[1] / "output" / "pages"
STATIC = {
    **{name: PAGES / name for name in ("app.css", "app.js")},
    **{name: VIEWER / name for name in ("niivue.umd.js", "view.js", "view.css")},
}
"""Files that all pages share."""
TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".gz": "application/gzip"}
UNSPECIFIED = ("0.0.0.0", "::")
"""To listen on these is to listen on all addresses; none is an address to open."""
SWEEP_SECONDS = 10.0
"""Between two looks for pages that were closed."""
NOTHING = "There is nothing here. Open the address that crossmr app has printed."
"""What everybody else is answered, whatever they ask for."""
DRAINED = 2**26
"""Bytes of a refused file that are read all the same."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; frame-src 'self'; frame-ancestors 'self'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
"""Of every answer."""


@dataclass(frozen=True)
class AppSettings:
    """Where the page is served, and what it may take."""

    host: str = "127.0.0.1"
    """Address or name to listen on."""
    port: int = 0
    """0 for any that is free."""
    model: str = "default"
    """Name or folder of a model."""
    device: str = "auto"
    opened: bool = False
    """Whether to open a browser."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"--port is {self.port}; expected 0 to 65535.")
        if self.limits.total <= 0:
            raise ConfigError("--limit-gib is no size above 0; expected how much a page may send, such as 4.")


class Guard:
    """Lets through what comes with the token, by a name of this computer and, to change anything, from the page."""

    def __init__(self, app: ASGIApp, token: str, host: str):
        self.app, self.token, self.host = app, token.encode(), host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it before anything of it is read."""
        if scope["type"] != "http":  # of the server itself; there are no web sockets
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message["headers"]}
                added = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in own]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        status = self._refusal(scope)
        answer = self.app if status is None else PlainTextResponse(NOTHING, status, {"connection": "close"})
        await answer(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> int | None:
        headers = dict(scope["headers"])
        called = headers.get(b"host", b"").decode("latin-1")
        if not self._is_ours(called):
            return 421
        given = scope["path"].split("/", 2)[1].encode()
        if not secrets.compare_digest(given, self.token):
            return 404
        if scope["method"] not in ("GET", "HEAD"):
            own = headers.get(b"origin", b"").decode("latin-1") == f"http://{called}"
            if not own or headers.get(b"sec-fetch-site", b"same-origin") != b"same-origin":
                return 403
        return None

    def _is_ours(self, called: str) -> bool:
        """Whether a Host header names this computer: by a name that is not looked up anywhere, or the one of --host."""
        name = called.rsplit(":", 1)[0] if called.rpartition(":")[2].isdecimal() else called
        name = name.strip("[]").lower()
        own = platform.node() if self.host in UNSPECIFIED else self.host
        if name in ("localhost", own.lower()):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether only this computer reaches an address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


class App:
    """What the paths answer. Each is a method; the path's page is found by its key."""

    def __init__(self, root: Path, queue: Queue, limits: Limits):
        self.sessions, self.queue = Sessions(root, limits), queue

    def routes(self) -> list[Route]:
        """Every path below the token."""
        page = "/pages/{key}"
        return [
            Route("/", self.home),
            Route("/static/{name}", self.static),
            Route("/pages", self.list_pages),
            Route("/pages", self.make, methods=["POST"]),
            Route(page, self.state),
            Route(page, self.forget, methods=["DELETE"]),
            Route(f"{page}/leave", self.leave, methods=["POST"]),
            Route(f"{page}/files", self.receive, methods=["POST"]),
            Route(f"{page}/recognise", self.recognise, methods=["POST"]),
            Route(f"{page}/complete", self.complete, methods=["POST"]),
            Route(f"{page}/cancel", self.cancel, methods=["POST"]),
            Route(f"{page}/view/{{case}}/{{name}}", self.view),
            Route(f"{page}/download/{{kind}}", self.download),
        ]

    def _session(self, request: Request) -> Session:
        return self.sessions.find(request.path_params["key"])

    async def home(self, request: Request) -> Response:
        """The page."""
        return FileResponse(PAGES / "index.html", media_type="text/html")

    async def static(self, request: Request) -> Response:
        """A file that all pages share."""
        path = STATIC.get(request.path_params["name"])
        return _not_found() if path is None else FileResponse(path, media_type=TYPES[path.suffix])

    async def list_pages(self, request: Request) -> Response:
        """The studies that are still here, for a page that was opened again."""
        held = [one for one in self.sessions.all.values() if one.store.names]
        return JSONResponse([{"key": one.key, "name": one.name} for one in held])

    async def make(self, request: Request) -> Response:
        """A new page's key, and its limits."""
        session = self.sessions.make()
        return JSONResponse({"key": session.key, "limit": session.store.limits.total}, 201)

    async def state(self, request: Request) -> Response:
        """All that a page shows."""
        session = self._session(request)
        return JSONResponse(
            {
                "files": len(session.store.names),
                "bytes": session.store.taken,
                "remarks": session.store.remarks,
                "job": self._job(session),
                "recognised": session.recognised,
                "choices": session.choices,
                "together": session.together,
                "results": session.results,
            }
        )

    def _job(self, session: Session) -> dict[str, Any] | None:
        job = session.job
        if job is None:
            return None
        told = {"verb": job.verb, "state": job.state, "error": job.error, "seconds": round(job.so_far, 1)}
        return told | {"place": self.queue.place(job), "progress": job.progress}

    async def forget(self, request: Request) -> Response:
        """Delete all that a page has."""
        session = self._session(request)
        await self._end(session)
        self.sessions.forget(session)
        return Response(status_code=204)

    async def leave(self, request: Request) -> Response:
        """A page is being closed, or loaded anew."""
        self.sessions.leave(request.path_params["key"])
        return Response(status_code=204)

    async def receive(self, request: Request) -> Response:
        """A file, as it comes in."""
        session = self._session(request)
        if session.job is not None and session.job.is_open:
            raise Refused("A job is running. Cancel it, or wait until it has ended, and give more then.", 409)
        name, announced = request.query_params.get("path", ""), request.headers.get("content-length", "")
        stream = request.stream()
        try:
            chunks = _heard(stream, session, self.sessions)
            await session.store.receive(name, chunks, int(announced) if announced.isdecimal() else 0)
        except Refused:
            await _drain(stream)
            raise
        session.recognised = session.results = None
        return Response(status_code=204)

    async def recognise(self, request: Request) -> Response:
        """Ask what the scans are, with what a user has chosen."""
        session, asked = self._session(request), await _body(request)
        if not session.store.names:
            raise Refused("There is no file that can be read yet; hidden files are not read. Drop a study first.", 409)

        choices, together = asked.get("choices", {}), asked.get("together") is True
        if not (isinstance(choices, dict) and all(isinstance(one, str) for one in choices.values())):
            raise Refused("choices is not an object of strings.")
        session.choices, session.together = choices, together
        place = session.new_folder("sorted")
        arguments = {"scans": str(session.store.folder), "choices": choices, "together": together, "sorted": str(place)}

        def finish(result: dict[str, Any]) -> None:
            session.batches = result.pop("batches")
            session.recognised = result
            session.keep_only(place)

        session.results = None
        return self._submit(session, Job("recognise", arguments, finish))

    async def complete(self, request: Request) -> Response:
        """Ask for what the scans lack."""
        session, targets = self._session(request), (await _body(request)).get("targets")
        if not session.batches or session.recognised is None:
            raise Refused("Nothing was recognised yet.", 409)
        if targets is not None and not (isinstance(targets, list) and all(isinstance(one, str) for one in targets)):
            raise Refused("targets is not a list of strings.")
        out = session.new_folder("out")
        arguments = {"batches": session.batches, "out": str(out), "targets": targets}

        def finish(result: dict[str, Any]) -> None:
            session.results, session.out = result, out
            session.keep_only(out)

        return self._submit(session, Job("complete", arguments, finish))

    def _submit(self, session: Session, job: Job) -> Response:
        if session.job is not None and session.job.is_open:
            raise Refused("A job is running. Cancel it, or wait until it has ended.", 409)
        session.job = self.queue.submit(job)
        return JSONResponse(self._job(session), 202)

    async def cancel(self, request: Request) -> Response:
        """Stop the page's job."""
        session = self._session(request)
        await self._end(session)
        return JSONResponse(self._job(session))

    async def _end(self, session: Session) -> None:
        """Stop a page's job, and wait until it has stopped."""
        if session.job is not None:
            await self.queue.cancel(session.job)

    async def view(self, request: Request) -> Response:
        """The viewer's page of a case, or one of its volumes."""
        session, asked = self._session(request), request.path_params
        cases = [case["case"] for case in (session.results or {}).get("cases", ()) if case["view"]]
        if asked["case"] not in cases or session.out is None:
            return _not_found()
        folder = session.out / "view" / asked["case"]
        names = {path.name for path in folder.iterdir()}
        if asked["name"] not in names:
            return _not_found()
        path = folder / asked["name"]
        return FileResponse(path, media_type=TYPES[path.suffix])

    async def download(self, request: Request) -> Response:
        """All that was made, as a zip that is written while it is sent."""
        session, kind = self._session(request), request.path_params["kind"].removesuffix(".zip")
        if kind not in KINDS or session.out is None or session.results is None:
            return _not_found()
        files = files_of(session.out / ("bids" if kind == "bids" else "result"), kind)
        cases = [case["case"] for case in session.results["cases"]]
        name = f"{cases[0] if len(cases) == 1 else 'studies'}_SYNTHETIC_{kind}"
        safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in name)
        headers = {"content-disposition": f'attachment; filename="{safe}.zip"'}
        return StreamingResponse(
            _heard_sync(stream_zip(safe, files), session, self.sessions), 200, headers, "application/zip"
        )

    async def sweep(self) -> None:
        """Forget pages that were closed, now and then."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            for session in self.sessions.unheard():
                await self._end(session)
                self.sessions.forget(session)


async def _heard(chunks: AsyncIterator[bytes], session: Session, sessions: Sessions) -> AsyncIterator[bytes]:
    """Chunks of a page that is heard of by each."""
    async for chunk in chunks:
        sessions.find(session.key)
        yield chunk


def _heard_sync(blocks: Iterator[bytes], session: Session, sessions: Sessions) -> Iterator[bytes]:
    for block in blocks:
        sessions.find(session.key)
        yield block


async def _drain(stream: AsyncIterator[bytes]) -> None:
    """Read a little of what is refused: a browser that still sends takes an early answer for a broken connection."""
    left = DRAINED
    async for chunk in stream:
        left -= len(chunk)
        if left < 0:
            return


async def _body(request: Request) -> dict[str, Any]:
    """A small object of JSON."""
    held = bytearray()
    async for chunk in request.stream():
        held += chunk
        if len(held) > 2**22:
            raise Refused("This is too long.", 413)
    try:
        asked = json.loads(held or b"{}")
    except (ValueError, RecursionError) as error:
        raise Refused("This is no JSON.") from error
    if not isinstance(asked, dict):
        raise Refused("This is no object of JSON.")
    return asked


def _not_found() -> Response:
    return JSONResponse({"error": "There is nothing of this name."}, 404)


async def _refused(request: Request, error: Exception) -> Response:
    """A refusal in one line; the name of no folder of this computer is in it."""
    status = error.status if isinstance(error, Refused) else 400
    return JSONResponse({"error": str(error)}, status)


async def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads the answer: the page was closed while it sent."""
    return Response(status_code=400)


def build(root: Path, settings: AppSettings, token: str) -> ASGIApp:
    """The application; its jobs run, and closed pages are looked for, as long as the server runs."""
    queue = Queue([sys.executable, "-m", "crossmr.app.worker", settings.model, settings.device, str(root)])
    app = App(root, queue, settings.limits)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(queue.serve()), asyncio.create_task(app.sweep())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    handlers: dict[Any, Any] = {CrossmrError: _refused, ClientDisconnect: _gone}
    inner = Starlette(routes=[Mount(f"/{token}", routes=app.routes())], lifespan=lifespan, exception_handlers=handlers)
    return Guard(inner, token, settings.host)


class Server(uvicorn.Server):
    """A server that says when it listens, and on which port."""

    def __init__(self, config: uvicorn.Config, listening: Callable[[int], object]):
        super().__init__(config)
        self._listening = listening

    async def startup(self, sockets: Any = None) -> None:
        """Start, then say so."""
        await super().startup(sockets)
        if self.servers:
            self._listening(self.servers[0].sockets[0].getsockname()[1])


def make_server(root: Path, settings: AppSettings, token: str, listening: Callable[[int], object]) -> Server:
    """The server of the page; it writes no log, since its paths have the token."""
    config = uvicorn.Config(
        build(root, settings, token),
        host=settings.host,
        port=settings.port,
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
        ws="none",
    )
    return Server(config, listening)


def _say_address(root: Path, settings: AppSettings, token: str, display: Display, port: int) -> None:
    """Print where the page is, and open it if that was asked for."""
    host = platform.node() if settings.host in UNSPECIFIED else settings.host
    host = f"[{host}]" if ":" in host else host
    address = f"http://{host}:{port}/{token}/"
    display.say(f"{address}\nOpen it in a browser of this computer. Ctrl-C ends it and deletes what was sent and made.")
    if not is_loopback(settings.host):
        display.say(
            "Warning: others on the network reach this, and nothing is encrypted: whoever listens reads scans and "
            "address. Use an SSH tunnel to a loopback address instead."
        )
    if settings.opened:
        way = write_way(root, address)
        threading.Thread(target=webbrowser.open, args=[way.as_uri()], daemon=True).start()


def write_way(root: Path, address: str) -> Path:
    """A page that leads to the address: the arguments of a browser, unlike this file, are seen by every user."""
    path = root / "open.html"
    path.touch(mode=0o600)
    path.write_text(f'<!doctype html><meta http-equiv="refresh" content="0; url={address}"><title>crossmr</title>')
    return path


def serve(settings: AppSettings, display: Display) -> None:
    """Serve the page until Ctrl-C or a signal to end; everything that was sent or made is deleted then.

    Raises:
        ConfigError: the port is taken, or the host is not this computer's.
    """
    with _signals_end_it(), temporary_folder("the folder of the page") as root:
        token = secrets.token_urlsafe(24)
        server = make_server(root, settings, token, partial(_say_address, root, settings, token, display))
        try:
            server.run()
        except KeyboardInterrupt:
            display.say("Ended; what was sent and made is deleted.")
        except SystemExit as error:
            if server.started:
                raise
            where = f"--host {settings.host} --port {settings.port}"
            raise ConfigError(f"{where} cannot be listened on. Name another, such as --port 0.") from error


@contextlib.contextmanager
def _signals_end_it() -> Iterator[None]:
    """Within this, SIGTERM and a closed terminal end the program as Ctrl-C does: what is to be deleted is deleted."""
    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield
        return

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), end) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
