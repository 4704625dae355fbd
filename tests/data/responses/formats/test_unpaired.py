"""Rows of one response each, desirable or not."""

from itertools import islice

import pytest

from diffalign.data.layout import Layout
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.conversation import Comparison
from diffalign.data.responses.reading import open_responses
from diffalign.data.responses.source import ResponseSource
from diffalign.data.skipping import LeftOut, Skipped, SkipReason
from diffalign.errors import DataError
from tests.data.encoders import loaded
from tests.data.responses.formats.forms import UNPAIRED, unpaired, write_lines

BOTH = frozenset({"chosen", "rejected"})


def found(folder, row):
    ((only,),) = open_responses(
        ResponseConfig(path=str(write_lines(folder, [row])))
    ).without_images()
    return only


def source(folder, rows, *, views=BOTH, size=4, **settings):
    return ResponseSource.open(
        ResponseConfig(path=str(write_lines(folder, rows)), **{"workers": 0, **settings}),
        views=views,
        run_seed=0,
        layout=Layout.start(samples_per_device=size, accumulation=1),
        processor=loaded("llava")[1],
        skipped=None,
    )


ASKED, RESPONSE = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}
SAID = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
ROWS = {
    "strings": {"prompt": "What?", "completion": "A cat."},
    "messages": {"prompt": [ASKED], "completion": [RESPONSE]},
    "a lone message": {"prompt": [ASKED], "completion": RESPONSE},
    "without a prompt": {"completion": [ASKED, RESPONSE], "prompt": None},
    "ms-swift": {"messages": [ASKED, RESPONSE]},
    "LLaMA-Factory": {"conversations": SAID},
    "with an end": {"prompt": "What?", "completion": "A cat.</s>"},
}


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("column", ["label", "kto_tag"])
@pytest.mark.parametrize(
    ("label", "side"), [(True, "chosen"), (0, "rejected"), ("False", "rejected"), (1.0, "chosen")]
)
def test_a_label_says_which_side_a_response_is(form, column, label, side, tmp_path):
    only = found(tmp_path, {**ROWS[form], column: label})
    assert isinstance(only, Comparison)
    assert only.responses == {side: "A cat."}
    assert [turn.text for turn in only.turns] == ["What?"]


@pytest.mark.parametrize("form", ROWS)
def test_without_a_column_of_labels_all_are_to_be_imitated(form, tmp_path):
    only = found(tmp_path, ROWS[form])
    assert isinstance(only, Comparison) and only.responses == {"chosen": "A cat."}


def test_a_row_without_its_label_is_left_out(tmp_path):
    assert found(tmp_path, {**ROWS["strings"], "label": None}) is LeftOut.UNLABELLED
    data = source(tmp_path, [unpaired(0), {**ROWS["strings"]}, unpaired(1)])
    assert data.left_out_counts == {"no label": 1}


@pytest.mark.parametrize("label", ["perhaps", 2, [True], 0.5])
def test_a_label_of_another_kind_is_a_malformed_row(label, tmp_path):
    only = found(tmp_path, {**ROWS["strings"], "label": label})
    assert isinstance(only, Skipped) and only.reason is SkipReason.MALFORMED


def test_rows_of_a_batch_are_those_of_each_side(tmp_path):
    batch = next(iter(source(tmp_path, [unpaired(i) for i in range(3)], size=3)))
    assert batch.rows is not None and batch.views == BOTH
    names = {name: [batch.sample_ids[i] for i in rows] for name, rows in batch.rows.items()}
    assert sorted(names["chosen"]) == ["pairs.jsonl:1", "pairs.jsonl:3"]
    assert names["rejected"] == ["pairs.jsonl:2"]
    for name, count in (("chosen", 2), ("rejected", 1)):
        assert len(batch.responses[name].input_ids) == count
        assert len(batch.images_of(name, None)["pixel_values"]) == count


def test_a_batch_may_have_one_side_alone(tmp_path):
    batches = list(islice(source(tmp_path, [unpaired(i) for i in range(2)], size=1), 2))
    assert sorted(tuple(batch.responses) for batch in batches) == [("chosen",), ("rejected",)]


def test_images_and_text_alone_may_be_mixed(tmp_path):
    plain = {key: value for key, value in unpaired(1).items() if key != "images"}
    batch = next(iter(source(tmp_path, [unpaired(0), plain, unpaired(2), plain], size=4)))
    assert sorted(batch.image_counts.tolist()) == [0, 0, 1, 1]
    assert not batch.images_of("rejected", None)


@pytest.mark.parametrize(
    ("views", "ids", "told"),
    [
        ({"rejected"}, {"pairs.jsonl:2", "pairs.jsonl:4"}, "rows of one response: 2 undesirable"),
        ({"chosen"}, {"pairs.jsonl:1", "pairs.jsonl:3"}, "rows of one response: 2 desirable"),
    ],
)
def test_rows_that_the_objective_does_not_read_are_left_out(views, ids, told, tmp_path):
    data = source(tmp_path, [unpaired(i) for i in range(4)], views=frozenset(views), size=2)
    batch = next(iter(data))
    assert set(batch.sample_ids) == ids
    assert data.left_out_counts == {"a label that the objective does not read": 2}
    assert data.describe()[-1] == told


def test_both_kinds_are_counted_and_one_alone_is_told(tmp_path):
    data = source(tmp_path / "both", [unpaired(i) for i in range(3)])
    assert data.describe()[-1] == "rows of one response: 2 desirable, 1 undesirable"
    data = source(tmp_path / "one", [unpaired(i) for i in (0, 2)])
    assert data.describe()[-1].startswith("rows of one response: 2 desirable, 0 undesirable; with")


@pytest.mark.parametrize("form", UNPAIRED)
def test_what_compares_two_responses_is_refused(form, tmp_path):
    file = write_lines(tmp_path, [UNPAIRED[form](i) for i in range(2)])
    with pytest.raises(DataError, match=r"unpaired.*dpo compares two responses.*kto, bco, npo"):
        ResponseSource.open(
            ResponseConfig(path=str(file)),
            views=BOTH,
            run_seed=0,
            layout=Layout.start(samples_per_device=1, accumulation=1),
            processor=loaded("llava")[1],
            skipped=None,
            pairs_for="dpo",
        )


def test_what_needs_labels_is_refused_without_them(tmp_path):
    with pytest.raises(DataError, match="offers the responses chosen, and the objective needs rej"):
        source(tmp_path, [UNPAIRED["demonstrations"](0)])


def test_the_preview_shows_the_side(tmp_path):
    rows = source(tmp_path, [unpaired(i) for i in range(2)]).preview(2).rows
    assert [dict(row.responses) for row in rows] == [
        {"chosen": "It is 0."},
        {"rejected": "It is not 1."},
    ]
