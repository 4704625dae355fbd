"""A judge behind an endpoint that speaks OpenAI's chat completions, near or far.

Hosted services do, and so do vLLM, llama.cpp and Ollama on one's own machine. The key comes from
the environment alone; it is in no config, no file and no error, and goes where `diffalign.keys`
lets it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Annotated

from diffalign import keys
from diffalign.endpoints import Patience, RequestRefusedError, announce, key_hint, post
from diffalign.errors import ConfigError
from diffalign.judges.base import AbstractJudge
from diffalign.parsing import parse_json
from diffalign.ranges import AtLeast


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
        variable = self._variable()
        if variable is not None:
            keys.read(variable)

    def replies(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        announce(self._variable(), self.address, f"the judge {self.model}")
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
        variable = self._variable()
        try:
            return post(
                f"{self.address.rstrip('/')}/chat/completions",
                json.dumps(body).encode(),
                _completion,
                patience=Patience(
                    attempts=self.attempts, timeout_s=self.timeout_s, pause_s=self.pause_s
                ),
                variable=variable,
            )
        except RequestRefusedError as error:
            hint = ""
            if error.status in (401, 403):
                hint = f"; {key_hint(variable, f'judge.{keys.FIELD}')}"
            raise ConfigError(
                f"{self.address} refuses the judge {self.model}: HTTP {error.status}{hint}: "
                f"{error.said}"
            ) from error

    def _variable(self) -> str | None:
        """The variable that holds the key; None where none is sent."""
        return keys.variable_for(self.address, self.key_variable)


def _completion(reply: bytes) -> str:
    content = parse_json(reply, "the reply")
    try:
        return str(content["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("the reply is no chat completion") from error
