"""What is an item: of every origin, and in which order."""

from __future__ import annotations

import json

import pytest

from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.scores import ScoreFile
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.score_columns import ScorerIdentity, ScoreRow, write_score_column
from diffalign.errors import ConfigError, DataError
from diffalign.files import write_json_lines
from diffalign.jobs.label import LabelConfig, _next_to_images
from diffalign.labelling.order import ordered
from diffalign.labelling.sources import (
    GeneratedImages,
    GroupsOfImages,
    PairsOfImages,
    PairsOfResponses,
    open_folder,
)
from tests.labelling.builders import generated, grouped, responses
from tests.layouts import encoded, make_pairs, pickapic_rows, solid_image, write_jsonl, write_rows


def pairs(path, **settings):
    return PairsOfImages(PairConfig(path=str(path), resolution=8, **settings))


def test_models_are_compared_from_the_same_noise(tmp_path):
    folder = generated(tmp_path, prompts=2, models=("a", "b", "c"), seeds=2)
    items = GeneratedImages(folder)
    assert len(items.items) == 2 * 2 * 3
    assert {item.models for item in items.items} == {("a", "b"), ("a", "c"), ("b", "c")}
    content = items.content(0)
    assert (content.prompt, len(set(content.images))) == ("a thing, number 0", 2)
    whole = GeneratedImages(folder, together=True)
    assert [item.sides for item in whole.items] == [3] * 4


def test_seeds_of_one_model_are_compared_where_there_is_one(tmp_path):
    folder = generated(tmp_path, prompts=2, models=("a",), seeds=3)
    assert [item.models for item in GeneratedImages(folder).items] == [("a", "a")] * 6
    (folder / "images/a/p0-0.png").unlink()
    fewer = GeneratedImages(folder)
    assert (len(fewer.items), fewer.passed_over) == (1 + 3, {"missing image": 1})
    with pytest.raises(DataError, match="no two models of a prompt"):
        GeneratedImages(folder, compare="models")
    with pytest.raises(DataError, match="no two seeds of a prompt"):
        GeneratedImages(generated(tmp_path / "one", seeds=1), compare="seeds")


def test_groups_are_ranked_whole(tmp_path):
    items = open_folder(grouped(tmp_path), compare="auto", together=False)
    assert isinstance(items, GroupsOfImages)
    assert [item.sides for item in items.items] == [4, 4, 4]
    assert items.content(1).prompt == "animal 1"
    with pytest.raises(DataError, match="neither"):
        open_folder(tmp_path / "images", compare="auto", together=False)


@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_are_shown_whatever_their_labels_say(tmp_path, streaming):
    rows = pickapic_rows(make_pairs(5))
    rows[0] |= {"label_0": 0.5, "label_1": 0.5}
    rows[1] |= {"has_label": False}
    rows[2] |= {"caption": " "}
    rows[3] |= {name: rows[0][name] for name in ("ranking_id", "image_0_uid", "image_1_uid")}
    write_rows(tmp_path / "train.parquet", rows)
    items = pairs(tmp_path, streaming=streaming)
    assert items.passed_over == {"empty caption": 1, "the same pair again": 1}
    assert [items.content(n).prompt for n in range(3)] == [rows[n]["caption"] for n in (0, 1, 4)]
    assert items.content(2).images == (rows[4]["jpg_0"], rows[4]["jpg_1"])


def test_files_of_pairs_and_their_limit(tmp_path):
    items = pairs(write_jsonl(tmp_path, make_pairs(4)), limit=3)
    assert len(items.items) == 3
    assert items.content(0).digests() != items.content(1).digests()


def test_images_alone_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(solid_image((1, 2, 3))))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "x", "chosen": "a.png"}) + "\n")
    with pytest.raises(DataError, match="nothing to compare it with"):
        pairs(tmp_path / "rows.jsonl")


