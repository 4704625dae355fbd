"""Questions about one of several images, and responses of a model that looked at another one.

MIA-DPO: a question about one image becomes one about several, of which the others are unrelated:
in a sequence, in a grid, or within another image. The chosen response is that of the data set, the
rejected one the model's own, kept only where little of its attention was on the image that was
asked about, where it was not sure of itself, and where the two differ.

Source: Liu et al. 2024, arXiv:2410.17637; Liuziyu77/MIA-DPO, gen_data. Departures: noise is clamped
to bytes, where the authors' cast wraps it; the form and the number of images are sampled uniformly
from `keep_below` for every question; images come from all of the data set. The filters by length
ratio and edit distance, which the paper mentions, are not in the authors' code and not here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from PIL import Image
from torch import Tensor

from diffalign.data.responses.questions import Question, Unmade
from diffalign.data.responses.records import IMAGE, Turn
from diffalign.data.skipping import UnusableRowError
from diffalign.errors import DataError, ModelError
from diffalign.generation.writing import Request, Written, perplexity
from diffalign.ranges import AtLeast
from diffalign.seeding import derive_seed
from diffalign.synthesis import layouts
from diffalign.synthesis.attention import attention_to_images, check_layer
from diffalign.synthesis.base import (
    SAME_RESPONSE,
    AbstractSynthesis,
    Context,
    Made,
    Maker,
    UnsuitedError,
    check_one_image,
    prepared,
    response_to,
)

LONG_RESPONSE = "response of the data set too long"
SURE = "the model is sure of its response"
LOOKED_RIGHT = "the model looked at the right image"
NEVER_READ = "response of one token, for which no attention is counted"
_ATTEMPTS = 20
"""How often another image is sampled where one cannot be used."""
_SEQUENCE_LENGTHS = range(2, 6)


def _published_thresholds() -> dict[str, dict[str, float]]:
    return {
        "sequence": {"2": 0.8, "3": 0.7, "4": 0.6, "5": 0.6},
        "grid": {"2": 0.7, "3": 0.6, "4": 0.5, "6": 0.4, "9": 0.3},
        "pic_in_pic": {"2": 0.8},
    }


@dataclass(frozen=True)
class _Shown:
    """A question that has become one about several images."""

    form: str
    target: int
    """Place of the image that is asked about, from 0."""
    count: int
    images: tuple[str, ...] | Image.Image
    """Images of the row: names of the images of a sequence, or the one collage."""
    prompt: str
    request: Request
    """With the noise under which the model responses."""


@dataclass(frozen=True, kw_only=True)
class Collage(AbstractSynthesis):
    """The response of the data set next to one of a model that looked elsewhere."""

    form: ClassVar[str] = "mia_dpo"
    image_columns: ClassVar[tuple[str, ...]] = ("image",)

    keep_below: dict[str, dict[str, float]] = field(default_factory=_published_thresholds)
    """Form -> number of images -> share of the attention on the image that was asked about,
    below which a pair is kept (for a sequence also at it). Forms are sequence (2 to 5 images),
    grid (2, 3, 4, 6, 9) and pic_in_pic (2); one is sampled for each question."""
    layer: Annotated[int, AtLeast(0)] = 16
    """Of the language model, from 0, whose attention counts; 16 is for 32 layers."""
    min_perplexity: float = 1.1
    """exp(-mean log-probability of the most probable token) above which a pair is kept."""
    max_response_characters: int = 512
    """A question is left out whose response in the data set has as many or more."""
    grid_noise: float = 225.0
    """Standard deviation, in levels of 0 to 255, of the noise on the cell that is asked about
    while the model responses; the row has the collage without it."""
    pic_in_pic_noise: float = 49.0
    """The same on the whole image."""
    centre_prompts: tuple[str, ...] = (
        "For the image in the center, ",
        "In the image in the center, ",
    )
    """Beginnings of a question about an image within another; one is sampled. Ours."""
    max_new_tokens: Annotated[int, AtLeast(2)] = 512
    """Of the model's response, which is greedy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.keep_below or not all(self.keep_below.values()):
            raise ValueError("keep_below must have a form, and each form a number of images")
        for form, thresholds in self.keep_below.items():
            allowed = _COUNTS.get(form)
            if allowed is None:
                raise ValueError(
                    f"keep_below has the form {form!r}; there are {', '.join(_COUNTS)}"
                )
            for count in thresholds:
                if not count.isdecimal() or int(count) not in allowed:
                    raise ValueError(
                        f"keep_below.{form} has {count!r} images; a {form} has "
                        f"{', '.join(map(str, allowed))}"
                    )
        if not self.centre_prompts:
            raise ValueError("centre_prompts must have one at least")

    def open(self, context: Context) -> Maker:
        check_layer(context.writer, self.layer)
        if len(context.questions) < 2:
            raise DataError("a collage needs images of other questions, and there is one")

        def make(questions: Sequence[Question]) -> list[Made | Unmade]:
            shown, results = prepared(questions, lambda question: self._show(question, context))
            requests = [some.request for some in shown.values()]
            written = context.writer.write(requests, max_new_tokens=self.max_new_tokens)
            answered = dict(zip(shown, written, strict=True))
            asked = [question for question in questions if question.sample_id in shown]
            made, unsuited = prepared(
                asked,
                lambda question: self._judge(
                    question, shown[question.sample_id], answered[question.sample_id], context
                ),
            )
            results |= unsuited | made
            return [results[question.sample_id] for question in questions]

        return make

    def _show(self, question: Question, context: Context) -> _Shown:
        check_one_image(question)
        response = response_to(question)
        if len(response) >= self.max_response_characters:
            raise UnsuitedError(LONG_RESPONSE, f"{len(response)} characters")
        path = (context.seed, question.sample_id)
        choices = [(form, int(n)) for form, counts in self.keep_below.items() for n in counts]
        form, count = choices[derive_seed(*path, "form") % len(choices)]
        own = context.image(question.images[0])
        others, names = _companions(question, count - 1, context)
        target = derive_seed(*path, "place") % count
        images = (*others[:target], own, *others[target:])
        noise = derive_seed(*path, "noise")
        kept: tuple[str, ...] | Image.Image
        if form == "sequence":
            kept = (*names[:target], context.images.name(question.images[0]), *names[target:])
            prompt = sequence_prompt(question.text, target=target, count=count)
            seen = images
        elif form == "grid":
            kept = layouts.grid(images)
            prompt = f"{IMAGE}\nIn Image{target + 1}, {lowered(question.text)}"
            shape = layouts.GRIDS[count]
            seen = (layouts.noisy_cell(kept, shape, target, sigma=self.grid_noise, seed=noise),)
        else:
            kept = layouts.image_in_image(others[0], own)
            begin = self.centre_prompts[derive_seed(*path, "begin") % len(self.centre_prompts)]
            prompt = f"{IMAGE}\n{begin}{lowered(question.text)}"
            seen = (layouts.noisy(kept, sigma=self.pic_in_pic_noise, seed=noise),)
        request = self._request(prompt, seen, context)
        return _Shown(form, target, count, kept, prompt, request)

    def _request(self, prompt: str, images: Sequence[Image.Image], context: Context) -> Request:
        encoded = context.writer.prompt([Turn(role="user", text=prompt)], images)
        request = context.writer.ask(encoded)
        context.writer.check_length(request, self.max_new_tokens)
        return request

    def _judge(self, question: Question, shown: _Shown, written: Written, context: Context) -> Made:
        chosen, rejected = response_to(question), written.text.strip()
        if not rejected or rejected == chosen:
            raise UnsuitedError(SAME_RESPONSE, repr(rejected)[:60])
        unsure = perplexity(written.confidence)
        if unsure <= self.min_perplexity:
            raise UnsuitedError(SURE, f"perplexity {unsure:.3f}")
        if len(written.tokens) < 2:
            raise UnsuitedError(NEVER_READ, repr(rejected)[:60])
        maps = attention_to_images(context.writer, shown.request, written, layer=self.layer)
        share = target_share(shown, maps)
        threshold = self.keep_below[shown.form][str(shown.count)]
        kept = share <= threshold if shown.form == "sequence" else share < threshold
        if not kept:
            raise UnsuitedError(LOOKED_RIGHT, f"{share:.3f} of its attention in a {shown.form}")
        names = shown.images
        if isinstance(names, Image.Image):
            names = (context.images.save(names),)
        return Made(
            sample_id=question.sample_id,
            values={
                "image": list(names),
                "prompt": shown.prompt,
                "chosen": chosen,
                "rejected": rejected,
                "gt": chosen,
                "collage": shown.form,
                "target": shown.target + 1,
                "attention": round(share, 4),
                "perplexity": round(unsure, 4),
            },
        )


