"""Each check by itself, on rows that are made here."""

from __future__ import annotations

import dataclasses

import pytest

from diffalign import components
from diffalign.checking.checks.agreement import Agreement
from diffalign.checking.checks.base import AbstractCheck, Finding, Share
from diffalign.checking.checks.lengths import Lengths
from diffalign.checking.checks.models import Models
from diffalign.checking.checks.position import Position
from diffalign.checking.checks.repeated import Repeated
from diffalign.checking.checks.rows import Rows
from diffalign.checking.checks.safety import Safety
from diffalign.checking.checks.shared_prompts import SharedPrompts
from diffalign.checking.checks.sizes import Sizes
from diffalign.checking.rows import (
    CheckedRow,
    Examined,
    ImageFacts,
    OtherData,
    Place,
    ResponseFacts,
    plain_text,
)
from diffalign.data.skipping import LeftOut, Skipped, SkipReason
from diffalign.intervals import exact_interval


def image(name: str, size: tuple[int, int] = (64, 64)) -> ImageFacts:
    return ImageFacts(name.encode().ljust(16), size)


def row(number: int, **given) -> CheckedRow:
    """A sound pair of images of its own, but for what is given."""
    images = {"chosen": image(f"{number}-a"), "rejected": image(f"{number}-b")}
    fields = {"name": f"row {number}", "origin": f"row {number}", "place": Place(number, None)}
    return CheckedRow(**{**fields, "prompt": f"prompt {number}", "images": images, **given})


def answered(number: int, chosen: int, rejected: int) -> CheckedRow:
    sides = {"chosen": chosen, "rejected": rejected}
    facts = {s: ResponseFacts(f"{number} {s}".encode(), words) for s, words in sides.items()}
    return row(number, images={}, responses=facts)


def data(rows, *, kind="images", **more) -> Examined:
    return Examined(kind=kind, summary="data", rows=list(rows), **more)


def only(outcome) -> Finding:
    (finding,) = outcome.findings
    return finding


@pytest.mark.parametrize("kind", components.kinds(AbstractCheck))
def test_a_sentence_says_all_and_nothing_is_found_in_sound_rows(kind):
    check = components.find(AbstractCheck, kind)()
    found = check.look(data(row(n, first_won=n % 2 == 0) for n in range(40)))
    assert not found.findings and check.title
    assert found.figures or found.passed_over


def test_a_finding_is_one_sentence():
    finding = Finding(
        name="x",
        severity="harmful",
        count=4,
        what="4 of 9 rows are wrong",
        harm="they harm",
        advice="take them out",
        rows=["a", "a", "b", "c", "d"],
    )
    assert finding.sentence == "4 of 9 rows are wrong, such as a, b, c: they harm; take them out."


def test_a_share_is_exact():
    share = Share.of_trials(60, 100, 0.95)
    # Clopper and Pearson's limits of 60 in 100, as tables print them.
    assert (share.low, share.high) == pytest.approx((0.4972, 0.6967), abs=5e-5)
    assert not share.excludes(0.5) and Share.of_trials(61, 100, 0.95).excludes(0.5)
    assert not Share.of_trials(5050, 10000, 0.5).excludes(0.5, by=0.02)
    assert share.rest.count == 40 and share.rest.larger.count == 60
    assert str(Share.of_trials(0, 0, 0.95)) == "of none"


@pytest.mark.parametrize(
    ("won", "of", "name"),
    [(60, 100, None), (120, 200, "position_bias"), (80, 200, "position_bias"), (50, 100, None)],
)
def test_position_is_judged_by_the_exact_interval(won, of, name):
    found = Position().look(data(row(n, first_won=n < won) for n in range(of)))
    assert found.counts == {"Winner by position": {"first": won, "second": of - won}}
    assert [finding.name for finding in found.findings] == [name] * (name is not None)


def test_the_side_that_wins_is_named():
    found = only(Position().look(data(row(n, first_won=n < 80) for n in range(200))))
    assert found.what.startswith("The second image won in 60.0 % (52.9 to 66.8 %) of 200 decided")
    assert "20 % of the labels" in found.harm and found.count == 120


def test_a_winner_that_is_always_first_may_be_a_habit_of_the_file():
    found = only(Position().look(data(row(n, first_won=True) for n in range(50))))
    assert found.name == "position_constant" and found.severity == "doubtful"