def test_responses_and_what_of_them_cannot_be_compared(tmp_path):
    path = responses(tmp_path)
    row = json.loads(path.read_text().splitlines()[0])
    with path.open("a") as file:
        file.write(json.dumps({**row, "chosen": " "}) + "\n")
    items = PairsOfResponses(ResponseConfig(path=str(path)))
    assert (len(items.items), items.passed_over) == (3, {"empty response": 1})
    assert items.content(2).responses == ("a good answer <b>2</b>", "a bad answer 2")


# --- order ----------------------------------------------------------------------------------------


def score_files(folder, items, *columns):
    """Files of scores: each column has a score for every image of every item."""
    files = {}
    for number, scores in enumerate(columns):
        rows = {}
        for item, values in enumerate(scores):
            content = items.content(item)
            for digest, score in zip(content.digests(), values, strict=True):
                rows[digest] = ScoreRow(image=digest, prompt=content.prompt, score=score)
        path = folder / f"{number}.parquet"
        identity = ScorerIdentity(kind=f"s{number}", fingerprint=f"s{number}")
        write_score_column(path, identity, list(rows.values()))
        files[f"s{number}"] = ScoreFile(file=path, scorer=f"s{number}")
    return files


def test_those_come_first_on_which_scorers_disagree(tmp_path):
    items = GeneratedImages(generated(tmp_path / "look", prompts=4))
    agree, near, apart = (0.0, 1.0), (0.0, 0.5), (1.0, 0.0)
    scores = score_files(
        tmp_path, items, (agree, agree, agree), ((0.0, 10.0), (0.0, 5.0), (10.0, 0.0))
    )
    assert near and apart
    order, unscored = ordered(items, "disagreement", seed=0, scores=scores)
    assert (order[:2], order[3], unscored) == ([2, 1], 3, 1)  # the last has no scores
    assert set(ordered(items, "random", seed=0, scores={})[0]) == {0, 1, 2, 3}
    assert ordered(items, "given", seed=0, scores={})[0] == [0, 1, 2, 3]
    seeds = {tuple(ordered(items, "random", seed=seed, scores={})[0]) for seed in range(8)}
    assert len(seeds) > 1


def test_the_scores_next_to_generated_images_are_read(tmp_path):
    folder = generated(tmp_path / "look", prompts=3)
    items = GeneratedImages(folder)
    for name, columns in {"pick": (0.0, 1.0), "other": (1.0, 0.0)}.items():
        rows = [
            {"image": digest, "prompt": content.prompt, "fingerprint": name, "score": score * item}
            for item in range(3)
            for content in [items.content(item)]
            for digest, score in zip(content.digests(), columns, strict=True)
        ]
        write_json_lines(folder / f"scores/{name}.jsonl", rows)
    scores = _next_to_images(LabelConfig(images=folder, order="disagreement"))
    assert {name: file.scorer for name, file in scores.items()} == {
        "pick": "pick",
        "other": "other",
    }
    assert ordered(items, "disagreement", seed=0, scores=scores) == ([2, 1, 0], 0)
    assert _next_to_images(LabelConfig(images=folder)) == {}


def test_disagreement_needs_two_scorers_of_these_images(tmp_path):
    items = GeneratedImages(generated(tmp_path / "look", prompts=2))
    other = GeneratedImages(generated(tmp_path / "other", models=("x", "y", "z"), prompts=2))
    one = score_files(tmp_path, items, ((0.0, 1.0), (1.0, 0.0)))
    with pytest.raises(ConfigError, match="two scorers at least"):
        ordered(items, "disagreement", seed=0, scores=one)
    strange = score_files(tmp_path, other, *[((7.0, 1.0),) * 6] * 2)
    for row in other.items:
        assert row.item_id not in {item.item_id for item in items.items}
    texts = PairsOfResponses(ResponseConfig(path=str(responses(tmp_path / "rows"))))
    with pytest.raises(ConfigError, match="the items are responses"):
        ordered(texts, "disagreement", seed=0, scores=strange)
    moved = generated(tmp_path / "moved", prompts=2)
    for path in (moved / "images").rglob("*.png"):
        path.write_bytes(encoded(solid_image((9, 9, 9))))
    with pytest.raises(DataError, match="no score of any"):
        ordered(GeneratedImages(moved), "disagreement", seed=0, scores=strange)
