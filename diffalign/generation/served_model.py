"""A vision-language model behind an endpoint, and work that threads do ahead of who takes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, TypeVar

from diffalign.endpoints import OF_ITEMS, ChatEndpoint, RequestRefusedError
from diffalign.errors import ConfigError
from diffalign.ranges import AtLeast

Item = TypeVar("Item", bound=Hashable)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ServedModel(ChatEndpoint):
    """A vision-language model behind an endpoint, such as a server of vLLM or SGLang."""

    parallel: Annotated[int, AtLeast(1)] = 16
    """Questions under way at once."""
    fields: Mapping[str, float] = field(default_factory=lambda: {"repetition_penalty": 1.0})
    """Further fields of each request. vLLM and SGLang take penalties from the checkpoint, such as
    Qwen2.5-VL's of repetitions, unless they are told otherwise; a service that refuses the field
    gets `{}`."""

    def reply(
        self,
        text: str,
        images: Sequence[str],
        *,
        name: str,
        system: str = "",
        max_new_tokens: int,
    ) -> str:
        """The greedy response to a question about images.

        Args:
            text: the question; the images stand before it.
            images: their addresses, such as `data:image/png;base64,...`.
            name: of the question, for errors.
            system: what a system turn says first; empty leaves it to the chat template.
            max_new_tokens: a response ends there at the latest.

        Raises:
            ConfigError: the server will not take this request.
            EndpointError: it does not answer, or not with one text.
        """
        shown = [{"type": "image_url", "image_url": {"url": image}} for image in images]
        content = [*shown, {"type": "text", "text": text}]
        told = [{"role": "system", "content": system}] if system else []
        messages: list[dict[str, Any]] = [*told, {"role": "user", "content": content}]
        try:
            return self.complete(messages, _text_of, max_tokens=max_new_tokens, **self.fields)
        except RequestRefusedError as error:
            said = self.refusal(error, "asking.endpoint", f"question {name}")
            if error.status in OF_ITEMS and self.fields:
                said += (
                    f" (asking.endpoint.fields sends {', '.join(self.fields)}, which vLLM and "
                    f"SGLang know; others may want asking.endpoint.fields={{}})"
                )
            raise ConfigError(f"{said}. What was answered is kept") from error


def _text_of(choice: dict[str, Any]) -> str:
    text = choice["message"]["content"]
    if not isinstance(text, str):
        raise ValueError("the reply holds no text")
    return text.strip()


class Ahead(Generic[Item, T]):
    """Results of a function, which threads compute some items ahead of who takes them."""

    def __init__(
        self, function: Callable[[Item], T], items: Sequence[Item], *, threads: int
    ) -> None:
        """Args:
        function: of one item; called in the threads.
        items: in the order in which they will be taken, as far as it is known.
        threads: how many; as many items wait for one. 0 computes each when it is taken.
        """
        self._function = function
        self._waiting = deque(dict.fromkeys(items) if threads else ())
        self._begun: dict[Item, Future[T]] = {}
        self._threads = threads
        self._pool = ThreadPoolExecutor(max(threads, 1))

    def take(self, item: Item) -> T:
        """The result of an item; one that is taken again, or not among the items, is computed now.

        Raises:
            Exception: that of the function.
        """
        if item in self._begun or item in self._waiting:  # else nothing is known to be left out
            while self._begun and next(iter(self._begun)) != item:
                self._begun.pop(next(iter(self._begun))).cancel()
            while not self._begun and self._waiting[0] != item:
                self._waiting.popleft()
        self._begin()
        future = self._begun.pop(item, None)
        if future is None:
            return self._function(item)
        self._begin()
        return future.result()

    def stop(self) -> None:
        """Begin nothing more."""
        self._waiting.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def finished(self) -> Iterator[tuple[Item, T]]:
        """After `stop`, items that nobody took and their results; waits for those under way."""
        for item, future in self._begun.items():
            with suppress(Exception):
                yield item, future.result()

    def _begin(self) -> None:
        while self._waiting and len(self._begun) < 2 * self._threads:
            item = self._waiting.popleft()
            self._begun[item] = self._pool.submit(self._function, item)
