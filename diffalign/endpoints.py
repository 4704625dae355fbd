"""Requests to an HTTP endpoint: asked again while they fail in passing, then a sentence.

No redirect is followed and no proxy sees what goes to this machine, so that a key goes where
`diffalign.keys` lets it and nowhere else.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from rich.console import Console

from diffalign import keys
from diffalign.config import MAY_CHANGE
from diffalign.errors import DataError, EndpointError
from diffalign.parsing import parse_json
from diffalign.ranges import AtLeast, MoreThan, Ranged

T = TypeVar("T")
Content = str | list[dict[str, Any]]
"""Of a message: text, or parts such as `{"type": "image_url", ...}`."""
OF_ITEMS = frozenset({400, 413, 422})
"""HTTP statuses that speak of what was sent."""

_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same request may succeed."""
_LONGEST_PAUSE_S = 60.0
_LARGEST_REPLY = 1 << 25
"""Bytes."""
_SHOWN = 300
"""Bytes of what a server says of a failure that are repeated."""


class RequestRefusedError(Exception):
    """A status with which the same request would be met again."""

    def __init__(self, status: int, said: str) -> None:
        """Args:
        status: of HTTP.
        said: the start of the body, without keys.
        """
        super().__init__(f"HTTP {status}: {said}")
        self.status, self.said = status, said


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long and how often one asks."""

    attempts: int
    """How often a request is sent that fails in passing."""
    timeout_s: float
    """Seconds to wait for each reply."""
    pause_s: float
    """Seconds before the second attempt; doubled before each further one, at most a minute."""

    def pause(self, attempt: int, asked_to_wait: str | None) -> float:
        """Seconds to wait after a number of attempts.

        Args:
            attempt: how many there were.
            asked_to_wait: the header `Retry-After`; a whole number of seconds is obeyed.
        """
        if asked_to_wait is not None and asked_to_wait.isdecimal():
            return min(float(asked_to_wait), _LONGEST_PAUSE_S)
        return min(self.pause_s * 2.0 ** (attempt - 1), _LONGEST_PAUSE_S)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows nobody elsewhere: a key must not travel to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def post(
    address: str,
    content: bytes,
    read: Callable[[bytes], T],
    *,
    patience: Patience,
    variable: str | None = None,
    content_type: str = "application/json",
) -> T:
    """Send a request and read the reply.

    Args:
        address: where to, whole.
        content: the body.
        read: makes something of the body of the reply; a ValueError or DataError of it says that it
            is none, and the request is sent again.
        patience: how long and how often.
        variable: the environment variable whose value goes along as a bearer token; None sends
            none. It comes from `keys.variable_for`.
        content_type: of the body.

    Raises:
        RequestRefusedError: a status that is not in passing.
        EndpointError: no reply that can be read in all those attempts.
    """
    for attempt in range(1, patience.attempts + 1):
        status, asked_to_wait = None, None
        try:
            return read(_send(address, content, patience.timeout_s, variable, content_type))
        except urllib.error.HTTPError as error:
            if error.code not in _PASSING:
                said = error.read(_SHOWN).decode(errors="replace")
                raise RequestRefusedError(error.code, keys.hide(said)) from error
            status, asked_to_wait = error.code, error.headers.get("Retry-After")
            failure = f"HTTP {error.code}"
        except (OSError, ValueError, http.client.HTTPException, DataError) as error:
            failure = keys.hide(str(error))  # unreachable, timed out, cut off, or unreadable
        if attempt < patience.attempts:
            time.sleep(patience.pause(attempt, asked_to_wait))
    raise EndpointError(
        f"{address} did not answer in {patience.attempts} attempts ({failure}). What was done is "
        f"saved; the same command goes on from there",
        status=status,
    )


def _send(
    address: str, content: bytes, timeout_s: float, variable: str | None, content_type: str
) -> bytes:
    headers = {"Content-Type": content_type}
    if variable is not None:
        headers["Authorization"] = f"Bearer {keys.read(variable)}"
    request = urllib.request.Request(address, data=content, headers=headers)
    handlers: list[Any] = [_NoRedirect]
    if keys.is_loopback(address):  # a proxy would see the key
        handlers.append(urllib.request.ProxyHandler({}))
    with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as response:
        found: bytes = response.read(_LARGEST_REPLY)
    return found


def announce(variable: str | None, address: str, whom: str) -> None:
    """Say which key goes where, before it does.

    Args:
        variable: that holds the key; None says nothing.
        address: where it goes.
        whom: who gets it, such as `the judge gpt-4`.
    """
    if variable is None:
        return
    Console(stderr=True, highlight=False).print(
        f"The key in {variable} is sent to {urlsplit(address).netloc}, to {whom}",
        markup=False,
        soft_wrap=True,
    )


def key_hint(variable: str | None, setting: str) -> str:
    """What to do where a server answers that one may not ask it.

    Args:
        variable: that held the key; None where none was sent.
        setting: that names the variable, as on the command line.
    """
    if variable is None:
        return f"no key was sent: give {setting}=NAME on the command line"
    return f"the key is read from the environment variable {variable}"


@dataclass(frozen=True, kw_only=True)
class Connection(Ranged):
    """An address, and how it is asked, which changes no reply."""

    address: str = field(metadata=MAY_CHANGE)
    """Where requests go, whole."""
    parallel: Annotated[int, AtLeast(1)] = field(default=4, metadata=MAY_CHANGE)
    """Requests under way at once."""
    attempts: Annotated[int, AtLeast(1)] = field(default=6, metadata=MAY_CHANGE)
    """How often a request is sent that fails in passing, with growing pauses."""
    timeout_s: Annotated[float, MoreThan(0)] = field(default=120.0, metadata=MAY_CHANGE)
    """Seconds to wait for a reply."""
    pause_s: Annotated[float, AtLeast(0)] = field(default=1.0, metadata=MAY_CHANGE)
    """Seconds before the second attempt; doubled before each further one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            keys.check_address(self.address)
        except ValueError as error:
            raise ValueError(f"address {error}") from error

    @property
    def patience(self) -> Patience:
        return Patience(attempts=self.attempts, timeout_s=self.timeout_s, pause_s=self.pause_s)


