"""AMBER: the rules on a worked example and one by one, and the published files."""

from __future__ import annotations

import json
import sys
from collections import Counter

import numpy as np
import pytest

from diffalign.benchmarks.amber.files import (
    Question,
    Relations,
    Scene,
    read_annotations,
    read_relations,
    read_responses,
    read_safe_words,
)
from diffalign.benchmarks.amber.rules import (
    DESCRIPTION_MEASURES,
    PARTS,
    CheckedResponse,
    check_description,
    description_tally,
    one_decimal,
    response_measures,
    response_tally,
)
from diffalign.errors import ConfigError, DataError
from diffalign.response_rules.words import noun_extractor, similarity
from tests.benchmarks.shared_data import shared_folder

RELATIONS = Relations(
    {
        "dog": ["puppy"],
        "cat": ["kitten"],
        "table": ["desk"],
        "tree": ["forest"],
        "car": [],
        "bird": [],
    }
)
SAFE = {"light", "line"}


def scene(truth: str, absent: str, item_id: int = 1) -> Scene:
    return Scene(item_id=item_id, truth=tuple(truth.split()), hallucinations=tuple(absent.split()))


def checked(of: Scene, nouns: str, *, relations=RELATIONS, safe=SAFE, similar=str.__eq__):
    return check_description(
        of, nouns, nouns.split(), relations=relations, safe_words=safe, similar=similar
    )


def values(measures, counts) -> dict[str, float]:
    totals = {name: np.asarray(count.sum()) for name, count in counts.items()}
    return {name: float(measure.statistic(totals)) for name, measure in measures.items()}


def test_the_worked_example():
    first = checked(scene("dog table", "cat bird", 1), "puppy cat light dog spoon car")
    second = checked(scene("car tree", "bird", 2), "car forest")
    counts = description_tally([first, second], ["one"], {1: "one", 2: "one"})
    figures = values(DESCRIPTION_MEASURES, counts)
    assert figures.pop("mean_length") == 4
    assert figures == {"chair": 33.3, "cover": 75.0, "hal": 50.0, "cog": 33.3}


def test_a_noun_of_no_relation_counts_nowhere():
    assert checked(scene("dog", "cat"), "spoon dog").nouns == ("dog",)


def test_a_safe_word_counts_as_a_noun_and_is_never_hallucinated():
    result = checked(scene("dog", "cat"), "car dog", safe={"car"})
    assert (result.nouns, result.hallucinated) == (("car", "dog"), ())


def test_a_word_covers_the_first_object_that_it_is_for_and_associations_come_first():
    relations = Relations({"road": ["ground"], "ground": [], "cat": []})
    assert checked(scene("ground road", "cat"), "ground", relations=relations).covered == {1}


def test_an_object_that_is_there_twice_is_covered_once():
    assert checked(scene("car car", "cat"), "car car").covered == {0}


def test_an_expected_object_is_hallucinated_too_unless_it_resembles_a_true_one():
    assert checked(scene("dog", "cat"), "kitten").hallucinated == ("kitten",)
    resembles = checked(
        scene("dog", "cat"), "kitten", similar=lambda a, b: {a, b} == {"kitten", "dog"}
    )
    assert resembles.hallucinated == ()
    assert resembles.covered == {0}
    assert resembles.expected == {0}


def test_a_word_that_resembles_another_expected_object_marks_both():
    result = checked(
        scene("dog", "bird cat"), "kitten", similar=lambda a, b: {a, b} == {"kitten", "bird"}
    )
    assert result.expected == {0, 1}


def test_a_true_word_is_not_compared_with_expected_ones():
    result = checked(scene("dog", "cat"), "dog", similar=lambda a, b: True)
    assert result.expected == frozenset()


def answered(*items: tuple[str, str], dimension="existence"):
    judged_responses = [
        CheckedResponse(
            question=Question(item_id=n, dimension=dimension, label=label), response=response
        )
        for n, (label, response) in enumerate(items)
    ]
    return response_tally(judged_responses, ["all"], dict.fromkeys(range(len(items)), "all"))


def test_no_is_the_positive_response_and_f1_is_made_of_rounded_figures():
    counts = answered(
        *[("no", "No")] * 4, ("no", "Yes"), ("yes", "No"), ("yes", "Yes"), ("yes", "no")
    )
    precision, recall = round(100 * 4 / 5.001, 1), round(100 * 4 / 5.001, 1)
    f1 = 2 * precision * recall / 1e4 / ((precision + recall) / 100 + 1e-4)
    assert values(response_measures(), counts) == {
        "accuracy": round(100 * 5 / 8.001, 1),
        "precision": precision,
        "recall": recall,
        "f1": round(100 * f1, 1),
    }
    assert counts["neither_yes_nor_no"].tolist() == [1]  # "no" is not exactly "No"


def test_existence_has_another_term_in_f1_and_attributes_another_start():
    counts = answered(("no", "No"), ("no", "Yes"))
    existence, attribute, state = (
        values(PARTS[name][1], counts) for name in ("existence", "attribute", "state")
    )
    assert state["precision"] == round(100 / 1.001, 1) == 99.9
    assert attribute["precision"] == round(100 / 1.003, 1) == 99.7
    assert existence["f1"] == round(100 * 2 * 0.999 * 0.5 / (1.499 + 1e-3), 1)


def test_yes_to_everything_scores_nothing():
    figures = values(response_measures(), answered(("no", "Yes"), ("yes", "Yes")))
    assert (figures["precision"], figures["recall"], figures["f1"]) == (0, 0, 0)


def test_figures_are_rounded_by_their_real_value():
    # 0.15 is a little less, 0.25 exactly halfway (to even), 0.35 a little less, 0.45 a little more
    assert one_decimal(np.array([0.15, 0.25, 0.35, 0.45])).tolist() == [0.1, 0.2, 0.3, 0.5]


