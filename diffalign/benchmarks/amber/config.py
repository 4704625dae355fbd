"""`diffalign evaluate amber`: free descriptions and yes-or-no questions about the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.benchmarks.amber import rules as amber
from diffalign.benchmarks.base import AbstractBenchmark
from diffalign.benchmarks.nouns import (
    SPACY_MODEL,
    NounsName,
    SimilarityName,
    noun_extractor,
    similarity,
)
from diffalign.benchmarks.report import Measure, Panel, Report, edge_notes, panel
from diffalign.benchmarks.saved_responses import empty_notes
from diffalign.generation.responses import Asking, ImageQuestion, ask, check_one_source
from diffalign.intervals import Bootstrap, Tally
from diffalign.models.base import AbstractModel


@dataclass(frozen=True, kw_only=True)
class Amber(AbstractBenchmark):
    """AMBER of saved responses; `rules` has the rules and their source."""

    responses: Path | None = None
    """Saved responses, `{id, response}` of either task or both, a JSON list or one a line; null
    asks the model."""
    model: AbstractModel | None = None
    """The model to ask where there are no saved responses."""
    asking: Asking | None = None
    """How it is asked."""
    annotations: Path
    """The published `annotations.json`."""
    relation: Path
    """The published `relation.json`."""
    safe_words: Path
    """The published `safe_words.txt`."""
    queries: tuple[Path, ...] = ()
    """The published queries that were or will be asked. They say which responses share an image;
    without them the bootstrap has to take every response for an image of its own."""
    yes_no_suffix: str = " Please answer yes or no."
    """What a model is asked besides a yes-or-no question."""
    nouns: NounsName = "nltk"
    """nltk, as published; spacy; or relation, which takes every word of `relation.json` for a noun
    and needs nothing. Descriptions alone need it."""
    similarity: SimilarityName = "spacy"
    """spacy, as published; or equality, which needs nothing. Descriptions alone need it."""
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    """How intervals are made."""
    details: Path | None = None
    """JSON lines for what was found in each response; null writes none."""

    def __post_init__(self) -> None:
        check_one_source(self.responses, self.model, self.asking, name="responses")
        if self.model is not None and not self.queries:
            raise ValueError("to ask a model, give queries=[FILE, ...]: what it is asked")

    @property
    def saves(self) -> Path | None:
        return self.details

    def plan(self) -> str:
        return f"{self.responses or 'the model'} against {self.annotations}"

    def report(self) -> Report:
        annotations = amber.read_annotations(self.annotations)
        queries = amber.read_queries(self.queries)
        saved = None
        if self.responses is not None:
            saved = amber.read_responses(self.responses, annotations)
        ids = queries if saved is None else saved
        scenes = [scene for i, scene in annotations.scenes.items() if i in ids]
        # Language data is asked for only where it is needed, and then before the model is.
        judge = self._description_judge(annotations) if scenes else None
        responses = self._ask(annotations, queries) if saved is None else saved
        described = [judge(scene, responses[scene.item_id]) for scene in scenes] if judge else []
        answered = [
            amber.JudgedResponse(question=question, response=responses[item_id])
            for item_id, question in annotations.questions.items()
            if item_id in responses
        ]
        cluster_of = {i: queries[i].image if i in queries else f"item {i}" for i in responses}
        clusters = list(dict.fromkeys(cluster_of.values()))

        whole: list[Panel] = []
        parts: dict[str, Panel] = {}
        descriptions = amber.description_tally(described, clusters, cluster_of)
        if described:
            whole.append(panel(descriptions, amber.DESCRIPTION_MEASURES, self.bootstrap))
        by_dimension = {
            dimension: amber.response_tally(
                [a for a in answered if a.question.dimension == dimension], clusters, cluster_of
            )
            for dimension in dict.fromkeys(amber.DIMENSIONS.values())
        }
        judged = _sum(by_dimension.values())
        if answered:
            whole.append(panel(judged, amber.response_measures(), self.bootstrap))
            for name, (dimensions, measures) in amber.PARTS.items():
                tally = _sum(by_dimension[d] for d in dimensions)
                if tally["questions"].sum():
                    parts[name] = panel(tally, measures, self.bootstrap)
        if described and answered:
            whole.append(_score(descriptions, judged, self.bootstrap))
        figures = _next_to(whole)
        return Report(
            benchmark="amber",
            whole=figures,
            parts=parts,
            row_metadata=self._facts(bool(described)),
            left_out={
                "descriptions that were not given": [
                    str(i) for i in annotations.scenes if i not in responses
                ],
                "questions without a response": [
                    str(i) for i in annotations.questions if i not in responses
                ],
            },
            notes=[
                *self._notes(bool(described), answered),
                *empty_notes([*(d.response for d in described), *(a.response for a in answered)]),
                *_silent(described),
                *edge_notes(figures),
            ],
            bootstrap=self.bootstrap,
            resampled="images" if self.queries else "responses",
            details=[*(d.row() for d in described), *(a.row() for a in answered)],
        )

    def _ask(
        self, annotations: amber.Annotations, queries: Mapping[int, amber.Query]
    ) -> dict[int, str]:
        assert self.model is not None and self.asking is not None  # __post_init__ checked
        questions = [
            ImageQuestion(
                question_id=str(i),
                image=self.asking.images / query.image,
                text=query.text + self.yes_no_suffix * (i in annotations.questions),
            )
            for i, query in queries.items()
        ]
        judged = ask(self.model, questions, self.asking)
        return {
            int(i): amber.yes_or_no(text) if int(i) in annotations.questions else text
            for i, text in judged.items()
        }

    def _description_judge(
        self, annotations: amber.Annotations
    ) -> Callable[[amber.Scene, str], amber.JudgedDescription]:
        relations = amber.read_relations(self.relation, annotations)
        safe_words = amber.read_safe_words(self.safe_words)
        nouns_of = noun_extractor(self.nouns, relations.words)
        similar = similarity(self.similarity)

        def judge(scene: amber.Scene, response: str) -> amber.JudgedDescription:
            return amber.judge_description(
                scene,
                response,
                nouns_of(response),
                relations=relations,
                safe_words=safe_words,
                similar=similar,
            )

        return judge

    def _facts(self, described: bool) -> dict[str, Any]:
        nouns = {
            "nltk": "nltk, tagged and lemmatised",
            "spacy": SPACY_MODEL,
            "relation": "words of relation.json (stand-in)",
        }
        alike = {"spacy": SPACY_MODEL, "equality": "equality (stand-in)"}
        row_metadata = {"positive": "no", **(self.asking.row_metadata if self.asking else {})}
        if described:
            row_metadata |= {"nouns": nouns[self.nouns], "similarity": alike[self.similarity]}
        return row_metadata

    def _notes(self, described: bool, answered: list[amber.JudgedResponse]) -> list[str]:
        notes = []
        if described and (self.nouns, self.similarity) != ("nltk", "spacy"):
            notes.append(
                f"nouns={self.nouns} and similarity={self.similarity} are not the published ones: "
                "CHAIR, Cover, Hal and Cog can be compared with each other, not with papers."
            )
        neither = sum(item.response not in ("Yes", "No") for item in answered)
        if neither:
            notes.append(
                f"{neither} of {len(answered)} responses are neither exactly Yes nor exactly No "
                f"and "
                "count as wrong, as published."
            )
        return notes


def _silent(described: Sequence[amber.JudgedDescription]) -> list[str]:
    silent = sum(not item.nouns for item in described)
    if not silent:
        return []
    return [
        f"{silent:,} of {len(described):,} descriptions name no object and so cannot hallucinate: "
        f"Hal counts them as free of it, and CHAIR does not see them."
    ]


def _sum(tallies: Iterable[Tally]) -> Tally:
    """Counts of several dimensions together."""
    stacked = list(tallies)
    return {name: np.sum([t[name] for t in stacked], axis=0) for name in amber.RESPONSE_COUNTS}


def _score(descriptions: Tally, judged: Tally, bootstrap: Bootstrap) -> Panel:
    """The mean of 100 - CHAIR and of F1, in percent, as the paper sums both tasks up."""
    chair = amber.DESCRIPTION_MEASURES["chair"].statistic
    f1 = amber.response_measures()["f1"].statistic
    measure = Measure("AMBER score", "percent", lambda t: (100 - chair(t) + f1(t)) / 2)
    scored = panel({**descriptions, **judged}, {"amber_score": measure}, bootstrap)
    return replace(scored, counts={})


def _next_to(panels: Iterable[Panel]) -> Panel:
    """Several panels as one."""
    parts = list(panels)
    return Panel(
        figures={name: figure for part in parts for name, figure in part.figures.items()},
        counts={name: count for part in parts for name, count in part.counts.items()},
        clusters=min(part.clusters for part in parts),
    )