_COUNTS: dict[str, tuple[int, ...]] = {
    "sequence": tuple(_SEQUENCE_LENGTHS),
    "grid": tuple(layouts.GRIDS),
    "pic_in_pic": (2,),
}


def sequence_prompt(question: str, *, target: int, count: int) -> str:
    """`Image1:<image>`, `Image2:<image>`, ... each on its line, then the question about one.

    Args:
        question: without markers.
        target: place of the image that is asked about, from 0.
        count: number of images.
    """
    images = "".join(f"Image{number + 1}:{IMAGE}\n" for number in range(count))
    return f"{images}In Image{target + 1}, {lowered(question)}"


def lowered(question: str) -> str:
    """The question as it goes on after a comma."""
    return question[:1].lower() + question[1:]


def target_share(shown: _Shown, maps: Sequence[Tensor]) -> float:
    """The share of the attention on images that falls on the one that was asked about.

    Args:
        shown: what was asked.
        maps: attention to the image tokens of each image of the prompt, [N] each.

    Raises:
        ModelError: the image tokens of a collage are not laid out as one rectangle.
    """
    if shown.form == "sequence":
        means = [float(values.double().mean()) for values in maps]
        return means[shown.target] / sum(means)
    values = maps[0].reshape(_rectangle(shown.request, len(maps[0])))
    if shown.form == "grid":
        return layouts.cell_share(values, layouts.GRIDS[shown.count], shown.target)
    return layouts.centre_share(values)


