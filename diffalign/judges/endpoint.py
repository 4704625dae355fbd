"""A judge behind an endpoint that speaks OpenAI's chat completions, near or far.

Hosted services do, and so do vLLM, llama.cpp and Ollama on one's own machine. The key comes from
the environment alone; it is in no config, no file and no error, and goes where `diffalign.keys`
lets it.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

from rich.console import Console

from diffalign import keys
from diffalign.errors import ConfigError, DataError, DiffalignError
from diffalign.judges.base import AbstractJudge
from diffalign.parsing import parse_json
from diffalign.ranges import AtLeast

_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same request may succeed."""
_LONGEST_PAUSE_S = 60.0
_LARGEST_REPLY = 1 << 25
"""Bytes."""


class JudgeError(DiffalignError):
    """A judge does not answer."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows nobody elsewhere: a key must not travel to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Endpoint(AbstractJudge):
    """A language model behind `ADDRESS/chat/completions`."""

    address: str
    """Up to and without `/chat/completions`, for example http://127.0.0.1:8000/v1."""
    model: str
    """Name at the endpoint, for example gpt-4-1106-preview."""
    key_variable: str | None = None
    """The environment variable that holds the key. null takes OPENAI_API_KEY for api.openai.com and
    this machine and HF_TOKEN for huggingface.co, where they are set, and sends none elsewhere. Any
    other variable or host needs `judge.key_variable=NAME` on the command line; `diffalign.keys` has
    the rules."""
    max_tokens: Annotated[int, AtLeast(1)] = 1024
    """A reply ends there at the latest."""
    parallel: Annotated[int, AtLeast(1)] = 4
    """Requests under way at once."""
    attempts: Annotated[int, AtLeast(1)] = 6
    """How often a request is sent that fails in passing, with growing pauses."""
    timeout_s: float = 120.0
    """Seconds to wait for a reply."""
    pause_s: float = 1.0
    """Seconds before the second attempt; doubled before each further one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            keys.check_address(self.address)
        except ValueError as error:
            raise ValueError(f"address {error}") from error

    @property
    def name(self) -> str:
        return self.model

    def check(self) -> None:
        self._key()

    def replies(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        self._announce()
        with ThreadPoolExecutor(self.parallel) as pool:
            places = {pool.submit(self._reply, prompt): i for i, prompt in enumerate(prompts)}
            try:
                for future in as_completed(places):
                    yield places[future], future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _reply(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        for attempt in range(1, self.attempts + 1):
            try:
                return self._send(body)
            except urllib.error.HTTPError as error:
                if error.code not in _PASSING:
                    raise self._refused(error) from error
                failure, asked_to_wait = f"HTTP {error.code}", error.headers.get("Retry-After")
            except (OSError, ValueError, http.client.HTTPException, DataError) as error:
                # Unreachable, timed out, cut off, or no JSON.
                failure, asked_to_wait = keys.hide(str(error)), None
            if attempt < self.attempts:
                time.sleep(self._pause(attempt, asked_to_wait))
        raise JudgeError(
            f"{self.address} did not answer in {self.attempts} attempts ({failure}). What was "
            "judged is saved; the same command goes on from there"
        )

    def _send(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        key = self._key()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.address.rstrip('/')}/chat/completions",
            data=json.dumps(body).encode(),
            headers=headers,
        )
        handlers: list[Any] = [_NoRedirect]
        if keys.is_loopback(self.address):  # a proxy would see the key
            handlers.append(urllib.request.ProxyHandler({}))
        with urllib.request.build_opener(*handlers).open(
            request, timeout=self.timeout_s
        ) as response:
            content = parse_json(response.read(_LARGEST_REPLY), "the reply")
        try:
            return str(content["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError("the reply is no chat completion") from error

    def _key(self) -> str:
        """The key; empty where none is sent."""
        variable = keys.variable_for(self.address, self.key_variable)
        return keys.read(variable) if variable else ""

    def _announce(self) -> None:
        """Say which key goes where, before it does."""
        variable = keys.variable_for(self.address, self.key_variable)
        if variable:
            host = urlsplit(self.address).netloc
            Console(stderr=True, highlight=False).print(
                f"The key in {variable} is sent to {host}, to the judge {self.model}",
                markup=False,
                soft_wrap=True,
            )

    def _pause(self, attempt: int, asked_to_wait: str | None) -> float:
        if asked_to_wait is not None and asked_to_wait.isdecimal():
            return min(float(asked_to_wait), _LONGEST_PAUSE_S)
        return min(self.pause_s * 2.0 ** (attempt - 1), _LONGEST_PAUSE_S)

    def _refused(self, error: urllib.error.HTTPError) -> ConfigError:
        said = error.read(300).decode(errors="replace")
        hint = ""
        if error.code in (401, 403):
            variable = keys.variable_for(self.address, self.key_variable)
            hint = (
                f"; the key is read from the environment variable {variable}"
                if variable
                else "; no key was sent: give judge.key_variable=NAME on the command line"
            )
        return ConfigError(
            f"{self.address} refuses the judge {self.model}: HTTP {error.code}{hint}: "
            f"{keys.hide(said)}"
        )
