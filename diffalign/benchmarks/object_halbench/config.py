"""`diffalign evaluate object_halbench`: objects that descriptions claim, listed by a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from diffalign.benchmarks.base import AbstractBenchmark
from diffalign.benchmarks.object_halbench import rules as object_halbench
from diffalign.benchmarks.object_halbench.rules import LemmasName
from diffalign.benchmarks.report import Report, edge_notes
from diffalign.benchmarks.saved_responses import (
    RESPONSE_KEYS,
    empty_notes,
    image_id_of,
    known_image_ids,
    read_objects,
    text_of,
)
from diffalign.data.responses.coco import KnownIds
from diffalign.judges.base import AbstractJudge, fill, read_template, verdicts
from diffalign.ranges import AtLeast
from diffalign.response_rules.coco_objects import (
    ObjectWords,
    Synonyms,
    read_image_objects,
    read_synonyms,
)

_QUESTION = ("question", "prompt")


@dataclass(frozen=True, kw_only=True)
class ObjectHalBench(AbstractBenchmark):
    """Object HalBench of saved responses; `rules` has the rules."""

    responses: Path
    """`{image_id, question, response}`, one a line or a JSON list."""
    objects: Path
    """Classes in each image: a JSON object `{image_id: [class, ...]}`."""
    synonyms: Path
    """The table of classes: `synonyms_refine.txt` of RLHF-V."""
    judge: AbstractJudge | None = None
    """Who lists the objects of a response, for example `judge.kind=endpoint`; null takes the words
    of the response itself, as CHAIR does, whose figures are not those of the papers."""
    verdicts: Path | None = None
    """JSON lines that keep what the judge said; a rerun asks nothing twice."""
    template: Path | None = None
    """The judge's prompt with {question} and {response}; null takes our own wording. Figures of
    papers were made with the one in RLHF-V's `eval_gpt_obj_halbench.py`."""
    attempts: Annotated[int, AtLeast(1)] = 3
    """How often the judge is asked for a reply that can be read."""
    lemmas: LemmasName = "spacy"
    """spacy, as published; or rules, which need nothing. The judge's objects alone need it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.judge is None) != (self.verdicts is None):
            raise ValueError(
                "judge and verdicts go together: verdicts=FILE.jsonl keeps what the judge says"
            )

    @property
    def kept(self) -> tuple[Path, ...]:
        return () if self.verdicts is None else (self.verdicts,)

    def plan(self) -> str:
        by = (
            "words of the responses"
            if self.judge is None
            else f"objects listed by {self.judge.name}"
        )
        return f"{self.responses} against {self.objects}, {by}"

    def report(self) -> Report:
        synonyms = read_synonyms(self.synonyms, refined=True)
        objects = read_image_objects(self.objects, synonyms)
        rows = read_objects(self.responses)
        image_ids = [
            image_id_of(row, path=self.responses, number=n) for n, row in enumerate(rows, 1)
        ]
        image_ids = known_image_ids(
            image_ids, KnownIds(objects), path=self.responses, truth=self.objects
        )
        texts = [
            text_of(row, RESPONSE_KEYS, path=self.responses, number=n)
            for n, row in enumerate(rows, 1)
        ]
        known = [n for n, image_id in enumerate(image_ids) if image_id in objects]
        claimed = self._claimed({n: texts[n] for n in known}, rows, synonyms)
        checked = [
            object_halbench.check(
                image_ids[n], texts[n], claimed[n], objects[image_ids[n]], synonyms
            )
            for n in known
            if n in claimed
        ]
        whole = object_halbench.halbench_panel(checked, self.bootstrap)
        return Report(
            benchmark="object_halbench",
            whole=whole,
            settings=self._settings(),
            left_out={
                "responses about images without objects": [
                    i for i in image_ids if i not in objects
                ],
                "responses whose list of objects could not be read": [
                    image_ids[n] for n in known if n not in claimed
                ],
            },
            notes=[
                *([] if self.judge else ["Without a judge the figures are not those of papers."]),
                *_notes(checked),
                *edge_notes(whole),
            ],
            bootstrap=self.bootstrap,
            details=[item.row() for item in checked],
        )

    def _claimed(
        self, texts: Mapping[int, str], rows: Sequence[Mapping[str, object]], synonyms: Synonyms
    ) -> dict[int, list[str]]:
        """Words of the table that each response claims, by its place."""
        doubles = object_halbench.double_words(synonyms)
        if self.judge is None or self.verdicts is None:
            words_of = ObjectWords(synonyms=synonyms, double_words=doubles)
            return {n: words_of.words(text) for n, text in texts.items()}
        phrase = object_halbench.phrases(self.lemmas)
        template = read_template(self.template, object_halbench.OWN_TEMPLATE)
        prompts = {
            str(n): fill(
                template,
                question=text_of(rows[n], _QUESTION, path=self.responses, number=n + 1),
                response=text,
            )
            for n, text in texts.items()
            if not object_halbench.is_short(text)
        }
        listed = verdicts(
            self.judge,
            prompts,
            object_halbench.parse_objects,
            saves=self.verdicts,
            attempts=self.attempts,
        )
        listed |= {str(n): [] for n in texts if str(n) not in prompts}
        return {
            int(n): object_halbench.claimed_words(names, synonyms, phrase, doubles)
            for n, names in listed.items()
        }

    def _settings(self) -> dict[str, str]:
        if self.judge is None:
            return {"objects_from": "words of the responses (stand-in)"}
        return {
            "objects_from": self.judge.name,
            "template": "own wording" if self.template is None else str(self.template.name),
            "lemmas": object_halbench.SPACY_MODEL if self.lemmas == "spacy" else "rules (stand-in)",
        }


def _notes(checked: Sequence[object_halbench.CheckedResponse]) -> list[str]:
    silent = sum(not item.claimed for item in checked)
    notes = empty_notes([item.response for item in checked])
    if silent:
        notes.append(
            f"{silent:,} of {len(checked):,} responses claim no object of COCO and are in no "
            f"denominator of the rates of hallucination, as published."
        )
    return notes