def _rectangle(request: Request, tokens: int) -> tuple[int, int]:
    """Rows and columns of the image tokens of the only image."""
    patches = request.image_inputs.get("image_grid_thw")
    if patches is not None:
        rows, columns = patches[0, 1:].tolist()
        merged = math.isqrt(rows * columns // tokens)
        return rows // merged, columns // merged
    side = math.isqrt(tokens)
    if side * side != tokens or "image_sizes" in request.image_inputs:  # tiles of LLaVA-NeXT
        raise ModelError(
            f"an image has {tokens} image tokens, which lie in no single rectangle: the attention "
            f"on parts of a collage cannot be told. Take LLaVA-1.5 or Qwen2-VL, or keep sequences "
            f"alone in keep_below"
        )
    return side, side


def _companions(
    question: Question, count: int, context: Context
) -> tuple[tuple[Image.Image, ...], tuple[str, ...]]:
    """Images of other questions, sampled without repetition, and their names.

    Raises:
        UnsuitedError: too few could be used.
    """
    images: dict[str, Image.Image] = {}
    own = context.images.name(question.images[0])
    for attempt in range(count * _ATTEMPTS):
        if len(images) == count:
            break
        sampled = derive_seed(context.seed, question.sample_id, "companion", attempt)
        other = context.questions[sampled % len(context.questions)]
        if not isinstance(other, Question) or len(other.images) != 1:
            continue
        try:
            image = context.image(other.images[0])
        except UnusableRowError:
            continue  # its own question will say so
        name = context.images.name(other.images[0])
        if name != own:
            images[name] = image
    if len(images) < count:
        raise UnsuitedError("too few other images", f"{len(images)} of {count}")
    return tuple(images.values()), tuple(images)
