"""`diffalign evaluate amber`: free descriptions and yes-or-no questions about the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.benchmarks.amber import files, rules
from diffalign.benchmarks.base import AbstractBenchmark
from diffalign.benchmarks.report import Counted, Measure, Panel, Report, edge_notes, panel
from diffalign.benchmarks.saved_responses import empty_notes
from diffalign.generation.responses import Asked, Asking, ImageQuestion, ask, check_one_source
from diffalign.intervals import Bootstrap, Tally
from diffalign.models.base import AbstractModel
from diffalign.response_rules.words import (
    SPACY_MODEL,
    NounsName,
    SimilarityName,
    noun_extractor,
    similarity,
)


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
    """Text after each yes-or-no question to a model."""
    nouns: NounsName = "nltk"
    """nltk, as published; spacy; or relation, which takes every word of `relation.json` for a noun
    and needs nothing. Descriptions alone need it."""
    similarity: SimilarityName = "spacy"
    """spacy, as published; or equality, which needs nothing. Descriptions alone need it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_source(self.responses, self.model, self.asking, name="responses")
        if self.asking is not None and not self.queries:
            raise ValueError("to ask a model, give queries=[FILE, ...]: what it is asked")

    @property
    def kept(self) -> tuple[Path, ...]:
        return () if self.asking is None else (self.asking.saves,)

    def plan(self) -> str:
        return f"{self.responses or 'the model'} against {self.annotations}"

    def report(self) -> Report:
        annotations = files.read_annotations(self.annotations)
        queries = files.read_queries(self.queries)
        saved = None
        if self.responses is not None:
            saved = files.read_responses(self.responses, annotations)
        ids = queries if saved is None else saved
        scenes = [scene for i, scene in annotations.scenes.items() if i in ids]
        # Language data is asked for only where it is needed, and then before the model is.
        check = self._description_check(annotations) if scenes else None
        responses = self._ask(annotations, queries) if saved is None else saved
        described = [check(scene, responses[scene.item_id]) for scene in scenes] if check else []
        answered = [
            rules.CheckedResponse(question=question, response=responses[item_id])
            for item_id, question in annotations.questions.items()
            if item_id in responses
        ]
        cluster_of = {i: queries[i].image if i in queries else f"item {i}" for i in responses}
        clusters = list(dict.fromkeys(cluster_of.values()))

        whole: list[Panel] = []
        parts: dict[str, Panel] = {}
        descriptions = rules.description_tally(described, clusters, cluster_of)
        if described:
            whole.append(
                panel(descriptions, rules.DESCRIPTION_MEASURES, self.bootstrap, names=clusters)
            )
        by_dimension = {
            dimension: rules.response_tally(
                [a for a in answered if a.question.dimension == dimension], clusters, cluster_of
            )
            for dimension in dict.fromkeys(files.DIMENSIONS.values())
        }
        checked = _sum(by_dimension.values())
        if answered:
            whole.append(panel(checked, rules.response_measures(), self.bootstrap, names=clusters))
            for name, (dimensions, measures) in rules.PARTS.items():
                tally = _sum(by_dimension[d] for d in dimensions)
                if tally["questions"].sum():
                    parts[name] = panel(tally, measures, self.bootstrap)
        if described and answered:
            whole.append(_score(descriptions, checked, self.bootstrap, clusters))
        figures = _next_to(whole)
        return Report(
            benchmark="amber",
            whole=figures,
            parts=parts,
            settings=self._settings(bool(described)),
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
        self, annotations: files.Annotations, queries: Mapping[int, files.Query]
    ) -> dict[int, str]:
        asked = self._to_ask(annotations, queries)
        checked = ask(asked.model, asked.questions, asked.asking)
        return {
            int(i): rules.yes_or_no(text) if int(i) in annotations.questions else text
            for i, text in checked.items()
        }

    def asked(self) -> Asked | None:
        if self.responses is not None:
            return None
        return self._to_ask(
            files.read_annotations(self.annotations), files.read_queries(self.queries)
        )

    def check_to_ask(self) -> None:
        annotations = files.read_annotations(self.annotations)
        if annotations.scenes.keys() & files.read_queries(self.queries).keys():
            self._description_check(annotations)

    def _to_ask(self, annotations: files.Annotations, queries: Mapping[int, files.Query]) -> Asked:
        assert self.asking is not None  # __post_init__ checked
        questions = [
            ImageQuestion(
                question_id=str(i),
                image=self.asking.images / query.image,
                text=query.text + self.yes_no_suffix * (i in annotations.questions),
            )
            for i, query in queries.items()
        ]
        return Asked(model=self.model, questions=questions, asking=self.asking)

    def _description_check(
        self, annotations: files.Annotations
    ) -> Callable[[files.Scene, str], rules.CheckedDescription]:
        relations = files.read_relations(self.relation, annotations)
        safe_words = files.read_safe_words(self.safe_words)
        nouns_of = noun_extractor(self.nouns, relations.words)
        similar = similarity(self.similarity)

        def check(scene: files.Scene, response: str) -> rules.CheckedDescription:
            return rules.check_description(
                scene,
                response,
                nouns_of(response),
                relations=relations,
                safe_words=safe_words,
                similar=similar,
            )

        return check

    def _settings(self, described: bool) -> dict[str, Any]:
        nouns = {
            "nltk": "nltk, tagged and lemmatised",
            "spacy": SPACY_MODEL,
            "relation": "words of relation.json (stand-in)",
        }
        alike = {"spacy": SPACY_MODEL, "equality": "equality (stand-in)"}
        settings = {"positive": "no", **(self.asking.figures_depend_on if self.asking else {})}
        if described:
            settings |= {"nouns": nouns[self.nouns], "similarity": alike[self.similarity]}
        return settings

    def _notes(self, described: bool, answered: list[rules.CheckedResponse]) -> list[str]:
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


def _silent(described: Sequence[rules.CheckedDescription]) -> list[str]:
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
    return {name: np.sum([t[name] for t in stacked], axis=0) for name in rules.RESPONSE_COUNTS}


def _score(
    descriptions: Tally, checked: Tally, bootstrap: Bootstrap, clusters: Sequence[str]
) -> Panel:
    """The mean of 100 - CHAIR and of F1, in percent, as the paper sums both tasks up."""
    chair = rules.DESCRIPTION_MEASURES["chair"].statistic
    f1 = rules.response_measures()["f1"].statistic
    measure = Measure("AMBER score", "percent", lambda t: (100 - chair(t) + f1(t)) / 2)
    both = {**descriptions, **checked}
    scored = panel(both, {"amber_score": measure}, bootstrap, names=clusters)
    return replace(scored, counts={})


def _next_to(panels: Iterable[Panel]) -> Panel:
    """Several panels as one."""
    parts = list(panels)
    return Panel(
        figures={name: figure for part in parts for name, figure in part.figures.items()},
        counts={name: count for part in parts for name, count in part.counts.items()},
        clusters=min(part.clusters for part in parts),
        counted=_counted_together(parts),
    )


def _counted_together(panels: Sequence[Panel]) -> Counted | None:
    """The counts of several panels of the same clusters; their names differ."""
    counted = [part.counted for part in panels if part.counted is not None]
    if not counted:
        return None
    return Counted(
        names=counted[0].names,
        tally={name: counts for of in counted for name, counts in of.tally.items()},
        measures={name: measure for of in counted for name, measure in of.measures.items()},
    )
