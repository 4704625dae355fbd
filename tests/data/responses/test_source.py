import json
from itertools import islice

import pytest
import torch

from diffalign.data.layout import Layout
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.corruptions.random import Random
from diffalign.data.responses.corruptions.replaced import Replaced
from diffalign.data.responses.source import ResponseSource
from diffalign.errors import ConfigError, DataError
from tests.data.conftest import ids, take
from tests.data.responses.formats import forms
from tests.data.responses.formats.forms import FORMS, rated, write_lines
from tests.tiny_vlm import tiny_llava
from tests.worlds import MOVED, ON_TWO, samples_of_steps

BOTH = frozenset({"chosen", "rejected"})


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny_llava(tmp_path_factory.mktemp("llava")))


def open_source(
    path, processor, *, views=BOTH, samples_per_device=2, layout=None, skipped=None, **settings
):
    config = ResponseConfig(path=str(path), **{"workers": 0, **settings})
    return ResponseSource.open(
        config,
        views=views,
        run_seed=0,
        layout=layout or Layout.start(samples_per_device=samples_per_device, accumulation=1),
        processor=processor,
        skipped=skipped,
    )


def rows(count, form=forms.rlaif_v):
    return [form(i) for i in range(count)]


def same(first, second):
    """Whether two batches agree in ids, tokens and images."""
    return first.sample_ids == second.sample_ids and all(
        torch.equal(one, two)
        for one, two in [
            *[
                (first.responses[name].input_ids, second.responses[name].input_ids)
                for name in first.responses
            ],
            *[
                (
                    first.image_inputs[name]["pixel_values"],
                    second.image_inputs[name]["pixel_values"],
                )
                for name in first.image_inputs
            ],
        ]
    )


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_becomes_batches(kind, processor, tmp_path):
    write_lines(tmp_path, rows(2, FORMS[kind]))
    (batch,) = take(open_source(tmp_path, processor), 1)
    assert len(batch) == 2
    images = 2 if kind == "mia_dpo" else 1
    assert batch.image_counts.tolist() == [images] * 2
    assert len(batch.image_inputs[None]["pixel_values"]) == 2 * images
    chosen, rejected = batch.responses["chosen"], batch.responses["rejected"]
    assert chosen.response_mask.any(dim=1).all()
    assert (chosen.response_mask.sum(1) < rejected.response_mask.sum(1)).all()


def test_an_epoch_sees_every_pair_once_and_the_next_in_another_order(processor, tmp_path):
    write_lines(tmp_path, rows(6))
    seen = ids(take(open_source(tmp_path, processor), 6))
    assert sorted(seen[:6]) == sorted(seen[6:]) == [f"pairs.jsonl:{i + 1}" for i in range(6)]
    assert seen[:6] != seen[6:]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_source_goes_on_where_it_was(workers, processor, tmp_path):
    write_lines(tmp_path, rows(5))
    source = open_source(tmp_path, processor, workers=workers)
    batches = iter(source)
    for _ in range(3):
        next(batches)
    state = json.loads(json.dumps(source.state_dict()))
    expected = list(islice(batches, 4))
    resumed = open_source(tmp_path, processor)
    resumed.load_state_dict(state)
    assert all(map(same, expected, take(resumed, 4)))


def test_two_ranks_see_what_one_sees(processor, as_rank, tmp_path):
    write_lines(tmp_path, rows(5))
    one = take(open_source(tmp_path, processor, samples_per_device=4), 4)
    parts = []
    for rank in range(2):
        as_rank(rank, 2)
        parts.append(take(open_source(tmp_path, processor), 4))
    for whole, first, second in zip(one, *parts, strict=True):
        assert whole.sample_ids == first.sample_ids + second.sample_ids
        pixels = [part.image_inputs[None]["pixel_values"] for part in (first, second)]
        assert torch.equal(whole.image_inputs[None]["pixel_values"], torch.cat(pixels))


@pytest.mark.parametrize("moved", MOVED)
def test_a_step_sees_the_same_responses_on_any_number_of_processes(
    moved, processor, monkeypatch, tmp_path
):
    write_lines(tmp_path, [*rows(6), changed(OTHER, question=" ")])

    def see(stages):
        return samples_of_steps(
            monkeypatch,
            lambda layout: open_source(tmp_path, processor, layout=layout, max_bad_fraction=0.5),
            stages,
            accumulation=2,
        )

    assert see(MOVED[moved]) == see(ON_TWO)


def test_a_checkpoint_of_another_global_batch_is_refused(processor, tmp_path):
    write_lines(tmp_path, rows(5))
    state = open_source(tmp_path, processor).state_dict()
    with pytest.raises(DataError, match="micro-batches of 2 samples, and those of this run have 4"):
        open_source(tmp_path, processor, samples_per_device=4).load_state_dict(state)


