"""The chat template of a processor, learned by a probe: how it shows turns, and ends a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.data.responses.records import IMAGE, Turn
from diffalign.errors import ModelError

WHOLE_TEXT = {"padding": False, "truncation": False}
"""For every call of a tokenizer, whatever its own settings say."""


@dataclass(frozen=True)
class Frame:
    """The text that a chat template puts around a response."""

    before: str
    """Between the generation prompt and the response; a space, as a rule."""
    end: str
    """After the response, up to and with the token that ends it."""


class ChatTemplate:
    """Renders conversations as a model's own template does."""

    def __init__(self, processor: Any) -> None:
        """Learn the template.

        Args:
            processor: of transformers, with a tokenizer and a template.

        Raises:
            ModelError: it has no template, or one that cannot be followed.
        """
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._template = _chat_template(processor)
        self.marker = self._find_marker()
        """The text that the template writes where an image is."""
        self._keeps_order = self._images_stay_between_texts()
        self.frame = self._find_frame()
        """The text around a response."""

    def render(
        self, turns: Sequence[Turn], *, response: str | None = None, generation: bool = False
    ) -> str:
        """Show turns as text.

        Args:
            turns: with `IMAGE` where images are.
            response: of the assistant to them; None leaves it out.
            generation: whether to end where the response starts.
        """
        messages = [{"role": turn.role, "content": self._parts(turn.text)} for turn in turns]
        if response is not None:
            messages.append({"role": "assistant", "content": [_text(response)]})
        return self._apply(messages, generation=generation)

    def _apply(self, messages: list[dict[str, Any]], *, generation: bool = False) -> str:
        rendered = self._processor.apply_chat_template(
            messages, chat_template=self._template, add_generation_prompt=generation
        )
        return str(rendered)

    def _parts(self, text: str) -> list[dict[str, str]]:
        """The content of a turn as templates take it.

        A template that puts all images first (LLaVA-1.5's) would lose their places between
        texts; there the marker is written into the text. White space between images and a text
        on one side of them is a matter of layout, and left to the template.
        """
        pieces = text.split(IMAGE)
        between = sum(bool(piece.strip()) for piece in pieces) > 1
        if between and not self._keeps_order:
            return [_text(text.replace(IMAGE, self.marker))]
        parts = []
        for position, piece in enumerate(pieces):
            if position:
                parts.append({"type": "image"})
            piece = piece if between else piece.strip()
            if piece:
                parts.append(_text(piece))
        return parts

    def _find_marker(self) -> str:
        """The token that the template writes where an image is."""
        shown = self._apply([{"role": "user", "content": [{"type": "image"}, _text("Why?")]}])
        names = ("image_token", "boi_token")  # Gemma 3 expands the one that begins an image
        tokens = [getattr(self._processor, name, None) for name in names]
        found = [token for token in tokens if token and shown.count(token) == 1]
        if not found:
            raise ModelError(
                f"the chat template writes {shown!r} for a turn with an image, in which none of "
                f"{type(self._processor).__name__}'s image tokens ({tokens}) is once"
            )
        return str(found[0])

    def _images_stay_between_texts(self) -> bool:
        content = [_text("before"), {"type": "image"}, _text("after")]
        shown = self._apply([{"role": "user", "content": content}])
        return shown.index("before") < shown.index(self.marker) < shown.index("after")

    def _find_frame(self) -> Frame:
        question, response = [Turn(role="user", text="Why?")], "Because."
        prompt = self.render(question, generation=True)
        whole = self.render(question, response=response)
        if not whole.startswith(prompt) or response not in whole[len(prompt) :]:
            raise ModelError(
                f"the chat template renders a prompt as {prompt!r} and the same with a response as "
                f"{whole!r}, which does not continue it: what a model should generate is unclear"
            )
        before, _, after = whole[len(prompt) :].partition(response)
        return Frame(before, self._end(after))

    def _end(self, after: str) -> str:
        """The text that ends a response, from the text that the template puts after it.

        It is the first special token of that text; where there is none (LLaVA-1.5), the
        tokenizer's end-of-sequence token, without the white space of the template.
        """
        added = self._tokenizer.added_tokens_decoder
        specials = {*self._tokenizer.all_special_ids, *(i for i in added if added[i].special)}
        ids = self._tokenizer(after, add_special_tokens=False, **WHOLE_TEXT)["input_ids"]
        end = next((i for i in ids if i in specials), self._tokenizer.eos_token_id)
        if end is None:
            raise ModelError(
                "neither the chat template nor the tokenizer has a token that ends a response; "
                "set eos_token in tokenizer_config.json"
            )
        token = str(self._tokenizer.convert_ids_to_tokens(end))
        head, found, _ = after.partition(token)
        return head + found if found else token


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _chat_template(processor: Any) -> str | None:
    """None where the processor has one; otherwise that of its tokenizer."""
    if getattr(processor, "chat_template", None):
        return None
    template = getattr(processor.tokenizer, "chat_template", None)
    if not template:
        raise ModelError(
            "the checkpoint has no chat template, and prompts cannot be guessed. Put the "
            "chat_template.jinja (or chat_template.json) of the model's authors next to its "
            "processor_config.json"
        )
    return str(template)
