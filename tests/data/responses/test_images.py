"""Images in every spelling that data sets have."""

import base64
import json

import pytest

from diffalign.data.decoding import encoded_image
from diffalign.data.layout import Layout
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.images import image_of, images_of
from diffalign.data.responses.reading import open_responses
from diffalign.data.responses.source import ResponseSource
from diffalign.data.skipping import Skipped, SkipReason, UnusableRowError
from diffalign.errors import DataError
from tests.data.encoders import loaded
from tests.data.responses.formats.forms import tiny_png, write_lines
from tests.layouts import encoded, solid_image

PNG = tiny_png(3)
BASE64 = base64.b64encode(PNG).decode()
UNPADDED = base64.urlsafe_b64encode(PNG).decode().rstrip("=")


def blocks(image, text="What is it?"):
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def row(image, /, **further):
    return {"prompt": blocks(image), "chosen": "A cat.", "rejected": "A dog.", **further}


def opened(folder, *rows):
    return open_responses(ResponseConfig(path=str(write_lines(folder, rows))))


def pair(folder, *rows):
    return opened(folder, *rows).pair(0, 0)


NAMED = [
    {"type": "image", "image": "0.png"},
    {"type": "image", "image": "0.png", "text": None, "image_url": None},
    {"type": "image", "path": "0.png"},
    {"type": "image", "url": "0.png"},
    {"type": "image", "image": {"path": "0.png", "bytes": None}},
    {"type": "image_url", "image_url": {"url": "0.png"}},
    {"type": "image_url", "image_url": "0.png"},
    {"type": "input_image", "image_url": "0.png"},
    {"image": "0.png"},
]


@pytest.mark.parametrize("block", NAMED)
def test_a_block_may_name_the_file(block, tmp_path):
    found = pair(tmp_path, row(block))
    assert found.images == (tmp_path / "0.png",)
    assert found.turns[0].text == "<image>What is it?"
    assert found.turns[0].images == ()


def test_a_block_may_name_the_file_by_its_address(tmp_path):
    block = {"type": "image_url", "image_url": {"url": (tmp_path / "0.png").as_uri()}}
    assert pair(tmp_path, row(block)).images == (tmp_path / "0.png",)


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "image": f"data:image/png;base64,{BASE64}"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}"}},
        {"type": "image", "base64": BASE64},
        {"type": "image", "source": {"type": "base64", "media_type": "x", "data": BASE64}},
    ],
)
def test_a_block_may_hold_the_file(block, tmp_path):
    assert pair(tmp_path, row(block)).images == (PNG,)


def test_blocks_may_be_in_the_order_of_the_column_or_say_their_own(tmp_path):
    content = [{"type": "image", "index": i, "text": None} for i in (1, 0)]
    asked = [{"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}]
    found = pair(tmp_path, {**row({}), "prompt": asked, "images": ["0.png", "1.png"]})
    assert [image.name for image in found.images] == ["1.png", "0.png"]


def test_a_marker_takes_the_next_image_of_the_column(tmp_path):
    content = [{"type": "image", "image": "0.png"}, {"type": "image"}, {"text": "What?"}]
    asked = [{"role": "user", "content": content}]
    found = pair(tmp_path, {**row({}), "prompt": asked, "images": ["1.png"]})
    assert [image.name for image in found.images] == ["0.png", "1.png"]


@pytest.mark.parametrize("column", ["images", "image"])
def test_messages_may_name_the_files_of_the_column_again(column, tmp_path):
    record = {"bytes": "eA==", "path": "0.png"} if column == "image" else "sub/0.png"
    found = pair(tmp_path, row(NAMED[0], **{column: [record]}))
    assert isinstance(found.images[0], bytes) == (column == "image")


@pytest.mark.parametrize("column", [["1.png"], ["0.png", "1.png"]])
def test_messages_and_column_that_disagree_are_skipped(column, tmp_path):
    found = pair(tmp_path, row(NAMED[0], images=column))
    assert isinstance(found, Skipped) and found.reason is SkipReason.MARKERS


@pytest.mark.parametrize("index", [1, -1])
def test_a_block_cannot_show_an_image_that_the_column_lacks(index, tmp_path):
    found = pair(tmp_path, row({"type": "image", "index": index}, images=["0.png"]))
    assert isinstance(found, Skipped) and found.reason is SkipReason.MARKERS


def test_an_image_within_a_response_is_skipped(tmp_path):
    response = [{"role": "assistant", "content": [NAMED[0], {"type": "text", "text": "This."}]}]
    (found,) = opened(tmp_path, {**row({"type": "image"}), "chosen": response}).without_images()
    assert found[0].reason is SkipReason.MARKERS


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("0.png", "0.png"),
        ("sub\\0.png", "sub/0.png"),
        ("sub\\0.png", "sub\\0.png"),
        ({"url": "0.png"}, "0.png"),
        ({"path": "0.png", "bytes": None}, "0.png"),
        ("file:0.png", "file:0.png"),
        ("file://0.png", "0.png"),
        ("file://sub/a%20b.png", "sub/a b.png"),
        ("C.png", "C.png"),
    ],
)
def test_names_start_from_the_folder(value, name, tmp_path):
    if "\\" in name:
        (tmp_path / name).touch()
    assert image_of(value, tmp_path) == tmp_path / name


