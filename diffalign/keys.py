"""Keys in environment variables: where they may be sent, and that they are never shown.

A config may come from a stranger, so it alone sends nothing of the environment anywhere. Unasked, a
key goes to the hosts of its own service and to this machine. Any other variable, or any other host,
needs the variable's name on the command line, as `judge.key_variable=NAME`; and no key travels
over plain http but to this machine.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from diffalign.errors import ConfigError

FIELD = "key_variable"
"""The setting that names an environment variable, wherever it is in a config."""
OWN_HOSTS: Mapping[str, str] = {
    "OPENAI_API_KEY": "api.openai.com",
    "HF_TOKEN": "huggingface.co",
}
"""Variables that are sent unasked, and the host, with all below it, that each belongs to."""

_SHOWN_NOWHERE = (*OWN_HOSTS, "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_SHORTEST_KEY = 6
"""Shorter values of those variables are words that stand in messages by themselves."""
_USER_INFO = re.compile(r"(?<=://)[^/?#\s'\"]*@")
_PARAMETER = re.compile(
    r"([?&;](?:[\w.-]*(?:token|key|secret|password|passwd|signature|credential|auth)|sig|pwd)=)"
    r"[^&;#\s'\"]+",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|Bearer\s+[^\s'\"]+)")

_named: set[str] = set()


def name_on_command_line(values: Any) -> None:
    """Note the variables that the overrides of a command name: those may go where the config says.

    Args:
        values: of one override, by dotted key; others than `key_variable` are passed over.
    """
    for key, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, str) and str(key).rpartition(".")[2] == FIELD:
            _named.add(value)
        name_on_command_line(value)


def check_address(address: str) -> None:
    """Raise ValueError, without showing it, unless this is the address of an endpoint."""
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"must begin with http:// or https://, got {hide(address)!r}")
    if not address.isprintable() or any(letter in address for letter in "\\ \t\r\n"):
        raise ValueError("has a blank, a backslash or a control character in it")
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("has a host or port that cannot be read") from None
    if not host:
        raise ValueError("names no host")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "holds a user, a password, or something after ? or #: a config is written to files and "
            "logs, so keys are given in an environment variable"
        )


def variable_for(address: str, variable: str | None) -> str | None:
    """The variable whose value is sent to an address as the key.

    Args:
        address: see `check_address`.
        variable: that a config or the command line names; None takes that of the host's own
            service, and `OPENAI_API_KEY` on this machine, where it is set.

    Returns:
        None where no key is to be sent.

    Raises:
        ConfigError: the named variable may not be sent there, or is not set.
    """
    host, local = _host(address), is_loopback(address)
    if variable is None:
        own = next((v for v, of in OWN_HOSTS.items() if _is_below(host, of)), None)
        variable = "OPENAI_API_KEY" if local else own
        if variable is None or not os.environ.get(variable):
            return None
    elif variable not in _named and not _goes_unasked(variable, host, local=local):
        raise ConfigError(
            f"the config would send the environment variable {variable} to {host}. Only the keys "
            f"{' and '.join(OWN_HOSTS)} are sent without being asked for, to their own hosts "
            f"({', '.join(OWN_HOSTS.values())}) and to this machine. If you trust that host with "
            f"this key, name the variable on the command line: judge.{FIELD}={variable} (the full "
            f"key of the setting in this config); if no key is needed, set it to null"
        )
    if not local and not address.startswith("https://"):
        raise ConfigError(
            f"the key in {variable} would go to {host} over plain http, where everyone on the way "
            f"can read it: give an https:// address, or set {FIELD} to null and send no key there"
        )
    if not os.environ.get(variable, "").strip():
        raise ConfigError(
            f"the environment variable {variable}, which is to hold the key for {host}, is not "
            f"set: set it, or set {FIELD} to null where no key is needed"
        )
    return variable


def read(variable: str) -> str:
    """The key in an environment variable, without blanks around it.

    Raises:
        ConfigError: it cannot stand in a header; the message does not show it.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):  # http.client would quote it in its error
        raise ConfigError(
            f"the key in the environment variable {variable} has a line break or another character "
            f"that no key has; set it anew"
        )
    return key


def is_loopback(address: str) -> bool:
    """Whether an address is of this machine."""
    host = _host(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def hide(text: str) -> str:
    """A text for a log, a message or a file: keys and credentials in URLs become `***`."""
    for variable in (*_SHOWN_NOWHERE, *_named):
        value = os.environ.get(variable, "").strip()
        if len(value) >= _SHORTEST_KEY:
            text = text.replace(value, "***")
    text = _USER_INFO.sub("***@", text)
    text = _PARAMETER.sub(r"\1***", text)
    return _TOKEN.sub("***", text)


def refuse_credentials(tree: Any, place: str) -> None:
    """Raise ConfigError, naming the key and not the value, where a config holds credentials."""
    for key, text in _texts(tree, ""):
        if _USER_INFO.search(text) or _PARAMETER.search(text) or _TOKEN.search(text):
            raise ConfigError(
                f"{place}: {key} holds a password or key. A config is written to run folders, "
                f"cards and logs: take it out, and log in (hf auth login) or set the environment "
                f"variable of the service"
            )


def _texts(tree: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, dict):
        for name, item in tree.items():
            yield from _texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for number, item in enumerate(tree):
            yield from _texts(item, f"{key}[{number}]")


def _goes_unasked(variable: str, host: str, *, local: bool) -> bool:
    return variable in OWN_HOSTS and (local or _is_below(host, OWN_HOSTS[variable]))


def _is_below(host: str, domain: str) -> bool:
    return host == domain or host.endswith(f".{domain}")


def _host(address: str) -> str:
    return (urlsplit(address).hostname or "").lower()