def test_a_tiny_bias_of_many_rows_is_none():
    rows = [row(n, first_won=n < 10_150) for n in range(20_000)]
    assert Share.of_trials(10_150, 20_000, 0.95).excludes(0.5)
    assert not Position().look(data(rows)).findings
    assert Position(tolerance=0.0).look(data(rows)).findings


def test_unusable_rows_are_listed_by_reason():
    bad = Skipped(sample_id="x", reason=SkipReason.EMPTY_RESPONSE, detail="' '", side="chosen")
    rows = [*(row(n) for n in range(8)), row(8, skipped=bad), row(9, left_out=LeftOut.TIE)]
    outcome = Rows().look(data(rows, kind="responses"))
    assert outcome.figures["with a preference"] == 8 and outcome.figures["ties"] == 1
    found = only(outcome)
    assert found.name == "unusable_empty_response" and found.rows == ["row 8"]
    assert "1 of 10 rows has the problem empty response (' ')" in found.sentence


def test_responses_that_repeat_each_other_are_found():
    rows = [answered(n, 3, 2) for n in range(5)]
    twin = dataclasses.replace(rows[2], name="twin")
    turned = {
        "chosen": rows[3].responses["rejected"],
        "rejected": rows[3].responses["chosen"],
    }
    opposite = dataclasses.replace(rows[3], name="turned", responses=turned)
    found = Repeated().look(data([*rows, twin, opposite], kind="responses")).findings
    assert {each.name: list(each.rows) for each in found} == {
        "repeated_rows": ["twin"],
        "opposite_labels": ["row 3", "turned"],
    }


def test_pairs_of_a_row_may_share_an_image():
    shared = {"chosen": image("a"), "rejected": image("b")}
    rows = [row(0, images=shared), row(1, images={**shared, "rejected": image("c")})]
    same = [dataclasses.replace(each, prompt="one", origin="row") for each in rows]
    outcome = Repeated().look(data(same))
    assert not outcome.findings and outcome.figures["images in several rows"] == 0


def test_models_are_read_by_position_and_by_side():
    rows = [
        row(n, first_won=n % 2 == 0, values={"model_0": "a", "model_1": "b"}) for n in range(60)
    ]
    figures = Models().look(data(rows)).figures
    assert figures["pairs of two models"] == 60 and figures["wins of a"].count == 30
    sides = [row(n, values={"chosen_model": b"a", "rejected_model": "b"}) for n in range(60)]
    outcome = Models().look(data(sides))
    assert outcome.figures["wins of a"].count == 60
    assert [finding.what[:40] for finding in outcome.findings] == [
        "a won 100.0 % (94.0 to 100.0 %) of 60 co",
        "b won 0.0 % (0.0 to 6.0 %) of 60 compari",
    ]


@pytest.mark.parametrize(
    "names", [("model1", "model2"), ("image_0_model", "image_1_model"), ("model_a", "model_b")]
)
def test_columns_of_models_are_known_by_their_numbers(names):
    values = dict(zip(names, ("x", "y"), strict=True))
    rows = [row(n, first_won=True, values={**values, "model": "z"}) for n in range(30)]
    assert Models().look(data(rows)).figures["wins of x"].count == 30


def test_models_of_fixed_sides_without_an_order_are_passed_over():
    rows = [row(n, values={"model_0": "a", "model_1": "b"}) for n in range(30)]
    assert Models().look(data(rows)).figures["pairs of two models"] == 0
    assert "no two columns" in Models().look(data([row(0, values={"model": "a"})])).passed_over


def labelled(number: int, by: int, *, turned: bool = False) -> CheckedRow:
    pair = [image(f"{number}-a"), image(f"{number}-b")]
    chosen, rejected = pair[::-1] if turned else pair
    return row(
        number,
        images={"chosen": chosen, "rejected": rejected},
        values={"user_id": by},
    )


def test_annotators_who_agree_and_annotators_who_toss_coins():
    alike = [labelled(n, by, turned=n % 2 == 0) for n in range(40) for by in (1, 2)]
    figures = Agreement().look(data(alike)).figures
    assert str(figures["Krippendorff's alpha"]).startswith("1.00")
    assert figures["unanimous pairs"].count == 40
    tossed = [
        labelled(n, by, turned=bool(n >> by & 1)) for n in range(256) for by in range(8)
    ]  # every outcome of eight coins once
    found = only(Agreement().look(data(tossed)))
    assert found.name == "no_agreement" and "alpha 0.00" in found.what