@pytest.mark.parametrize("host", ["", "localhost"])
def test_an_address_of_a_file_is_that_file(host, tmp_path):
    assert image_of(f"file://{host}{tmp_path}/a.png", None) == tmp_path / "a.png"


@pytest.mark.parametrize(
    "value",
    [
        PNG,
        bytearray(PNG),
        {"bytes": PNG, "path": "x.png"},
        BASE64,
        {"bytes": BASE64},
        {"base64": UNPADDED},
        f"data:image/png;base64,{BASE64}",
        f"data:image/png;charset=x;base64,{BASE64.replace('+', '%2B')}",
    ],
)
def test_content_is_decoded(value):
    assert image_of(value, None) == PNG


@pytest.mark.parametrize("value", [None, "", " ", {"bytes": None, "path": None}, float("nan")])
def test_nothing_is_no_image(value):
    assert images_of(value, None) == (None,)


@pytest.mark.parametrize("value", [True, -1, 1.5, {"colour": "red"}, ["0.png"], "a\0.png", object])
def test_what_is_no_image_is_a_malformed_row(value):
    with pytest.raises(UnusableRowError) as caught:
        image_of(value, None)
    assert caught.value.reason is SkipReason.MALFORMED


@pytest.mark.parametrize(
    "address",
    [
        "https://example.com/a.png",
        {"url": "http://me:secret@example.com/a.png?signature=secret"},
        "s3://bucket/a.png",
        "HTTPS://example.com/a.png",
    ],
)
def test_an_address_on_the_network_is_named_with_what_to_do(address):
    with pytest.raises(UnusableRowError) as caught:
        image_of(address, None)
    assert caught.value.reason is SkipReason.REMOTE
    assert "/a.png" in caught.value.detail and "Download" in caught.value.detail
    assert "secret" not in caught.value.detail


@pytest.mark.parametrize("value", [139, 139.0, "139", "000000000139", "000000000139.jpg"])
@pytest.mark.parametrize(
    "there", ["COCO_train2014_000000000139.jpg", "val2017/000000000139.jpg", "139.png"]
)
def test_a_number_of_coco_is_found_by_its_naming(value, there, tmp_path):
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_bytes(PNG)
    assert image_of(value, tmp_path) == tmp_path / there


def test_a_number_without_a_file_is_told_with_what_was_looked_for(tmp_path):
    found = pair(tmp_path, {"prompt": "?", "chosen": "a", "rejected": "b", "image": 139})
    assert found.reason is SkipReason.MISSING_IMAGE
    assert "the number 139" in found.detail and "COCO_train2014_000000000139.jpg" in found.detail


# Columns that not every row has


def test_images_may_begin_in_later_rows(tmp_path):
    text = {"prompt": "What?", "chosen": "a", "rejected": "b"}
    data = opened(tmp_path, *[text] * 120, {**text, "images": ["0.png"]})
    assert "images from images" in data.summary
    assert data.pair(0, 0).images == ()
    assert data.pair(120, 0).images == (tmp_path / "0.png",)


