"""How sure pairs of images are: from every reader to the batch."""

from __future__ import annotations

import json

import pytest

from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import open_data
from diffalign.data.strength.gap import Gap
from diffalign.data.strength.given import Given
from diffalign.data.strength.settings import StrengthConfig
from diffalign.data.strength.votes import Votes
from diffalign.errors import DataError
from tests.data.conftest import open_source, take
from tests.layouts import make_pairs, pickapic_rows, write_jsonl, write_parquet, write_rows

VOTES = StrengthConfig(preference=Votes())


def parts_of(source, count, part="preference"):
    (batch,) = take(source, 1)
    found = dict(zip(batch.sample_ids, batch.strength[part].tolist(), strict=True))
    assert len(found) == count
    return [found[name] for name in sorted(found)]


def voted(folder, *votes, extra=()):
    """Pairs of Pick-a-Pic with other labels."""
    rows = pickapic_rows(make_pairs(len(votes)))
    for row, (first, second) in zip(rows, votes, strict=True):
        row |= {"label_0": float(first), "label_1": float(second)}
    for number, row in enumerate(rows):
        row |= {name: float(values[number]) for name, values in extra}
    write_rows(folder / "train.parquet", rows)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_votes_are_no_longer_alike(streaming, tmp_path):
    folder = voted(tmp_path, (3, 1), (0, 30), (1, 0), (2, 2))
    source = open_source(
        folder, pairs_per_device=4, strength=VOTES, ties="keep", streaming=streaming
    )
    assert parts_of(source, 4) == pytest.approx([2 / 3, 31 / 32, 2 / 3, 0.5])


def test_ties_are_left_out_unless_they_are_asked_for(tmp_path):
    source = open_source(
        voted(tmp_path, (3, 1), (2, 2), (0, 30)), pairs_per_device=2, strength=VOTES
    )
    assert parts_of(source, 2) == pytest.approx([2 / 3, 31 / 32])
    assert source.left_out_counts == {"tie": 1}


def test_votes_of_another_layout(tmp_path):
    source = open_source(write_parquet(tmp_path, make_pairs(2)), pairs_per_device=2, strength=VOTES)
    assert parts_of(source, 2) == pytest.approx([2 / 3, 2 / 3])


def test_by_default_a_batch_says_nothing_of_it(tmp_path):
    (batch,) = take(open_source(write_parquet(tmp_path, make_pairs(2))), 1)
    assert batch.strength == {}


def test_scores_of_further_columns_make_probabilities_margins_and_targets(tmp_path):
    extra = (
        ("a_0", (1.0, 0.0)),
        ("a_1", (0.0, 3.0)),
        ("b_0", (0.5, 0.5)),
        ("b_1", (0.25, 0.0)),
    )
    strength = StrengthConfig(
        preference=Gap(temperature=1.0, of="reward"),
        columns={"reward": "a_0, a_1", "aesthetic": "b_0,b_1"},
        margin={"aesthetic": 2.0},
        target={"reward": 0.5},
    )
    folder = voted(tmp_path, (1, 0), (0, 1), extra=extra)
    for part, expected in (
        ("preference", [0.731058578630, 0.952574126822]),
        ("margin", [0.5, -1.0]),  # of the second pair the second image is the chosen one
        ("target", [0.5, 1.5]),
    ):
        source = open_source(folder, strength=strength)
        assert parts_of(source, 2, part) == pytest.approx(expected)


def test_a_column_of_probabilities_is_of_the_first_image(tmp_path):
    strength = StrengthConfig(preference=Given(of="p"), columns={"p": "share"})
    folder = voted(tmp_path, (1, 0), (0, 1), extra=[("share", (0.75, 0.25))])
    assert parts_of(open_source(folder, strength=strength), 2) == [0.75, 0.75]