def test_stand_ins_need_nothing():
    nouns = noun_extractor("relation", RELATIONS.words)
    assert nouns("Two dogs, a kitten and trees. Lights!") == ["dog", "kitten", "tree"]
    assert similarity("equality")("dog", "dog")
    assert not similarity("equality")("dog", "puppy")


@pytest.mark.parametrize("name", ["nltk", "spacy"])
def test_an_absent_library_is_named_with_its_remedy(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    said = rf"package {name}, .*pip install 'diffalign\[language\]'; .*nouns=relation"
    with pytest.raises(ConfigError, match=said):
        noun_extractor(name, ())


def test_nltk_gives_the_lemmas_of_nouns_or_says_what_it_lacks(monkeypatch):
    class Nltk:
        word_tokenize = staticmethod(str.split)

        @staticmethod
        def pos_tag(words: list[str]):
            return [(word, "NNS" if word.endswith("s") else "VBP") for word in words]

        class stem:
            class WordNetLemmatizer:
                lemmatize = staticmethod(lambda word: word.removesuffix("s"))

    monkeypatch.setitem(sys.modules, "nltk", Nltk)
    assert noun_extractor("nltk", ())("Dogs chase cats dogs") == ["Dog", "cat", "dog"]

    def without_data(words: list[str]):
        raise LookupError("Resource averaged_perceptron_tagger_eng not found")

    monkeypatch.setattr(Nltk, "pos_tag", staticmethod(without_data))
    with pytest.raises(ConfigError, match=r"nltk.downloader punkt_tab averaged_.*nouns=relation"):
        noun_extractor("nltk", ())


def test_an_absent_model_of_spacy_is_named_with_its_remedy(monkeypatch):
    class WithoutModels:
        @staticmethod
        def load(name: str):
            raise OSError(f"[E050] Can't find model {name!r}")

    monkeypatch.setitem(sys.modules, "spacy", WithoutModels)
    with pytest.raises(ConfigError, match=r"python -m spacy download en_core_web_lg; .*equality"):
        similarity("spacy")


class _Word:
    def __init__(self, text: str) -> None:
        self.text, self.lemma_, self.tag_ = text, text.removesuffix("s"), "NNS"

    def similarity(self, other: _Word) -> float:
        return 0.8 if {self.text, other.text} == {"a", "b"} else 0.81


def test_spacy_gives_lemmas_and_similarity_above_the_threshold(monkeypatch):
    class Spacy:
        @staticmethod
        def load(name: str):
            assert name == "en_core_web_lg"

            class Model:
                def __call__(self, text: str):
                    return _Word(text) if " " not in text else [_Word(w) for w in text.split()]

            return Model()

    monkeypatch.setitem(sys.modules, "spacy", Spacy)
    assert noun_extractor("spacy", ())("dogs cats") == ["dog", "cat"]
    similar = similarity("spacy")
    assert not similar("a", "b")  # exactly the threshold
    assert similar("a", "c")


def test_a_line_of_the_safe_words_ends_where_files_end_lines(tmp_path):
    path = tmp_path / "safe_words.txt"
    path.write_bytes("orange\r\n\nli\u2028ne".encode())
    assert read_safe_words(path) == {"orange", "li\u2028ne"}


def annotation_file(tmp_path, *rows):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    return path


GENERATIVE = {"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["cat"]}
RELATION = {"id": 2, "type": "relation", "truth": "no"}


def test_annotations_are_scenes_and_questions(tmp_path):
    annotations = read_annotations(annotation_file(tmp_path, GENERATIVE, RELATION))
    assert annotations.scenes == {1: scene("dog", "cat")}
    assert annotations.questions == {2: Question(item_id=2, dimension="relation", label="no")}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**RELATION, "type": "colour"}, "item 1 of type 'colour'"),
        ({**RELATION, "truth": "maybe"}, "with truth 'maybe'"),
        ({**RELATION, "id": "x"}, "id must be a whole number, got 'x'"),
    ],
)
def test_annotations_of_another_kind_are_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_annotations(annotation_file(tmp_path, row))


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    annotations = read_annotations(annotation_file(tmp_path, GENERATIVE))
    path = tmp_path / "file.json"
    path.write_text('{"dog": []}')
    with pytest.raises(DataError, match="no entry for cat"):
        read_relations(path, annotations)
    path.write_text('[{"id": 7, "response": "Yes"}]')
    with pytest.raises(DataError, match="1 ids are not annotated, for example 7"):
        read_responses(path, annotations)
    path.write_text('[{"id": 1, "response": "a"}, {"id": 1, "response": "b"}]')
    with pytest.raises(DataError, match="1 ids stand more than once"):
        read_responses(path, annotations)


def test_all_published_annotations_load():
    folder = shared_folder("amber")
    annotations = read_annotations(folder / "annotations.json")
    assert len(annotations) == 15_220
    assert len(annotations.scenes) == 1004
    questions = annotations.questions.values()
    assert Counter(question.dimension for question in questions) == {
        "existence": 4924,
        "state": 4764,
        "number": 2072,
        "action": 792,
        "relation": 1664,
    }
    labels = Counter((q.dimension, q.label) for q in questions if q.dimension != "state")
    assert labels["existence", "no"] == 4924
    assert (labels["relation", "yes"], labels["relation", "no"]) == (975, 689)
    relations = read_relations(folder / "relation.json", annotations)
    assert len(relations.associated) == 340
    assert read_safe_words(folder / "safe_words.txt") == {
        *("orange", "snack", "line", "camera", "light", "shoe", "sign", "range", "individual")
    }
