"""Who may ask a server of ours: this machine's browser, and others by a password.

A page of a stranger, open in the same browser, can ask this machine too: by a name of its own that
it lets point here, by a form, or by the address of an image. So a request is looked at before it is
answered, whatever serves it:

    guard = Guard.of("127.0.0.1", password=None)
    refusal = guard.refusal(request.headers)       # None, or a status and a sentence
    response.headers.update(SAFE_HEADERS)
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from diffalign.errors import ConfigError

PASSWORD_VARIABLE = "DIFFALIGN_PASSWORD"
"""The environment variable of the password: a command line is seen by everybody on the machine."""

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_ANY_ADDRESS = frozenset({"0.0.0.0", "::"})
_SHORTEST_PASSWORD = 8

SAFE_HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""Of every response: no other page embeds it or reads it, and no browser guesses its type."""


@dataclass(frozen=True)
class Refusal:
    """Why a request is not answered."""

    status: int
    """Of HTTP: 401 or 403."""
    sentence: str
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further ones of the response."""


@dataclass(frozen=True)
class Guard:
    """What requests are held to; `Guard.of` makes one."""

    address: str
    """That the server listens on."""
    password: str | None = field(repr=False)

    @classmethod
    def of(cls, address: str, *, password: str | None = None) -> Guard:
        """A guard of a server.

        Args:
            address: that it listens on: of this machine alone, or one that others reach.
            password: None takes that of the environment, if there is one.

        Raises:
            ConfigError: others reach the address, and there is no password, or a short one.
        """
        password = password or os.environ.get(PASSWORD_VARIABLE) or None
        if password is not None and len(password) < _SHORTEST_PASSWORD:
            raise ConfigError(
                f"the password has {len(password)} letters, and needs at least {_SHORTEST_PASSWORD}"
            )
        if password is None and not is_loopback(address):
            raise ConfigError(
                f"the address {address} can be reached from other machines, and there is no "
                f"password: set the environment variable {PASSWORD_VARIABLE} before the command, "
                f"or take 127.0.0.1 and reach it from elsewhere through ssh -L"
            )
        return cls(address, password)

    def refusal(self, headers: Mapping[str, str]) -> Refusal | None:
        """Why a request is not answered; None where it is.

        Args:
            headers: of the request, in any spelling.
        """
        given = {name.lower(): value for name, value in headers.items()}
        host = given.get("host", "")
        if not self._is_ours(host):
            return Refusal(403, f"this server does not go by the name {_name_in(host)!r}")
        origin = given.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return Refusal(403, "a page of another site may not ask this server")
        site, mode = given.get("sec-fetch-site", "none"), given.get("sec-fetch-mode", "navigate")
        if site not in ("none", "same-origin") and mode != "navigate":
            return Refusal(403, "a page of another site may not ask this server")
        if self.password is not None and not self._knows_password(given.get("authorization", "")):
            return Refusal(
                401,
                f"the password of {PASSWORD_VARIABLE} is needed; any user name will do",
                {"WWW-Authenticate": 'Basic realm="diffalign", charset="UTF-8"'},
            )
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this server; a port of an ssh tunnel may be another one."""
        name = _name_in(host)
        if name in _LOOPBACK_NAMES or name == self.address.lower():
            return True
        if is_loopback(self.address):
            return False
        if self.address in _ANY_ADDRESS and _is_address(name):
            return True  # no name of a stranger, so nothing that could be made to point here
        return name in (socket.gethostname().lower(), socket.getfqdn().lower())

    def _knows_password(self, authorization: str) -> bool:
        scheme, _, encoded = authorization.partition(" ")
        if scheme.lower() != "basic" or self.password is None:
            return False
        try:
            given = base64.b64decode(encoded.strip(), validate=True)
        except (binascii.Error, ValueError):
            return False
        return hmac.compare_digest(given.partition(b":")[2], self.password.encode())


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address."""
    if address.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _name_in(host: str) -> str:
    """The name of a Host header, without its port and brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
