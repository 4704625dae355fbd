"""`diffalign evaluate chair`: objects that captions mention and images do not show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffalign.benchmarks.base import AbstractBenchmark
from diffalign.benchmarks.chair.rules import chair_panel, read_captions
from diffalign.benchmarks.report import Report, edge_notes
from diffalign.benchmarks.saved_responses import empty_notes, known_image_ids
from diffalign.data.responses.coco import KnownIds, image_file, image_number
from diffalign.generation.responses import Asked, Asking, ImageQuestion, ask, check_one_source
from diffalign.models.base import AbstractModel
from diffalign.response_rules.coco_objects import ObjectWords, read_image_objects, read_synonyms
from diffalign.response_rules.mentions import Caption, CheckedCaption, check
from diffalign.response_rules.words import (
    SingulariserName,
    TokeniserName,
    singulariser,
    tokeniser,
)


@dataclass(frozen=True, kw_only=True)
class Chair(AbstractBenchmark):
    """CHAIR of saved captions; `rules` has the rules and their source."""

    captions: Path | None = None
    """Saved captions, `{image_id, caption}`, one a line or a JSON list; null asks the model."""
    model: AbstractModel | None = None
    """The model to ask where there are no saved captions."""
    asking: Asking | None = None
    """How it is asked."""
    prompt: str = "Please describe this image in detail."
    """The question about every image of `objects`."""
    objects: Path
    """Classes in each image: a JSON object `{image_id: [class, ...]}`."""
    synonyms: Path
    """The table of classes: `data/synonyms.txt` of LisaAnne/Hallucination."""
    refined: bool = False
    """Take blanks off the table's entries, so that `motor bike` and `cheesecake` are found too;
    published figures are made without."""
    tokeniser: TokeniserName = "rules"
    """rules, which need nothing; or nltk, as published."""
    singulariser: SingulariserName = "rules"
    """rules, which need nothing; or textblob, which carries the function that was published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_source(self.captions, self.model, self.asking, name="captions")

    @property
    def kept(self) -> tuple[Path, ...]:
        return () if self.asking is None else (self.asking.saves,)

    def plan(self) -> str:
        source = self.captions or (self.asking and self.asking.saves)
        return f"{source} against {self.objects}, words of {self.synonyms}"

    def report(self) -> Report:
        synonyms = read_synonyms(self.synonyms, refined=self.refined)
        objects_of = ObjectWords(
            synonyms=synonyms,
            tokenise=tokeniser(self.tokeniser),
            singularise=singulariser(self.singulariser),
        )
        objects = read_image_objects(self.objects, synonyms)
        captions = self._captions(objects)
        if self.captions is not None:
            ids = known_image_ids(
                [caption.image_id for caption in captions],
                KnownIds(objects),
                path=self.captions,
                truth=self.objects,
            )
            captions = [replace(c, image_id=i) for c, i in zip(captions, ids, strict=True)]
        checked = [
            check(caption, objects[caption.image_id], objects_of)
            for caption in captions
            if caption.image_id in objects
        ]
        whole = chair_panel(checked, self.bootstrap)
        captioned = {caption.image_id for caption in captions}
        return Report(
            benchmark="chair",
            whole=whole,
            settings={
                "tokeniser": self.tokeniser,
                "singulariser": self.singulariser,
                "synonyms": "refined" if self.refined else "published",
                **({"prompt": self.prompt, **self.asking.figures_depend_on} if self.asking else {}),
            },
            left_out={
                "captions of images without objects": [
                    c.image_id for c in captions if c.image_id not in objects
                ],
                "images without a caption": [i for i in objects if i not in captioned],
            },
            notes=[*_notes(checked), *edge_notes(whole)],
            bootstrap=self.bootstrap,
            details=[caption.row() for caption in checked],
        )

    def _captions(self, objects: Mapping[str, frozenset[str]]) -> list[Caption]:
        if self.captions is not None:
            return read_captions(self.captions)
        asked = self._to_ask(objects)
        responses = ask(asked.model, asked.questions, asked.asking)
        return [Caption(image_id=image_id, text=text) for image_id, text in responses.items()]

    def asked(self) -> Asked | None:
        if self.captions is not None:
            return None
        synonyms = read_synonyms(self.synonyms, refined=self.refined)
        return self._to_ask(read_image_objects(self.objects, synonyms))

    def _to_ask(self, objects: Mapping[str, frozenset[str]]) -> Asked:
        assert self.asking is not None  # __post_init__ checked
        questions = [
            ImageQuestion(
                question_id=image_id,
                image=coco_image(self.asking.images, image_id),
                text=self.prompt,
            )
            for image_id in objects
        ]
        return Asked(model=self.model, questions=questions, asking=self.asking)


def coco_image(folder: Path, image_id: str) -> Path:
    """The file of an image of COCO: under the name that it goes by, or any that COCO has for it."""
    number = image_number(image_id)
    named = image_file(folder, image_id)
    if named.is_file() or number is None:
        return named
    return folder / f"COCO_val2014_{number:012d}.jpg"


def _notes(checked: Sequence[CheckedCaption]) -> list[str]:
    silent = sum(not caption.mentions for caption in checked)
    notes = empty_notes([item.caption.text for item in checked])
    if silent:
        notes.append(
            f"{silent:,} of {len(checked):,} captions mention no object of the table and so cannot "
            f"hallucinate: CHAIR-s counts them as free of it, and CHAIR-i does not see them."
        )
    return notes
