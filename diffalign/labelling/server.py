"""The server of the page: who may ask, what is asked and answered over HTTP, and how it stops.

Starlette and uvicorn carry the protocol; `Session` decides. Whatever an address, a Host or an
Origin says, the server gives away nothing but its own page, and images by the tokens that it made.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import json
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args
from urllib.parse import parse_qs, quote, unquote, urlsplit

import anyio
import jinja2
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffalign.errors import ConfigError, DataError
from diffalign.labelling.answers import Choice
from diffalign.labelling.session import LONGEST_NAME, Session, StaleError, person_of

_TEMPLATES = Path(__file__).parent / "templates"
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_LARGEST_BODY = 1 << 16
"""Bytes; an answer has some hundred."""
_WRONG_PASSWORD_S = 1.0
"""How long a wrong password is waited for."""
_STOPPING_S = 5
_HEADERS = {
    "content-security-policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; "
    "script-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
}
"""Of every response that says nothing else: the page loads nothing from elsewhere, and no other
page shows or reads it."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """Where the server listens, and who may ask it."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    hosts: tuple[str, ...] = ()
    """Further names that browsers may call this machine by."""
    password: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether no other machine can ask."""
        return self.host in _LOOPBACK

    def knows_host(self, header: str) -> bool:
        """Whether a Host header is a name of this machine: any other one is a name that somebody
        else's page resolves to it (DNS rebinding)."""
        try:
            name = (urlsplit(f"//{header}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in _LOOPBACK or name in map(str.lower, (self.host, *self.hosts)):
            return True
        if self.is_local:
            return False
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(name))  # a number cannot be made to mean another one
        return name == socket.gethostname().lower()

    def session_mark(self) -> str:
        """What a browser shows after its person has said the password; the same after a restart."""
        assert self.password is not None
        salt = b"diffalign label"
        key = hashlib.scrypt(self.password.encode(), salt=salt, n=2**14, r=8, p=1)
        return hmac.new(key, b"session", hashlib.sha256).hexdigest()


class _Guard:
    """Refuses what does not come from the server's own page."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1"): v.decode("latin-1") for name, v in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        elsewhere = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if not self._access.knows_host(host):
            await _text(421, "This server is not called by that name.")(scope, receive, send)
            return
        foreign = origin is not None and urlsplit(origin).netloc != host
        if foreign or (elsewhere and not _is_visit(scope, headers)):
            await _text(403, "Asked by another page than this server's own.")(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                said = {name for name, _ in message["headers"]}
                message["headers"] += [
                    (name.encode(), value.encode())
                    for name, value in _HEADERS.items()
                    if name.encode() not in said
                ]
            await send(message)

        await self._app(scope, receive, with_headers)


def _is_visit(scope: Scope, headers: dict[str, str]) -> bool:
    """Whether somebody followed a link to the page."""
    return (
        scope["path"] == "/"
        and scope["method"] == "GET"
        and headers.get("sec-fetch-mode") == "navigate"
    )


class Pages:
    """The routes."""

    def __init__(
        self, session: Session, access: Access, *, question: str, agreement: Callable[[], str]
    ) -> None:
        """Args:
        session: decides.
        access: who may ask.
        question: that people are asked.
        agreement: makes the page on how far they agree.
        """
        self._session, self._access, self._question = session, access, question
        self._agreement = agreement
        self._mark = None if access.password is None else access.session_mark()
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
        return _Guard(Starlette(routes=routes), self._access)

    # --- who asks ---------------------------------------------------------------------------------

    def _cookie(self, request: Request, name: str) -> str | None:
        return request.cookies.get(f"{_cookie(request)}-{name}")

    def _is_let_in(self, request: Request) -> bool:
        shown = self._cookie(request, "session") or ""
        return self._mark is None or hmac.compare_digest(shown.encode(), self._mark.encode())

    def _person(self, request: Request) -> str | None:
        """Who asks; None where they have given no name, or not the password."""
        name = self._cookie(request, "name")
        if name is None or not self._is_let_in(request):
            return None
        with contextlib.suppress(ValueError):
            return person_of(unquote(name))
        return None

    def _page(self, request: Request) -> Response:
        person = self._person(request)
        if person is None:
            return self._asks_name(asks_password=not self._is_let_in(request))
        several = any(item.sides > 2 for item in self._session.items.items)
        return self._render(
            "page.html", person=person, shows=self._session.items.shows, ranks=several
        )

    def _asks_name(self, *, asks_password: bool, problem: str = "", status: int = 200) -> Response:
        return self._render(
            "start.html",
            status=status,
            asks_password=asks_password,
            problem=problem,
            longest=LONGEST_NAME,
            count=len(self._session.items.items),
        )

    def _render(self, name: str, status: int = 200, **values: Any) -> Response:
        text = self._templates.get_template(name).render(question=self._question, **values)
        return HTMLResponse(text, status, {"cache-control": "no-store"})

    async def _start(self, request: Request) -> Response:
        form = parse_qs((await _body(request)).decode(errors="replace"))
        said = {name: values[0] for name, values in form.items()}
        let_in = self._is_let_in(request)
        if not let_in:
            assert self._access.password is not None
            given, wanted = said.get("password", "").encode(), self._access.password.encode()
            let_in = hmac.compare_digest(given, wanted)
        if not let_in:
            await anyio.sleep(_WRONG_PASSWORD_S)
            return self._asks_name(
                asks_password=True, problem="That is not the password.", status=403
            )
        try:
            person = person_of(said.get("name", ""))
        except ValueError as error:
            problem = f"{error}."
            response = self._asks_name(asks_password=False, problem=problem, status=400)
        else:
            response = RedirectResponse("/", 303)
            _set(response, request, "name", quote(person))
        if self._mark is not None:
            _set(response, request, "session", self._mark)
        return response

    async def _leave(self, request: Request) -> Response:
        response = RedirectResponse("/", 303)
        response.delete_cookie(f"{_cookie(request)}-name")
        return response

    # --- what is asked and answered ---------------------------------------------------------------

    def _state(self, request: Request) -> Response:
        person = self._person(request)
        return _unknown() if person is None else self._now(person)

    def _now(self, person: str) -> Response:
        return JSONResponse(self._session.state(person), headers={"cache-control": "no-store"})

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
            content, media_type="image/png", headers={"cache-control": "private, max-age=600"}
        )

    def _agree(self, request: Request) -> Response:
        if not self._is_let_in(request):
            return RedirectResponse("/", 303)
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"
        headers = {"cache-control": "no-store", "content-security-policy": policy}
        return HTMLResponse(self._agreement(), headers=headers)


def _cookie(request: Request) -> str:
    """The start of the names of cookies, which servers of other ports see too."""
    return f"diffalign-label-{request.url.port or 80}"


def _set(response: Response, request: Request, name: str, value: str) -> None:
    secure = request.url.scheme == "https"
    response.set_cookie(
        f"{_cookie(request)}-{name}", value, httponly=True, samesite="strict", secure=secure
    )


def _unknown() -> Response:
    return JSONResponse({"error": "Say who you are on the first page."}, 401)


def _text(status: int, text: str) -> Response:
    return Response(text + "\n", status, media_type="text/plain")


def _file(name: str) -> Callable[[Request], Response]:
    path = _TEMPLATES / name
    kind = {"css": "text/css", "js": "text/javascript"}[path.suffix[1:]]
    headers = {"cache-control": "no-cache"}

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


def listen(access: Access) -> socket.socket:
    """A socket at the address of the settings.

    Raises:
        ConfigError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in access.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((access.host, access.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{access.host}:{access.port} cannot be listened at ({error.strerror or error}): is "
            f"another server there? Choose another port with port=..., 0 for any free one"
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
