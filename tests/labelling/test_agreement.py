"""Agreement and bias: values of other code and by hand."""

from __future__ import annotations

import krippendorff
import numpy as np
import pytest

from diffalign.labelling.agreement import agreement, of_models, sections, sentences
from diffalign.labelling.answers import VERDICTS, Answer
from diffalign.labelling.items import Item

ITEMS = [Item(item_id=f"i{n}", sides=2, models=("base", "new")) for n in range(12)]


def answer(person, number, choice, order=(0, 1), seconds=None):
    return Answer(person=person, item=f"i{number}", answer=choice, order=order, seconds=seconds)


@pytest.fixture
def answers():
    rng = np.random.default_rng(3)
    choices = ("left", "right", "tie", "both_bad", "skip")
    found = []
    for person in ("Ana", "Ben", "Cem"):
        for number in range(12):
            choice = choices[min(4, int(rng.integers(0, 6)))] if rng.random() < 0.6 else "left"
            order = tuple(int(n) for n in rng.permutation(2)) if person == "Ben" else (0, 1)
            found.append(answer(person, number, choice, order))
    return found


def test_alpha_is_that_of_the_library(answers):
    table = np.full((3, 12), np.nan)
    for given in answers:
        for _, verdict in given.verdicts():
            row = ("Ana", "Ben", "Cem").index(given.person)
            table[row, int(given.item[1:])] = VERDICTS.index(verdict)
    wanted = krippendorff.alpha(table, level_of_measurement="nominal")
    found = agreement(ITEMS, answers)
    assert found.alpha == pytest.approx(wanted, abs=1e-12)
    assert found.alpha_interval.low <= found.alpha <= found.alpha_interval.high
    assert abs(found.alpha) > 0.01


def test_agreement_of_all_and_of_nobody():
    alike = [answer(p, n, "left" if n % 2 else "right") for p in ("A", "B") for n in range(12)]
    assert agreement(ITEMS, alike).alpha == 1
    alone = [answer("A", n, "left") for n in range(12)]
    assert (agreement(ITEMS, alone).alpha, agreement(ITEMS, alone).compared) == (None, 0)
    same = [answer(p, n, "left") for p in ("A", "B") for n in range(12)]
    assert agreement(ITEMS, same).alpha is None  # one verdict alone: nothing that chance could do


def test_who_leans_to_a_side_is_told_and_who_does_not_is_not():
    leaning = [answer("Lea", n, "left", order=(n % 2, 1 - n % 2)) for n in range(12)]
    steady = [answer("Ben", n, ("left", "right")[n % 2], seconds=float(n)) for n in range(12)]
    found = agreement(ITEMS, leaning + steady)
    assert {name: person.leans for name, person in found.people.items()} == {
        "Lea": "left",
        "Ben": "",
    }
    assert found.people["Ben"].seconds == 5.5
    assert found.people["Ben"].left_share == 0.5
    (said,) = [line for line in sentences(found) if line.startswith("Lea")]
    assert "100% of 12" in said
    assert "(74% to 100%)" in said  # Clopper and Pearson, 12 of 12
    text = "".join(map(str, sections(found)[1].parts))
    assert "Lea leans to the left." in text
    whole = text + "".join(map(str, sections(found)[0].parts))
    assert "base" not in whole
    assert "first" not in whole  # which side of the data wins would tell it


def test_others_have_a_majority_or_say_nothing():
    given = [
        *(answer(p, 0, "left") for p in "ABC"),
        answer("D", 0, "right"),
        answer("A", 1, "left"),
        answer("D", 1, "left"),
        *(answer(p, 2, c) for p, c in (("A", "left"), ("B", "right"), ("D", "left"))),
    ]
    people = agreement(ITEMS, given).people
    assert (people["D"].with_others, people["D"].compared) == (0.5, 2)  # wrong, right, undecided
    assert (people["A"].with_others, people["A"].compared) == (1.0, 2)  # 2: one to one of others


def test_models_win_by_their_sides_and_not_by_their_places():
    items = [*ITEMS[:4], Item(item_id="i4", sides=2, models=("new", "base"))]
    given = [
        answer("A", 0, "left"),
        answer("A", 1, "left", order=(1, 0)),
        answer("A", 2, "right"),
        answer("A", 3, "both_bad"),
        answer("A", 4, "left"),
    ]
    found = agreement(items, given)
    (models,) = found.models
    assert (models.first, models.second) == ("base", "new")
    assert (models.wins, models.ties, models.losses) == (1, 1, 3)
    assert of_models(found)[0].startswith("base against new: 1 won, 1 tied, 3 lost; 25% of decided")
