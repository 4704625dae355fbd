"""A judge behind an endpoint that speaks OpenAI's chat completions, near or far.

Hosted services do, and so do vLLM, llama.cpp and Ollama on one's own machine. The key comes from
the environment alone; it is in no config, no file and no error, and goes where `diffalign.keys`
lets it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from diffalign.endpoints import OF_ITEMS, ChatEndpoint, Content, RequestRefusedError, announce
from diffalign.errors import ConfigError, EndpointError
from diffalign.judges.base import AbstractJudge
from diffalign.ranges import AtLeast

T = TypeVar("T")
LogProbs = list[tuple[str, float]]
"""Tokens as text, some of them more than once, and their log-probabilities in nats."""


@dataclass(frozen=True, kw_only=True)
class Endpoint(ChatEndpoint, AbstractJudge):
    """A language model behind `ADDRESS/chat/completions`."""

    max_tokens: Annotated[int, AtLeast(1)] = 1024
    """A reply ends there at the latest."""

    @property
    def name(self) -> str:
        return self.model

    def replies(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        announce(self.variable, self.address, f"the judge {self.model}")
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
        announce(self.variable, self.address, f"the judge {self.model}")
        with ThreadPoolExecutor(self.parallel) as pool:
            asked = [pool.submit(self._first_token, content, most) for content in contents]
            try:
                return [future.result() for future in asked]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _first_token(self, content: Content, most: int) -> LogProbs:
        further = {"max_tokens": 1, "logprobs": True, "top_logprobs": most}
        try:
            choice = self._post(content, _itself, further)
        except RequestRefusedError as error:
            if error.status in OF_ITEMS:
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

    def _post(
        self, content: Content, read: Callable[[dict[str, Any]], T], further: dict[str, Any]
    ) -> T:
        return self.complete([{"role": "user", "content": content}], read, **further)

    def _refusal(self, error: RequestRefusedError, section: str) -> str:
        return self.refusal(error, section, f"the judge {self.model}")


def _itself(choice: dict[str, Any]) -> dict[str, Any]:
    return choice


def _completion(choice: dict[str, Any]) -> str:
    return str(choice["message"]["content"] or "")
