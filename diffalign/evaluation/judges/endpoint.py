"""A judge behind an endpoint that speaks OpenAI's chat completions, near or far.

Hosted services do, and so do vLLM, llama.cpp and Ollama on one's own machine. The key comes from
the environment alone; it is in no config, no file and no error.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from diffalign.errors import ConfigError, DiffalignError
from diffalign.evaluation.judges.base import AbstractJudge

_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same request may succeed."""
_LONGEST_PAUSE_S = 60.0


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
    """What the endpoint calls it, for example gpt-4-1106-preview."""
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; where it is unset none is sent."""
    max_tokens: int = 1024
    """A reply ends there at the latest."""
    parallel: int = 4
    """Requests under way at once."""
    attempts: int = 6
    """How often a request is sent that fails in passing, with growing pauses."""
    timeout_s: float = 120.0
    """Seconds to wait for a reply."""
    pause_s: float = 1.0
    """Seconds before the second attempt; doubled before each further one."""

    def __post_init__(self) -> None:
        if not self.address.startswith(("http://", "https://")):
            raise ValueError(f"address must begin with http:// or https://, got {self.address!r}")
        for name in ("max_tokens", "parallel", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def name(self) -> str:
        return self.model

    def replies(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
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
            except (OSError, ValueError) as error:  # unreachable, timed out, or no JSON
                failure, asked_to_wait = str(error), None
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
        with urllib.request.build_opener(_NoRedirect).open(
            request, timeout=self.timeout_s
        ) as response:
            content = json.load(response)
        try:
            return str(content["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError("the reply is no chat completion") from error

    def _key(self) -> str:
        """The key; empty where there is none."""
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):  # http.client would quote it in its error
            raise ConfigError(
                f"the key in the environment variable {self.key_variable} has a line break or "
                f"another character that no key has; set it anew"
            )
        return key

    def _pause(self, attempt: int, asked_to_wait: str | None) -> float:
        if asked_to_wait is not None and asked_to_wait.isdigit():
            return min(float(asked_to_wait), _LONGEST_PAUSE_S)
        return min(self.pause_s * 2.0 ** (attempt - 1), _LONGEST_PAUSE_S)

    def _refused(self, error: urllib.error.HTTPError) -> ConfigError:
        said = error.read(300).decode(errors="replace")
        hint = ""
        if error.code in (401, 403):
            hint = f"; the key is read from the environment variable {self.key_variable}"
        return ConfigError(
            f"{self.address} refuses the judge {self.model}: HTTP {error.code}{hint}: {said}"
        )