def test_votes_are_labels_of_as_many_people():
    rows = [row(n, scores=(3.0, 1.0), first_won=True) for n in range(40)]
    outcome = Agreement().look(data(rows, scores_are_votes=True))
    assert outcome.figures["labels of them"] == 160 and not outcome.findings  # 3 of 4 is no coin
    assert Agreement().look(data(rows)).passed_over


def test_small_images_and_sizes_that_give_the_label_away():
    sizes = {"chosen": image("a", (512, 512)), "rejected": image("b", (256, 256))}
    rows = [
        row(n, images={s: dataclasses.replace(i, digest=b"%16d" % n) for s, i in sizes.items()})
        for n in range(30)
    ]
    bias = only(Sizes().look(data(rows)))
    assert bias.name == "size_bias" and "the larger one won in 100.0 %" in bias.what
    found = {each.name: each.count for each in Sizes().look(data(rows, resolution=512)).findings}
    assert found == {"size_bias": 30, "small_images": 30}
    counts = Sizes().look(data(rows)).counts
    assert counts["Shorter side, pixels"] == {"256 to 511": 30, "512 to 767": 30}
    assert counts["Height x width"] == {"512 x 512": 30, "256 x 256": 30}


@pytest.mark.parametrize(
    ("column", "value", "flagged"),
    [
        ("nsfw", True, True),
        ("image_0_nsfw", b"true", True),
        ("nsfw_score", 0.4, False),
        ("toxicity", "0.9", True),
        ("is_safe", False, True),
        ("is_safe", 1, False),
        ("nsfw", None, False),
        ("nsfw", "no idea", False),
    ],
)
def test_flags_of_safety_columns(column, value, flagged):
    assert Safety.reads(column) and not Safety.reads("answer") and not Safety.reads("safeguard")
    found = Safety().look(data([row(0, values={column: value}), row(1, values={column: None})]))
    assert found.figures[f"flagged by {column}"] == flagged
    assert len(found.findings) == flagged


def test_lengths_of_responses():
    rows = [answered(n, 10 if n < 70 else 4, 6) for n in range(100)]
    outcome = Lengths().look(data(rows, kind="responses"))
    assert outcome.figures["mean words of chosen"] == 8.2
    found = only(outcome)
    assert "The longer response won in 70.0 % (60.0 to 78.8 %) of 100 pairs" in found.what
    even = [answered(n, 10 if n % 2 else 4, 6) for n in range(100)]
    assert not Lengths().look(data(even, kind="responses")).findings


def test_shared_prompts_are_told_whatever_their_spelling():
    other = OtherData(name="test", keys=frozenset({plain_text("PROMPT  3."), plain_text("x")}))
    found = only(SharedPrompts().look(data([row(n) for n in range(6)], others=[other])))
    assert found.count == 1 and found.rows == ["row 3"]
    assert "1 prompt of 1 row is in test as well" in found.what


def test_rows_that_are_held_out_themselves_are_not_compared():
    rows = [row(0), row(1, prompt="Prompt 0!"), row(2)]
    other = OtherData(name="data.holdout", keys=frozenset({"prompt 0"}), own=frozenset({0}))
    assert only(SharedPrompts().look(data(rows, others=[other]))).rows == ["row 1"]


def test_responses_share_images():
    rows = [
        row(n, images={"image 1": image(f"{n}")}, responses={"chosen": ResponseFacts(b"", 1)})
        for n in range(3)
    ]
    other = OtherData(name="pope", keys=frozenset({rows[1].images["image 1"].digest}))
    found = only(SharedPrompts().look(data(rows, kind="responses", others=[other])))
    assert "1 image of 1 row is in pope as well" in found.what


def test_intervals_are_those_of_the_confidence_asked_for():
    rows = [row(n, first_won=n < 114) for n in range(200)]
    assert exact_interval(114, 200, 0.95).low < 0.5 < exact_interval(114, 200, 0.9).low
    assert not Position().look(data(rows)).findings
    assert Position().look(data(rows, confidence=0.9)).findings
