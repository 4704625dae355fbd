"""The server of the page: who may ask, what is asked and answered over HTTP, and how it stops.

Starlette and uvicorn carry the protocol; `Session` decides. Whatever an address, a Host or an
Origin says, the server gives away nothing but its own page, and images by the tokens that it made.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast, get_args
from urllib.parse import parse_qs, quote, unquote

import jinja2
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
)
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffalign.errors import ConfigError, DataError
from diffalign.labelling.answers import Choice
from diffalign.labelling.session import LONGEST_NAME, Session, StaleError, person_of
from diffalign.pages.guard import SAFE_HEADERS, Guard

_TEMPLATES = Path(__file__).parent / "templates"
_LARGEST_BODY = 1 << 16
"""Bytes; an answer has some hundred."""
_STOPPING_S = 5
_HEADERS = {
    **SAFE_HEADERS,
    "Referrer-Policy": "same-origin",  # without it browsers do not say where a form comes from
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; "
    "script-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
}
"""Of every response that says nothing else: the page loads nothing from elsewhere."""


class _Guarded:
    """An application that answers what the guard lets pass."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app, self._guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        app, refusal = self._app, self._guard.refusal(Headers(scope=scope))
        if refusal is not None:
            app = _text(refusal.status, f"{refusal.sentence}.", refusal.headers)
        await app(scope, receive, with_headers)


class Pages:
    """The routes."""

    def __init__(
        self, session: Session, guard: Guard, *, question: str, agreement: Callable[[], str]
    ) -> None:
        """Args:
        session: decides.
        guard: who may ask.
        question: that people are asked.
        agreement: makes the page on how far they agree.
        """
        self._session, self._guard, self._question = session, guard, question
        self._agreement = agreement
        loader = jinja2.FileSystemLoader(_TEMPLATES)
        self._templates = jinja2.Environment(
            loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
        )

    def app(self) -> ASGIApp:
        """The ASGI application."""
        routes = [
            Route("/", self._page),
            Route("/start", self._start, methods=["POST"]),
            Route("/leave", self._leave, methods=["POST"]),
            Route("/state", self._state),
            Route("/answer", self._answer, methods=["POST"]),
            Route("/undo", self._undo, methods=["POST"]),
            Route("/image/{token}", self._image),
            Route("/agreement", self._agree),
            *(Route(f"/{name}", _file(name)) for name in ("label.css", "label.js")),
        ]
        return _Guarded(Starlette(routes=routes), self._guard)

    # --- who asks ---------------------------------------------------------------------------------

    def _person(self, request: Request) -> str | None:
        """Who asks; None where they have given no name."""
        with contextlib.suppress(ValueError):
            return person_of(unquote(request.cookies.get(_cookie(request), "")))
        return None

    def _page(self, request: Request) -> Response:
        person = self._person(request)
        if person is None:
            return self._asks_name()
        several = any(item.sides > 2 for item in self._session.items.items)
        shows = self._session.items.shows
        return self._render("page.html", person=person, shows=shows, ranks=several)

    def _asks_name(self, problem: str = "") -> Response:
        status = 400 if problem else 200
        count = len(self._session.order)
        return self._render(
            "start.html", status, problem=problem, longest=LONGEST_NAME, count=count
        )

    def _render(self, name: str, status: int = 200, **values: Any) -> Response:
        text = self._templates.get_template(name).render(question=self._question, **values)
        return HTMLResponse(text, status)

    async def _start(self, request: Request) -> Response:
        form = parse_qs((await _body(request)).decode(errors="replace"))
        try:
            person = person_of(form.get("name", [""])[0])
        except ValueError as error:
            return self._asks_name(f"{error}.")
        response = RedirectResponse("/", 303)
        response.set_cookie(_cookie(request), quote(person), httponly=True, samesite="strict")
        return response

    async def _leave(self, request: Request) -> Response:
        response = RedirectResponse("/", 303)
        response.delete_cookie(_cookie(request))
        return response

    # --- what is asked and answered ---------------------------------------------------------------

    def _state(self, request: Request) -> Response:
        person = self._person(request)
        return _unknown() if person is None else self._now(person)

    def _now(self, person: str) -> Response:
        return JSONResponse(self._session.state(person))

    async def _answer(self, request: Request) -> Response:
        return await self._write(request, self._add)

    async def _undo(self, request: Request) -> Response:
        return await self._write(request, self._take_back)

    async def _write(
        self, request: Request, write: Callable[[str, dict[str, Any]], None]
    ) -> Response:
        person = self._person(request)
        if person is None:
            return _unknown()
        try:
            asked = json.loads(await _body(request))
            if not isinstance(asked, dict):
                raise ValueError("expected an object")
            await run_in_threadpool(write, person, asked)
        except StaleError:
            problem = "That is not the item that you are asked about now."
            return JSONResponse({"error": problem}, 409)
        except (ValueError, TypeError, RecursionError) as error:
            return JSONResponse({"error": f"This is no answer: {error}"}, 400)
        except DataError as error:
            return JSONResponse({"error": str(error)}, 507)
        return await run_in_threadpool(self._now, person)

    def _add(self, person: str, asked: dict[str, Any]) -> None:
        choice, seconds, ranking = (asked.get(n) for n in ("answer", "seconds", "ranking"))
        if choice not in get_args(Choice):
            raise ValueError(f"answer must be one of {', '.join(get_args(Choice))}")
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float, type(None))):
            raise ValueError("seconds must be a number")
        lists = isinstance(ranking, list) and all(isinstance(each, list) for each in ranking)
        if ranking is not None and not lists:
            raise ValueError("ranking must be a list of lists")
        token, said = str(asked.get("item")), cast(Choice, choice)
        self._session.answer(person, token, said, ranking=ranking, seconds=seconds)

    def _take_back(self, person: str, asked: dict[str, Any]) -> None:
        answered = asked.get("answered")
        if isinstance(answered, bool) or not isinstance(answered, int):
            raise ValueError("answered must be how many answers you have given")
        self._session.undo(person, answered)

    def _image(self, request: Request) -> Response:
        if self._person(request) is None:
            return _unknown()
        content = self._session.png(request.path_params["token"])
        if content is None:
            return _text(404, "There is no such image.")
        return Response(
            content, media_type="image/png", headers={"Cache-Control": "private, max-age=600"}
        )

    def _agree(self, request: Request) -> Response:
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"
        return HTMLResponse(self._agreement(), headers={"Content-Security-Policy": policy})