@dataclass(frozen=True, kw_only=True)
class ChatEndpoint(Connection):
    """A language model behind `ADDRESS/chat/completions`, in OpenAI's form."""

    address: str = field(metadata=MAY_CHANGE)
    """Up to and without `/chat/completions`, for example http://127.0.0.1:8000/v1."""
    model: str
    """Name at the endpoint, for example gpt-4-1106-preview."""
    key_variable: str | None = field(default=None, metadata=MAY_CHANGE)
    """The environment variable that holds the key. null takes OPENAI_API_KEY for api.openai.com and
    this machine and HF_TOKEN for huggingface.co, where they are set, and sends none elsewhere. Any
    other variable or host needs it named on the command line, such as `judge.key_variable=NAME`;
    `diffalign.keys` has the rules."""

    def check(self) -> None:
        """Raise ConfigError where the key that is to be sent may not be, or is not there."""
        if self.variable is not None:
            keys.read(self.variable)

    @property
    def variable(self) -> str | None:
        """The variable that holds the key; None where none is sent."""
        return keys.variable_for(self.address, self.key_variable)

    def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        read: Callable[[dict[str, Any]], T],
        **further: Any,
    ) -> T:
        """The most probable completion of a chat.

        Args:
            messages: `{role, content}`, the content being a `Content`.
            read: makes something of the choice; a ValueError of it has the request sent again.
            **further: fields of the request.

        Raises:
            RequestRefusedError: a status that is not in passing.
            EndpointError: no reply that can be read in all attempts.
        """
        body = {"model": self.model, "messages": messages, "temperature": 0, **further}
        return post(
            f"{self.address.rstrip('/')}/chat/completions",
            json.dumps(body).encode(),
            lambda reply: read(_only_choice(reply)),
            patience=self.patience,
            variable=self.variable,
        )

    def refusal(self, error: RequestRefusedError, section: str, whom: str) -> str:
        """A sentence of a request that the server will not take.

        Args:
            error: what it said.
            section: of the settings, as on the command line, such as `judge`.
            whom: what was asked, such as `the judge gpt-4`.
        """
        hint = ""
        if error.status in (401, 403):
            hint = f"; {key_hint(self.variable, f'{section}.{keys.FIELD}')}"
        return f"{self.address} refuses {whom}: HTTP {error.status}{hint}: {error.said}"


def _only_choice(reply: bytes) -> dict[str, Any]:
    content = parse_json(reply, "the reply")
    try:
        choices = content["choices"]
        choice: dict[str, Any] = choices[0]
        choice["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("the reply is no chat completion") from error
    if len(choices) > 1:
        raise ValueError(f"the reply has {len(choices)} choices, and one was asked for")
    return choice
