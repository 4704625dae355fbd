"""Files of scores joined to pairs, and what they decide."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics

import numpy as np
import pyarrow.parquet
import pytest

from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.index import bands_of
from diffalign.data.pairs.scores import (
    FilterConfig,
    OrderConfig,
    ScoreFile,
    ScoresConfig,
    TagConfig,
    quantile,
)
from diffalign.data.score_columns import (
    ScorerIdentity,
    ScoreRow,
    read_score_column,
    write_score_column,
)
from diffalign.data.strength.gap import Gap
from diffalign.data.strength.settings import StrengthConfig
from diffalign.data.strength.votes import Votes
from diffalign.errors import DataError
from tests.data.conftest import open_source, take
from tests.layouts import make_pairs, write_folder, write_parquet

COUNT = 6
LEVELS = {"a": [6, 5, 4, 3, 2, 1], "b": [1, 2, 3, 4, 5, -6]}
"""Gap of each pair by two scorers: the rejected image has 0."""


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def rows_of(pairs, gaps, deviations=None):
    for place, (pair, gap) in enumerate(zip(pairs, gaps, strict=True)):
        deviation = None if deviations is None else deviations[place]
        for content, score in ((pair.chosen, gap), (pair.rejected, 0)):
            yield ScoreRow(
                image=sha(content), prompt=pair.caption, score=score, deviation=deviation
            )


def write(folder, name, rows, **identity):
    scorer = ScorerIdentity(
        **{"kind": name, "settings": {"revision": "r"}, "fingerprint": f"{name}-1", **identity}
    )
    write_score_column(folder / f"{name}.parquet", scorer, list(rows))
    return ScoreFile(file=folder / f"{name}.parquet", scorer=name)


@pytest.fixture
def data(tmp_path):
    return write_parquet(tmp_path / "data", make_pairs(COUNT))


@pytest.fixture
def columns(tmp_path):
    pairs = make_pairs(COUNT)
    return {name: write(tmp_path, name, rows_of(pairs, gaps)) for name, gaps in LEVELS.items()}


def of_pair(batch, values):
    """Number of the pair, as its caption says -> value."""
    numbers = [int(caption.rpartition(" ")[2]) for caption in batch.captions]
    return dict(sorted(zip(numbers, values, strict=True)))


def whole(source, count=COUNT):
    (batch,) = take(source, 1)
    assert len(batch) == count
    return batch


def test_a_file_comes_back_as_it_was_written(tmp_path):
    rows = [
        ScoreRow(image="i", prompt="p", score=1.5, deviation=0.25),
        ScoreRow(image="j", prompt="p", score=None, problem="corrupt image: no"),
    ]
    file = write(tmp_path, "a", rows, repeats=3, perturbation={"crop": 0.1}).file
    found = read_score_column(file)
    assert [*found.rows.values()] == rows
    assert found.scorer.kind == "a" and found.scorer.settings == {"revision": "r"}
    assert "3 copies" in found.scorer.whole_fingerprint and found.has_deviations


def test_scores_make_probabilities_and_margins(data, columns):
    strength = StrengthConfig(
        preference=Gap(temperature=2.0, of="scores.a"), margin={"scores.b": 0.5}
    )
    scores = ScoresConfig(columns=columns)
    batch = whole(open_source(data, pairs_per_device=COUNT, strength=strength, scores=scores))
    expected = {n: 1 / (1 + math.exp(-gap / 2)) for n, gap in enumerate(LEVELS["a"])}
    found = of_pair(batch, batch.strength["preference"].tolist())
    assert found == pytest.approx(expected)
    found = of_pair(batch, batch.strength["margin"].tolist())
    assert found == pytest.approx({n: gap / 2 for n, gap in enumerate(LEVELS["b"])})


def test_an_ensemble_is_the_mean_of_scores_in_units_of_their_spread(data, columns):
    scores = ScoresConfig(columns=columns, ensemble=("a", "b"))
    strength = StrengthConfig(
        preference=Gap(temperature=1.0, of="scores.ensemble"), margin={"scores.ensemble": 1.0}
    )
    batch = whole(open_source(data, pairs_per_device=COUNT, strength=strength, scores=scores))
    spread = {n: statistics.pstdev([*gaps, *[0] * COUNT]) for n, gaps in LEVELS.items()}
    strengths = [
        (a / spread["a"] + b / spread["b"]) / 2
        for a, b in zip(LEVELS["a"], LEVELS["b"], strict=True)
    ]
    found = of_pair(batch, batch.strength["margin"].tolist())
    assert found == pytest.approx(dict(enumerate(strengths)), rel=1e-6)


def test_certainty_is_one_over_the_deviation_of_both_images(data, tmp_path):
    rows = rows_of(make_pairs(COUNT), LEVELS["a"], deviations=[3, 4, 5, 6, 7, 8])
    scores = ScoresConfig(columns={"a": write(tmp_path, "a", rows, repeats=4)})
    strength = StrengthConfig(
        preference=Gap(temperature=2.0, of="scores.a", deviations="scores.a.deviation"),
        weight="certainty",
    )
    batch = whole(open_source(data, pairs_per_device=COUNT, strength=strength, scores=scores))
    found = of_pair(batch, batch.strength["weight"].tolist())
    expected = {n: 2 / math.hypot(3 + n, 3 + n) for n in range(COUNT)}
    assert found == pytest.approx(expected)


def test_pairs_far_below_zero_are_turned_round_and_those_near_it_left_out(data, columns):
    rule = FilterConfig(by="b", flip_below=-2.0, drop_below=2.5)
    source = open_source(
        data, pairs_per_device=4, scores=ScoresConfig(columns=columns, filter=rule)
    )
    batch = whole(source, 4)
    blue = of_pair(batch, [image[2].mean() > image[0].mean() for image in batch.images["chosen"]])
    assert {n: bool(value) for n, value in blue.items()} == {2: False, 3: False, 4: False, 5: True}
    assert source.left_out_counts == {"gap of scores too small": 2}


def test_strength_is_that_of_the_pair_as_it_was_turned(data, columns):
    scores = ScoresConfig(columns=columns, filter=FilterConfig(by="b", flip_below=0.0))
    strength = StrengthConfig(preference=Gap(temperature=1.0, of="scores.b"))
    batch = whole(open_source(data, pairs_per_device=COUNT, strength=strength, scores=scores))
    found = of_pair(batch, batch.strength["preference"].tolist())
    assert found[5] == pytest.approx(1 / (1 + math.exp(-6)))


def test_pairs_on_which_scorers_disagree_are_left_out(data, columns):
    rule = FilterConfig(by="ensemble", spread_above=1.3)
    scores = ScoresConfig(columns=columns, ensemble=("a", "b"), filter=rule)
    source = open_source(data, pairs_per_device=5, scores=scores)
    assert 5 not in of_pair(whole(source, 5), [None] * 5)
    assert source.left_out_counts == {"scorers disagree": 1}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]),
        ([0, 0, 0, 0, 1], [1, 1, 1, 1, 9]),
        ([0, 1, 1, 1, 1, 1, 1, 1, 2, 2], [1, *[4] * 7, 9, 9]),
    ],
)
def test_the_lowest_has_the_first_quantile_and_the_highest_the_last(scores, expected):
    assert [quantile(score, scores, of=9) for score in scores] == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_each_side_is_seen_under_its_own_prompt(streaming, data, columns):
    tag = TagConfig(by="a", quantiles=3, caption="score_{q}, {caption}")
    scores = ScoresConfig(columns=columns, tag=tag)
    source = open_source(
        data, pairs_per_device=COUNT, scores=scores, streaming=streaming, caption_dropout=0.0
    )
    batch = whole(source)
    found = of_pair(batch, batch.prompts_of("chosen"))
    tags = [text.partition(",")[0] for text in found.values()]
    assert tags == ["score_3", "score_3", "score_3", "score_3", "score_2", "score_2"]
    assert set(of_pair(batch, batch.prompts_of("rejected")).values()) == {
        f"score_1, a red thing, number {n}" for n in range(COUNT)
    }
    assert of_pair(batch, batch.prompts)[0] == "a red thing, number 0"
    assert source.captions(1) == ["score_3, a red thing, number 0"]


def test_a_goal_is_told_to_both_sides_and_the_one_that_reaches_it_is_chosen(data, columns):
    tag = TagConfig(by="a", quantiles=3, caption="{q} {caption}", tells="goal")
    scores = ScoresConfig(columns=columns, tag=tag)
    source = open_source(
        data, pairs_per_device=COUNT, scores=scores, caption_dropout=0.0, flip=False
    )
    goals: list[dict[int, str]] = []
    for batch in take(source, 3):
        assert batch.prompts_of("chosen") == batch.prompts_of("rejected")
        red = [bool(image[0].mean() > image[2].mean()) for image in batch.images["chosen"]]
        goals.append(of_pair(batch, [prompt[0] for prompt in batch.prompts_of("chosen")]))
        assert {number for number, goal in goals[-1].items() if goal != "1"} == {
            number for number, is_red in of_pair(batch, red).items() if is_red
        }
    assert goals[0] == goals[2] and all(goals[0][n] != goals[1][n] for n in range(COUNT))
    assert {goal == "1" for goal in goals[0].values()} == {True, False}


def test_words_stand_for_quantiles():
    tag = TagConfig(by="a", words=("bad", "so so", "good"), caption="{caption}, {q}")
    assert tag.highest == 3 and TagConfig(by="a").highest == 9
    assert [tag.prompt(q, "a cat") for q in (1, 3)] == ["a cat, bad", "a cat, good"]
    for settings in ({"words": ("bad",)}, {"words": ("bad", "good"), "quantiles": 2}):
        with pytest.raises(ValueError, match="words are two or more different ones"):
            TagConfig(by="a", **settings)


def test_goals_and_what_is_about_the_labelled_sides_are_refused(columns, tmp_path):
    scores = ScoresConfig(columns=columns, tag=TagConfig(by="a", tells="goal"))
    strength = StrengthConfig(margin={"scores.a": 1.0})
    settings = {"path": "x", "resolution": 16, "scores": scores}
    for asked in ({"strength": strength}, {"ties": "keep"}):
        with pytest.raises(ValueError, match="by which either side is the chosen one in turn, and"):
            PairConfig(**settings, **asked)


def test_a_dropped_caption_takes_the_tag_along_on_both_sides(data, columns):
    scores = ScoresConfig(columns=columns, tag=TagConfig(by="a"))
    batch = whole(open_source(data, pairs_per_device=COUNT, scores=scores, caption_dropout=1.0))
    assert batch.own_prompts == {"chosen": ("",) * COUNT, "rejected": ("",) * COUNT}


@pytest.mark.parametrize("first", ["large_gap", "small_gap"])
def test_pairs_are_seen_band_after_band(first, data, columns):
    order = OrderConfig(by="a", bands=3, passes=2, first=first)
    source = open_source(
        data, pairs_per_device=2, scores=ScoresConfig(columns=columns, order=order)
    )
    seen = [set(of_pair(batch, batch.captions)) for batch in take(source, 7)]
    bands = [{0, 1}, {2, 3}, {4, 5}]
    expected = bands if first == "large_gap" else bands[::-1]
    assert seen == [band for band in expected for _ in range(2)] + [expected[0]]
    assert source.most_visits(1) == 1 and source.most_visits(2) == 2
    assert source.most_visits(6) == 2 and source.most_visits(7) == 3
    assert "seen in bands of 2, 2, 2 pairs" in "".join(source.describe())


def test_one_band_alone(data, columns):
    order = OrderConfig(by="a", bands=3, only=2)
    source = open_source(
        data, pairs_per_device=2, scores=ScoresConfig(columns=columns, order=order)
    )
    assert len(source) == 2
    assert {n for batch in take(source, 3) for n in of_pair(batch, batch.captions)} == {2, 3}


def test_a_run_goes_on_in_the_middle_of_a_band(data, columns):
    def opened():
        order = OrderConfig(by="a", bands=2)
        return open_source(
            data, pairs_per_device=2, scores=ScoresConfig(columns=columns, order=order)
        )

    first = opened()
    whole_run = [batch.sample_ids for batch in take(first, 6)]
    source = opened()
    take(source, 2)
    other = opened()
    other.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert [batch.sample_ids for batch in take(other, 4)] == whole_run[2:]


def test_bands_are_of_one_size_and_equal_gaps_keep_their_order():
    order = OrderConfig(by="a", bands=3)
    gaps = np.array([0.0, 5.0, 5.0, -1.0, 5.0, 5.0, 2.0])
    assert bands_of(gaps, order).tolist() == [2, 0, 0, 2, 0, 1, 1]
    with pytest.raises(DataError, match="has 3 bands, and there are 2 pairs"):
        bands_of(gaps[:2], order)


def test_another_file_is_another_data_set(data, columns, tmp_path):
    before = open_source(data, scores=ScoresConfig(columns=columns)).fingerprint()
    columns["a"].file.rename(tmp_path / "moved.parquet")
    moved = {**columns, "a": dataclasses.replace(columns["a"], file=tmp_path / "moved.parquet")}
    assert open_source(data, scores=ScoresConfig(columns=moved)).fingerprint() == before
    columns["a"] = write(tmp_path, "a", rows_of(make_pairs(COUNT), LEVELS["b"]))
    assert open_source(data, scores=ScoresConfig(columns=columns)).fingerprint() != before


def test_an_image_that_could_not_be_scored_skips_its_pair(data, tmp_path):
    rows = list(rows_of(make_pairs(COUNT), LEVELS["a"]))
    rows[0] = dataclasses.replace(rows[0], score=None, problem="corrupt image")
    scores = ScoresConfig(columns={"a": write(tmp_path, "a", rows)}, tag=TagConfig(by="a"))
    source = open_source(data, pairs_per_device=COUNT, scores=scores, max_bad_fraction=1.0)
    captions = {caption for batch in take(source, 2) for caption in batch.captions}
    assert "a red thing, number 0" not in captions and len(captions) == COUNT - 1


def test_scores_of_other_images_are_refused(tmp_path, columns):
    folder = write_folder(tmp_path / "others", make_pairs(COUNT + 2))
    with pytest.raises(
        DataError, match=r"no score of 4 of 16 images .*(?s:.)*diffalign score data.path="
    ):
        open_source(folder, scores=ScoresConfig(columns=columns))


def test_in_a_stream_an_image_without_a_score_is_skipped(tmp_path, columns):
    folder = write_parquet(tmp_path / "others", make_pairs(COUNT + 1))
    scores = ScoresConfig(columns=columns, tag=TagConfig(by="a"))
    source = open_source(
        folder, pairs_per_device=COUNT, scores=scores, streaming=True, max_bad_fraction=0.5
    )
    assert whole(source)
    assert source.skipped_counts == {"malformed row": 1}


def test_scores_of_another_scorer_are_refused(data, columns):
    columns["a"] = ScoreFile(file=columns["b"].file, scorer="pickscore")
    with pytest.raises(DataError, match=r"holds scores by b \(fingerprint b-1\), and scorer is"):
        open_source(data, scores=ScoresConfig(columns=columns))
    columns["a"] = ScoreFile(file=columns["b"].file, scorer="b-1")
    open_source(data, scores=ScoresConfig(columns=columns))


def test_a_band_order_over_a_stream_is_refused(data, columns):
    scores = ScoresConfig(columns=columns, order=OrderConfig(by="a"))
    with pytest.raises(DataError, match=r"data.scores.order has bands, and .* is streamed"):
        open_source(data, scores=scores, streaming=True)


def test_a_tag_without_its_column_is_refused(columns):
    with pytest.raises(ValueError, match=r"tag.by reads the score c, and there are a, b: name its"):
        ScoresConfig(columns=columns, tag=TagConfig(by="c"))
    with pytest.raises(ValueError, match=r"tag.by reads the score a, and there is none"):
        ScoresConfig(tag=TagConfig(by="a"))


@pytest.mark.parametrize(
    "caption", ["{caption}", "score_{q}", "{q} {caption} {caption}", "{q {caption}"]
)
def test_a_template_that_tells_no_score_is_refused(caption):
    with pytest.raises(ValueError, match=r"must hold \{q\}, and \{caption\} once|is no template"):
        TagConfig(by="a", caption=caption)


def test_a_tag_of_scores_that_are_all_equal_is_refused(data, tmp_path):
    column = write(tmp_path, "a", rows_of(make_pairs(COUNT), [0] * COUNT))
    with pytest.raises(DataError, match="tells the score a, and all of them are equal"):
        open_source(data, scores=ScoresConfig(columns={"a": column}, tag=TagConfig(by="a")))
    with pytest.raises(DataError, match=r"ensemble has a, and all scores of .* are equal"):
        other = write(tmp_path, "b", rows_of(make_pairs(COUNT), LEVELS["b"]))
        open_source(
            data, scores=ScoresConfig(columns={"a": column, "b": other}, ensemble=("a", "b"))
        )


def test_strength_that_reads_no_score_is_refused(columns):
    strength = StrengthConfig(preference=Gap(temperature=1.0, of="scores.c"))
    settings = {"path": "x", "resolution": 16, "strength": strength}
    with pytest.raises(ValueError, match=r"strength.preference reads the score c, and there are"):
        PairConfig(**settings, scores=ScoresConfig(columns=columns))


def test_turning_pairs_round_that_votes_turn_back_is_refused(columns):
    scores = ScoresConfig(columns=columns, filter=FilterConfig(by="a", flip_below=-1.0))
    strength = StrengthConfig(preference=Votes())
    with pytest.raises(ValueError, match="flip_below turns pairs round that are labelled wrong"):
        PairConfig(path="x", resolution=16, strength=strength, scores=scores)


def test_deviations_that_nobody_measured_are_refused(data, columns):
    strength = StrengthConfig(
        preference=Gap(temperature=1.0, of="scores.a", deviations="scores.a.deviation"),
        weight="certainty",
    )
    with pytest.raises(DataError, match=r"has no standard deviations: score the data again with"):
        open_source(data, strength=strength, scores=ScoresConfig(columns=columns))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"by": "a"}, "filter has no limit"),
        ({"by": "a", "spread_above": 1.0}, "filter is by a"),
        ({"by": "a", "flip_below": 0.0, "drop_below": -1.0}, "set drop_below above it"),
        ({"by": "a", "flip_below": 0.5}, "flip_below must be at most 0"),
    ],
)
def test_a_filter_that_contradicts_itself_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        FilterConfig(**settings)


def test_names_and_bands_that_are_none_are_refused(columns):
    with pytest.raises(ValueError, match="ensemble takes two or more different scores"):
        ScoresConfig(columns=columns, ensemble=("a", "a"))
    with pytest.raises(ValueError, match=r"columns.ensemble: a name is of letters"):
        ScoresConfig(columns={"ensemble": columns["a"]})
    with pytest.raises(ValueError, match="only is 4, and there are 3 bands"):
        OrderConfig(by="a", only=4)


def test_a_gap_needs_two_images(tmp_path, columns):
    folder = write_folder(tmp_path / "data", make_pairs(COUNT))
    for path in (folder / "lose").iterdir():
        path.unlink()
    (folder / "lose").rmdir()
    scores = ScoresConfig(columns=columns, order=OrderConfig(by="a"))
    with pytest.raises(DataError, match=r"is about the gap of two images, and .* has one a row"):
        open_source(folder, views=frozenset({"chosen"}), scores=scores)


def test_files_that_hold_no_scores_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"there is no such file. `diffalign score"):
        read_score_column(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is no parquet file of scores that can be read"):
        read_score_column(tmp_path / "x.parquet")
    table = pyarrow.table({"image": ["i"], "prompt": ["p"], "score": [1.0]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match="it has no scorer in its metadata"):
        read_score_column(tmp_path / "x.parquet")
    write(tmp_path, "x", [ScoreRow(image="i", prompt="p", score=math.nan)])
    with pytest.raises(DataError, match="the score of 'p' is nan, and must be a finite number"):
        read_score_column(tmp_path / "x.parquet")


def test_without_a_caption_nobody_asks_for_anything(data, columns):
    scores = ScoresConfig(columns=columns, tag=TagConfig(by="a", tells="goal"))
    source = open_source(
        data, pairs_per_device=COUNT, scores=scores, caption_dropout=1.0, flip=False
    )
    for batch in take(source, 2):
        assert all(image[0].mean() > image[2].mean() for image in batch.images["chosen"])
        assert set(batch.prompts_of("rejected")) == {""}