def changed(row, **values):
    return {**row, **values}


OTHER = forms.rlaif_v(1)
BAD = {
    "empty prompt": changed(OTHER, question=" "),
    "empty response": changed(OTHER, rejected="\n"),
    "identical chosen and rejected": changed(OTHER, rejected=" It is 1. "),
    "wrong number of image markers": changed(OTHER, question="<image> and <image>: what?"),
    "missing image": changed(OTHER, image="gone.png"),
    "corrupt image": changed(OTHER, image="bad.png"),
    "zero-size image": changed(OTHER, image="empty.png"),
    "row above max_length": changed(OTHER, chosen="x" * 400),
    "malformed row": changed(OTHER, question=7),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_dropped_counted_and_listed(reason, processor, tmp_path):
    write_lines(tmp_path, [forms.rlaif_v(0), BAD[reason], forms.rlaif_v(2)])
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "empty.png").write_bytes(b"")
    log = tmp_path / "run" / "skipped.jsonl"
    source = open_source(tmp_path, processor, max_length=300, max_bad_fraction=0.5, skipped=log)
    assert set(ids(take(source, 4))) == {"pairs.jsonl:1", "pairs.jsonl:3"}
    assert source.skipped_counts == {reason: 1}
    (line,) = map(json.loads, log.read_text().splitlines())
    assert (line["sample_id"], line["reason"]) == ("pairs.jsonl:2", reason)
    assert line["detail"]
    assert source.describe_end() == [f"pairs skipped as unusable: 1 {reason}, listed in {log}"]


@pytest.mark.parametrize("value", [None, "", []])
def test_a_row_of_a_set_of_images_is_not_seen_without_its_own(value, processor, tmp_path):
    write_lines(tmp_path, [forms.rlaif_v(0), changed(OTHER, image=value)])
    source = open_source(tmp_path, processor, max_bad_fraction=0.5)
    assert set(ids(take(source, 2))) == {"pairs.jsonl:1"}
    assert source.skipped_counts == {"missing image": 1}


def test_a_row_that_lacks_the_column_of_images_is_not_seen_as_text(processor, tmp_path):
    bare = {name: value for name, value in OTHER.items() if name != "image"}
    write_lines(tmp_path, [forms.rlaif_v(0), bare])
    source = open_source(tmp_path, processor, max_bad_fraction=0.5)
    assert set(ids(take(source, 2))) == {"pairs.jsonl:1"}
    assert source.skipped_counts == {"missing image": 1}


def test_a_marker_without_images_is_a_bad_row(processor, tmp_path):
    rejected = changed(forms.trl(1), images=[])
    write_lines(
        tmp_path, [forms.trl(0), rejected, changed(forms.trl(2), images=["0.png", "1.png"])]
    )
    source = open_source(tmp_path, processor, max_bad_fraction=0.9)
    assert set(ids(take(source, 3))) == {"pairs.jsonl:1"}
    assert source.skipped_counts == {"wrong number of image markers": 2}


def test_a_marker_in_an_response_is_a_bad_row(processor, tmp_path):
    write_lines(tmp_path, [forms.rlaif_v(0), changed(OTHER, chosen="An <image>.")])
    source = open_source(tmp_path, processor, max_bad_fraction=0.5)
    assert source.describe()[-1] == "pairs skipped as unusable: 1 wrong number of image markers"


def test_another_number_of_replacement_images_is_a_bad_row(processor, tmp_path):
    more = changed(forms.re_align(1), retrieved_image=["8.png", "9.png"])
    none = changed(forms.re_align(1), retrieved_image=None)
    write_lines(tmp_path, [forms.re_align(0), more, none])
    source = open_source(tmp_path, processor, max_bad_fraction=0.9)
    assert set(ids(take(source, 3))) == {"pairs.jsonl:1"}
    assert source.skipped_counts == {"wrong number of image markers": 1, "missing image": 1}


@pytest.mark.parametrize(
    "row",
    [
        changed(forms.povid(1), conversations=[]),
        changed(forms.povid(1), rejected_conversations=[{"from": "robot", "value": "x"}]),
        changed(forms.povid(1), conversations=forms.povid(1)["conversations"][1:]),
        {"id": "1", "image": "1.png"},
    ],
)
def test_a_conversation_of_another_shape_is_a_bad_row(row, processor, tmp_path):
    write_lines(tmp_path, [forms.povid(0), row])
    source = open_source(tmp_path, processor, max_bad_fraction=0.5)
    assert source.skipped_counts == {"malformed row": 1}


def test_too_many_bad_rows_stop_the_run(processor, tmp_path):
    write_lines(tmp_path, [forms.rlaif_v(0), BAD["empty prompt"]])
    message = r"1 of 2 pairs cannot be used.*responses.max_bad_fraction = 0.01(.|\n)*empty prompt"
    with pytest.raises(DataError, match=message):
        open_source(tmp_path, processor)


