"""How well a vision-language model sees playground scenes, exactly: CHAIR, POPE and attributes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL.Image import Image

from diffalign.benchmarks.chair import rules as chair
from diffalign.benchmarks.pope import rules as pope
from diffalign.benchmarks.report import Figure, Measure, panel
from diffalign.generation.local_model import WritesResponses
from diffalign.intervals import Bootstrap, ratio
from diffalign.playground.multi_object_scenes import kinds_in, sample_multi_object_scene
from diffalign.playground.questions import (
    DESCRIBE,
    SPLITS,
    Split,
    absent_kinds,
    attribute_named,
    attribute_questions,
    existence_question,
)
from diffalign.playground.scenes import KINDS, Kind, Scene, render
from diffalign.response_rules.coco_objects import ObjectWords, Synonyms
from diffalign.response_rules.mentions import Caption, check

MAX_NEW_TOKENS = 64
"""A description of nine objects; truth has at most four."""
_AT_ONCE = 64
"""Questions asked in one batch."""


def held_out_multi_object_scenes(count: int) -> list[Scene]:
    """Scenes to measure on: no model was trained on them, no preference pair shows one."""
    return [sample_multi_object_scene((10_000_019, i)) for i in range(count)]


def name_of(kind: Kind) -> str:
    """Name of a kind among CHAIR's words, such as `red circle`."""
    return f"{kind.colour} {kind.shape}"


EXACT_NAMES = ObjectWords(
    synonyms=Synonyms({name_of(kind): name_of(kind) for kind in KINDS}),
    singularise=str,
    double_words={name_of(kind): name_of(kind) for kind in KINDS},
)
"""CHAIR's routine with the 24 kinds as classes, each of which has one name of two words."""


def evaluate_responses(
    model: WritesResponses, scenes: Sequence[Scene], *, bootstrap: Bootstrap | None = None
) -> dict[str, Figure]:
    """Greedy responses held against the ground truth, with intervals over scenes.

    Args:
        model: a loaded model, such as `VLM(...).load(...)` gives.
        scenes: what it is shown, such as `held_out_multi_object_scenes(300)`; at least two.
        bootstrap: how intervals are made; 10,000 resamples if None.

    Returns:
        In this order `chair_s`, `chair_i`, `recall`, `repetition_s` (how many name an object twice)
        and `mean_length` (words) of descriptions;
        `pope_accuracy`, `pope_f1` and `pope_yes_ratio` of the three splits together and
        `pope_SPLIT_accuracy` of each; `attribute_accuracy`. All but the length in percent.
    """
    bootstrap = bootstrap or Bootstrap()
    asker = _Asker(model, [render(scene) for scene in scenes])
    return {
        **_described(asker, scenes, bootstrap),
        **_existing(asker, scenes, bootstrap),
        **_attributes(asker, scenes, bootstrap),
    }


def describe(model: WritesResponses, scenes: Sequence[Scene]) -> list[str]:
    """A greedy description of each scene."""
    asker = _Asker(model, [render(scene) for scene in scenes])
    return asker([(number, DESCRIBE) for number in range(len(scenes))])


def answer(
    model: WritesResponses, scenes: Sequence[Scene], asked: Sequence[tuple[int, str]]
) -> list[str]:
    """Greedy responses to questions about scenes, each with the number of its scene."""
    return _Asker(model, [render(scene) for scene in scenes])(asked)


@dataclass(frozen=True)
class _Asker:
    model: WritesResponses
    images: Sequence[Image]

    def __call__(self, questions: Sequence[tuple[int, str]]) -> list[str]:
        """Greedy responses to questions about images by number."""
        responses: list[str] = []
        for start in range(0, len(questions), _AT_ONCE):
            batch = questions[start : start + _AT_ONCE]
            responses += self.model.generate(
                [self._prompt(text) for _, text in batch],
                [[self.images[number]] for number, _ in batch],
                max_new_tokens=MAX_NEW_TOKENS,
            )
        return responses

    def _prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        rendered = self.model.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return str(rendered)


def _described(asker: _Asker, scenes: Sequence[Scene], bootstrap: Bootstrap) -> dict[str, Figure]:
    responses = asker([(number, DESCRIBE) for number in range(len(scenes))])
    checked = [
        check(
            Caption(image_id=str(number), text=response),
            frozenset(map(name_of, kinds_in(scene))),
            EXACT_NAMES,
        )
        for number, (scene, response) in enumerate(zip(scenes, responses, strict=True))
    ]
    figures = chair.chair_panel(checked, bootstrap).figures
    names = ("chair_s", "chair_i", "recall", "repetition_s", "mean_length")
    return {name: figures[name] for name in names}


def _existing(asker: _Asker, scenes: Sequence[Scene], bootstrap: Bootstrap) -> dict[str, Figure]:
    questions = {split: pope_questions(scenes, split) for split in SPLITS}
    asked = [(int(q.image), q.text) for of_split in questions.values() for q in of_split]
    distinct = list(dict.fromkeys(asked))  # splits share their questions about what is there
    responses = dict(zip(distinct, asker(distinct), strict=True))
    images = [str(number) for number in range(len(scenes))]
    checked: dict[str, list[pope.CheckedResponse]] = {
        split: [
            pope.CheckedResponse(question=q, response=responses[int(q.image), q.text])
            for q in of_split
        ]
        for split, of_split in questions.items()
    }

    def figures(items: Sequence[pope.CheckedResponse], title: str) -> dict[str, Figure]:
        found = panel(pope.tally(items, images), pope.MEASURES, bootstrap).figures
        return {
            name: replace(figure, label=f"{title}: {figure.label}")
            for name, figure in found.items()
        }

    whole = figures([item for of_split in checked.values() for item in of_split], "POPE")
    return {
        **{f"pope_{name}": whole[name] for name in ("accuracy", "f1", "yes_ratio")},
        **{
            f"pope_{split}_accuracy": figures(items, f"POPE {split}")["accuracy"]
            for split, items in checked.items()
        },
    }


def pope_questions(scenes: Sequence[Scene], split: Split) -> list[pope.Question]:
    """For every object of a scene, one question about it and one about an absent one."""
    return [
        pope.Question(
            question_id=f"{number}/{kind}",
            image=str(number),
            text=existence_question(kind),
            label="yes" if kind in kinds_in(scene) else "no",
        )
        for number, scene in enumerate(scenes)
        for kind in (*kinds_in(scene), *absent_kinds(scene, split, seed=number))
    ]


def _attributes(asker: _Asker, scenes: Sequence[Scene], bootstrap: Bootstrap) -> dict[str, Figure]:
    asked = [(i, q) for i, scene in enumerate(scenes) for q in attribute_questions(scene)]
    responses = asker([(number, question.text) for number, question in asked])
    tally = {name: np.zeros(len(scenes)) for name in ("questions", "right")}
    for (number, question), response in zip(asked, responses, strict=True):
        tally["questions"][number] += 1
        tally["right"][number] += attribute_named(response, question) == question.attribute
    return dict(panel(tally, {"attribute_accuracy": _ATTRIBUTES}, bootstrap).figures)


_ATTRIBUTES = Measure(
    "colours and shapes named right", "percent", lambda t: 100 * ratio(t["right"], t["questions"])
)
