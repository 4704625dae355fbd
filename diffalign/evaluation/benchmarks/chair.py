"""`diffalign evaluate chair`: objects that captions mention and pictures do not show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffalign.errors import DataError
from diffalign.evaluation.answer_report import Report
from diffalign.evaluation.asking import Asking, PictureQuestion, ask, check_one_source
from diffalign.evaluation.benchmarks.base import AbstractBenchmark
from diffalign.evaluation.chair import (
    Caption,
    ObjectWords,
    chair_panel,
    judge,
    read_captions,
    read_image_objects,
    read_synonyms,
)
from diffalign.evaluation.intervals import Bootstrap
from diffalign.evaluation.words import (
    SingulariserName,
    TokeniserName,
    singulariser,
    tokeniser,
)
from diffalign.models.base import AbstractModel


@dataclass(frozen=True, kw_only=True)
class Chair(AbstractBenchmark):
    """CHAIR of saved captions; `diffalign.evaluation.chair` has the rules and their source."""

    captions: Path | None = None
    """Saved captions, `{image_id, caption}`, one a line or a JSON list; null asks the model."""
    model: AbstractModel | None = None
    """The model to ask where there are no saved captions."""
    asking: Asking | None = None
    """How it is asked."""
    prompt: str = "Please describe this image in detail."
    """What it is asked about every picture of `objects`."""
    objects: Path
    """What is in each picture: a JSON object `{image_id: [class, ...]}`."""
    synonyms: Path
    """The table of classes: `data/synonyms.txt` of LisaAnne/Hallucination."""
    refined: bool = False
    """Take blanks off the table's entries, so that `motor bike` and `cheesecake` are found too;
    published figures are made without."""
    tokeniser: TokeniserName = "rules"
    """rules, which need nothing; or nltk, as published."""
    singulariser: SingulariserName = "rules"
    """rules, which need nothing; or textblob, which carries the function that was published."""
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    """How intervals are made."""
    details: Path | None = None
    """JSON lines for what was found in each caption; null writes none."""

    def __post_init__(self) -> None:
        check_one_source(self.captions, self.model, self.asking, name="captions")

    @property
    def saves(self) -> Path | None:
        return self.details

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
        judged = [
            judge(caption, objects[caption.image_id], objects_of)
            for caption in captions
            if caption.image_id in objects
        ]
        if not judged:
            raise DataError(
                f"{self.captions}: {self.objects} knows none of its pictures, for example "
                f"{captions[0].image_id}"
            )
        captioned = {caption.image_id for caption in captions}
        return Report(
            benchmark="chair",
            whole=chair_panel(judged, self.bootstrap),
            facts={
                "tokeniser": self.tokeniser,
                "singulariser": self.singulariser,
                "synonyms": "refined" if self.refined else "published",
                **({"prompt": self.prompt, **self.asking.facts} if self.asking else {}),
            },
            left_out={
                "captions of pictures without objects": [
                    c.image_id for c in captions if c.image_id not in objects
                ],
                "pictures without a caption": [i for i in objects if i not in captioned],
            },
            bootstrap=self.bootstrap,
            details=[caption.row() for caption in judged],
        )

    def _captions(self, objects: Mapping[str, frozenset[str]]) -> list[Caption]:
        if self.captions is not None:
            return read_captions(self.captions)
        assert self.model is not None and self.asking is not None  # __post_init__ checked
        questions = [
            PictureQuestion(
                question_id=image_id,
                image=coco_picture(self.asking.images, image_id),
                text=self.prompt,
            )
            for image_id in objects
        ]
        answers = ask(self.model, questions, self.asking)
        return [Caption(image_id=image_id, text=text) for image_id, text in answers.items()]


def coco_picture(folder: Path, image_id: str) -> Path:
    """Where a picture of COCO lies: by its number alone or by its full name, in either split."""
    number = image_id.zfill(12)
    names = [f"COCO_val2014_{number}.jpg", f"COCO_train2014_{number}.jpg", f"{number}.jpg"]
    names += [f"{image_id}.jpg", f"{image_id}.png"]
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