def test_a_set_without_a_usable_pair_is_refused(processor, tmp_path):
    write_lines(tmp_path, [BAD["empty prompt"]])
    with pytest.raises(DataError, match=r"nothing to train on.*1 rows: 1 pairs.*empty prompt"):
        open_source(tmp_path, processor, max_bad_fraction=1.0)


def test_the_mapping_and_the_counts_are_told(processor, tmp_path):
    row = forms.vlfeedback(0)
    row["completions"].append(rated("It is 0, too.", "4", "5", "5"))
    write_lines(tmp_path, [row, forms.vlfeedback(1)])
    source = open_source(tmp_path, processor)
    lines = source.describe()
    assert f"{tmp_path}: 1 jsonl file, read as vlfeedback: prompt from prompt" in lines[0]
    assert "images from img_path" in lines[0]
    assert lines[1:] == ["2 rows: 3 pairs, 1 left out (tie)"]
    assert source.left_out_counts == {"tie": 1}
    assert source.describe_end() == ["rows left out, without a preference: 1 tie"]
    assert sorted(set(ids(take(source, 3)))) == [
        "pairs.jsonl:1#0",
        "pairs.jsonl:1#1",
        "pairs.jsonl:2",
    ]


def test_only_the_first_pairs_are_used_under_a_limit(processor, tmp_path):
    write_lines(tmp_path, rows(5))
    source = open_source(tmp_path, processor, limit=2)
    assert set(ids(take(source, 4))) == {"pairs.jsonl:1", "pairs.jsonl:2"}


def test_a_fingerprint_is_that_of_the_content(processor, tmp_path):
    write_lines(tmp_path / "one", rows(3))
    write_lines(tmp_path / "two", rows(3))
    write_lines(tmp_path / "three", rows(4))
    one, two, three = (
        open_source(tmp_path / name, processor).fingerprint() for name in ("one", "two", "three")
    )
    assert one == two != three


def test_the_first_pairs_are_shown(processor, tmp_path):
    write_lines(tmp_path, [*rows(2), changed(forms.rlaif_v(2), image="gone.png")])
    shown = open_source(tmp_path, processor).preview(9)
    assert shown.lines[0].startswith(str(tmp_path))
    assert [row.prompt for row in shown.rows] == [f"<image>\nWhat is {i}?" for i in range(3)]
    assert shown.rows[0].responses == {"chosen": "It is 0.", "rejected": "It is not 0."}
    assert shown.rows[0].images == ((2, 4),)
    assert shown.rows[2].images[0].startswith("missing image: ")
    assert [row.unusable is None for row in shown.rows] == [True, True, False]


def test_a_pair_is_shown_with_why_training_will_skip_it(processor, tmp_path):
    write_lines(tmp_path, rows(1))
    (row,) = open_source(tmp_path, processor, max_length=5).preview(1).rows
    assert row.unusable is not None and row.unusable.startswith("row above max_length: ")


def test_a_response_that_the_form_lacks_is_refused(processor, tmp_path):
    write_lines(tmp_path, rows(2))
    message = r"offers the responses chosen, rejected, and the objective needs revised for its view"
    with pytest.raises(DataError, match=message):
        open_source(tmp_path, processor, views=frozenset({"chosen", "revised:score"}))


def test_a_condition_that_the_config_lacks_is_refused(processor, tmp_path):
    write_lines(tmp_path, rows(2))
    with pytest.raises(ConfigError, match="crop"):
        open_source(tmp_path, processor, views=frozenset({"chosen", "chosen@crop"}))


def test_retrieved_images_stand_under_their_condition(processor, tmp_path):
    write_lines(tmp_path, rows(2, forms.re_align))
    (batch,) = take(
        open_source(
            tmp_path,
            processor,
            views=frozenset({"chosen", "rejected", "chosen@retrieved"}),
            conditions={"retrieved": Replaced()},
        ),
        1,
    )
    own, retrieved = (batch.image_inputs[name]["pixel_values"] for name in (None, "retrieved"))
    assert torch.equal(retrieved[0], retrieved[1])  # both rows name 9.png
    assert not torch.equal(own[0], own[1])


def test_a_random_image_is_of_another_row_and_the_same_for_every_rank(processor, tmp_path):
    write_lines(tmp_path, rows(2))
    views = frozenset({"chosen", "chosen@other"})

    def seen():
        source = open_source(tmp_path, processor, views=views, conditions={"other": Random()})
        return take(source, 4)

    batches = seen()
    for batch in batches:
        own, other = (batch.image_inputs[name]["pixel_values"] for name in (None, "other"))
        assert torch.equal(other, own.flip(0))
    assert all(map(same, batches, seen()))