def test_groups_keep_their_votes_and_calibrate_over_the_whole_row(tmp_path):
    write_jsonl(tmp_path, make_pairs(3))
    names = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png"))[:4]
    (tmp_path / "pairs.jsonl").unlink()
    row = {"prompt": "a cat", "images": names, "scores": [1.0, 0.2, -0.3, 2.0]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    strength = StrengthConfig(
        preference=Gap(temperature=1.0), target={"labels": 1.0}, calibrated=True
    )
    (batch,) = take(open_source(tmp_path, pairs_per_device=6, strength=strength), 1)
    found = dict(zip(batch.sample_ids, batch.strength["target"].tolist(), strict=True))
    best_worst = next(value for name, value in found.items() if name.endswith("[2,3]"))
    assert best_worst == pytest.approx(0.832694850905 - 0.227609548923)
    sure = dict(zip(batch.sample_ids, batch.strength["preference"].tolist(), strict=True))
    assert next(v for n, v in sure.items() if n.endswith("[0,3]")) == pytest.approx(0.731058578630)


@pytest.mark.parametrize("streaming", [False, True])
def test_negative_votes_are_skipped_and_listed(streaming, tmp_path):
    folder = voted(tmp_path / "data", (3, 1), (2, -1), (4, 1))
    source = open_source(
        folder,
        strength=VOTES,
        streaming=streaming,
        skipped=tmp_path / "skipped.jsonl",
        max_bad_fraction=0.5,
    )
    take(source, 1)
    listed = (tmp_path / "skipped.jsonl").read_text()
    assert "labels are votes, and one of them is -1" in listed


def test_rows_without_their_numbers_have_no_label(tmp_path):
    rows = pickapic_rows(make_pairs(2))
    for number, row in enumerate(rows):
        row |= {"a_0": 1.0, "a_1": None if number else 0.0}
    write_rows(tmp_path / "train.parquet", rows)
    strength = StrengthConfig(margin={"a": 1.0}, columns={"a": "a_0, a_1"})
    source = open_source(tmp_path, pairs_per_device=1, strength=strength)
    assert parts_of(source, 1, "margin") == [1.0]
    assert source.left_out_counts == {"no label": 1}


def test_one_column_may_hold_the_votes_for_either_image(tmp_path):
    """As HPDv3's choice_dist, which half of its rows have."""
    write_jsonl(tmp_path, make_pairs(3))
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    for row, votes in zip(rows, ([12, 7], None, [30, 0]), strict=True):
        row |= {"path1": row.pop("chosen"), "path2": row.pop("rejected"), "choice_dist": votes}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    strength = StrengthConfig(preference=Votes(of="people"), columns={"people": "choice_dist"})
    source = open_source(tmp_path, strength=strength)
    assert parts_of(source, 2) == pytest.approx([13 / 21, 31 / 32])
    assert source.left_out_counts == {"no label": 1}


def test_a_column_of_more_numbers_is_skipped(tmp_path):
    write_jsonl(tmp_path, make_pairs(2))
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    rows[0] |= {"votes": [1, 2, 3]}
    rows[1] |= {"votes": [2, 1]}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    strength = StrengthConfig(preference=Votes(of="people"), columns={"people": "votes"})
    source = open_source(
        tmp_path,
        pairs_per_device=1,
        strength=strength,
        skipped=tmp_path / "skipped",
        max_bad_fraction=0.5,
    )
    assert source.skipped_counts == {"malformed row": 1}
    assert "expected a number for each side" in (tmp_path / "skipped").read_text()


class TestDataThatCannotGiveIt:
    def refuses(self, folder, strength, message, **settings):
        config = PairConfig(path=str(folder), resolution=16, strength=strength, **settings)
        with pytest.raises(DataError, match=message):
            open_data(config)

    def test_votes_of_data_without_numbers(self, tmp_path):
        write_jsonl(tmp_path, make_pairs(2))
        self.refuses(
            tmp_path,
            VOTES,
            r"data\.strength\.preference reads the labels of the two sides, and this data set says "
            r"which image was preferred without numbers.*strength\.columns",
        )

    def test_votes_of_which_the_fewer_win(self, tmp_path):
        folder = voted(tmp_path, (3, 1))
        self.refuses(folder, VOTES, "the smaller of them wins here", labels="lower_is_better")

    def test_columns_that_are_not_there(self, tmp_path):
        strength = StrengthConfig(margin={"a": 1.0}, columns={"a": "lable_0, label_1"})
        self.refuses(
            voted(tmp_path, (3, 1)), strength, r"columns\.a names lable_0.*Did you mean label_0"
        )

    def test_one_column_where_two_are_needed(self, tmp_path):
        strength = StrengthConfig(margin={"a": 1.0}, columns={"a": "label_0"})
        self.refuses(
            voted(tmp_path, (3, 1)), strength, "names 1 columns, and must name two, of the"
        )

    def test_two_columns_where_one_is_needed(self, tmp_path):
        strength = StrengthConfig(preference=Given(of="p"), columns={"p": "label_0, label_1"})
        self.refuses(
            voted(tmp_path, (3, 1)), strength, "names 2 columns, and must name one, of the"
        )

    def test_preferred_images_alone(self, tmp_path):
        (tmp_path / "win").mkdir()
        for number, pair in enumerate(make_pairs(2)):
            (tmp_path / f"win/{number}.png").write_bytes(pair.chosen)
            (tmp_path / f"win/{number}.txt").write_text(pair.caption)
        self.refuses(
            tmp_path, VOTES, "every image of .* is a preferred one.*leave data.strength out"
        )


def test_the_line_on_the_data_says_what_becomes_of_its_numbers(tmp_path):
    config = PairConfig(
        path=str(voted(tmp_path, (3, 1))),
        resolution=16,
        strength=StrengthConfig(preference=Votes(), weight="certainty", margin={"labels": 0.5}),
    )
    assert (
        "its probability is the mean of Beta(1, 1) after votes; its margin is 0.5 * gap of labels; "
        "it counts by its certainty" in open_data(config).summary
    )


def test_scores_of_which_the_smaller_wins_are_turned(tmp_path):
    strength = StrengthConfig(preference=Gap(temperature=1.0))
    folder = voted(tmp_path, (1, 2), (2, 1))
    source = open_source(folder, strength=strength, labels="lower_is_better")
    assert parts_of(source, 2) == pytest.approx([0.731058578630] * 2)


class TestSeveralAnnotators:
    def asked(self, folder, *verdicts):
        """Rows of pair, first image, second image, label of the first."""
        pairs, rows = make_pairs(4), []
        for number, (pair, first, second, label) in enumerate(verdicts):
            sides = {"a": pairs[pair].chosen, "b": pairs[pair].rejected}
            row = pickapic_rows([pairs[pair]])[0] | {"ranking_id": number}
            row |= {"jpg_0": sides[first], "jpg_1": sides[second]}
            row |= {"image_0_uid": f"{pair}{first}", "image_1_uid": f"{pair}{second}"}
            row |= {"label_0": label, "label_1": None if label is None else 1.0 - label}
            rows.append(row)
        write_rows(folder / "train.parquet", rows)
        return folder

    def source(self, folder, **settings):
        return open_source(
            folder, strength=VOTES, annotators="image_0_uid, image_1_uid", **settings
        )

    def test_their_labels_add_up_in_either_order(self, tmp_path):
        folder = self.asked(
            tmp_path,
            (0, "a", "b", 1.0),
            (1, "a", "b", 0.0),
            (0, "b", "a", 0.0),  # for a
            (0, "a", "b", 0.0),  # for b
            (0, "b", "a", 0.5),
            (2, "b", "a", 1.0),
            (0, "a", "b", None),
        )
        source = self.source(folder, pairs_per_device=3)
        (batch,) = take(source, 1)
        found = {
            name.split("-")[0]: (value, image.max().item())
            for name, value, image in zip(
                batch.sample_ids,
                batch.strength["preference"].tolist(),
                batch.images["chosen"][:, 0],
                strict=True,
            )
        }
        # 2.5 to 1.5 for the red one of pair 0; one vote for the blue one of each of the others
        assert found["0"][0] == pytest.approx(3.5 / 6) and found["0"][1] > 0
        assert found["1"][0] == found["5"][0] == pytest.approx(2 / 3)
        assert found["1"][1] < -0.9 and found["5"][1] < -0.9
        assert source.left_out_counts == {"no label": 1}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"streaming": True}, r"adds up the rows of a pair.*data\.streaming to false"),
            ({"annotators": "image_0_uid"}, "must name two columns with a comma between"),
            ({"annotators": "image_0_id, image_1_uid"}, "names image_0_id.*Did you mean image_0_u"),
        ],
    )
    def test_what_cannot_be_added_up_is_refused(self, settings, message, tmp_path):
        folder = self.asked(tmp_path, (0, "a", "b", 1.0))
        given = {"annotators": "image_0_uid, image_1_uid", **settings}
        with pytest.raises(DataError, match=message):
            open_data(PairConfig(path=str(folder), resolution=16, **given))

    def test_data_without_numbers_is_refused(self, tmp_path):
        write_jsonl(tmp_path, make_pairs(2))
        config = PairConfig(path=str(tmp_path), resolution=16, annotators="chosen, rejected")
        with pytest.raises(DataError, match=r"adds up labels, and .* has no number for each"):
            open_data(config)