def _cookie(request: Request) -> str:
    """The cookie of a name; servers of other ports see it too, so it is called by the port."""
    return f"diffalign-label-{request.url.port or 80}"


def _unknown() -> Response:
    return JSONResponse({"error": "Say who you are on the first page."}, 401)


def _text(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    return PlainTextResponse(text + "\n", status, headers)


def _file(name: str) -> Callable[[Request], Response]:
    path = _TEMPLATES / name
    kind = {"css": "text/css", "js": "text/javascript"}[path.suffix[1:]]
    headers = {"Cache-Control": "no-cache"}

    def serve(request: Request) -> Response:
        return FileResponse(path, media_type=kind, headers=headers)

    return serve


async def _body(request: Request) -> bytes:
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > _LARGEST_BODY:
            raise HTTPException(413, f"more than {_LARGEST_BODY} bytes")
    return content


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 is a free one.

    Raises:
        ConfigError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # who asks before the server is up waits
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{host}:{port} cannot be listened at ({error.strerror or error}): is another server "
            f"there? Choose another port with port=..., 0 for any free one"
        ) from error
    return listener


def server_of(app: ASGIApp) -> uvicorn.Server:
    """The server of an application, which says nothing of itself."""
    settings = uvicorn.Config(
        app,
        access_log=False,
        http="h11",
        interface="asgi3",
        lifespan="off",
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_STOPPING_S,
        ws="none",
    )
    return uvicorn.Server(settings)


def serve(app: ASGIApp, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; every answer that was taken is on the disk then, as always."""
    with _quiet_signals():
        server_of(app).run(sockets=[listener])


@contextlib.contextmanager
def _quiet_signals() -> Iterator[None]:
    """uvicorn sends itself the signal that stopped it again, once it has stopped: that one is let
    pass, so that what comes after the server is done."""
    before = {sig: signal.signal(sig, _pass) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def _pass(*_: Any) -> None:
    """Do nothing."""