def test_a_form_is_recognised_by_columns_of_later_rows(tmp_path):
    row = {"question": "What?", "chosen": "a", "rejected": "b"}
    data = opened(tmp_path, row, {**row, "image": "0.png"})
    assert "read as rlaif_v" in data.summary
    assert data.pair(0, 0).reason is SkipReason.MISSING_IMAGE


def test_a_column_of_images_of_later_rows_under_another_name_is_refused(tmp_path):
    text = {"prompt": "What?", "chosen": "a", "rejected": "b"}
    with pytest.raises(Exception, match="photo looks like one of images"):
        opened(tmp_path, text, {**text, "photo": "0.png"})


def test_the_name_of_a_column_may_be_that_of_later_rows(tmp_path):
    text = {"prompt": "What?", "chosen": "a", "rejected": "b"}
    file = write_lines(tmp_path, [text, {**text, "photo": "0.png"}])
    data = open_responses(ResponseConfig(path=str(file), columns={"image": "photo"}))
    assert data.pair(1, 0).images == (tmp_path / "0.png",)


def test_of_two_columns_the_one_with_images_counts(tmp_path):
    row = {"prompt": "?", "chosen": "a", "rejected": "b", "images": None, "image": "0.png"}
    assert pair(tmp_path, row).images == (tmp_path / "0.png",)


# Images that a processor refuses


@pytest.mark.parametrize(
    ("size", "family"), [((401, 2), "qwen2_vl"), ((1, 1), "qwen2_vl"), ((1, 30), "llava")]
)
def test_an_image_that_the_processor_refuses_is_skipped_and_listed(size, family, tmp_path):
    rows = [{"prompt": "?", "chosen": "a", "rejected": "b", "image": f"{i}.png"} for i in range(3)]
    write_lines(tmp_path, rows)
    (tmp_path / "1.png").write_bytes(encoded(solid_image((9, 9, 9), size=size)))
    log = tmp_path / "skipped.jsonl"
    source = ResponseSource.open(
        ResponseConfig(path=str(tmp_path / "pairs.jsonl"), workers=0, max_bad_fraction=0.5),
        views=frozenset({"chosen", "rejected"}),
        run_seed=0,
        layout=Layout.start(samples_per_device=1, accumulation=1),
        processor=loaded(family)[1],
        skipped=log,
    )
    batches = iter(source)
    assert {next(batches).sample_ids[0] for _ in range(4)} == {"pairs.jsonl:1", "pairs.jsonl:3"}
    (line,) = map(json.loads, log.read_text().splitlines())
    assert line["reason"] == "image that the model's processor refuses"
    assert f"{size[0]} x {size[1]}" in line["detail"]


def test_a_data_set_of_such_images_alone_ends_with_a_sentence(tmp_path):
    write_lines(tmp_path, [{"prompt": "?", "chosen": "a", "rejected": "b", "image": "0.png"}])
    (tmp_path / "0.png").write_bytes(encoded(solid_image((9, 9, 9), size=(1, 1))))
    source = ResponseSource.open(
        ResponseConfig(path=str(tmp_path / "pairs.jsonl"), workers=0),
        views=frozenset({"chosen", "rejected"}),
        run_seed=0,
        layout=Layout.start(samples_per_device=1, accumulation=1),
        processor=loaded("qwen2_vl")[1],
        skipped=None,
    )
    with pytest.raises(DataError, match="1 x 1 pixels"):
        next(iter(source))


@pytest.mark.parametrize("spelling", ["standard", "of addresses", "without padding"])
def test_base64_is_read_as_the_reader_of_pairs_reads_it(spelling):
    content = encoded(solid_image((200, 0, 0)))
    text = {
        "standard": base64.b64encode(content),
        "of addresses": base64.urlsafe_b64encode(content),
        "without padding": base64.b64encode(content).rstrip(b"="),
    }[spelling].decode()
    assert image_of(text, None) == encoded_image(text, None) == content


def test_text_that_is_no_base64_says_so():
    with pytest.raises(UnusableRowError, match="no base64") as refusal:
        image_of({"bytes": "????"}, None)
    assert refusal.value.reason is SkipReason.CORRUPT
