"""A judge behind an endpoint that speaks OpenAI's chat completions, near or far.

Hosted services do, and so do vLLM, llama.cpp and Ollama on one's own machine. The key comes from
the environment alone; it is in no config, no file and no error, and goes where `diffalign.keys`
lets it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from diffalign import keys
from diffalign.endpoints import Patience, RequestRefusedError, announce, key_hint, post
from diffalign.errors import ConfigError, EndpointError
from diffalign.judges.base import AbstractJudge
from diffalign.parsing import parse_json
from diffalign.ranges import AtLeast

T = TypeVar("T")
Content = str | list[dict[str, Any]]
"""Of a message: text, or parts such as `{"type": "image_url", ...}`."""
LogProbs = list[tuple[str, float]]
"""Tokens as text, some of them more than once, and their log-probabilities in nats."""
_OF_ITEMS = frozenset({400, 413, 422})
"""HTTP statuses that speak of what was sent."""


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
        try:
            return self._post(prompt, _completion, {"max_tokens": self.max_tokens})
        except RequestRefusedError as error:
            raise ConfigError(self._refusal(error, "judge")) from error

    def first_tokens(self, contents: Sequence[Content], *, most: int = 20) -> list[LogProbs]:
        """Log-probabilities of the most probable first tokens of replies.

        Args:
            contents: what is asked, text or parts with text and images.
            most: how many tokens a reply tells at most; OpenAI allows 20.

        Raises:
            ValueError: the server refuses one of these, or replies without a token.
            EndpointError: it does not answer, refuses everybody, or tells no log-probabilities.
        """
        announce(self._variable(), self.address, f"the judge {self.model}")
        with ThreadPoolExecutor(self.parallel) as pool:
            asked = [pool.submit(self._first_token, content, most) for content in contents]
            try:
                return [future.result() for future in asked]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _first_token(self, content: Content, most: int) -> LogProbs:
        further = {"max_tokens": 1, "logprobs": True, "top_logprobs": most}
        try:
            choice = self._post(content, _choice, further)
        except RequestRefusedError as error:
            if error.status in _OF_ITEMS:
                raise ValueError(f"the server refuses it: {error}") from error
            raise EndpointError(self._refusal(error, "endpoint"), status=error.status) from error
        try:
            positions = choice["logprobs"]["content"]
            return [
                (str(top["token"]), float(top["logprob"])) for top in positions[0]["top_logprobs"]
            ]
        except (KeyError, IndexError, TypeError) as error:
            raise EndpointError(
                f"{self.address} tells no log-probabilities of the replies of {self.model}, and is "
                f"asked for them (logprobs, top_logprobs): take a server and a model that do, such "
                f"as vLLM"
            ) from error

    def _post(self, content: Content, read: Callable[[bytes], T], further: dict[str, Any]) -> T:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            **further,
        }
        return post(
            f"{self.address.rstrip('/')}/chat/completions",
            json.dumps(body).encode(),
            read,
            patience=Patience(
                attempts=self.attempts, timeout_s=self.timeout_s, pause_s=self.pause_s
            ),
            variable=self._variable(),
        )

    def _refusal(self, error: RequestRefusedError, section: str) -> str:
        hint = ""
        if error.status in (401, 403):
            hint = f"; {key_hint(self._variable(), f'{section}.{keys.FIELD}')}"
        return (
            f"{self.address} refuses the judge {self.model}: HTTP {error.status}{hint}: "
            f"{error.said}"
        )

    def _variable(self) -> str | None:
        """The variable that holds the key; None where none is sent."""
        return keys.variable_for(self.address, self.key_variable)


def _choice(reply: bytes) -> dict[str, Any]:
    content = parse_json(reply, "the reply")
    try:
        choice: dict[str, Any] = content["choices"][0]
        choice["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("the reply is no chat completion") from error
    return choice


def _completion(reply: bytes) -> str:
    return str(_choice(reply)["message"]["content"] or "")
