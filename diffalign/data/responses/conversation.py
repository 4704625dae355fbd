"""Conversations as data sets spell them, read into turns and responses."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from diffalign.data.responses.records import IMAGE, Position, Span, Turn
from diffalign.data.skipping import SkipReason, UnusableRowError
from diffalign.errors import DataError
from diffalign.parsing import parse_json

Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
_IMAGE_BLOCKS = ("image", "image_url", "input_image")
_TEXT_BLOCKS = ("text", "input_text", "output_text")
_HELD = (*_IMAGE_BLOCKS[:2], "url", "path", "bytes", "base64", "data", "source", "file_name")
"""Fields of a block in which its image can be."""
_END_TOKENS = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<eos>",
)
"""Texts that end a turn or a text in the chat templates of published models."""
_PRINTED = re.compile(
    r"\s*\[?\s*\{\s*(?=['\"](?:role|from|content|value)['\"]\s*:)"
    r".*?['\"](?:role|from)['\"]\s*:\s*['\"](?:system|user|human|assistant|gpt)['\"]",
    re.DOTALL,
)
"""Messages as JSON or Python write them: an object whose first field is one of a message's."""
TEMPLATED = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|(?:ASSISTANT|Assistant):\s*\Z"
    r"|<img>[^<]+</img>|<bbox>|<ref-object>"
)
"""Texts that begin a turn in the chat templates of published models, or ask for the response; and
the markers of ms-swift and Qwen-VL for images and boxes."""
_SPEAKER = re.compile(r"(?:^|\s|</s>|<\|endoftext\|>)(USER|ASSISTANT):")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The text of a row: a conversation and the responses to it."""

    turns: tuple[Turn, ...]
    """As in `ResponsePair`; markers may be missing altogether."""
    responses: Mapping[str, str]
    """See `ResponsePair`."""
    contexts: Mapping[str, tuple[Turn, ...]] = field(default_factory=dict)
    """The conversation that a response belongs to, where that is another conversation."""
    spans: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)
    """See `ResponsePair`."""
    scores: tuple[float, float] | None = None
    """Numbers by which the row says which response is the better one, of the chosen and of the
    rejected one; equal in a tie. None where it says so without."""


def malformed(detail: str, side: str | None = None) -> UnusableRowError:
    """The error for a row that does not have the form of its data set."""
    return UnusableRowError(SkipReason.MALFORMED, detail, side)


def turns_of(messages: Any) -> tuple[Turn, ...]:
    """Messages as turns, or a plain string as one turn of the user.

    A message is `{role, content}` or, as LLaVA's data have it, `{from, value}`; content is a string
    or a list of blocks `{type: image}` and `{type: text, text}`. A block of an image may hold it
    under `image`, `image_url`, `url`, `path` and the like, or say its `index` in the row's column.
    Messages that a table keeps as JSON text are read as messages.

    Raises:
        UnusableRowError: it is neither, or a role is unknown.
    """
    if isinstance(messages, str):
        messages = _spelled_out(messages)
    if messages is None or isinstance(messages, str):
        return (Turn(role="user", text=messages or ""),)
    return tuple(_turn(message) for message in records_of(messages, "messages"))


def system_turn(text: Any) -> tuple[Turn, ...]:
    """The turn of a column `system`; none where it is null or empty.

    Raises:
        UnusableRowError: it is no text.
    """
    if text is None or text == "":
        return ()
    if not isinstance(text, str):
        raise malformed(f"expected a system prompt as text, found {text!r:.60}")
    return (Turn(role="system", text=text),)


def instruction_turns(values: Mapping[str, Any]) -> tuple[Turn, ...]:
    """The conversation of alpaca's columns `system`, `history`, `instruction` and `input`.

    Raises:
        UnusableRowError: one of them has another form.
    """
    rounds = values.get("history") or []
    if not isinstance(rounds, list) or not all(
        isinstance(each, list) and len(each) == 2 and all(isinstance(t, str) for t in each)
        for each in rounds
    ):
        raise malformed(f"history is no list of [question, response]: {rounds!r:.60}")
    asked = [values.get(name) or "" for name in ("instruction", "input")]
    if not all(isinstance(text, str) for text in asked):
        raise malformed(f"instruction and input are texts, found {asked!r:.60}")
    earlier: list[Turn] = []
    for question, response in rounds:
        earlier.append(Turn(role="user", text=question))
        earlier.append(Turn(role="assistant", text=without_end_tokens(response)))
    last = Turn(role="user", text="\n".join(filter(None, asked)))
    return (*system_turn(values.get("system")), *earlier, last)


def records_of(value: Any, name: str) -> list[Any]:
    """A list of records; a lone record, or the lists of each of their fields, as the datasets
    library hands out a `Sequence` of records.

    Raises:
        UnusableRowError: it is none of these.
    """
    if isinstance(value, Mapping):
        columns = list(value.values())
        if not columns or not all(isinstance(column, list) for column in columns):
            return [value]
        if len({len(column) for column in columns}) > 1:
            raise malformed(f"the fields of {name} are lists of unequal lengths: {value!r:.60}")
        return [dict(zip(value, record, strict=True)) for record in zip(*columns, strict=True)]
    if isinstance(value, (list, tuple)):
        return list(value)
    raise malformed(f"expected {name}, found {value!r:.60}")


def compared(prompt: tuple[Turn, ...] | None, sides: Mapping[str, Any]) -> Comparison:
    """Responses, each with the conversation that it responds to.

    A response is a string, a message, or a conversation that ends with it. The conversation may
    hold the prompt, or go on after it; where it does neither it is another one, and so the row
    unusable if there is a prompt. What a string responses is the prompt, or else the conversation
    of the first side.

    Args:
        prompt: what precedes the responses; None where their conversations say it.
        sides: name -> response, as the data set has it.

    Returns:
        The turns are those of the first side, and `contexts` has those of sides that differ.

    Raises:
        UnusableRowError: a side is no response.
    """
    found = {side: _answered(value, side, prompt) for side, value in sides.items()}
    first = next(iter(found))
    turns = found[first][0]
    if not turns:
        raise malformed(f"there is no prompt, and {first} is no conversation that begins with one")
    contexts = {}
    for side, (before, _) in found.items():
        marks = [[turn.text.count(IMAGE) for turn in some] for some in (before, turns)]
        elsewhere = all(map(any, marks)) and marks[0] != marks[1]
        if before and (elsewhere or not _says_the_same(before, turns)):
            contexts[side] = before
        elif before and _shown(before) != _shown(turns):
            if not _shown(before) or not _shown(turns):
                raise UnusableRowError(
                    SkipReason.MARKERS,
                    f"the conversations of {first} and {side} are the same, and one of them holds "
                    f"images while the other has none",
                    side,
                )
            contexts[side] = before
    responses = {side: response for side, (_, response) in found.items()}
    return Comparison(turns=turns, responses=responses, contexts=contexts)


def _answered(
    value: Any, side: str, prompt: tuple[Turn, ...] | None
) -> tuple[tuple[Turn, ...], str]:
    """The conversation of a response, empty where nothing says it, and the response."""
    if isinstance(value, str):
        value = _spelled_out(value)
    if value is None or isinstance(value, str):
        return prompt or (), without_end_tokens(value or "")
    before, response = split_response(turns_of(value), side)
    if prompt is None or not before:
        return before or prompt or (), response
    starts = range(len(before) - len(prompt) + 1)
    place = next((i for i in starts if _says_the_same(prompt, before[i : i + len(prompt)])), None)
    if place is not None:
        own = before[place : place + len(prompt)]
        marked = any(IMAGE in turn.text for turn in prompt) and not _shown(own)
        kept = prompt if marked else own  # whichever says more about its images
        return (*before[:place], *kept, *before[place + len(prompt) :]), response
    if before[0].role == "assistant" and prompt[-1].role == "user":
        return (*prompt, *before), response
    raise malformed(
        f"the conversation of {side} neither contains the prompt nor goes on after it, but begins "
        f"with {before[0].text!r:.60}",
        side,
    )


def _says_the_same(first: Sequence[Turn], second: Sequence[Turn]) -> bool:
    """Whether two conversations have the same roles and texts, wherever images are in them."""

    def said(turns: Sequence[Turn]) -> list[tuple[str, str]]:
        return [(turn.role, " ".join(turn.text.replace(IMAGE, " ").split())) for turn in turns]

    return said(first) == said(second)


def _shown(turns: Sequence[Turn]) -> list[Any]:
    """The images that messages hold."""
    return [image for turn in turns for image in turn.images if image is not None]


def without_end_tokens(text: str) -> str:
    """A response without the tokens that end one, which the chat template puts there itself.

    `</s>` stays where the text opens with `<s>` what it closes, as HTML does.
    """
    while True:
        kept = text.rstrip()
        end = next((token for token in _END_TOKENS if kept.endswith(token)), None)
        if end is None or (end == "</s>" and "<s>" in kept):
            return text
        text = kept[: -len(end)]


def split_response(turns: Sequence[Turn], side: str) -> tuple[tuple[Turn, ...], str]:
    """A conversation as what comes before its last response, and the response.

    Raises:
        UnusableRowError: the last message is not the assistant's.
    """
    if not turns or turns[-1].role != "assistant":
        raise malformed(
            f"{side}: the conversation does not end with the assistant's response", side
        )
    if any(image is not None for image in turns[-1].images):
        raise UnusableRowError(SkipReason.MARKERS, "the response itself holds an image", side)
    return tuple(turns[:-1]), turns[-1].text


def turns_of_template(prompt: Any) -> tuple[Turn, ...]:
    """Turns of a prompt in the template of Vicuna: `... USER: question ASSISTANT: response</s>...`.

    What is before the first speaker is the preamble of that template and is left out: the
    model that is trained brings its own. Without `USER:` it is the user's question itself.

    Raises:
        UnusableRowError: it is no string.
    """
    if not isinstance(prompt, str):
        raise malformed(f"expected a prompt as a string, found {prompt!r:.60}")
    first, *rest = _SPEAKER.split(prompt)
    speakers, texts = rest[::2], rest[1::2]
    if "USER" not in speakers:
        speakers, texts = ["USER", *speakers], [first, *texts]
    turns = [
        Turn(role=_ROLES[speaker.lower()], text=without_end_tokens(text).strip())
        for speaker, text in zip(speakers, texts, strict=True)
    ]
    if turns[-1].role == "assistant" and not turns[-1].text:
        turns.pop()  # `ASSISTANT:` asks for the response
    return tuple(turns)


def with_markers(turns: Sequence[Turn], images: int) -> tuple[Turn, ...]:
    """The turns; where no text has a marker, all of them in front of the first one of the user.

    So does TRL's DPO trainer with prompts that are plain strings.
    """
    if not images or any(IMAGE in turn.text for turn in turns):
        return tuple(turns)
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        return tuple(turns)
    marked = Turn(role="user", text=IMAGE * images + "\n" + turns[first].text)
    return (*turns[:first], marked, *turns[first + 1 :])


def locate_parts(text: str, parts: Sequence[str]) -> list[tuple[int, int] | None]:
    """Places of parts in a text, one after another, as [start, end) in characters.

    Args:
        text: that holds them in this order.
        parts: whose outer white space does not count.

    Returns:
        One entry a part; None for an empty part, and for one that does not follow the ones before.
    """
    places: list[tuple[int, int] | None] = []
    after = 0
    for part in map(str.strip, parts):
        start = text.find(part, after) if part else -1
        places.append((start, start + len(part)) if start >= 0 else None)
        after = start + len(part) if start >= 0 else after
    return places


def labelled_sentences(text: str, sentences: Sequence[str], labels: Sequence[str]) -> list[Span]:
    """Sentences of a response with a label each.

    Raises:
        ValueError: their numbers differ, or a sentence is not part of the response.
    """
    if len(sentences) != len(labels):
        raise ValueError(f"{len(sentences)} sentences with {len(labels)} types")
    spans = []
    for sentence, label, place in zip(
        sentences, labels, locate_parts(text, sentences), strict=True
    ):
        if place is None and sentence.strip():
            raise ValueError(f"the sentence {sentence!r:.60} is not part of the response")
        if place is not None:
            spans.append(Span(start=place[0], end=place[1], label=label))
    return spans


def _turn(message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise malformed(f"expected a message, found {message!r:.60}")
    name = message.get("role", message.get("from"))
    role = _ROLES.get(str(name).lower())
    if role is None:
        raise malformed(f"a message of the role {name!r} (known: {', '.join(_ROLES)})")
    if message.get("tool_calls"):
        raise malformed("a message calls tools, which conversations here cannot hold")
    text, images = _content(message.get("content", message.get("value")))
    if role == "assistant":
        text = without_end_tokens(text)
    return Turn(role=role, text=text, images=images)


def _content(content: Any) -> tuple[str, tuple[Any, ...]]:
    """The text of a message with its markers, and what it says of its images."""
    if content is None or isinstance(content, str):
        return content or "", ()
    blocks = [content] if isinstance(content, Mapping) else content
    if not isinstance(blocks, Sequence) or isinstance(blocks, (bytes, bytearray)):
        raise malformed(f"expected a message's text or blocks, found {content!r:.60}")
    read = [_block(block) for block in blocks]
    images = [image for _, shown in read for image in shown]
    says = any(image is not None for image in images)
    return "".join(text for text, _ in read), tuple(images) if says else ()


def _block(block: Any) -> tuple[str, list[Any]]:
    """The text of a block with its markers, and what it says of the image of each."""
    if isinstance(block, str):
        return block, [None] * block.count(IMAGE)
    if not isinstance(block, Mapping):
        raise malformed(f"expected a block of type image or text, found {block!r:.60}")
    given = {name: value for name, value in block.items() if value is not None}
    kind = given.get("type")
    if kind is None and given.keys() <= {"text", *_HELD}:  # Qwen's {"image": ...}, {"text": ...}
        kind = "text" if "text" in given else "image"
    if kind in _TEXT_BLOCKS:
        text = str(given.get("text", ""))
        return text, [None] * text.count(IMAGE)
    if kind not in _IMAGE_BLOCKS:
        raise malformed(f"expected a block of type image or text, found {block!r:.60}")
    held = {name: given[name] for name in _HELD if name in given}
    if not held and isinstance(given.get("index"), int):
        return IMAGE, [Position(given["index"])]
    return IMAGE, [held or None]


def _spelled_out(text: str) -> Any:
    """A message or messages that a table keeps as JSON text, or as Python prints them; any other
    text as it is.

    Raises:
        UnusableRowError: they are written in another way, such as NumPy's.
    """
    if not _PRINTED.match(text):
        return text
    try:
        try:
            found = parse_json(text, "messages")
        except DataError:
            found = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise malformed(
            f"messages as a text that is neither JSON nor Python, as NumPy prints them: "
            f"{text!r:.60}. Keep them as a list, or write them with json.dumps"
        ) from None
    spoken = found if isinstance(found, list) else [found]
    alike = all(isinstance(one, Mapping) and {"role", "from"} & set(one) for one in spoken)
    return found if alike else text
